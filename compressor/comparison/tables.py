"""A comparison as tables: Markdown, CSV, LaTeX, and the cells that the terminal shows.

Needs no torch.
"""

import csv
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from compressor.comparison.result import (
    METRICS,
    TITLES,
    ComparisonResult,
    MethodRow,
    Metric,
    Paired,
    Score,
)
from compressor.reports.markdown import markdown_picture, markdown_table, plain

if TYPE_CHECKING:
    from compressor.reports.svg import Picture

MINUS = "\N{MINUS SIGN}"
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
    "it says that these weights are better or worse. Of a method that is said only where, besides, "
    "Student's 95 % interval over the seeds, which is not corrected, leaves out 0; two seeds "
    f"rarely suffice for that. {W_ROBUST_NOTE}"
)


def main_cells(result: ComparisonResult) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows: every metric in percent, then what training costs."""
    header = ("method", "seeds", *(_title(result, metric) for metric in METRICS))
    rows = [
        (
            row.label,
            f"{row.num_measured} of {len(row.runs)}",
            *(_score_cell(row, metric) for metric in METRICS),
            seconds_text(row.training_seconds),
            *pass_cells(row),
        )
        for row in result.methods
    ]
    return (*header, "training", "student passes", "teacher passes"), rows


def paired_cells(result: ComparisonResult) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows: every test against the reference."""
    header = ("method", "metric", "images", "seeds", "difference", "over seeds, 95 %")
    rows: list[tuple[str, ...]] = [
        (
            row.label,
            TITLES[pair.metric],
            f"{pair.num_images:,}",
            str(len(pair.seeds)),
            points_text(pair.mean),
            _over_seeds(pair),
            p_text(pair.p_value),
            p_text(pair.p_value_holm),
            pair.verdict,
        )
        for row in result.methods
        for pair in row.paired
    ]
    return (*header, "p", "p, Holm", "verdict"), rows


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
        "Percent, mean \N{PLUS-MINUS SIGN} sample standard deviation over the seeds; no spread "
        "where there is one seed; [1 of 2]: seeds with this number, of all. Accuracy under attack "
        "is an upper bound of the true one. W-Robust is the mean of clean and AutoAttack-style. "
        "Passes are images forwards + backwards through student and teachers per training image; "
        "training time is without validation, with whatever else the machine did.",
    ]
    if picture is not None:
        blocks.append(markdown_picture(picture, picture_name))
    blocks.append(f"## Against {plain(result.reference)}")
    header, rows = paired_cells(result)
    if rows:
        shown = [[plain(cell) for cell in row] for row in rows]
        blocks += [markdown_table(header, shown, align="llrrrrrrl"), HOW_IT_IS_TESTED]
    else:
        blocks.append("Nothing was measured on both sides.")
    if result.notes:
        blocks += ["## Notes", "\n".join(f"- {plain(note)}" for note in result.notes)]
    blocks += ["## Methods", _settings_table(result)]
    return "\n\n".join(blocks) + "\n"


def to_csv(result: ComparisonResult) -> str:
    """One line per method; fractions, seconds, p-values; empty where nothing is known."""
    columns = ["label", "method", "reference", "norm", "epsilon_pixels"]
    columns += ["seeds_measured", "seeds_planned"]
    for metric in METRICS:
        columns += [f"{metric}_{name}" for name in _SCORE_COLUMNS]
        columns += [f"{metric}_vs_reference_{name}" for name in _PAIR_COLUMNS]
    columns += ["training_seconds", *_PASS_COLUMNS]
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
        cells += [row.training_seconds, *_values(row.passes, _PASS_COLUMNS)]
        writer.writerow(["" if cell is None else cell for cell in cells])
    return text.getvalue()


def to_latex(result: ComparisonResult) -> str:
    """A table for booktabs; daggers mark what differs from the reference after correction."""
    names = " & ".join(_tex(_title(result, metric)) for metric in METRICS)
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
            cells.append(_tex(_score_cell(row, metric)) + mark)
        cells += [_tex(seconds_text(row.training_seconds)), _tex(" / ".join(pass_cells(row)))]
        lines.append(" & ".join(cells) + " \\\\")
    seeds = ", ".join(f"{row.label} {row.num_measured}" for row in result.methods)
    lines += [
        "\\bottomrule",
        "\\end{tabular}",
        f"% Seeds: {_tex(seeds)}. $\\dagger$: these weights differ from those of "
        f"{_tex(result.reference)} (exact paired test, Holm); $\\ddagger$: the seeds show it too.",
    ]
    return "\n".join(lines) + "\n"


def setting_text(result: ComparisonResult) -> str:
    """`digits, linf 8/255, seeds 0, 1, 2`: what no table may be read without."""
    seeds = ", ".join(map(str, result.seeds))
    plural = "" if len(result.seeds) == 1 else "s"
    return f"{result.protocol['data']['source']}, {result.threat}, seed{plural} {seeds}"


def score_text(score: Score | None) -> str:
    """`42.31 ± 0.52` in percent; a dash where nothing may be believed or was measured."""
    if score is None:
        return "-"
    spread = "" if score.sample_sd is None else f" \N{PLUS-MINUS SIGN} {100 * score.sample_sd:.2f}"
    return f"{100 * score.mean:.2f}{spread}"


def points_text(fraction: float) -> str:
    """A difference in percentage points, with its sign."""
    return f"{100 * fraction:+.2f}".replace("-", MINUS)


def p_text(p_value: float) -> str:
    """Two digits, as far down as they mean something."""
    return "<1e-15" if p_value < 1e-15 else f"{p_value:.2g}"


def seconds_text(seconds: float | None) -> str:
    """`1 h 05 min`, `3 min 20 s` or `12.5 s`."""
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def pass_cells(row: MethodRow) -> tuple[str, str]:
    """`12 + 12`: forwards and backwards of the student, then of all teachers."""
    passes = row.passes
    return (
        f"{passes.student_forwards:.3g} + {passes.student_backwards:.3g}",
        f"{passes.teacher_forwards:.3g} + {passes.teacher_backwards:.3g}",
    )


_DAGGERS = {"better": "ddagger", "worse": "ddagger", "better weights": "dagger"}
_MARKS = {name: f"$^\\{mark}$" for name, mark in (*_DAGGERS.items(), ("worse weights", "dagger"))}
_SCORE_COLUMNS = ("mean", "sample_sd", "low_95", "high_95", "num_images", "num_seeds")
_PAIR_COLUMNS = (
    *("mean", "num_images", "num_seeds", "over_seeds_low_95", "over_seeds_high_95"),
    *("p_value", "p_value_holm", "verdict"),
)
_PASS_COLUMNS = ("student_forwards", "student_backwards", "teacher_forwards", "teacher_backwards")


def _values(row: object, names: Sequence[str]) -> list[object]:
    return [getattr(row, name, None) for name in names]


def _score_cell(row: MethodRow, metric: Metric) -> str:
    """With how many seeds it rests on, where these are not all."""
    score = row.score(metric)
    if score is None or score.num_seeds == len(row.runs):
        return score_text(score)
    return f"{score_text(score)} [{score.num_seeds} of {len(row.runs)}]"


def _title(result: ComparisonResult, metric: Metric) -> str:
    """With its n, where all methods have the same."""
    scores = [score for row in result.methods if (score := row.score(metric))]
    counts = {score.num_images for score in scores}
    if metric == "w_robust" or len(counts) != 1:
        return TITLES[metric]
    return f"{TITLES[metric]} (n = {counts.pop():,})"


def _over_seeds(pair: Paired) -> str:
    if pair.over_seeds_low_95 is None or pair.over_seeds_high_95 is None:
        return "one seed"
    low, high = (100 * value for value in (pair.over_seeds_low_95, pair.over_seeds_high_95))
    return f"{low:.1f} to {high:.1f}".replace("-", MINUS)


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
