"""Whole evaluations of models whose robustness can be computed, image by image.

N images, K classes, D pixels, H hidden units, P points, L lines. The checks are plain functions,
so that `test_planted_bugs.py` can run them on an evaluation that was broken on purpose.
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
from compressor.performance import Performance
from compressor.threat import ThreatModel
from compressor.verification.journal import Journal
from compressor.verification.verification import VerificationPlan, attack_chunks, network_subject

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
    lead_over_most_N: torch.Tensor
    """Lead of the label over what an attacker can take from it; robust above 1."""

    @property
    def is_robust(self):
        return self.lead_over_most_N > 1

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
        class_names=tuple(map(str, range(10))),
        image_shape=tuple(levels_NCHW.shape[1:]),
        index_N=torch.arange(len(y_N)),
        labels_N=y_N,
        index_sha256="",
        num_available=len(y_N),
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
    """What a whole evaluation says."""
    plan = VerificationPlan(stages=stages, batch_size=batch_size)
    *_, found = attack_chunks(subject, split, plan, journal=Journal.in_memory())
    return found


def standing(found):
    """Which images no attack broke, in the order of the split."""
    samples = sorted(found.samples, key=lambda sample: sample.index)
    return torch.tensor([sample.broken_by is None for sample in samples])


def linear_case(norm, *, num_images=50):
    """Far from black and white: robust iff no rival is nearer than epsilon, in the dual norm."""
    generator = torch.Generator().manual_seed(3)
    network = _linear_network(generator)
    levels_NCHW = torch.randint(64, 192, (num_images, 3, 8, 8), generator=generator)
    lead_NK, slope_NKD = _leads(network, levels_NCHW)
    length_NK = slope_NKD.abs().sum(-1) if norm == "linf" else slope_NKD.norm(dim=-1)
    threat = ThreatModel(norm=norm, epsilon_pixels=EPSILON_PIXELS[norm])
    return _linear_case(network, levels_NCHW, threat, lead_NK / (threat.epsilon_pixels * length_NK))


def box_case(*, num_images=50):
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
    return _linear_case(network, levels_NCHW, threat, lead_NK / loss_NKD.sum(-1))


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


def _linear_case(network, levels_NCHW, threat, lead_over_most_NK):
    y_N = _labels(network, levels_NCHW)
    rivals_NK = lead_over_most_NK.scatter(1, y_N[:, None], torch.inf)
    return _case(network, levels_NCHW, threat, rivals_NK.amin(dim=1))


def planar_case(*, num_images=40):
    """Two pixels and one hidden layer of ReLU; linf."""
    generator = torch.Generator().manual_seed(5)
    network = nn.Sequential(nn.Flatten(), nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 4))
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    kinks_H2 = torch.rand(8, 2, generator=generator)
    network[1].bias.data = -(network[1].weight.data * kinks_H2).sum(dim=1)
    levels_NCHW = torch.randint(0, 256, (num_images, 1, 1, 2), generator=generator)
    threat, y_N = ThreatModel(epsilon_pixels=0.1), _labels(network, levels_NCHW)
    x_N2 = levels_NCHW.flatten(1).double() / 255
    worst_N = torch.stack(
        [_worst_margin(network, x_2, int(y), threat) for x_2, y in zip(x_N2, y_N, strict=True)]
    )
    return _case(network, levels_NCHW, threat, 1 - worst_N)


def _worst_margin(network, x_2, y, threat):
    """Between the lines on which hidden units begin the network is linear.

    So the worst point around an image is where two such lines, or sides of the square, meet.
    """
    weight_H2, bias_H = network[1].weight.data.double(), network[1].bias.data.double()
    low_2, high_2 = ((x_2 + sign * threat.epsilon_pixels).clamp(0, 1) for sign in (-1, 1))
    normals_L2 = torch.cat([weight_H2, torch.eye(2).double(), torch.eye(2).double()])
    offsets_L = torch.cat([-bias_H, low_2, high_2])
    pairs_P2 = torch.tensor(list(combinations(range(len(offsets_L)), 2)))
    pairs_P2 = pairs_P2[torch.linalg.det(normals_L2[pairs_P2]).abs() > 1e-9]
    points_P2 = torch.linalg.solve(normals_L2[pairs_P2], offsets_L[pairs_P2])
    is_inside_P2 = (points_P2 >= low_2 - 1e-9) & (points_P2 <= high_2 + 1e-9)
    points_P2 = points_P2[is_inside_P2.all(dim=1)]
    hidden_PH = (points_P2 @ weight_H2.T + bias_H).relu()
    logits_PK = hidden_PH @ network[3].weight.data.double().T + network[3].bias.data.double()
    margin_PK = logits_PK - logits_PK[:, y : y + 1]
    margin_PK[:, y] = -torch.inf
    return margin_PK.max()


def _labels(network, levels_NCHW):
    with torch.no_grad():
        return network(levels_NCHW.float() / 255).argmax(dim=1)


def _case(network, levels_NCHW, threat, lead_over_most_N):
    assert float((lead_over_most_N - 1).abs().min()) > 1e-4  # or rounding decides
    assert 0.3 < float((lead_over_most_N > 1).double().mean()) < 0.7  # or the case says little
    return Case(
        network=network,
        levels_NCHW=levels_NCHW.to(torch.uint8),
        y_N=_labels(network, levels_NCHW),
        threat=threat,
        lead_over_most_N=lead_over_most_N,
    )


def misjudged(case, names, *, mode="fast", batch_size=1000):
    """Which images stand though they can be broken, and which were broken though robust."""
    stages = stages_of(names, threat=case.threat, mode=mode)
    found = evaluate(case.subject, case.split, stages, batch_size=batch_size)
    stands_N = standing(found)
    assert len(stands_N) == len(case.y_N), "an image is missing"
    return stands_N & ~case.is_robust, case.is_robust & ~stands_N


def check_exact(case, names=AUTOATTACK, *, mode="fast", batch_size=1000):
    """What is robust stands, and nothing else."""
    missed_N, wronged_N = misjudged(case, names, mode=mode, batch_size=batch_size)
    assert not (missed_N | wronged_N).any(), (
        f"{int(missed_N.sum())} of {len(missed_N)} images flatter, "
        f"{int(wronged_N.sum())} robust ones were broken"
    )


def check_exact_but_for_the_border(case, names, *, mode="fast"):
    """Misses only what it would break if epsilon were 1 % larger."""
    missed_N, wronged_N = misjudged(case, names, mode=mode)
    assert not wronged_N.any()
    assert (case.lead_over_most_N[missed_N] > 0.99).all()


def check_sound_and_no_more(case, names, *, mode):
    """What is robust stands, and something else does, as is known of this attack."""
    missed_N, wronged_N = misjudged(case, names, mode=mode)
    assert not wronged_N.any()
    assert 0 < int(missed_N.sum()) < int((~case.is_robust).sum())


@both_norms
@both_modes
@pytest.mark.parametrize("names", [("apgd_dlr",), ("apgd_t",), AUTOATTACK], ids="+".join)
def test_linear_model_is_judged_exactly(norm, mode, names):
    check_exact(linear_case(norm), names, mode=mode)


@pytest.mark.parametrize(("norm", "mode"), [("linf", "compat"), ("l2", "fast")])
def test_linear_model_is_judged_by_fab_up_to_its_overshoot(norm, mode):
    """FAB goes 5 % too far and comes back in smaller steps."""
    check_exact_but_for_the_border(linear_case(norm), ("fab_t",), mode=mode)


@both_norms
@both_modes
@pytest.mark.parametrize("name", ["apgd_ce", "square"])
def test_linear_model_that_is_robust_stands_against_weaker_attacks(norm, mode, name):
    """Cross-entropy climbs towards classes out of reach; so few random squares do not suffice."""
    check_sound_and_no_more(linear_case(norm), (name,), mode=mode)


@both_modes
@pytest.mark.parametrize("names", [("apgd_t",), AUTOATTACK], ids="+".join)
def test_linear_model_at_the_border_of_the_box_is_judged_exactly(mode, names):
    check_exact(box_case(), names, mode=mode)


@pytest.mark.parametrize(("name", "mode"), [("apgd_dlr", "compat"), ("fab_t", "fast")])
def test_linear_model_at_the_border_of_the_box_is_judged_closely(name, mode):
    check_exact_but_for_the_border(box_case(), (name,), mode=mode)


@both_modes
def test_planar_relu_network_is_judged_exactly(mode):
    check_exact(planar_case(), mode=mode)


@both_norms
@both_modes
def test_images_certified_by_interval_bounds_stand(norm, mode):
    generator = torch.Generator().manual_seed(6)
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 24), nn.ReLU(), nn.Linear(24, 5))
    for layer in (network[1], network[3]):
        layer.weight.data = torch.randn(layer.weight.shape, generator=generator)
        layer.bias.data = torch.randn(layer.bias.shape, generator=generator)
    levels_NCHW = torch.randint(0, 256, (60, 3, 4, 4), generator=generator)
    threat = ThreatModel(norm=norm, epsilon_pixels={"linf": 0.01, "l2": 0.05}[norm])
    y_N = _labels(network, levels_NCHW)
    is_certified_N = _is_certified(network, levels_NCHW.flatten(1) / 255, y_N, threat)
    split = split_of(levels_NCHW.to(torch.uint8), y_N)
    stages = stages_of(AUTOATTACK, threat=threat, mode=mode)
    stands_N = standing(evaluate(network_subject(network.eval(), CPU), split, stages))
    assert stands_N[is_certified_N].all()
    assert 10 < int(is_certified_N.sum()) <= int(stands_N.sum()) < 58  # of 60


def _is_certified(network, x_ND, y_N, threat):
    """Gowal et al., "Scalable verified training for provably robust image classification", 2019.

    In l2 the first layer is bounded by Cauchy and Schwarz.
    """
    first, last = network[1], network[3]
    order = 1 if threat.norm == "linf" else 2
    reach_H = threat.epsilon_pixels * first.weight.data.norm(p=order, dim=1)
    centre_NH = x_ND @ first.weight.data.T + first.bias.data
    low_NH, high_NH = (centre_NH - reach_H).relu(), (centre_NH + reach_H).relu()
    slope_NKH = last.weight.data[y_N][:, None] - last.weight.data
    low_NK = torch.where(slope_NKH > 0, slope_NKH * low_NH[:, None], slope_NKH * high_NH[:, None])
    low_NK = low_NK.sum(-1) + last.bias.data[y_N][:, None] - last.bias.data
    return (low_NK.scatter(1, y_N[:, None], torch.inf) > 0).all(dim=1)
