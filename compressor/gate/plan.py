"""How many images a gate will need, before any of them is attacked.

Exact: binomial sums instead of normal approximations, and the very bounds that will decide.
Needs no torch.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from compressor.gate.policy import GatePolicy
from compressor.gate.questions import accuracy_questions, class_questions
from compressor.gate.sequential import Look, decide
from compressor.proportions import Proportion, beta_cdf
from compressor.reports.report import RobustnessReport

POWER = 0.9
MARGIN = 0.05
"""Assumed distance of an accuracy nobody has measured from its limit; half of what is left to 1 if
that is less."""
CHUNK_SIZE = 50
"""Images between two looks of the sequential gate: fewer are attacked more slowly, more are decided
on later. Averages are planned with a twentieth of the planned images if that is more."""
MAX_IMAGES = 1_000_000
_NEGLIGIBLE = 1e-12  # probability of counts that are no longer followed

UNBROKEN_CALLS = (7_852, 1_910)
"""Forward and backward passes that AutoAttack spends on an image that nothing breaks."""
_FIRST_ATTACK_CALLS = (102, 101)


@dataclass(frozen=True, kw_only=True)
class RulePlan:
    """What one rule on an accuracy needs."""

    rule: str
    limit: float
    assumed_accuracy: float
    num_fixed: int | None
    """So many images or more show it with a power of 90 %, if the assumption is true; None where
    no number does, as the assumption is too close to the limit or misses it."""
    num_planned: int | None
    """As `num_fixed`, for the sequential gate, which may look all the time."""
    average_if_assumed: float | None = None
    """Images that the sequential gate attacks on average, if the assumption is true,"""
    average_at_limit: float | None = None
    """if the accuracy is just the limit,"""
    average_if_clear: float | None = None
    """and if it is twice as far above the limit as is assumed."""


@dataclass(frozen=True, kw_only=True)
class ImageCost:
    """What an image costs on average."""

    num_forwards: float
    num_backwards: float
    duration_seconds: float | None
    source: str
    """Where the numbers are from."""


@dataclass(frozen=True, kw_only=True)
class Boundary:
    """What ends the sequential gate after `num_images`: counts of correct images."""

    num_images: int
    pass_from: int
    """This many or more pass; more than `num_images` where none do."""
    stop_up_to: int
    """This many or fewer end it without a pass; -1 where none do."""


def plan_rules(
    policy: GatePolicy, *, report: RobustnessReport | None, assumed_accuracy: float | None
) -> list[RulePlan]:
    """One plan a rule on an accuracy; the assumption is what the report measured, if it did.

    A rule on classes needs its number of images of each class; the weakest class counts.

    Args:
        policy: the rules.
        report: of an earlier verification.
        assumed_accuracy: of what is not measured; None: a little above each limit, see `MARGIN`.
    """

    def assumed(limit: float) -> float:
        if assumed_accuracy is not None:
            return assumed_accuracy
        return min(limit + MARGIN, (1 + limit) / 2)

    if report is None:
        return [
            plan_rule(rule, limit=limit, accuracy=assumed(limit), confidence=policy.confidence)
            for rule, limit in _limits(policy)
        ]
    plans = []
    for question in accuracy_questions(report, policy):
        accuracy = question.count.fraction if question.count else assumed(question.limit)
        plans.append(
            plan_rule(
                question.rule,
                limit=question.limit,
                accuracy=accuracy,
                confidence=policy.confidence,
            )
        )
    for questions in class_questions(report, policy):
        limit = questions[0].limit
        accuracy = min(q.count.fraction if q.count else assumed(limit) for q in questions)
        fixed = images_for_power(limit=limit, accuracy=accuracy, confidence=policy.confidence)
        plans.append(
            RulePlan(
                rule=f"{questions[0].rule}, {len(questions)} classes",
                limit=limit,
                assumed_accuracy=accuracy,
                num_fixed=fixed and fixed * len(questions),
                num_planned=None,
            )
        )
    return plans


def plan_rule(rule: str, *, limit: float, accuracy: float, confidence: float) -> RulePlan:
    """What one rule needs, if `accuracy` is the true one."""
    fixed = images_for_power(limit=limit, accuracy=accuracy, confidence=confidence)
    planned = images_for_power(limit=limit, accuracy=accuracy, confidence=(1 + confidence) / 2)
    averages: list[float | None] = [None, None, None]
    if planned is not None:
        ends = boundaries(limit=limit, confidence=confidence, num_planned=planned)
        clear = min(1.0, 2 * accuracy - limit)
        averages = [average_images(ends, accuracy=p) for p in (accuracy, limit, clear)]
    return RulePlan(
        rule=rule,
        limit=limit,
        assumed_accuracy=accuracy,
        num_fixed=fixed,
        num_planned=planned,
        average_if_assumed=averages[0],
        average_at_limit=averages[1],
        average_if_clear=averages[2],
    )


def images_for_power(
    *, limit: float, accuracy: float, confidence: float, power: float = POWER
) -> int | None:
    """The number of images from which on the fixed gate passes with `power`; None above a million.

    Power does not rise evenly: it falls whenever an image more brings a correct image more to be
    required. The number is that from which on it is nowhere below `power`.
    """

    def first_with(num_required: int) -> int:
        return _first_that_requires(num_required, limit=limit, confidence=confidence)

    def is_enough(num_required: int) -> bool:
        n = first_with(num_required)
        if n > MAX_IMAGES:
            return True
        if _tail(num_required, n, limit) > 1 - confidence:
            return False  # so few images do not pass even if all are correct
        while first_with(num_required + 1) == n + 1:  # down to where power is lowest
            num_required, n = num_required + 1, n + 1
        return _tail(num_required, n, accuracy) >= power

    n = first_with(first_true(is_enough, start=1))
    return n if n <= MAX_IMAGES else None


def boundaries(
    *, limit: float, confidence: float, num_planned: int, chunk_size: int | None = None
) -> list[Boundary]:
    """When the sequential gate ends, after each chunk, according to `sequential.decide`."""

    def verdict(num_correct: int, num_images: int) -> str:
        count = Proportion(num_correct=num_correct, num_total=num_images)
        look = Look(rule="", limit=limit, count=count, num_planned=num_planned)
        return decide([look], confidence=confidence).verdict

    size = chunk_size or max(CHUNK_SIZE, math.ceil(num_planned / 20))
    found, stop_up_to = [], -1
    for num_images in [*range(size, num_planned, size), num_planned]:
        found.append(_boundary(num_images, ends=verdict, stop_up_to=stop_up_to))
        stop_up_to = found[-1].stop_up_to
    return found


def average_images(ends: Sequence[Boundary], *, accuracy: float) -> float:
    """Images that the sequential gate attacks on average, if `accuracy` is the true one."""
    return math.fsum(end.num_images * p for end, p, _ in _endings(ends, accuracy))


def chance_to_pass(ends: Sequence[Boundary], *, accuracy: float) -> float:
    """The probability that the sequential gate passes, if `accuracy` is the true one."""
    return math.fsum(passed for _, _, passed in _endings(ends, accuracy))


def image_cost(report: RobustnessReport | None, *, accuracy: float) -> ImageCost:
    """As the report measured it, or what AutoAttack spends at least at this accuracy."""
    if report is None:
        forwards, backwards = (
            accuracy * unbroken + (1 - accuracy) * first
            for unbroken, first in zip(UNBROKEN_CALLS, _FIRST_ATTACK_CALLS, strict=True)
        )
        return ImageCost(
            num_forwards=forwards,
            num_backwards=backwards,
            duration_seconds=None,
            source="at least, for AutoAttack without early exits",
        )
    num_images = report.clean.num_total
    return ImageCost(
        num_forwards=sum(row.num_forwards for row in report.attacks) / num_images,
        num_backwards=sum(row.num_backwards for row in report.attacks) / num_images,
        duration_seconds=sum(row.duration_seconds for row in report.attacks) / num_images,
        source="as measured by the report",
    )


def first_true(is_true: Callable[[int], bool], *, start: int) -> int:
    """The smallest number from `start` on for which something is true that then stays true."""
    step, low = 1, start - 1
    while not is_true(low + step):
        low, step = low + step, 2 * step
    high = low + step
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_true(middle) else (middle, high)
    return high


def _limits(policy: GatePolicy) -> Iterator[tuple[str, float]]:
    if policy.clean is not None:
        yield "clean.min_accuracy", policy.clean.min_accuracy
    if policy.worst_case is not None:
        yield "worst_case.min_accuracy", policy.worst_case.min_accuracy
    for name, rule in policy.attacks.items():
        yield f"attacks.{name}.min_accuracy", rule.min_accuracy


def _first_that_requires(num_required: int, *, limit: float, confidence: float) -> int:
    """The smallest number of images for which one correct image less does not pass."""

    def is_too_few(num_images: int) -> bool:
        if num_images > MAX_IMAGES or num_required == 1:
            return True
        return _tail(num_required - 1, num_images, limit) > 1 - confidence

    return first_true(is_too_few, start=num_required)


def _tail(num_correct: int, num_images: int, accuracy: float) -> float:
    """P(at least so many correct)."""
    return beta_cdf(accuracy, a=num_correct, b=num_images - num_correct + 1)


def _boundary(num_images: int, *, ends: Callable[[int, int], str], stop_up_to: int) -> Boundary:
    """`ends` is a verdict on counts; no fewer correct images stop it than stopped it before."""
    stop = -1 + first_true(
        lambda k: k > num_images or ends(k, num_images) in {"undecided", "pass"},
        start=stop_up_to + 1,
    )
    pass_from = first_true(
        lambda k: k > num_images or ends(k, num_images) == "pass", start=stop + 1
    )
    return Boundary(num_images=num_images, pass_from=pass_from, stop_up_to=stop)


def _endings(ends: Sequence[Boundary], accuracy: float) -> Iterator[tuple[Boundary, float, float]]:
    """(boundary, P(it ends there), P(it passes there)), by following all counts at once."""
    going, before = {0: 1.0}, 0
    for end in ends:
        step = _binomial(end.num_images - before, accuracy)
        reached: dict[int, float] = {}
        for k, p in going.items():
            for more, q in step:
                reached[k + more] = reached.get(k + more, 0.0) + p * q
        passed = math.fsum(p for k, p in reached.items() if k >= end.pass_from)
        stopped = math.fsum(p for k, p in reached.items() if k <= end.stop_up_to)
        yield end, passed + stopped, passed
        going = {
            k: p
            for k, p in reached.items()
            if end.stop_up_to < k < end.pass_from and p > _NEGLIGIBLE
        }
        before = end.num_images


def _binomial(num_images: int, accuracy: float) -> list[tuple[int, float]]:
    """(count, probability) of all counts that are not negligible."""
    if accuracy in {0.0, 1.0}:
        return [(round(accuracy * num_images), 1.0)]
    log_p, log_q = math.log(accuracy), math.log1p(-accuracy)
    pairs = []
    for k in range(num_images + 1):
        log_ways = math.lgamma(num_images + 1) - math.lgamma(k + 1)
        log_ways -= math.lgamma(num_images - k + 1)
        probability = math.exp(log_ways + k * log_p + (num_images - k) * log_q)
        if probability > _NEGLIGIBLE:
            pairs.append((k, probability))
    return pairs
