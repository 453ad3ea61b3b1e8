"""`robust-compress distill`: the main job."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.options import (
    AcceptOption,
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
from cli.processes import is_first, run_in_processes

if TYPE_CHECKING:
    from compressor.performance_settings import PerformanceSettings


def distill(
    recipe_path: Annotated[
        Path | None,
        typer.Argument(metavar="[RECIPE.toml|RUN]", help="A recipe; or a run, with --resume."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="digits, imagefolder:PATH, cifar10:ROOT, cifar100:ROOT, ..."),
    ] = None,
    clean_teacher: Annotated[
        list[str] | None,
        typer.Option(metavar="SPEC", help="ARCH:FILE, FILE.onnx or a run folder; repeatable."),
    ] = None,
    robust_teacher: Annotated[
        list[str] | None,
        typer.Option(metavar="SPEC", help="ARCH:FILE, FILE.onnx or a run folder; repeatable."),
    ] = None,
    student: Annotated[
        str | None, typer.Option(metavar="ARCH", help="For example mobilenet_v2 or resnet18.")
    ] = None,
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
    accept_teachers: AcceptOption = False,
    do_verify: Annotated[bool, typer.Option("--verify/--no-verify")] = True,
    do_export: Annotated[bool, typer.Option("--export/--no-export")] = True,
    as_json: JsonOption = False,
) -> None:
    """Distil a student from clean and robust teachers, then verify and export it.

    For example with a recipe, without one, and after an interruption:

    `robust-compress distill examples/recipes/cifar10-small.toml --data imagefolder:DATA
    --clean-teacher resnet18:CLEAN.safetensors --robust-teacher resnet18:ROBUST.safetensors`

    `robust-compress distill --data imagefolder:DATA --clean-teacher CLEAN.onnx
    --robust-teacher wide_resnet_34_10:ROBUST.pt --student mobilenet_v2`

    `robust-compress distill runs/mine --resume`
    """
    if nproc > 1:
        raise typer.Exit(run_in_processes(nproc, num_restarts=restarts))
    from cli.recipe_from_options import NamedOptions, recipe_from_options
    from cli.training import TrainingOptions, performance_settings, run_training

    output = Output(as_json=as_json)
    settings = performance_settings(
        device=device,
        dtype=dtype,
        compile_networks=compile_networks,
        num_threads=threads,
        checkpoint_minutes=checkpoint_minutes,
        keep_every=keep_every,
        memory_mib=memory_mib,
        num_workers=workers,
    )
    named = NamedOptions(
        data=data,
        clean_teachers=tuple(clean_teacher or ()),
        robust_teachers=tuple(robust_teacher or ()),
        student=student,
    )
    recipe, out = recipe_from_options(
        recipe_path, named, overrides=overrides or [], out=out, resume=resume
    )
    options = TrainingOptions(
        out=out,
        resume=resume,
        settings=settings,
        download=download,
        accept_teachers=accept_teachers,
        command="distill",
    )
    run = run_training(recipe, options, output)
    _finish(run.path, output, settings, do_verify=do_verify, do_export=do_export)


def _finish(
    run_path: Path,
    output: Output,
    settings: "PerformanceSettings",
    *,
    do_verify: bool,
    do_export: bool,
) -> None:
    """The file first, so that the report can show what it costs.

    Only the attacks of the papers: the whole cascade takes as long as training, and is a command.
    """
    from cli.exporting import export_fp32
    from cli.verify import run_verify
    from compressor.attacks.stages import PAPER_ATTACKS
    from compressor.run_directory import RunDirectory
    from compressor.verification.request import VerificationRequest

    run = RunDirectory.open(run_path)
    result: dict[str, object] = {"run": str(run.path), "model": str(run.model)}
    if do_export and is_first():
        result["onnx"] = export_fp32(run, settings=settings, output=output)
    if do_verify:
        request = VerificationRequest(
            target=str(run.path), settings=settings, attacks=PAPER_ATTACKS
        )
        found = run_verify(request, output)
        if found is not None:
            result["report"] = found[0].model_dump(mode="json")
    output.result(result)
    output.next_command(f"robust-compress verify {run.path}")
