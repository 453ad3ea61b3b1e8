"""A benchmark: its record, its table, which targets are dominated, and the picture of it.

The record is closed and strict, because the page of a run reads it from a file that anybody may
have written; one that contradicts itself is refused. Needs no torch.
"""

import html
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError, model_validator

from compressor.closed_table import ClosedTable, TupleOf
from compressor.errors import RunError
from compressor.reports.report import Count, Status, percent
from compressor.reports.sections import Table, count_cells, count_text
from compressor.reports.svg import ACCENT, INK, MUTED, Picture, canvas, label
from compressor.run_directory import read_json

BENCHMARK_FILE = "bench.json"
MIN_CALLS_P90, MIN_CALLS_P99 = 10, 100
"""From fewer calls, the percentile would be the slowest call or close to it."""
_MAX_FILE_BYTES, _MAX_LETTERS = 4 * 2**20, 22  # letters of a name, whose end tells more
_LABEL_INCHES, _FRAME_INCHES = 0.22, 0.75  # height of a name, and around the axes

_Text = Annotated[str, Field(max_length=500)]
_Number = Annotated[int, Field(ge=1, le=2**50)]
_Quantity = Annotated[float, Field(ge=0, le=1e12)]


class Timing(ClosedTable):
    """One target at one batch size and thread count; percentiles by nearest rank, in ms."""

    batch_size: _Number
    num_threads: _Number
    num_rounds: _Number
    num_calls: _Number
    p50_ms: _Quantity
    lowest_p50_ms: _Quantity
    """Of the rounds."""
    highest_p50_ms: _Quantity
    p90_ms: _Quantity | None
    """None from fewer than `MIN_CALLS_P90` calls."""
    p99_ms: _Quantity | None
    """None from fewer than `MIN_CALLS_P99` calls."""
    images_per_second: _Quantity

    @model_validator(mode="after")
    def _is_in_order(self) -> Self:
        tail = [self.p50_ms, *(ms for ms in (self.p90_ms, self.p99_ms) if ms is not None)]
        if sorted(tail) != tail or not self.lowest_p50_ms <= self.p50_ms <= self.highest_p50_ms:
            raise ValueError("percentiles are out of order")
        if self.p99_ms is not None and self.num_calls < MIN_CALLS_P99:
            raise ValueError(f"a p99 needs {MIN_CALLS_P99} calls, not {self.num_calls}")
        return self


class Accuracy(ClosedTable):
    """What a verification of this very file found; numbers only if it ended as verified."""

    status: Status | Literal["sequential"]
    """`sequential`: by `gate --live`, which stops by what it sees; the interval would be wrong."""
    report: _Text
    """Folder and name of the file."""
    threat: _Text
    protocol: _Text
    images_sha256: _Text
    """Of the content of the test images."""
    gradients_are_masked: bool
    clean: Count | None
    worst_case: Count | None

    @model_validator(mode="after")
    def _has_numbers_only_if_verified(self) -> Self:
        if {self.clean is not None, self.worst_case is not None} != {self.status == "verified"}:
            raise ValueError(f"the numbers do not fit the status {self.status}")
        return self


class BenchmarkRow(ClosedTable):
    """One target: what it is, what it costs, and how accurate it was found to be."""

    name: _Text
    kind: Literal["pytorch", "onnx", "engine"]
    precision: _Text
    sha256: _Text
    source_sha256: _Text | None
    """Of the weights that it was made from; precisions of one run have it in common."""
    num_bytes: _Number
    image_shape: Annotated[TupleOf[_Number], Field(min_length=3, max_length=3)]
    """(C, H, W)."""
    takes_bytes: bool
    """Pixels are uint8 instead of float32 in [0, 1]."""
    runs_on: _Text
    peak_memory_mib: _Quantity | None
    timings: TupleOf[Timing]
    not_measured: TupleOf[_Text]
    """What, and why."""
    accuracy: Accuracy | None

    def timing(self, batch_size: int, num_threads: int) -> Timing | None:
        """At this batch size and thread count; None if it was not measured."""
        key = (batch_size, num_threads)
        return next((t for t in self.timings if (t.batch_size, t.num_threads) == key), None)


class Benchmark(ClosedTable):
    """Targets measured in turn on one machine."""

    schema_version: Literal[1] = 1
    targets: Annotated[TupleOf[BenchmarkRow], Field(min_length=1, max_length=60)]
    batch_sizes: Annotated[TupleOf[_Number], Field(min_length=1)]
    thread_counts: Annotated[TupleOf[_Number], Field(min_length=1)]
    num_cores: _Number
    num_usable_cores: _Number
    load_before: _Quantity | None
    """Processes that want to run, mean over a minute; None where the system does not say."""
    load_after: _Quantity | None
    mode: dict[_Text, _Text]
    """Device, versions, clock frequency: what the times depend on besides."""

    @property
    def setting(self) -> tuple[int, int]:
        """(Batch size, threads) by which targets are compared: the smallest of both."""
        return min(self.batch_sizes), min(self.thread_counts)

    @property
    def comparable(self) -> tuple[tuple[BenchmarkRow, Count], ...]:
        """Targets and their worst cases, under the threat and on the images that most share."""
        known = [
            ((row.accuracy.threat, row.accuracy.images_sha256), row, row.accuracy.worst_case)
            for row in self.targets
            if row.accuracy and row.accuracy.worst_case
        ]
        most = Counter(conditions for conditions, _, _ in known).most_common(1)
        return tuple((row, count) for conditions, row, count in known if conditions == most[0][0])


def read_benchmark(path: Path) -> Benchmark:
    """A benchmark from JSON.

    Raises:
        RunError: if it is missing, damaged or of another schema.
    """
    try:
        if path.is_file() and path.stat().st_size > _MAX_FILE_BYTES:
            raise RunError(f"{path} is larger than any benchmark; measure again")
        return Benchmark.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        said = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    except ArithmeticError as error:  # counts for which no interval can be computed
        said = str(error)
    raise RunError(f"{path} is not a benchmark of schema 1: {said}; measure again")


def without_accuracy(benchmark: Benchmark, *, sha256: str) -> Benchmark:
    """The same, where the accuracy of one target is not to be shown."""
    rows = (
        row.model_copy(update={"accuracy": None}) if row.sha256 == sha256 else row
        for row in benchmark.targets
    )
    return benchmark.model_copy(update={"targets": tuple(rows)})


def not_dominated(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Of (cost, gain): whether no other has at most the cost and at least the gain.

    One of both must be better; equal points do not dominate each other.
    """
    return [
        not any(cost <= c and gain >= g and (cost, gain) != (c, g) for cost, gain in points)
        for c, g in points
    ]


def artefact_tables(benchmark: Benchmark) -> tuple[Table, Table]:
    """What every target costs, with times in milliseconds, and what verifications found."""
    batch_size, num_threads = benchmark.setting
    largest = max(benchmark.batch_sizes)
    costs = ("bytes", "peak memory", f"p50 ms, batch {batch_size}", "p90 ms", "p99 ms")
    rows = []
    for row in benchmark.targets:
        memory = "-" if row.peak_memory_mib is None else f"{row.peak_memory_mib:.0f} MiB"
        few, many = row.timing(batch_size, num_threads), row.timing(largest, num_threads)
        speed = f"{many.images_per_second:.0f}" if many else "-"
        rows.append((row.name, f"{row.num_bytes:,}", memory, *latency_cells(few), speed))
    header = ("target", *costs, f"images/s, batch {largest}")
    found = tuple((row.name, *accuracy_cells(row)) for row in benchmark.targets)
    names = ("target", "clean", "95 % interval", "worst case", "95 % interval")
    cost_table = Table(align="lrrrrrr", header=header, rows=tuple(rows))
    return cost_table, Table(align="lrrrr", header=names, rows=found)


def latency_table(benchmark: Benchmark) -> Table:
    """Every measurement, those that are to be compared one below the other."""
    header = ("threads", "batch", "target", "calls", "p50 ms (rounds)", "p90 ms", "p99 ms")
    rows = tuple(
        (
            str(timing.num_threads),
            str(timing.batch_size),
            row.name,
            f"{timing.num_calls:,}",
            *latency_cells(timing),
            f"{timing.images_per_second:.0f}",
        )
        for num_threads in benchmark.thread_counts
        for batch_size in benchmark.batch_sizes
        for row in benchmark.targets
        if (timing := row.timing(batch_size, num_threads))
    )
    return Table(align="rrlrrrrr", header=(*header, "images/s"), rows=rows)


def latency_cells(timing: Timing | None) -> tuple[str, str, str]:
    """p50 with the range of the rounds, p90, p99, in ms; dashes for what is not known."""
    if timing is None:
        return "-", "-", "-"
    low, high = ms_text(timing.lowest_p50_ms), ms_text(timing.highest_p50_ms)
    tail = ms_text(timing.p90_ms), ms_text(timing.p99_ms)
    return f"{ms_text(timing.p50_ms)} ({low} to {high})", *tail


def ms_text(value_ms: float | None) -> str:
    """Milliseconds to about three digits; a dash where there were too few calls."""
    if value_ms is None:
        return "-"
    return f"{value_ms:.{3 if value_ms < 1 else 2 if value_ms < 10 else 1}f}"


def accuracy_cells(row: BenchmarkRow) -> tuple[str, str, str, str]:
    """Clean and its interval, worst case and its interval; or why there is none."""
    found = row.accuracy
    if found is None or found.clean is None or found.worst_case is None:
        said = "not verified" if found is None else found.status
        return said, "-", said, "-"
    counts = (found.clean, found.worst_case)
    clean, robust = ((count_text(count), count_cells(count)[2]) for count in counts)
    return *clean, *robust


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
    places = _spread_out([100 * c.fraction for _, _, c in points], gap=gap, highest=high)
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


def standalone_svg(picture: Picture) -> str:
    """The picture as a file of its own, with the colours that a page would give it."""
    root = (
        '<svg xmlns="http://www.w3.org/2000/svg" width="640" role="img" style="color:#1b1e23;'
        'background:#fff;font-family:sans-serif;--accent:#1f5fa8;--muted:#59616b;--line:#d5dae0"'
    )
    shown = picture.svg.replace(' aria-hidden="true"', "", 1).replace("<svg", root, 1)
    return shown.replace(">", f"><title>{html.escape(picture.alt)}</title>", 1)


def _spread_out(wanted: Sequence[float], *, gap: float, highest: float) -> list[float]:
    """Places at least `gap` apart, in the order of `wanted`, that end at `highest`."""
    found, floor = [0.0] * len(wanted), min(wanted)
    for place in sorted(range(len(wanted)), key=lambda place: wanted[place]):
        found[place] = max(wanted[place], floor)
        floor = found[place] + gap
    too_high = max(0.0, max(found) - highest)
    return [value - too_high for value in found]
