"""Balancers of B-MTARD: small frozen states, and pure functions that return the next one.

Source: Zhao et al., "Mitigating accuracy-robustness trade-off via balanced multi-teacher
adversarial distillation", TPAMI 46(12), 2024, as released by the authors. Numbers are Python
floats, as there, so that the arithmetic is the same on every device.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TemperatureState:
    """Temperatures of the two teachers."""

    robust: float = 1.0
    clean: float = 1.0


@dataclass(frozen=True, kw_only=True)
class LossWeightState:
    """Weights of the two losses, and the losses of the very first batch that they refer to."""

    robust: float = 0.5
    clean: float = 0.5
    first_robust_loss: float | None = None
    first_clean_loss: float | None = None


def balance_temperatures(
    state: TemperatureState,
    *,
    robust_negative_entropy: float,
    clean_negative_entropy: float,
    rate: float,
    bounds: tuple[float, float],
) -> TemperatureState:
    """Entropy-based balance: a step of fixed size that brings the two entropies together.

    The teacher with the higher entropy is cooled, the other heated. The comparison is the
    authors' ratio of negative entropies, which differs from comparing the entropies when one
    of them has passed zero: a teacher that is numerically one-hot on a whole batch has a
    "negative entropy" just above 0 (by the guard), the ratio is negative, and both
    temperatures rise.

    Args:
        state: temperatures of the batch just used.
        robust_negative_entropy: sum of p log(p + guard) of the tempered robust teacher, nats.
        clean_negative_entropy: the same of the clean teacher.
        rate: size of the step.
        bounds: lowest and highest temperature.

    Returns:
        The temperatures of the next batch.
    """
    robust_over_clean = _ratio(robust_negative_entropy, clean_negative_entropy)
    clean_over_robust = _ratio(clean_negative_entropy, robust_negative_entropy)
    return TemperatureState(
        robust=_clip(state.robust - rate * _sign(robust_over_clean - 1), bounds),
        clean=_clip(state.clean - rate * _sign(clean_over_robust - 1), bounds),
    )


def balance_loss_weights(
    state: LossWeightState, *, robust_loss: float, clean_loss: float, rate: float
) -> LossWeightState:
    """Normalization loss balance: the loss that fell less since batch 1 gets more weight.

    An exponential moving average, with factor `rate`, of each loss's share of the sum of
    relative losses. The first call sets the reference losses.

    Returns:
        The weights for this very batch; unchanged where a loss is not finite, which the trainer
        refuses.
    """
    if not (math.isfinite(robust_loss) and math.isfinite(clean_loss)):
        return state
    first_robust = state.first_robust_loss if state.first_robust_loss is not None else robust_loss
    first_clean = state.first_clean_loss if state.first_clean_loss is not None else clean_loss
    robust_relative = _ratio(robust_loss, first_robust)
    clean_relative = _ratio(clean_loss, first_clean)
    robust_share = _ratio(robust_relative, robust_relative + clean_relative)
    clean_share = _ratio(clean_relative, robust_relative + clean_relative)
    robust = max(0.0, state.robust - rate * (state.robust - robust_share))
    clean = max(0.0, state.clean - rate * (state.clean - clean_share))
    return LossWeightState(
        robust=robust / (robust + clean),
        clean=clean / (robust + clean),
        first_robust_loss=first_robust,
        first_clean_loss=first_clean,
    )


def _ratio(top: float, bottom: float) -> float:
    """Division as tensors divide: by zero gives an infinity or not-a-number, not an exception."""
    if bottom == 0:
        return math.nan if top == 0 else math.copysign(math.inf, top)
    return top / bottom


def _sign(value: float) -> int:
    """Sign as of a tensor: 0 for not-a-number, which 0/0 of two equal entropies gives."""
    return (value > 0) - (value < 0)


def _clip(value: float, bounds: tuple[float, float]) -> float:
    return min(max(value, bounds[0]), bounds[1])
