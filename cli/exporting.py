"""Run an export with a live display, and say what it made."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.export_display import print_files, print_worth
from cli.output import Output
from compressor.errors import InterruptedRunError, MissingDependencyError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.status import Status
    from torch import Tensor

    from compressor.device.build_options import BuildOptions
    from compressor.performance_settings import PerformanceSettings
    from compressor.run_directory import RunDirectory
    from exporters.exported_model import ExportedModel
    from exporters.int8.workflow import FineTune
    from exporters.request import ExportRequest, Prepared


def export_fp32(
    run: "RunDirectory", *, settings: "PerformanceSettings", output: Output
) -> dict[str, Any]:
    """The file that every run gets: ONNX in float32."""
    from exporters.request import ExportRequest
    from exporters.workflow import as_table

    _, (exported,) = run_export(ExportRequest(run=run, settings=settings), output)
    return as_table(exported) | {"path": str(exported.path)}


def run_export(
    request: "ExportRequest", output: Output, *, qat_epochs: int = 0
) -> "tuple[Prepared, list[ExportedModel]]":
    """Export with a line about what is being done, and print what was shown."""
    from exporters.workflow import export_run
    from exporters.worth import worth_of

    status = output.console.status("")
    fine_tune = _fine_tune(request, qat_epochs, output, status) if qat_epochs else None

    def tell(text: str) -> None:
        status.update(text)
        output.say(f"... {text}")

    with status:
        prepared, made = export_run(request, fine_tune=fine_tune, tell=tell)
    print_files(made, output)
    if prepared.held_out.num_images < request.num_images:
        output.say(
            f"The run holds out {prepared.data.validation.num_images} images; half of them judge, "
            "half choose."
        )
    if len(made) > 1:
        print_worth(worth_of(prepared, made), output)
    return prepared, made


def export_engines(
    prepared: "Prepared",
    made: "list[ExportedModel]",
    options: "BuildOptions",
    output: Output,
    *,
    timing_cache: "Path | None" = None,
) -> dict[str, Any]:
    """A build kit always, and engines where TensorRT is; print what was shown.

    Raises:
        MissingDependencyError: if TensorRT is not here; the kit is written.
        InterruptedRunError: after Ctrl-C; the engines before it are written.
    """
    from cli.build_display import build_display
    from exporters.engine.to_tensorrt import import_tensorrt
    from exporters.engine.workflow import export_engine, export_kit

    wanted = [e for e in made if e.precision in prepared.request.precisions]
    kit = export_kit(prepared, wanted, options=options)
    output.title(f"Build kit: {kit}")
    output.say("  Copy it to the device: python3 build_engine.py builds there, replay.py proves.")
    try:
        tensorrt = import_tensorrt()
    except MissingDependencyError as error:
        raise MissingDependencyError(f"{error}\nThe build kit {kit} is complete") from None
    output.say(f"Building with {tensorrt}")
    rows = []
    for exported in wanted:
        try:
            with build_display(output) as observe:
                built = export_engine(
                    prepared,
                    exported,
                    options=options,
                    tensorrt=tensorrt,
                    timing_cache=timing_cache,
                    observe=observe,
                )
        except KeyboardInterrupt:
            raise InterruptedRunError(
                f"interrupted; the engine of {exported.path.name} is not written. Verified files "
                "and the build kit stay"
            ) from None
        facts = built.facts
        output.say(
            f"{facts.path}: {facts.num_bytes:,} bytes in {facts.build_seconds:.1f} s, "
            f"{built.status.upper()}: {built.reason}"
        )
        for warning in facts.warnings:
            output.say(f"  TensorRT: {warning}")
        rows.append(asdict(built) | {"path": str(facts.path)})
    return {"build_kit": str(kit), "engines": rows}


def _fine_tune(
    request: "ExportRequest", epochs: int, output: Output, status: "Status"
) -> "FineTune":
    """The fine-tuning, with the live display of a training in place of `status`."""
    from cli.progress import training_display
    from compressor.interruption import stop_wish
    from compressor.quantization_workflow import FineTuningRequest, fine_tune

    asked = FineTuningRequest(
        run=request.run,
        epochs=epochs,
        settings=request.settings,
        data_source=request.data_source,
        resume_command="the same command again",
    )

    def run(
        float32: "Path", int8: "Path", judging_N: "Tensor"
    ) -> "tuple[Mapping[str, Tensor], int]":
        status.stop()
        try:
            with stop_wish() as stop, training_display(output) as observe:
                return fine_tune(
                    asked,
                    float32=float32,
                    int8=int8,
                    judging_N=judging_N,
                    takes_bytes=request.takes_bytes,
                    observe=observe,
                    stop=stop,
                )
        finally:
            status.start()

    return run
