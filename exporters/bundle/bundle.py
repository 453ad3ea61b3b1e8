"""write_bundle: exported files with all that proves them, in one folder that can be sent.

A bundle on disk::

    manifest.json  manifest.sig  README.md
    kit/         the build kit: ONNX files, golden images, scripts for the device
    engines/     TensorRT engines and their sidecars, if some were built
    reports/     what `verify` and `gate` said about the student and these files

The same inputs give the same bytes.
"""

import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from compressor import __version__
from compressor.device.build_options import BuildOptions
from compressor.device.kit_files import DeviceError, read_limited, sha256_of
from compressor.environment import package_versions
from compressor.errors import RobustCompressError
from compressor.run_directory import (
    RunDirectory,
    folder_written_atomically,
    read_facts,
    write_bytes_atomically,
)
from exporters.bundle.found_reports import FoundReports, find_reports
from exporters.bundle.manifest import (
    KIT_FOLDER,
    MANIFEST_FILE,
    MAX_MANIFEST_BYTES,
    SIGNATURE_FILE,
    BundleError,
    BundleManifest,
    FileFacts,
    SplitFacts,
    ThreatFacts,
    parse_manifest,
)
from exporters.bundle.rows import engine_rows, model_row, refuse_stale, refuse_unproven
from exporters.bundle.signature import load_private_key, sign
from exporters.engine.workflow import export_kit
from exporters.exported_model import ExportedModel
from exporters.request import Prepared

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec

_PACKAGES = ("torch", "onnx", "onnxruntime", "onnxscript", "numpy")
_README = """\
# Bundle

Classifiers that were shown to be as robust as the network they were made from, with what is needed
to prove it again: {classes} classes, attacker {threat}.

| folder | what is in it |
| --- | --- |
| `kit/` | ONNX files, golden images with the answers that must come back, scripts for the device |
| `engines/` | TensorRT engines, if some were built; each fits one version and one kind of GPU |
| `reports/` | what was measured under attack, image by image, if somebody did |
| `manifest.json` | the SHA-256 of every file, and what was shown about each |

Check the bundle, offline, where robust-compress is installed. Take the hash of the manifest from
where you trust it, not from here:

    robust-compress verify . --manifest-sha256 HASH

or, if it is signed (the format is that of OpenSSF Model Signing), `--public-key key.pub.pem`.

On the device nothing of robust-compress is needed; `kit/README.md` says what is. Work on a copy,
because what the scripts write is not in the manifest. Build engines there, and replay:

    cp -r kit ~/kit && cd ~/kit
    python3 build_engine.py
    python3 replay.py
"""


@dataclass(frozen=True, kw_only=True)
class WrittenBundle:
    """A bundle, and what to say about it."""

    folder: Path
    manifest: BundleManifest
    manifest_sha256: str
    """Whoever gets this another way than the bundle can tell that the bundle is the right one."""
    num_bytes: int
    is_signed: bool
    unreadable: tuple[tuple[Path, str], ...]
    """Files that are named like a report and could not be taken along, and why."""


def check_bundle_request(folder: Path, signing_key: Path | None, *, run: RunDirectory) -> None:
    """Refuse early what `write_bundle` would refuse after the work is done.

    Raises:
        BundleError: if the folder holds something else than a bundle or cannot be made, or the key
            is of no use.
        MissingDependencyError: if signing needs a package that is not here.
    """
    if Path.cwd().is_relative_to(folder.resolve()):
        raise BundleError(
            f"{folder} is where you are, and would be replaced; choose another folder"
        )
    if folder.resolve().is_relative_to(run.exports.resolve()):
        raise BundleError(
            f"{folder} lies among the files of {run.path} that go into it; choose another folder"
        )
    is_empty = folder.is_dir() and not any(folder.iterdir())
    if folder.is_symlink() or (folder.exists() and not is_empty):
        _refuse_what_is_no_bundle(folder)
    there = next(path for path in folder.absolute().parents if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise BundleError(f"{there} cannot be written to; choose another folder for the bundle")
    if signing_key is not None:
        load_private_key(signing_key)
        if signing_key.resolve().is_relative_to(folder.resolve()):
            raise BundleError(
                f"the key {signing_key} lies in {folder}, which is replaced; move it elsewhere"
            )


def write_bundle(
    prepared: Prepared,
    made: Sequence[ExportedModel],
    folder: Path,
    *,
    options: BuildOptions,
    engines: Sequence[Path] = (),
    signing_key: Path | None = None,
) -> WrittenBundle:
    """Write a bundle as a whole or not at all.

    Args:
        prepared: the run and its golden images.
        made: the verified files, each of another variant.
        folder: is made, or replaced if it is a bundle.
        options: how the device builds engines.
        engines: built of these files, each with its sidecar beside it.
        signing_key: a PEM file; it is read, never copied.

    Raises:
        BundleError: if the folder, an engine or the key is not as it must be.
        ExportError: if a file cannot go into a kit.
        ArtefactMismatchError: if a file does not answer its golden images, or was made of other
            weights than the run holds now.
        MissingDependencyError: if signing needs a package that is not here.
    """
    check_bundle_request(folder, signing_key, run=prepared.request.run)
    key = None if signing_key is None else load_private_key(signing_key)
    refuse_stale(prepared, made)
    refuse_unproven(made)
    with folder_written_atomically(folder) as new:
        try:
            export_kit(prepared, made, options=options, folder=new / KIT_FOLDER)
            manifest, content, found = _fill(new, prepared, made, engines=engines, key=key)
        except ValidationError as error:  # such as a class name that steers a terminal
            first = error.errors()[0]
            raise BundleError(f"{first['loc']} cannot be in a bundle: {first['msg']}") from None
    sizes = [facts.num_bytes for facts in manifest.files.values()]
    return WrittenBundle(
        folder=folder,
        manifest=manifest,
        manifest_sha256=sha256_of(content),
        num_bytes=sum(sizes) + len(content),
        is_signed=key is not None,
        unreadable=found.unreadable,
    )


def _fill(
    new: Path,
    prepared: Prepared,
    made: Sequence[ExportedModel],
    *,
    engines: Sequence[Path],
    key: "ec.EllipticCurvePrivateKey | None",
) -> tuple[BundleManifest, bytes, FoundReports]:
    """Add to the kit all that is not in it, the manifest last."""
    models = tuple(model_row(exported) for exported in made)
    rows, contents = engine_rows(engines, models)
    names = {prepared.source_sha256: "student"}
    names |= {row.sha256: Path(row.file).stem for row in models}
    names |= {row.sha256: Path(row.file).name for row in rows}
    found = find_reports(prepared.request.run, names)
    threat = ThreatFacts(norm=prepared.threat.norm, epsilon_pixels=prepared.threat.epsilon_pixels)
    text = _README.format(classes=len(prepared.class_names), threat=threat)
    for name, content in {**contents, **found.contents, "README.md": text.encode()}.items():
        write_bytes_atomically(new / name, content)
    manifest = BundleManifest(
        versions=_versions(),
        class_names=prepared.class_names,
        threat=threat,
        recipe_id=prepared.recipe.recipe_id,
        source_sha256=prepared.source_sha256,
        split=_split(prepared),
        models=models,
        engines=rows,
        reports=found.reports,
        gate=found.gates or None,
        files=dict(_files(new)),
    )
    content = manifest.to_json()
    write_bytes_atomically(new / MANIFEST_FILE, content)
    if key is not None:
        write_bytes_atomically(new / SIGNATURE_FILE, sign(content, key))
    return manifest, content, found


def _split(prepared: Prepared) -> SplitFacts:
    facts = read_facts(prepared.request.run)
    return SplitFacts(
        training_content_sha256=facts["training_content_sha256"],
        validation_index_sha256=facts["validation_index_sha256"],
        num_validation=facts["num_validation"],
    )


def _versions() -> dict[str, str]:
    own = {"robust-compress": __version__, "python": platform.python_version()}
    return own | package_versions(_PACKAGES)


def _files(folder: Path) -> Iterator[tuple[str, FileFacts]]:
    """Everything that is there before the manifest is."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            content = path.read_bytes()
            facts = FileFacts(sha256=sha256_of(content), num_bytes=len(content))
            yield path.relative_to(folder).as_posix(), facts


def _refuse_what_is_no_bundle(folder: Path) -> None:
    """Writing replaces the folder with all that is in it."""
    try:
        if folder.is_symlink():
            raise BundleError("a link")
        parse_manifest(read_limited(folder / MANIFEST_FILE, max_bytes=MAX_MANIFEST_BYTES))
    except (DeviceError, RobustCompressError):
        raise BundleError(
            f"{folder} exists and is no bundle, which alone would be replaced; choose another "
            "folder"
        ) from None
