"""Which targets of a benchmark no other beats, and the picture of it. Needs no torch."""

from collections.abc import Sequence

from compressor.reports.benchmark import Benchmark
from compressor.reports.report import percent
from compressor.reports.svg import ACCENT, INK, MUTED, Picture, canvas, label

_MAX_LETTERS = 22  # of a name, whose end tells more
_LABEL_INCHES, _FRAME_INCHES = 0.22, 0.75  # height of a name, and around the axes


def not_dominated(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Of (cost, gain): whether no other has at most the cost and at least the gain.

    One of both must be better; equal points do not dominate each other.
    """
    return [
        not any(cost <= c and gain >= g and (cost, gain) != (c, g) for cost, gain in points)
        for c, g in points
    ]


def pareto_picture(benchmark: Benchmark) -> Picture | None:
    """Size against worst-case accuracy; None if fewer than two targets can be compared."""
    points = [(row.name, row.num_bytes / 1e6, count) for row, count in benchmark.comparable]
    if len(points) < 2:
        return None
    best = not_dominated([(size_mb, count.fraction) for _, size_mb, count in points])
    height_inches = max(3.2, _FRAME_INCHES + _LABEL_INCHES * len(points))
    low = 100 * min(count.low_95 for _, _, count in points)
    high = 100 * max(count.high_95 for _, _, count in points)
    gap = (high - low) * _LABEL_INCHES / (height_inches - _FRAME_INCHES)
    places = spread_out([100 * c.fraction for _, _, c in points], gap=gap, highest=high)
    with canvas("pareto", height_inches=height_inches) as drawing:
        axes = drawing.figure.subplots()
        for (name, size_mb, count), is_best, place in zip(points, best, places, strict=True):
            y, colour = 100 * count.fraction, ACCENT if is_best else MUTED
            reach = [[max(0, y - 100 * count.low_95)], [max(0, 100 * count.high_95 - y)]]
            axes.errorbar(size_mb, y, yerr=reach, color=colour, marker="o", markersize=5, capsize=3)
            axes.annotate(
                label(name if len(name) <= _MAX_LETTERS else f"…{name[1 - _MAX_LETTERS :]}"),
                (size_mb, y),
                xytext=(1.03, place),
                textcoords=axes.get_yaxis_transform(),
                color=INK if is_best else MUTED,
                va="center",
                arrowprops={"arrowstyle": "-", "color": MUTED, "lw": 0.5, "relpos": (0, 0.5)},
            )
        axes.grid(visible=False)  # the lines lead to names
        axes.set(xlabel="size (MB)", ylabel="worst-case accuracy (%), 95 % interval")
        axes.set_xlim(0, 1.06 * max(size_mb for _, size_mb, _ in points))
        axes.set_ylim(low - gap / 2, high + gap / 2)
    said = "; ".join(f"{name}: {mb:.2f} MB, {percent(count)}" for name, mb, count in points)
    names = ", ".join(name for (name, _, _), is_best in zip(points, best, strict=True) if is_best)
    return Picture(
        svg=drawing.svg,
        caption="Grey: another is no larger and at least as robust, by the point estimates.",
        alt=f"Size and accuracy in the worst case: {said}. Not dominated: {names}.",
    )


def spread_out(wanted: Sequence[float], *, gap: float, highest: float) -> list[float]:
    """Places at least `gap` apart, in the order of `wanted`, that end at `highest`."""
    found, floor = [0.0] * len(wanted), min(wanted)
    for place in sorted(range(len(wanted)), key=lambda place: wanted[place]):
        found[place] = max(wanted[place], floor)
        floor = found[place] + gap
    too_high = max(0.0, max(found) - highest)
    return [value - too_high for value in found]
