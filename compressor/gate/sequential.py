"""Bounds that hold however often one looks, and the decision while images are being attacked.

Testing again after every chunk of images with a bound that was made for one look passes bad
models far too often. Here a limit p0 is tested with a bet against it: for a shift s > 0 of the
log odds, exp(s k) / (1 - p0 + p0 exp(s))^n, after k correct images of n, is the likelihood ratio
of an accuracy above p0, and a supermartingale for every accuracy of p0 or less. So is the mean
over several shifts. By Ville's inequality it ever reaches 1/alpha with a chance of at most alpha:
stopping there is a test of level alpha whenever, and for whatever reason, one stops.

Sources: Ville, Etude critique de la notion de collectif, 1939; Robbins, Statistical methods
related to the law of the iterated logarithm, Annals of Mathematical Statistics 41, 1970 (the
mixture); Waudby-Smith and Ramdas, Estimating means of bounded random variables by betting, JRSS-B
86, 2024. Ours: a mixture of five fixed shifts, because it is exact, monotone in p0 and short; and
a last look, to which half of the permitted error is given. `docs/results/gate-designs.md` has
what other choices would cost.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from compressor.proportions import Proportion

LowerBound = Callable[[Proportion, float], float]
"""(count, confidence) -> the one-sided lower bound of what the count estimates.

`Proportion.lower_bound` for one look at a number of images that was fixed before, `early_look` at
any moment, `last_look` after the planned number where earlier looks could have ended it."""

Verdict = Literal["pass", "fail", "inconclusive"]
Ending = Literal["pass", "fail", "inconclusive", "undecided"]
"""`undecided`: more of the planned images may decide."""

_LOG_ODDS_SHIFTS = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0)


def log_e_value(count: Proportion, *, limit: float) -> float:
    """Log of the evidence against "the accuracy is `limit` or less", `limit` in (0, 1)."""
    logs = [
        shift * count.num_correct - count.num_total * math.log1p(limit * math.expm1(shift))
        for shift in _LOG_ODDS_SHIFTS
    ]
    largest = max(logs)
    return largest + math.log(math.fsum(math.exp(x - largest) for x in logs) / len(logs))


def anytime_lower_bound(count: Proportion, confidence: float) -> float:
    """The smallest accuracy that the evidence has not refuted, to 1e-12 and never above it.

    At no moment of a run does it exceed the true accuracy, with a probability of `confidence`.
    """
    low, high = 0.0, count.fraction
    while high - low > 1e-12:
        middle = (low + high) / 2
        if log_e_value(count, limit=middle) >= -math.log1p(-confidence):
            low = middle
        else:
            high = middle
    return low


def early_look(count: Proportion, confidence: float) -> float:
    """A lower bound before the planned number; it spends half of the permitted error."""
    return anytime_lower_bound(count, (1 + confidence) / 2)


def last_look(count: Proportion, confidence: float) -> float:
    """A lower bound at the planned number; Clopper and Pearson have the other half."""
    return max(early_look(count, confidence), count.lower_bound((1 + confidence) / 2))


def upper_bound(lower_bound: LowerBound, count: Proportion, confidence: float) -> float:
    """The mirror of a lower bound: one minus that of the failures."""
    num_failed = count.num_total - count.num_correct
    failures = Proportion(num_correct=num_failed, num_total=count.num_total)
    return 1 - lower_bound(failures, confidence)


@dataclass(frozen=True, kw_only=True)
class Look:
    """One limit on an accuracy, and what is known of that accuracy so far.

    Raises:
        ValueError: if more images were counted than are planned.
    """

    rule: str
    limit: float
    count: Proportion
    """Images that are done: every attack that this accuracy is about has tried them."""
    num_planned: int
    num_alike: int = 1
    """Rules such as this, of which any may fail by chance: each errs with its share (Bonferroni).
    Passing needs no share, as all must pass."""

    def __post_init__(self) -> None:
        """Refuse impossible counts."""
        if self.count.num_total > self.num_planned:
            raise ValueError(f"{self.rule}: more images are done than {self.num_planned} planned")

    @property
    def best(self) -> Proportion:
        """What there will be if every image that is not done stands."""
        num_open = self.num_planned - self.count.num_total
        return Proportion(num_correct=self.count.num_correct + num_open, num_total=self.num_planned)


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A limit compared with both bounds."""

    look: Look
    verdict: Verdict
    lower: float
    upper: float


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What the images so far decide, and the bounds that they show."""

    verdict: Ending
    reason: str
    judged: tuple[Judged, ...]


def judge_look(look: Look, *, confidence: float, lower_bound: LowerBound) -> Judged:
    """Pass if the lower bound reaches the limit, fail if the upper one stays below it.

    Before the planned number the upper bound is also one of what the last look can find, should
    every image that is not done stand: an image only ever goes from standing to broken.
    """
    share = 1 - (1 - confidence) / look.num_alike
    lower = lower_bound(look.count, confidence)
    upper = upper_bound(lower_bound, look.count, share)
    if look.best != look.count:
        upper = min(upper, upper_bound(last_look, look.best, share))
    verdict: Verdict = "inconclusive"
    if lower >= look.limit:
        verdict = "pass"
    elif upper < look.limit:
        verdict = "fail"
    return Judged(look=look, verdict=verdict, lower=lower, upper=upper)


def decide(looks: Sequence[Look], *, confidence: float) -> Decision:
    """Whether to stop after this chunk, for all rules at once; depends on nothing but the counts.

    It passes when all rules pass at the same moment, fails when one fails, and ends inconclusive
    when one cannot pass any more, whatever the images that are not done would show.
    """
    judged = tuple(
        judge_look(look, confidence=confidence, lower_bound=_bound_of(look)) for look in looks
    )
    failed = [one.look for one in judged if one.verdict == "fail"]
    if failed:
        return Decision(verdict="fail", reason=f"{_names(failed)} failed", judged=judged)
    if all(one.verdict == "pass" for one in judged):
        return Decision(verdict="pass", reason="every rule passed", judged=judged)
    hopeless = [look for look in looks if last_look(look.best, confidence) < look.limit]
    if hopeless:
        best = hopeless[0].best
        reason = (
            f"{_names(hopeless)} cannot pass any more: at best {best} will stand, which shows at "
            f"least {100 * last_look(best, confidence):.2f} %"
        )
        return Decision(verdict="inconclusive", reason=reason, judged=judged)
    return Decision(verdict="undecided", reason="more images may decide", judged=judged)


def _bound_of(look: Look) -> LowerBound:
    return last_look if look.count.num_total == look.num_planned else early_look


def _names(looks: Sequence[Look]) -> str:
    return ", ".join(dict.fromkeys(look.rule for look in looks))
