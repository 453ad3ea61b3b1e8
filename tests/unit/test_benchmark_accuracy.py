"""Accuracies of a benchmark: which reports are taken, and which numbers of them."""

import pytest

from compressor.errors import RunError, UsageError
from compressor.reports.report import ArtefactFacts, TargetFacts, write_report
from exporters.benchmark.accuracy import find_accuracies
from tests.unit.benchmark_models import World


@pytest.fixture
def world():
    return World()


def report_of(make_report, sha256, num_standing=5, num_total=10, **changes):
    broken_by = (None,) * num_standing + ("pgd_sat",) * (num_total - num_standing)
    target = TargetFacts(kind="onnx", architecture="x", sha256=sha256, source_sha256=None)
    return make_report(broken_by, target=target, **changes)


@pytest.fixture
def beside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [tmp_path / name for name in ("runs/mine", "runs/verify-x", "elsewhere")]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    return folders


def test_accuracies_are_found_by_hash_alone(world, beside, make_report):
    run, near, far = beside
    targets = [world.target(name, run, 1) for name in "ABCD"]
    write_report(report_of(make_report, "A" * 64, 5), run / "report-papers.json")
    write_report(report_of(make_report, "B" * 64, 6), near / "report.json")
    write_report(report_of(make_report, "C" * 64, 7), far / "report.json")
    write_report(report_of(make_report, "E" * 64, 8, name="D"), run / "report.json")
    (near / "report-old.json").write_text("{}")
    found = find_accuracies(targets)
    assert {key[0]: value.worst_case.num_correct for key, value in found.items()} == {
        "A": 5,
        "B": 6,
    }
    assert found["A" * 64].report == "mine/report-papers.json"
    assert (found["B" * 64].threat, found["B" * 64].clean.num_total) == (
        "Linf, epsilon = 8/255",
        10,
    )
    found = find_accuracies(targets, [far / "report.json"])
    assert found["C" * 64].worst_case.num_correct == 7


def test_of_several_reports_the_one_of_more_images_counts(world, beside, make_report):
    run, near, far = beside
    targets = [world.target("A", run, 1)]
    write_report(report_of(make_report, "A" * 64, 5, 10), run / "report-1.json")
    write_report(report_of(make_report, "A" * 64, 30, 40), run / "report-2.json")
    write_report(report_of(make_report, "A" * 64, 20, 40), near / "report.json")
    alarm = report_of(make_report, "A" * 64, 99, 100, status="incomplete", status_reason="time")
    write_report(alarm.model_copy(update={"looks": "many"}), run / "report-3.json")
    write_report(report_of(make_report, "A" * 64, 1, 2), far / "report.json")
    assert find_accuracies(targets)["A" * 64].worst_case.num_correct == 20
    given = find_accuracies(targets, [far / "report.json"])
    assert given["A" * 64].worst_case.num_correct == 1


def alarmed(make_report, **changes):
    report = report_of(make_report, "A" * 64, **changes)
    alarm = report.validity[0].model_copy(update={"status": "alarm"})
    return report_of(make_report, "A" * 64, status="invalid", validity=(alarm,), **changes)


def test_the_radius_that_is_claimed_comes_before_more_images(world, beside, make_report):
    run, near, _ = beside
    small = {"epsilon_pixels": 1 / 255, "num_standing": 38, "num_total": 40}
    write_report(report_of(make_report, "A" * 64, **small), near / "report.json")
    write_report(report_of(make_report, "A" * 64, 10, 30), run / "report.json")
    for threat, expected in (("linf 8/255", 10), ("linf 1/255", 38), (None, 10)):
        targets = [world.target("A", run, 1, threat=threat)]
        assert find_accuracies(targets)["A" * 64].worst_case.num_correct == expected


def test_an_alarm_is_not_hidden_by_a_better_report(world, beside, make_report):
    """Of the same images, threat and protocol; one that was given is what was asked for."""
    run, near, _ = beside
    targets = [world.target("A", run, 1)]
    write_report(report_of(make_report, "A" * 64, 9, 10), run / "report.json")
    write_report(alarmed(make_report), near / "report.json")
    assert find_accuracies(targets)["A" * 64].status == "invalid"
    given = find_accuracies(targets, [run / "report.json"])
    assert given["A" * 64].worst_case.num_correct == 9
    write_report(alarmed(make_report, epsilon_pixels=1 / 255), near / "report.json")
    assert find_accuracies(targets)["A" * 64].worst_case.num_correct == 9


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"status": "unverified", "worst_case": None}, "unverified"),
        ({"looks": "many"}, "sequential"),
    ],
)
def test_only_verified_numbers_are_taken(changes, status, world, beside, make_report):
    report = report_of(make_report, "A" * 64, **changes)
    write_report(report, beside[0] / "report.json")
    accuracy = find_accuracies([world.target("A", beside[0], 1)])["A" * 64]
    assert (accuracy.status, accuracy.clean, accuracy.worst_case) == (status, None, None)


def test_reports_that_were_given_must_fit(world, beside, make_report):
    run, _, far = beside
    targets = [world.target("A", run, 1)]
    write_report(report_of(make_report, "B" * 64), far / "report.json")
    with pytest.raises(UsageError, match=f"SHA-256 {'B' * 64}, which none of the targets has"):
        find_accuracies(targets, [far / "report.json"])
    with pytest.raises(UsageError, match="nowhere.json does not exist"):
        find_accuracies(targets, [far / "nowhere.json"])
    (far / "report.json").write_text("{}")
    with pytest.raises(RunError, match="is not a report of schema"):
        find_accuracies(targets, [far / "report.json"])


def test_masked_gradients_are_said(world, beside, make_report):
    facts = ArtefactFacts(
        attacked_through="twin",
        twin="",
        transfer=None,
        source=None,
        gradients_are_masked=True,
        masking="",
    )
    report = report_of(make_report, "A" * 64)
    alarm = report.validity[0].model_copy(update={"status": "alarm"})
    report = report_of(make_report, "A" * 64, artefact=facts, status="invalid", validity=(alarm,))
    write_report(report, beside[0] / "report.json")
    found = find_accuracies([world.target("A", beside[0], 1)])["A" * 64]
    assert (found.gradients_are_masked, found.worst_case) == (True, None)
