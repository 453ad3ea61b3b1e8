"""`robust-compress plan`: what a run will cost, before it runs."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.options import (
    CompileOption,
    DeviceOption,
    DownloadOption,
    DtypeOption,
    JsonOption,
    MemoryOption,
    OutOption,
    SetOption,
    ThreadsOption,
    WorkersOption,
)
from cli.output import Output
from compressor.errors import ExitCode

if TYPE_CHECKING:
    from compressor.forecast import Forecast


def plan(
    recipe_path: Annotated[Path, typer.Argument(metavar="RECIPE.toml", help="The recipe.")],
    data: Annotated[str | None, typer.Option(help="Where the images are.")] = None,
    clean_teacher: Annotated[
        list[str] | None, typer.Option(metavar="SPEC", help="As of distill; repeatable.")
    ] = None,
    robust_teacher: Annotated[
        list[str] | None, typer.Option(metavar="SPEC", help="As of distill; repeatable.")
    ] = None,
    out: OutOption = None,
    overrides: SetOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    compile_networks: CompileOption = "auto",
    threads: ThreadsOption = None,
    memory_mib: MemoryOption = 4096,
    workers: WorkersOption = None,
    download: DownloadOption = False,
    as_json: JsonOption = False,
) -> None:
    """Predict time, memory and disk of a run from a few of its steps, and what will not fit.

    Takes a minute, writes nothing. Other work on the machine slows the steps, and the prediction
    with them. Example:

    `robust-compress plan examples/recipes/cifar10-small.toml --data imagefolder:DATA
    --clean-teacher resnet18:CLEAN.safetensors --robust-teacher resnet18:ROBUST.safetensors`
    """
    from dataclasses import asdict

    from cli.recipe_from_options import NamedOptions, recipe_from_options
    from cli.training import performance_settings, performance_words
    from compressor.forecast import Forecast
    from compressor.forecast_workflow import forecast_run

    output = Output(as_json=as_json)
    settings = performance_settings(
        device=device,
        dtype=dtype,
        compile_networks=compile_networks,
        num_threads=threads,
        memory_mib=memory_mib,
        num_workers=workers,
    )
    named = NamedOptions(
        data=data,
        clean_teachers=tuple(clean_teacher or ()),
        robust_teachers=tuple(robust_teacher or ()),
    )
    recipe, out = recipe_from_options(
        recipe_path, named, overrides=overrides or [], out=out, resume=False
    )
    output.say("... taking some steps of the run")
    found = forecast_run(recipe, settings, out=out, download=download)
    if isinstance(found, Forecast):
        _print(found, output)
    for problem in found.problems:
        output.title(f"It will not fit. {problem}")
    total = {"total_seconds": found.total_seconds} if isinstance(found, Forecast) else {}
    output.result(asdict(found) | total | {"problems": found.problems})
    if found.problems:
        raise typer.Exit(int(ExitCode.KNOWN_ERROR))
    words = ["robust-compress", *(["distill"] if recipe.teachers else ["teacher", "train"])]
    given = {
        "--data": [data],
        "--clean-teacher": clean_teacher,
        "--robust-teacher": robust_teacher,
        "--set": overrides,
        "--out": [out],
    }
    words += [str(recipe_path), *performance_words(settings)]
    for name, values in given.items():
        words += [word for value in values or () if value for word in (name, str(value))]
    words += ["--download"] if download else []
    output.next_command(shlex.join(words))


def _print(found: "Forecast", output: Output) -> None:
    low, high = found.step_seconds_range
    validations = found.num_validations * found.validation_seconds
    rows = [
        ["step", f"{found.step_seconds:.3f} s", f"{low:.3f} to {high:.3f} at the moments tried"],
        ["epoch", _time(found.epoch_seconds), f"{found.num_steps // found.num_epochs} steps"],
        ["validation", _time(validations), f"{found.num_validations} in all"],
        ["whole run", _time(found.total_seconds), f"{found.num_epochs} epochs, and validation"],
        ["memory", _size(found.peak_memory_bytes), f"of {_size(found.free_memory_bytes)}"],
        ["disk", _size(found.disk_bytes), f"of {_size(found.free_disk_bytes)}, for checkpoints"],
    ]
    output.table(("", "", ""), rows)


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    minutes = seconds / 60
    return f"{minutes:.1f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def _size(num_bytes: int) -> str:
    gib = num_bytes / 2**30
    return f"{gib:.2f} GiB" if gib >= 0.1 else f"{num_bytes / 2**20:.2f} MiB"
