"""prove_hop: does a file answer as its source does, on clean and on attacked images?

Every file is compared with the network itself, in the order torch -> fp32 -> fp16, int8 -> engine,
so the first that fails is the hop that lost something.

N images, K classes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from types import MappingProxyType

import torch
from torch import Tensor

from compressor.data import Batch
from compressor.losses import centred
from compressor.paired_difference import PairedDrop
from compressor.proportions import Proportion
from exporters.budget import DEFAULT_BUDGET, Budget
from exporters.exported_model import ExportStatus, ExportVerification, Variant
from exporters.held_out import Answer, HeldOut, answers, attacked


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a format may change."""

    relative_tolerance: float
    """Of the largest logit; infinite where logits may move as long as accuracies stay."""
    min_sqnr_db: float
    min_agreement: float
    """Share of clean images with the source's label."""
    is_lossy: bool


_INT8 = Limits(relative_tolerance=inf, min_sqnr_db=10.0, min_agreement=0.9, is_lossy=True)
LIMITS: Mapping[Variant, Limits] = MappingProxyType(
    {
        "fp32": Limits(
            relative_tolerance=1e-3, min_sqnr_db=60.0, min_agreement=0.99, is_lossy=False
        ),
        "fp16": Limits(
            relative_tolerance=2e-2, min_sqnr_db=40.0, min_agreement=0.97, is_lossy=True
        ),
        "int8": _INT8,
        "int8-mixed": _INT8,
        # Its weights have moved on, so it is another function; its accuracies are what counts.
        "int8-qat": Limits(
            relative_tolerance=inf, min_sqnr_db=3.0, min_agreement=0.75, is_lossy=True
        ),
    }
)


def prove_hop(
    file: Answer,
    held_out: HeldOut,
    *,
    variant: Variant,
    twin: Answer | None,
    budget: Budget = DEFAULT_BUDGET,
    complaints: Sequence[str] = (),
) -> ExportVerification:
    """Compare labels, logits and accuracies of a file with those of its source.

    Args:
        file: the file itself; it alone decides.
        held_out: images, and what the source says to them.
        variant: decides how much may differ.
        twin: a differentiable form of a lossy file, through which it is attacked as well.
        budget: by how much accuracies may fall.
        complaints: what else is wrong with the file.
    """
    limits = LIMITS[variant]
    found = _Comparison(
        source_2NK=torch.stack([held_out.clean_NK, held_out.adversarial_NK]),
        file_2NK=torch.stack([answers(file, held_out.x_NCHW), answers(file, held_out.x_adv_NCHW)]),
        limits=limits,
    )
    y_N = held_out.y_N.cpu()
    source_right_N, file_right_N = (
        found.source_2NK[0].argmax(1) == y_N,
        found.file_2NK[0].argmax(1) == y_N,
    )
    source_stands_N, file_stands_N = _standing(
        found, file, held_out, twin=twin if limits.is_lossy else None
    )
    clean_drop = _drop(source_right_N, file_right_N)
    robust_drop = _drop(source_stands_N, file_stands_N)
    wrong = [*complaints, *found.complaints()]
    lost = budget.exceeded(clean_drop=clean_drop, robust_drop=robust_drop)
    status, reason = _verdict(found, wrong, lost, is_attacked=twin is not None)
    return ExportVerification(
        status=status,
        reason=reason,
        clean_agreement=found.agreement(0),
        adversarial_agreement=found.agreement(1),
        num_clear_flips=found.num_clear_flips,
        flipped_margin_fraction=found.flipped_margin_fraction,
        max_logit_difference=found.difference,
        tolerance=found.tolerance,
        sqnr_db=found.sqnr_db,
        clean=_proportion(file_right_N),
        clean_drop=clean_drop,
        robust=_proportion(file_stands_N),
        robust_drop=robust_drop,
        budget=budget,
    )


def _standing(
    found: "_Comparison", file: Answer, held_out: HeldOut, *, twin: Answer | None
) -> tuple[Tensor, Tensor]:
    """Which images the source and the file get right whatever was tried, each bool [N]."""
    y_N = held_out.y_N.cpu()
    source_N = (found.source_2NK.argmax(2) == y_N).all(dim=0)
    file_N = (found.file_2NK.argmax(2) == y_N).all(dim=0)
    if twin is not None:
        x_adv_NCHW = attacked(twin, _batch(held_out), threat=held_out.threat)
        source_N &= answers(held_out.source, x_adv_NCHW).argmax(1) == y_N
        file_N &= answers(file, x_adv_NCHW).argmax(1) == y_N
    return source_N, file_N


def _verdict(
    found: "_Comparison", wrong: Sequence[str], lost: Sequence[str], *, is_attacked: bool
) -> tuple[ExportStatus, str]:
    if wrong:
        return "failed", "; ".join(wrong)
    if lost:
        return "too_lossy", "; ".join(lost)
    if found.limits.is_lossy and not is_attacked:
        return "unverified", "it has no differentiable twin, so it was not attacked itself"
    return "verified", found.summary()


@dataclass(frozen=True, kw_only=True, eq=False)
class _Comparison:
    """Logits of both, of clean images first and of adversarial ones second.

    Errors are measured against logits about the mean of their image: one constant on all classes
    changes no answer and would hide them.
    """

    source_2NK: Tensor
    file_2NK: Tensor
    limits: Limits

    @property
    def difference(self) -> float:
        """Largest of any logit; NaN if one is not a number."""
        return float((centred(self.source_2NK) - centred(self.file_2NK)).abs().max())

    @property
    def tolerance(self) -> float:
        largest = float(centred(self.source_2NK).abs().max())
        return self.limits.relative_tolerance * max(1.0, largest)

    @property
    def sqnr_db(self) -> float:
        return signal_to_noise_db(centred(self.source_2NK), centred(self.file_2NK))

    @property
    def is_same(self) -> Tensor:
        return torch.eq(self.source_2NK.argmax(dim=2), self.file_2NK.argmax(dim=2))

    @property
    def margin(self) -> Tensor:
        """By how much the source prefers its class."""
        top_2N2 = self.source_2NK.topk(2, dim=2).values
        return top_2N2[..., 0] - top_2N2[..., 1]

    @property
    def num_clear_flips(self) -> int:
        return int((~self.is_same & (self.margin > 2 * self.tolerance)).sum())

    @property
    def flipped_margin_fraction(self) -> float:
        margin_2N = self.margin
        return float(margin_2N[~self.is_same].sum() / margin_2N.sum().clamp(min=1e-12))

    def agreement(self, place: int) -> Proportion:
        return _proportion(self.is_same[place])

    def complaints(self) -> list[str]:
        """What makes it another model; comparisons are such that NaN complains."""
        found = []
        if not self.difference <= self.tolerance:
            found.append(
                f"largest logit difference {self.difference:.2e}, tolerance {self.tolerance:.2e}"
            )
        if self.num_clear_flips:
            found.append(f"{self.num_clear_flips} labels differ beyond rounding")
        if not self.sqnr_db >= self.limits.min_sqnr_db:
            found.append(
                f"the logits are {self.sqnr_db:.1f} dB above their error, at least "
                f"{self.limits.min_sqnr_db:g} dB are expected"
            )
        if self.agreement(0).fraction < self.limits.min_agreement:
            found.append(f"same label on only {self.agreement(0)} clean images")
        return found

    def summary(self) -> str:
        if math.isinf(self.tolerance):
            return f"logits {self.sqnr_db:.1f} dB above their error"
        return f"largest logit difference {self.difference:.2e}, tolerance {self.tolerance:.2e}"


def signal_to_noise_db(signal: Tensor, noisy: Tensor) -> float:
    """Power of the signal over power of the difference; infinite where there is none."""
    noise = float((signal - noisy).double().square().sum())
    power = float(signal.double().square().sum())
    if noise == 0:
        return math.inf
    return 10 * math.log10(max(power, 1e-300) / noise) if math.isfinite(noise) else -math.inf


def _batch(held_out: HeldOut) -> Batch:
    return Batch(
        x_NCHW=held_out.x_NCHW,
        y_N=held_out.y_N,
        index_N=torch.arange(held_out.num_images),
        keys_N=held_out.keys_N,
    )


def _proportion(flags_N: Tensor) -> Proportion:
    return Proportion(num_correct=int(flags_N.sum()), num_total=len(flags_N))


def _drop(source_right_N: Tensor, file_right_N: Tensor) -> PairedDrop:
    return PairedDrop(
        num_newly_broken=int((source_right_N & ~file_right_N).sum()),
        num_newly_fixed=int((~source_right_N & file_right_N).sum()),
        num_total=len(source_right_N),
    )
