"""What a search for adversarial images is given and what it finds.

An `Attack` returns images; the searches here also say which images they have fooled and what
that cost, so that a fooled image can leave at once and the others go on.

N samples, M of them still in the search, K classes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from compressor.attacks.draws import Draws
from compressor.attacks.protocol import Model
from compressor.threat import ThreatModel

Judge = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(images [M, C, H, W], their logits from the search [M, K], labels [M]) -> fooled, bool [M]."""


def by_logits(x_MCHW: Tensor, logits_MK: Tensor, y_M: Tensor) -> Tensor:
    """Fooled where the largest logit is not the label's; no finite answer is no right answer."""
    del x_MCHW
    return (logits_MK.argmax(dim=1) != y_M) | ~logits_MK.amax(dim=1).isfinite()


def never(x_MCHW: Tensor, logits_MK: Tensor, y_M: Tensor) -> Tensor:
    """Nothing counts as fooled, so that a search goes on to its best point."""
    del x_MCHW, logits_MK
    return torch.zeros_like(y_M, dtype=torch.bool)


@dataclass(frozen=True, kw_only=True, eq=False)
class SearchResult:
    """What was found for each sample."""

    x_adv_NCHW: Tensor
    """Images inside the threat model; they fool where `is_fooled_N`."""
    is_fooled_N: Tensor
    """bool [N], by the judge."""
    num_forwards_N: Tensor
    """Times that each sample went through the model, int64 [N]."""
    num_backwards_N: Tensor
    """Times that a gradient was taken back to each sample, int64 [N]."""


class Tally:
    """Keeps account of a search whose rows leave: what fooled, at what cost, who is still in it.

    Args:
        x_NCHW: images of the N rows.
        y_N: their labels.
        judge: decides what counts as fooled; asked only where the search's own logits say so.
        owner_N: rows of one owner leave together; None: each row is its own.
    """

    def __init__(
        self, x_NCHW: Tensor, y_N: Tensor, judge: Judge, *, owner_N: Tensor | None = None
    ) -> None:
        self._x_adv = x_NCHW.clone()
        self._y, self._judge = y_N, judge
        self._live = torch.arange(len(y_N), device=y_N.device)
        self._owner = self._live if owner_N is None else owner_N
        self._is_fooled = torch.zeros_like(y_N, dtype=torch.bool)
        self._num_forwards = torch.zeros_like(y_N)
        self._num_backwards = torch.zeros_like(y_N)

    def live_labels(self) -> Tensor:
        """Labels of the live rows, [M]."""
        return self._y[self._live]

    def note(self, x_MCHW: Tensor, logits_MK: Tensor, *, has_gradient: bool) -> None:
        """The live rows went through the model at these points; keep those that fool."""
        self._num_forwards[self._live] += 1
        if has_gradient:
            self._num_backwards[self._live] += 1
        fooled = fooled_rows(self._judge, x_MCHW, logits_MK, self.live_labels())
        places = self._live[fooled]
        self._is_fooled[places] = True
        self._x_adv[places] = x_MCHW[fooled]

    def release_fooled(self) -> Tensor | None:
        """Rows of fooled owners leave: which of the live rows stay, int64; None if all do."""
        owners = self._owner[self._is_fooled]
        stays = ~torch.isin(self._owner[self._live], owners)
        if bool(stays.all()):
            return None
        rows_M = stays.nonzero()[:, 0]
        self._live = self._live[rows_M]
        return rows_M

    def offer_best(self, best_MCHW: Tensor) -> None:
        """Where a live row fooled nothing, its best point is what there is to show."""
        unfooled = ~self._is_fooled[self._live]
        self._x_adv[self._live[unfooled]] = best_MCHW[unfooled]

    def result(self, *, extra_passes: int = 0) -> "SearchResult":
        """What was found until now.

        Args:
            extra_passes: forwards with a backward of all rows that were not noted.
        """
        return SearchResult(
            x_adv_NCHW=self._x_adv,
            is_fooled_N=self._is_fooled,
            num_forwards_N=self._num_forwards + extra_passes,
            num_backwards_N=self._num_backwards + extra_passes,
        )


def fooled_rows(judge: Judge, x_MCHW: Tensor, logits_MK: Tensor, y_M: Tensor) -> Tensor:
    """Fooled by the search's own logits and, where these say so, by the judge; bool [M]."""
    candidates = by_logits(x_MCHW, logits_MK, y_M)
    if judge is by_logits:
        return candidates
    places = candidates.nonzero()[:, 0]
    if len(places):
        candidates[places] = judge(x_MCHW[places], logits_MK[places], y_M[places])
    return candidates


class Search(Protocol):
    """Looks within `threat` for images that the judge calls fooled; leaves no trace."""

    @property
    def threat(self) -> ThreatModel:
        """What the attacker may do."""

    def search(
        self, model: Model, x_NCHW: Tensor, y_N: Tensor, *, draws: Draws, judge: Judge
    ) -> SearchResult:
        """Search from the images themselves, never from another search's result.

        Args:
            model: the function under attack, in eval mode.
            x_NCHW: float32 images in [0, 1]; not changed.
            y_N: labels, int64.
            draws: the only source of randomness.
            judge: decides what counts as fooled.
        """
