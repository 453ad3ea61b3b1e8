"""Auto-PGD: projected gradient ascent with momentum that chooses its own step size.

Rows of the search, all of length M and shrinking as rows leave; N rows at the start, K classes.
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from compressor.attacks.draws import Draws
from compressor.attacks.gradients import Evaluation, evaluate
from compressor.attacks.protocol import Model, Objective
from compressor.attacks.search import Judge, SearchResult, Tally, by_logits
from compressor.losses import cross_entropy
from compressor.threat import ThreatModel

MOMENTUM = 0.75
"""Weight of the new direction; the rest continues the last move."""
FIRST_WINDOW, WINDOW_SHRINKAGE, LAST_WINDOW = 0.22, 0.03, 0.06
"""Of the number of steps: when the step size is first judged, and how soon again."""


@dataclass(frozen=True, kw_only=True)
class APGD:
    """Raise `objective` from a random start; return to the best point where the step is halved.

    Source: Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of
    diverse parameter-free attacks", ICML 2020, algorithm 1, as released: the first step size is
    twice epsilon, the direction is the sign or the normalised gradient, each iterate is projected
    twice, and the first improvement is counted against a loss of 0.

    `rho` is the share of steps in a window that must improve on the step before.
    `leaves_when_fooled` is ours: a fooled row ends, together with all rows of its owner. Without
    it all steps are made and the last fooling point is returned, as released.
    """

    threat: ThreatModel
    objective: Objective = cross_entropy
    num_steps: int = 100
    rho: float = 0.75
    leaves_when_fooled: bool = True

    def search(
        self,
        model: Model,
        x_NCHW: Tensor,
        y_N: Tensor,
        *,
        draws: Draws,
        judge: Judge = by_logits,
    ) -> SearchResult:
        """See `compressor.attacks.search.Search`; the objective takes the labels."""
        return self._search(model, x_NCHW, y_N, tally=Tally(x_NCHW, y_N, judge), draws=draws)

    def search_targets(
        self,
        model: Model,
        x_NCHW: Tensor,
        pairs_N2: Tensor,
        *,
        owner_N: Tensor,
        draws: Draws,
        judge: Judge = by_logits,
    ) -> SearchResult:
        """As `search` with an objective on (label, target); see `targeted.RowSearch`."""
        tally = Tally(x_NCHW, pairs_N2[:, 0], judge, owner_N=owner_N)
        return self._search(model, x_NCHW, pairs_N2, tally=tally, draws=draws)

    def _search(
        self, model: Model, x_NCHW: Tensor, targets: Tensor, *, tally: "Tally", draws: Draws
    ) -> SearchResult:
        start = self._random_start(x_NCHW, draws)
        first = evaluate(model, start, targets, objective=self.objective)
        tally.note(start, first.logits_NK, has_gradient=True)
        rows = _Rows.begin(x_NCHW, targets, start, first)
        rows = replace(rows, step_size=2 * self.threat.epsilon_pixels * rows.step_size)
        rows = self._leave(rows, tally)
        window, num_in_window = max(int(FIRST_WINDOW * self.num_steps), 1), 0
        for step in range(self.num_steps):
            if not len(rows.x):
                break
            rows = self._move(rows, momentum=1.0 if step == 0 else MOMENTUM)
            found = evaluate(model, rows.point, rows.targets, objective=self.objective)
            tally.note(rows.point, found.logits_NK, has_gradient=True)
            rows = _remember(rows, found)
            num_in_window += 1
            if num_in_window == window:
                rows = self._judge_step(rows, window=window)
                window, num_in_window = self._next_window(window), 0
            rows = self._leave(rows, tally)
        tally.offer_best(rows.best)
        return tally.result()

    def _random_start(self, x_NCHW: Tensor, draws: Draws) -> Tensor:
        """On the sphere of radius epsilon, then cut to [0, 1]."""
        if self.threat.norm == "linf":
            noise = 2 * draws.uniform(x_NCHW.shape[1:]) - 1
        else:
            noise = draws.normal(x_NCHW.shape[1:])
        noise = noise.to(x_NCHW.dtype)
        length = self.threat.length(noise).view(-1, 1, 1, 1) + 1e-12
        return (x_NCHW + self.threat.epsilon_pixels * (noise / length)).clamp(0, 1)

    def _move(self, rows: "_Rows", *, momentum: float) -> "_Rows":
        inertia = rows.point - rows.previous
        stepped = rows.point + rows.step_size * self.threat.steepest(rows.gradient)
        stepped = self.threat.project(stepped, rows.x)
        mixed = rows.point + (stepped - rows.point) * momentum + inertia * (1 - momentum)
        return replace(rows, point=self.threat.project(mixed, rows.x), previous=rows.point)

    def _judge_step(self, rows: "_Rows", *, window: int) -> "_Rows":
        """Halve where too few steps improved, or nothing did since an unhalved judgement."""
        is_oscillating = rows.num_improved <= self.rho * window
        is_stuck = ~rows.was_halved & (rows.best_value_before >= rows.best_value)
        halve = is_oscillating | is_stuck
        wide = halve.view(-1, 1, 1, 1)
        return replace(
            rows,
            step_size=torch.where(wide, rows.step_size / 2, rows.step_size),
            point=torch.where(wide, rows.best, rows.point),
            gradient=torch.where(wide, rows.best_gradient, rows.gradient),
            num_improved=torch.zeros_like(rows.num_improved),
            was_halved=halve,
            best_value_before=rows.best_value,
        )

    def _next_window(self, window: int) -> int:
        shrunk = window - max(int(WINDOW_SHRINKAGE * self.num_steps), 1)
        return max(shrunk, max(int(LAST_WINDOW * self.num_steps), 1))

    def _leave(self, rows: "_Rows", tally: "Tally") -> "_Rows":
        if not self.leaves_when_fooled:
            return rows
        stays = tally.release_fooled()
        return rows if stays is None else rows.select(stays)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Rows:
    """What the search knows of each of its M rows."""

    x: Tensor
    targets: Tensor
    point: Tensor
    previous: Tensor
    gradient: Tensor
    step_size: Tensor
    """[M, 1, 1, 1], in pixel units."""
    best: Tensor
    best_gradient: Tensor
    best_value: Tensor
    best_value_before: Tensor
    """At the last judgement of the step size."""
    value: Tensor
    """Of the step before."""
    num_improved: Tensor
    was_halved: Tensor

    @classmethod
    def begin(cls, x: Tensor, targets: Tensor, start: Tensor, first: Evaluation) -> "_Rows":
        return cls(
            x=x,
            targets=targets,
            point=start,
            previous=start,
            gradient=first.gradient_NCHW,
            step_size=torch.ones_like(x[:, :1, :1, :1]),
            best=start,
            best_gradient=first.gradient_NCHW,
            best_value=first.values_N,
            best_value_before=first.values_N,
            value=torch.zeros_like(first.values_N),
            num_improved=torch.zeros_like(first.values_N),
            was_halved=torch.ones_like(first.values_N, dtype=torch.bool),
        )

    def select(self, rows_M: Tensor) -> "_Rows":
        return _Rows(**{field.name: getattr(self, field.name)[rows_M] for field in fields(self)})


def _remember(rows: _Rows, found: Evaluation) -> _Rows:
    is_better = found.values_N > rows.best_value
    wide = is_better.view(-1, 1, 1, 1)
    return replace(
        rows,
        gradient=found.gradient_NCHW,
        best=torch.where(wide, rows.point, rows.best),
        best_gradient=torch.where(wide, found.gradient_NCHW, rows.best_gradient),
        best_value=torch.where(is_better, found.values_N, rows.best_value),
        value=found.values_N,
        num_improved=rows.num_improved + (found.values_N > rows.value),
    )
