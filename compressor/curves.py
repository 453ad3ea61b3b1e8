"""The picture of a training run, drawn from its metrics."""

import io
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from compressor.logged_names import series_of_teachers
from compressor.metrics import read_metrics
from compressor.run_directory import RunDirectory, write_bytes_atomically

_CLEAN, _ROBUST, _TOTAL = "#0072b2", "#d55e00", "#555555"  # safe for colour-blind readers
_COLOURS = MappingProxyType({"clean": _CLEAN, "robust": _ROBUST})


def write_curves(run: RunDirectory, *, title: str) -> Path:
    """Draw losses, validation accuracy, temperatures and weights into the run."""
    lines = read_metrics(run)
    steps = [line for line in lines if line["kind"] == "step"]
    validations = [line for line in lines if line["kind"] == "validation"]
    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    panels = figure.subplots(2, 2)
    _draw_losses(panels[0][0], steps)
    _draw_validation(panels[0][1], validations)
    _draw_teachers(panels[1][0], steps, quantity="temperature_ratio", label="teacher temperature")
    _draw_teachers(panels[1][1], steps, quantity="weight_fraction", label="loss weight")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110, metadata={"Software": None})
    write_bytes_atomically(run.curves, picture.getvalue())
    return run.curves


def _draw_losses(axes: Axes, steps: Sequence[dict[str, Any]]) -> None:
    lines = [("loss_nats", "loss", _TOTAL, "-")]
    for series in series_of_teachers({name for line in steps for name in line}, "loss_nats"):
        colour = _COLOURS[series.role]
        lines.append((series.name, f"{series.label} loss", colour, series.line_style))
    for name, label, colour, style in lines:
        points = [(line["step"], line[name]) for line in steps if name in line]
        if points:
            x, y = zip(*_thinned(points), strict=True)
            axes.plot(x, y, style, color=colour, linewidth=1, label=label)
    axes.set(xlabel="step", ylabel="loss (nats, mean over a window)")
    _finish(axes)


def _draw_validation(axes: Axes, validations: Sequence[dict[str, Any]]) -> None:
    for candidate, style in (("weights", "-"), ("average", "--")):
        rows = [line for line in validations if line["candidate"] == candidate]
        for kind, colour in (("clean", _CLEAN), ("robust", _ROBUST)):
            shares = [100 * row[f"{kind}_correct"] / row["num_validation"] for row in rows]
            label = kind if candidate == "weights" else f"{kind}, averaged weights"
            if rows:
                epochs = [row["epoch"] for row in rows]
                axes.plot(epochs, shares, style, marker=".", color=colour, label=label)
    best = [row["epoch"] for row in validations if row["is_best"]]
    if best:
        axes.axvline(best[-1], color=_TOTAL, linewidth=0.8, linestyle=":", label="selected")
    n = validations[0]["num_validation"] if validations else 0
    axes.set(xlabel="epoch", ylabel=f"validation accuracy (%, n = {n})")
    _finish(axes)


def _draw_teachers(
    axes: Axes, steps: Sequence[dict[str, Any]], *, quantity: str, label: str
) -> None:
    for series in series_of_teachers({name for line in steps for name in line}, quantity):
        points = [(line["step"], line[series.name]) for line in steps if series.name in line]
        x, y = zip(*points, strict=True)
        colour = _COLOURS[series.role]
        axes.plot(x, y, series.line_style, color=colour, linewidth=1.2, label=series.label)
    axes.set(xlabel="step", ylabel=label)
    _finish(axes)


def _thinned(points: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    """Means over at most 400 equal windows: single batches are noise to the eye."""
    size = max(1, len(points) // 400)
    windows = [points[i : i + size] for i in range(0, len(points), size)]
    return [(w[-1][0], sum(value for _, value in w) / len(w)) for w in windows]


def _finish(axes: Axes) -> None:
    axes.grid(visible=True, alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9)
    else:
        axes.text(0.5, 0.5, "this method has none", ha="center", transform=axes.transAxes)
