"""An attack with a fixed number of steps as a search: only its last point counts."""

from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.attacks.draws import Draws, KeyedDraws
from compressor.attacks.protocol import Attack, Model
from compressor.attacks.search import Judge, SearchResult, Tally, by_logits
from compressor.threat import ThreatModel


@dataclass(frozen=True, kw_only=True)
class FixedAttack:
    """`attack`, then one pass that says which of its images fool."""

    attack: Attack

    @property
    def threat(self) -> ThreatModel:
        """That of the attack."""
        return self.attack.threat

    def search(
        self, model: Model, x_NCHW: Tensor, y_N: Tensor, *, draws: Draws, judge: Judge = by_logits
    ) -> SearchResult:
        """See `compressor.attacks.search.Search`; draws by the keys of the samples.

        Raises:
            TypeError: if the draws have no keys.
        """
        if not isinstance(draws, KeyedDraws):
            raise TypeError(f"attacks of fixed length draw by keys, not from {draws}")
        counting = _Counting(model)
        x_adv = self.attack(counting, x_NCHW, y_N, keys_N=draws.keys_N)
        tally = Tally(x_NCHW, y_N, judge)
        with torch.no_grad():
            tally.note(x_adv, model(x_adv), has_gradient=False)
        tally.offer_best(x_adv)
        return tally.result(extra_passes=counting.num_calls)


class _Counting:
    def __init__(self, model: Model) -> None:
        self._model, self.num_calls = model, 0

    def __call__(self, x_NCHW: Tensor) -> Tensor:
        self.num_calls += 1
        return self._model(x_NCHW)
