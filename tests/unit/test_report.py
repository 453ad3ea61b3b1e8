"""Reports: what is written is read again, and a report that contradicts itself is refused."""

import json

import pytest
from pydantic import ValidationError

from compressor.errors import RunError
from compressor.proportions import Proportion
from compressor.reports.report import (
    CAVEAT,
    Count,
    SampleTable,
    ValidityRow,
    class_counts,
    percent,
    read_report,
    w_robust_fraction,
    write_report,
)


def count(num_correct, num_total=10):
    return Count.of(Proportion(num_correct=num_correct, num_total=num_total))


def check(status):
    return ValidityRow(
        name="zero_gradient", status=status, found="-", threshold="-", p_value=None, advice="-"
    )


@pytest.fixture
def written(make_report, tmp_path):
    path = tmp_path / "report.json"
    write_report(make_report(), path)
    return path


@pytest.mark.parametrize("status", ["verified", "incomplete", "unverified", "invalid"])
def test_round_trip(status, make_report, tmp_path):
    changes = {"validity": (check("alarm"),)} if status == "invalid" else {}
    changes |= {"worst_case": None} if status == "unverified" else {}
    report = make_report(status=status, **changes)
    write_report(report, tmp_path / "report.json")
    assert read_report(tmp_path / "report.json") == report


def test_count_carries_the_exact_interval():
    five_of_ten = count(5)
    assert five_of_ten.fraction == 0.5
    assert (five_of_ten.low_95, five_of_ten.high_95) == pytest.approx(
        (0.187086, 0.812914), abs=1e-6
    )
    assert percent(five_of_ten) == "50.00 %"


def test_w_robust_is_the_mean():
    assert w_robust_fraction(count(8), count(3)) == pytest.approx(0.55)


def test_class_counts_are_those_of_the_samples(make_report):
    report = make_report((None, "clean", "pgd_sat", None, None, None))
    rows = [
        (name, c.num_correct, r.num_correct, r.num_total) for name, c, r in class_counts(report)
    ]
    assert rows == [("zero", 2, 2, 2), ("one", 1, 1, 2), ("two", 1, 0, 1), ("three", 1, 1, 1)]


def test_class_counts_leave_out_classes_without_images(make_report):
    assert [row[0] for row in class_counts(make_report((None, "clean")))] == ["zero", "one"]


def test_caveat_is_there_without_being_asked_for(make_report):
    assert make_report().caveat == CAVEAT


SAMPLES = {
    "index": tuple(range(10)),
    "label": tuple(i % 4 for i in range(10)),
    "broken_by": (None,) * 5 + ("pgd_sat",) * 3 + ("clean",) * 2,
    "prediction": (None,) * 5 + (2, 3, 0, 1, 2),
}


@pytest.mark.parametrize("column", SAMPLES)
def test_columns_of_different_lengths_are_refused(column, make_report):
    short = SAMPLES | {column: SAMPLES[column][:-1]}
    with pytest.raises(ValidationError, match="columns of samples have different lengths"):
        make_report(samples=SampleTable(**short))


def test_image_that_is_there_twice_is_refused(make_report):
    twice = SAMPLES | {"index": (0, 0, *range(2, 10))}
    with pytest.raises(ValidationError, match="an image is in samples twice"):
        make_report(samples=SampleTable(**twice))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clean": count(9)}, "clean is 9 of 10, samples say 8 of 10"),
        ({"clean": count(8, 9)}, "clean is 8 of 9, samples say 8 of 10"),
        ({"worst_case": count(6)}, "worst_case is 6 of 10, samples say 5 of 10"),
        ({"worst_case": count(5, 5)}, "worst_case is 5 of 5, samples say 5 of 10"),
    ],
)
def test_count_that_the_samples_contradict_is_refused(change, message, make_report):
    with pytest.raises(ValidationError, match=message):
        make_report(**change)


def test_samples_that_hide_a_broken_image_are_refused(make_report):
    """The number of the worst case may be raised only together with all that it rests on."""
    flattered = SAMPLES | {
        "broken_by": (None,) * 6 + ("pgd_sat",) * 2 + ("clean",) * 2,
        "prediction": (None,) * 6 + (3, 0, 1, 2),
    }
    with pytest.raises(ValidationError, match="worst_case is 5 of 10, samples say 6"):
        make_report(samples=SampleTable(**flattered))
    with pytest.raises(ValidationError, match="pgd_sat broke 3, samples say otherwise"):
        make_report(samples=SampleTable(**flattered), worst_case=count(6))


def test_attack_that_broke_another_number_is_refused(make_report):
    rows = make_report().attacks
    fewer = (rows[0].model_copy(update={"num_broken": 2}), *rows[1:])
    with pytest.raises(ValidationError, match="pgd_sat broke 2, samples say otherwise"):
        make_report(attacks=fewer)


@pytest.mark.parametrize("status", ["verified", "incomplete", "unverified"])
def test_alarm_makes_a_report_invalid(status, make_report):
    with pytest.raises(ValidationError, match=f"status '{status}' does not go with the validity"):
        make_report(status=status, validity=(check("passed"), check("alarm")))


def test_invalid_report_has_an_alarm(make_report):
    with pytest.raises(ValidationError, match="status 'invalid' does not go with the validity"):
        make_report(status="invalid", validity=(check("passed"), check("not_run")))


def test_verified_report_has_a_worst_case(make_report):
    with pytest.raises(ValidationError, match="a verified report has a worst case over all"):
        make_report(worst_case=None)


def test_verified_report_is_over_all_planned_images(make_report):
    data = make_report().data.model_copy(update={"num_planned": 11})
    with pytest.raises(ValidationError, match="a verified report has a worst case over all"):
        make_report(data=data)
    assert make_report(data=data, status="incomplete").worst_case == count(5)


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"schema_version": 1}, "schema_version"),
        ({"extra": 1}, "extra"),
        ({"norm": "l1"}, "norm"),
        ({"status": "certified"}, "status"),
        ({"clean": {"num_correct": 1}}, "clean.num_total"),
        ({"clean": 0.8}, "clean"),
        ({"samples": {"index": [0]}}, "samples.label"),
    ],
)
def test_foreign_report_is_refused(written, change, place):
    table = json.loads(written.read_text())
    written.write_text(json.dumps(table | change))
    with pytest.raises(RunError, match=f"is not a report of schema 2: {place}: .*verify RUN"):
        read_report(written)


def test_contradiction_in_a_file_is_told_as_one(written):
    table = json.loads(written.read_text())
    table["worst_case"] = count(8).model_dump()
    written.write_text(json.dumps(table))
    with pytest.raises(RunError, match="worst_case is 8 of 10, samples say 5 of 10"):
        read_report(written)


@pytest.mark.parametrize("missing", ["clean", "attacks", "worst_case", "target", "samples"])
def test_report_with_a_gap_is_refused(written, missing):
    table = json.loads(written.read_text())
    del table[missing]
    written.write_text(json.dumps(table))
    with pytest.raises(RunError, match=missing):
        read_report(written)


def test_extra_field_deep_inside_is_refused(written):
    table = json.loads(written.read_text())
    table["attacks"][0]["standing"]["comment"] = "trust me"
    written.write_text(json.dumps(table))
    with pytest.raises(RunError, match=r"attacks\.0\.standing\.comment"):
        read_report(written)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b'"text"'])
def test_damaged_file_is_refused(written, content):
    written.write_bytes(content)
    with pytest.raises(RunError, match="report.json"):
        read_report(written)


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(RunError, match="missing"):
        read_report(tmp_path / "report.json")
