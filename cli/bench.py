"""`robust-compress bench`: what artefacts cost, side by side, and what they are worth."""

import math
import os
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from cli.options import JsonOption
from cli.output import Output
from compressor.errors import RunError, UsageError

if TYPE_CHECKING:
    from compressor.reports.pareto import Benchmark
    from exporters.benchmark import BenchTarget, ImageShape

_MAX_BATCH_SIZE, _MAX_THREADS, _MAX_TARGETS = 65_536, 1_024, 60


def bench(
    targets: Annotated[
        list[str],
        typer.Argument(metavar="TARGET...", help="Runs, FILE.onnx, ARCH:WEIGHTS or WEIGHTS."),
    ],
    batch_sizes: Annotated[
        str, typer.Option(metavar="N,N", help="Images of one call, with commas.")
    ] = "1,8,32",
    threads: Annotated[
        str | None, typer.Option(metavar="N,N", help="CPU threads [default: 1 and all cores].")
    ] = None,
    rounds: Annotated[
        int, typer.Option(min=2, max=1000, help="How often the targets take turns.")
    ] = 5,
    seconds: Annotated[
        float, typer.Option(help="For each target, batch size and number of threads.")
    ] = 1.0,
    report: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="A report.json of a target; repeatable."),
    ] = None,
    image_shape: Annotated[
        str | None, typer.Option(metavar="CxHxW", help="Of the images, if a file does not say it.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Of the result [default: the run, or runs/bench-NAME]."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure latency, throughput, memory and size in turn; write bench.json, .md and .svg.

    A run stands for its network and all files in its `exports`. Accuracies are those that
    `verify` found for the very same file. For example a run, and files of two runs:

    `robust-compress bench runs/mine`

    `robust-compress bench runs/a/exports/model.int8.onnx runs/b/exports/model.int8.onnx`
    """
    sizes = _numbers("--batch-sizes", batch_sizes, most=_MAX_BATCH_SIZE)
    counts = None if threads is None else _numbers("--threads", threads, most=_MAX_THREADS)
    if not math.isfinite(seconds) or not 0 < seconds <= 3600:
        raise UsageError(f"--seconds {seconds:g} is not between 0 and 3600")
    shape = None if image_shape is None else _shape(image_shape)
    output = Output(as_json=as_json)
    with output.console.status("Opening the targets") as status:
        from exporters.benchmark import Plan
        from exporters.benchmark_report import (
            find_accuracies,
            num_usable_cores,
            run_benchmark,
            write_benchmark,
        )

        found = _find(targets, shape)
        folder = out or _folder(targets, found)
        _refuse_unwritable(folder)
        accuracies = find_accuracies(found, report or ())
        plan = Plan(
            batch_sizes=sizes,
            thread_counts=counts or tuple(sorted({1, num_usable_cores()})),
            num_rounds=rounds,
            seconds=seconds,
        )
        num_settings = len(found) * len(plan.batch_sizes) * len(plan.thread_counts)
        output.say(
            f"{num_settings} measurements of {seconds:g} s, then memory of {len(found)} targets"
        )
        benchmark = run_benchmark(
            found, plan, accuracies, observe=lambda text: status.update(escape(text))
        )
    paths = write_benchmark(benchmark, folder)
    output.result(benchmark.model_dump(mode="json") | {"files": [str(path) for path in paths]})
    print_benchmark(benchmark, output)
    output.say(f"\nWritten: {paths[0]}, {', '.join(path.name for path in paths[1:])}")
    output.next_command(_next(benchmark, found, paths))


def _numbers(option: str, text: str, *, most: int) -> tuple[int, ...]:
    words = [word.strip() for word in text.split(",")]
    if not all(re.fullmatch("[0-9]{1,9}", word) and 1 <= int(word) <= most for word in words):
        raise UsageError(
            f"{option} {text!r} is not a list of whole numbers from 1 to {most:,}; write them with "
            "commas, as 1,8,32"
        )
    return tuple(sorted({int(word) for word in words}))


def _shape(text: str) -> "ImageShape":
    match = re.fullmatch("([0-9]{1,4})x([0-9]{1,4})x([0-9]{1,4})", text)
    sides = tuple(map(int, match.groups())) if match else ()
    if len(sides) != 3 or min(sides) < 1:
        raise UsageError(
            f"--image-shape {text!r} is not channels x height x width, as 3x32x32, up to 9999 each"
        )
    return sides[0], sides[1], sides[2]


def _find(sources: list[str], image_shape: "ImageShape | None") -> "list[BenchTarget]":
    """Each file once, however often it is named."""
    from exporters.benchmark import find_targets

    found: dict[Path, BenchTarget] = {}
    for source in sources:
        for target in find_targets(source, image_shape=image_shape):
            file = Path(target.source.rpartition(":")[2])
            found.setdefault((file if file.is_file() else Path(target.source)).resolve(), target)
    if len(found) > _MAX_TARGETS:
        raise UsageError(f"{len(found)} targets are too many; at most {_MAX_TARGETS} at once")
    return list(found.values())


def _folder(sources: list[str], found: "list[BenchTarget]") -> Path:
    runs = {Path(source) for source in sources if Path(source).is_dir()}
    if len(runs) == 1:
        return runs.pop()
    return Path("runs") / f"bench-{Path(found[0].name).stem}"


def _refuse_unwritable(folder: Path) -> None:
    """Before anything is measured; the folder itself is made when there is something to write."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise RunError(f"{there} cannot be written to; choose another folder with --out")


def print_benchmark(benchmark: "Benchmark", output: Output) -> None:
    """Tables that fit 80 columns, and what follows from them."""
    from exporters.benchmark_report import fronts, notes, verdicts

    _print_latency(benchmark, output)
    _print_sizes(benchmark, output)
    _print_accuracy(benchmark, output)
    output.title("What follows")
    for line in [*verdicts(benchmark), *fronts(benchmark)]:
        output.say(line)
    output.title("How it was measured")
    for line in notes(benchmark):
        output.say(line)


def _print_latency(benchmark: "Benchmark", output: Output) -> None:
    from compressor.reports.pareto import latency_cells

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


def _next(benchmark: "Benchmark", found: "list[BenchTarget]", paths: list[Path]) -> str:
    """Verify what is not verified; else look at the result."""
    from compressor.run_directory import RunDirectory

    for row, target in zip(benchmark.targets, found, strict=True):
        if row.accuracy is None:
            exports = RunDirectory(target.folder).onnx(target.precision).parent
            is_of_run = exports == Path(target.source).parent
            source = f" --source {shlex.quote(str(target.folder))}" if is_of_run else ""
            return f"robust-compress verify {shlex.quote(target.source)}{source}"
    return f"xdg-open {shlex.quote(str(paths[-1]))}"
