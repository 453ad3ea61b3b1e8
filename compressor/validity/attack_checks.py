"""Third tier of the validity checks: whether weaker or longer attacks break what was said to stand.

Every comparison is an exact test on the same images: a challenger wins an image if it alone breaks
it, and the alarm is that it wins more than a tolerated share of all images that both tried.

N images, M of them standing, C channels, H and W pixels, K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compressor.attacks.apgd import APGD
from compressor.attacks.pgd import PGD
from compressor.attacks.search import by_logits, never
from compressor.gate.paired import holm
from compressor.losses import dlr, margin
from compressor.reports.report import ValidityRow
from compressor.validity.check import SIGNIFICANCE, Check, binomial_tail
from compressor.validity.claim import Claim, Purpose
from compressor.validity.origins import Watch, border_points, distinct

NUM_NOISE = 10
"""Random points per image."""
NUM_TRANSFER_STEPS = 40
LONGER = 3
"""Times the steps of the attack."""
NUM_UNCONSTRAINED_STEPS = 40
NEVER, SELDOM, HALF = 0.005, 0.01, 0.5
"""Tolerated shares: of wins that should not be at all, of wins of a longer search, of images."""
MIN_REACHED = 0.8
"""Rise of the margin that the attack must reach, as a share of what a longer search reaches."""


def _threshold(share: float, of_what: str) -> str:
    level = f"{100 * SIGNIFICANCE:g} %"
    return f"alarm if more than {100 * share:g} % {of_what}: exact test, p < {level} after Holm"


NOISE = Check(
    name="noise",
    threshold=_threshold(NEVER, "are broken by noise alone"),
    advice="Random points break images that the white-box attacks could not, so these were not "
    "following useful gradients. Look for hidden gradients or a fault in the attack.",
)
BLACK_BOX = Check(
    name="black_box",
    threshold=_threshold(NEVER, "are broken by Square alone"),
    advice="An attack without gradients breaks images that those with gradients could not: the "
    "gradients are hidden. Attack through a differentiable form of the model.",
)
TRANSFER = Check(
    name="transfer",
    threshold=_threshold(NEVER, "are broken by transferred images alone"),
    advice="Adversarial images made on another network (a teacher, or the source of a file), "
    "without looking at the model, break images that attacks with its gradients could not: the "
    "gradients are hidden.",
)
MORE_SEARCH = Check(
    name="more_search",
    threshold=_threshold(SELDOM, f"are broken only by {LONGER} times the steps and new starts"),
    advice="A longer search from other starts still breaks images, so the attack had not ended its "
    "work. Give it more steps or restarts.",
)
SILENT_SUCCESS = Check(
    name="silent_success",
    threshold=_threshold(NEVER, "are fooled on the way and not in the end"),
    advice="The attack met adversarial images and did not give them back. Return the best point, "
    "not the last one.",
)
CONVERGED = Check(
    name="converged",
    threshold=_threshold(HALF, f"reach less than {100 * MIN_REACHED:g} % of a longer search"),
    advice="A longer search raises the margin far beyond what the attack reached: too few steps, "
    "too small ones, or in a wrong direction.",
)
UNCONSTRAINED = Check(
    name="unconstrained",
    threshold=_threshold(SELDOM, "stand against gradient steps over all of [0, 1]"),
    advice="With no limit on the change every image can be turned into any other, so standing "
    "images show that gradients lead nowhere.",
)
ATTACK_CHECKS = (
    NOISE,
    BLACK_BOX,
    TRANSFER,
    MORE_SEARCH,
    SILENT_SUCCESS,
    CONVERGED,
    UNCONSTRAINED,
)


@dataclass(frozen=True, kw_only=True)
class _Contest:
    """An exact test of a share against what is tolerated."""

    check: Check
    found: str
    num_events: int
    num_total: int
    tolerance: float

    @property
    def p_value(self) -> float:
        return binomial_tail(self.num_events, num_total=self.num_total, probability=self.tolerance)

    def judged(self, adjusted_p_value: float) -> ValidityRow:
        is_alarm = adjusted_p_value < SIGNIFICANCE
        return self.check.judged(self.found, is_alarm=is_alarm, p_value=self.p_value)


def attack_checks(claim: Claim) -> list[ValidityRow]:
    """The rows of `ATTACK_CHECKS`, on images that are right and that white-box attacks tried."""
    claim = claim.correct()
    if not len(claim.y_N):
        return [check.not_run("no image is answered correctly") for check in ATTACK_CHECKS]
    claim = claim.tried()
    if not len(claim.y_N):
        return [check.not_run("transferred images broke all of them") for check in ATTACK_CHECKS]
    outcomes = [*_against_the_white_box(claim), _unconstrained(claim)]
    adjusted = iter(holm([o.p_value for o in outcomes if isinstance(o, _Contest)]))
    return [o.judged(next(adjusted)) if isinstance(o, _Contest) else o for o in outcomes]


def _against_the_white_box(claim: Claim) -> Sequence[_Contest | ValidityRow]:
    checks = ATTACK_CHECKS[:-1]
    if claim.broken_by_white_box_N is None:
        return [check.not_run("the white-box attacks were not run") for check in checks]
    standing = claim.select((~claim.broken_by_white_box_N).nonzero()[:, 0])
    if not len(standing.y_N):
        return [check.not_run("no image stands, so nothing can flatter") for check in checks]
    num_tried = len(claim.y_N)
    longer_M, reached_M = _search_longer(standing)
    return [
        _wins(NOISE, _by_noise(standing), num_tried),
        _black_box(standing, num_tried),
        _transfer(standing, num_tried),
        _wins(MORE_SEARCH, longer_M, num_tried, tolerance=SELDOM),
        *_watched_attack(standing, reached_M, num_tried),
    ]


def _wins(check: Check, is_won_M: Tensor, num_tried: int, *, tolerance: float = NEVER) -> _Contest:
    num_won = int(is_won_M.sum())
    return _Contest(
        check=check,
        found=f"{num_won} of {num_tried} images, {len(is_won_M)} of which stood",
        num_events=num_won,
        num_total=num_tried,
        tolerance=tolerance,
    )


def _by_noise(standing: Claim) -> Tensor:
    draws = standing.draws(Purpose.NOISE)
    points = (border_points(standing.x_NCHW, standing.threat, draws) for _ in range(NUM_NOISE))
    return torch.stack([standing.fooled_by(point) for point in points]).any(dim=0)


def _black_box(standing: Claim, num_tried: int) -> _Contest | ValidityRow:
    if standing.broken_by_square_N is None:
        return BLACK_BOX.not_run("the Square attack was not run")
    return _wins(BLACK_BOX, standing.broken_by_square_N, num_tried)


def _transfer(standing: Claim, num_tried: int) -> _Contest | ValidityRow:
    tried_N = standing.broken_by_transfer_N
    if not standing.teachers and tried_N is None:
        return TRANSFER.not_run("there is no other network that images could come from")
    attack = APGD(threat=standing.threat, objective=margin, num_steps=NUM_TRANSFER_STEPS)
    is_won_M = torch.zeros_like(standing.y_N, dtype=torch.bool) if tried_N is None else tried_N
    for teacher in standing.teachers.values():
        made = attack.search(
            teacher,
            standing.x_NCHW,
            standing.y_N,
            draws=standing.draws(Purpose.TRANSFER),
            judge=never,  # so that points go on to fool the teacher clearly
        )
        is_won_M = is_won_M | standing.fooled_by(made.x_adv_NCHW)
    return _wins(TRANSFER, is_won_M, num_tried)


def _search_longer(standing: Claim) -> tuple[Tensor, Tensor]:
    """Whether a longer search fools each image, bool [M], and the highest margin at its end."""
    is_fooled_M = torch.zeros_like(standing.y_N, dtype=torch.bool)
    reached_M = torch.full_like(standing.x_NCHW[:, 0, 0, 0], -torch.inf)
    searches = ((Purpose.FIRST_SEARCH, dlr), (Purpose.SECOND_SEARCH, margin))
    for purpose, objective in searches:
        attack = APGD(
            threat=standing.threat, objective=objective, num_steps=LONGER * standing.num_steps
        )
        found = attack.search(
            standing.model, standing.x_NCHW, standing.y_N, draws=standing.draws(purpose)
        )
        with torch.no_grad():
            logits_MK = standing.model(found.x_adv_NCHW)
        is_fooled_M |= by_logits(found.x_adv_NCHW, logits_MK, standing.y_N)
        reached_M = torch.maximum(reached_M, margin(logits_MK, standing.y_N))
    return is_fooled_M, reached_M


def _watched_attack(
    standing: Claim, longer_M: Tensor, num_tried: int
) -> list[_Contest | ValidityRow]:
    """Run the attack again, on images far enough apart to know which one it asks about."""
    places = distinct(standing.x_NCHW, standing.threat)
    claim, longer_M = standing.select(places), longer_M[places]
    watch = Watch(claim.model, claim.x_NCHW, claim.y_N, threat=claim.threat)
    draws = claim.draws(Purpose.ATTACK)
    found = claim.attack.search(watch, claim.x_NCHW, claim.y_N, draws=draws, judge=by_logits)
    with torch.no_grad():
        logits_MK = watch(found.x_adv_NCHW)
        clean_M = margin(claim.model(claim.x_NCHW), claim.y_N)
    is_inside_M = claim.threat.contains(found.x_adv_NCHW, claim.x_NCHW)
    is_fooled_M = by_logits(found.x_adv_NCHW, logits_MK, claim.y_N) & is_inside_M
    highest_M = watch.highest_margin_N
    return [
        _wins(SILENT_SUCCESS, (highest_M > 0) & ~is_fooled_M, num_tried),
        _converged(clean_M=clean_M, attack_M=highest_M, longer_M=longer_M),
    ]


def _converged(*, clean_M: Tensor, attack_M: Tensor, longer_M: Tensor) -> _Contest | ValidityRow:
    """A sign test of the median share of the rise, from the highest margin of each.

    The idea is the indicator "incomplete optimisation" of Pintor et al., "Indicators of attack
    failure: debugging and improving optimization of adversarial examples", NeurIPS 2022. Differs
    in that the attack is compared with a longer search and not with its own last steps, which are
    small for any attack that halves its steps.
    """
    stands_M = attack_M <= 0
    if not bool(stands_M.any()):
        return CONVERGED.not_run("no image stands when the attack is run again")
    rise_M = (longer_M - clean_M).clamp(min=torch.finfo(clean_M.dtype).tiny)
    reached_M = ((attack_M - clean_M) / rise_M).clamp(0, 1)[stands_M]
    num_short = int((reached_M < MIN_REACHED).sum())
    return _Contest(
        check=CONVERGED,
        found=f"{num_short} of {len(reached_M)} images reach less, the median reaches "
        f"{100 * float(reached_M.median()):.0f} %",
        num_events=num_short,
        num_total=len(reached_M),
        tolerance=HALF,
    )


def _unconstrained(claim: Claim) -> _Contest:
    """Gradient steps from the clean image; a random start would break most images by itself."""
    diameter = 1.0 if claim.threat.norm == "linf" else claim.x_NCHW[0].numel() ** 0.5
    attack = PGD(
        threat=replace(claim.threat, epsilon_pixels=diameter),
        step_size_pixels=2 * diameter / NUM_UNCONSTRAINED_STEPS,
        num_steps=NUM_UNCONSTRAINED_STEPS,
        start="zero",
        objective=margin,
    )
    x_adv = attack(
        claim.model, claim.x_NCHW, claim.y_N, keys_N=claim.draws(Purpose.UNCONSTRAINED).keys_N
    )
    num_standing, num_total = int((~claim.fooled_by(x_adv)).sum()), len(claim.y_N)
    return _Contest(
        check=UNCONSTRAINED,
        found=f"{num_standing} of {num_total} images stand",
        num_events=num_standing,
        num_total=num_total,
        tolerance=SELDOM,
    )
