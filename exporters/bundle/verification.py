"""verify_bundle: is a bundle what its manifest names, and do its files answer as they must here?

First the manifest is authenticated, if there is a way, then every file is hashed; until both have
succeeded nothing is run. An engine is a program, so it is run only under an authenticated manifest.
Needs no torch and no network.
"""

import re
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast

from compressor.device.kit_files import KIT_FILE, DeviceError, read_kit, read_limited, sha256_of
from compressor.device.replay import Agreement, replay
from compressor.errors import ArtefactMismatchError, ExitCode, UsageError
from exporters.bundle.engines import (
    EngineRun,
    HashedKit,
    Status,
    rebuild_engine,
    run_engine,
    why_no_engine_runs_here,
)
from exporters.bundle.integrity import Problem, find_problems
from exporters.bundle.manifest import (
    KIT_FOLDER,
    MANIFEST_FILE,
    MAX_MANIFEST_BYTES,
    SIGNATURE_FILE,
    BundledEngine,
    BundleError,
    BundleManifest,
    parse_manifest,
)
from exporters.bundle.signature import MAX_SIGNATURE_BYTES, check_signature, load_public_key

Anchor = Literal["sha256", "signature"]
_KIT_JSON = f"{KIT_FOLDER}/{KIT_FILE}"
_NOT_AUTHENTICATED = "the manifest is not authenticated"
_HOW = "a hash beside a file is no trust anchor; give --manifest-sha256 or --public-key"


@dataclass(frozen=True, kw_only=True)
class OpenedBundle:
    """A bundle whose manifest was read, and whose other files were not."""

    folder: Path
    manifest: BundleManifest
    manifest_sha256: str
    anchors: tuple[Anchor, ...]
    """What vouches for the manifest; empty: nothing."""
    is_signed: bool

    @property
    def authentication(self) -> str:
        """For people."""
        ways = {"sha256": "has the SHA-256 that was given", "signature": "is signed by the key"}
        if self.anchors:
            return "the manifest " + " and ".join(ways[anchor] for anchor in self.anchors)
        signed = " (it is signed, by whom was not asked)" if self.is_signed else ""
        return f"{_NOT_AUTHENTICATED}: {_HOW}{signed}"


@dataclass(frozen=True, kw_only=True)
class FileResult:
    """What was shown about one file here and now."""

    file: str
    """Its path in the bundle."""
    kind: Literal["onnx", "engine", "rebuilt engine"]
    """`rebuilt engine`: not the file itself but an engine made here of the same ONNX file."""
    status: Status
    reason: str
    """Why it is no pass; for a pass, by what it was answered."""
    agreements: Mapping[str, Agreement] = field(default_factory=dict)
    """Of an ONNX file: answers beside the expected ones, on clean and on adversarial images."""
    lines: tuple[str, ...] = ()
    """The same of an engine, in words."""


@dataclass(frozen=True, kw_only=True)
class BundleVerification:
    """The verdict about a bundle and everything that led to it."""

    bundle: OpenedBundle
    problems: tuple[Problem, ...]
    """Where there are any, nothing was run."""
    files: tuple[FileResult, ...]

    @property
    def status(self) -> Status:
        """FAIL if anything failed; UNVERIFIED if an ONNX file could not be replayed."""
        statuses = {result.status for result in self.files}
        if self.problems or "FAIL" in statuses:
            return "FAIL"
        onnx = {result.status for result in self.files if result.kind == "onnx"}
        return "PASS" if onnx == {"PASS"} else "UNVERIFIED"

    @property
    def engines_are_unverified(self) -> bool:
        """Whether an engine of the bundle was not run."""
        return any(row.kind == "engine" and row.status == "UNVERIFIED" for row in self.files)

    @property
    def verdict(self) -> str:
        """For people."""
        if self.status == "PASS" and self.engines_are_unverified:
            return "PASS, engines UNVERIFIED"
        return self.status

    @property
    def exit_code(self) -> ExitCode:
        """Of the command."""
        codes = {
            "PASS": ExitCode.DONE,
            "FAIL": ExitCode.MISMATCH,
            "UNVERIFIED": ExitCode.KNOWN_ERROR,
        }
        return codes[self.status]


def is_bundle(folder: Path) -> bool:
    """Whether a folder is a bundle, or was one before a file was taken from it."""
    marks = (MANIFEST_FILE, SIGNATURE_FILE, _KIT_JSON)
    return folder.is_dir() and any((folder / name).exists() for name in marks)


def open_bundle(
    folder: Path, *, manifest_sha256: str | None = None, public_key: Path | None = None
) -> OpenedBundle:
    """Read the manifest, and check it against what the user trusts.

    Args:
        folder: the bundle.
        manifest_sha256: what its SHA-256 must be.
        public_key: a PEM file whose private half must have signed it.

    Raises:
        UsageError: if the hash is none.
        BundleError: if there is no such folder, or the key is none.
        ArtefactMismatchError: if the manifest is missing, damaged, or not the one that is trusted.
        MissingDependencyError: if checking a signature needs a package that is not here.
    """
    if manifest_sha256 is not None and not re.fullmatch("[0-9a-fA-F]{64}", manifest_sha256):
        raise UsageError(f"--manifest-sha256 {manifest_sha256!r} is no SHA-256 of 64 digits")
    if not folder.is_dir():
        raise BundleError(f"{folder} is no folder; check the path")
    key = None if public_key is None else load_public_key(public_key)
    content = _read_plain(folder / MANIFEST_FILE, max_bytes=MAX_MANIFEST_BYTES)
    sha256, anchors = sha256_of(content), list[Anchor]()
    if manifest_sha256 is not None:
        if sha256 != manifest_sha256.lower():
            raise ArtefactMismatchError(
                f"{folder / MANIFEST_FILE} has the sha256 {sha256}, not {manifest_sha256.lower()}; "
                "do not use this bundle. Nothing was run"
            )
        anchors.append("sha256")
    if key is not None:
        signature = _read_plain(folder / SIGNATURE_FILE, max_bytes=MAX_SIGNATURE_BYTES)
        check_signature(content, signature, key, key_name=str(public_key))
        anchors.append("signature")
    return OpenedBundle(
        folder=folder,
        manifest=parse_manifest(content),
        manifest_sha256=sha256,
        anchors=tuple(anchors),
        is_signed=(folder / SIGNATURE_FILE).is_file(),
    )


def verify_bundle(
    bundle: OpenedBundle, *, tell: Callable[[str], None] = lambda _: None
) -> BundleVerification:
    """Hash every file; then replay the golden images on every ONNX file and engine.

    Args:
        bundle: of `open_bundle`.
        tell: told in words what is done.
    """
    manifest = bundle.manifest
    tell(f"hashing {len(manifest.files)} files")
    problems = find_problems(bundle.folder, manifest)
    if problems:
        return BundleVerification(bundle=bundle, problems=tuple(problems), files=())
    sha256 = manifest.files[_KIT_JSON].sha256
    kit = HashedKit(kit=read_kit(bundle.folder / KIT_FOLDER, sha256=sha256), sha256=sha256)
    results = []
    for entry in kit.kit.entries:
        tell(f"replaying the golden images on {entry.file}")
        results.append(_replay_onnx(kit, entry.file))
    for engine in manifest.engines:
        results += _engine_results(bundle, kit, engine, tell=tell)
    return BundleVerification(bundle=bundle, problems=(), files=tuple(results))


def _replay_onnx(kit: HashedKit, name: str) -> FileResult:
    shown = replay(kit.kit, name)
    return FileResult(
        file=f"{KIT_FOLDER}/{name}",
        kind="onnx",
        status=cast("Status", shown.status),
        reason=shown.reason or f"by {shown.runtime}",
        agreements=shown.agreements,
    )


def _engine_results(
    bundle: OpenedBundle, kit: HashedKit, engine: BundledEngine, *, tell: Callable[[str], None]
) -> Iterator[FileResult]:
    """Of the engine, and of one built here in its place where it may not be run."""
    missing = why_no_engine_runs_here()
    rebuild = (
        f"build one here of a copy of the kit: cp -r {KIT_FOLDER} DIR && python3 "
        f"DIR/build_engine.py --model {Path(engine.onnx_file).name}"
    )
    if bundle.anchors:
        tell(f"replaying the golden images on {engine.file}")
        ran = _run(bundle, kit, engine)
        if ran.status == "UNVERIFIED" and missing is None:
            ran = EngineRun(status="UNVERIFIED", reason=f"{ran.reason}; {rebuild}")
        yield _result(engine, "engine", ran)
        return
    why = f"an engine is a program, and {_NOT_AUTHENTICATED}"
    if missing is not None:
        why += f"; nor can one be built in its place: {missing}"
    yield _result(engine, "engine", EngineRun(status="UNVERIFIED", reason=f"not run: {why}"))
    if missing is None:
        tell(f"building an engine of {engine.onnx_file} in place of {engine.file}")
        entry = kit.kit.entry(Path(engine.onnx_file).name)
        yield _result(engine, "rebuilt engine", _guarded(lambda: rebuild_engine(kit, entry)))


def _run(bundle: OpenedBundle, kit: HashedKit, engine: BundledEngine) -> EngineRun:
    def run() -> EngineRun:
        contents = {}
        for name in (engine.file, engine.sidecar):
            facts = bundle.manifest.files[name]
            content = read_limited(bundle.folder / name, max_bytes=max(1, facts.num_bytes))
            if sha256_of(content) != facts.sha256:
                return EngineRun(status="FAIL", reason=f"{name} was changed while it was verified")
            contents[name] = content
        return run_engine(
            kit,
            kit.kit.entry(Path(engine.onnx_file).name),
            plan=contents[engine.file],
            sidecar=contents[engine.sidecar],
        )

    return _guarded(run)


def _guarded(run: Callable[[], EngineRun]) -> EngineRun:
    try:
        return run()
    except DeviceError as error:  # a file was changed since it was hashed
        return EngineRun(status="FAIL", reason=str(error))


def _result(
    engine: BundledEngine, kind: Literal["engine", "rebuilt engine"], ran: EngineRun
) -> FileResult:
    return FileResult(
        file=engine.file, kind=kind, status=ran.status, reason=ran.reason, lines=ran.lines
    )


def _read_plain(path: Path, *, max_bytes: int) -> bytes:
    """The content of a plain file that every bundle has, or every signed one."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise ArtefactMismatchError(f"{path} is no plain file; do not use this bundle")
        return read_limited(path, max_bytes=max_bytes)
    except FileNotFoundError:
        raise ArtefactMismatchError(
            f"{path} is missing, so nothing says what this bundle must be; copy it again"
        ) from None
    except (OSError, DeviceError) as error:
        raise ArtefactMismatchError(f"{path} cannot be used: {error}") from None
