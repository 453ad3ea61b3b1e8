"""What a benchmark says: which precision pays, whom no other beats, how far to trust it."""

from compressor.reports.benchmark import (
    MIN_CALLS_P90,
    MIN_CALLS_P99,
    Benchmark,
    BenchmarkRow,
    Timing,
)
from compressor.reports.benchmark_tables import ms_text
from compressor.reports.pareto import not_dominated

_BUSY_LOAD = 0.25
"""Processes of others that want to run, for each core."""


def verdicts(benchmark: Benchmark) -> list[str]:
    """Whether a lower precision is faster than float32 of the same weights in the same runtime.

    At the smallest batch and thread count; two are told apart only if the ranges of the p50 of
    their rounds do not overlap. Where the answer is another elsewhere, this is said too.
    """
    lines = []
    for row in benchmark.targets:
        for whole in benchmark.targets:
            is_same = (whole.kind, whole.source_sha256) == (row.kind, row.source_sha256)
            if is_same and row.source_sha256 and row.precision != whole.precision == "fp32":
                lines += _verdict(row, whole, benchmark)
    return lines


def _verdict(row: BenchmarkRow, whole: BenchmarkRow, benchmark: Benchmark) -> list[str]:
    own, other = row.timing(*benchmark.setting), whole.timing(*benchmark.setting)
    if own is None or other is None:
        return []
    words = {"slower": "is not worth it here", "faster": "is faster here", "": "is no faster here"}
    here = _compared(own, other)
    ratio = f"{own.p50_ms / max(other.p50_ms, 1e-9):.2g} times the latency of {whole.name}"
    if not here:
        ratio = f"its latency cannot be told from that of {whole.name}, as the rounds overlap"
    said = f"{row.precision} ({row.name}) {words[here]}: {ratio} ({_beside(own, other)}), "
    said += f"with {100 * row.num_bytes / whole.num_bytes:.0f} % of the bytes"
    elsewhere = [
        f"{_compared(mine, theirs)} at {_beside(mine, theirs)}"
        for mine in row.timings
        if (theirs := whole.timing(mine.batch_size, mine.num_threads))
        and _compared(mine, theirs) not in {"", here}
    ]
    return [f"{said}; but it is {', '.join(elsewhere)}." if elsewhere else f"{said}."]


def _compared(own: Timing, other: Timing) -> str:
    if own.lowest_p50_ms > other.highest_p50_ms:
        return "slower"
    return "faster" if own.highest_p50_ms < other.lowest_p50_ms else ""


def _beside(own: Timing, other: Timing) -> str:
    threads = f"{own.num_threads} thread{'s' if own.num_threads > 1 else ''}"
    times = f"{ms_text(own.p50_ms)} ms against {ms_text(other.p50_ms)} ms"
    return f"p50 at batch {own.batch_size}, {threads}: {times}"


def fronts(benchmark: Benchmark) -> list[str]:
    """Which targets no other beats in cost and robust accuracy at once, by point estimates."""
    known = benchmark.comparable
    lines = []
    if len(known) < 2:
        lines.append(
            "There is no picture: fewer than two targets have a verified accuracy under one threat "
            "on the same images."
        )
    else:
        timed = [(row, t.p50_ms, c) for row, c in known if (t := row.timing(*benchmark.setting))]
        sized = [(row, float(row.num_bytes), count) for row, count in known]
        for cost, points in (("latency", timed), ("size", sized)):
            is_best = not_dominated([(value, count.fraction) for _, value, count in points])
            names = [row.name for (row, _, _), best in zip(points, is_best, strict=True) if best]
            lines.append(f"Not dominated in {cost} and worst case: {', '.join(names)}.")
    in_it = {row.name for row, _ in known}
    apart = [r.name for r in benchmark.targets if r.name not in in_it and r.accuracy]
    if apart:
        lines.append(
            f"Not compared, as not verified under that threat on those images: {', '.join(apart)}."
        )
    protocols = sorted({row.accuracy.protocol for row, _ in known if row.accuracy})
    if len(protocols) > 1:
        lines.append(f"Worst cases of different attacks: {'; '.join(protocols)}.")
    masked = [r.name for r in benchmark.targets if r.accuracy and r.accuracy.gradients_are_masked]
    if masked:
        lines.append(
            f"Gradients are masked, so the attacks on it showed nothing: {', '.join(masked)}."
        )
    return lines


def notes(benchmark: Benchmark) -> list[str]:
    """How it was measured, what was not, and what else the machine was doing."""
    timings = [timing for row in benchmark.targets for timing in row.timings]
    batch_size, num_threads = benchmark.setting
    fewest, most = min(t.num_calls for t in timings), max(t.num_calls for t in timings)
    lines = [
        f"{fewest:,} to {most:,} calls of each in {timings[0].num_rounds} rounds, targets in turn; "
        "percentiles by nearest rank; the range is that of the p50 of the rounds.",
        f"Targets are compared at batch {batch_size}, threads {num_threads}. Peak memory: what a "
        "process needs to open the target and answer its largest batch on one thread.",
    ]
    if fewest < MIN_CALLS_P99:
        lines.append(
            f"A dash stands for too few calls: p99 needs {MIN_CALLS_P99}, p90 {MIN_CALLS_P90}; "
            "measure for longer with --seconds."
        )
    lines += [
        f"Not measured: {row.name}, {why}." for row in benchmark.targets for why in row.not_measured
    ]
    if len({tuple(row.image_shape) for row in benchmark.targets}) > 1:
        lines.append("The targets take images of different sizes, so times do not compare.")
    if max(benchmark.thread_counts) > benchmark.num_usable_cores:
        lines.append(
            f"More threads ({max(benchmark.thread_counts)}) than usable cores "
            f"({benchmark.num_usable_cores}): such latencies are of threads that wait for others."
        )
    if benchmark.mode.get("device") != "cpu":
        lines.append("Peak memory is that of the host alone; times include copies to the GPU.")
    machine = ", ".join(f"{key} {value}" for key, value in benchmark.mode.items())
    return [*lines, *_runtimes(benchmark), _load_line(benchmark), f"Measured with {machine}."]


def _runtimes(benchmark: Benchmark) -> list[str]:
    """Who ran what, if that is not the same for all."""
    names: dict[str, list[str]] = {}
    for row in benchmark.targets:
        if row.timings:
            names.setdefault(row.runs_on, []).append(row.name)
    listed = "; ".join(f"{runtime}: {', '.join(of_it)}" for runtime, of_it in names.items())
    return [f"Run by {listed}."] if len(names) > 1 else []


def _load_line(benchmark: Benchmark) -> str:
    before, after, num_cores = benchmark.load_before, benchmark.load_after, benchmark.num_cores
    if before is None or after is None:
        return "Whether the machine did anything else is not known."
    said = f"load {before:.2f} before and {after:.2f} after, on {num_cores} cores."
    other = max(before, after - max(benchmark.thread_counts)) / num_cores
    if other <= _BUSY_LOAD:
        return f"The machine had little else to do: {said}"
    return f"The machine was BUSY with other work, so these times are unsafe: {said}"
