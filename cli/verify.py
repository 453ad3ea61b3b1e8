"""`robust-compress verify`: measure a trained network clean and under attack."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.options import DeviceOption, JsonOption, MovedDataOption, RunArgument, ThreadsOption
from cli.output import Output

if TYPE_CHECKING:
    from compressor.performance_settings import PerformanceSettings
    from compressor.report import RobustnessReport
    from compressor.run_directory import RunDirectory


def verify(
    run_path: RunArgument,
    samples: Annotated[
        int | None, typer.Option(min=1, help="A class-balanced part of the test images.")
    ] = None,
    data: MovedDataOption = None,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Attack a trained network on the test images and write report.json and report.md.

    Always float32, in eval mode, on images as they are.

    Example: `robust-compress verify runs/mine --samples 1000`
    """
    from cli.training import performance_settings
    from compressor.run_directory import RunDirectory

    output = Output(as_json=as_json)
    run = RunDirectory.open(run_path)
    settings = performance_settings(device=device, dtype="auto", num_threads=threads)
    output.result(
        run_verify(run, settings=settings, num_images=samples, data_source=data, output=output)
    )
    output.next_command(f"robust-compress export {run.path} --format onnx")


def run_verify(
    run: "RunDirectory",
    *,
    settings: "PerformanceSettings",
    num_images: int | None = None,
    data_source: str | None = None,
    output: Output,
) -> dict[str, Any]:
    """Verify with a progress display, print the tables, and return the report as plain values."""
    from cli.progress import verification_display
    from compressor.verification_workflow import verify_run

    with verification_display(output) as observe:
        report = verify_run(
            run,
            settings=settings,
            num_images=num_images,
            data_source=data_source,
            observe=observe,
        )
    _print_report(report, output)
    output.say(f"\nReport: {run.report_markdown(num_images)}")
    return report.model_dump(mode="json")


def _print_report(report: "RobustnessReport", output: Output) -> None:
    from compressor.report import percent
    from compressor.threat import format_pixels

    epsilon = format_pixels(report.epsilon_pixels)
    num_images = report.clean.num_total
    output.title(f"{report.name}: {report.norm} {epsilon}, n = {num_images} test images")
    rows = [("clean", report.clean, "")]
    for attack in report.attacks:
        rows.append((attack.name, attack.accuracy, f"{100 * attack.w_robust_fraction:.2f} %"))
    worst = 50 * (report.clean.fraction + report.worst_case.fraction)
    rows.append(("worst case", report.worst_case, f"{worst:.2f} %"))
    cells = [
        [name, percent(count), f"{100 * count.low_95:.1f} to {100 * count.high_95:.1f}", w_robust]
        for name, count, w_robust in rows
    ]
    output.table(("images", "accuracy", "95 % interval", "W-Robust"), cells)
    output.say(report.caveat)
    print_cost(report, output)


def print_cost(report: "RobustnessReport", output: Output) -> None:
    """What compression bought, as ratios to the student."""
    student = [row for row in report.cost if row.num_parameters is not None][-1]
    output.title("What compression bought (ratios to the student)")
    rows = [
        [
            row.name,
            _ratio(row.num_parameters, student.num_parameters),
            _ratio(row.num_multiply_adds, student.num_multiply_adds),
            _ratio(row.num_bytes, student.num_bytes),
            f"{row.latency_ms:.2f} ms",
            f"{row.latency_ms / student.latency_ms:.2f}x",
        ]
        for row in report.cost
    ]
    header = ("model", "parameters", "multiply-adds", "bytes", "latency", "")
    output.table(header, rows)


def _ratio(value: int | None, reference: int | None) -> str:
    if value is None or not reference:
        return "-"
    return f"{_short(value)} {value / reference:.2f}x"


def _short(value: int) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.2f}{unit}"
    return str(value)
