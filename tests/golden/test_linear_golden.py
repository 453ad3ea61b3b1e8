"""Methods with one teacher or none against an oracle in numpy, and against the test vectors."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from compressor.attacks import pgd
from compressor.data import Batch
from compressor.method_recipes import (
    AdaADRecipe,
    ARDRecipe,
    CrossEntropyRecipe,
    DistillationRecipe,
    IADRecipe,
    PGDATRecipe,
    RSLADRecipe,
    TRADESRecipe,
)
from compressor.method_table import InnerAttackRecipe
from compressor.methods.adaad import AdaAD
from compressor.methods.ard import ARD
from compressor.methods.build import build_method
from compressor.methods.distillation import Distillation
from compressor.methods.protocol import Moment
from compressor.methods.rslad import RSLAD
from compressor.performance import Performance
from compressor.student import Student
from compressor.teacher import Teacher
from compressor.threat import ThreatModel

ORACLE = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / "linear_oracle.py")))
RECIPES = {
    "distillation": DistillationRecipe,
    "ard": ARDRecipe,
    "iad": IADRecipe,
    "rslad": RSLADRecipe,
    "adaad": AdaADRecipe,
    "cross_entropy": CrossEntropyRecipe,
    "pgd_at": PGDATRecipe,
    "trades": TRADESRecipe,
}
WITHOUT_ATTACK = {"distillation", "cross_entropy"}
WITHOUT_TEACHER = {"cross_entropy", "pgd_at", "trades"}
SOFT = {"temperature": 4.0, "teacher_weight": 0.9, "loss_scale": 0.7}
TRUST = {"begin_fraction": 0.5, "trust_exponent": 0.1}
CASES = {
    "distillation": ("distillation", SOFT),
    "distillation, no labels": ("distillation", SOFT | {"teacher_weight": 1.0}),
    "ard": ("ard", {"temperature": 30.0, "teacher_weight": 1.0, "loss_scale": 0.25}),
    "ard with labels": ("ard", SOFT | {"temperature": 2.5}),
    "iad": ("iad", TRUST | {"temperature": 1.0, "teacher_weight": 1.0, "loss_scale": 1.0}),
    "iad as released": (
        "iad",
        TRUST | SOFT | {"trust_exponent": 2.0, "teacher_trust": "full", "self_target": "live"},
    ),
    "iad detached": ("iad", TRUST | SOFT | {"trust_exponent": 1.5, "self_target": "detached"}),
    "rslad": ("rslad", {"robust_weight": 5 / 6, "loss_scale": 0.25}),
    "rslad, adversarial alone": ("rslad", {"robust_weight": 1.0, "loss_scale": 1.0}),
    "adaad": ("adaad", {"robust_weight": 1.0, "loss_scale": 0.25}),
    "adaad with clean": ("adaad", {"robust_weight": 0.6, "loss_scale": 1.0}),
    "cross_entropy": ("cross_entropy", {}),
    "pgd_at": ("pgd_at", {}),
    "trades": ("trades", {"beta": 6.0}),
}


class Linear(nn.Module):
    def __init__(self, weight, bias):
        super().__init__()
        self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(6, 4).double())
        with torch.no_grad():
            self.backbone[1].weight.copy_(torch.from_numpy(weight))
            self.backbone[1].bias.copy_(torch.from_numpy(bias))

    def forward(self, x):
        return self.backbone(x)


def make_method(name, settings):
    table = RECIPES[name](**settings)
    if name not in WITHOUT_ATTACK:
        attack = InnerAttackRecipe(
            num_steps=ORACLE.ATTACK_STEPS,
            step_size_pixels=ORACLE.STEP_SIZE,
            start=table.attack.start,
        )
        table = table.model_copy(update={"attack": attack})
    network = Linear(*ORACLE.teacher())
    facts = {"spec": None, "num_parameters": None, "num_classes": 4, "sha256": "", "num_bytes": 0}
    teacher = Teacher(name="t", role="robust", answer=network, network=network, **facts)
    return build_method(
        table,
        threat=ThreatModel(epsilon_pixels=ORACLE.EPSILON),
        teachers=[] if name in WITHOUT_TEACHER else [teacher],
        num_steps=ORACLE.NUM_STEPS,
    )


def run_ours(name, settings):
    student = Student(Linear(*ORACLE.student_start()), Performance(device=torch.device("cpu")))
    method, rows = make_method(name, settings), []
    layer = student.network.backbone[1]
    optimizer = torch.optim.SGD(
        student.network.parameters(), lr=ORACLE.LEARNING_RATE, momentum=ORACLE.MOMENTUM
    )
    state = method.initial_state()
    for step in range(ORACLE.NUM_STEPS):
        images, labels, flat, gauss = (torch.from_numpy(part) for part in ORACLE.batch(step))
        x = images.view(-1, *ORACLE.SHAPE)
        ids = torch.arange(len(x))
        batch = Batch(x_NCHW=x, y_N=labels, index_N=ids, keys_N=ids)
        with pytest.MonkeyPatch.context() as patch:
            for draw, noise in (("uniform", flat), ("normal", gauss)):
                patch.setattr(
                    pgd, draw, lambda *_, noise=noise, shape, **__: noise.view(-1, *shape)
                )
            moment = Moment(fraction=step / ORACLE.NUM_STEPS)
            result, state = method.step(student, batch, state, moment)
        optimizer.zero_grad()
        result.loss.backward()
        row = {
            "loss": result.loss.item(),
            "d_weight": layer.weight.grad.numpy().copy(),
            "d_bias": layer.bias.grad.numpy().copy(),
        }
        optimizer.step()
        rows.append(row | {"weight": layer.weight.detach().numpy().copy(), **result.logged})
    return rows


@pytest.mark.parametrize("case", CASES)
def test_float64_equals_the_oracle(case):
    name, settings = CASES[case]
    ours, theirs = run_ours(name, settings), ORACLE.run(name, **settings)
    assert len(ours) == len(theirs) == ORACLE.NUM_STEPS
    for mine, expected in zip(ours, theirs, strict=True):
        for key, value in expected.items():
            np.testing.assert_allclose(mine[key], value, rtol=0, atol=1e-11, err_msg=key)
        assert mine["loss_nats"] == pytest.approx(expected["loss"], rel=0, abs=1e-11)
        assert np.abs(expected["d_weight"]).max() > 1e-3


def test_iad_oracle_meets_both_phases():
    rows = run_ours(*CASES["iad"])
    assert ["teacher_trust_fraction" in row for row in rows] == [False, False, True, True]
    assert all(0 < row["teacher_trust_fraction"] < 0.95 for row in rows[2:])
    assert all(row["introspection_loss_nats"] > 1e-4 for row in rows[2:])


ROBUST = [[2.0, 1.0, 0.5, 0.0], [0.2, 1.8, 0.9, 0.1]]
CLEAN = [[9.0, 1.0, 0.0, -1.0], [0.0, 7.0, 2.0, 1.0]]
ON_ADV = [[1.0, 0.8, 0.2, 0.0], [0.5, 0.6, 0.4, 0.1]]
ON_CLEAN = [[1.5, 0.5, 0.0, 0.2], [0.1, 1.2, 0.6, 0.3]]
SLOPE_ON_ADV = [
    [-0.02498589, 0.01218822, 0.00515157, 0.00764610],
    [0.01987449, -0.03225115, 0.00235871, 0.01001795],
]


def float64(rows):
    return torch.tensor(rows, dtype=torch.float64)


def answers(on_clean, on_adv):
    """A network that knows two batches: zeros are clean, ones adversarial."""
    tables = {0.0: float64(on_clean), 1.0: float64(on_adv)}
    for table in tables.values():
        table.requires_grad_()
    return SimpleNamespace(
        tables=tables,
        logits=lambda x: tables[float(x.flatten()[0])],
        logits_with_gradient=lambda x: tables[float(x.flatten()[0])],
        evaluation_view=lambda: None,
    )


def to_ones(model, x_NCHW, targets, *, keys_N):
    return torch.ones_like(x_NCHW)


def step_on_vectors(method):
    x = torch.zeros(2, 1, 1, 1).double()
    batch = Batch(x_NCHW=x, y_N=torch.tensor([0, 1]), index_N=None, keys_N=None)
    student = answers(ON_CLEAN, ON_ADV)
    result, _ = method.step(student, batch, method.initial_state(), Moment())
    result.loss.backward()
    return result, student.tables[1.0].grad


def test_adaad_on_the_test_vectors():
    """The robust teacher's table on adversarial images, the clean one's on clean images."""
    teacher = answers(CLEAN, ROBUST)
    method = AdaAD(robust_teacher=teacher, attack=to_ones, robust_weight=0.75, loss_scale=1 / 4)
    result, slope = step_on_vectors(method)
    assert result.logged["robust_loss_nats"] == pytest.approx(0.03170869, abs=5e-9)
    assert result.logged["clean_loss_nats"] == pytest.approx(0.17360345, abs=5e-9)
    expected = 0.75 * 0.03170869 + 0.25 * 0.17360345
    assert result.loss.item() == pytest.approx(expected, abs=5e-9)
    torch.testing.assert_close(slope, 0.75 * float64(SLOPE_ON_ADV), atol=2e-8, rtol=0)
    assert teacher.tables[1.0].grad is None


def test_rslad_and_ard_on_the_test_vectors():
    """At T = 1 both ask the teacher about clean images; the batch mean is four element means."""
    teacher = answers(ROBUST, CLEAN)
    rslad = RSLAD(robust_teacher=teacher, attack=to_ones, robust_weight=1.0, loss_scale=1.0)
    ard = ARD(
        robust_teacher=teacher, attack=to_ones, temperature=1.0, teacher_weight=1.0, loss_scale=0.25
    )
    for method, factor in ((rslad, 4), (ard, 1)):
        result, slope = step_on_vectors(method)
        assert result.loss.item() == pytest.approx(factor * 0.12683477 / 4, abs=5e-9)
        expected = factor * float64(SLOPE_ON_ADV)
        torch.testing.assert_close(slope, expected, atol=2e-8, rtol=0)


def test_distillation_on_the_test_vectors():
    teacher = answers(CLEAN, ROBUST)
    method = Distillation(teacher=teacher, temperature=1.0, teacher_weight=1.0, loss_scale=1.0)
    result, _ = step_on_vectors(method)
    assert result.loss.item() == pytest.approx(0.69441379, abs=5e-9)
