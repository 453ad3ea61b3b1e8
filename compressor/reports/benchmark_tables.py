"""A benchmark as tables for Markdown and HTML; the cells of times are those of the terminal too.

Needs no torch.
"""

from compressor.reports.benchmark import Benchmark, BenchmarkRow, Timing
from compressor.reports.sections import Table, count_cells, count_text


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
        return "not measured", "-", "-"
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
