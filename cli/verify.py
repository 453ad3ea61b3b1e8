"""`robust-compress verify`: measure a model clean and under attack, and whether to believe it."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.options import (
    DeviceOption,
    JsonOption,
    ProcessesOption,
    ProviderOption,
    ThreadsOption,
)
from cli.output import Output
from cli.processes import run_in_processes
from compressor.errors import ExitCode, InterruptedRunError, UsageError

if TYPE_CHECKING:
    from compressor.reports.files import ReportFiles
    from compressor.reports.report import RobustnessReport
    from compressor.verification.request import VerificationRequest

EXIT_CODES = {
    "verified": ExitCode.DONE,
    "incomplete": ExitCode.INCONCLUSIVE,
    "unverified": ExitCode.INVALID,
    "invalid": ExitCode.INVALID,
}


def verify(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="A run, ARCH:WEIGHTS, WEIGHTS, FILE.onnx, FILE.engine, or a bundle.",
        ),
    ],
    source: Annotated[
        str | None,
        typer.Option(metavar="RUN", help="Of an ONNX file: what it was exported from."),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Where the test images lie, if the run does not say it.")
    ] = None,
    attacks: Annotated[
        str, typer.Option(metavar="NAMES", help="papers, autoattack, or names, with commas.")
    ] = "papers,autoattack",
    mode: Annotated[
        str, typer.Option(help="fast, or compat: the cascade as AutoAttack was released.")
    ] = "fast",
    epsilon: Annotated[
        str | None, typer.Option(help="Radius, such as 8/255 [default: of the run or file].")
    ] = None,
    norm: Annotated[
        str | None, typer.Option(help="linf or l2 [default: of the run or file].")
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(min=1, help="A random part of the images, classes in proportion."),
    ] = None,
    max_seconds: Annotated[
        float | None, typer.Option(min=1, help="Stop the attacks after this; exit code 6.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images of a chunk [default: 250 if they are small].")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the order and of the attacks.")] = 0,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Of the report [default: the run].")
    ] = None,
    device: DeviceOption = "auto",
    dtype: Annotated[
        str, typer.Option(help="Format of the search; float32 decides: auto, float32, bfloat16.")
    ] = "auto",
    manifest_sha256: Annotated[
        str | None, typer.Option(metavar="HASH", help="Of a bundle, or of an engine's sidecar.")
    ] = None,
    public_key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="That must have signed a bundle; PEM.")
    ] = None,
    provider: ProviderOption = "cpu",
    threads: ThreadsOption = None,
    nproc: ProcessesOption = 1,
    as_json: JsonOption = False,
) -> None:
    """Attack a model on test images and write report.json, .md, .html and samples.csv.

    An image counts as robust only if it stands against every attack, and the result is invalid
    if the evaluation itself cannot be believed. Run it again after an interruption: it goes on.
    A bundle is not attacked: its files are hashed, and its golden images replayed.
    For example a run, a file of weights, and what was exported:

    `robust-compress verify runs/mine --samples 1000`

    `robust-compress verify resnet18:weights.safetensors --data imagefolder:DATA`

    `robust-compress verify runs/mine/exports/model.fp32.onnx --source runs/mine`

    `robust-compress verify BUNDLE --manifest-sha256 HASH`

    `robust-compress verify FILE.engine --manifest-sha256 HASH --data imagefolder:DATA`
    """
    if nproc > 1:
        raise typer.Exit(run_in_processes(nproc, num_restarts=0))
    from cli.bundle import is_bundle, verify_bundle_folder

    output = Output(as_json=as_json)
    if is_bundle(target):
        idle: dict[str, object] = {"--source": source, "--data": data, "--out": out}
        idle |= {"--epsilon": epsilon, "--norm": norm, "--samples": samples}
        idle |= {"--max-seconds": max_seconds, "--batch-size": batch_size}
        idle |= {"--provider": None if provider == "cpu" else provider}
        verify_bundle_folder(
            Path(target), output, manifest_sha256=manifest_sha256, public_key=public_key, idle=idle
        )
        return
    if public_key is not None:
        raise UsageError(f"--public-key is for bundles, and {target} is none")
    from cli.training import performance_settings
    from compressor.onnx_providers import PROVIDERS
    from compressor.verification.request import VerificationRequest

    request = VerificationRequest(
        target=target,
        settings=performance_settings(device=device, dtype=dtype, num_threads=threads),
        source=source,
        sidecar_sha256=manifest_sha256,
        provider=_choice("--provider", provider, PROVIDERS),
        data_source=data,
        attacks=tuple(name.strip() for name in attacks.split(",") if name.strip()),
        mode=_choice("--mode", mode, ("fast", "compat")),
        norm=None if norm is None else _choice("--norm", norm, ("linf", "l2")),
        epsilon_pixels=_radius(epsilon),
        num_images=samples,
        batch_size=batch_size,
        max_seconds=max_seconds,
        seed=seed,
        folder=out,
    )
    found = run_verify(request, output)
    if found is None:
        return
    report, files = found
    output.result(report.model_dump(mode="json"))
    output.next_command(_next(report, files, request))
    if report.status != "verified":
        raise typer.Exit(int(EXIT_CODES[report.status]))


def run_verify(
    request: "VerificationRequest", output: Output
) -> "tuple[RobustnessReport, ReportFiles] | None":
    """Verify with a live display and print the tables; None in all processes but the first.

    Raises:
        InterruptedRunError: after Ctrl-C.
    """
    from cli.verification_display import verification_display
    from compressor.verification_workflow import verify_together

    try:
        with verification_display(output) as observe:
            found = verify_together(request, observe=observe, tell=lambda text: _tell(text, output))
    except KeyboardInterrupt:
        raise InterruptedRunError(
            "interrupted; what is finished is kept: the same command goes on from there"
        ) from None
    if found is None:
        return None
    report, files = found
    _print_report(report, output)
    output.say(f"\nReport: {files.html}, {files.markdown.name}, {files.json.name}")
    output.say(f"Every image: {files.samples}")
    return report, files


def _tell(text: str, output: Output) -> None:
    output.say(f"... {text}")


def _choice(option: str, value: str, known: tuple[str, ...]) -> Any:  # noqa: ANN401 (a Literal)
    if value not in known:
        raise UsageError(f"{option} {value!r} is not one of {', '.join(known)}")
    return value


def _radius(text: str | None) -> float | None:
    from compressor.threat import parse_fraction

    if text is None:
        return None
    try:
        return parse_fraction(text)
    except ValueError as error:
        raise UsageError(f"--epsilon: {error}") from None


def _next(report: "RobustnessReport", files: "ReportFiles", request: "VerificationRequest") -> str:
    if report.status == "incomplete":
        return "the same command again"
    if report.status == "unverified":
        source = " --source RUN" if report.target.kind == "onnx" and not request.source else ""
        return f"robust-compress verify {shlex.quote(request.target)}{source}"
    if report.status == "invalid":
        return f"xdg-open {shlex.quote(str(files.html))}"
    return f"robust-compress gate {shlex.quote(str(files.json))} --policy gate.toml"


def _print_report(report: "RobustnessReport", output: Output) -> None:
    from compressor.reports.report import percent, w_robust_fraction
    from compressor.threat import ThreatModel

    threat = ThreatModel(norm=report.norm, epsilon_pixels=report.epsilon_pixels)
    output.title(f"{report.name}: {threat}, n = {report.clean.num_total} test images")
    is_believed = report.status in {"verified", "incomplete"}
    rows = [["clean", *_count_cells(report.clean), "", ""]]
    for attack in report.attacks:
        tried = f"{attack.num_broken} of {attack.num_tried}"
        own = attack.accuracy if is_believed else None
        shown = _count_cells(own) if own else ("", "")
        w_robust = f"{100 * w_robust_fraction(report.clean, own):.2f} %" if own else ""
        rows.append([attack.name, *shown, w_robust, tried])
    if report.worst_case is not None and is_believed:
        worst = f"{100 * w_robust_fraction(report.clean, report.worst_case):.2f} %"
        rows.append(["worst case", *_count_cells(report.worst_case), worst, ""])
    output.table(("images", "accuracy", "95 % interval", "W-Robust", "newly broken"), rows)
    if is_believed:
        output.say(f"Worst case: {report.protocol}. {report.caveat}")
    if report.artefact is not None:
        output.say(f"The file: {report.artefact.twin}; {report.artefact.masking}.")
    _print_validity(report, output)
    word = report.status.upper()
    if report.worst_case is not None and is_believed:
        word += f", {percent(report.worst_case)} of {report.worst_case.num_total} images stand"
    output.title(f"{word}: {report.status_reason}")
    if report.cost:
        print_cost(report, output)


def _count_cells(count: Any) -> tuple[str, str]:  # noqa: ANN401 (a Count; imported late)
    from compressor.reports.report import percent

    return percent(count), f"{100 * count.low_95:.1f} to {100 * count.high_95:.1f}"


def _print_validity(report: "RobustnessReport", output: Output) -> None:
    by_status = {
        status: [row for row in report.validity if row.status == status]
        for status in ("passed", "alarm", "not_run")
    }
    if not report.validity:
        return
    counts = f"{len(by_status['passed'])} passed, {len(by_status['alarm'])} alarms"
    output.say(f"Checks of the evaluation itself: {counts}, {len(by_status['not_run'])} not run")
    for row in by_status["alarm"]:
        output.say(f"  ALARM {row.name}: {row.found}; {row.threshold}. {row.advice}")
    output.not_run([(row.name, row.advice) for row in by_status["not_run"]])


def print_cost(report: "RobustnessReport", output: Output) -> None:
    """What compression bought, as ratios to the student."""
    networks = [row for row in report.cost if row.num_parameters is not None]
    if not networks:
        return
    student = networks[-1]
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
