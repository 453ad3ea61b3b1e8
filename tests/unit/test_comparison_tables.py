"""A result in every form: it says what it knows, and not more."""

import csv
import io
import json
import re
from xml.etree import ElementTree

import pytest

from compressor.comparison.cells import (
    interval_cells,
    main_cells,
    paired_cells,
    seconds_text,
    validation_cells,
)
from compressor.comparison.result import (
    METRICS,
    ComparisonResult,
    MethodRow,
    Paired,
    PassRow,
    PassSecondsRow,
    RunRow,
    Score,
    Validation,
    read_result,
    write_result,
)
from compressor.comparison.statistics import PairedTest
from compressor.comparison.summary import verdict_of
from compressor.comparison.tables import to_csv, to_latex, to_markdown
from compressor.errors import RunError
from compressor.reports.comparison_picture import comparison_picture
from compressor.reports.svg import ACCENT, LINE, standalone_svg


def markdown(result):
    return to_markdown(result, comparison_picture(result), picture_name="that.svg")


HOSTILE = "a|b_c*<script>&%$"


def score(metric, values, num_images=1000):
    mean = sum(values) / len(values)
    spread = None if len(values) == 1 else abs(values[1] - values[0]) / 2**0.5
    has_interval = metric != "w_robust"
    return Score(
        metric=metric,
        num_images=num_images,
        seeds=tuple(range(len(values))),
        values=tuple(values),
        mean=mean,
        sample_sd=spread,
        low_95=max(0.0, mean - 0.03) if has_interval else None,
        high_95=min(1.0, mean + 0.03) if has_interval else None,
    )


def pair(metric="cw_inf", verdict="better weights", p_value_holm=0.01, over_seeds=(-0.2, 0.3)):
    return Paired(
        metric=metric,
        num_images=1000,
        seeds=(0, 1),
        differences=(0.04, 0.06),
        mean=0.05,
        over_seeds_low_95=over_seeds[0],
        over_seeds_high_95=over_seeds[1],
        over_images_low_95=0.0234,
        over_images_high_95=0.0762,
        p_value=p_value_holm / 4,
        p_value_holm=p_value_holm,
        verdict=verdict,
    )


def run_row(seed, status="measured", reason="", validation=None):
    return RunRow(
        seed=seed,
        recipe_id="0" * 64,
        status=status,
        reason=reason,
        model_sha256="1" * 64,
        selected_epoch=3,
        training_seconds=90.0 if status == "measured" else None,
        trained_on="cpu, float32",
        measured_on=("cpu, float32",),
        validation=validation,
    )


SECONDS = PassSecondsRow(
    student_forward=0.001, student_backward=0.002, teacher_forward=0.01, num_images=500
)


def method(label, scores=(), paired=(), runs=None, epochs=8):
    return MethodRow(
        label=label,
        name="trades",
        settings={"name": "trades", "beta": 6.0},
        training={"epochs": epochs},
        origin="defaults",
        teachers="none",
        passes=PassRow(
            student_forwards=13, student_backwards=12, teacher_forwards=0, teacher_backwards=0
        ),
        runs=runs or (run_row(0), run_row(1)),
        scores=tuple(scores),
        paired=tuple(paired),
        pass_seconds=SECONDS,
    )


def result_of(*methods, reference=None, notes=()):
    return ComparisonResult(
        name="test",
        reference=reference or methods[0].label,
        protocol={
            "student": {"architecture": "tiny", "width": 1.0},
            "threat": {"norm": "linf", "epsilon_pixels": 8 / 255},
            "data": {"source": "cifar10"},
        },
        methods=methods,
        notes=notes,
        environment={},
    )


@pytest.fixture
def result():
    def scores(low):
        return [score(metric, (low, low + 0.02)) for metric in METRICS]

    return result_of(
        method("base", scores(0.4)),
        method(HOSTILE[:20], scores(0.45), [pair()]),
        method(
            "broken", [score("clean", (0.5,))], runs=(run_row(0), run_row(1, "failed", "no number"))
        ),
        notes=(f"careful: {HOSTILE}",),
    )


def test_cells_have_spread_and_n(result):
    header, rows = main_cells(result)
    assert header[2] == "clean (n = 1,000)"
    assert rows[0][:3] == ("base", "2 of 2", "41.00 ± 1.41")
    # 8 epochs of 500 images with 13 passes of 1 ms and 12 of 2 ms are 148 s.
    assert header[-4:-2] == ("training, predicted", "training, clock")
    assert rows[0][-4:] == ("2 min 28 s", "1 min 30 s", "13 + 12", "0 + 0")
    assert rows[2][:4] == ("broken", "1 of 2", "50.00 [1 of 2]", "-")


@pytest.fixture
def doubtful():
    """Two runs with weights; the cascade of one raised an alarm."""
    runs = (run_row(0), run_row(1, reason="cascade invalid: zero_gradient"))
    scores = [score("clean", (0.4, 0.42)), score("autoattack", (0.3,))]
    return result_of(method("base", scores, runs=runs))


def test_an_alarm_cannot_hide_behind_the_number_of_runs(doubtful):
    _, rows = main_cells(doubtful)
    assert rows[0][1:3] == ("2 of 2", "41.00 ± 1.41")
    assert rows[0][6] == "30.00 [1 of 2]"
    assert "| 30.00 \\[1 of 2\\] |" in markdown(doubtful)
    assert "& 30.00 [1 of 2] &" in to_latex(doubtful)
    row = next(csv.DictReader(io.StringIO(to_csv(doubtful))))
    assert (row["seeds_measured"], row["clean_num_seeds"]) == ("2", "2")
    assert row["autoattack_num_seeds"] == "1"


def test_every_accuracy_has_its_interval(result):
    header, rows = interval_cells(result)
    assert header[1] == "clean (n = 1,000)"
    assert len(header) == len(METRICS)
    assert rows[0] == ("base", *["38.0–44.0"] * 5)
    assert rows[2][1:3] == ("47.0–53.0", "-")
    text = markdown(result)
    assert "## 95 % intervals" in text
    assert "| broken | 47.0–53.0 | - | - | - | - |" in text
    assert "the images as the sample" in text


def test_an_interval_is_never_shown_narrower_than_it_is():
    exact = score("clean", (0.4,)).model_copy(update={"low_95": 0.37949, "high_95": 0.42051})
    _, rows = interval_cells(result_of(method("a", [exact])))
    assert rows[0][1] == "37.9–42.1"


def test_w_robust_has_both_its_numbers_of_images():
    scores = [score(m, (0.4,), num) for m, num in (("clean", 9000), ("autoattack", 300))]
    header, _ = main_cells(result_of(method("a", [*scores, score("w_robust", (0.4,), 300)])))
    assert header[7] == "W-Robust (n = 9,000 and 300)"
    header, _ = main_cells(result_of(method("a", scores[:1])))
    assert header[7] == "W-Robust"


def test_equal_passes_are_predicted_to_take_equally_long(result):
    """However long the clock says; a way back through a teacher takes twice its way there."""
    row = method("a").model_copy(update={"runs": (run_row(0),)})
    slow = run_row(0).model_copy(update={"training_seconds": 900.0})
    assert row.model_copy(update={"runs": (slow,)}).predicted_seconds == row.predicted_seconds
    asking = row.passes.model_copy(update={"teacher_forwards": 2.0, "teacher_backwards": 1.0})
    assert SECONDS.per_image(asking) - SECONDS.per_image(row.passes) == pytest.approx(0.04)
    line = next(csv.DictReader(io.StringIO(to_csv(result))))
    assert float(line["training_predicted_seconds"]) == pytest.approx(148)
    assert float(line["training_seconds"]) == 90
    assert float(line["pass_seconds_student_backward"]) == 0.002
    assert "Training, clock: what the steps took, with whatever else" in markdown(result)
    assert "& 2 min 28 s &" in to_latex(result)
    earlier = result_of(row.model_copy(update={"pass_seconds": None}))
    assert main_cells(earlier)[1][0][-4:-2] == ("-", "1 min 30 s")


@pytest.fixture
def validated():
    """Two seeds that know what chose them, one that does, and none."""
    known = [Validation(clean_correct=c, robust_correct=r, num_images=200) for c, r in VALIDATED]
    runs = [run_row(seed, validation=one) for seed, one in enumerate(known)]
    return result_of(
        method("both", runs=tuple(runs)),
        method("one", runs=(run_row(0), runs[1])),
        method("none"),
    )


VALIDATED = ((120, 60), (124, 68))


def test_the_numbers_that_chose_the_epoch_are_shown_with_their_n(validated):
    header, rows = validation_cells(validated)
    assert header == ("method", "clean (n = 200)", "PGD (n = 200)", "mean of both", "epoch")
    assert rows[0] == ("both", "61.00 ± 1.41", "32.00 ± 2.83", "46.50 ± 2.12", "3, 3")
    assert rows[1][1:4] == ("62.00 [1 of 2]", "34.00 [1 of 2]", "48.00 [1 of 2]")
    assert rows[2] == ("none", "-", "-", "-", "3, 3")
    text = markdown(validated)
    assert "## On held-out training images" in text
    assert "| both | 61.00 ± 1.41 | 32.00 ± 2.83 | 46.50 ± 2.12 | 3, 3 |" in text
    assert "Choose a method by this table" in text
    assert "held-out training images\n" not in markdown(result_of(method("none")))
    lines = list(csv.DictReader(io.StringIO(to_csv(validated))))
    columns = [f"validation_{name}" for name in ("clean_mean", "robust_mean")]
    assert [float(lines[0][name]) for name in columns] == [0.61, 0.32]
    counts = ("validation_num_images", "validation_num_seeds")
    assert [[line[name] for name in counts] for line in lines] == [
        ["200", "2"],
        ["200", "1"],
        ["", ""],
    ]


def test_a_validation_of_more_than_all_is_refused():
    with pytest.raises(ValueError, match="more than 200 of 200 images"):
        Validation(clean_correct=1, robust_correct=201, num_images=200)


def test_a_result_of_an_earlier_version_is_read(validated, tmp_path):
    write_result(validated, tmp_path / "result.json")
    table = json.loads((tmp_path / "result.json").read_text())
    for row in table["methods"]:
        del row["pass_seconds"]
        for pair in row["paired"]:
            del pair["over_images_low_95"], pair["over_images_high_95"]
        for run in row["runs"]:
            del run["validation"]
    (tmp_path / "result.json").write_text(json.dumps(table))
    found = read_result(tmp_path / "result.json")
    assert {run.validation for row in found.methods for run in row.runs} == {None}
    assert "| both | 2 of 2 |" in markdown(found)


def test_every_form_says_against_what(result):
    setting = "cifar10, linf 8/255, seeds 0, 1"
    assert setting in markdown(result)
    assert f"% {setting}; " in to_latex(result)
    rows = list(csv.DictReader(io.StringIO(to_csv(result))))
    assert {(row["reference"], row["norm"]) for row in rows} == {("base", "linf")}
    assert float(rows[0]["epsilon_pixels"]) == 8 / 255
    assert rows[1]["cw_inf_vs_reference_num_seeds"] == "2"
    reach = [float(rows[1][f"cw_inf_vs_reference_over_seeds_{end}_95"]) for end in ("low", "high")]
    assert reach == [-0.2, 0.3]


def test_the_page_shows_the_picture_and_explains_its_bars(result):
    text = markdown(result)
    assert re.search(r"^!\[Clean and AutoAttack-style accuracy: base.*\]\(that\.svg\)$", text, re.M)
    assert "Bars: 95 % intervals for these weights" in text
    assert "Not drawn, without AutoAttack-style accuracy: broken." in text
    alone = result_of(result.methods[0])
    assert "](that.svg)" not in markdown(alone)


def test_what_w_robust_is_tested_on_is_said(result):
    assert "W-Robust is tested on the images of the cascade alone" in markdown(result)


def test_tests_have_signs_and_verdicts(result):
    _, rows = paired_cells(result)
    assert rows[0][1:] == (
        *("CW_inf", "1,000", "2", "+5.00", "2.3 to 7.7", "−20.0 to 30.0"),
        *("0.0025", "0.01", "better weights"),
    )
    assert result.num_tests == 1


def test_markdown_escapes_strangers(result):
    text = markdown(result)
    assert not re.search(r"(?<!\\)[<*]", text)
    table = [line for line in text.splitlines() if line.startswith("|")]
    bars = {len(re.findall(r"(?<!\\)\|", line)) for line in table[:5]}
    assert bars == {len(main_cells(result)[0]) + 1}
    assert "## Against base" in text


def test_csv_has_a_column_for_each_number(result):
    rows = list(csv.DictReader(io.StringIO(to_csv(result))))
    assert [row["label"] for row in rows] == [row.label for row in result.methods]
    assert float(rows[1]["cw_inf_vs_reference_p_value_holm"]) == 0.01
    assert float(rows[0]["clean_mean"]) == pytest.approx(0.41)
    assert rows[2]["autoattack_mean"] == ""
    assert all(None not in row.values() for row in rows)


def test_latex_is_balanced_and_escaped(result):
    text = to_latex(result)
    lines = [line for line in text.splitlines() if line.endswith("\\\\")]
    assert {len(re.findall(r"(?<!\\)&", line)) for line in lines} == {len(METRICS) + 2}
    assert "b\\_c" in text
    assert text.count("$^\\dagger$") == 1
    assert text.count("\\begin") == text.count("\\end") == 1
    seen = re.sub(r"(?m)^%.*$", "", text)
    (legend,) = [line for line in seen.splitlines() if "footnotesize" in line]
    assert seen.rstrip().endswith(legend)  # under the table
    assert legend.count("{") == legend.count("}")
    for said in (
        "cifar10, linf 8/255, seeds 0, 1. ",
        "Seeds: base 2, ",
        "$\\dagger$: these weights",
    ):
        assert said in legend


def test_a_result_survives_its_file(result, tmp_path):
    write_result(result, tmp_path / "result.json")
    assert read_result(tmp_path / "result.json") == result
    text = (tmp_path / "result.json").read_text().replace('"schema_version": 1', '"schema": 2')
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(RunError, match="not a comparison of schema 1"):
        read_result(tmp_path / "result.json")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"p_value_holm": 0.001, "p_value": 0.01}, "cannot be smaller"),
        ({"p_value_holm": 0.2, "p_value": 0.1}, "better weights at p"),
        ({"verdict": "better"}, "over the seeds"),
    ],
)
def test_claims_beyond_the_evidence_are_refused(change, expected):
    with pytest.raises(ValueError, match=expected):
        Paired.model_validate(pair().model_dump() | change)


@pytest.mark.parametrize(
    ("differences", "p_value_holm", "expected"),
    [
        ((0.05, 0.051, 0.049), 0.01, "better"),
        ((-0.05, -0.051, -0.049), 0.01, "worse"),
        ((0.05, 0.051, 0.049), 0.06, "not shown"),
        ((0.03, 0.03), 0.01, "better weights"),  # three images, by chance in both seeds
        ((0.05, 0.01), 0.01, "better weights"),
        ((0.05,), 0.0001, "better weights"),
        ((-0.05, 0.01), 0.01, "worse weights"),
    ],
)
def test_verdicts(differences, p_value_holm, expected):
    test = PairedTest(
        num_images=100,
        differences=differences,
        p_value=p_value_holm / 2,
        over_images_95=(-1.0, 1.0),
    )
    assert verdict_of(test, p_value_holm) == expected


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (1.25, "1.2 s"), (59.94, "59.9 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")],
)
def test_seconds_are_readable(seconds, text):
    assert seconds_text(seconds) == text


# The picture


def test_the_picture_has_a_point_for_each_method_and_dots_for_seeds(result):
    picture = comparison_picture(result)
    assert "base: 41.00 % (mean of 2 seeds, n = 1,000) clean" in picture.alt
    assert "broken" not in picture.alt
    assert picture.caption.endswith("Not drawn, without AutoAttack-style accuracy: broken.")
    assert "bars: 95 % intervals" in picture.svg
    root = ElementTree.fromstring(standalone_svg(picture))
    assert root.find("{http://www.w3.org/2000/svg}desc").text == picture.caption
    assert root.find("{http://www.w3.org/2000/svg}title").text == picture.alt
    assert "prefers-color-scheme:dark" in standalone_svg(picture)
    assert not {ACCENT, LINE} & set(re.findall(r"#\w{6}", picture.svg))
    assert picture == comparison_picture(result)


def test_no_picture_of_one_method(result):
    assert comparison_picture(result_of(*result.methods[::2])) is None


def test_cw_is_drawn_where_the_cascade_was_not_run(result):
    methods = [
        row.model_copy(update={"scores": tuple(s for s in row.scores if s.metric != "autoattack")})
        for row in result.methods
    ]
    assert "CW_inf accuracy" in comparison_picture(result_of(*methods)).alt


def test_the_report_says_how_long_each_was_trained():
    assert "for 8 epochs on the same images" in markdown(result_of(method("a")))
    unequal = result_of(method("a"), method("b", epochs=3))
    assert "for 3 to 8 epochs on the same images" in markdown(unequal)
