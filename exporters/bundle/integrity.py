"""Is a folder exactly what a manifest names? Every file is hashed and none is opened otherwise."""

import json
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import file_digest
from pathlib import Path, PurePosixPath

from compressor.device.kit_files import KIT_FILE, DeviceError, read_kit, read_limited
from compressor.errors import RunError
from exporters.bundle.found_reports import MAX_REPORT_BYTES, parse_gate, parse_report
from exporters.bundle.manifest import (
    KIT_FOLDER,
    MANIFEST_FILE,
    SIGNATURE_FILE,
    BundledGate,
    BundledReport,
    BundleManifest,
    FileFacts,
    printable,
)

_MAX_ENTRIES = 10_000
"""A bundle has a few dozen files."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What is wrong with one file of a bundle."""

    file: str
    """Its path in the bundle, without characters that steer a terminal."""
    problem: str

    def __str__(self) -> str:
        return f"{self.file}: {self.problem}"


def find_problems(folder: Path, manifest: BundleManifest) -> list[Problem]:
    """Every file that is changed, missing, extra or no plain file; then every contradiction.

    Args:
        folder: the bundle.
        manifest: of this bundle.
    """
    problems = list(_differences(folder, manifest.files))
    if not problems:
        problems = [*_contradictions_of_kit(folder, manifest), *_contradictions(folder, manifest)]
    return [Problem(file=printable(file), problem=problem) for file, problem in problems]


def _differences(folder: Path, files: Mapping[str, FileFacts]) -> Iterator[tuple[str, str]]:
    wanted_folders = {str(parent) for name in files for parent in PurePosixPath(name).parents}
    found: set[str] = set()
    for place, (name, details) in enumerate(_entries(folder, "", wanted_folders)):
        if place >= _MAX_ENTRIES:
            yield name, f"one of more than {_MAX_ENTRIES:,} files, so the rest was not looked at"
            return
        found.add(name)
        if strange := _strange_kind(details.st_mode):
            yield name, strange
        elif name in files:
            yield from _change(folder, name, files[name], num_bytes=details.st_size)
        elif name not in {MANIFEST_FILE, SIGNATURE_FILE}:
            yield name, "is not in the manifest"
    for name in sorted(files.keys() - found):
        yield name, "is missing"


def _strange_kind(mode: int) -> str | None:
    if stat.S_ISLNK(mode):
        return "is a link, which a bundle never holds"
    if stat.S_ISDIR(mode):
        return "is a folder that the manifest does not name"
    return None if stat.S_ISREG(mode) else "is no plain file"


def _entries(
    folder: Path, prefix: str, wanted_folders: set[str]
) -> Iterator[tuple[str, os.stat_result]]:
    """Path and state of all that is there, in order; wanted folders are entered, not named."""
    for entry in sorted(os.scandir(folder / prefix), key=lambda entry: entry.name):
        name, details = f"{prefix}{entry.name}", entry.stat(follow_symlinks=False)
        if stat.S_ISDIR(details.st_mode) and name in wanted_folders:
            yield from _entries(folder, f"{name}/", wanted_folders)
        else:
            yield name, details


def _change(
    folder: Path, name: str, wanted: FileFacts, *, num_bytes: int
) -> Iterator[tuple[str, str]]:
    if num_bytes != wanted.num_bytes:
        yield name, f"was changed: it has {num_bytes:,} bytes, not {wanted.num_bytes:,}"
        return
    try:
        with (folder / name).open("rb") as file:
            sha256 = file_digest(file, "sha256").hexdigest()
    except OSError as error:
        yield name, f"cannot be read: {error.strerror}"
        return
    if sha256 != wanted.sha256:
        yield name, f"was changed: its sha256 is {sha256[:16]}..., not {wanted.sha256[:16]}..."


def _contradictions_of_kit(folder: Path, manifest: BundleManifest) -> Iterator[tuple[str, str]]:
    """The kit has hashes of its own, which the device goes by."""
    name = f"{KIT_FOLDER}/{KIT_FILE}"
    try:
        kit = read_kit(folder / KIT_FOLDER, sha256=manifest.files[name].sha256)
        table = json.loads(read_limited(folder / name, max_bytes=manifest.files[name].num_bytes))
    except DeviceError as error:
        yield name, printable(str(error))
        return
    named = {(f"{KIT_FOLDER}/{e.file}", e.sha256, e.precision) for e in kit.entries}
    if named != {(row.file, row.sha256, row.variant) for row in manifest.models}:
        yield name, "names other models than the manifest"
    if table.get("class_names") != list(manifest.class_names):
        yield name, "names other classes than the manifest"
    if table.get("threat") != str(manifest.threat):
        yield name, "names another threat model than the manifest"
    for file, sha256 in kit.sha256_of_file.items():
        facts = manifest.files.get(f"{KIT_FOLDER}/{file}")
        if facts is None or facts.sha256 != sha256:
            yield name, f"gives another hash of {file} than the manifest"


def _contradictions(folder: Path, manifest: BundleManifest) -> Iterator[tuple[str, str]]:
    """The manifest says in short what the reports say at length."""
    for report_row in manifest.reports:
        try:
            report = parse_report(_content(folder, report_row.file))
        except (DeviceError, RunError) as error:
            yield report_row.file, printable(str(error))
            continue
        if BundledReport.of(report, file=report_row.file) != report_row:
            yield report_row.file, "says something else than the manifest says that it says"
    for gate_row in manifest.gate or ():
        try:
            result = parse_gate(_content(folder, gate_row.file))
        except (DeviceError, RunError) as error:
            yield gate_row.file, printable(str(error))
            continue
        if BundledGate.of(result, file=gate_row.file) != gate_row:
            yield gate_row.file, "says something else than the manifest says that it says"


def _content(folder: Path, name: str) -> bytes:
    return read_limited(folder / name, max_bytes=MAX_REPORT_BYTES)
