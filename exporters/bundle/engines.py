"""Run the engines of a bundle, or engines built anew of its ONNX files, in processes of their own.

An engine is a program, and one for another machine may end the process that loads it. The code is
that of this installation; scripts of the bundle are never run.
"""

import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Literal

import compressor
from compressor.atomic_folder import failures_named
from compressor.device.cuda import gpu_name
from compressor.device.kit_files import CODE_FOLDER, KIT_FILE, DeviceError, Kit, KitEntry
from compressor.device.tensorrt_runtime import import_tensorrt

REPLAY_SECONDS = 600.0
BUILD_SECONDS = 3600.0
Status = Literal["PASS", "FAIL", "UNVERIFIED"]
_STATUSES: Mapping[int, Status] = MappingProxyType({0: "PASS", 5: "FAIL", 4: "UNVERIFIED"})
"""By the exit code of `compressor.device.replay`."""


@dataclass(frozen=True, kw_only=True)
class EngineRun:
    """What was shown about an engine."""

    status: Status
    reason: str
    """In one line, with the runtime; for PASS too."""
    lines: tuple[str, ...] = ()
    """Further ones: agreement with the expected answers, types of the layers."""


@dataclass(frozen=True, kw_only=True)
class HashedKit:
    """A kit, and the hash of its `kit.json` that the manifest gives."""

    kit: Kit
    sha256: str


def run_engine(hashed: HashedKit, entry: KitEntry, *, plan: bytes, sidecar: bytes) -> EngineRun:
    """Replay the golden images on an engine that somebody trusted has vouched for.

    Args:
        hashed: the kit of the bundle.
        entry: the ONNX file that the engine was built from.
        plan: the content of the engine, as vouched for.
        sidecar: that of the file beside it.

    Raises:
        DeviceError: if a file of the kit was changed since it was hashed.
    """
    files = {entry.engine_file: plan, f"{entry.engine_file}.json": sidecar}
    with _private_copy(hashed, files) as folder:
        return _replay(folder, hashed, entry)


def rebuild_engine(hashed: HashedKit, entry: KitEntry) -> EngineRun:
    """Build an engine of an ONNX file here and replay the golden images on it.

    Raises:
        DeviceError: if a file of the kit was changed since it was hashed.
    """
    with _private_copy(hashed, {}) as folder:
        built = _run(
            "compressor.device.build_engine",
            ("--kit", str(folder), "--kit-sha256", hashed.sha256, "--model", entry.file),
            timeout_seconds=BUILD_SECONDS,
        )
        if built.returncode != 0:
            said = " ".join(built.stderr.split()) or f"the builder ended with {built.returncode}"
            return EngineRun(status="UNVERIFIED", reason=f"cannot be built here: {said}")
        return _replay(folder, hashed, entry)


def why_no_engine_runs_here() -> str | None:
    """What is missing to build and run an engine; None: nothing."""
    if gpu_name() is None:
        return "there is no NVIDIA GPU here"
    try:
        import_tensorrt()
    except DeviceError as error:
        return str(error).partition("\n")[0]
    return None


def _replay(folder: Path, hashed: HashedKit, entry: KitEntry) -> EngineRun:
    ended = _run(
        "compressor.device.replay",
        ("--kit", str(folder), "--kit-sha256", hashed.sha256, entry.engine_file),
        timeout_seconds=REPLAY_SECONDS,
    )
    status = _STATUSES.get(ended.returncode)
    if status is None:  # a crash has shown something, if not what one hoped for
        how = f"signal {-ended.returncode}" if ended.returncode < 0 else f"code {ended.returncode}"
        said = " ".join(ended.stderr.split()[-30:])
        return EngineRun(status="FAIL", reason=f"the process that ran it ended with {how}: {said}")
    first, *others = ended.stdout.splitlines() or [""]
    reason = first.removeprefix(status).strip().removeprefix(entry.engine_file).lstrip(": ")
    return EngineRun(status=status, reason=reason, lines=tuple(line.strip() for line in others))


def _run(
    module: str, arguments: Sequence[str], *, timeout_seconds: float
) -> "subprocess.CompletedProcess[str]":
    """A module of this installation, in a process that sees no other folder."""
    root = Path(compressor.__file__).parents[1]
    code = (
        f"import sys; sys.path.append({str(root)!r}); "
        f"from {module} import main; sys.exit(main(sys.argv[1:]))"
    )
    try:
        return subprocess.run(
            [sys.executable, "-P", "-c", code, *arguments],
            capture_output=True,
            text=True,
            errors="backslashreplace",
            timeout=timeout_seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        late = f"it did not end within {timeout_seconds:g} s"
        return subprocess.CompletedProcess(arguments, returncode=124, stdout="", stderr=late)


@contextmanager
def _private_copy(hashed: HashedKit, more: Mapping[str, bytes]) -> Iterator[Path]:
    """A copy of a kit that nobody else writes into, each file hashed as it is read; and more."""
    kit = hashed.kit
    with TemporaryDirectory(prefix="robust-compress-") as name:
        folder = Path(name)
        with failures_named(folder, instead_of=folder):
            (folder / CODE_FOLDER).mkdir()
            for file in kit.sha256_of_file:
                (folder / file).write_bytes(kit.read_checked(file))
            (folder / KIT_FILE).write_bytes((kit.folder / KIT_FILE).read_bytes())
            for file, content in more.items():
                (folder / file).write_bytes(content)
        yield folder
