"""Figures of a report: curve over epsilon, attacks, classes, confusion.

Needs no torch; how a figure becomes part of a page is in `svg.py`.
"""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from compressor.reports.report import Count, RobustnessReport, class_counts, percent
from compressor.reports.sections import class_name, confusions, radius, shows_robust
from compressor.reports.svg import ACCENT, INK, MUTED, WIDTH_INCHES, Picture, canvas, label

MAX_CLASSES = 30
"""Figures with a place for each class are drawn up to so many."""
_MAX_WRITTEN_CLASSES = 12
"""Up to so many classes, the cells of the heat map are wide enough for their numbers."""


def report_figures(report: RobustnessReport) -> Mapping[str, Picture]:
    """Figures of the findings, by the key of the section that they belong to."""
    figures: dict[str, Picture] = {}
    if shows_robust(report) and report.curve:
        figures["curve"] = _curve(report)
    if shows_robust(report) and report.attacks:
        figures["attacks"] = _attacks(report)
    if len(report.data.class_names) <= MAX_CLASSES:
        figures["classes"] = _classes(report)
        if confusions(report):
            figures["confusion"] = _confusion(report)
    return figures


def _curve(report: RobustnessReport) -> Picture:
    points = sorted(report.curve, key=lambda point: point.epsilon_pixels)
    unit = 1 if report.norm == "l2" else 255
    chance = 100 / max(1, len(report.data.class_names))
    with canvas("curve", height_inches=3.2) as drawing:
        axes = drawing.figure.subplots()
        x = [unit * point.epsilon_pixels for point in points]
        counts = [point.accuracy for point in points]
        axes.errorbar(
            x,
            [100 * count.fraction for count in counts],
            yerr=_reach(counts),
            color=ACCENT,
            marker="o",
            markersize=4,
            capsize=3,
            label="accuracy, 95 % interval",
        )
        axes.axhline(chance, color=INK, linestyle="--", linewidth=1, label="chance")
        axes.axvline(
            unit * report.epsilon_pixels,
            color=MUTED,
            linestyle=":",
            linewidth=1.3,
            label="epsilon of this report",
        )
        name = "epsilon (L2)" if report.norm == "l2" else "epsilon (255ths, Linf)"
        axes.set(xlabel=name, ylabel="accuracy (%)", ylim=(0, 103))
        handles = axes.get_legend_handles_labels()[0][::-1]
        drawing.figure.legend(handles=handles, loc="outside upper left", ncols=2)
    said = ", ".join(f"{percent(p.accuracy)} at {radius(report, p.epsilon_pixels)}" for p in points)
    return Picture(
        svg=drawing.svg,
        caption=f"Accuracy as the attacker may change more, {_num_images(counts)} at each point.",
        alt=f"Accuracy against epsilon: {said}; chance is {chance:.2f} %.",
    )


def _attacks(report: RobustnessReport) -> Picture:
    rows = report.attacks
    places = range(len(rows))
    broken = [row.num_broken for row in rows]
    standing = [row.standing.num_correct for row in rows]
    with canvas("attacks", height_inches=0.9 + 0.36 * len(rows)) as drawing:
        axes = drawing.figure.subplots()
        axes.barh(places, standing, color=MUTED, alpha=0.45, height=0.62, label="standing after")
        axes.barh(places, broken, left=standing, color=ACCENT, height=0.62, label="broken")
        for place, row in enumerate(rows):
            axes.annotate(
                f"{row.num_broken} of {row.num_tried} broken",
                (standing[place] + row.num_broken, place),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
            )
        axes.set_yticks(places, [label(row.name) for row in rows])
        axes.set(xlabel="images", xlim=(0, 1.4 * max(1, report.clean.num_correct)))
        _name_rows(axes, len(rows))
        axes.grid(visible=False)
        drawing.figure.legend(loc="outside upper left", ncols=2)
    said = "; ".join(
        f"{row.name} broke {row.num_broken} of {row.num_tried}, {row.standing.num_correct} stand"
        for row in rows
    )
    return Picture(
        svg=drawing.svg,
        caption="One bar for each attack, in the order in which they ran.",
        alt=f"Images broken by each attack: {said}.",
    )


def _classes(report: RobustnessReport) -> Picture:
    counts = class_counts(report)
    with canvas("classes", height_inches=1.0 + 0.3 * len(counts)) as drawing:
        axes = drawing.figure.subplots()
        clean = [clean for _, clean, _ in counts]
        robust = [robust for _, _, robust in counts] if shows_robust(report) else []
        _dots(axes, clean, offset=-0.15 if robust else 0, colour=INK, name="clean")
        if robust:
            _dots(axes, robust, offset=0.15, colour=ACCENT, name="under attack")
        axes.set_yticks(range(len(counts)), [label(name) for name, _, _ in counts])
        axes.set(xlabel="accuracy (%), 95 % interval", xlim=(-2, 102))
        _name_rows(axes, len(counts))
        drawing.figure.legend(loc="outside upper left", ncols=2)
    return Picture(
        svg=drawing.svg,
        caption=f"Accuracy of each class, {_num_images(clean)} of each.",
        alt=f"Accuracy of each of {len(counts)} classes, with intervals; numbers in the table.",
    )


def _dots(axes: Axes, counts: Sequence[Count], *, offset: float, colour: str, name: str) -> None:
    axes.errorbar(
        [100 * count.fraction for count in counts],
        [place + offset for place in range(len(counts))],
        xerr=_reach(counts),
        color=colour,
        linestyle="none",
        linewidth=1.2,
        marker="o",
        markersize=4.5,
        label=name,
    )


def _confusion(report: RobustnessReport) -> Picture:
    """One square for each pair; the darker, the more images, so that ink stays readable on it."""
    found, num_classes = confusions(report), len(report.data.class_names)
    most, is_wide = found[0][2], num_classes <= _MAX_WRITTEN_CLASSES
    with canvas("confusion", height_inches=(0.92 if is_wide else 1.1) * WIDTH_INCHES) as drawing:
        axes = drawing.figure.subplots()
        for y, x, num in found:
            corner = (x - 0.5, y - 0.5)
            strength = 0.08 + 0.47 * num / most
            axes.add_patch(Rectangle(corner, 1, 1, color=ACCENT, alpha=strength, linewidth=0))
            if is_wide:
                axes.text(x, y, str(num), ha="center", va="center")
        names = [label(class_name(report, place)) for place in range(num_classes)]
        axes.set_xticks(range(num_classes), names, rotation=90, rotation_mode="anchor")
        for text in axes.get_xticklabels():
            text.set(horizontalalignment="right", verticalalignment="center")
        axes.set_yticks(range(num_classes), names)
        axes.tick_params(labelsize=10 if is_wide else 7.5)
        limits = (-0.5, num_classes - 0.5)
        axes.set(xlabel="answered", ylabel="label", xlim=limits, ylim=limits[::-1])
        axes.grid(visible=False)
    label_name, answer_name = (class_name(report, place) for place in found[0][:2])
    return Picture(
        svg=drawing.svg,
        caption=f"Images by label and answer; the strongest colour is {most} images.",
        alt=f"Heat map of confusions; the most frequent is {label_name} taken for {answer_name}, "
        f"{most} images. The table lists them.",
    )


def _reach(counts: Sequence[Count]) -> list[list[float]]:
    """How far the interval reaches down and up from each fraction, in points."""
    down = [100 * max(0.0, count.fraction - count.low_95) for count in counts]
    return [down, [100 * max(0.0, count.high_95 - count.fraction) for count in counts]]


def _num_images(counts: Sequence[Count]) -> str:
    totals = sorted({count.num_total for count in counts})
    return " to ".join(map(str, dict.fromkeys((totals[0], totals[-1])))) + " images"


def _name_rows(axes: Axes, num_rows: int) -> None:
    """The first row on top, no marks beside the names, whole numbers below."""
    axes.set_ylim(num_rows - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
