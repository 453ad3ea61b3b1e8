"""Read a build kit and check its files; standard library only, Python 3.10 or later.

A kit is a folder with `kit.json`, ONNX files, `golden.npz`, a copy of this package, and two scripts
that call it.
"""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KIT_FILE = "kit.json"
GOLDEN_FILE = "golden.npz"
CODE_FOLDER = "device"
"""A copy of this package."""
MAX_MODEL_BYTES = 1 << 30
"""TensorRT reads protobuf messages of less than 2 GiB, and classifiers are far smaller."""
_MAX_JSON_BYTES = 1 << 20
MODEL_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,100}\.onnx")
_FILE_NAME = re.compile(rf"({CODE_FOLDER}/)?[A-Za-z0-9_][A-Za-z0-9._-]{{0,127}}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class DeviceError(Exception):
    """Something is wrong, said for people; `exit_code` is what a script ends with."""

    exit_code = 4


class MissingPackageError(DeviceError):
    """TensorRT, ONNX Runtime, the CUDA runtime, or a GPU is not here."""


class MismatchError(DeviceError):
    """A file is not the one that was meant."""

    exit_code = 5


@dataclass(frozen=True, kw_only=True)
class KitEntry:
    """One ONNX file of a kit, and how closely an engine made of it must answer."""

    file: str
    sha256: str
    precision: str
    """fp32, fp16, int8, or one of these with a suffix after a hyphen."""
    tolerance: float
    """Largest root mean square error of the logits, relative to the size of the logits."""
    min_agreement: float
    """Smallest fraction of golden images that get the same label."""

    @property
    def engine_file(self) -> str:
        """The engine made of this file."""
        return f"{self.file.removesuffix('.onnx')}.engine"


@dataclass(frozen=True, kw_only=True)
class Kit:
    """A folder whose `kit.json` was read; the other files are checked when they are used."""

    folder: Path
    entries: tuple[KitEntry, ...]
    build_options: Mapping[str, Any]
    sha256_of_file: Mapping[str, str]

    def entry(self, name: str) -> KitEntry:
        """The model with this file, or whose engine has this name.

        Raises:
            DeviceError: if there is none.
        """
        for entry in self.entries:
            if name in (entry.file, entry.engine_file):
                return entry
        known = ", ".join(entry.file for entry in self.entries)
        raise DeviceError(f"{name} is not in {self.folder / KIT_FILE}, which has: {known}")

    def read_checked(self, name: str) -> bytes:
        """The content of a file of the kit.

        Raises:
            DeviceError: if it cannot be read.
            MismatchError: if it is not the file that `kit.json` names.
        """
        path = self.folder / name
        content = read_limited(path, max_bytes=MAX_MODEL_BYTES)
        found, wanted = sha256_of(content), self.sha256_of_file[name]
        if found != wanted:
            raise MismatchError(
                f"{path} was changed: its sha256 is {found[:16]}..., and {KIT_FILE} says "
                f"{wanted[:16]}...; copy the kit again"
            )
        return content

    def check_all(self) -> None:
        """Compare every file with its hash.

        Raises:
            DeviceError: if one cannot be read.
            MismatchError: for the first that was changed.
        """
        for name in self.sha256_of_file:
            self.read_checked(name)


def read_kit(folder: Path, *, sha256: str | None = None) -> Kit:
    """Read `kit.json`.

    Args:
        folder: the kit.
        sha256: what the hash of `kit.json` must be, from a source that is trusted.

    Raises:
        DeviceError: if it is missing, damaged, or of a later version.
        MismatchError: if it has another hash.
    """
    if not (folder / KIT_FILE).is_file():
        raise DeviceError(f"{folder} is no build kit: it has no {KIT_FILE}")
    content = read_limited(folder / KIT_FILE, max_bytes=_MAX_JSON_BYTES)
    if sha256 is not None and sha256_of(content) != sha256.lower():
        raise MismatchError(
            f"{folder / KIT_FILE} has the sha256 {sha256_of(content)}, not {sha256}; do not use "
            "this kit"
        )
    table = _parsed(content, folder / KIT_FILE)
    try:
        if table["schema_version"] != 1:
            raise DeviceError(
                f"{folder / KIT_FILE} has schema_version {table['schema_version']!r}, and these "
                "scripts know 1; use the scripts of the kit itself"
            )
        entries = tuple(_entry(row) for row in table["models"])
        hashes = {_file_name(name): _sha256(value) for name, value in table["files"].items()}
        hashes |= {entry.file: entry.sha256 for entry in entries}
        if not entries or not isinstance(table["build"], dict):
            raise ValueError("it names no model, or no build options")
        if len({entry.file for entry in entries}) < len(entries):
            raise ValueError("it names a model twice")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else error
        raise DeviceError(f"{folder / KIT_FILE} is damaged ({what}); copy the kit again") from None
    return Kit(folder=folder, entries=entries, build_options=table["build"], sha256_of_file=hashes)


def _entry(row: Mapping[str, Any]) -> KitEntry:
    tolerance, min_agreement = float(row["tolerance"]), float(row["min_agreement"])
    if not (0 < tolerance < 1 and 0 < min_agreement <= 1):
        raise ValueError(f"tolerance {tolerance} or min_agreement {min_agreement} is out of range")
    if not MODEL_FILE_NAME.fullmatch(row["file"]):
        raise ValueError(f"{row['file']!r} is not the name of an ONNX file in a kit")
    return KitEntry(
        file=row["file"],
        sha256=_sha256(row["sha256"]),
        precision=str(row["precision"]),
        tolerance=tolerance,
        min_agreement=min_agreement,
    )


def _file_name(name: str) -> str:
    if not _FILE_NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not the name of a file in a kit")
    return name


def _sha256(text: str) -> str:
    if not _SHA256.fullmatch(text):
        raise ValueError(f"{text!r} is not a sha256")
    return text


def sha256_of(content: bytes) -> str:
    """The SHA-256 of some bytes, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def read_limited(path: Path, *, max_bytes: int) -> bytes:
    """The content of a file that is not larger than `max_bytes`.

    Raises:
        DeviceError: if it is larger, empty, missing or not readable.
    """
    try:
        with path.open("rb") as file:
            content = file.read(max_bytes + 1)
    except OSError as error:
        raise DeviceError(f"{path} cannot be read: {error.strerror}") from None
    if not content:
        raise DeviceError(f"{path} is empty; copy it again")
    if len(content) > max_bytes:
        raise DeviceError(f"{path} is larger than {max_bytes:,} bytes, the most that is read")
    return content


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        DeviceError: if it is missing, damaged, or holds no object.
    """
    return _parsed(read_limited(path, max_bytes=_MAX_JSON_BYTES), path)


def _parsed(content: bytes, path: Path) -> dict[str, Any]:
    try:
        table = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DeviceError(f"{path} is damaged ({error}); copy or build it again") from None
    if not isinstance(table, dict):
        raise DeviceError(f"{path} is damaged (no JSON object); copy or build it again")
    return table


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that is either there as a whole or not at all."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
