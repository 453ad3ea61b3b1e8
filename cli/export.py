"""`robust-compress export`: files that are shown to be the same model."""

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.options import JsonOption, MovedDataOption, RunArgument, ThreadsOption
from cli.output import Output

_INT8, _PROOF = "int8", "What a file must show"
_ENGINES, _BUNDLE = "Engines", "Bundle"


def export(
    run_path: RunArgument,
    formats: Annotated[
        list[str] | None,
        typer.Option("--format", help="onnx or engine (trt, tensorrt); repeatable."),
    ] = None,
    precision: Annotated[
        list[str] | None,
        typer.Option(help="fp32, fp16 or int8; repeatable [default: fp32]."),
    ] = None,
    trt: Annotated[bool, typer.Option("--trt", help="--format engine.")] = False,
    half: Annotated[bool, typer.Option("--half", help="--precision fp16.")] = False,
    int8: Annotated[bool, typer.Option("--int8", help="--precision int8.")] = False,
    batch: Annotated[
        str | None,
        typer.Option(
            metavar="MIN:OPT:MAX",
            help="Batch sizes of an engine [default: 1:8:32].",
            rich_help_panel=_ENGINES,
        ),
    ] = None,
    static: Annotated[
        int | None, typer.Option("--static", min=1, help="The only batch size [default: any].")
    ] = None,
    opset: Annotated[int | None, typer.Option(help="Of ONNX, 18 to 23 [default: 20].")] = None,
    uint8_input: Annotated[
        bool, typer.Option("--uint8-input", help="Take bytes from 0 to 255 as pixels.")
    ] = False,
    calibration_method: Annotated[
        str,
        typer.Option(metavar="NAME", help="minmax, entropy or percentile.", rich_help_panel=_INT8),
    ] = "minmax",
    calibration_images: Annotated[
        str,
        typer.Option(
            metavar="KIND",
            help="clean, adversarial, mixed, or auto: measure it.",
            rich_help_panel=_INT8,
        ),
    ] = "auto",
    calibration_samples: Annotated[
        int,
        typer.Option(
            min=1, help="Training images that int8 is calibrated with.", rich_help_panel=_INT8
        ),
    ] = 512,
    keep_float: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="N",
            help="Layers to leave out of int8 in any case.",
            rich_help_panel=_INT8,
        ),
    ] = 0,
    max_robust_drop: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            help="Of accuracy under attack; one point is 0.01. Exceeded: exit 3.",
            rich_help_panel=_PROOF,
        ),
    ] = 0.01,
    max_clean_drop: Annotated[
        float,
        typer.Option(min=0, max=1, help="Of clean accuracy, likewise.", rich_help_panel=_PROOF),
    ] = 0.02,
    samples: Annotated[
        int,
        typer.Option(
            min=100, help="Held-out images on which files are compared.", rich_help_panel=_PROOF
        ),
    ] = 500,
    qat: Annotated[
        int,
        typer.Option(
            "--qat",
            min=0,
            metavar="EPOCHS",
            help="Fine-tune the rounded network so long; int8.",
            rich_help_panel=_INT8,
        ),
    ] = 0,
    workspace_mib: Annotated[
        int,
        typer.Option(
            min=1, help="Memory that one layer of an engine may use.", rich_help_panel=_ENGINES
        ),
    ] = 1024,
    optimization_level: Annotated[
        int,
        typer.Option(
            min=0,
            max=5,
            help="Of an engine: 0 builds fast, 5 searches long.",
            rich_help_panel=_ENGINES,
        ),
    ] = 3,
    tf32: Annotated[
        bool,
        typer.Option(
            "--tf32",
            help="Engines may shorten float32 factors to 10 bits.",
            rich_help_panel=_ENGINES,
        ),
    ] = False,
    version_compatible: Annotated[
        bool,
        typer.Option(
            "--version-compatible",
            help="Engines also for later TensorRT.",
            rich_help_panel=_ENGINES,
        ),
    ] = False,
    hardware_compatible: Annotated[
        bool,
        typer.Option(
            "--hardware-compatible",
            help="Engines for every GPU since Ampere.",
            rich_help_panel=_ENGINES,
        ),
    ] = False,
    compute_capability: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SM89",
            help="TensorRT-RTX: a GPU to build for; repeatable.",
            rich_help_panel=_ENGINES,
        ),
    ] = None,
    timing_cache: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="TensorRT: makes the next build fast.", rich_help_panel=_ENGINES
        ),
    ] = None,
    bundle: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Write all of it as a folder that proves itself again.",
            rich_help_panel=_BUNDLE,
        ),
    ] = None,
    signing_key: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Sign the bundle with this key, in PEM.", rich_help_panel=_BUNDLE
        ),
    ] = None,
    data: MovedDataOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be written, and write nothing.")
    ] = False,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write the network of a run as ONNX or TensorRT, and prove that each file is as robust.

    Every file is compared with the network on clean and on attacked images, and lossy ones are
    attacked themselves. For example in half the bytes, in a quarter, as an engine, to be sent:

    `robust-compress export runs/mine --half`

    `robust-compress export runs/mine --int8 --max-robust-drop 0.01`

    `robust-compress export runs/mine --trt --precision fp16`

    `robust-compress export runs/mine --int8 --bundle mine-bundle`
    """
    from dataclasses import replace

    from cli.bundle import bundled, check_bundle_options
    from cli.export_display import print_plan
    from cli.export_options import (
        check_timing_cache,
        parse_formats,
        parse_int8,
        parse_opset,
        parse_precisions,
        parse_sizes,
        refuse_idle_engine_options,
        refuse_idle_int8,
    )
    from cli.exporting import export_engines, run_export
    from compressor.device.build_options import BuildOptions
    from compressor.device.kit_files import DeviceError
    from compressor.errors import UsageError
    from compressor.performance import resolve_performance
    from compressor.performance_settings import PerformanceSettings
    from compressor.run_directory import RunDirectory
    from exporters.budget import Budget
    from exporters.request import ExportRequest
    from exporters.workflow import as_table

    output = Output(as_json=as_json)
    settings = PerformanceSettings(num_threads=threads, device="cpu")
    resolve_performance(settings)
    request = ExportRequest(
        run=RunDirectory.open(run_path),
        settings=settings,
        data_source=data,
        precisions=parse_precisions(precision, half=half, int8=int8 or qat > 0),
        takes_bytes=uint8_input,
        static_batch=static,
        opset=parse_opset(opset),
        int8=parse_int8(
            calibration_method,
            calibration_images,
            num_images=calibration_samples,
            min_kept=keep_float,
        ),
        budget=Budget(max_clean_drop=max_clean_drop, max_robust_drop=max_robust_drop),
        num_images=samples,
    )
    refuse_idle_int8(request, fine_tunes=qat > 0)
    wanted = parse_formats([*(formats or []), *(["engine"] if trt else [])])
    check_timing_cache(timing_cache)
    try:
        options = BuildOptions(
            batch=parse_sizes(batch, static),
            workspace_mib=workspace_mib,
            optimization_level=optimization_level,
            tf32=tf32,
            version_compatible=version_compatible,
            hardware_compatible=hardware_compatible,
            compute_capabilities=tuple(compute_capability or ()),
        )
    except DeviceError as error:
        raise UsageError(str(error)) from None
    refuse_idle_engine_options(
        replace(options, batch=None) if static else options,  # which is of the file
        timing_cache=timing_cache,
        builds="engine" in wanted,
        bundles=bundle is not None,
    )
    check_bundle_options(bundle, signing_key, run=request.run)
    if dry_run:
        print_plan(request, wanted, output, fine_tunes=qat > 0, bundle=bundle)
        return
    prepared, made = run_export(request, output, qat_epochs=qat)
    result: dict[str, Any] = {"files": [as_table(e) | {"path": str(e.path)} for e in made]}
    with bundled(
        prepared, made, options, output, result=result, folder=bundle, signing_key=signing_key
    ):
        if "engine" in wanted:
            result |= export_engines(prepared, made, options, output, timing_cache=timing_cache)
    output.result(result)
    output.next_command(f"robust-compress verify {shlex.quote(str(made[-1].path))}")
