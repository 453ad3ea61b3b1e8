"""Adversarial images of other models, tried on this one; it needs no gradient of its own.

N samples, M of them standing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from compressor.attacks.draws import Draws
from compressor.attacks.protocol import Model
from compressor.attacks.search import Judge, Search, SearchResult, by_logits, fooled_rows
from compressor.attacks.targeted import Total
from compressor.threat import ThreatModel


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """`attack` searches on each source in turn; what fools is decided on the model itself.

    Source: Papernot et al., "Transferability in machine learning: from phenomena to black-box
    attacks using adversarial samples", 2016. Where a point fools the source but not the model, the
    search on the source goes on, so that stronger images are tried than the first one.
    """

    attack: Search
    sources: Sequence[Model] = field(repr=False)
    """Differentiable models of the same classes, in eval mode."""

    @property
    def threat(self) -> ThreatModel:
        """That of the attack."""
        return self.attack.threat

    def search(
        self, model: Model, x_NCHW: Tensor, y_N: Tensor, *, draws: Draws, judge: Judge = by_logits
    ) -> SearchResult:
        """See `compressor.attacks.search.Search`; passes are those through the sources."""

        def judge_on_model(x_MCHW: Tensor, logits_MK: Tensor, y_M: Tensor) -> Tensor:
            del logits_MK  # the source's
            with torch.no_grad():
                return fooled_rows(judge, x_MCHW, model(x_MCHW), y_M)

        total = Total(x_NCHW, num_forwards=0)
        for number, source in enumerate(self.sources):
            standing = total.standing()
            if not len(standing):
                break
            numbers = torch.full_like(standing, number)
            found = self.attack.search(
                source,
                x_NCHW[standing],
                y_N[standing],
                draws=draws.branch(standing, numbers),
                judge=judge_on_model,
            )
            total.add(standing, found)
        return total.result()
