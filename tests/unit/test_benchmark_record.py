"""The record of a benchmark is refused if it is wrong; its tables; its part of a page."""

import json
import re

import pytest

from compressor.errors import RunError
from compressor.reports.benchmark import read_benchmark, without_accuracy
from compressor.reports.benchmark_tables import artefact_tables, latency_table, ms_text
from compressor.reports.html import to_html, write_html
from compressor.reports.report import ValidityRow
from tests.unit.benchmark_rows import POISON, a_benchmark, a_row, accuracy

# The record


@pytest.fixture
def table():
    return a_benchmark(a_row("a", 40), a_row("b")).model_dump(mode="json")


@pytest.fixture
def save(tmp_path):
    def save(content):
        path = tmp_path / "bench.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return save


def test_a_record_is_read_as_it_was_written(table, save):
    assert read_benchmark(save(table)) == a_benchmark(a_row("a", 40), a_row("b"))


def spoilt(table, place, value):
    *path, last = place
    for key in path:
        table = table[key]
    table[last] = value


FIRST = ("targets", 0)
TIMING = (*FIRST, "timings", 0)
ACCURACY = (*FIRST, "accuracy")
VAST = {"num_correct": 10**400, "num_total": 2 * 10**400, "low_95": 0.5, "high_95": 0.5}
WRONG = {
    "another schema": (("schema_version",), 2),
    "an unknown key": (("more",), 1),
    "no targets": (("targets",), []),
    "too many targets": (("targets",), [{}] * 61),
    "no batch sizes": (("batch_sizes",), []),
    "a batch of none": (("batch_sizes",), [0]),
    "a number as text": ((*FIRST, "num_bytes"), "1"),
    "bytes beyond all measure": ((*FIRST, "num_bytes"), 10**400),
    "a long name": ((*FIRST, "name"), "a" * 501),
    "another kind": ((*FIRST, "kind"), "pickle"),
    "two sides": ((*FIRST, "image_shape"), [3, 8]),
    "time that runs backwards": ((*TIMING, "p50_ms"), -1.0),
    "an infinite time": ((*TIMING, "p99_ms"), 1e300),
    "p50 outside its range": ((*TIMING, "highest_p50_ms"), 0.45),
    "p90 below p50": ((*TIMING, "p90_ms"), 0.45),
    "p99 below p90": ((*TIMING, "p99_ms"), 1.0),
    "p99 of few calls": ((*TIMING, "num_calls"), 99),
    "numbers of an invalid one": ((*ACCURACY, "status"), "invalid"),
    "verified without numbers": ((*ACCURACY, "worst_case"), None),
    "an interval that is too good": ((*ACCURACY, "worst_case", "low_95"), 0.4),
    "more correct than there are": ((*ACCURACY, "clean", "num_correct"), 101),
    "counts beyond all measure": ((*ACCURACY, "clean"), VAST),
}


@pytest.mark.parametrize(("place", "value"), WRONG.values(), ids=WRONG)
def test_a_wrong_record_is_refused(place, value, table, save):
    spoilt(table, place, value)
    with pytest.raises(RunError, match=r"bench\.json is not a benchmark of schema 1: .*again$"):
        read_benchmark(save(table))


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "[" * 100_000, '"NaN"', "1" * 10_000])
def test_a_damaged_record_is_refused(content, save):
    with pytest.raises(RunError, match=r"bench\.json"):
        read_benchmark(save(content))


def test_a_record_is_not_larger_than_any(table, save, tmp_path):
    with pytest.raises(RunError, match="larger than any"):
        read_benchmark(save(json.dumps(table) + " " * 5_000_000))
    with pytest.raises(RunError, match="is missing"):
        read_benchmark(tmp_path / "nowhere.json")
    with pytest.raises(RunError, match="cannot be read"):
        read_benchmark(tmp_path)


def test_only_what_was_verified_alike_is_compared():
    other = a_row("other", accuracy=accuracy(99, threat="L2, epsilon = 0.5"))
    elsewhere = a_row("elsewhere", accuracy=accuracy(99, images_sha256="d" * 64))
    invalid = a_row("invalid", accuracy=accuracy(1, status="invalid", clean=None, worst_case=None))
    rows = [other, a_row("a", 40), elsewhere, invalid, a_row("none"), a_row("b", 30)]
    assert [row.name for row, _ in a_benchmark(*rows).comparable] == ["a", "b"]
    assert a_benchmark(a_row("none")).comparable == ()


def test_accuracy_is_taken_away_from_one_target_only():
    benchmark = a_benchmark(a_row("a", 40), a_row("b", 30))
    changed = without_accuracy(benchmark, sha256="a-sha256")
    assert [row.accuracy is None for row in changed.targets] == [True, False]


# Tables


def test_tables_say_what_is_known_and_what_is_not():
    invalid = accuracy(1, status="invalid", clean=None, worst_case=None)
    rows = [
        a_row("a", 40),
        a_row("b", peak_memory_mib=None, timings=(), not_measured=("all: no",)),
        a_row("c", accuracy=invalid),
    ]
    costs, found = artefact_tables(a_benchmark(*rows))
    assert costs.header[3] == "p50 ms, batch 1"
    assert costs.header[-1] == "images/s, batch 8"
    cells = ("1,000,000", "12 MiB", "0.500 (0.400 to 0.600)", "1.25", "12.5", "2000")
    assert costs.rows[0] == ("a", *cells)
    assert costs.rows[1] == ("b", "1,000,000", "-", "not measured", *["-"] * 3)
    worst = ("40.00 % (40 of 100)", "30.33 to 50.28 %")
    assert found.rows[0] == ("a", "100.00 % (100 of 100)", "96.38 to 100.00 %", *worst)
    assert found.rows[1:] == (
        ("b", "not verified", "-", "not verified", "-"),
        ("c", "invalid", "-", "invalid", "-"),
    )


def test_latencies_of_one_setting_are_together():
    table = latency_table(a_benchmark(a_row("a"), a_row("b")))
    assert [row[:3] for row in table.rows] == [
        ("1", "1", "a"),
        ("1", "1", "b"),
        ("1", "8", "a"),
        ("1", "8", "b"),
    ]
    assert table.rows[2][3:] == ("9", "0.500 (0.400 to 0.600)", "-", "-", "2000")
    assert {len(row) for row in table.rows} == {len(table.header)} == {len(table.align)}


@pytest.mark.parametrize(
    ("value_ms", "text"), [(None, "-"), (0.5904, "0.590"), (5.904, "5.90"), (59.04, "59.0")]
)
def test_milliseconds_have_about_three_digits(value_ms, text):
    assert ms_text(value_ms) == text


# In the page of a run


def section(html):
    found = re.search(r'<section aria-labelledby="artefacts">.*?</section>', html, flags=re.DOTALL)
    return found and found[0]


@pytest.fixture
def make_plain(make_report):
    """Builds a report whose page has no figures of its own, which take long to draw."""

    def make(**changes):
        names = tuple(f"kind {place}" for place in range(31))
        data = make_report().data.model_copy(update={"class_names": names})
        return make_report(curve=(), data=data, **changes).model_copy(update={"attacks": ()})

    return make


@pytest.fixture
def page(make_plain, tmp_path):
    """Writes the page of a report into a folder with this benchmark; the section on artefacts."""

    def page(content, **changes):
        (tmp_path / "bench.json").write_text(content)
        report = make_plain(**changes)
        write_html(tmp_path / "report.html", report, gallery=[], curves=[])
        return section((tmp_path / "report.html").read_text(encoding="utf-8"))

    return page


def own(*rows):
    """A benchmark that is of the model of `make_report` too."""
    return a_benchmark(a_row("own", 40, sha256="b" * 64), *rows).model_dump_json()


def test_the_page_of_a_run_shows_its_artefacts(page):
    text = page(own(a_row("small", 30, num_bytes=270)))
    assert "0.500 (0.400 to 0.600)" in text
    assert "40.00 % (40 of 100)" in text
    assert "30.00 % (30 of 100)" in text
    assert text.count("<svg") == 1


def test_a_page_without_a_benchmark_is_as_it_was(make_plain, tmp_path):
    report = make_plain()
    write_html(tmp_path / "report.html", report, gallery=[], curves=[])
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert section(text) is None
    assert text == to_html(report, gallery=[], curves=[])


@pytest.mark.parametrize("content", ["", "[]", '{"targets": 1}', "[" * 100_000])
def test_a_damaged_benchmark_is_a_sentence(content, page, tmp_path):
    text = page(content)
    assert "There is a benchmark that cannot be shown: bench.json " in text
    assert str(tmp_path) not in text
    assert "<table" not in text


def test_a_benchmark_of_other_models_is_not_shown(page):
    text = page(a_benchmark(a_row("a", 40)).model_dump_json())
    assert "bench.json is of other models" in text
    assert "<table" not in text


def test_a_page_that_is_not_verified_has_no_accuracy_of_its_model(page):
    alarm = ValidityRow(name="x", status="alarm", found="", threshold="", p_value=None, advice="do")
    other = a_row("small", 30, num_bytes=270)
    text = page(own(other), status="invalid", validity=(alarm,))
    assert "40.00 %" not in text
    assert "30.00 %" in text
    assert "not verified" in text


def test_nothing_of_strangers_becomes_markup(page):
    rows = [a_row(POISON, accuracy=accuracy(30, protocol=POISON, report=POISON))]
    text = page(own(*rows))
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    for key in (POISON, "half \ud83d a pair"):
        text = page(json.dumps({key: 1}))
        assert "<script" not in text
        assert "cannot be shown" in text
