"""ExportedModel: a file, what it claims to be, and what was shown about it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from compressor.paired_difference import PairedDrop
from compressor.proportions import Proportion
from exporters.budget import Budget

Precision = Literal["fp32", "fp16", "int8"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8")
Variant = Literal["fp32", "fp16", "int8", "int8-mixed", "int8-qat"]
"""What a file is called: int8 with all layers in 8 bits, with some kept in float, or fine-tuned."""
PRECISION_OF: Mapping[Variant, Precision] = MappingProxyType(
    {
        "fp32": "fp32",
        "fp16": "fp16",
        "int8": "int8",
        "int8-mixed": "int8",
        "int8-qat": "int8",
    }
)
"""Highest first."""


ExportStatus = Literal["verified", "failed", "too_lossy", "unverified"]
"""`failed`: it is not the same model. `too_lossy`: it is, but loses more than was allowed.
`unverified`: it could not be attacked."""


@dataclass(frozen=True, kw_only=True)
class ExportVerification:
    """The answers of a file beside those of its source, on the same held-out images."""

    status: ExportStatus
    reason: str
    clean_agreement: Proportion
    """Same label on held-out images."""
    adversarial_agreement: Proportion
    """Same label on adversarial images made against the source."""
    num_clear_flips: int
    """Labels that differ though the source was surer of them than rounding explains."""
    flipped_margin_fraction: float
    """Margins of the source on the images with another label, over the sum of all its margins."""
    max_logit_difference: float
    tolerance: float
    """Largest difference that rounding explains; infinite where only accuracies count."""
    sqnr_db: float
    """Power of the source's logits over that of the difference, in decibels."""
    clean: Proportion
    """Accuracy of the file."""
    clean_drop: PairedDrop
    robust: Proportion
    """Worst case of the file over adversarial images made on the source and, if it is lossy, on
    its own differentiable twin; the source is judged on the same images."""
    robust_drop: PairedDrop
    budget: Budget
    """What `verified` was decided by."""


@dataclass(frozen=True, kw_only=True)
class ExportedModel:
    """A file that leaves the building."""

    path: Path
    format: Literal["onnx"]
    precision: Precision
    variant: Variant
    opset: int
    input_name: str
    input_contract: str
    sha256: str
    source_sha256: str
    num_bytes: int
    verification: ExportVerification
    details: dict[str, Any]
    """How it was made: calibration, layers kept in float, fine-tuning."""


def verification_table(shown: ExportVerification) -> dict[str, Any]:
    """Plain values for JSON, drops with their intervals; None for what is infinite."""
    table = asdict(shown)
    for name, drop in (("clean_drop", shown.clean_drop), ("robust_drop", shown.robust_drop)):
        low, high = drop.interval_95()
        table[name] |= {"fraction": drop.fraction, "low_95": low, "high_95": high}
    for name in ("sqnr_db", "tolerance"):
        table[name] = table[name] if isfinite(table[name]) else None
    return table
