"""BundleManifest: what a bundle holds and what was shown about it; `manifest.json` is its dump.

Closed and strict, because strangers send bundles: names that lead out of the folder, tables that
contradict each other, and text that could steer a terminal are refused. Needs no torch.
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from compressor.device.kit_files import KIT_FILE
from compressor.errors import ArtefactMismatchError, RobustCompressError
from compressor.gate.result import GateResult, GateVerdict
from compressor.paired_difference import PairedDrop
from compressor.proportions import Proportion
from compressor.reports.report import Count, RobustnessReport, Status
from compressor.threat import Norm, ThreatModel

MANIFEST_FILE = "manifest.json"
SIGNATURE_FILE = "manifest.sig"
KIT_FOLDER, ENGINE_FOLDER, REPORT_FOLDER = "kit", "engines", "reports"
MAX_MANIFEST_BYTES = 4 << 20

_PART = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}"
_PATH = re.compile(rf"{_PART}(/{_PART}){{0,3}}")

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Line = Annotated[str, Field(max_length=10_000, pattern=r"^[^\x00-\x1f\x7f-\x9f]*$")]
"""Text without characters that steer a terminal."""


class BundleError(RobustCompressError):
    """A bundle cannot be written, or is not there to be read."""


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class FileFacts(_Table):
    """One file, by its content."""

    sha256: Sha256
    num_bytes: Annotated[int, Field(ge=0)]


class ThreatFacts(_Table):
    """What the attacker may do."""

    norm: Norm
    epsilon_pixels: Annotated[float, Field(gt=0, le=1e6)]

    def __str__(self) -> str:
        """For people: `linf 8/255`."""
        return str(ThreatModel(norm=self.norm, epsilon_pixels=self.epsilon_pixels))


class SplitFacts(_Table):
    """Which images the files were trained on and compared on; hashes are SHA-256."""

    training_content_sha256: Sha256
    """Of the training images, held-out ones among them."""
    validation_index_sha256: Sha256
    """Of the positions that were held out of training."""
    num_validation: int


class Drop(_Table):
    """A paired difference with its 95 % interval; above 0 where the file is worse."""

    num_newly_broken: int
    num_newly_fixed: int
    num_total: int
    fraction: float
    low_95: float
    high_95: float

    @model_validator(mode="after")
    def _is_exact(self) -> Self:
        drop = PairedDrop(
            num_newly_broken=self.num_newly_broken,
            num_newly_fixed=self.num_newly_fixed,
            num_total=self.num_total,
        )
        wanted = (drop.fraction, *drop.interval_95())
        found = (self.fraction, self.low_95, self.high_95)
        if any(abs(one - other) > 1e-6 for one, other in zip(wanted, found, strict=True)):
            raise ValueError(f"{found} is not the drop {drop}")
        return self


class HopFacts(_Table):
    """A file beside the network that it was made from, on the same held-out images."""

    status: Literal["verified", "failed", "too_lossy", "unverified"]
    reason: Line
    clean_agreement: Count
    adversarial_agreement: Count
    clean: Count
    clean_drop: Drop
    robust: Count
    robust_drop: Drop
    max_clean_drop: float
    """What `verified` was decided by, with the next."""
    max_robust_drop: float

    @classmethod
    def of(cls, table: Mapping[str, Any]) -> Self:
        """From the table of `exporters.exported_model.verification_table`."""
        counts = ("clean_agreement", "adversarial_agreement", "clean", "robust")
        return cls(
            status=table["status"],
            reason=printable(table["reason"]),
            clean_drop=Drop(**table["clean_drop"]),
            robust_drop=Drop(**table["robust_drop"]),
            max_clean_drop=table["budget"]["max_clean_drop"],
            max_robust_drop=table["budget"]["max_robust_drop"],
            **{name: Count.of(Proportion(**table[name])) for name in counts},
        )


class BundledModel(_Table):
    """An ONNX file."""

    file: str
    sha256: Sha256
    variant: Line
    """fp32, fp16, int8, or int8 with a suffix."""
    opset: int
    input_name: Line
    input_contract: Line
    calibration_index_sha256: Sha256 | None
    """Of the positions of the training images that int8 was calibrated with."""
    hop: HopFacts
    details: dict[str, JsonValue]
    """How it was made: calibration, layers kept in float, fine-tuning."""


class BundledEngine(_Table):
    """A TensorRT engine, which fits one version of TensorRT and one kind of GPU."""

    file: str
    sha256: Sha256
    sidecar: str
    onnx_file: str
    """What it was built from."""
    flavour: Literal["tensorrt", "tensorrt-rtx"]
    version: Line
    gpu: Line | None
    """None: built without one."""
    status: Literal["verified", "unverified"]
    hop: HopFacts | None
    """None: it was never run."""


class BundledReport(_Table):
    """A report of `verify`, in short."""

    file: str
    kind: Literal["run", "weights", "onnx", "engine"]
    target_sha256: Sha256
    status: Status
    threat: ThreatFacts
    protocol: Line
    clean: Count
    worst_case: Count | None

    @classmethod
    def of(cls, report: RobustnessReport, *, file: str) -> Self:
        """The short form of the report in `file`."""
        threat = ThreatFacts(norm=report.norm, epsilon_pixels=report.epsilon_pixels)
        return cls(
            file=file,
            kind=report.target.kind,
            target_sha256=report.target.sha256,
            status=report.status,
            threat=threat,
            protocol=printable(report.protocol),
            clean=report.clean,
            worst_case=report.worst_case,
        )


class BundledGate(_Table):
    """A decision of `gate`, in short."""

    file: str
    model_sha256: Sha256
    verdict: GateVerdict
    reason: Line

    @classmethod
    def of(cls, result: GateResult, *, file: str) -> Self:
        """The short form of the result in `file`."""
        return cls(
            file=file,
            model_sha256=result.model_sha256,
            verdict=result.verdict,
            reason=printable(result.reason),
        )


class BundleManifest(_Table):
    """Everything about a bundle but the manifest itself and its signature."""

    schema_version: Literal[1] = 1
    kind: Literal["robust-compress bundle"] = "robust-compress bundle"
    versions: dict[Line, Line]
    """Of robust-compress and of the packages that made the files."""
    class_names: tuple[Line, ...]
    threat: ThreatFacts
    recipe_id: Line
    source_sha256: Sha256
    """Of the weights of the student."""
    split: SplitFacts
    models: tuple[BundledModel, ...]
    engines: tuple[BundledEngine, ...]
    reports: tuple[BundledReport, ...]
    gate: tuple[BundledGate, ...] | None
    """None: not gated."""
    files: dict[str, FileFacts]
    """By path within the bundle, with forward slashes."""

    def to_json(self) -> bytes:
        """What is written as `manifest.json`."""
        return (json.dumps(self.model_dump(mode="json"), indent=2, allow_nan=False) + "\n").encode()

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        for contradiction in self._contradictions():
            raise ValueError(contradiction)
        return self

    def target_hashes(self) -> set[str]:
        """The SHA-256 of all that a report in this bundle may be about."""
        return {self.source_sha256, *(sha256 for _, sha256 in self._targets())}

    def _targets(self) -> list[tuple[str, str]]:
        of_models = [(row.file, row.sha256) for row in self.models]
        return of_models + [(row.file, row.sha256) for row in self.engines]

    def _contradictions(self) -> Iterator[str]:
        names = self.files.keys()
        yield from _wrong_names(names)
        if not self.models or f"{KIT_FOLDER}/{KIT_FILE}" not in names:
            yield "it names no ONNX file, or no build kit"
        for name, sha256 in self._targets():
            if name not in names or self.files[name].sha256 != sha256:
                yield f"it gives two hashes, or none, of {name!r}"
        for engine in self.engines:
            yield from self._wrong_engine(engine)
        known = self.target_hashes()
        about = [(row.file, row.target_sha256) for row in self.reports]
        about += [(row.file, row.model_sha256) for row in self.gate or ()]
        for name, sha256 in about:
            if name not in names or sha256 not in known:
                yield f"{name!r} is missing, or is about nothing in the bundle"

    def _wrong_engine(self, engine: BundledEngine) -> Iterator[str]:
        wanted = f"{ENGINE_FOLDER}/{PurePosixPath(engine.onnx_file).stem}.engine"
        if engine.onnx_file not in {model.file for model in self.models} or engine.file != wanted:
            yield f"{engine.file!r} is not the engine of an ONNX file of the bundle"
        if engine.sidecar != f"{wanted}.json" or engine.sidecar not in self.files:
            yield f"{engine.file!r} has no sidecar in the bundle"


def _wrong_names(names: Collection[str]) -> Iterator[str]:
    folders = {str(folder) for name in names for folder in PurePosixPath(name).parents}
    reserved = {MANIFEST_FILE, SIGNATURE_FILE, *folders}
    for name in names:
        if not _PATH.fullmatch(name) or name in reserved:
            yield f"{name!r} cannot be the name of a file in a bundle"


def parse_manifest(content: bytes) -> BundleManifest:
    """The manifest in the bytes of `manifest.json`.

    Raises:
        ArtefactMismatchError: if it is damaged, of another schema, or contradicts itself.
    """
    try:
        return BundleManifest.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        found = f"{place}: {first['msg']}" if place else first["msg"]
    except (ArithmeticError, RecursionError) as error:  # numbers of a thousand digits
        found = str(error)
    raise ArtefactMismatchError(
        f"{MANIFEST_FILE} is not a manifest of schema 1 that agrees with itself: "
        f"{printable(found[:400])}; nothing was run. Copy the bundle again"
    )


def printable(text: str) -> str:
    """Text from strangers in one line, without characters that steer a terminal."""
    return text if text.isprintable() else ascii(text)[1:-1]
