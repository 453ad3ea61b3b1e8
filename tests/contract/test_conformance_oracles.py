"""Whole evaluations of models whose robustness can be computed, image by image.

N images, K classes, D pixels, H hidden units, P points. The checks are plain functions, so that
`test_planted_bugs.py` can run them on an evaluation that was broken on purpose.
"""

from dataclasses import dataclass, replace
from itertools import combinations

import pytest
import torch
from torch import nn

from compressor.attacks.compat import ReleasedSearch
from compressor.attacks.square import Square
from compressor.attacks.stages import AUTOATTACK, build_stages
from compressor.data import TestSplit
from compressor.image_storage import ResidentImages
from compressor.journal import Journal
from compressor.performance import Performance
from compressor.threat import ThreatModel
from compressor.verification import VerificationPlan, attack_chunks, network_subject

CPU = Performance(device=torch.device("cpu"))
EPSILON_PIXELS = {"linf": 2 / 255, "l2": 0.1}

both_norms = pytest.mark.parametrize("norm", EPSILON_PIXELS)
both_modes = pytest.mark.parametrize("mode", ["fast", "compat"])


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """A network, 8-bit images that it gets right, and the truth about each of them."""

    network: nn.Module
    levels_NCHW: torch.Tensor
    y_N: torch.Tensor
    threat: ThreatModel
    surplus_N: torch.Tensor
    """Lead of the label over what can be taken away from it; robust above 1."""

    @property
    def split(self):
        return split_of(self.levels_NCHW, self.y_N)

    @property
    def subject(self):
        return network_subject(self.network.eval(), CPU)


def split_of(levels_NCHW, y_N):
    """Test images that lie in memory."""
    return TestSplit(
        name="test",
        class_names=tuple(map(str, range(int(y_N.max()) + 1))),
        image_shape=tuple(levels_NCHW.shape[1:]),
        index_N=torch.arange(len(y_N)),
        labels_N=y_N,
        index_sha256="",
        content_sha256="",
        storage=ResidentImages(images_NHWC=levels_NCHW.permute(0, 2, 3, 1).contiguous()),
    )


def stages_of(names, *, threat, mode="fast", num_queries=100):
    """As `build_stages`, with a Square that a test can wait for."""
    stages = build_stages(names, threat=threat, mode=mode, batch_size=512)
    return [replace(stage, search=_shorter(stage.search, num_queries)) for stage in stages]


def _shorter(search, num_queries):
    if isinstance(search, Square):
        return replace(search, num_queries=num_queries)
    if isinstance(search, ReleasedSearch):
        return replace(search, attack=_shorter(search.attack, num_queries))
    return search


def evaluate(subject, split, stages, *, batch_size=1000):
    """The samples of a whole evaluation, in the order of the split."""
    plan = VerificationPlan(stages=stages, batch_size=batch_size)
    *_, found = attack_chunks(subject, split, plan, journal=Journal.in_memory())
    return sorted(found.samples, key=lambda sample: sample.index)


def stands_N(samples):
    return torch.tensor([sample.broken_by is None for sample in samples])


def linear_case(norm, *, num_images=80):
    """Far from black and white: robust iff no rival is nearer than epsilon, in the dual norm."""
    generator = torch.Generator().manual_seed(3)
    network = _linear_network(generator)
    levels_NCHW = torch.randint(64, 192, (num_images, 3, 8, 8), generator=generator)
    lead_NK, slope_NKD = _leads(network, levels_NCHW)
    length_NK = slope_NKD.abs().sum(-1) if norm == "linf" else slope_NKD.norm(dim=-1)
    threat = ThreatModel(norm=norm, epsilon_pixels=EPSILON_PIXELS[norm])
    return _case(network, levels_NCHW, threat, lead_NK / (threat.epsilon_pixels * length_NK))


def box_case(*, num_images=80):
    """Many black and white pixels, which can only move inwards; linf."""
    generator = torch.Generator().manual_seed(4)
    network = _linear_network(generator)
    levels_NCHW = torch.randint(-200, 456, (num_images, 3, 8, 8), generator=generator)
    levels_NCHW = levels_NCHW.clamp(0, 255)
    threat = ThreatModel(epsilon_pixels=6 / 255)
    x_ND = levels_NCHW.flatten(1).double() / 255
    up_N1D = (1 - x_ND).clamp(max=threat.epsilon_pixels)[:, None]
    down_N1D = x_ND.clamp(max=threat.epsilon_pixels)[:, None]
    lead_NK, slope_NKD = _leads(network, levels_NCHW)
    loss_NKD = torch.where(slope_NKD < 0, -slope_NKD * up_N1D, slope_NKD * down_N1D)
    return _case(network, levels_NCHW, threat, lead_NK / loss_NKD.sum(-1))


def _linear_network(generator):
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 10, bias=False))
    network[1].weight.data = torch.randn(10, 192, generator=generator) / 192**0.5
    return network


def _leads(network, levels_NCHW):
    """How far the label leads each class, [N, K], and how fast that falls, [N, K, D]."""
    weight_KD = network[1].weight.data.double()
    logits_NK = levels_NCHW.flatten(1).double() / 255 @ weight_KD.T
    y_N = logits_NK.argmax(dim=1)
    return logits_NK.gather(1, y_N[:, None]) - logits_NK, weight_KD[y_N][:, None] - weight_KD


def planar_case(*, num_images=60):
    """Two pixels and one hidden layer of ReLU; linf.

    Between the lines where a hidden unit begins the network is linear, so the worst point of the
    square around an image is where two of these lines or of its sides meet.
    """
    generator = torch.Generator().manual_seed(5)
    network = nn.Sequential(nn.Flatten(), nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 4))
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    network[1].bias.data = -network[1].weight.data @ torch.rand(2, 8, generator=generator).diag()
    levels_NCHW = torch.randint(0, 256, (num_images, 1, 1, 2), generator=generator)
    return network, levels_NCHW


def _case(network, levels_NCHW, threat, surplus_NK):
    with torch.no_grad():
        y_N = network(levels_NCHW.float() / 255).argmax(dim=1)
    surplus_N = surplus_NK.scatter(1, y_N[:, None], torch.inf).amin(dim=1)
    assert float((surplus_N - 1).abs().min()) > 1e-4  # or rounding decides
    assert 0.3 < float((surplus_N > 1).double().mean()) < 0.7  # or the case says little
    return Case(
        network=network,
        levels_NCHW=levels_NCHW.to(torch.uint8),
        y_N=y_N,
        threat=threat,
        surplus_N=surplus_N,
    )
