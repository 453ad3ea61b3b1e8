"""B-MTARD against twenty pinned steps of an oracle that shares no code with it, and rc too."""

import dataclasses
import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from compressor.attacks import pgd
from compressor.attacks.build import build_inner_attack
from compressor.data import Batch
from compressor.losses import cross_entropy
from compressor.method_recipes import RCRecipe
from compressor.method_table import InnerAttackRecipe
from compressor.methods.bmtard import BMTARD
from compressor.methods.build import build_method
from compressor.methods.protocol import Moment
from compressor.methods.teacher_set import TeacherSet
from compressor.performance import Performance
from compressor.student import Student
from compressor.threat import ThreatModel

HERE = Path(__file__).parent
ORACLE = SimpleNamespace(**runpy.run_path(str(HERE / "make_bmtard_oracle.py")))
STEPS = json.loads((HERE / "bmtard_float64.json").read_text())["steps"]
PERFORMANCE = Performance(device=torch.device("cpu"))


THREAT = ThreatModel(epsilon_pixels=ORACLE.EPSILON)


def make_teachers(dtype):
    robust, clean = (teacher.to(dtype) for teacher in ORACLE.make_teachers())
    return [
        SimpleNamespace(role=role, identity=role, logits=torch.no_grad()(network))
        for role, network in (("clean", clean), ("robust", robust))
    ]


def make_method(dtype=torch.float64):
    return BMTARD(
        teachers=TeacherSet.of(make_teachers(dtype)),
        attack=build_inner_attack(InnerAttackRecipe(), threat=THREAT, objective=cross_entropy),
        loss_scale=1 / ORACLE.NUM_CLASSES,
        temperature_rate=ORACLE.TEMPERATURE_RATE,
        temperature_bounds=(ORACLE.LOWEST, ORACLE.HIGHEST),
        weight_rate=ORACLE.WEIGHT_RATE,
    )


def make_batch(step, dtype=torch.float64):
    x, y, noise = ORACLE.make_batch(step)
    ids = torch.arange(len(y))
    return Batch(x_NCHW=x.to(dtype), y_N=y, index_N=ids, keys_N=ids), noise


@pytest.fixture(scope="module")
def steps():
    return take_steps(make_method())


def take_steps(method):
    """The same numbers as in the oracle's rows, from our code and torch's SGD."""
    student, rows = Student(ORACLE.make_student(), PERFORMANCE), []
    optimizer = torch.optim.SGD(
        student.network.parameters(),
        lr=ORACLE.LEARNING_RATE,
        momentum=ORACLE.MOMENTUM,
        weight_decay=ORACLE.WEIGHT_DECAY,
    )
    state = method.initial_state()
    for step in range(ORACLE.NUM_STEPS):
        factor = ORACLE.DECAY if step >= ORACLE.DECAY_FROM_STEP else 1.0
        moment = Moment(rate_factor=factor, fraction=step / ORACLE.NUM_STEPS)
        batch, noise = make_batch(step)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pgd, "normal", lambda keys_N, *, stream, shape, noise=noise: noise)
            result, state = method.step(student, batch, state, moment)
        optimizer.param_groups[0]["lr"] = ORACLE.LEARNING_RATE * factor
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()
        network = student.network
        rows.append(
            {
                **result.logged,
                "loss_of_graph": result.loss.item(),
                "next_robust_temperature": state.temperatures[0],
                "next_clean_temperature": state.temperatures[1],
                "sum_of_parameters": sum(float(p.detach().sum()) for p in network.parameters()),
                "sum_of_statistics": sum(
                    float(b.sum()) for b in network.buffers() if b.is_floating_point()
                ),
            }
        )
    return rows


@pytest.mark.parametrize("name", STEPS[0])
def test_bmtard_float64_equals_the_oracle(name, steps):
    ours, theirs = [row[name] for row in steps], [row[name] for row in STEPS]
    assert len(ours) == ORACLE.NUM_STEPS
    assert ours == pytest.approx(theirs, rel=0, abs=1e-9)


def test_bmtard_loss_with_graph_is_the_logged_one(steps):
    assert [row["loss_of_graph"] for row in steps] == pytest.approx(
        [row["loss_nats"] for row in STEPS], rel=0, abs=1e-9
    )


def test_pinned_steps_are_what_the_oracle_says():
    for pinned, now in zip(STEPS, ORACLE.run_oracle(), strict=True):
        assert now == pytest.approx(pinned, rel=0, abs=1e-9)


def test_pinned_steps_exercise_every_mechanism():
    def column(name):
        return [row[name] for row in STEPS]

    assert min(column("next_robust_temperature")) == ORACLE.LOWEST
    assert max(column("next_robust_temperature")) > ORACLE.LOWEST
    assert ORACLE.HIGHEST in column("next_clean_temperature")
    assert max(column("robust_weight_fraction")) > 0.502
    assert min(column("robust_weight_fraction")) < 0.488


def test_bmtard_float32_one_step_on_the_same_adversarial_batch():
    x, y, noise = ORACLE.make_batch(0)
    x_adv = ORACLE.attack(ORACLE.make_student(), x, y, noise).float()
    method = dataclasses.replace(
        make_method(torch.float32), attack=lambda model, x_NCHW, targets, *, keys_N: x_adv
    )
    student = Student(ORACLE.make_student().float(), PERFORMANCE)
    batch, _ = make_batch(0, torch.float32)
    result, state = method.step(student, batch, method.initial_state(), Moment())
    assert result.loss.dtype == torch.float32
    for name in ("loss_nats", "robust_loss_nats", "clean_loss_nats", "robust_weight_fraction"):
        assert result.logged[name] == pytest.approx(STEPS[0][name], rel=0, abs=1e-5)
    assert state.temperatures[1] == STEPS[0]["next_clean_temperature"]


def growing_strength(step):
    """Two steps in the first eight of twenty, three in the next, four in the last fifth."""
    num_steps = 2 if step < 8 else 3 if step < 16 else 4
    return {"num_steps": num_steps, "step_size": 12 / 255 / num_steps}


def test_rc_float64_equals_the_oracle_with_an_attack_that_grows():
    recipe = RCRecipe(
        loss_scale=1 / ORACLE.NUM_CLASSES,
        temperature_rate=ORACLE.TEMPERATURE_RATE,
        max_temperature=ORACLE.HIGHEST,
        weight_rate=ORACLE.WEIGHT_RATE,
    )
    teachers = make_teachers(torch.float64)
    method = build_method(recipe, threat=THREAT, teachers=teachers, num_steps=ORACLE.NUM_STEPS)
    theirs = ORACLE.run_oracle(growing_strength)
    for row, their_row in zip(take_steps(method), theirs, strict=True):
        assert {name: row[name] for name in their_row} == pytest.approx(their_row, rel=0, abs=1e-9)
    assert abs(theirs[-1]["robust_loss_nats"] - STEPS[-1]["robust_loss_nats"]) > 1e-4
