"""Figures of a training run, from the lines of its `metrics.jsonl`, for a page. Needs no torch."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from compressor.logged_names import series_of_teachers
from compressor.reports.svg import ACCENT, INK, MUTED, Picture, canvas

_MAX_WINDOWS = 200
_COLOURS = {"clean": INK, "robust": ACCENT}
_QUANTITIES = {
    "loss_nats": "loss (nats)",
    "temperature_ratio": "teacher temperature",
    "weight_fraction": "loss weight",
}
_CAPTIONS = {
    "loss_nats": "Losses, means over windows of steps.",
    "temperature_ratio": "Temperature of each teacher.",
    "weight_fraction": "Weight of each loss.",
}

Lines = Sequence[Mapping[str, Any]]
_Points = list[tuple[float, float]]


def training_figures(lines: Lines) -> tuple[Picture, ...]:
    """Losses, validation accuracy, temperatures and loss weights, those that the run has."""
    validation = _validation([line for line in lines if line.get("kind") == "validation"])
    steps = [line for line in lines if line.get("kind") == "step"]
    loss, *others = (_quantity(steps, quantity) for quantity in _QUANTITIES)
    return tuple(picture for picture in (loss, validation, *others) if picture)


def _quantity(steps: Lines, quantity: str) -> Picture | None:
    """One line for each teacher, and one for the sum where there is one."""
    all_series = series_of_teachers({name for line in steps for name in line}, quantity)
    forms = {s.name: (s.label, _COLOURS[s.role], s.line_style) for s in all_series}
    forms |= {quantity: ("total", MUTED, "-")}
    found = {name: points for name in forms if (points := _points(steps, name))}
    if not found:
        return None
    with canvas(f"training-{quantity}", height_inches=2.8) as drawing:
        axes = drawing.figure.subplots()
        for name, points in found.items():
            x, y = zip(*_thinned(points), strict=True)
            label, colour, style = forms[name]
            axes.plot(x, y, style, color=colour, linewidth=1.3, label=label)
        axes.set(xlabel="step", ylabel=_QUANTITIES[quantity])
        drawing.figure.legend(loc="outside upper left", ncols=3)
    said = "; ".join(
        f"{name} from {points[0][1]:.3g} to {points[-1][1]:.3g}" for name, points in found.items()
    )
    return Picture(svg=drawing.svg, caption=_CAPTIONS[quantity], alt=f"Over the steps: {said}.")


def _validation(rows: Lines) -> Picture | None:
    if not rows:
        return None
    num_images = rows[0]["num_validation"]
    with canvas("training-validation", height_inches=2.8) as drawing:
        axes = drawing.figure.subplots()
        for candidate, style in (("weights", "-"), ("average", "--")):
            of_candidate = [row for row in rows if row["candidate"] == candidate]
            for role, colour in _COLOURS.items():
                label = role if candidate == "weights" else f"{role}, averaged weights"
                axes.plot(
                    [row["epoch"] for row in of_candidate],
                    [100 * row[f"{role}_correct"] / row["num_validation"] for row in of_candidate],
                    style,
                    color=colour,
                    marker=".",
                    linewidth=1.3,
                    label=label if of_candidate else None,
                )
        best = [row["epoch"] for row in rows if row["is_best"]]
        if best:
            axes.axvline(best[-1], color=MUTED, linewidth=1.3, linestyle=":", label="selected")
        axes.set(xlabel="epoch", ylabel=f"accuracy (%), n = {num_images}", ylim=(0, 103))
        drawing.figure.legend(loc="outside upper left", ncols=2)
    caption = "Accuracy on held-out training images; robust is under a short PGD."
    return Picture(svg=drawing.svg, caption=caption, alt=_said(rows, best))


def _said(rows: Lines, best: Sequence[int]) -> str:
    last = rows[-1]
    selected = f"; selected: epoch {best[-1]}" if best else ""
    return (
        f"Validation accuracy over {last['epoch']} epochs; at the end "
        f"{last['clean_correct']} clean and {last['robust_correct']} robust of "
        f"{last['num_validation']}{selected}."
    )


def _points(steps: Lines, name: str) -> _Points:
    """(step, value); a loss that is no number has no place in a picture."""
    return [
        (line["step"], line[name]) for line in steps if name in line and math.isfinite(line[name])
    ]


def _thinned(points: _Points) -> _Points:
    """Means over equal windows: single batches are noise to the eye, and bytes in the page."""
    size = math.ceil(len(points) / _MAX_WINDOWS)
    windows = [points[i : i + size] for i in range(0, len(points), size)]
    return [(window[-1][0], sum(y for _, y in window) / len(window)) for window in windows]
