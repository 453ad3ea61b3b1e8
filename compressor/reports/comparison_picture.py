"""Clean against robust accuracy of the methods of a comparison. Needs no torch."""

from matplotlib.axes import Axes

from compressor.comparison.result import TITLES, ComparisonResult, Metric, Score
from compressor.reports.pareto import spread_out
from compressor.reports.svg import ACCENT, INK, LINE, MUTED, Picture, canvas, label

_LABEL_INCHES, _FRAME_INCHES = 0.22, 0.75  # height of a name, and around the axes
_Point = tuple[str, Score, Score]


def comparison_picture(result: ComparisonResult) -> Picture | None:
    """A point per method with intervals both ways; None if fewer than two can be drawn.

    Robust is AutoAttack-style, or CW_inf where the cascade was not run on two methods.
    """
    robust, points = _points(result)
    if len(points) < 2:
        return None
    height_inches = max(3.4, _FRAME_INCHES + _LABEL_INCHES * len(points))
    reaches = [_reach(score) for _, _, score in points]
    low, high = min(r[0] for r in reaches), max(r[1] for r in reaches)
    gap = (high - low) * _LABEL_INCHES / (height_inches - _FRAME_INCHES)
    places = spread_out([100 * y.mean for _, _, y in points], gap=gap, highest=high)
    with canvas("comparison", height_inches=height_inches) as drawing:
        axes = drawing.figure.subplots()
        for point, place in zip(points, places, strict=True):
            is_reference = point[0] == result.reference
            _draw(axes, point, place=place, colour=ACCENT if is_reference else INK)
        axes.grid(visible=False)  # the lines lead to names
        axes.set_xlabel("clean accuracy (%)\nbars: 95 % intervals; small dots: single seeds")
        axes.set_ylabel(f"{TITLES[robust]} accuracy (%)")
        axes.set_ylim(low - gap / 2, high + gap / 2)
    said = "; ".join(f"{name}: {_said(x)} clean, {_said(y)} robust" for name, x, y in points)
    drawn = {name for name, _, _ in points}
    missing = ", ".join(row.label for row in result.methods if row.label not in drawn)
    return Picture(
        svg=drawing.svg,
        caption="Bars: 95 % intervals for these weights; small dots: single seeds, joined to "
        "their mean; blue: the reference. Further up and to the right is better."
        + (f" Not drawn, without {TITLES[robust]} accuracy: {missing}." if missing else ""),
        alt=f"Clean and {TITLES[robust]} accuracy: {said}.",
    )


def _points(result: ComparisonResult) -> tuple[Metric, list[_Point]]:
    metrics: tuple[Metric, ...] = ("autoattack", "cw_inf")
    for metric in metrics:
        found = [
            (row.label, clean, robust)
            for row in result.methods
            if (clean := row.score("clean")) and (robust := row.score(metric))
        ]
        if len(found) > 1:
            return metric, found
    return "autoattack", []


def _draw(axes: Axes, point: _Point, *, place: float, colour: str) -> None:
    name, clean, robust = point
    x, y = 100 * clean.mean, 100 * robust.mean
    axes.errorbar(
        x,
        y,
        xerr=_error(clean),
        yerr=_error(robust),
        color=colour,
        ecolor=ACCENT if colour == ACCENT else MUTED,
        elinewidth=0.8,
        marker="o",
        markersize=5,
        capsize=2,
    )
    both = sorted(set(clean.seeds) & set(robust.seeds))
    if len(both) > 1:
        for seed in both:
            ends = [x, 100 * clean.values[clean.seeds.index(seed)]]
            heights = [y, 100 * robust.values[robust.seeds.index(seed)]]
            axes.plot(ends, heights, color=LINE, linewidth=0.8, zorder=0)
            axes.plot(ends[1:], heights[1:], marker=".", markersize=5, color=MUTED)
    axes.annotate(
        label(name),
        (x, y),
        xytext=(1.03, place),
        textcoords=axes.get_yaxis_transform(),
        color=colour,
        va="center",
        arrowprops={"arrowstyle": "-", "color": LINE, "lw": 0.8, "relpos": (0, 0.5)},
        zorder=0,
    )


def _reach(score: Score) -> tuple[float, float]:
    """Of the bar and of the dots, in percent."""
    low = score.mean if score.low_95 is None else score.low_95
    high = score.mean if score.high_95 is None else score.high_95
    return 100 * min(low, *score.values, 1.0), 100 * max(high, *score.values, 0.0)


def _error(score: Score) -> list[list[float]]:
    """Below and above the mean, in percent."""
    low = score.mean if score.low_95 is None else score.low_95
    high = score.mean if score.high_95 is None else score.high_95
    return [[max(0.0, 100 * (score.mean - low))], [max(0.0, 100 * (high - score.mean))]]


def _said(score: Score) -> str:
    seeds = "1 seed" if len(score.seeds) == 1 else f"mean of {len(score.seeds)} seeds"
    return f"{100 * score.mean:.2f} % ({seeds}, n = {score.num_images:,})"
