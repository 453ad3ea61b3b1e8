"""Bundles: written at the end of `export --bundle`, proven again by `verify BUNDLE`."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from cli.output import Output
from compressor.errors import MissingDependencyError, UsageError

if TYPE_CHECKING:
    from compressor.device.build_options import BuildOptions
    from compressor.run_directory import RunDirectory
    from exporters.bundle.bundle import WrittenBundle
    from exporters.bundle.manifest import HopFacts
    from exporters.bundle.verification import BundleVerification, FileResult
    from exporters.exported_model import ExportedModel
    from exporters.request import Prepared

MAX_LISTED = 10
"""So many files that are not right are listed for people; the JSON has all."""


def is_bundle(target: str) -> bool:
    """Whether what the user named is a bundle, or was one before files were taken from it."""
    if not Path(target).is_dir():
        return False
    from exporters.bundle.verification import is_bundle as is_bundle_folder

    return is_bundle_folder(Path(target))


def check_bundle_options(
    folder: Path | None, signing_key: Path | None, *, run: "RunDirectory"
) -> None:
    """Refuse early what could not be written after minutes of work.

    Raises:
        UsageError: if a key is given for nothing.
        RobustCompressError: as `exporters.bundle.bundle.check_bundle_request`.
    """
    if folder is None and signing_key is not None:
        raise UsageError("--signing-key signs a bundle; add --bundle DIR, or leave it out")
    if folder is not None:
        from exporters.bundle.bundle import check_bundle_request

        check_bundle_request(folder, signing_key, run=run)


@contextmanager
def bundled(
    prepared: "Prepared",
    made: "Sequence[ExportedModel]",
    options: "BuildOptions",
    output: Output,
    *,
    result: dict[str, Any],
    folder: Path | None,
    signing_key: Path | None,
) -> Iterator[None]:
    """Write the bundle when the block ends, also if TensorRT was missing in it.

    Args:
        prepared: of the export.
        made: all files that were made; those asked for go into the bundle.
        options: how the device builds engines.
        output: where to say what was written.
        result: the JSON of the command, with the engines once the block ends; gets the bundle.
        folder: of the bundle; None: nothing is written.
        signing_key: None: it is not signed.
    """
    wanted = [e for e in made if e.precision in prepared.request.precisions]

    def write(target: Path) -> None:
        from exporters.bundle.bundle import write_bundle

        written = write_bundle(
            prepared,
            wanted,
            target,
            options=options,
            engines=[Path(row["path"]) for row in result.get("engines", ())],
            signing_key=signing_key,
        )
        result["bundle"] = _written_table(written)
        _print_written(written, output)

    try:
        yield
    except MissingDependencyError as error:
        if folder is None:
            raise
        write(folder)
        raise MissingDependencyError(
            f"{error}\nThe bundle {folder} is complete, without engines"
        ) from None
    if folder is not None:
        write(folder)


def _written_table(written: "WrittenBundle") -> dict[str, Any]:
    facts = written.manifest
    return {
        "path": str(written.folder),
        "manifest_sha256": written.manifest_sha256,
        "num_bytes": written.num_bytes,
        "is_signed": written.is_signed,
        "reports": [row.file for row in facts.reports],
        "gate": None if facts.gate is None else [row.file for row in facts.gate],
        "unreadable_reports": [str(path) for path, _ in written.unreadable],
    }


def _print_written(written: "WrittenBundle", output: Output) -> None:
    signed = "signed" if written.is_signed else "not signed"
    output.title(f"Bundle: {written.folder}, {written.num_bytes:,} bytes, {signed}")
    for line in _claims(written.manifest.reports, written.manifest.gate):
        output.say(f"  {line}")
    for path, why in written.unreadable:
        output.say(f"  left out: {path}: {why}")
    output.say("Its hash, to be kept apart from it:")
    command = f"robust-compress verify {shlex.quote(str(written.folder))} --manifest-sha256"
    output.console.print(  # to be copied in one piece, however narrow the terminal
        f"  {command} {written.manifest_sha256}", markup=False, soft_wrap=True
    )


def verify_bundle_folder(
    folder: Path,
    output: Output,
    *,
    manifest_sha256: str | None = None,
    public_key: Path | None = None,
    idle: Mapping[str, object],
) -> None:
    """Verify a bundle and end with the code of its verdict.

    Args:
        folder: the bundle.
        output: where to say it.
        manifest_sha256: what the hash of the manifest must be.
        public_key: a PEM file whose private half must have signed the manifest.
        idle: options that mean nothing here, None where they were not given.

    Raises:
        UsageError: if such an option was given, for whoever gave it expected an effect.
        RobustCompressError: as `exporters.bundle.verification.open_bundle`.
        typer.Exit: 5 if anything is wrong, 4 if an ONNX file could not be replayed.
    """
    from exporters.bundle.verification import open_bundle, verify_bundle

    given = [name for name, value in idle.items() if value is not None]
    if given:
        raise UsageError(
            f"{', '.join(given)} would have no effect: {folder} is a bundle, whose golden images "
            "are replayed; attack the run, or one of its files"
        )
    bundle = open_bundle(folder, manifest_sha256=manifest_sha256, public_key=public_key)
    shown = verify_bundle(bundle, tell=lambda text: output.say(f"... {text}"))
    output.result(_table(shown))
    _print(shown, output)
    if shown.exit_code:
        raise typer.Exit(int(shown.exit_code))


def _print(shown: "BundleVerification", output: Output) -> None:
    bundle = shown.bundle
    if shown.problems:
        _print_problems(shown, output)
        return
    output.title(f"{bundle.folder}: {len(bundle.manifest.files)} files as the manifest names them")
    for result in shown.files:
        for line in _result_lines(result):
            output.say(line)
    output.title("What the manifest says, measured before and not here")
    for model in bundle.manifest.models:
        output.say(f"  {model.file}: {_hop(model.hop)}")
    for line in _claims(bundle.manifest.reports, bundle.manifest.gate):
        output.say(f"  {line}")
    output.title(f"{shown.verdict}; {bundle.authentication}")
    if shown.status == "PASS":
        output.next_command(f"scp -r {shlex.quote(str(bundle.folder / 'kit'))} DEVICE:")


def _hop(hop: "HopFacts") -> str:
    drop, num_total = hop.robust_drop, hop.robust.num_total
    return (
        f"{hop.status}; drop against the network under the short attack of the export "
        f"{100 * drop.fraction:.1f} points ({100 * drop.low_95:.1f} to {100 * drop.high_95:.1f}), "
        f"n = {num_total} held-out images"
    )


def _print_problems(shown: "BundleVerification", output: Output) -> None:
    bundle, problems = shown.bundle, shown.problems
    output.title(f"{bundle.folder} is not what its manifest names; nothing was run")
    for problem in problems[:MAX_LISTED]:
        output.say(f"  {problem}")
    if len(problems) > MAX_LISTED:
        output.say(f"  and {len(problems) - MAX_LISTED} more; --json lists all")
    if any(problem.file.startswith("kit/") for problem in problems):
        output.say("Run the scripts of kit/ in a copy: what they write is not in the manifest.")
    output.title(f"FAIL, do not deploy it but copy it again; {bundle.authentication}")


def _result_lines(result: "FileResult") -> list[str]:
    name = result.file if result.kind != "rebuilt engine" else f"{result.file} built anew here"
    return [
        f"{result.status}  {name}: {result.reason}",
        *(f"  {kind} images: {shown}" for kind, shown in result.agreements.items()),
        *(f"  {line}" for line in result.lines),
    ]


def _claims(reports: Sequence[Any], gate: Sequence[Any] | None) -> list[str]:
    from exporters.bundle.found_reports import summaries

    return summaries(reports, gate or ())


def _table(shown: "BundleVerification") -> dict[str, Any]:
    bundle = shown.bundle
    return {
        "bundle": str(bundle.folder),
        "verdict": shown.verdict,
        "status": shown.status,
        "exit_code": int(shown.exit_code),
        "manifest_sha256": bundle.manifest_sha256,
        "authenticated_by": list(bundle.anchors),
        "authentication": bundle.authentication,
        "problems": [asdict(problem) for problem in shown.problems],
        "files": [_row(result) for result in shown.files],
        "claims": bundle.manifest.model_dump(mode="json", exclude={"files"}),
    }


def _row(result: "FileResult") -> dict[str, Any]:
    table = asdict(result)
    for agreement in table["agreements"].values():
        if not isfinite(agreement["relative_error"]):  # which JSON cannot say
            agreement["relative_error"] = None
    return table
