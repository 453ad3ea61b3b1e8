"""Balancers against worked numbers, and one whole step of B-MTARD on fixed logits."""

import dataclasses
import math

import pytest
import torch

from compressor.balancers import (
    LossWeightState,
    balance_loss_weights,
    balance_temperatures,
)
from compressor.data import Batch
from compressor.losses import guarded_negative_entropy, temper
from compressor.methods.bmtard import BMTARD
from compressor.methods.protocol import Moment
from compressor.methods.teacher_set import TeacherSet

ROBUST_TEACHER = torch.tensor([[2.0, 1.0, 0.5, 0.0], [0.2, 1.8, 0.9, 0.1]], dtype=torch.float64)
CLEAN_TEACHER = torch.tensor([[9.0, 1.0, 0.0, -1.0], [0.0, 7.0, 2.0, 1.0]], dtype=torch.float64)
STUDENT_ADV = torch.tensor([[1.0, 0.8, 0.2, 0.0], [0.5, 0.6, 0.4, 0.1]], dtype=torch.float64)
STUDENT_CLEAN = torch.tensor([[1.5, 0.5, 0.0, 0.2], [0.1, 1.2, 0.6, 0.3]], dtype=torch.float64)
BOUNDS = (1.0, 10.0)


def negative_entropy(logits_NK, temperature):
    return float(guarded_negative_entropy(temper(logits_NK, temperature)).mean())


def next_temperatures(robust, clean, *, clean_logits=CLEAN_TEACHER):
    entropies = negative_entropy(ROBUST_TEACHER, robust), negative_entropy(clean_logits, clean)
    return balance_temperatures((robust, clean), entropies, rate=0.001, bounds=BOUNDS)


def balance(*negative_entropies, start=2.0):
    temperatures = [start] * len(negative_entropies)
    return balance_temperatures(temperatures, negative_entropies, rate=0.001, bounds=BOUNDS)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((1, 1), (1, 1.001)),
        ((1, 2.5), (1, 2.501)),
        ((1, 4), (1, 4.001)),
        ((1, 6), (1.001, 5.999)),
        ((3, 1), (2.999, 1.001)),
        ((10, 10), (9.999, 10)),
    ],
)
def test_temperatures_one_step(before, after):
    assert next_temperatures(*before) == pytest.approx(after, abs=1e-12)


@pytest.mark.parametrize(
    ("temperatures", "robust_over_clean", "clean_over_robust"),
    [
        ((1, 1), 31.549, -0.96928),
        ((1, 2.5), 1.00073, -0.50018),
        ((1, 4), 0.16505, -0.14167),
        ((1, 6), -0.05407, 0.05716),
    ],
)
def test_temperatures_worked_ratios(temperatures, robust_over_clean, clean_over_robust):
    robust = negative_entropy(ROBUST_TEACHER, temperatures[0])
    clean = negative_entropy(CLEAN_TEACHER, temperatures[1])
    assert robust / clean - 1 == pytest.approx(robust_over_clean, rel=2e-4)
    assert clean / robust - 1 == pytest.approx(clean_over_robust, rel=2e-4)


def test_temperatures_equal_teachers_rest():
    assert next_temperatures(1.5, 1.5, clean_logits=ROBUST_TEACHER) == (1.5, 1.5)


def test_temperatures_climb_and_settle():
    robust, clean, seen, robust_seen = 1.0, 1.0, {}, set()
    for step in range(1, 4_301):
        robust, clean = next_temperatures(robust, clean)
        seen[step] = round(clean, 9)
        robust_seen.add(round(robust, 9))
    assert [seen[n] for n in (391, 1_000, 2_000, 4_000)] == [1.391, 2.0, 3.0, 5.0]
    assert {seen[n] for n in range(4_200, 4_301)} == {5.194, 5.193}
    assert seen[4_299] != seen[4_300]
    assert robust_seen == {1.0, 1.001}


def test_temperatures_settled_entropies():
    def entropy(logits_NK, temperature):
        p = temper(logits_NK, temperature)
        return float(-torch.xlogy(p, p).sum(1).mean())

    assert entropy(CLEAN_TEACHER, 5.194) == pytest.approx(1.1253307, abs=6e-8)
    assert entropy(ROBUST_TEACHER, 1) == pytest.approx(1.1253256, abs=6e-8)


ONE_HOT = 9.99995e-6  # ten classes: log(1 + guard), above 0


@pytest.mark.parametrize(
    ("robust_negative_entropy", "clean_negative_entropy", "expected"),
    [
        pytest.param(-1.0, -0.5, (1.999, 2.001), id="higher entropy is cooled"),
        pytest.param(-0.5, -1.0, (2.001, 1.999), id="lower entropy is heated"),
        pytest.param(-1.0, ONE_HOT, (2.001, 2.001), id="one-hot clean teacher: both rise"),
        pytest.param(ONE_HOT, -1.0, (2.001, 2.001), id="one-hot robust teacher: both rise"),
        pytest.param(ONE_HOT, ONE_HOT, (2.0, 2.0), id="both one-hot"),
        pytest.param(0.0, 0.0, (2.0, 2.0), id="0/0 is not a number, sign 0"),
        pytest.param(-1.0, 0.0, (2.001, 2.001), id="division by zero is minus infinity"),
        pytest.param(math.nan, -1.0, (2.0, 2.0), id="not a number"),
    ],
)
def test_temperatures_ratio_form(robust_negative_entropy, clean_negative_entropy, expected):
    after = balance(robust_negative_entropy, clean_negative_entropy)
    assert after == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("negative_entropies", "expected"),
    [
        pytest.param((-2.0, -1.4, -1.0), (1.999, 2.001, 2.001), id="middle against the farther"),
        pytest.param((-2.0, -1.5, -1.0), (1.999, 2.0, 2.001), id="equally far: rest"),
        pytest.param((-2.0, -2.0, -1.0), (1.999, 1.999, 2.001), id="two alike take one step"),
        pytest.param((-2.0, -1.4, -1.0, -1.0), (1.999, 2.001, 2.001, 2.001), id="no majority"),
        pytest.param((-2.0, -1.0, ONE_HOT), (2.001, 2.001, 2.001), id="one-hot: all rise"),
        pytest.param((-1.0, -1.0, -1.0), (2.0, 2.0, 2.0), id="all alike"),
        pytest.param((-1.0, math.nan, -2.0), (2.0, 2.0, 2.0), id="not a number"),
        pytest.param((-1.0,), (2.0,), id="alone"),
    ],
)
def test_temperatures_of_several(negative_entropies, expected):
    assert balance(*negative_entropies) == pytest.approx(expected, abs=1e-12)


def test_temperatures_of_several_bring_all_entropies_together():
    logits = [ROBUST_TEACHER, CLEAN_TEACHER, 2.5 * ROBUST_TEACHER, 0.8 * CLEAN_TEACHER]
    temperatures = (1.0,) * 4
    for _ in range(600):
        pairs = zip(logits, temperatures, strict=True)
        entropies = [negative_entropy(*pair) for pair in pairs]
        temperatures = balance_temperatures(temperatures, entropies, rate=0.01, bounds=BOUNDS)
    assert max(entropies) - min(entropies) < 0.02
    assert temperatures[0] < 1.03  # the softest teacher at temperature 1 sets the entropy


WEIGHT_STEPS = [
    # robust loss, clean loss, robust weight, clean weight, total
    (0.12, 0.30, 0.5, 0.5, 0.21),
    (0.11, 0.24, 0.50084951, 0.49915049, 0.17488957),
    (0.105, 0.20, 0.50251747, 0.49748253, 0.15226084),
    (0.10, 0.15, 0.50557953, 0.49442047, 0.12472102),
]
HALVES = LossWeightState(weights=(0.5, 0.5))


def weigh(state, *losses, rate=0.025, shares=(1.0, 1.0), exponent=1.0):
    return balance_loss_weights(state, losses, shares=shares, rate=rate, exponent=exponent)


def test_loss_weights_worked_sequence():
    state = HALVES
    for robust_loss, clean_loss, robust, clean, total in WEIGHT_STEPS:
        state = weigh(state, robust_loss, clean_loss)
        assert state.weights == pytest.approx((robust, clean), abs=6e-9)
        ours = state.weights[0] * robust_loss + state.weights[1] * clean_loss
        assert ours == pytest.approx(total, abs=1e-8)
        assert state.first_losses == (0.12, 0.30)


@pytest.mark.parametrize(
    ("num_steps", "clean"),
    [
        (1, 0.49464286),
        (40, 0.36354981),
        (80, 0.31398667),
        (200, 0.28706921),
        (2_000, 0.28571429),
    ],
)
def test_loss_weights_constant_relative_losses(num_steps, clean):
    state = LossWeightState(weights=(0.5, 0.5), first_losses=(1.0, 1.0))
    for _ in range(num_steps):
        state = weigh(state, 0.5, 0.2)
    assert state.weights[1] == pytest.approx(clean, abs=6e-9)


def test_loss_weights_exponent_of_mtard():
    state = LossWeightState(weights=(0.5, 0.5), first_losses=(1.0, 1.0))
    after = weigh(state, 0.5, 0.2, exponent=2.0)
    assert after.weights[1] == pytest.approx(0.49094828, abs=6e-9)
    assert weigh(state, 0.5, 0.2, exponent=0.0).weights == (0.5, 0.5)
    steep = weigh(state, 1e-3, 1e300, exponent=400.0)  # whose power is no float
    assert steep.weights == pytest.approx((0.4875, 0.5125))


def test_loss_weights_of_several_worked_by_hand():
    """Two robust teachers at 0.6 and 0.2 of their first losses, one clean at 0.4: the roles have
    equal means, and the robust half goes three to one."""
    state = LossWeightState(weights=(0.25, 0.25, 0.5), first_losses=(1.0, 10.0, 2.0))
    after = weigh(state, 0.6, 2.0, 0.8, shares=(0.5, 0.5, 1.0), rate=0.1)
    assert after.weights == pytest.approx((0.2625, 0.2375, 0.5), abs=1e-12)


@pytest.mark.parametrize(
    "losses",
    [
        pytest.param((math.nan, 1.0), id="not a number"),
        pytest.param((1.0, math.inf), id="infinite"),
        pytest.param((0.0, 0.0), id="both lost"),
        pytest.param((5e-324, 0.0), id="the least number, whose half is 0"),
    ],
)
def test_loss_weights_stay_where_there_is_no_part(losses):
    state = LossWeightState(weights=(0.3, 0.7), first_losses=(1.0, 1.0))
    assert weigh(state, *losses) == state


class FixedStudent:
    """Answers with fixed logits, and remembers in which order it was asked."""

    def __init__(self):
        self.asked = []

    def evaluation_view(self):
        return self._view

    def _view(self, x_NCHW):
        raise AssertionError("the attack of this test does not ask")

    def logits(self, x_NCHW):
        is_adv = bool(x_NCHW.any())
        self.asked.append("adv" if is_adv else "clean")
        return (STUDENT_ADV if is_adv else STUDENT_CLEAN).clone().requires_grad_()


class FixedTeacher:
    """Answers one kind of images only: 0 are clean, 1 adversarial."""

    def __init__(self, role, logits_NK, *, identity=None):
        self.role, self.identity = role, identity or role
        self.answer, self.pixel = logits_NK, {"clean": 0, "robust": 1}[role]

    def logits(self, x_NCHW):
        assert bool((x_NCHW == self.pixel).all())
        return self.answer.clone()


@pytest.fixture
def bmtard():
    def attack(model, x_NCHW, targets, *, keys_N):
        assert targets.tolist() == [0, 1]
        return torch.ones_like(x_NCHW)

    return BMTARD(
        teachers=TeacherSet.of(
            [FixedTeacher("clean", CLEAN_TEACHER), FixedTeacher("robust", ROBUST_TEACHER)]
        ),
        attack=attack,
        loss_scale=0.25,
        temperature_rate=0.001,
        temperature_bounds=BOUNDS,
        weight_rate=0.025,
    )


@pytest.fixture
def batch():
    ids = torch.arange(2)
    return Batch(x_NCHW=torch.zeros(2, 1, 1, 1).double(), y_N=ids, index_N=ids, keys_N=ids)


def test_bmtard_two_worked_steps(bmtard, batch):
    student = FixedStudent()
    first, state = bmtard.step(student, batch, bmtard.initial_state(), Moment())
    assert student.asked == ["adv", "clean"]
    assert first.loss.item() == pytest.approx(0.10266597, abs=6e-9)
    assert state.temperatures == (1.0, 1.001)
    assert state.weights.weights == (0.5, 0.5)

    second, state = bmtard.step(student, batch, state, Moment())
    logged = second.logged
    assert logged["robust_loss_nats"] == pytest.approx(0.03171869, abs=6e-9)
    assert logged["clean_loss_nats"] == pytest.approx(0.17357726, abs=6e-9)
    relative = logged["clean_loss_nats"] / state.weights.first_losses[1]
    assert relative == pytest.approx(0.99979267, abs=6e-9)
    assert state.weights.weights == pytest.approx((0.50000130, 0.49999870), abs=6e-9)
    assert second.loss.item() == pytest.approx(0.10264779, abs=6e-9)
    assert logged["loss_nats"] == pytest.approx(second.loss.item(), abs=1e-12)


def test_bmtard_logs_the_temperatures_it_used(bmtard, batch):
    result, _ = bmtard.step(FixedStudent(), batch, bmtard.initial_state(), Moment())
    assert result.logged["robust_temperature_ratio"] == 1.0
    assert result.logged["clean_temperature_ratio"] == 1.0
    entropies = [result.logged[f"{role}_teacher_entropy_nats"] for role in ("robust", "clean")]
    assert entropies == pytest.approx([4 * 0.28132141, 4 * 0.00864301], abs=4e-8)


def test_bmtard_both_rates_follow_the_schedule(bmtard, batch):
    _, state = bmtard.step(FixedStudent(), batch, bmtard.initial_state(), Moment(rate_factor=0.1))
    assert state.temperatures[1] == pytest.approx(1.0001, abs=1e-12)
    fallen = LossWeightState(weights=(0.5, 0.5), first_losses=(1.0, 0.17361325))
    start = type(state)(temperatures=(1.0, 1.0), weights=fallen)

    def moved(moment):
        return bmtard.step(FixedStudent(), batch, start, moment)[1].weights.weights[1] - 0.5

    assert moved(Moment()) > 0.01
    assert moved(Moment(rate_factor=0.1)) == pytest.approx(moved(Moment()) / 10, rel=1e-9)


@pytest.mark.parametrize("temperature_rate", [0.0, 0.001])
@pytest.mark.parametrize("weight_rate", [0.0, 0.025])
def test_bmtard_switches_of_the_ablation(bmtard, batch, temperature_rate, weight_rate):
    """A rate of 0 is exactly without that balance, and leaves the other as it is."""
    switched = dataclasses.replace(
        bmtard, temperature_rate=temperature_rate, weight_rate=weight_rate
    )
    fallen = LossWeightState(weights=(0.5, 0.5), first_losses=(1.0, 0.17361325))
    state, full = [type(bmtard.initial_state())(temperatures=(1.0, 1.0), weights=fallen)] * 2
    for _ in range(3):
        result, state = switched.step(FixedStudent(), batch, state, Moment())
        _, full = bmtard.step(FixedStudent(), batch, full, Moment())
    assert (state.temperatures == (1.0, 1.0)) == (temperature_rate == 0)
    assert (state.weights.weights == (0.5, 0.5)) == (weight_rate == 0)
    if temperature_rate:
        assert state.temperatures == full.temperatures
    if temperature_rate == weight_rate == 0:  # the baseline: half of each divergence at T = 1
        assert result.loss.item() == pytest.approx((0.03171869 + 0.17361325) / 2, abs=6e-9)
