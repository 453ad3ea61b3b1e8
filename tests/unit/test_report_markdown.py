"""The report as Markdown: every number has its n, and none is shown that its status forbids."""

import subprocess
import sys

import pytest

from compressor.proportions import Proportion
from compressor.reports.markdown import cost_table, markdown_table, plain, to_markdown
from compressor.reports.report import (
    CAVEAT,
    CostRow,
    Count,
    EightBitFacts,
    SelectionFacts,
    TeacherRow,
    TrainingFacts,
    ValidityRow,
)
from compressor.reports.sections import MAX_CONFUSIONS

ALARM = ValidityRow(
    name="zero_gradient",
    status="alarm",
    found="9 of 10 images have a zero gradient",
    threshold="alarm above 1 %",
    p_value=1e-9,
    advice="Attack through a differentiable stand-in.",
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


COST = (
    cost("teacher", num_parameters=10_000, num_bytes=40_000, latency_ms=8.0),
    cost("student", num_parameters=1_000),
    cost("student.onnx", num_parameters=None, latency_ms=1.0),
)


def training(teachers=()):
    return TrainingFacts(
        recipe_id="a" * 64,
        recipe={"name": "tiny"},
        content_sha256="c" * 64,
        num_training=700,
        num_validation=103,
        validation_index_sha256="d" * 64,
        selection=SelectionFacts(
            epoch=7,
            candidate="average",
            attack="PGD, 20 steps of 0.003",
            clean=count(90, 103),
            robust=count(55, 103),
        ),
        teachers=teachers,
        environment={"number_format": "bfloat16", "processor": "not said twice"},
    )


TEACHERS = (
    TeacherRow(role="clean", name="resnet56", sha256="1" * 64, clean=count(99, 103), robust=None),
    TeacherRow(
        role="robust", name="wide", sha256="2" * 64, clean=count(95, 103), robust=count(70, 103)
    ),
)


@pytest.fixture
def text(make_report):
    return to_markdown(make_report(cost=COST, training=training(TEACHERS)))


@pytest.mark.parametrize(
    "expected",
    [
        "# tiny\n",
        "**Verified.** Every planned image went through every attack",
        "Reason: all images went through all attacks.",
        "- Protocol: AutoAttack-style",
        "- Threat: Linf, epsilon = 8/255",
        "- Images: 10 of 10 planned test images of digits",
        f"- What is bounded: {CAVEAT}",
        "| clean | 80.00 % | 8 of 10 | 44.39 to 97.48 % |  |",
        "| worst case under AutoAttack-style, Linf, epsilon = 8/255 | 50.00 % | 5 of 10 "
        "| 18.71 to 81.29 % | 65.00 % |",
        "| 16/255 | 10.00 % | 1 of 10 | 0.25 to 44.50 % |",
        "Chance is 25.00 %.",
        "| pgd_sat | white-box | 8 | 3 | 50.00 % (5 of 10) | 18.71 to 81.29 % | 800 | 400 |",
        "| pgd_sat | 50.00 % | 5 of 10 | 18.71 to 81.29 % | 65.00 % |",
        "| zero | 66.67 % (2 of 3) | 9.43 to 99.16 % | 66.67 % (2 of 3) | 9.43 to 99.16 % |",
        "| one | two | 2 of 5 |",
        "| zero_gradient | passed | 0 of 10 images have a zero gradient | alarm above 1 % | - |  |",
        "66.67 % (2 of 3) of the adversarial images found still fool",
        "10,000, 10.00x",
        "8.00 ms (4.00 to 16.00), 4.00x",
        "| student.onnx | - | - | 4,000, 1.00x |",
        "2 threads",
        "epoch 7 (average)",
        "87.38 % (90 of 103)",
        "| clean | resnet56 | 96.12 % (99 of 103) | no gradient |",
        "b" * 64,
        "| seed | 0 |",
        "| training number_format | bfloat16 |",
        "| pgd_sat | num_steps 20 |",
    ],
)
def test_says(text, expected):
    assert expected in text


def test_says_nothing_twice(text):
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert len(headings) == len(set(headings)) == 10
    assert "not said twice" not in text


def test_alarms_come_before_the_numbers_of_an_invalid_report(make_report):
    text = to_markdown(make_report(status="invalid", validity=(ALARM,)))
    head, _, rest = text.partition("## Numbers that are not to be believed")
    assert "**Invalid.**" in head
    assert "zero_gradient: 9 of 10 images have a zero gradient (alarm above 1 %, p = 1e-09)" in head
    assert ALARM.advice in head
    assert "80.00 %" not in head
    assert "50.00 %" not in head
    numbers, _, after = rest.partition("\n## ")
    assert "50.00 %" in numbers
    assert "50.00 %" not in after
    assert "Rounding to 8 bits, not to be believed" in after


def test_unverified_report_shows_no_accuracy_under_attack(make_report):
    text = to_markdown(make_report(status="unverified", worst_case=None))
    assert "**Unverified.**" in text
    assert "| clean | 80.00 % | 8 of 10 |" in text
    assert "50.00 %" not in text
    for word in (
        "worst case",
        "standing after",
        "under attack |",
        "epsilon | accuracy",
        "itself |",
    ):
        assert word not in text
    assert "| pgd_sat | white-box | 8 | 3 | 800 | 400 | 1.5 s |" in text


def test_number_that_contradicts_its_status_is_not_shown(make_report):
    """As a stranger may write it: nothing was verified, and yet there is a worst case."""
    report = make_report().model_copy(update={"status": "unverified"})
    assert "50.00 %" not in to_markdown(report)


def test_incomplete_report_says_how_many_are_done(make_report):
    data = make_report().data.model_copy(update={"num_planned": 2_000})
    text = to_markdown(make_report(status="incomplete", data=data))
    assert "**Incomplete.** A budget ended first." in text
    assert "10 of 2,000 planned test images" in text
    assert "| 50.00 % | 5 of 10 |" in text


def test_l2_radii_are_not_in_255ths(make_report):
    text = to_markdown(make_report(norm="l2", epsilon_pixels=1.0))
    assert "Threat: L2, epsilon = 1\n" in text
    assert "/255" not in text


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        (None, "Not measured."),
        (EightBitFacts(num_found=0, num_still_fooling=0), "there is none to round"),
        (EightBitFacts(num_found=4, num_still_fooling=0), "0.00 % (0 of 4)"),
        (EightBitFacts(num_found=4, num_still_fooling=3), "or towards the clean image where that"),
    ],
)
def test_rounding(facts, expected, make_report):
    assert expected in to_markdown(make_report(eight_bit=facts))


def test_only_the_most_frequent_confusions_are_listed(make_report):
    data = make_report().data.model_copy(
        update={"class_names": tuple("abcdefghijklmnopqrstuvwxyz")}
    )
    report = make_report(("pgd_sat",) * 26)
    pairs = report.samples.model_copy(update={"label": tuple(range(26)), "prediction": (26,) * 26})
    data = data.model_copy(update={"num_planned": 26})
    text = to_markdown(make_report(("pgd_sat",) * 26, samples=pairs, data=data))
    assert "the 20 most frequent of 26 pairs of classes" in text
    assert text.count("| class 26 | 1 of 26 |") == MAX_CONFUSIONS


def test_answer_without_a_name_has_its_number(make_report):
    report = make_report()
    odd = report.samples.model_copy(update={"prediction": (None,) * 5 + (9, -1, 0, 1, 2)})
    text = to_markdown(make_report(samples=odd))
    assert "| one | class 9 |" in text
    assert "| two | class -1 |" in text


def test_without_measured_things(make_report):
    nothing = {"status": "unverified", "worst_case": None, "attacks": (), "validity": ()}
    report = make_report((None, "clean"), **nothing, cost=(), curve=(), eight_bit=None)
    text = to_markdown(report)
    assert text.count("Not measured.") == 2
    assert "None was run." in text
    assert "## Accuracy against epsilon" not in text
    assert "## Teachers" not in text


def test_without_teachers(make_report):
    assert "Teachers: none, trained on labels." in to_markdown(make_report(training=training()))


def test_cost_has_no_ratio_where_nothing_was_trained():
    table = cost_table((cost("model.onnx", num_parameters=None),))
    assert table.splitlines()[-1] == "| model.onnx | - | - | 4,000 | 2.00 ms (1.00 to 4.00) |"


def test_table_aligns_numbers():
    assert markdown_table(("a", "b", "c"), [["x", "1", "2"]]).splitlines() == [
        "| a | b | c |",
        "| --- | ---: | ---: |",
        "| x | 1 | 2 |",
    ]


@pytest.mark.parametrize(
    ("hostile", "shown"),
    [
        ("a|b", "a|b"),
        ("a\n# b", "a # b"),
        ("<script>", "\\<script>"),
        ("[x](javascript:1)", "\\[x\\](javascript:1)"),
        ("`x` *y* ~z~", "\\`x\\` \\*y\\* \\~z\\~"),
        ("_x_ apgd_t", "\\_x\\_ apgd_t"),
        ("&lt;", "\\&lt;"),
        ("a\\", "a\\\\"),
    ],
)
def test_text_of_strangers_is_no_markup(hostile, shown):
    assert plain(hostile) == shown


def test_strangers_cannot_add_cells_or_lines(make_report):
    names = ("a|b", "c\n\n# d", "<b>", "e")
    data = make_report().data.model_copy(update={"class_names": names})
    text = to_markdown(make_report(data=data, name="x\n\n## Numbers", status_reason="y\n- z"))
    assert "# x ## Numbers\n" in text
    assert "Reason: y - z.\n" in text
    rows = [line for line in text.splitlines() if line.startswith("| a\\|b | 66.67 %")]
    assert len(rows) == 1
    assert "| c # d |" in text
    assert "<b>" not in text.replace("\\<b>", "")


def test_needs_no_torch():
    code = (
        "import sys; sys.modules.update(torch=None, numpy=None); import compressor.reports.markdown"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
