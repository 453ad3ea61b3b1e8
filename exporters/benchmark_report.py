"""From durations to a record that can be kept: rows, verdicts, Markdown, and files.

Peak memory is the high-water mark of the resident set of a fresh process that opens one target and
answers its largest batch on one thread, minus that of one that makes the same imports and images.
On Linux it is VmHWM of /proc, as `ru_maxrss` of a child begins at what its parent had.
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path

from compressor import __version__
from compressor.environment import package_versions, processor_name
from compressor.errors import RunError, UsageError
from compressor.reports.markdown import markdown_table, plain
from compressor.reports.pareto import (
    BENCHMARK_FILE,
    MIN_CALLS_P90,
    MIN_CALLS_P99,
    Accuracy,
    Benchmark,
    BenchmarkRow,
    Timing,
    artefact_tables,
    latency_table,
    ms_text,
    not_dominated,
    pareto_picture,
    standalone_svg,
)
from compressor.reports.report import RobustnessReport, read_report
from compressor.reports.sections import Table, threat_text
from compressor.run_directory import write_json_atomically, write_text_atomically
from exporters.benchmark import BenchTarget, Measured, Plan, measure

_PACKAGES = ("torch", "onnxruntime", "numpy")
_BUSY_LOAD = 0.25
"""Processes of others that want to run, for each core."""
_MAX_LETTERS = 200
_CHILD_SECONDS = 300
_CHILD = """
import json, resource, sys
import numpy, onnx, onnxruntime
from exporters.benchmark import find_targets
source, shape, takes_bytes = json.loads(sys.argv[1])
images = numpy.ones(shape, numpy.uint8 if takes_bytes else numpy.float32)
if source:
    (target,) = find_targets(source, image_shape=tuple(shape[1:]))
    target.open(1)(images)
try:
    lines = open("/proc/self/status").read().splitlines()
    print(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")))
except OSError:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)  # a Mac counts bytes
"""


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
    memories = _peak_memories_mib(cells)
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
        mode=_mode(plan),
    )


def write_benchmark(benchmark: Benchmark, folder: Path) -> list[Path]:
    """Write bench.json, bench.md and, if there is a picture, bench.svg; the paths."""
    path = folder / BENCHMARK_FILE
    write_json_atomically(path, benchmark.model_dump(mode="json"))
    picture = pareto_picture(benchmark)
    markdown, svg = path.with_suffix(".md"), path.with_suffix(".svg")
    if picture is None:
        svg.unlink(missing_ok=True)  # of an earlier benchmark
    else:
        write_text_atomically(svg, standalone_svg(picture))
    write_text_atomically(markdown, to_markdown(benchmark))
    return [path, markdown, *([svg] if picture else [])]


def to_markdown(benchmark: Benchmark) -> str:
    """For people; names come from strangers, and none of them can become markup."""
    picture = pareto_picture(benchmark)
    costs, accuracies = map(_markdown, artefact_tables(benchmark))
    latencies = _markdown(latency_table(benchmark))
    lines = [*verdicts(benchmark), *fronts(benchmark), *notes(benchmark)]
    listed = "\n".join(f"- {plain(line)}" for line in lines)
    shown = [f"![{plain(picture.alt)}]({BENCHMARK_FILE.replace('json', 'svg')})"] if picture else []
    return (
        "\n\n".join(["# Benchmark", costs, accuracies, *shown, listed, "## Latency", latencies])
        + "\n"
    )


def num_usable_cores() -> int:
    """Cores that this process may use, which in a container are not all there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def find_accuracies(
    targets: Sequence[BenchTarget], report_paths: Sequence[Path] = ()
) -> dict[str, Accuracy]:
    """What verifications found, by the SHA-256 of the target; nothing else connects the two.

    Of several, those given come first, then those that are verified, then those of more images,
    then the lower accuracy.

    Raises:
        UsageError: if a report that was given is of none of the targets.
        RunError: if it cannot be read.
    """
    hashes = {target.sha256 for target in targets}
    found: dict[str, list[tuple[tuple[bool, bool, int, float], Accuracy]]] = {}
    for path in report_paths:
        if not path.is_file():
            raise UsageError(f"--report {path} does not exist; check the path")
        report = read_report(path)
        if report.target.sha256 not in hashes:
            raise UsageError(
                f"--report {path} is of a file with SHA-256 {report.target.sha256}, which none of "
                "the targets has; verify the target itself"
            )
    for path in dict.fromkeys([*report_paths, *_reports_near(targets)]):
        try:
            report = read_report(path)
        except RunError:  # of an older version, or under way
            continue
        if report.target.sha256 not in hashes:
            continue
        accuracy = _accuracy(report, path)
        worst = accuracy.worst_case
        rank = (path in report_paths, worst is not None, report.clean.num_total)
        lower = -worst.fraction if worst else 0.0
        found.setdefault(report.target.sha256, []).append(((*rank, lower), accuracy))
    return {key: max(ranked, key=lambda pair: pair[0])[1] for key, ranked in found.items()}


def _reports_near(targets: Sequence[BenchTarget]) -> list[Path]:
    folders = {target.folder for target in targets}
    besides = {folder.parent for folder in folders} | {Path("runs")}
    folders |= set(chain.from_iterable(folder.glob("verify-*") for folder in besides))
    return sorted(chain.from_iterable(folder.glob("report*.json") for folder in folders))


def _accuracy(report: RobustnessReport, path: Path) -> Accuracy:
    status = "sequential" if report.looks == "many" else report.status
    is_shown = status == "verified"
    return Accuracy(
        status=status,
        report=_printable("/".join(path.absolute().parts[-2:])),
        threat=threat_text(report),
        protocol=_printable(report.protocol),
        images_sha256=_printable(report.data.content_sha256),
        gradients_are_masked=report.artefact is not None and report.artefact.gradients_are_masked,
        clean=report.clean if is_shown else None,
        worst_case=report.worst_case if is_shown else None,
    )


def _row(name: str, cells: Sequence[Measured], memory_mib: float | None) -> BenchmarkRow:
    target = cells[0].target
    return BenchmarkRow(
        name=name,
        kind=target.kind,
        precision=target.precision,
        sha256=target.sha256,
        source_sha256=target.source_sha256 and _printable(target.source_sha256),
        num_bytes=target.num_bytes,
        image_shape=target.image_shape,
        takes_bytes=target.takes_bytes,
        runs_on=target.runs_on,
        peak_memory_mib=memory_mib,
        timings=tuple(_timing(cell) for cell in cells if not cell.why_not),
        not_measured=tuple(
            f"batch {cell.batch_size}, threads {cell.num_threads}: {_printable(cell.why_not)}"
            for cell in cells
            if cell.why_not
        ),
        accuracy=None,
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
    names = [_printable(target.name) for target in targets]
    longer = [_printable(f"{t.folder.resolve().name}/{t.name}") for t in targets]
    names = [
        more if names.count(name) > 1 else name for name, more in zip(names, longer, strict=True)
    ]
    pairs = zip(names, targets, strict=True)
    return [f"{n} {t.sha256[:8]}" if names.count(n) > 1 else n for n, t in pairs]


def _printable(text: str) -> str:
    """A text from strangers, fit for a terminal and for a record."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)[:_MAX_LETTERS]


def _told(cell: Measured, number: int, plan: Plan) -> str:
    setting = f"batch {cell.batch_size}, threads {cell.num_threads}"
    return f"{setting}, round {number} of {plan.num_rounds}: {_printable(cell.target.name)}"


def _load() -> float | None:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _mode(plan: Plan) -> dict[str, str]:
    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    return {
        "device": "cpu",
        "processor": processor_name(),
        "clock frequency": f"governor {governor.read_text().strip()}"
        if governor.is_file()
        else "unknown",
        "seconds for each": f"{plan.seconds:g}",
        "robust-compress": __version__,
        "python": platform.python_version(),
        **package_versions(_PACKAGES),
    }


def _peak_memories_mib(cells: Sequence[Measured]) -> dict[str, float | None]:
    """By the source of the target, for its largest batch; None where a process failed."""
    answered = sorted((c for c in cells if not c.why_not), key=lambda c: c.batch_size)
    largest = {cell.target.source: cell for cell in answered}
    empties: dict[str, int | None] = {}
    found: dict[str, float | None] = {}
    for source, cell in largest.items():
        images = (cell.batch_size, *cell.target.image_shape), cell.target.takes_bytes
        key = str(images)
        if key not in empties:
            empties[key] = _peak_kib("", *images)
        full, empty = _peak_kib(source, *images), empties[key]
        found[source] = None if full is None or empty is None else max(0, full - empty) / 1024
    return found


def _peak_kib(source: str, shape: tuple[int, ...], takes_bytes: bool) -> int | None:  # noqa: FBT001 (part of a key)
    """Of a process that opens `source`, or nothing."""
    root = str(Path(__file__).parents[1])
    paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", _CHILD, json.dumps([source, shape, takes_bytes])],
            capture_output=True,
            text=True,
            check=True,
            timeout=_CHILD_SECONDS,
            env=os.environ | {"PYTHONPATH": paths},
        )
        return int(done.stdout.split()[-1])
    except (OSError, ValueError, IndexError, subprocess.SubprocessError):
        return None


# What is said about it


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
        lines.append(f"Gradients are masked, so robust accuracy flatters: {', '.join(masked)}.")
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
    machine = ", ".join(f"{key} {value}" for key, value in benchmark.mode.items())
    return [*lines, _load_line(benchmark), f"Measured with {machine}."]


def _load_line(benchmark: Benchmark) -> str:
    before, after, num_cores = benchmark.load_before, benchmark.load_after, benchmark.num_cores
    if before is None or after is None:
        return "Whether the machine did anything else is not known."
    said = f"load {before:.2f} before and {after:.2f} after, on {num_cores} cores."
    other = max(before, after - max(benchmark.thread_counts)) / num_cores
    if other <= _BUSY_LOAD:
        return f"The machine had little else to do: {said}"
    return f"The machine was BUSY with other work, so these times are unsafe: {said}"


def _markdown(table: Table) -> str:
    rows = [[plain(cell) for cell in row] for row in table.rows]
    return markdown_table(table.header, rows, align=table.align)
