"""A targeted search over the classes that come next, many targets at a time.

N samples, T targets each, R rows = pairs of a sample and a target, K classes.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from compressor.attacks.draws import Draws
from compressor.attacks.protocol import Model
from compressor.attacks.search import Judge, SearchResult, by_logits
from compressor.threat import ThreatModel

NUM_TARGETS = 9


class RowSearch(Protocol):
    """Drives each row from its label towards its target; rows of one owner leave together."""

    @property
    def threat(self) -> ThreatModel:
        """What the attacker may do."""

    def search_targets(
        self,
        model: Model,
        x_NCHW: Tensor,
        pairs_N2: Tensor,
        *,
        owner_N: Tensor,
        draws: Draws,
        judge: Judge,
    ) -> SearchResult:
        """One result per row; `pairs_N2` holds label and target, `owner_N` the sample."""


@dataclass(frozen=True, kw_only=True)
class Targeted:
    """`attack` towards each of the `num_targets` best wrong classes of the clean image.

    Source: Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of
    diverse parameter-free attacks", ICML 2020, section 5 (APGD-T, FAB-T; 9 targets). Differs in
    that the nearest class goes first for all samples, the others together, as many as fit into
    `max_rows`; a fooled sample takes all its rows along. With fewer classes there are fewer
    targets.
    """

    attack: RowSearch
    num_targets: int = NUM_TARGETS
    max_rows: int = 512

    @property
    def threat(self) -> ThreatModel:
        """That of the attack."""
        return self.attack.threat

    def search(
        self,
        model: Model,
        x_NCHW: Tensor,
        y_N: Tensor,
        *,
        draws: Draws,
        judge: Judge = by_logits,
    ) -> SearchResult:
        """See `compressor.attacks.search.Search`."""
        with torch.no_grad():
            targets_NT = nearest_classes(model(x_NCHW), y_N, num_targets=self.num_targets)
        total = Total(x_NCHW, num_forwards=1)
        done = 0
        while done < targets_NT.shape[1] and len(standing := total.standing()):
            num_now = 1 if done == 0 else max(self.max_rows // len(standing), 1)
            places = torch.arange(done, min(done + num_now, targets_NT.shape[1]), device=y_N.device)
            owner_R, place_R = (
                t.flatten() for t in torch.meshgrid(standing, places, indexing="ij")
            )
            found = self.attack.search_targets(
                model,
                x_NCHW[owner_R],
                torch.stack([y_N[owner_R], targets_NT[owner_R, place_R]], dim=1),
                owner_N=owner_R,
                draws=draws.branch(owner_R, place_R),
                judge=judge,
            )
            total.add(owner_R, found)
            done += len(places)
        return total.result()


def nearest_classes(logits_NK: Tensor, y_N: Tensor, *, num_targets: int) -> Tensor:
    """The wrong classes with the largest logits, best first, int64 [N, min(num_targets, K - 1)]."""
    wrong_NK = logits_NK.scatter(1, y_N[:, None], -torch.inf)
    ranked_NK = wrong_NK.argsort(dim=1, descending=True, stable=True)
    return ranked_NK[:, : min(num_targets, logits_NK.shape[1] - 1)]


class Total:
    """Adds the results of rows up to results of samples.

    Args:
        x_NCHW: clean images.
        num_forwards: passes that every sample has already made.
    """

    def __init__(self, x_NCHW: Tensor, *, num_forwards: int) -> None:
        self._x_adv = x_NCHW.clone()
        self._is_fooled = torch.zeros(len(x_NCHW), dtype=torch.bool, device=x_NCHW.device)
        self._num_forwards = torch.full_like(self._is_fooled, num_forwards, dtype=torch.int64)
        self._num_backwards = torch.zeros_like(self._num_forwards)

    def standing(self) -> Tensor:
        """Samples that no row has fooled yet, int64."""
        return (~self._is_fooled).nonzero()[:, 0]

    def add(self, owner_R: Tensor, found: SearchResult) -> None:
        """Take in what was found for the rows of these samples."""
        self._num_forwards.index_add_(0, owner_R, found.num_forwards_N)
        self._num_backwards.index_add_(0, owner_R, found.num_backwards_N)
        fooled_R = found.is_fooled_N
        # Last target first, so that of several the nearest stays.
        places = fooled_R.nonzero()[:, 0].flip(0)
        for place in places.tolist():
            self._x_adv[owner_R[place]] = found.x_adv_NCHW[place]
        self._is_fooled[owner_R[fooled_R]] = True

    def result(self) -> SearchResult:
        """One result per sample."""
        return SearchResult(
            x_adv_NCHW=self._x_adv,
            is_fooled_N=self._is_fooled,
            num_forwards_N=self._num_forwards,
            num_backwards_N=self._num_backwards,
        )
