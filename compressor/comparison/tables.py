"""A comparison as files for people and programs: Markdown, CSV, LaTeX.

Needs no torch.
"""

import csv
import io
from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from compressor.comparison.cells import (
    MINUS,
    interval_cells,
    main_cells,
    paired_cells,
    pass_cells,
    score_cell,
    seconds_text,
    setting_text,
    title_of,
    validation_cells,
)
from compressor.comparison.result import METRICS, ComparisonResult, MethodRow
from compressor.reports.markdown import markdown_picture, markdown_table, plain

if TYPE_CHECKING:
    from compressor.reports.svg import Picture

W_ROBUST_NOTE = (
    "W-Robust is tested on the images of the cascade alone, clean part included; where more images "
    "were answered clean, its difference is not that of the accuracies above."
)
HOW_IT_IS_TESTED = (
    "Each method is tested against the reference on the same test images with the weights of the "
    "same seeds. An image counts once: the number of seeds in which it stands, minus the same of "
    "the reference. The exact two-sided p-value is the share of all choices of signs of these "
    "differences that give a sum as far from 0 (with one seed: the exact test of McNemar); Holm's "
    "correction is for all tests of this table together. It takes the weights as given, so alone "
    "it says that these weights are better or worse; so does the interval over images, which is of "
    "the mean of these differences (adjusted Wald, Bonett and Price) and not corrected. Of a "
    "method that is said only where, besides, Student's 95 % interval over the seeds, not "
    f"corrected either, leaves out 0; two seeds rarely suffice for that. {W_ROBUST_NOTE}"
)


COSTS = (
    "Training, predicted: its passes times what a pass took in one short test of all networks in "
    "turn on this machine, so that equal work has equal time. Training, clock: what the steps "
    "took, with whatever else the machine did. Both are without validation."
)
HOW_TO_READ = (
    "Percent, mean \N{PLUS-MINUS SIGN} sample standard deviation over the seeds; no spread where "
    "there is one seed; [1 of 2]: seeds with this number, of all. Accuracy under attack is an "
    "upper bound of the true one. W-Robust is the mean of clean and AutoAttack-style. Passes are "
    f"images forwards + backwards through student and teachers per training image. {COSTS}"
)
INTERVALS = (
    "Percent, the images as the sample (exact, Clopper and Pearson): another seed may lie outside. "
    "Of several seeds the interval of their mean. W-Robust is no proportion and has none; its two "
    "n are those of clean and of AutoAttack-style images."
)
HELD_OUT = (
    "Percent, of the epoch with the highest mean of both; it was chosen by these very numbers, so "
    "they flatter a little. PGD is that of the choice, of few steps. Choose a method by this "
    "table: one that was chosen by its test images is reported too well on them."
)


def to_markdown(result: ComparisonResult, picture: "Picture | None", *, picture_name: str) -> str:
    """For people: tables, how to read them, and what they rest on.

    Args:
        result: of the comparison.
        picture: of clean against robust accuracy, if there is one.
        picture_name: of its file, beside the page.
    """
    header, rows = main_cells(result)
    blocks = [
        f"# Comparison: {plain(result.name)}",
        _lead(result),
        markdown_table(header, [[plain(cell) for cell in row] for row in rows]),
        HOW_TO_READ,
    ]
    header, rows = interval_cells(result)
    blocks += [
        "## 95 % intervals",
        markdown_table(header, [[plain(cell) for cell in row] for row in rows]),
        INTERVALS,
    ]
    if picture is not None:
        blocks.append(markdown_picture(picture, picture_name))
    blocks.append(f"## Against {plain(result.reference)}")
    header, rows = paired_cells(result)
    if rows:
        shown = [[plain(cell) for cell in row] for row in rows]
        blocks += [markdown_table(header, shown, align="llrrrrrrrl"), HOW_IT_IS_TESTED]
    else:
        blocks.append("Nothing was measured on both sides.")
    blocks += _validation_blocks(result)
    if result.notes:
        blocks += ["## Notes", "\n".join(f"- {plain(note)}" for note in result.notes)]
    blocks += ["## Methods", _settings_table(result)]
    return "\n\n".join(blocks) + "\n"


def _validation_blocks(result: ComparisonResult) -> list[str]:
    if not any(row.validations for row in result.methods):
        return []
    header, rows = validation_cells(result)
    table = markdown_table(header, [[plain(cell) for cell in row] for row in rows])
    return ["## On held-out training images", table, HELD_OUT]


def to_csv(result: ComparisonResult) -> str:
    """One line per method; fractions, seconds, p-values; empty where nothing is known."""
    columns = ["label", "method", "reference", "norm", "epsilon_pixels"]
    columns += ["seeds_measured", "seeds_planned"]
    for metric in METRICS:
        columns += [f"{metric}_{name}" for name in _SCORE_COLUMNS]
        columns += [f"{metric}_vs_reference_{name}" for name in _PAIR_COLUMNS]
    columns += [f"validation_{name}" for name in _VALIDATION_COLUMNS]
    columns += ["training_seconds", "training_predicted_seconds", *_PASS_COLUMNS]
    columns += [f"pass_seconds_{name}" for name in _PASS_SECONDS_COLUMNS]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in result.methods:
        cells: list[object] = [row.label, row.name, result.reference]
        cells += [result.threat.norm, result.threat.epsilon_pixels]
        cells += [row.num_measured, len(row.runs)]
        for metric in METRICS:
            cells += _values(row.score(metric), _SCORE_COLUMNS)
            cells += _values(row.pair(metric), _PAIR_COLUMNS)
        cells += _validation_values(row)
        cells += [row.training_seconds, row.predicted_seconds, *_values(row.passes, _PASS_COLUMNS)]
        cells += _values(row.pass_seconds, _PASS_SECONDS_COLUMNS)
        writer.writerow(["" if cell is None else cell for cell in cells])
    return text.getvalue()


def to_latex(result: ComparisonResult) -> str:
    """A table for booktabs; daggers mark what differs from the reference after correction."""
    names = " & ".join(_tex(title_of(result, metric)) for metric in METRICS)
    lines = [
        "% \\usepackage{booktabs}",
        f"% {setting_text(result)}; percent; [1 of 2]: seeds with this number, of all",
        f"\\begin{{tabular}}{{l{'r' * (len(METRICS) + 2)}}}",
        "\\toprule",
        f"Method & {names} & Training & Passes \\\\",
        "\\midrule",
    ]
    for row in result.methods:
        cells = [_tex(row.label)]
        for metric in METRICS:
            pair = row.pair(metric)
            mark = _MARKS.get(pair.verdict, "") if pair else ""
            cells.append(_tex(score_cell(row, metric)) + mark)
        cells += [_tex(seconds_text(row.predicted_seconds)), _tex(" / ".join(pass_cells(row)))]
        lines.append(" & ".join(cells) + " \\\\")
    lines += ["\\bottomrule", "\\end{tabular}", "\\par\\smallskip", _tex_legend(result)]
    return "\n".join(lines) + "\n"


def _tex_legend(result: ComparisonResult) -> str:
    """Under the table, where a paper shows it too."""
    seeds = ", ".join(f"{row.label} {row.num_measured}" for row in result.methods)
    said = (
        f"{setting_text(result)}. Percent, mean \N{PLUS-MINUS SIGN} sample standard deviation over "
        f"the seeds; [1 of 2]: seeds with this number, of all. Seeds: {seeds}. Accuracy under "
        "attack is an upper bound. Training: predicted from passes and what a pass took on one "
        "machine. Passes: images forwards + backwards, student / teachers, per training image."
    )
    marks = (
        f"$\\dagger$: these weights differ from those of {_tex(result.reference)} (exact paired "
        "test, Holm); $\\ddagger$: the seeds show it too."
    )
    return f"{{\\footnotesize {_tex(said)} {marks}\\par}}"


_DAGGERS = {"better": "ddagger", "worse": "ddagger", "better weights": "dagger"}
_MARKS = {name: f"$^\\{mark}$" for name, mark in (*_DAGGERS.items(), ("worse weights", "dagger"))}
_SCORE_COLUMNS = ("mean", "sample_sd", "low_95", "high_95", "num_images", "num_seeds")
_PAIR_COLUMNS = (
    *("mean", "num_images", "num_seeds", "over_images_low_95", "over_images_high_95"),
    *("over_seeds_low_95", "over_seeds_high_95"),
    *("p_value", "p_value_holm", "verdict"),
)
_PASS_COLUMNS = ("student_forwards", "student_backwards", "teacher_forwards", "teacher_backwards")
_PASS_SECONDS_COLUMNS = ("student_forward", "student_backward", "teacher_forward")
_VALIDATION_COLUMNS = ("clean_mean", "robust_mean", "num_images", "num_seeds")


def _validation_values(row: MethodRow) -> list[object]:
    known = row.validations
    if not known:
        return [None] * len(_VALIDATION_COLUMNS)
    clean, robust = (
        fmean(getattr(v, name).fraction for v in known) for name in ("clean", "robust")
    )
    return [clean, robust, known[0].num_images, len(known)]


def _values(row: object, names: Sequence[str]) -> list[object]:
    return [getattr(row, name, None) for name in names]


def _lead(result: ComparisonResult) -> str:
    student = result.protocol["student"]
    epochs = sorted({row.training["epochs"] for row in result.methods})
    said = f"{epochs[0]}" if len(epochs) == 1 else f"{epochs[0]} to {epochs[-1]}"
    return (
        f"On {plain(setting_text(result))}. All methods train {plain(student['architecture'])} of "
        f"width {student['width']} for {said} epochs on the same images, choose the "
        "epoch on held-out training images, and meet the same attacks on the same test images."
    )


def _settings_table(result: ComparisonResult) -> str:
    rows = [
        (plain(row.label), plain(row.name), plain(row.teachers), plain(row.origin))
        for row in result.methods
    ]
    header = ("label", "method", "teachers", "settings")
    return markdown_table(header, rows, align="llll")


def _tex(text: str) -> str:
    special = {"\\": "\\textbackslash{}", "\N{PLUS-MINUS SIGN}": "$\\pm$", MINUS: "$-$"}
    special |= {"~": "\\textasciitilde{}", "^": "\\textasciicircum{}"}
    special |= {letter: f"\\{letter}" for letter in "&%$#_{}"}
    return "".join(special.get(letter, letter) for letter in text)
