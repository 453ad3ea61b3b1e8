"""A teacher that cannot teach is noticed before hours are spent."""

import pytest
import torch

from compressor.attacks.pgd import PGD
from compressor.data import Batch
from compressor.errors import TeacherError
from compressor.randomness import sample_keys
from compressor.teacher import Teacher
from compressor.teacher_check import check_teacher, refuse_unfit
from compressor.threat import ThreatModel

ATTACK = PGD(threat=ThreatModel(epsilon_pixels=0.1), step_size_pixels=0.05, num_steps=5)


class Brightness(torch.nn.Module):
    """Class 1 where the mean pixel is above a half; `scale` decides how easily it is fooled."""

    def __init__(self, *, flip=False):
        super().__init__()
        self.backbone = torch.nn.Identity()
        self.sign = torch.nn.Parameter(torch.tensor(-1.0 if flip else 1.0))

    def forward(self, x_NCHW):
        score = self.sign * (x_NCHW.mean(dim=(1, 2, 3)) - 0.5)
        return torch.stack([-score, score], dim=1)


def make_teacher(role, network, **changes):
    return Teacher(
        name="it",
        role=role,
        answer=network,
        network=None if changes.get("blind") else network,
        spec=None,
        num_parameters=1,
        num_classes=2,
        sha256="0" * 64,
        num_bytes=1,
    )


def make_batch(gap):
    y_N = torch.arange(64) % 2
    x_NCHW = (0.5 + gap * (2 * y_N - 1))[:, None, None, None].expand(64, 1, 4, 4).clone().float()
    return Batch(x_NCHW=x_NCHW, y_N=y_N, index_N=y_N, keys_N=sample_keys(torch.arange(64), seed=0))


def check(teacher, batch):
    return check_teacher(teacher, [batch], attack=ATTACK)


def test_a_good_robust_teacher_passes():
    found = check(make_teacher("robust", Brightness()), make_batch(gap=0.3))
    assert found.problem is None
    assert found.clean.num_correct == found.robust.num_correct == 64
    refuse_unfit(found)


def test_chance_level_is_refused():
    found = check(make_teacher("clean", Brightness(flip=True)), make_batch(gap=0.3))
    with pytest.raises(TeacherError, match=r"no better than chance: 0.00 % \(0 of 64\)"):
        refuse_unfit(found)


def test_a_robust_teacher_that_falls_is_refused():
    found = check(make_teacher("robust", Brightness()), make_batch(gap=0.05))
    with pytest.raises(TeacherError, match="is not robust"):
        refuse_unfit(found)


def test_a_clean_teacher_may_fall():
    assert check(make_teacher("clean", Brightness()), make_batch(gap=0.05)).problem is None


def test_a_teacher_without_gradient_is_only_asked():
    found = check(make_teacher("robust", Brightness(), blind=True), make_batch(gap=0.05))
    assert found.robust is None
    assert found.problem is None
