"""A benchmark in the terminal."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cli.output import Output

if TYPE_CHECKING:
    from compressor.reports.benchmark import Benchmark


def print_benchmark(
    benchmark: "Benchmark", output: Output, *, left_out: Sequence[str] = ()
) -> None:
    """Tables that fit 80 columns, and what follows from them, first what was left out."""
    from exporters.benchmark.verdicts import fronts, notes, verdicts

    _print_latency(benchmark, output)
    _print_sizes(benchmark, output)
    _print_accuracy(benchmark, output)
    output.title("What follows")
    for line in [*left_out, *verdicts(benchmark), *fronts(benchmark)]:
        output.say(line)
    output.title("How it was measured")
    for line in notes(benchmark):
        output.say(line)


def _print_latency(benchmark: "Benchmark", output: Output) -> None:
    from compressor.reports.benchmark_tables import latency_cells

    output.title("Latency in milliseconds (range of the rounds)")
    rows = []
    for num_threads in benchmark.thread_counts:
        for batch_size in benchmark.batch_sizes:
            rows.append([f"batch {batch_size}, {_threads(num_threads)}", *[""] * 5])
            for row in benchmark.targets:
                timing = row.timing(batch_size, num_threads)
                if timing is not None:
                    speed = f"{timing.images_per_second:.0f}"
                    cells = (*latency_cells(timing), speed, f"{timing.num_calls}")
                    rows.append([f"  {row.name}", *cells])
    never = [row.name for row in benchmark.targets if not row.timings]
    if never:
        rows.append(["for reasons given below", *[""] * 5])
        rows += [[f"  {name}", *latency_cells(None), "-", "-"] for name in never]
    output.table(("", "p50", "p90", "p99", "images/s", "calls"), rows)


def _print_sizes(benchmark: "Benchmark", output: Output) -> None:
    whole = benchmark.targets[0].num_bytes
    rows = [
        [
            row.name,
            row.precision,
            f"{row.num_bytes:,}",
            f"{row.num_bytes / whole:.2f}x",
            "-" if row.peak_memory_mib is None else f"{row.peak_memory_mib:.1f} MiB",
        ]
        for row in benchmark.targets
    ]
    output.title("Size and peak memory")
    output.table(("", "precision", "bytes", "of the first", "peak memory"), rows)


def _print_accuracy(benchmark: "Benchmark", output: Output) -> None:
    from compressor.reports.report import percent

    rows = []
    for row in benchmark.targets:
        known = row.accuracy
        if known is None or known.clean is None or known.worst_case is None:
            rows.append([row.name, "not verified" if known is None else known.status, *[""] * 4])
            continue
        cells = [
            cell
            for count in (known.clean, known.worst_case)
            for cell in (percent(count), f"{100 * count.low_95:.1f} to {100 * count.high_95:.1f}")
        ]
        rows.append([row.name, *cells, str(known.clean.num_total)])
    output.title("Accuracy, as verified (95 % interval)")
    output.table(("", "clean", "", "worst case", "", "n"), rows)


def _threads(num_threads: int) -> str:
    return f"{num_threads} thread{'s' if num_threads > 1 else ''}"
