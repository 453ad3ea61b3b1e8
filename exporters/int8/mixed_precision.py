"""Which layers of a network bear 8 bits, judged by accuracy under attack.

Layers are ranked one at a time, all others in float: first by a cheap proxy, the signal-to-noise
ratio of the logits of adversarial images, then the worst of them by accuracy under attack. These
are kept in float, more and more of them, until the drop is inside the budget.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from compressor.paired_difference import PairedDrop
from exporters.exported_model import ExportVerification

MAX_FLOAT_SHARE = 1 / 3
"""Of the weights that mixed precision may keep in float."""
_NUM_ATTACKED = 6
"""Layers of the proxy's ranking that are attacked each on its own."""


@dataclass(frozen=True, kw_only=True)
class LayerSensitivity:
    """What happens when one layer alone is quantised."""

    name: str
    num_weights: int
    sqnr_db: float
    """Of the logits of adversarial held-out images."""
    robust_drop: PairedDrop | None
    """None for layers that the proxy does not suspect."""
    is_kept: bool = False
    """In float, in the end."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One choice of layers that stay in float, and what it costs."""

    num_kept: int
    verification: ExportVerification


def is_inside_budget(found: ExportVerification) -> bool:
    """Whether nothing is wrong that layers in float could mend."""
    return found.status in {"verified", "unverified"}


def worth(found: ExportVerification) -> tuple[bool, int, float]:
    """To compare candidates by, on the same images."""
    return is_inside_budget(found), found.robust.num_correct, found.sqnr_db


Measure = Callable[[Sequence[str]], ExportVerification]
"""Names of the layers that stay in float -> what the file is then worth."""


def rank_layers(
    layers: Sequence[tuple[str, int]],
    *,
    proxy_db: Callable[[Sequence[str]], float],
    measure: Measure,
) -> list[LayerSensitivity]:
    """Layers, the most sensitive first.

    Args:
        layers: names and numbers of weights.
        proxy_db: names of the layers kept in float -> signal-to-noise ratio of the logits.
        measure: attacks the file that keeps these layers.
    """
    names = [name for name, _ in layers]
    found = [
        LayerSensitivity(
            name=name,
            num_weights=num_weights,
            sqnr_db=proxy_db([other for other in names if other != name]),
            robust_drop=None,
        )
        for name, num_weights in layers
    ]
    found.sort(key=lambda layer: layer.sqnr_db)
    attacked = []
    for layer in found[:_NUM_ATTACKED]:
        only = measure([other for other in names if other != layer.name])
        attacked.append(replace(layer, robust_drop=only.robust_drop))
    attacked.sort(key=_by_loss)
    return [*attacked, *found[_NUM_ATTACKED:]]


def keep_until_inside(
    ranked: Sequence[LayerSensitivity], *, measure: Measure, num_first: int = 1
) -> tuple[list[LayerSensitivity], list[Trial]]:
    """Keep 1, 2, 3, 5, 8 ... layers in float until the file costs no more than allowed.

    No more than a third of the weights stay in float: beyond that the file has half of the bytes
    of float32, which float16 gives without loss.

    Args:
        ranked: most sensitive first.
        measure: attacks the file that keeps these layers.
        num_first: layers to begin with.

    Returns:
        The layers, with those of the best trial marked as kept, and every trial. None may be
        inside the budget; there is none at all if even the first layers are too large.
    """
    trials: list[Trial] = []
    num_kept, num_before = num_first, 1
    while num_kept <= len(ranked) and _float_share(ranked[:num_kept], ranked) <= MAX_FLOAT_SHARE:
        kept = [layer.name for layer in ranked[:num_kept]]
        trials.append(Trial(num_kept=num_kept, verification=measure(kept)))
        if is_inside_budget(trials[-1].verification):
            break
        num_kept, num_before = num_kept + num_before, num_kept
    num_marked = max(trials, key=lambda t: worth(t.verification)).num_kept if trials else 0
    marked = [replace(layer, is_kept=n < num_marked) for n, layer in enumerate(ranked)]
    return marked, trials


def _float_share(kept: Sequence[LayerSensitivity], layers: Sequence[LayerSensitivity]) -> float:
    return sum(layer.num_weights for layer in kept) / sum(layer.num_weights for layer in layers)


def _by_loss(layer: LayerSensitivity) -> tuple[float, float]:
    drop = layer.robust_drop.fraction if layer.robust_drop is not None else 0.0
    return -drop, layer.sqnr_db
