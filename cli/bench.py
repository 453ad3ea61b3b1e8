"""`robust-compress bench`: what artefacts cost, side by side, and what they are worth."""

import math
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from cli.bench_display import print_benchmark
from cli.options import JsonOption, ProviderOption
from cli.output import Output
from compressor.errors import RunError, UsageError

if TYPE_CHECKING:
    from compressor.onnx_providers import Provider
    from compressor.reports.benchmark import Accuracy, Benchmark
    from exporters.benchmark.target import BenchTarget, ImageShape

_MAX_BATCH_SIZE, _MAX_THREADS, _MAX_TARGETS = 65_536, 1_024, 60


def bench(
    targets: Annotated[
        list[str],
        typer.Argument(
            metavar="TARGET...",
            help="Runs, bundles, build kits, FILE.onnx, FILE.engine, ARCH:WEIGHTS or WEIGHTS.",
        ),
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
    provider: ProviderOption = "cpu",
    manifest_sha256: Annotated[
        list[str] | None,
        typer.Option(metavar="HASH", help="Of the sidecar of an engine to be run; repeatable."),
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

    A run stands for its network and the files in its `exports` that were made from it; older ones
    are named and left out. Engines are programs, and run only if you name the hash of their
    sidecar. Accuracies are those that `verify` found for the very same file. For example a run,
    files of two runs, and an engine:

    `robust-compress bench runs/mine`

    `robust-compress bench runs/a/exports/model.int8.onnx runs/b/exports/model.int8.onnx`

    `robust-compress bench runs/mine/exports/model.fp16.engine --manifest-sha256 HASH`
    """
    sizes = _numbers("--batch-sizes", batch_sizes, most=_MAX_BATCH_SIZE)
    counts = None if threads is None else _numbers("--threads", threads, most=_MAX_THREADS)
    if not math.isfinite(seconds) or not 0 < seconds <= 3600:
        raise UsageError(f"--seconds {seconds:g} is not between 0 and 3600")
    hashes = [_sha256(text) for text in manifest_sha256 or ()]
    asked = _Asked(
        image_shape=None if image_shape is None else _shape(image_shape),
        provider=_provider(provider),
        trusted_sha256=hashes,
    )
    output = Output(as_json=as_json)
    with output.console.status("Opening the targets") as status:
        from compressor.performance import num_usable_cores
        from exporters.benchmark.measurement import Plan
        from exporters.benchmark.report import run_benchmark, write_benchmark

        found, left_out = _find(targets, asked)
        folder = out or _folder(targets, found)
        _refuse_unwritable(folder)
        accuracies = _accuracies(found, report or ())
        plan = Plan(
            batch_sizes=sizes,
            thread_counts=counts or tuple(sorted({1, num_usable_cores()})),
            num_rounds=rounds,
            seconds=seconds,
        )
        num_open = sum(not target.why_not for target in found)
        num_settings = num_open * len(plan.batch_sizes) * len(plan.thread_counts)
        output.say(
            f"{num_settings} measurements of {seconds:g} s, then memory of {num_open} targets"
        )
        benchmark = run_benchmark(
            found, plan, accuracies, observe=lambda text: status.update(escape(text))
        )
    paths = write_benchmark(benchmark, folder, left_out=left_out)
    about = {"files": [str(path) for path in paths], "left_out": left_out}
    output.result(benchmark.model_dump(mode="json") | about)
    print_benchmark(benchmark, output, left_out=left_out)
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


def _provider(text: str) -> "Provider":
    from compressor.onnx_providers import PROVIDERS

    for provider in PROVIDERS:
        if text == provider:
            return provider
    raise UsageError(f"--provider {text!r} is not one of {', '.join(PROVIDERS)}")


def _sha256(text: str) -> str:
    if not re.fullmatch("[0-9a-fA-F]{64}", text):
        raise UsageError(
            f"--manifest-sha256 {text!r} is not a SHA-256, which has 64 digits 0-9, a-f"
        )
    return text.lower()


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """How the targets are to be run."""

    image_shape: "ImageShape | None"
    provider: "Provider"
    trusted_sha256: Sequence[str]


def _find(sources: list[str], asked: _Asked) -> "tuple[list[BenchTarget], list[str]]":
    """Each file once, however often it is named; and what is to be said of those that are stale."""
    from exporters.benchmark.targets import find_targets

    found: dict[Path, BenchTarget] = {}
    stale: dict[Path, str] = {}

    def leave_out(path: Path, why: str) -> None:
        stale[path.resolve()] = f"Left out: {path}, {why}."

    for source in sources:
        for target in find_targets(
            source,
            image_shape=asked.image_shape,
            provider=asked.provider,
            trusted_sha256=asked.trusted_sha256,
            leave_out=leave_out,
        ):
            file = Path(target.source.rpartition(":")[2])
            found.setdefault((file if file.is_file() else Path(target.source)).resolve(), target)
    if len(found) > _MAX_TARGETS:
        raise UsageError(f"{len(found)} targets are too many; at most {_MAX_TARGETS} at once")
    _refuse_idle(asked, list(found.values()))
    lines = [line for path, line in stale.items() if path not in found]
    lines += [
        f"{target.source} was made from other weights than its run holds now, so reports on it are "
        "taken only if --report names them; export it again."
        for target in found.values()
        if target.is_stale
    ]
    return list(found.values()), lines


def _accuracies(found: "list[BenchTarget]", reports: Sequence[Path]) -> "dict[str, Accuracy]":
    """Those of stale files only where the user names the report."""
    from compressor.reports.report import read_report
    from exporters.benchmark.accuracy import find_accuracies

    known = find_accuracies(found, reports)
    named = {read_report(path).target.sha256 for path in reports}
    stale = {target.sha256 for target in found if target.is_stale} - named
    return {sha256: accuracy for sha256, accuracy in known.items() if sha256 not in stale}


def _refuse_idle(asked: _Asked, found: "list[BenchTarget]") -> None:
    """What was asked for and changes nothing would be taken for granted."""
    if asked.provider != "cpu" and all(target.kind != "onnx" for target in found):
        raise UsageError(
            f"--provider {asked.provider} is for ONNX files, and no target is one; leave it out"
        )
    used = {target.sidecar_sha256 for target in found}
    for sha256 in asked.trusted_sha256:
        if sha256 not in used:
            raise UsageError(
                f"--manifest-sha256 {sha256} is that of no engine here; check it "
                "against sha256sum ENGINE.json where the engine was built"
            )


def _folder(sources: list[str], found: "list[BenchTarget]") -> Path:
    """The run, if there is one; nothing may be added to a bundle, whose manifest names it all."""
    from exporters.benchmark.targets import is_run

    folders = list(dict.fromkeys(Path(source) for source in sources if Path(source).is_dir()))
    runs = [folder for folder in folders if is_run(folder)]
    if len(runs) == 1:
        return runs[0]
    first = Path(sources[0])
    name = first.resolve().name if first.is_dir() else Path(found[0].name).stem
    return Path("runs") / f"bench-{name}"


def _refuse_unwritable(folder: Path) -> None:
    """Before anything is measured; the folder itself is made when there is something to write."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise RunError(f"{there} cannot be written to; choose another folder with --out")


def _next(benchmark: "Benchmark", found: "list[BenchTarget]", paths: list[Path]) -> str:
    """Verify what is not verified; else look at the result."""
    from compressor.run_directory import RunDirectory

    for row, target in zip(benchmark.targets, found, strict=True):
        if row.accuracy is None and not target.why_not and not target.is_stale:
            run, path = RunDirectory(target.folder), Path(target.source)
            is_network = run.model == path and run.resolved_recipe.is_file()
            words = ["robust-compress", "verify", str(run.path if is_network else path)]
            if run.exports == path.parent:
                words += ["--source", str(run.path)]
            if target.provider != "cpu":
                words += ["--provider", target.provider]
            if target.sidecar_sha256 is not None:
                words += ["--manifest-sha256", target.sidecar_sha256]
            return shlex.join(words)
    return f"xdg-open {shlex.quote(str(paths[-1]))}"
