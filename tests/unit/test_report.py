"""Reports: both forms carry every n with its bounds, and strangers' reports are checked."""

import json

import pytest

from compressor.errors import RunError
from compressor.proportions import Proportion
from compressor.report import (
    CAVEAT,
    AttackRow,
    CostRow,
    Count,
    DataFacts,
    RobustnessReport,
    SelectionFacts,
    TeacherRow,
    read_report,
    to_markdown,
    write_report,
)


def count(num_correct, num_total=1_000):
    return Count.of(Proportion(num_correct=num_correct, num_total=num_total))


def cost(name, *, num_parameters, num_bytes=4_000, latency_ms=2.0):
    return CostRow(
        name=name,
        num_parameters=num_parameters,
        num_multiply_adds=num_parameters and 10 * num_parameters,
        num_bytes=num_bytes,
        latency_ms=latency_ms,
        latency_low_ms=latency_ms / 2,
        latency_high_ms=latency_ms * 2,
    )


@pytest.fixture
def report():
    attacks = [
        AttackRow(
            name=name,
            parameters={"num_steps": 20, "step_size_pixels": 0.003, "start": "uniform"},
            accuracy=count(num_correct),
            w_robust_fraction=(0.8 + num_correct / 1_000) / 2,
            duration_seconds=1.5,
        )
        for name, num_correct in (("fgsm", 600), ("pgd_sat", 500))
    ]
    return RobustnessReport(
        name="demo",
        recipe_id="a" * 64,
        recipe={"name": "demo"},
        architecture="tiny",
        model_sha256="b" * 64,
        norm="linf",
        epsilon_pixels=8 / 255,
        data=DataFacts(
            source="digits",
            class_names=("0", "1"),
            training_content_sha256="c" * 64,
            num_training=700,
            num_validation=103,
            validation_index_sha256="d" * 64,
            test_content_sha256="e" * 64,
            num_test=1_000,
            test_index_sha256="f" * 64,
        ),
        selection=SelectionFacts(
            epoch=7,
            candidate="average",
            attack="PGD, 20 steps of 0.003",
            clean=count(90, 103),
            robust=count(55, 103),
        ),
        teachers=(
            TeacherRow(
                role="clean", name="resnet56", sha256="1" * 64, clean=count(99, 103), robust=None
            ),
            TeacherRow(
                role="robust",
                name="wide",
                sha256="2" * 64,
                clean=count(95, 103),
                robust=count(70, 103),
            ),
        ),
        clean=count(800),
        attacks=tuple(attacks),
        worst_case=count(490),
        cost=(
            cost("teacher", num_parameters=10_000, num_bytes=40_000, latency_ms=8.0),
            cost("student", num_parameters=1_000),
            cost("student.onnx", num_parameters=None, latency_ms=1.0),
        ),
        environment={"num_threads": 2},
        training_environment={"number_format": "bfloat16"},
        duration_seconds=12.3,
    )


@pytest.fixture
def written(report, tmp_path):
    json_path, markdown_path = tmp_path / "report.json", tmp_path / "report.md"
    write_report(report, json_path=json_path, markdown_path=markdown_path)
    return json_path, markdown_path


def test_round_trip(report, written):
    assert read_report(written[0]) == report
    assert written[1].read_text() == to_markdown(report)


def test_count_carries_the_exact_interval():
    five_of_ten = count(5, 10)
    assert five_of_ten.fraction == 0.5
    assert (five_of_ten.low_95, five_of_ten.high_95) == pytest.approx(
        (0.187086, 0.812914), abs=1e-6
    )


@pytest.mark.parametrize("num_correct", [800, 600, 500, 490])
def test_markdown_has_every_n_with_its_bounds(report, num_correct):
    expected = count(num_correct)
    row = (
        f"| {num_correct / 10:.2f} % | {num_correct} of 1000 "
        f"| {100 * expected.low_95:.2f} to {100 * expected.high_95:.2f} |"
    )
    assert row in to_markdown(report)


@pytest.mark.parametrize(
    "text",
    [
        "# demo",
        "threat linf 8/255",
        "1000 test images of `digits`",
        "| fgsm |",
        "70.00 %",  # W-Robust of fgsm
        "| **worst case** |",
        "64.50 %",  # and of the worst case
        CAVEAT,
        "10,000, 10.00x",
        "8.00 ms (4.00 to 16.00), 4.00x",
        "| - | - |",
        "no gradient",
        "of 103 held-out images",
        "epoch 7 (average)",
        "b" * 64,
    ],
)
def test_markdown_says(report, text):
    assert text in to_markdown(report)


def test_markdown_without_teachers(report):
    assert "None: trained on labels." in to_markdown(report.model_copy(update={"teachers": ()}))


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"schema_version": 2}, "schema_version"),
        ({"extra": 1}, "extra"),
        ({"norm": "l2"}, "norm"),
        ({"clean": {"num_correct": 1}}, "clean.num_total"),
        ({"clean": 0.8}, "clean"),
    ],
)
def test_foreign_report_is_refused(written, change, place):
    table = json.loads(written[0].read_text())
    written[0].write_text(json.dumps(table | change))
    with pytest.raises(RunError, match=f"is not a report of schema 1: {place}"):
        read_report(written[0])


@pytest.mark.parametrize("missing", ["clean", "attacks", "worst_case", "model_sha256"])
def test_report_with_a_gap_is_refused(written, missing):
    table = json.loads(written[0].read_text())
    del table[missing]
    written[0].write_text(json.dumps(table))
    with pytest.raises(RunError, match=missing):
        read_report(written[0])


def test_extra_field_deep_inside_is_refused(written):
    table = json.loads(written[0].read_text())
    table["attacks"][0]["accuracy"]["comment"] = "trust me"
    written[0].write_text(json.dumps(table))
    with pytest.raises(RunError, match=r"attacks\.0\.accuracy\.comment"):
        read_report(written[0])
