"""Balancers of B-MTARD: small frozen states, and pure functions that return the next one.

Source: Zhao et al., "Mitigating accuracy-robustness trade-off via balanced multi-teacher
adversarial distillation", TPAMI 46(12), 2024, as released by the authors, for two teachers. Any
number of teachers is ours. Of the same losses and entropies two get the authors' temperatures and
weights to the last bit: every division is theirs, in their order. Numbers are Python floats, as
there, so that the arithmetic is the same on every device.

Sums are exact before they are rounded and everything else is a minimum, a maximum or a matter of
one teacher, so the order of teachers does not matter to the last bit.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_NUM_ROLES = 2
"""The authors' number of losses."""


@dataclass(frozen=True, kw_only=True)
class LossWeightState:
    """Weights of the losses, and the losses of the very first batch that they refer to."""

    weights: tuple[float, ...]
    first_losses: tuple[float, ...] | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LossWeightState":
        """The inverse of `dataclasses.asdict`, also after a trip through JSON."""
        first = values["first_losses"]
        return cls(
            weights=tuple(values["weights"]),
            first_losses=None if first is None else tuple(first),
        )


def balance_temperatures(
    temperatures: Sequence[float],
    negative_entropies: Sequence[float],
    *,
    rate: float,
    bounds: tuple[float, float],
) -> tuple[float, ...]:
    """Entropy-based balance: steps of fixed size that bring the entropies together.

    The authors' step is that of two teachers: the one with the higher entropy is cooled, the other
    heated. Ours: with more, each teacher takes that step against the teacher whose entropy is
    farthest from its own, and rests where two are equally far. So all entropies move to the middle
    between the lowest and the highest, and rest where they are equal. A second teacher with the
    same entropy moves nobody else, which no mean, median or vote of the teachers can promise.

    The comparison is the authors' ratio of negative entropies, which differs from comparing the
    entropies when one of them has passed zero: a teacher that is numerically one-hot on a whole
    batch has a "negative entropy" just above 0 (by the guard), the ratio is negative, and both
    temperatures rise.

    Args:
        temperatures: of the batch just used.
        negative_entropies: mean sum of p log(p + guard) of each tempered teacher, nats.
        rate: size of the step; 0 keeps the temperatures.
        bounds: lowest and highest temperature.

    Returns:
        The temperatures of the next batch; unchanged where a number is not a number.
    """
    if any(math.isnan(value) for value in negative_entropies):
        return tuple(temperatures)
    lowest, highest = min(negative_entropies), max(negative_entropies)
    signs = [_sign(_ratio(own, _farthest(own, lowest, highest)) - 1) for own in negative_entropies]
    return tuple(
        min(max(temperature - rate * sign, bounds[0]), bounds[1])
        for temperature, sign in zip(temperatures, signs, strict=True)
    )


def balance_loss_weights(
    state: LossWeightState,
    losses: Sequence[float],
    *,
    shares: Sequence[float],
    rate: float,
    exponent: float = 1.0,
) -> LossWeightState:
    """Normalization loss balance: the loss that fell less since batch 1 gets more weight.

    An exponential moving average, with factor `rate`, of each loss's part of the sum of relative
    losses. The first call sets the reference losses. The authors divide the relative losses by
    their mean before they divide by the sum, which cancels but for rounding and is kept.

    Ours: with more than two teachers each relative loss counts by its share of its role, so that
    the roles are balanced by the means of their relative losses, and no role gains weight by having
    more teachers. The mean is then that of the two roles.

    Args:
        state: what the batch before left.
        losses: one of each teacher, nats.
        shares: what each teacher counts in its role; they sum to 1 in each role. Teachers that are
            copies of one another share what one of them would have.
        rate: 0 keeps the weights.
        exponent: on the relative losses, as in MTARD; 1 in B-MTARD.

    Returns:
        The weights for this very batch, which sum to 1; unchanged where a loss is not finite, which
        the trainer refuses, and where all relative losses are 0 or next to it.
    """
    if not all(math.isfinite(loss) for loss in losses):
        return state
    first = state.first_losses if state.first_losses is not None else tuple(losses)
    relative = _relative_losses(losses, first, exponent=exponent)
    counted = [share * value for share, value in zip(shares, relative, strict=True)]
    mean = math.fsum(counted) / _NUM_ROLES
    if rate == 0 or mean == 0 or not math.isfinite(mean):
        return LossWeightState(weights=state.weights, first_losses=first)
    over_mean = [value / mean for value in counted]
    total = math.fsum(over_mean)
    moved = [
        max(0.0, weight - rate * (weight - value / total))
        for weight, value in zip(state.weights, over_mean, strict=True)
    ]
    factor = 1 / math.fsum(moved)
    return LossWeightState(weights=tuple(factor * weight for weight in moved), first_losses=first)


def _relative_losses(
    losses: Sequence[float], first: Sequence[float], *, exponent: float
) -> list[float]:
    relative = [_ratio(now, then) for now, then in zip(losses, first, strict=True)]
    if exponent == 1:
        return relative
    largest = max(relative)  # cancels in the parts, and without it a power may overflow
    return [max(0.0, _ratio(value, largest)) ** exponent for value in relative]


def _farthest(own: float, lowest: float, highest: float) -> float:
    """The value farthest from `own`, which is itself where two are equally far."""
    if own == lowest:
        return highest
    if own == highest:
        return lowest
    below, above = own - lowest, highest - own
    if below == above:
        return own
    return lowest if below > above else highest


def _ratio(top: float, bottom: float) -> float:
    """Division as tensors divide: by zero gives an infinity or not-a-number, not an exception."""
    if bottom == 0:
        return math.nan if top == 0 else math.copysign(math.inf, top)
    return top / bottom


def _sign(value: float) -> int:
    """Sign as of a tensor: 0 for not-a-number, which 0/0 of two equal entropies gives."""
    return (value > 0) - (value < 0)
