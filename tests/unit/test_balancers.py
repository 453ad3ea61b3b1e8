"""Balancers against worked numbers, and one whole step of B-MTARD on fixed logits."""

import math

import pytest
import torch

from compressor.balancers import (
    LossWeightState,
    TemperatureState,
    balance_loss_weights,
    balance_temperatures,
)
from compressor.data import Batch
from compressor.losses import guarded_negative_entropy, temper
from compressor.methods.bmtard import BMTARD
from compressor.methods.protocol import Moment

ROBUST_TEACHER = torch.tensor([[2.0, 1.0, 0.5, 0.0], [0.2, 1.8, 0.9, 0.1]], dtype=torch.float64)
CLEAN_TEACHER = torch.tensor([[9.0, 1.0, 0.0, -1.0], [0.0, 7.0, 2.0, 1.0]], dtype=torch.float64)
STUDENT_ADV = torch.tensor([[1.0, 0.8, 0.2, 0.0], [0.5, 0.6, 0.4, 0.1]], dtype=torch.float64)
STUDENT_CLEAN = torch.tensor([[1.5, 0.5, 0.0, 0.2], [0.1, 1.2, 0.6, 0.3]], dtype=torch.float64)
BOUNDS = (1.0, 10.0)


def negative_entropy(logits_NK, temperature):
    return float(guarded_negative_entropy(temper(logits_NK, temperature)).mean())


def next_temperatures(robust, clean, *, clean_logits=CLEAN_TEACHER):
    state = balance_temperatures(
        TemperatureState(robust=robust, clean=clean),
        robust_negative_entropy=negative_entropy(ROBUST_TEACHER, robust),
        clean_negative_entropy=negative_entropy(clean_logits, clean),
        rate=0.001,
        bounds=BOUNDS,
    )
    return state.robust, state.clean


def balance(robust_negative_entropy, clean_negative_entropy, *, start=2.0):
    state = balance_temperatures(
        TemperatureState(robust=start, clean=start),
        robust_negative_entropy=robust_negative_entropy,
        clean_negative_entropy=clean_negative_entropy,
        rate=0.001,
        bounds=BOUNDS,
    )
    return state.robust, state.clean


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


WEIGHT_STEPS = [
    # robust loss, clean loss, robust weight, clean weight, total
    (0.12, 0.30, 0.5, 0.5, 0.21),
    (0.11, 0.24, 0.50084951, 0.49915049, 0.17488957),
    (0.105, 0.20, 0.50251747, 0.49748253, 0.15226084),
    (0.10, 0.15, 0.50557953, 0.49442047, 0.12472102),
]


def test_loss_weights_worked_sequence():
    state = LossWeightState()
    for robust_loss, clean_loss, robust, clean, total in WEIGHT_STEPS:
        state = balance_loss_weights(
            state, robust_loss=robust_loss, clean_loss=clean_loss, rate=0.025
        )
        assert (state.robust, state.clean) == pytest.approx((robust, clean), abs=6e-9)
        ours = state.robust * robust_loss + state.clean * clean_loss
        assert ours == pytest.approx(total, abs=1e-8)
        assert (state.first_robust_loss, state.first_clean_loss) == (0.12, 0.30)


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
    state = LossWeightState(first_robust_loss=1.0, first_clean_loss=1.0)
    for _ in range(num_steps):
        state = balance_loss_weights(state, robust_loss=0.5, clean_loss=0.2, rate=0.025)
    assert state.clean == pytest.approx(clean, abs=6e-9)


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

    def __init__(self, logits_NK, *, pixel):
        self.answer, self.pixel = logits_NK, pixel

    def logits(self, x_NCHW):
        assert bool((x_NCHW == self.pixel).all())
        return self.answer.clone()


@pytest.fixture
def bmtard():
    def attack(model, x_NCHW, targets, *, keys_N):
        assert targets.tolist() == [0, 1]
        return torch.ones_like(x_NCHW)

    return BMTARD(
        clean_teacher=FixedTeacher(CLEAN_TEACHER, pixel=0),
        robust_teacher=FixedTeacher(ROBUST_TEACHER, pixel=1),
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
    assert state.temperatures == TemperatureState(robust=1.0, clean=1.001)
    assert (state.weights.robust, state.weights.clean) == (0.5, 0.5)

    second, state = bmtard.step(student, batch, state, Moment())
    logged = second.logged
    assert logged["robust_loss_nats"] == pytest.approx(0.03171869, abs=6e-9)
    assert logged["clean_loss_nats"] == pytest.approx(0.17357726, abs=6e-9)
    relative = logged["clean_loss_nats"] / state.weights.first_clean_loss
    assert relative == pytest.approx(0.99979267, abs=6e-9)
    assert state.weights.robust == pytest.approx(0.50000130, abs=6e-9)
    assert state.weights.clean == pytest.approx(0.49999870, abs=6e-9)
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
    assert state.temperatures.clean == pytest.approx(1.0001, abs=1e-12)
    fallen = LossWeightState(first_robust_loss=1.0, first_clean_loss=0.17361325)
    start = type(state)(weights=fallen)
    slow = bmtard.step(FixedStudent(), batch, start, Moment(rate_factor=0.1))[1].weights.clean - 0.5
    fast = bmtard.step(FixedStudent(), batch, start, Moment())[1].weights.clean - 0.5
    assert fast > 0.01
    assert slow == pytest.approx(fast / 10, rel=1e-9)
