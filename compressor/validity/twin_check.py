"""Whether what fools the differentiable twin of a file fools the file.

A file that answers like its twin on images as they are may still answer otherwise where attacks
look. N images, C channels, H and W pixels, K classes.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compressor.attacks.apgd import APGD
from compressor.attacks.protocol import Model
from compressor.attacks.search import by_logits, never
from compressor.losses import margin
from compressor.reports.report import ValidityRow
from compressor.validity.check import SIGNIFICANCE, Check, binomial_tail
from compressor.validity.claim import Claim, Purpose

NUM_STEPS = 40
MAX_APART = 0.05
"""Tolerated share of the images, all that both answer correctly."""
MIN_FOLLOWED = 0.5
"""Rise of the margin of the file, as a share of that of its twin."""
SLACK = 5
"""Times the median by which the two margins differ on clean images: so much they may differ under
attack, as 8 bits round otherwise in the twin. A median, as a few images must not buy it."""
MAX_SLACK = 0.1
"""Of the median margin, or a file that differs a little on all images could buy it."""

TWIN_UNDER_ATTACK = Check(
    name="twin_under_attack",
    threshold=f"alarm if more than {100 * MAX_APART:g} % of images, beyond rounding, fool the twin "
    f"and not the file, or raise its margin by less than {100 * MIN_FOLLOWED:g} % of the twin's: "
    f"exact test, p < {100 * SIGNIFICANCE:g} %",
    advice="The file answers like its differentiable twin on the images themselves, and otherwise "
    "where attacks lead, so that attacks on the twin say nothing about the file. Export it again, "
    "and do not trust one that does this.",
)
TWIN_CHECKS = (TWIN_UNDER_ATTACK,)


def twin_checks(claim: Claim) -> list[ValidityRow]:
    """The rows of `TWIN_CHECKS`, on images that both answer correctly; none for a network.

    The points are carried on after they fool the twin, to where its margin is highest: just behind
    the decision border, rounding alone would decide.
    """
    file = claim.file
    if file is None:
        return []
    if not claim.is_twin:
        return [TWIN_UNDER_ATTACK.not_run("the file has no twin; its source was followed instead")]
    of_both = replace(claim.correct(), model=file).correct()
    claim = replace(of_both, model=claim.model)
    if not len(claim.y_N):
        return [TWIN_UNDER_ATTACK.not_run("no image is answered correctly")]
    attack = APGD(threat=claim.threat, objective=margin, num_steps=NUM_STEPS)
    draws = claim.draws(Purpose.TWIN_ATTACK)
    found = attack.search(claim.model, claim.x_NCHW, claim.y_N, draws=draws, judge=never)
    of_twin = _Margins.of(claim.model, claim, found.x_adv_NCHW)
    of_file = _Margins.of(file, claim, found.x_adv_NCHW)
    return [_judge(of_twin, of_file)]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Margins:
    """Of one function; above 0 where it is fooled."""

    clean_N: Tensor
    found_N: Tensor
    is_fooled_N: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, model: Model, claim: Claim, x_adv_NCHW: Tensor) -> "_Margins":
        logits_NK = model(x_adv_NCHW)
        return cls(
            clean_N=margin(model(claim.x_NCHW), claim.y_N),
            found_N=margin(logits_NK, claim.y_N),
            is_fooled_N=by_logits(x_adv_NCHW, logits_NK, claim.y_N),
        )

    def rises(self) -> Tensor:
        return self.found_N - self.clean_N


def _judge(of_twin: _Margins, of_file: _Margins) -> ValidityRow:
    differ = float((of_file.clean_N - of_twin.clean_N).abs().median())
    margins = (float(of.clean_N.abs().median()) for of in (of_file, of_twin))
    slack = min(SLACK * differ, MAX_SLACK * min(margins))
    escapes_N = (of_twin.found_N > slack) & ~of_file.is_fooled_N
    follows_N = of_file.rises() >= MIN_FOLLOWED * of_twin.rises() - slack
    is_apart_N = escapes_N | ~(follows_N | of_file.is_fooled_N)
    num_apart, num_total = int(is_apart_N.sum()), len(is_apart_N)
    p_value = binomial_tail(num_apart, num_total=num_total, probability=MAX_APART)
    found = (
        f"{num_apart} of {num_total} images; {int(of_twin.is_fooled_N.sum())} fool the twin, "
        f"{int((of_twin.is_fooled_N & of_file.is_fooled_N).sum())} of these the file"
    )
    return TWIN_UNDER_ATTACK.judged(found, is_alarm=p_value < SIGNIFICANCE, p_value=p_value)
