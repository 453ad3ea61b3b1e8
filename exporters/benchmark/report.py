"""From measurements to a record, and from the record to files."""

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path

from compressor import __version__
from compressor.device.cuda import gpu_name
from compressor.environment import package_versions, processor_name
from compressor.errors import UsageError
from compressor.performance import num_usable_cores
from compressor.reports.benchmark import (
    MIN_CALLS_P90,
    MIN_CALLS_P99,
    Accuracy,
    Benchmark,
    BenchmarkRow,
    Timing,
    printable,
)
from compressor.reports.benchmark_tables import artefact_tables, latency_table
from compressor.reports.markdown import markdown_table, plain
from compressor.reports.pareto import pareto_picture
from compressor.reports.sections import Table
from compressor.reports.svg import standalone_svg
from compressor.run_directory import RunDirectory, write_json_atomically, write_text_atomically
from exporters.benchmark.measurement import Measured, Plan, measure
from exporters.benchmark.peak_memory import peak_memories_mib
from exporters.benchmark.target import BenchTarget
from exporters.benchmark.verdicts import fronts, notes, verdicts

_PACKAGES = ("torch", "onnxruntime", "onnxruntime-gpu", "numpy")


def run_benchmark(
    targets: Sequence[BenchTarget],
    plan: Plan,
    accuracies: Mapping[str, Accuracy],
    *,
    observe: Callable[[str], None] = lambda _: None,
) -> Benchmark:
    """Measure targets side by side.

    Args:
        targets: in the order in which they take turns.
        plan: what is measured.
        accuracies: by the SHA-256 of the target, as `find_accuracies` gives them.
        observe: told in words what is done now.

    Raises:
        UsageError: if no target takes any of the batch sizes.
    """
    load_before = _load()
    cells = measure(targets, plan, observe=lambda cell, number: observe(_told(cell, number, plan)))
    load_after = _load()
    if all(cell.why_not for cell in cells):
        said = "; ".join(dict.fromkeys(f"{c.target.name}: {c.why_not}" for c in cells))
        raise UsageError(f"nothing could be measured: {said}; choose other --batch-sizes")
    observe("peak memory, each in a process of its own")
    memories = peak_memories_mib(cells)
    rows = [
        _row(name, [c for c in cells if c.target is target], memories.get(target.source))
        for target, name in zip(targets, _names(targets), strict=True)
    ]
    return Benchmark(
        targets=tuple(
            row.model_copy(update={"accuracy": accuracies.get(row.sha256)}) for row in rows
        ),
        batch_sizes=plan.batch_sizes,
        thread_counts=plan.thread_counts,
        num_cores=os.cpu_count() or 1,
        num_usable_cores=num_usable_cores(),
        load_before=load_before,
        load_after=load_after,
        mode=_mode(plan, targets),
    )


def write_benchmark(
    benchmark: Benchmark, folder: Path, *, left_out: Sequence[str] = ()
) -> list[Path]:
    """Write it for programs and for people and, if there is one, the picture; the paths.

    Files have the names that they have in a run, whether `folder` is one or not.

    Args:
        benchmark: the record.
        folder: is made if it is not there.
        left_out: for people, what was not measured or not believed, and why.
    """
    files, picture = RunDirectory(folder), pareto_picture(benchmark)
    write_json_atomically(files.benchmark, benchmark.model_dump(mode="json"))
    if picture is None:
        files.benchmark_picture.unlink(missing_ok=True)  # of an earlier benchmark
    else:
        write_text_atomically(files.benchmark_picture, standalone_svg(picture))
    write_text_atomically(files.benchmark_markdown, to_markdown(benchmark, left_out=left_out))
    written = [files.benchmark, files.benchmark_markdown]
    return [*written, *([files.benchmark_picture] if picture else [])]


def to_markdown(benchmark: Benchmark, *, left_out: Sequence[str] = ()) -> str:
    """For people; names come from strangers, and none of them can become markup."""
    picture = pareto_picture(benchmark)
    costs, accuracies = map(_markdown, artefact_tables(benchmark))
    latencies = _markdown(latency_table(benchmark))
    lines = [*left_out, *verdicts(benchmark), *fronts(benchmark), *notes(benchmark)]
    listed = "\n".join(f"- {plain(line)}" for line in lines)
    file = RunDirectory(Path()).benchmark_picture.name
    shown = [f"![{plain(picture.alt)}]({file})"] if picture else []
    return (
        "\n\n".join(["# Benchmark", costs, accuracies, *shown, listed, "## Latency", latencies])
        + "\n"
    )


def _row(name: str, cells: Sequence[Measured], memory_mib: float | None) -> BenchmarkRow:
    target = cells[0].target
    return BenchmarkRow(
        name=name,
        kind=target.kind,
        precision=target.precision,
        sha256=target.sha256,
        source_sha256=target.source_sha256 and printable(target.source_sha256),
        num_bytes=target.num_bytes,
        image_shape=target.image_shape,
        takes_bytes=target.takes_bytes,
        runs_on=target.runs_on,
        peak_memory_mib=memory_mib,
        timings=tuple(_timing(cell) for cell in cells if not cell.why_not),
        not_measured=_not_measured(cells),
        accuracy=None,
    )


def _not_measured(cells: Sequence[Measured]) -> tuple[str, ...]:
    """The settings and why, or only why if it is one reason for all."""
    reasons = {cell.why_not for cell in cells}
    if len(reasons) == 1:
        return tuple(printable(reason) for reason in reasons if reason)
    return tuple(
        f"batch {cell.batch_size}, threads {cell.num_threads}: {printable(cell.why_not)}"
        for cell in cells
        if cell.why_not
    )


def _timing(cell: Measured) -> Timing:
    every_ns = sorted(chain.from_iterable(cell.rounds_ns))
    p50s_ns = [percentile(sorted(round_ns), 50) for round_ns in cell.rounds_ns]
    num = len(every_ns)
    return Timing(
        batch_size=cell.batch_size,
        num_threads=cell.num_threads,
        num_rounds=len(cell.rounds_ns),
        num_calls=num,
        p50_ms=percentile(every_ns, 50) / 1e6,
        lowest_p50_ms=min(p50s_ns) / 1e6,
        highest_p50_ms=max(p50s_ns) / 1e6,
        p90_ms=percentile(every_ns, 90) / 1e6 if num >= MIN_CALLS_P90 else None,
        p99_ms=percentile(every_ns, 99) / 1e6 if num >= MIN_CALLS_P99 else None,
        images_per_second=1e9 * cell.batch_size * num / max(1, sum(every_ns)),
    )


def percentile(ascending: Sequence[int], percent: int) -> int:
    """By nearest rank: the smallest value that so many percent of all do not exceed."""
    return ascending[-(-percent * len(ascending) // 100) - 1]


def _names(targets: Sequence[BenchTarget]) -> list[str]:
    """File names, with as much before and behind them as tells them apart."""
    names = [printable(target.name) for target in targets]
    longer = [printable(f"{t.folder.resolve().name}/{t.name}") for t in targets]
    names = [
        more if names.count(name) > 1 else name for name, more in zip(names, longer, strict=True)
    ]
    pairs = zip(names, targets, strict=True)
    return [f"{n} {t.sha256[:8]}" if names.count(n) > 1 else n for n, t in pairs]


def _told(cell: Measured, number: int, plan: Plan) -> str:
    setting = f"batch {cell.batch_size}, threads {cell.num_threads}"
    return f"{setting}, round {number} of {plan.num_rounds}: {printable(cell.target.name)}"


def _load() -> float | None:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _mode(plan: Plan, targets: Sequence[BenchTarget]) -> dict[str, str]:
    is_on_cpu = {target.is_on_cpu for target in targets if not target.why_not}
    devices = {True: "cpu", False: gpu_name() or "gpu" if False in is_on_cpu else ""}
    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    return {
        "device": ", ".join(devices[known] for known in sorted(is_on_cpu, reverse=True)),
        "processor": processor_name(),
        "clock frequency": f"governor {governor.read_text().strip()}"
        if governor.is_file()
        else "unknown",
        "seconds for each": f"{plan.seconds:g}",
        "robust-compress": __version__,
        "python": platform.python_version(),
        **package_versions(_PACKAGES),
    }


def _markdown(table: Table) -> str:
    rows = [[plain(cell) for cell in row] for row in table.rows]
    return markdown_table(table.header, rows, align=table.align)
