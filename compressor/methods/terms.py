"""The loss of a method that is a weighted sum of named terms."""

from collections.abc import Mapping
from types import MappingProxyType

from torch import Tensor

from compressor.methods.protocol import StepResult, read_back

_NOTHING: Mapping[str, Tensor] = MappingProxyType({})


def weighted_sum(
    terms: Mapping[str, tuple[float, Tensor]], *, also_logged: Mapping[str, Tensor] = _NOTHING
) -> StepResult:
    """Sum of weight x scalar as the loss; the sum is logged as `loss_nats`.

    Args:
        terms: by the name under which it is logged without its weight: weight and scalar of
            each term. A term of weight 0 costs a pass for nothing: leave it out.
        also_logged: scalars that are logged and not minimised.

    Raises:
        ValueError: if there is no term.
    """
    if not terms:
        raise ValueError("a loss needs at least one term")
    values = read_back(*(scalar for _, scalar in terms.values()), *also_logged.values())
    logged = dict(zip([*terms, *also_logged], values, strict=True))
    weighted = [weight * scalar for weight, scalar in terms.values()]
    loss_nats = sum(weight * logged[name] for name, (weight, _) in terms.items())
    return StepResult(loss=sum(weighted[1:], weighted[0]), logged={"loss_nats": loss_nats} | logged)
