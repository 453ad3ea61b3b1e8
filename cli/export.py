"""`robust-compress export`: a file that is shown to be the same model."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.options import JsonOption, MovedDataOption, RunArgument
from cli.output import Output
from compressor.errors import UsageError

if TYPE_CHECKING:
    from compressor.performance_settings import PerformanceSettings
    from compressor.run_directory import RunDirectory


def export(
    run_path: RunArgument,
    file_format: Annotated[str, typer.Option("--format", help="onnx.")] = "onnx",
    data: MovedDataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write the selected network as fp32 ONNX and compare the file's answers with it.

    Example: `robust-compress export runs/mine --format onnx`
    """
    from compressor.performance_settings import PerformanceSettings
    from compressor.run_directory import RunDirectory

    if file_format != "onnx":
        raise UsageError(f"--format {file_format!r} is not known; use onnx")
    output = Output(as_json=as_json)
    run = RunDirectory.open(run_path)
    output.result(run_export(run, settings=PerformanceSettings(), data_source=data, output=output))
    output.next_command(f"robust-compress verify {run.path}")


def run_export(
    run: "RunDirectory",
    *,
    settings: "PerformanceSettings",
    data_source: str | None = None,
    output: Output,
) -> dict[str, Any]:
    """Export, print what was shown, and return it as plain values."""
    import dataclasses

    from exporters.workflow import export_run

    with output.console.status("Writing ONNX and comparing its answers"):
        exported = export_run(run, settings=settings, data_source=data_source)
    shown = exported.verification
    output.title(f"{exported.path}: {exported.num_bytes:,} bytes, {shown.status}")
    output.say(f"  input: {exported.input_name}, {exported.input_contract}")
    output.say(f"  same label on clean held-out images: {shown.clean_agreement}")
    output.say(f"  same label on adversarial images:    {shown.adversarial_agreement}")
    output.say(f"  {shown.reason}")
    return dataclasses.asdict(exported) | {"path": str(exported.path)}
