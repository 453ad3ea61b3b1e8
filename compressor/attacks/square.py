"""The Square attack: random search by the margin, which asks a model for nothing but logits.

N samples, M of them still in the search, C channels, K classes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.attacks.draws import Draws
from compressor.attacks.protocol import Model
from compressor.attacks.search import Judge, SearchResult
from compressor.attacks.square_proposals import (
    Window,
    move_change,
    recolour_window,
    tiled_bumps,
    vertical_stripes,
    window_side_pixels,
)
from compressor.losses import margin
from compressor.threat import ThreatModel

_START = {"linf": vertical_stripes, "l2": tiled_bumps}
_NEXT = {"linf": recolour_window, "l2": move_change}


@dataclass(frozen=True, kw_only=True)
class Square:
    """Changes one square at a time and keeps what raises the margin of the best wrong class.

    Source: Andriushchenko et al., "Square Attack: a query-efficient black-box adversarial attack
    via random search", ECCV 2020; parameters of the released AutoAttack. With `seeded_draws` and
    `windows_reach_edge=False` its points are those of the released code. With `KeyedDraws` every
    sample has squares and signs of its own instead of sharing them with its batch.

    Deviations: a sample leaves when the judge says that it is fooled, and goes on if the judge
    refuses what the logits of the search promised; the released code stops at a margin of 0.
    """

    threat: ThreatModel
    num_queries: int = 5000
    p_init: float = 0.8
    """The first squares cover about this fraction of the image."""
    windows_reach_edge: bool = True
    """Whether a square may touch the lower and the right edge, as in the paper. In the released
    code only one as large as the image does."""

    @torch.no_grad()
    def search(
        self, model: Model, x_NCHW: Tensor, y_N: Tensor, *, draws: Draws, judge: Judge
    ) -> SearchResult:
        """See `compressor.attacks.search.Search`.

        `num_forwards_N` counts the start and every query, not what the judge asks for.
        `x_adv_NCHW` is where the judge said yes, else the point of the highest margin.
        """
        rows = _LiveRows(x_NCHW, y_N, draws)
        if rows:
            start = _START[self.threat.norm]
            rows.attempt(model, start(rows.x_MCHW, threat=self.threat, draws=rows.draws), judge)
        for iteration in range(self.num_queries):
            if not rows:
                break
            rows.attempt(model, self._next(rows, iteration), judge)
        return rows.result()

    def _next(self, rows: "_LiveRows", iteration: int) -> Tensor:
        height, width = rows.x_MCHW.shape[2:]
        side = window_side_pixels(
            self.threat.norm,
            iteration=iteration,
            p_init=self.p_init,
            height_pixels=height,
            width_pixels=width,
        )
        window = Window(
            side_pixels=side,
            height_pixels=height,
            width_pixels=width,
            reaches_edge=self.windows_reach_edge,
        )
        return _NEXT[self.threat.norm](
            rows.x_MCHW, rows.best_MCHW, threat=self.threat, window=window, draws=rows.draws
        )


class _LiveRows:
    """The samples that are not fooled yet, and what became of the others."""

    def __init__(self, x_NCHW: Tensor, y_N: Tensor, draws: Draws) -> None:
        self._x_adv_NCHW = x_NCHW.clone()
        self._is_fooled_N = torch.zeros_like(y_N, dtype=torch.bool)
        self._num_forwards_N = torch.zeros_like(y_N, dtype=torch.int64)
        self._num_attempts = 0
        self._index_M = torch.arange(len(y_N), device=y_N.device)
        self.x_MCHW, self._y_M, self.draws = x_NCHW.contiguous(), y_N, draws
        self.best_MCHW = self.x_MCHW.clone()
        self._best_margin_M = torch.full_like(y_N, -torch.inf, dtype=x_NCHW.dtype)

    def __len__(self) -> int:
        return len(self._index_M)

    def attempt(self, model: Model, new_MCHW: Tensor, judge: Judge) -> None:
        """Ask the model about one new point per sample; keep what is better; leave if fooled."""
        logits_MK = model(new_MCHW)
        self._num_attempts += 1
        margin_M = margin(logits_MK, self._y_M).to(new_MCHW.dtype)
        better = (margin_M > self._best_margin_M).nonzero()[:, 0]  # never true of not-a-number
        self.best_MCHW[better] = new_MCHW[better]
        self._best_margin_M[better] = margin_M[better]
        is_candidate_M = (margin_M >= 0) | ~margin_M.isfinite()
        if is_candidate_M.any():
            candidates = is_candidate_M.nonzero()[:, 0]
            verdict = judge(new_MCHW[candidates], logits_MK[candidates], self._y_M[candidates])
            self._leave(candidates[verdict], new_MCHW)

    def _leave(self, rows: Tensor, new_MCHW: Tensor) -> None:
        if not len(rows):
            return
        index = self._index_M[rows]
        self._x_adv_NCHW[index] = new_MCHW[rows]
        self._is_fooled_N[index] = True
        self._num_forwards_N[index] = self._num_attempts
        is_kept_M = torch.ones_like(self._y_M, dtype=torch.bool)
        is_kept_M[rows] = False
        kept = is_kept_M.nonzero()[:, 0]
        self.draws = self.draws.rows(kept)
        self.x_MCHW, self.best_MCHW = self.x_MCHW[kept], self.best_MCHW[kept]
        self._y_M, self._index_M = self._y_M[kept], self._index_M[kept]
        self._best_margin_M = self._best_margin_M[kept]

    def result(self) -> SearchResult:
        """What was found for all samples, once the search is over."""
        self._x_adv_NCHW[self._index_M] = self.best_MCHW
        self._num_forwards_N[self._index_M] = self._num_attempts
        return SearchResult(
            x_adv_NCHW=self._x_adv_NCHW,
            is_fooled_N=self._is_fooled_N,
            num_forwards_N=self._num_forwards_N,
            num_backwards_N=torch.zeros_like(self._num_forwards_N),
        )
