"""The searches of AutoAttack as released: same numbers, same order, same passes through the model.

For people who must report the canonical number, and for us to be compared with. Rows do not leave
when they are fooled, targets are tried one after the other, and passes whose answer is already
known are made all the same, so that calls can be counted against the released code.

N samples, M of them standing, K classes.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compressor.attacks.draws import Draws
from compressor.attacks.protocol import Model
from compressor.attacks.search import Judge, Search, SearchResult, by_logits
from compressor.attacks.targeted import NUM_TARGETS, RowSearch, Total, nearest_classes
from compressor.threat import ThreatModel


@dataclass(frozen=True, kw_only=True)
class ReleasedSearch:
    """`attack`, with the passes that the released code makes before and after it."""

    attack: Search
    num_passes_before: int
    """Its check that the clean images are answered correctly."""
    num_passes_after: int
    """Its check of the points found."""

    @property
    def threat(self) -> ThreatModel:
        """That of the attack."""
        return self.attack.threat

    def search(
        self, model: Model, x_NCHW: Tensor, y_N: Tensor, *, draws: Draws, judge: Judge = by_logits
    ) -> SearchResult:
        """See `compressor.attacks.search.Search`."""
        _pass(model, x_NCHW, self.num_passes_before)
        found = self.attack.search(model, x_NCHW, y_N, draws=draws, judge=judge)
        _pass(model, found.x_adv_NCHW, self.num_passes_after)
        num_passes = self.num_passes_before + self.num_passes_after
        return replace(found, num_forwards_N=found.num_forwards_N + num_passes)


@dataclass(frozen=True, kw_only=True)
class ReleasedTargets:
    """`attack` towards one class after the other, all standing samples each time.

    Source: as `compressor.attacks.targeted.Targeted`, which finds the same with fewer passes.
    """

    attack: RowSearch
    num_targets: int = NUM_TARGETS
    num_passes_before: int
    """Per target; the last of them ranks the classes."""
    num_passes_after: int
    """Per target."""

    @property
    def threat(self) -> ThreatModel:
        """That of the attack."""
        return self.attack.threat

    def search(
        self, model: Model, x_NCHW: Tensor, y_N: Tensor, *, draws: Draws, judge: Judge = by_logits
    ) -> SearchResult:
        """See `compressor.attacks.search.Search`."""
        num_classes = _pass(model, x_NCHW, 1).shape[1]
        total = Total(x_NCHW, num_forwards=1)
        for place in range(min(self.num_targets, num_classes - 1)):
            standing = total.standing()
            if not len(standing):
                break
            x_MCHW, y_M = x_NCHW[standing], y_N[standing]
            logits_MK = _pass(model, x_MCHW, self.num_passes_before)
            target_M = nearest_classes(logits_MK, y_M, num_targets=num_classes)[:, place]
            found = self.attack.search_targets(
                model,
                x_MCHW,
                torch.stack([y_M, target_M], dim=1),
                owner_N=standing,
                draws=draws.rows(standing),
                judge=judge,
            )
            _pass(model, found.x_adv_NCHW, self.num_passes_after)
            num_passes = self.num_passes_before + self.num_passes_after
            found = replace(found, num_forwards_N=found.num_forwards_N + num_passes)
            total.add(standing, found)
        return total.result()


def _pass(model: Model, x_NCHW: Tensor, times: int) -> Tensor:
    """The last answer of so many passes."""
    logits_NK = torch.empty(0)
    with torch.no_grad():
        for _ in range(times):
            logits_NK = model(x_NCHW)
    return logits_NK
