"""The fast adaptive boundary attack, targeted: steps along the boundary between two classes.

N rows (an image with one target class), M of them still in the search, K classes, D = C H W.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from compressor.attacks.draws import Draws
from compressor.attacks.fab_projections import project_l2, project_linf
from compressor.attacks.gradients import Evaluation, evaluate
from compressor.attacks.protocol import Model
from compressor.attacks.search import Judge, SearchResult, by_logits
from compressor.threat import Norm, ThreatModel

_PROJECTIONS: Mapping[Norm, Callable[[Tensor, Tensor, Tensor], Tensor]] = MappingProxyType(
    {"linf": project_linf, "l2": project_l2}
)
_SHORTEST = 1e-8  # keeps the ratio of two lengths defined; the value of the released code


@dataclass(frozen=True, kw_only=True)
class FAB:
    """Looks for the nearest image on the other side of a boundary that it takes as flat.

    Source: Croce and Hein, "Minimally distorted adversarial examples with a fast adaptive
    boundary attack", ICML 2020, algorithm 1, with the targets of Croce and Hein, "Reliable
    evaluation of adversarial robustness with an ensemble of diverse parameter-free attacks",
    ICML 2020. It starts at the image itself and has no restarts, as in standard AutoAttack.

    As in the released code a step is one forward and backward pass for the gradient and one
    forward pass for the label of the new point. Reading that label from the next gradient's
    pass saves nothing: `eta` takes most points across the boundary, and the gradient is then
    wanted somewhere else.

    Deviations from the released code: `stops_at_epsilon`; only points within epsilon are offered
    to the judge, as no others are returned; an answer that is not finite is a wrong one, and a
    gradient that is not finite counts as 0; `fab_projections` has one more.
    """

    threat: ThreatModel
    num_steps: int = 100
    alpha_max: float = 0.1
    """Largest share of the projection of the original image in a step."""
    eta: float = 1.05
    """How far a step goes, 1 being onto the linearised boundary."""
    beta: float = 0.9
    """Share of the change that is kept after a step to a wrong answer."""
    stops_at_epsilon: bool = True
    """Rows leave when their owner is fooled; else all steps are spent on a shorter change."""

    @torch.no_grad()
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
        """Push every row towards its target class; any wrong answer within epsilon counts.

        Args:
            model: the function under attack, in eval mode.
            x_NCHW: float images in [0, 1] that the model gets right; not changed.
            pairs_N2: label and target class of each row, int64.
            owner_N: which image a row is of, int64; rows of one owner leave together.
            draws: not used, as nothing is random.
            judge: decides what counts as fooled. It is asked about points within epsilon, nearer
                than the row's last, that the search's own logits get wrong. Those that it refuses
                are not returned, and the search goes on from them as from any wrong answer.

        Returns:
            For each row the nearest point found, or the image itself.
        """
        del draws
        x_adv_NCHW = x_NCHW.detach().clone()
        nearest_N = x_NCHW.new_full((len(x_NCHW),), torch.inf)
        num_steps_N = torch.zeros_like(owner_N)
        live_M, point_MCHW = torch.arange(len(x_NCHW), device=x_NCHW.device), x_NCHW
        for _ in range(self.num_steps):
            if len(live_M) == 0:
                break
            num_steps_N[live_M] += 1
            clean_MCHW, pairs_M2 = x_NCHW[live_M], pairs_N2[live_M]
            evaluation = evaluate(model, point_MCHW, pairs_M2, objective=_lead_of_target)
            point_MCHW = self._step(point_MCHW, clean_MCHW, evaluation)
            logits_MK = model(point_MCHW)
            is_wrong_M = by_logits(point_MCHW, logits_MK, pairs_M2[:, 0])

            change_MCHW = point_MCHW - clean_MCHW
            distance_M = self.threat.length(change_MCHW)
            is_near_M = distance_M <= self.threat.epsilon_pixels
            (found,) = (is_wrong_M & is_near_M & (distance_M < nearest_N[live_M])).nonzero().T
            if len(found):
                found = found[judge(point_MCHW[found], logits_MK[found], pairs_M2[found, 0])]
                x_adv_NCHW[live_M[found]] = point_MCHW[found]
                nearest_N[live_M[found]] = distance_M[found]

            nearer_MCHW = clean_MCHW + self.beta * change_MCHW
            point_MCHW = torch.where(is_wrong_M.view(-1, 1, 1, 1), nearer_MCHW, point_MCHW)
            if self.stops_at_epsilon and len(found):
                stays_M = ~torch.isin(owner_N[live_M], owner_N[live_M[found]])
                live_M, point_MCHW = live_M[stays_M], point_MCHW[stays_M]
        return SearchResult(
            x_adv_NCHW=x_adv_NCHW,
            is_fooled_N=nearest_N.isfinite(),
            num_forwards_N=2 * num_steps_N,
            num_backwards_N=num_steps_N,
        )

    def _step(self, point_MCHW: Tensor, clean_MCHW: Tensor, evaluation: Evaluation) -> Tensor:
        """Over the linearised boundary, with a bias towards the original image."""
        point_MD, clean_MD = point_MCHW.flatten(1), clean_MCHW.flatten(1)
        w_MD = evaluation.gradient_NCHW.flatten(1).nan_to_num(nan=0, posinf=0, neginf=0)
        lead_M = evaluation.values_N.to(w_MD.dtype).nan_to_num(nan=0, posinf=0, neginf=0)
        b_M = (w_MD * point_MD).sum(dim=1) - lead_M
        project = _PROJECTIONS[self.threat.norm]
        from_point_MD = project(point_MD, w_MD, b_M)
        from_clean_MD = project(clean_MD, w_MD, b_M)
        length_M = self.threat.length(from_point_MD).clamp(min=_SHORTEST)
        clean_length_M = self.threat.length(from_clean_MD).clamp(min=_SHORTEST)
        alpha_M1 = (length_M / (length_M + clean_length_M)).clamp(max=self.alpha_max)[:, None]
        next_MD = (1 - alpha_M1) * (point_MD + self.eta * from_point_MD)
        next_MD = next_MD + alpha_M1 * (clean_MD + self.eta * from_clean_MD)
        return next_MD.clamp(0, 1).view_as(point_MCHW)


def _lead_of_target(logits_NK: Tensor, pairs_N2: Tensor) -> Tensor:
    """Logit of the target minus logit of the label, [N]; 0 on the boundary between the two."""
    label_target_N2 = logits_NK.gather(1, pairs_N2)
    return label_target_N2[:, 1] - label_target_N2[:, 0]
