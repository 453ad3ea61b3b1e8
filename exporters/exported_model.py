"""ExportedModel: a file, what it claims to be, and what was shown about it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from compressor.proportions import Proportion


@dataclass(frozen=True, kw_only=True)
class ExportVerification:
    """The answers of a file beside those of its source, on the same images."""

    status: Literal["verified", "failed"]
    reason: str
    clean_agreement: Proportion
    """Same label on held-out images."""
    adversarial_agreement: Proportion
    """Same label on adversarial images made against the source."""
    max_logit_difference: float
    tolerance: float


@dataclass(frozen=True, kw_only=True)
class ExportedModel:
    """A file that leaves the building."""

    path: Path
    format: Literal["onnx"]
    precision: Literal["fp32"]
    opset: int
    input_name: str
    input_contract: str
    sha256: str
    source_sha256: str
    num_bytes: int
    verification: ExportVerification
