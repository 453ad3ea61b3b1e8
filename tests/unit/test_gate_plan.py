"""The plan: exact powers and averages, and boundaries that are those of `decide`."""

import math
from functools import cache
from itertools import accumulate, product

import pytest

from compressor.gate.plan import (
    MAX_IMAGES,
    average_images,
    boundaries,
    chance_to_pass,
    first_true,
    image_cost,
    images_for_power,
    plan_rule,
    plan_rules,
)
from compressor.gate.policy import GatePolicy
from compressor.gate.sequential import Look, decide
from compressor.proportions import Proportion


def policy(**tables):
    threat = {"norm": "linf", "epsilon": 8 / 255}
    return GatePolicy.model_validate({"schema": 1, "threat": threat} | tables)


@cache
def verdict(num_correct, num_images, *, planned, limit):
    count = Proportion(num_correct=num_correct, num_total=num_images)
    look = Look(rule="", limit=limit, count=count, num_planned=planned)
    return decide([look], confidence=0.95).verdict


def power(num_images, *, limit, accuracy):
    """Of the fixed test, by plain binomial sums."""

    def tails(p):
        """P(at least k), for k from the number of images down to 0."""
        log_ways = [
            math.lgamma(num_images + 1) - math.lgamma(k + 1) - math.lgamma(num_images - k + 1)
            for k in range(num_images, -1, -1)
        ]
        return accumulate(
            math.exp(ways + (num_images - i) * math.log(p) + i * math.log1p(-p))
            for i, ways in enumerate(log_ways)
        )

    pairs = zip(tails(limit), tails(accuracy), strict=True)
    return max((power for error, power in pairs if error <= 0.05), default=0.0)


@pytest.mark.parametrize(
    ("limit", "accuracy"), [(0.45, 0.65), (0.2, 0.5), (0.7, 0.95), (0.3, 0.9), (0.3, 0.99)]
)
def test_so_many_images_or_more_have_the_power_and_fewer_do_not(limit, accuracy):
    enough = images_for_power(limit=limit, accuracy=accuracy, confidence=0.95)
    powers = [power(n, limit=limit, accuracy=accuracy) for n in range(1, enough + 60)]
    assert min(powers[enough - 1 :]) >= 0.9
    assert min(powers[max(0, enough - 6) : enough - 1]) < 0.9


def test_known_size_of_a_margin_of_five_points():
    """865 images have the power; the number here is that from which on all do."""
    assert power(865, limit=0.45, accuracy=0.5) >= 0.9
    assert power(866, limit=0.45, accuracy=0.5) < 0.9
    assert images_for_power(limit=0.45, accuracy=0.5, confidence=0.95) == 890


@pytest.mark.parametrize("accuracy", [0.0, 0.2, 0.45, 0.4501])
def test_no_number_shows_what_is_not_there(accuracy):
    assert images_for_power(limit=0.45, accuracy=accuracy, confidence=0.95) is None
    plan = plan_rule("worst_case", limit=0.45, accuracy=accuracy, confidence=0.95)
    assert (plan.num_fixed, plan.num_planned, plan.average_at_limit) == (None, None, None)
    assert MAX_IMAGES == 1_000_000


@pytest.mark.parametrize(("limit", "planned", "size"), [(0.45, 60, 20), (0.2, 50, 15), (0.9, 7, 3)])
def test_boundaries_are_those_of_decide(limit, planned, size):
    ends = boundaries(limit=limit, confidence=0.95, num_planned=planned, chunk_size=size)
    assert ends[-1].num_images == planned
    for end in ends:
        for k in range(end.num_images + 1):
            expected = verdict(k, end.num_images, planned=planned, limit=limit)
            assert (k >= end.pass_from) == (expected == "pass")
            assert (k <= end.stop_up_to) == (expected in {"fail", "inconclusive"})


@pytest.mark.parametrize("accuracy", [0.0, 0.3, 0.7, 1.0])
def test_average_and_chance_are_those_of_all_sequences(accuracy):
    """Every sequence of 8 answers, played with `decide` itself."""
    limit, planned = 0.3, 8
    ends = boundaries(limit=limit, confidence=0.95, num_planned=planned, chunk_size=2)
    average = chance = 0.0
    for sequence in product((0, 1), repeat=planned):
        weight = math.prod(accuracy if one else 1 - accuracy for one in sequence)
        for n in (2, 4, 6, 8):
            now = verdict(sum(sequence[:n]), n, planned=planned, limit=limit)
            if now != "undecided":
                break
        average += weight * n
        chance += weight * (now == "pass")
    assert average_images(ends, accuracy=accuracy) == pytest.approx(average)
    assert chance_to_pass(ends, accuracy=accuracy) == pytest.approx(chance)


def test_sequential_plan_has_the_power_and_needs_few_where_it_is_clear():
    plan = plan_rule("worst_case", limit=0.45, accuracy=0.6, confidence=0.95)
    ends = boundaries(limit=0.45, confidence=0.95, num_planned=plan.num_planned)
    assert chance_to_pass(ends, accuracy=0.6) >= 0.9
    assert plan.num_fixed < plan.num_planned < 1.4 * plan.num_fixed
    averages = (plan.average_if_clear, plan.average_if_assumed, plan.average_at_limit)
    assert averages[0] < averages[1] < averages[2] <= plan.num_planned


def test_plan_without_an_assumption_is_five_points_above_each_limit():
    """Or half of what is left above it, so that it is never impossible."""
    rules = policy(clean={"min_accuracy": 0.96}, worst_case={"min_accuracy": 0.4})
    plans = plan_rules(rules, report=None, assumed_accuracy=None)
    assert [plan.assumed_accuracy for plan in plans] == pytest.approx([0.98, 0.45])
    assert all(plan.num_fixed is not None for plan in plans)


def test_plan_without_a_report_assumes(make_report):
    rules = policy(clean={"min_accuracy": 0.5}, attacks={"fgsm": {"min_accuracy": 0.3}})
    plans = plan_rules(rules, report=None, assumed_accuracy=0.8)
    assert [(p.rule, p.limit, p.assumed_accuracy) for p in plans] == [
        ("clean.min_accuracy", 0.5, 0.8),
        ("attacks.fgsm.min_accuracy", 0.3, 0.8),
    ]


def test_plan_with_a_report_takes_what_it_measured(make_report):
    rules = policy(
        worst_case={"min_accuracy": 0.3},
        attacks={"square": {"min_accuracy": 0.2}},
        per_class={"min_worst_case_accuracy": 0.1},
    )
    report = make_report((None,) * 24 + ("pgd_sat",) * 16)
    plans = plan_rules(rules, report=report, assumed_accuracy=0.9)
    assert [p.assumed_accuracy for p in plans] == [0.6, 0.9, 0.6]
    one_class = images_for_power(limit=0.1, accuracy=0.6, confidence=0.95)
    assert plans[2].num_fixed == 4 * one_class


def test_cost_is_as_measured_or_what_autoattack_needs_at_least(make_report):
    measured = image_cost(make_report(), accuracy=0.5)
    assert (measured.num_forwards, measured.num_backwards) == (280.0, 140.0)  # 8 + 4 * 5 tried
    assert measured.duration_seconds == pytest.approx(0.75)
    assumed = image_cost(None, accuracy=1.0)
    assert (assumed.num_forwards, assumed.num_backwards) == (7_852, 1_910)
    assert image_cost(None, accuracy=0.0).num_forwards == 102


@pytest.mark.parametrize("answer", [3, 4, 5, 17, 1_000])
def test_first_true(answer):
    asked = []

    def is_true(number):
        asked.append(number)
        return number >= answer

    assert first_true(is_true, start=3) == answer
    assert len(asked) <= 2 * math.log2(answer) + 3
    assert min(asked) >= 3
