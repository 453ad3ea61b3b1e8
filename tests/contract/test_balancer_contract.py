"""What every balancer keeps: its state through JSON, fixed points, bounds, order, copies."""

import json
import math
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressor.balancers import LossWeightState, balance_loss_weights, balance_temperatures
from compressor.methods.bmtard import BMTARDState

negative_entropies = st.floats(-7, 1e-4, allow_subnormal=False)
temperatures = st.floats(1, 10)
losses = st.floats(1e-9, 1e6)
fractions = st.floats(0, 1)
exponents = st.sampled_from([0.0, 0.5, 1.0, 2.0])
BOUNDS = (1.0, 10.0)

teachers_with_entropy = st.lists(
    st.tuples(temperatures, negative_entropies), min_size=1, max_size=6
)
weights = st.just(0.0) | st.floats(1e-9, 1)  # halves of the least float are 0
rows = st.lists(st.tuples(weights, losses, losses), min_size=1, max_size=4)
"""Weight before, first loss and loss of the teachers of a role."""


def temperatures_after(pairs, *, rate=0.01):
    before, entropies = zip(*pairs, strict=True)
    return balance_temperatures(before, entropies, rate=rate, bounds=BOUNDS)


def weights_after(rows, shares, *, rate=0.025, exponent=1.0):
    before, first, now = zip(*rows, strict=True)
    total = math.fsum(before) or 1.0
    state = LossWeightState(weights=tuple(w / total for w in before), first_losses=first)
    return balance_loss_weights(state, now, shares=shares, rate=rate, exponent=exponent).weights


def equal_shares(*counts):
    return [1 / count for count in counts for _ in range(count)]


@pytest.mark.parametrize(
    "state",
    [
        BMTARDState(temperatures=(1.0, 1.0), weights=LossWeightState(weights=(0.5, 0.5))),
        BMTARDState(
            temperatures=(1.0009999999999999, 0.1 + 0.2 + 5, 3.0),
            weights=LossWeightState(
                weights=(1 / 3, 1 / 6, 0.5), first_losses=(0.1 + 0.2, 1, 1e-17)
            ),
        ),
    ],
)
def test_state_round_trip_through_json(state):
    assert BMTARDState.from_dict(json.loads(json.dumps(asdict(state)))) == state


@given(temperatures, temperatures, negative_entropies, negative_entropies, fractions)
def test_temperatures_of_two_are_the_authors_to_the_last_bit(robust, clean, a, b, rate):
    """The released rule, spelt out: T - rate x sign(own / other - 1), then clipped."""

    def moved(temperature, own, other):
        if other == 0:
            ratio = math.nan if own == 0 else math.copysign(math.inf, own)
        else:
            ratio = own / other
        sign = 0 if math.isnan(ratio) else (ratio - 1 > 0) - (ratio - 1 < 0)
        return min(max(temperature - rate * sign, 1.0), 10.0)

    after = temperatures_after([(robust, a), (clean, b)], rate=rate)
    assert after == (moved(robust, a, b), moved(clean, b, a))


@given(fractions, losses, losses, losses, losses, fractions)
def test_loss_weights_of_two_are_the_authors_to_the_last_bit(w, first_a, first_b, a, b, rate):
    """The released rule, spelt out in the order of the script: over the mean, over the sum."""
    ours = LossWeightState(weights=(w, 1 - w), first_losses=(first_a, first_b))
    after = balance_loss_weights(ours, (a, b), shares=(1.0, 1.0), rate=rate)
    mean = (a / first_a + b / first_b) / 2
    part_a, part_b = a / first_a / mean, b / first_b / mean
    weight_a = max(0.0, w - rate * (w - part_a / (part_a + part_b)))
    weight_b = max(0.0, (1 - w) - rate * ((1 - w) - part_b / (part_a + part_b)))
    factor = 1.0 / (weight_a + weight_b)
    expected = (weight_a * factor, weight_b * factor) if rate else (w, 1 - w)
    assert after.weights == expected


@given(st.lists(temperatures, min_size=1, max_size=6), negative_entropies)
def test_temperatures_equal_entropies_are_a_fixed_point(before, entropy):
    assert temperatures_after([(t, entropy) for t in before]) == tuple(before)


@given(teachers_with_entropy, fractions)
def test_temperatures_stay_in_bounds_and_move_one_step(pairs, rate):
    for (old, _), new in zip(pairs, temperatures_after(pairs, rate=rate), strict=True):
        assert 1 <= new <= 10
        assert abs(new - old) <= rate * (1 + 1e-9) + 1e-12


@given(teachers_with_entropy, st.randoms(use_true_random=False))
def test_temperatures_do_not_depend_on_the_order(pairs, random):
    order = list(range(len(pairs)))
    random.shuffle(order)
    after = temperatures_after(pairs)
    assert temperatures_after([pairs[i] for i in order]) == tuple(after[i] for i in order)


@given(teachers_with_entropy, st.integers(0, 5), st.integers(1, 3))
def test_temperatures_do_not_depend_on_copies(pairs, place, num_copies):
    copied = pairs[place % len(pairs)]
    after = temperatures_after(pairs + [copied] * num_copies)
    assert after[: len(pairs)] == temperatures_after(pairs)
    assert set(after[len(pairs) :]) == {after[place % len(pairs)]}


@given(st.lists(st.floats(-7, -1e-3), min_size=2, max_size=6))
def test_temperatures_bring_entropies_together(entropies):
    """The softest is cooled and the sharpest heated, whatever is between them."""
    after = temperatures_after([(5.0, value) for value in entropies])
    softest, sharpest = entropies.index(min(entropies)), entropies.index(max(entropies))
    if abs(entropies[softest] / entropies[sharpest] - 1) > 1e-12:
        assert (after[softest], after[sharpest]) == pytest.approx((4.99, 5.01))


@given(rows, rows, fractions, exponents)
def test_loss_weights_sum_to_one_and_stay_in_bounds(robust, clean, rate, exponent):
    shares = equal_shares(len(robust), len(clean))
    after = weights_after(robust + clean, shares, rate=rate, exponent=exponent)
    if any(w for w, _, _ in robust + clean):
        assert math.fsum(after) == pytest.approx(1, abs=1e-12)
    assert all(0 <= weight <= 1 for weight in after)


@given(rows, rows, st.randoms(use_true_random=False), exponents)
def test_loss_weights_do_not_depend_on_the_order(robust, clean, random, exponent):
    both = robust + clean
    shares = equal_shares(len(robust), len(clean))
    order = list(range(len(both)))
    random.shuffle(order)
    after = weights_after(both, shares, exponent=exponent)
    there = weights_after([both[i] for i in order], [shares[i] for i in order], exponent=exponent)
    assert there == tuple(after[i] for i in order)


@given(rows, rows, st.integers(2, 4), fractions)
def test_loss_weights_copies_share_what_one_would_have(robust, clean, num_copies, rate):
    (weight, *loss), shares = robust[0], equal_shares(len(robust), len(clean))
    copies = [(weight / num_copies, *loss)] * num_copies
    before = weights_after(robust + clean, shares, rate=rate)
    copied_shares = [shares[0] / num_copies] * num_copies + shares[1:]
    after = weights_after(copies + robust[1:] + clean, copied_shares, rate=rate)
    assert math.fsum(after[:num_copies]) == pytest.approx(before[0], abs=1e-12)
    assert after[num_copies:] == pytest.approx(before[1:], abs=1e-12)


@given(st.integers(1, 4), st.integers(1, 4), st.floats(1e-3, 1), losses)
def test_loss_weights_roles_stay_equal_whatever_their_numbers(num_robust, num_clean, fallen, first):
    shares = equal_shares(num_robust, num_clean)
    rows = [(share / 2, first, fallen * first) for share in shares]
    assert weights_after(rows, shares) == pytest.approx([s / 2 for s in shares], abs=1e-12)


@given(rows, rows, exponents)
def test_loss_weights_at_rate_zero_are_those_before_to_the_last_bit(robust, clean, exponent):
    shares = equal_shares(len(robust), len(clean))
    state = LossWeightState(weights=tuple(share / 2 for share in shares))
    for row in (1, 2):
        now = [values[row] for values in robust + clean]
        state = balance_loss_weights(state, now, shares=shares, rate=0.0, exponent=exponent)
    assert state.weights == tuple(share / 2 for share in shares)


@given(losses, losses)
def test_loss_weights_first_call_sets_the_reference_for_good(a, b):
    shares = (1.0, 1.0)
    start = LossWeightState(weights=(0.5, 0.5))
    first = balance_loss_weights(start, (a, b), shares=shares, rate=0.025)
    later = balance_loss_weights(first, (2 * a, b / 2), shares=shares, rate=0.025)
    assert first.weights == (0.5, 0.5)
    assert later.first_losses == (a, b)
    assert later.weights[0] > 0.5  # it fell less
