"""MTARD and CIARD against an oracle in plain numpy, that shares no code with them."""

import dataclasses
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from compressor.data import Batch
from compressor.methods.ciard import CIARD, Drops, Push, Retraining
from compressor.methods.mtard import MTARD
from compressor.methods.protocol import Moment
from compressor.methods.teacher_copy import TeacherCopy
from compressor.methods.teacher_set import TeacherSet
from compressor.performance import Performance
from compressor.student import Student
from compressor.teacher import Teacher

ORACLE = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / "two_teacher_oracle.py")))
PERFORMANCE = Performance(device=torch.device("cpu"))
NUM_STEPS = 8
SETTINGS = {
    "temperature_rate": 0.03,
    "drop": 0.6,
    "drop_factor": 0.1,
    "weight_rate": 0.2,
    "push_factor": 1.5,
    "push_temperature": 5.0,
    "teacher_from": 0.25,
    "teacher_rate": 0.4,
    "teacher_momentum": 0.3,
    "teacher_decay": 0.05,
}
APART = {"rel": 0, "abs": 1e-10}


def linear(values):
    layer = nn.Linear(ORACLE.D, ORACLE.K).double()
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(values[0]))
        layer.bias.copy_(torch.from_numpy(values[1]))
    return layer


class Network(nn.Module):
    """Pixels to logits, through a BatchNorm where there is one."""

    def __init__(self, values, norm=None):
        super().__init__()
        self.norm = nn.BatchNorm1d(ORACLE.D).double() if norm else nn.Identity()
        self.backbone = linear(values)
        if norm:
            with torch.no_grad():
                self.norm.weight.copy_(torch.from_numpy(norm["gamma"]))
                self.norm.bias.copy_(torch.from_numpy(norm["beta"]))
                self.norm.running_mean.copy_(torch.from_numpy(norm["mean"]))
                self.norm.running_var.copy_(torch.from_numpy(norm["variance"]))

    def forward(self, x_NCHW):
        return self.backbone(self.norm(x_NCHW.flatten(1)))


def teacher(role, values, norm=None):
    network = Network(values, norm)
    return Teacher(
        name=role,
        role=role,
        answer=network,
        network=network,
        spec=None,
        num_parameters=None,
        num_classes=ORACLE.K,
        sha256=role,
        num_bytes=0,
    )


def fixed_attack(model, x_NCHW, targets, *, keys_N):
    """The adversarial pixels that the oracle has for these labels and pixels."""
    for step in range(NUM_STEPS):
        pixels, adversarial, _ = ORACLE.batch(step)
        if np.array_equal(pixels, x_NCHW.flatten(1).numpy()):
            return torch.from_numpy(adversarial).view(x_NCHW.shape)
    raise AssertionError("no such batch")


def run(method):
    """What was logged, the student's gradients and the method's tensors after each step."""
    student, state, rows = Student(Network(ORACLE.STUDENT), PERFORMANCE), method.initial_state(), []
    layer = student.network.backbone
    for step in range(NUM_STEPS):
        pixels, _, labels = ORACLE.batch(step)
        ids = torch.arange(ORACLE.N)
        batch = Batch(
            x_NCHW=torch.from_numpy(pixels).view(ORACLE.N, 1, 2, 2),
            y_N=torch.from_numpy(labels),
            index_N=ids,
            keys_N=ids,
        )
        result, state = method.step(student, batch, state, Moment(fraction=step / NUM_STEPS))
        student.network.zero_grad()
        result.loss.backward()
        slopes = [layer.weight.grad.numpy().copy(), layer.bias.grad.numpy().copy()]
        tensors = {name: t.numpy().copy() for name, t in method.tensors().items()}
        rows.append({**result.logged, "graph": result.loss.item(), "slopes": slopes} | tensors)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.sub_(ORACLE.RATE * parameter.grad)
    return rows


def assert_same(ours, theirs):
    assert len(ours) == len(theirs) == NUM_STEPS
    for our, their in zip(ours, theirs, strict=True):
        numbers = {name: value for name, value in their.items() if np.isscalar(value)}
        assert {name: our[name] for name in numbers} == pytest.approx(numbers, **APART)
        assert our["graph"] == pytest.approx(their["loss_nats"], **APART)
        for our_slope, their_slope in zip(our["slopes"], their["slopes"], strict=True):
            np.testing.assert_allclose(our_slope, their_slope, rtol=0, atol=1e-10)


@pytest.mark.parametrize("exponent", [1.0, 2.0])
def test_mtard_equals_the_oracle(exponent):
    teachers = [teacher("clean", ORACLE.CLEAN), teacher("robust", ORACLE.ROBUST)]
    method = MTARD(
        teachers=TeacherSet.of(teachers),
        attack=fixed_attack,
        loss_scale=0.25,
        weight_rate=0.2,
        relative_loss_exponent=exponent,
    )
    theirs = ORACLE.mtard(NUM_STEPS, scale=0.25, weight_rate=0.2, exponent=exponent)
    assert_same(run(method), theirs)
    assert theirs[-1]["clean_weight_fraction"] != pytest.approx(0.5, abs=0.02)


def make_ciard(*, statistics="kept", settings=SETTINGS, push_factor=None):
    robust = teacher("robust", ORACLE.ROBUST, ORACLE.NORM)
    factor = settings["push_factor"] if push_factor is None else push_factor
    return CIARD(
        clean_teacher=teacher("clean", ORACLE.CLEAN),
        robust_teacher=robust,
        copy=TeacherCopy(robust, statistics=statistics, purpose="the test"),
        attack=fixed_attack,
        loss_scale=0.25,
        temperature_rate=settings["temperature_rate"],
        temperature_bounds=(1.0, 10.0),
        weight_rate=settings["weight_rate"],
        balance_drops=Drops(at_fractions=[settings["drop"]], factor=settings["drop_factor"]),
        push=Push(temperature=settings["push_temperature"], factor=factor, matches_decade=True),
        retraining=Retraining(
            learning_rate=settings["teacher_rate"],
            momentum=settings["teacher_momentum"],
            weight_decay=settings["teacher_decay"],
            from_fraction=settings["teacher_from"],
        ),
    )


NAMES = {"norm.weight": "gamma", "norm.bias": "beta"}
NAMES |= {"backbone.weight": "weight", "backbone.bias": "bias"}


def test_ciard_equals_the_oracle():
    ours, theirs = run(make_ciard()), ORACLE.ciard(NUM_STEPS, scale=0.25, settings=SETTINGS)
    assert_same(ours, theirs)
    for our, their in zip(ours, theirs, strict=True):
        for name, value in NAMES.items():
            np.testing.assert_allclose(
                our[f"teacher.{name}"], their["copy"][value], rtol=0, atol=1e-10
            )


def test_the_oracle_exercises_every_mechanism():
    rows = ORACLE.ciard(NUM_STEPS, scale=0.25, settings=SETTINGS)
    assert {0.0} < {
        float(np.abs(row["copy"]["gamma"] - ORACLE.NORM["gamma"]).max()) for row in rows
    }
    assert len({row["push_factor_ratio"] for row in rows}) > 1
    assert all(0 < row["push_images_fraction"] < 1 for row in rows)
    steps = np.abs(np.diff([row["clean_temperature_ratio"] for row in rows]))
    assert steps.max() == pytest.approx(0.03)
    assert steps[-1] == pytest.approx(0.003)  # after the drop
    assert rows[-1]["robust_weight_fraction"] != pytest.approx(0.5, abs=0.02)


def test_ciard_never_changes_the_given_teacher():
    method = make_ciard(statistics="batch")
    network = method.robust_teacher.network
    before = {name: value.clone() for name, value in network.state_dict().items()}
    run(method)
    assert all(torch.equal(network.state_dict()[name], value) for name, value in before.items())
    assert not network.training
    assert not any(p.requires_grad or p.grad is not None for p in network.parameters())
    assert all(p.grad is None for p in method.clean_teacher.network.parameters())


def test_ciard_copy_answers_as_the_teacher_until_it_learns():
    never = {**SETTINGS, "teacher_from": 1.0}
    kept, drifting = (
        run(make_ciard(settings=never)),
        run(make_ciard(settings=never, statistics="batch")),
    )
    name = "teacher.norm.running_mean"
    assert all(np.array_equal(row[name], ORACLE.NORM["mean"]) for row in kept)
    assert not np.array_equal(drifting[0][name], ORACLE.NORM["mean"])
    assert all(np.array_equal(row["teacher.backbone.weight"], ORACLE.ROBUST[0]) for row in drifting)
    assert kept[1]["robust_loss_nats"] != drifting[1]["robust_loss_nats"]


def test_ciard_leaves_no_gradient_at_its_copy():
    method = make_ciard()
    run(method)
    assert all(value.grad is None for value in method.tensors().values())


def test_ciard_without_push_and_copy_is_two_terms():
    """With the push at 0 the clean teacher is not asked for its mistakes."""
    settings = {**SETTINGS, "weight_rate": 0.0, "teacher_from": 1.0}
    for row in run(make_ciard(settings=settings, push_factor=0.0)):
        mean = (row["robust_loss_nats"] + row["clean_loss_nats"]) / 2
        assert row["graph"] == pytest.approx(mean, rel=0, abs=1e-14)
        assert not any(name.startswith("push") for name in row)


@pytest.mark.parametrize(
    ("push_nats", "other_nats", "matches", "factor"),
    [
        (0.2, (0.05, 0.3), True, 0.1),
        (0.2, (0.3, 0.05), True, 0.1),
        (0.15, (0.12, 0.12), True, 1.0),  # the same decade, though P is the larger
        (0.001, (0.2, 3.0), True, 100.0),
        (0.2, (0.2, 0.9), True, 1.0),
        (0.2, (0.05, 0.05), False, 1.5),
        (0.0, (0.05, 0.05), True, 0.0),
        (0.2, (0.0, 0.1), True, 0.0),
        (float("nan"), (0.1, 0.1), True, 0.0),
        (float("inf"), (0.1, 0.1), False, 0.0),
    ],
)
def test_push_comes_to_the_decade_of_the_smaller_loss(push_nats, other_nats, matches, factor):
    own = 1.0 if matches else 1.5
    push = Push(temperature=5.0, factor=own, matches_decade=matches)
    assert push.factor_for(push_nats, other_nats) == pytest.approx(factor)


def test_balances_slow_down_at_each_drop():
    drops = Drops(at_fractions=(0.5, 0.75), factor=0.1)
    found = [drops.factor_at(fraction) for fraction in (0.0, 0.49, 0.5, 0.75)]
    assert found == pytest.approx([1.0, 1.0, 0.1, 0.01])


def test_statistics_as_released_come_from_clean_images_too():
    method = make_ciard(statistics="batch")
    run(method)
    assert int(method.tensors()["teacher.norm.num_batches_tracked"]) == 2 * NUM_STEPS


@pytest.mark.parametrize(
    ("fraction", "rate"), [(0.0, None), (0.2, None), (0.25, 1e-4), (0.625, 5e-5), (0.999999, 0.0)]
)
def test_retraining_rate_is_a_cosine_over_the_rest_of_the_run(fraction, rate):
    sgd = Retraining(learning_rate=1e-4, momentum=0.1, weight_decay=2e-4, from_fraction=0.25)
    assert sgd.rate(fraction) == (None if rate is None else pytest.approx(rate, abs=1e-14))
    assert dataclasses.replace(sgd, learning_rate=0.0).rate(fraction) is None
