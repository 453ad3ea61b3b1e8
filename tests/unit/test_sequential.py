"""Bounds that hold at every moment: exact error rates, and decisions that cannot be regretted."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressor.gate.plan import boundaries, chance_to_pass
from compressor.gate.sequential import (
    Look,
    anytime_lower_bound,
    decide,
    early_look,
    judge_look,
    last_look,
    log_e_value,
    upper_bound,
)
from compressor.proportions import Proportion

ALPHA = 0.05
LIMITS = [0.02, 0.25, 0.45, 0.5, 0.9]


def count(num_correct, num_total):
    return Proportion(num_correct=num_correct, num_total=num_total)


def look(num_correct, num_total, *, planned, limit=0.45, **changes):
    return Look(
        rule="worst_case",
        limit=limit,
        count=count(num_correct, num_total),
        num_planned=planned,
        **changes,
    )


def verdict(*looks, confidence=0.95):
    return decide(looks, confidence=confidence).verdict


def chance_to_reach(is_reached, *, accuracy, num_images):
    """P(a count that is reached, at any moment), by following every count exactly."""
    going, reached = {0: 1.0}, 0.0
    for n in range(1, num_images + 1):
        following = {}
        for k, p in going.items():
            following[k] = following.get(k, 0.0) + p * (1 - accuracy)
            following[k + 1] = following.get(k + 1, 0.0) + p * accuracy
        reached += sum(p for k, p in following.items() if is_reached(k, n))
        going = {k: p for k, p in following.items() if not is_reached(k, n)}
    return reached


# The evidence


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("below", [1.0, 0.9, 0.2])
def test_evidence_is_a_supermartingale_at_and_below_the_limit(limit, below):
    p = limit * below
    for k, n in [(1, 1), (0, 1), (3, 5), (40, 80), (80, 80), (0, 80)]:
        now = math.exp(log_e_value(count(k, n), limit=limit))
        more, same = (math.exp(log_e_value(count(k + i, n + 1), limit=limit)) for i in (1, 0))
        assert p * more + (1 - p) * same <= now * (1 + 1e-12)


@pytest.mark.parametrize("limit", LIMITS)
def test_evidence_is_worth_one_on_average_at_the_start(limit):
    one, none = (math.exp(log_e_value(count(k, 1), limit=limit)) for k in (1, 0))
    assert limit * one + (1 - limit) * none == pytest.approx(1)


@given(st.integers(1, 300), st.data(), st.floats(0.01, 0.98), st.floats(0.001, 0.01))
def test_evidence_falls_as_the_limit_rises(n, data, limit, more):
    k = data.draw(st.integers(0, n))
    assert log_e_value(count(k, n), limit=limit) >= log_e_value(count(k, n), limit=limit + more)


# Bounds


@given(st.integers(1, 3_000), st.data(), st.sampled_from([0.8, 0.95, 0.999]))
def test_anytime_lower_bound_solves_its_equation(n, data, confidence):
    k = data.draw(st.integers(0, n))
    bound = anytime_lower_bound(count(k, n), confidence)
    enough = -math.log(1 - confidence)
    assert 0 <= bound <= k / n
    assert log_e_value(count(k, n), limit=bound + 1e-9) < enough
    if bound > 0:
        assert log_e_value(count(k, n), limit=bound) >= enough - 1e-9


@given(st.integers(1, 3_000), st.data(), st.sampled_from([0.8, 0.95, 0.999]))
def test_looking_often_is_never_sharper_than_looking_once(n, data, confidence):
    proportion = count(data.draw(st.integers(0, n)), n)
    once = proportion.lower_bound(confidence)
    assert early_look(proportion, confidence) <= last_look(proportion, confidence) <= once + 1e-11


def test_the_permitted_error_is_halved_between_early_looks_and_the_last():
    proportion = count(80, 100)
    early, late = (look(proportion, 0.95) for look in (early_look, last_look))
    assert early == anytime_lower_bound(proportion, 0.975)
    assert late == proportion.lower_bound(0.975) > early


def test_bounds_of_nothing_and_of_one_image():
    assert anytime_lower_bound(count(0, 500), 0.95) == 0
    assert early_look(count(1, 1), 0.95) == 0
    assert last_look(count(1, 1), 0.95) == pytest.approx(0.025)


@pytest.mark.parametrize("bound", [Proportion.lower_bound, early_look, last_look])
def test_upper_bound_is_the_mirror(bound):
    assert upper_bound(bound, count(30, 100), 0.95) == 1 - bound(count(70, 100), 0.95)
    assert upper_bound(Proportion.lower_bound, count(3, 7), 0.9) == pytest.approx(
        count(3, 7).upper_bound(0.9)
    )


@pytest.mark.parametrize("accuracy", [0.05, 0.45, 0.9])
def test_an_anytime_bound_is_wrong_at_some_moment_in_at_most_5_percent_exactly(accuracy):
    bounds = {}

    def is_wrong(k, n):
        if (k, n) not in bounds:
            enough = -math.log(ALPHA)
            bounds[k, n] = k > accuracy * n and log_e_value(count(k, n), limit=accuracy) >= enough
        return bounds[k, n]

    wrong = chance_to_reach(is_wrong, accuracy=accuracy, num_images=250)
    assert ALPHA / 8 < wrong <= ALPHA


# Error rates of the whole gate, exactly


@pytest.mark.parametrize("limit", [0.25, 0.45, 0.9])
@pytest.mark.parametrize(("num_planned", "chunk_size"), [(1, 1), (30, 1), (60, 7), (300, 25)])
def test_false_passes_stay_within_the_permitted_error(limit, num_planned, chunk_size):
    ends = boundaries(
        limit=limit, confidence=1 - ALPHA, num_planned=num_planned, chunk_size=chunk_size
    )
    for accuracy in (limit, 0.97 * limit, 0.5 * limit):
        assert chance_to_pass(ends, accuracy=accuracy) <= ALPHA
    at_limit = chance_to_pass(ends, accuracy=limit)
    assert num_planned < 60 or at_limit > ALPHA / 5  # it does use what it may


def test_repeating_the_test_for_one_look_would_not():
    """So the test above can fail: this is the mistake it is there for."""

    def is_passed(k, n):
        return n % 7 == 0 and count(k, n).lower_bound(1 - ALPHA) >= 0.45

    assert chance_to_reach(is_passed, accuracy=0.45, num_images=63) > 1.5 * ALPHA


@pytest.mark.parametrize("limit", [0.25, 0.45])
def test_false_fails_stay_within_the_permitted_error(limit):
    verdicts = {}

    def is_failed(k, n):
        if (k, n) not in verdicts:
            verdicts[k, n] = n % 5 == 0 and verdict(look(k, n, planned=60, limit=limit)) == "fail"
        return verdicts[k, n]

    assert 0 < chance_to_reach(is_failed, accuracy=limit, num_images=60) <= ALPHA


# Decisions


@pytest.mark.parametrize(
    ("num_correct", "num_total", "planned", "expected"),
    [
        (1, 1, 1, "inconclusive"),
        (0, 1, 1, "inconclusive"),
        (1, 1, 100, "undecided"),
        (60, 60, 100, "pass"),
        (0, 20, 1_000, "fail"),
        (45, 100, 1_000, "undecided"),
        (450, 1_000, 1_000, "inconclusive"),
        (490, 1_000, 1_000, "pass"),
        (410, 1_000, 1_000, "fail"),
    ],
)
def test_decide(num_correct, num_total, planned, expected):
    assert verdict(look(num_correct, num_total, planned=planned)) == expected


def test_one_image_can_pass_a_low_limit_and_fail_a_high_one():
    assert verdict(look(1, 1, planned=1, limit=0.02)) == "pass"
    assert verdict(look(0, 1, planned=1, limit=0.98)) == "fail"


def test_certain_ends_cannot_be_regretted():
    """Wherever it ends without a pass for good, no continuation passes; nor does a pass vanish."""
    planned, limit = 12, 0.4
    final = {k: verdict(look(k, planned, planned=planned, limit=limit)) for k in range(planned + 1)}
    seen = set()
    for n, k in itertools.product(range(1, planned), range(planned)):
        if k > n:
            continue
        now = verdict(look(k, n, planned=planned, limit=limit))
        later = {final[k + more] for more in range(planned - n + 1)}
        seen.add(now)
        if now == "inconclusive":
            assert "pass" not in later
        if now == "undecided":
            assert "pass" in later
    assert seen == {"pass", "fail", "inconclusive", "undecided"}


def test_the_end_comes_at_once_when_a_pass_is_out_of_reach():
    """The last image that leaves a chance, and the one after it."""
    planned, limit = 200, 0.45
    needed = next(k for k in range(201) if verdict(look(k, 200, planned=200)) == "pass")
    num_broken = planned - needed
    ahead = {"planned": planned, "limit": limit}
    assert verdict(look(60, 60 + num_broken, **ahead)) == "undecided"
    assert verdict(look(60, 61 + num_broken, **ahead)) == "inconclusive"
    reason = decide([look(60, 61 + num_broken, **ahead)], confidence=0.95).reason
    assert f"at best {100 * (needed - 1) / 200:.2f} % ({needed - 1} of 200) will stand" in reason


def test_all_rules_must_pass_and_one_that_fails_ends_it():
    good, bad = look(90, 100, planned=200), look(2, 100, planned=200)
    open_ = look(50, 100, planned=200)
    results = {
        "".join(name for name, _ in some): verdict(*(one for _, one in some))
        for size in (1, 2)
        for some in itertools.combinations([("g", good), ("b", bad), ("o", open_)], size)
    }
    assert results == {
        "g": "pass",
        "b": "fail",
        "o": "undecided",
        "gb": "fail",
        "go": "undecided",
        "bo": "fail",
    }


def test_decision_names_the_rules_and_carries_their_bounds():
    decision = decide([look(2, 100, planned=200)], confidence=0.95)
    assert decision.reason == "worst_case failed"
    (judged,) = decision.judged
    assert judged.lower < 0.02 < judged.upper < 0.45


def test_rules_of_a_kind_fail_with_their_share_but_pass_with_all():
    alone, one_of_ten = (look(34, 100, planned=100, num_alike=n) for n in (1, 10))
    judged = [
        judge_look(one, confidence=0.95, lower_bound=Proportion.lower_bound)
        for one in (alone, one_of_ten)
    ]
    assert [one.verdict for one in judged] == ["fail", "inconclusive"]
    assert judged[0].lower == judged[1].lower
    assert judged[1].upper == pytest.approx(count(34, 100).upper_bound(0.995))


def test_judge_look_compares_the_bound_and_not_the_estimate():
    for k, expected in ((460, "inconclusive"), (476, "inconclusive"), (477, "pass")):
        judged = judge_look(
            look(k, 1_000, planned=1_000), confidence=0.95, lower_bound=Proportion.lower_bound
        )
        assert judged.verdict == expected
        assert judged.lower == count(k, 1_000).lower_bound(0.95)


def test_before_the_end_the_upper_bound_is_also_that_of_the_best_that_can_come():
    judged = judge_look(look(0, 90, planned=100), confidence=0.95, lower_bound=early_look)
    assert judged.upper <= upper_bound(last_look, count(10, 100), 0.95)


def test_decision_is_a_function_of_the_counts():
    first, second = (decide([look(50, 100, planned=200)], confidence=0.95) for _ in range(2))
    assert first == second


def test_more_images_than_planned_raise():
    with pytest.raises(ValueError, match="more images are done than 10 planned"):
        look(1, 11, planned=10)
