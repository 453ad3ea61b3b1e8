"""What every balancer keeps: its state through JSON, fixed points, bounds, symmetry."""

import json
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressor.balancers import (
    LossWeightState,
    TemperatureState,
    balance_loss_weights,
    balance_temperatures,
)
from compressor.methods.bmtard import BMTARD, BMTARDState

negative_entropies = st.floats(-7, 1e-4, allow_subnormal=False)
temperatures = st.floats(1, 10)
losses = st.floats(1e-9, 1e6)
two_losses = st.tuples(losses, losses)
two_negative_entropies = st.tuples(negative_entropies, negative_entropies)
fractions = st.floats(0, 1)


def temperatures_after(robust, clean, entropies, *, rate=0.01):
    state = balance_temperatures(
        TemperatureState(robust=robust, clean=clean),
        robust_negative_entropy=entropies[0],
        clean_negative_entropy=entropies[1],
        rate=rate,
        bounds=(1.0, 10.0),
    )
    return state.robust, state.clean


def weight_state(robust=0.5, *, first=(0.3, 0.2)):
    return LossWeightState(
        robust=robust, clean=1 - robust, first_robust_loss=first[0], first_clean_loss=first[1]
    )


def swapped(state):
    return LossWeightState(
        robust=state.clean,
        clean=state.robust,
        first_robust_loss=state.first_clean_loss,
        first_clean_loss=state.first_robust_loss,
    )


@pytest.mark.parametrize(
    "state",
    [
        BMTARDState(),
        BMTARDState(
            temperatures=TemperatureState(robust=1.0009999999999999, clean=0.1 + 0.2 + 5),
            weights=weight_state(1 / 3, first=(0.1 + 0.2, 1e-17)),
        ),
    ],
)
def test_state_round_trip_through_json(state):
    method = BMTARD(
        clean_teacher=None,
        robust_teacher=None,
        attack=None,
        loss_scale=0.1,
        temperature_rate=0.001,
        temperature_bounds=(1.0, 10.0),
        weight_rate=0.025,
    )
    assert method.restore_state(json.loads(json.dumps(asdict(state)))) == state


@given(temperatures, temperatures, negative_entropies)
def test_temperatures_equal_entropies_are_a_fixed_point(robust, clean, entropy):
    assert temperatures_after(robust, clean, (entropy, entropy)) == (robust, clean)


@given(temperatures, temperatures, two_negative_entropies, fractions)
def test_temperatures_stay_in_bounds_and_move_one_step(robust, clean, entropies, rate):
    after = temperatures_after(robust, clean, entropies, rate=rate)
    for old, new in zip((robust, clean), after, strict=True):
        assert 1 <= new <= 10
        assert abs(new - old) <= rate * (1 + 1e-9) + 1e-12


@given(temperatures, temperatures, negative_entropies, negative_entropies)
def test_temperatures_swapping_teachers_swaps_the_result(robust, clean, a, b):
    there = temperatures_after(robust, clean, (a, b))
    back = temperatures_after(clean, robust, (b, a))
    assert there == (back[1], back[0])


@given(st.floats(-7, -1e-3), st.floats(-7, -1e-3))
def test_temperatures_bring_entropies_together(a, b):
    robust, clean = temperatures_after(5.0, 5.0, (a, b))
    sign = (b > a) - (b < a)  # 1: the robust teacher has the higher entropy
    if abs(a / b - 1) > 1e-12:
        assert (robust, clean) == pytest.approx((5 - 0.01 * sign, 5 + 0.01 * sign))


@given(fractions, two_losses, two_losses, fractions)
def test_loss_weights_sum_to_one_and_stay_in_bounds(robust, now, first, rate):
    state, (a, b) = weight_state(robust, first=first), now
    after = balance_loss_weights(state, robust_loss=a, clean_loss=b, rate=rate)
    assert after.robust + after.clean == pytest.approx(1, abs=1e-12)
    assert 0 <= after.robust <= 1
    assert 0 <= after.clean <= 1


@given(fractions, two_losses, two_losses, fractions)
def test_loss_weights_swapping_teachers_swaps_the_result(robust, now, first, rate):
    state, (a, b) = weight_state(robust, first=first), now
    there = balance_loss_weights(state, robust_loss=a, clean_loss=b, rate=rate)
    back = balance_loss_weights(swapped(state), robust_loss=b, clean_loss=a, rate=rate)
    assert there == swapped(back)


@given(losses, losses, st.floats(1e-3, 1))
def test_loss_weights_equal_relative_losses_are_a_fixed_point(first_a, first_b, fallen):
    state = weight_state(first=(first_a, first_b))
    after = balance_loss_weights(
        state, robust_loss=fallen * first_a, clean_loss=fallen * first_b, rate=0.025
    )
    assert (after.robust, after.clean) == pytest.approx((0.5, 0.5), abs=1e-12)


@given(losses, losses)
def test_loss_weights_first_call_sets_the_reference_for_good(a, b):
    first = balance_loss_weights(LossWeightState(), robust_loss=a, clean_loss=b, rate=0.025)
    later = balance_loss_weights(first, robust_loss=2 * a, clean_loss=b / 2, rate=0.025)
    assert (first.robust, first.clean) == (0.5, 0.5)
    assert (later.first_robust_loss, later.first_clean_loss) == (a, b)
    assert later.robust > 0.5  # it fell less
