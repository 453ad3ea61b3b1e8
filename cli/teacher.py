"""`robust-compress teacher train`: so that nobody is stuck for a teacher."""

from pathlib import Path
from typing import Annotated, Any

import typer

from cli.options import (
    CheckpointOption,
    CompileOption,
    DeviceOption,
    DownloadOption,
    DtypeOption,
    JsonOption,
    KeepOption,
    MemoryOption,
    OutOption,
    ProcessesOption,
    RestartsOption,
    ResumeOption,
    SetOption,
    ThreadsOption,
    WorkersOption,
)
from cli.output import Output
from cli.processes import run_in_processes

_METHODS_OF_ROLE = {"clean": ("cross_entropy",), "robust": ("pgd_at", "trades")}


def train_teacher(
    recipe_path: Annotated[
        Path, typer.Argument(metavar="RECIPE.toml|RUN", help="A recipe; or a run, with --resume.")
    ],
    role: Annotated[
        str | None,
        typer.Option(help="clean: cross-entropy; robust: PGD-AT, unless the recipe says TRADES."),
    ] = None,
    data: Annotated[str | None, typer.Option(help="Where the images are.")] = None,
    out: OutOption = None,
    overrides: SetOption = None,
    resume: ResumeOption = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    compile_networks: CompileOption = "auto",
    threads: ThreadsOption = None,
    checkpoint_minutes: CheckpointOption = 10.0,
    keep_every: KeepOption = None,
    memory_mib: MemoryOption = 4096,
    workers: WorkersOption = None,
    nproc: ProcessesOption = 1,
    restarts: RestartsOption = 3,
    download: DownloadOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train a clean or a robust teacher on your own data.

    Example: `robust-compress teacher train examples/recipes/cifar10-teacher-robust.toml
    --role robust --data imagefolder:DATA`
    """
    if nproc > 1:
        raise typer.Exit(run_in_processes(nproc, num_restarts=restarts))
    from cli.recipe_from_options import NamedOptions, recipe_from_options
    from cli.training import TrainingOptions, performance_settings, run_training
    from compressor.errors import UsageError

    if role is not None and role not in _METHODS_OF_ROLE:
        raise UsageError(f"--role {role!r} is not clean or robust")
    output = Output(as_json=as_json)
    named = NamedOptions(data=data, method=_METHODS_OF_ROLE[role][0] if role else None)
    recipe, out = recipe_from_options(
        recipe_path, named, overrides=overrides or [], out=out, resume=resume
    )
    _refuse_wrong_method(recipe.method.name, role)
    options = TrainingOptions(
        out=out,
        resume=resume,
        settings=performance_settings(
            device=device,
            dtype=dtype,
            compile_networks=compile_networks,
            num_threads=threads,
            checkpoint_minutes=checkpoint_minutes,
            keep_every=keep_every,
            memory_mib=memory_mib,
            num_workers=workers,
        ),
        download=download,
        accept_teachers=False,
        command="teacher train",
    )
    run = run_training(recipe, options, output)
    result: dict[str, Any] = {"run": str(run.path), "model": str(run.model)}
    output.result(result)
    made = "clean" if recipe.method.name == "cross_entropy" else "robust"
    output.next_command(f"robust-compress distill RECIPE.toml --{made}-teacher {run.path} ...")


def _refuse_wrong_method(method: str, role: str | None) -> None:
    from compressor.errors import RecipeError

    allowed = _METHODS_OF_ROLE[role] if role else sum(_METHODS_OF_ROLE.values(), ())
    if method not in allowed:
        raise RecipeError(
            f"method.name = {method!r} does not train a {role or ''} teacher".replace("  ", " ")
            + f"; use {' or '.join(map(repr, allowed))}"
        )
