"""Replay the golden images of a build kit on its engines or ONNX files: PASS, FAIL or UNVERIFIED.

    python3 replay.py [FILE.engine | FILE.onnx]...

Without a file: every engine in the kit, or, if there is none, every ONNX file by ONNX Runtime.
Ends with 0 for PASS, 5 for FAIL, 4 for UNVERIFIED: something is missing, so nothing was shown.
Needs the standard library, numpy, and TensorRT or ONNX Runtime; Python 3.10 or later.
N images, C channels, H and W pixels, K classes.
"""

import argparse
import dataclasses
import io
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from . import kit_files
from .cuda import Cuda
from .engine import Engine, audit_layers, wrong_precision
from .kit_files import DeviceError, Kit, KitEntry, MismatchError
from .onnx_session import OnnxSession
from .tensorrt_runtime import import_tensorrt

Array = np.ndarray[Any, Any]
KINDS = ("clean", "adversarial")
_EXIT_CODES = {"PASS": 0, "UNVERIFIED": 4, "FAIL": 5}


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Answers beside the expected ones, on the same images."""

    num_same: int
    """Images with the same label."""
    num_total: int
    num_clear_flips: int
    """Another label, though the expected margin is above twice the tolerance."""
    relative_error: float
    """Root mean square error of the logits over the size of the expected ones."""

    def __str__(self) -> str:
        error = f"relative error of the logits {self.relative_error:.1e}"
        flips = f", {self.num_clear_flips} clear flips" if self.num_clear_flips else ""
        return f"same label on {self.num_same} of {self.num_total}, {error}{flips}"


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What was shown about one file."""

    file: str
    status: str
    """PASS, FAIL or UNVERIFIED."""
    reason: str
    """Empty for PASS."""
    runtime: str | None = None
    """What answered, with its version; None: nothing did."""
    agreements: Mapping[str, Agreement] = field(default_factory=dict)
    """Of the clean and of the adversarial images."""
    layers: Mapping[str, int] = field(default_factory=dict)
    """How many layers of an engine run in each type."""

    @property
    def exit_code(self) -> int:
        """What a script ends with."""
        return _EXIT_CODES[self.status]

    def lines(self) -> list[str]:
        """For people, the verdict first."""
        by = f" by {self.runtime}" if self.runtime else ""
        reason = f": {self.reason}" if self.reason else ""
        said = [f"{self.status}  {self.file}{by}{reason}"]
        said += [f"  {kind} images: {shown}" for kind, shown in self.agreements.items()]
        counts = ", ".join(f"{count} in {name}" for name, count in sorted(self.layers.items()))
        return said + ([f"  layers: {counts}"] if counts else [])


@dataclass(frozen=True, kw_only=True)
class Expected:
    """Golden images, and what one model must answer; by kind, clean and adversarial."""

    images_NCHW: Mapping[str, Array]
    logits_NK: Mapping[str, Array]


def compare(expected_NK: Array, answer_NK: Array, *, tolerance: float) -> Agreement:
    """Labels and logits beside the expected ones.

    The size of logits is the root mean square of their distance from the mean over the classes, as
    adding a constant to all logits of an image changes no label.
    """
    expected, answer = expected_NK.astype(np.float64), answer_NK.astype(np.float64)
    size = float(np.sqrt(np.mean((expected - expected.mean(axis=1, keepdims=True)) ** 2)))
    error = float(np.sqrt(np.mean((answer - expected) ** 2)))
    top_N2 = np.sort(expected, axis=1)[:, -2:]
    is_same_N = expected.argmax(axis=1) == answer.argmax(axis=1)
    is_clear_N = top_N2[:, 1] - top_N2[:, 0] > 2 * tolerance * size
    return Agreement(
        num_same=int(is_same_N.sum()),
        num_total=len(expected),
        num_clear_flips=int((~is_same_N & is_clear_N).sum()),
        relative_error=error / size if size else float("inf"),
    )


def replay(kit: Kit, name: str) -> Replay:
    """Replay the golden images on one file of a kit.

    It passes if logits are finite and within the tolerance of the kit, no label flips clearly, and
    enough labels are the same; an engine must also run in the precision of its model. An engine is
    run only if it is the one that its sidecar names, made of the ONNX file of this kit.

    Args:
        kit: of `read_kit`.
        name: an ONNX file of the kit, or the engine made of it.
    """
    try:
        entry = kit.entry(name)
        expected = _read_golden(kit, entry)
        if name == entry.file:
            session = OnnxSession(kit.read_checked(name))
            return _judged(name, entry, expected, answer=session, runtime=session.version)
        return _replay_engine(kit, entry, expected)
    except MismatchError as error:
        return Replay(file=name, status="FAIL", reason=str(error))
    except DeviceError as error:
        return Replay(file=name, status="UNVERIFIED", reason=str(error))


def _replay_engine(kit: Kit, entry: KitEntry, expected: Expected) -> Replay:
    name = entry.engine_file
    plan, built = _checked_engine(kit, entry)
    tensorrt = import_tensorrt(built["flavour"])
    if tensorrt.version != built["version"] and not built["version_compatible"]:
        raise DeviceError(
            f"{name} was built with {built['flavour']} {built['version']}, and this is {tensorrt}; "
            "an engine fits one version: run build_engine.py here"
        )
    with Engine(plan, tensorrt=tensorrt, cuda=Cuda()) as engine:
        shown = _judged(name, entry, expected, answer=engine, runtime=str(tensorrt))
        layers = audit_layers(engine.layer_information())
    if shown.status == "FAIL":
        return dataclasses.replace(shown, layers=layers)
    if not layers:
        reason = "the inspector tells nothing of its layers, so its precision is not known"
        return dataclasses.replace(shown, status="UNVERIFIED", reason=reason)
    wrong = wrong_precision(layers, entry.precision, tf32=built["tf32"])
    status = "FAIL" if wrong else "PASS"
    return dataclasses.replace(shown, status=status, reason=wrong or "", layers=layers)


def _checked_engine(kit: Kit, entry: KitEntry) -> tuple[bytes, dict[str, Any]]:
    """The plan, and how it was built: flavour, version, version_compatible, tf32."""
    path = kit.folder / entry.engine_file
    if not path.is_file():
        raise DeviceError(f"{path} is not there; make it: python3 build_engine.py")
    plan = kit_files.read_limited(path, max_bytes=kit_files.MAX_MODEL_BYTES)
    sidecar_path = path.with_name(f"{path.name}.json")
    sidecar = kit_files.read_json(sidecar_path)
    try:
        hashes = str(sidecar["engine"]["sha256"]), str(sidecar["onnx"]["sha256"])
        built = {key: str(sidecar["tensorrt"][key]) for key in ("flavour", "version")}
        flags = {key: bool(sidecar["options"][key]) for key in ("version_compatible", "tf32")}
    except (KeyError, TypeError) as error:
        raise DeviceError(
            f"{sidecar_path} is damaged ({error}); run build_engine.py again"
        ) from None
    if kit_files.sha256_of(plan) != hashes[0]:
        raise MismatchError(
            f"{path} is not the file that {sidecar_path.name} names; build it again"
        )
    if entry.sha256 != hashes[1]:
        raise MismatchError(f"{path} was not made of the {entry.file} of this kit; build it again")
    return plan, built | flags


def _read_golden(kit: Kit, entry: KitEntry) -> Expected:
    content = kit.read_checked(kit_files.GOLDEN_FILE)
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if sum(info.file_size for info in archive.infolist()) > kit_files.MAX_MODEL_BYTES:
                raise ValueError("too large")
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            images = {kind: arrays[f"{kind}_NCHW"] for kind in KINDS}
            logits = {kind: arrays[f"{entry.precision}_{kind}_NK"] for kind in KINDS}
    except (OSError, ValueError, KeyError, EOFError, MemoryError, zipfile.BadZipFile) as error:
        raise DeviceError(
            f"{kit_files.GOLDEN_FILE} is damaged ({error}); copy the kit again"
        ) from None
    for kind in KINDS:
        fits = images[kind].ndim == 4 and logits[kind].ndim == 2 and logits[kind].shape[1] > 1
        if not fits or not 0 < len(images[kind]) == len(logits[kind]):
            raise DeviceError(
                f"{kit_files.GOLDEN_FILE} has {kind} arrays of shapes that do not fit"
            )
    return Expected(images_NCHW=images, logits_NK=logits)


def _judged(
    name: str,
    entry: KitEntry,
    expected: Expected,
    *,
    answer: Callable[[Array], Array],
    runtime: str,
) -> Replay:
    faults, agreements = [], {}
    for kind in KINDS:
        wanted_NK, found_NK = expected.logits_NK[kind], answer(expected.images_NCHW[kind])
        if found_NK.shape != wanted_NK.shape or not np.isfinite(found_NK).all():
            faults.append(f"{kind} logits of shape {found_NK.shape} are not finite or do not fit")
            continue
        shown = agreements[kind] = compare(wanted_NK, found_NK, tolerance=entry.tolerance)
        if not shown.relative_error <= entry.tolerance:
            faults.append(f"{kind} logits are off by more than {entry.tolerance:.1e}")
        if shown.num_clear_flips:
            faults.append(f"{shown.num_clear_flips} {kind} labels differ beyond rounding")
        if shown.num_same < entry.min_agreement * shown.num_total:
            faults.append(f"fewer {kind} labels agree than {100 * entry.min_agreement:g} %")
    return Replay(
        file=name,
        status="FAIL" if faults else "PASS",
        reason="; ".join(faults),
        runtime=runtime,
        agreements=agreements,
    )


def main(arguments: Sequence[str] | None = None, *, folder: Path = Path()) -> int:
    """Replay what the command line names and print what was shown; the exit code.

    Args:
        arguments: None: of the command line.
        folder: the kit, unless the arguments name another.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("files", nargs="*", metavar="FILE", help="engines or ONNX files of the kit")
    parser.add_argument("--kit", type=Path, default=folder, metavar="DIR")
    parser.add_argument("--kit-sha256", help="the sha256 of kit.json, from where you trust it")
    parsed = parser.parse_args(arguments)
    try:
        kit = kit_files.read_kit(parsed.kit, sha256=parsed.kit_sha256)
        kit.check_all()
    except DeviceError as error:
        status = "FAIL" if isinstance(error, MismatchError) else "UNVERIFIED"
        print(f"{status}  {error}")  # noqa: T201 (a script)
        return error.exit_code
    engines = [entry.engine_file for entry in kit.entries]
    built = [name for name in engines if (kit.folder / name).is_file()]
    names = [Path(name).name for name in parsed.files]
    wanted = names or built or [entry.file for entry in kit.entries]
    try:
        shown = [replay(kit, name) for name in wanted]
    except KeyboardInterrupt:
        print("Cancelled.", file=sys.stderr)  # noqa: T201 (a script)
        return 130
    for one in shown:
        print("\n".join(one.lines()))  # noqa: T201 (a script)
    if not names and not built:
        print("No engine is here yet: python3 build_engine.py")  # noqa: T201 (a script)
    return max(one.exit_code for one in shown)


if __name__ == "__main__":
    sys.exit(main())
