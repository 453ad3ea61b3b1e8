"""Verification counts per image, in eval mode, and never believes an attack."""

from dataclasses import dataclass

import pytest
import torch

from compressor.attacks.build import evaluation_attacks
from compressor.data import evaluation_batches, load_test_split
from compressor.errors import InvalidEvaluationError
from compressor.networks import NetworkSpec, build_classifier
from compressor.performance import Performance
from compressor.performance_settings import PerformanceSettings
from compressor.recipe import DataRecipe
from compressor.threat import ThreatModel
from compressor.verification import verify_network

CPU = Performance(device=torch.device("cpu"))
THREAT = ThreatModel(epsilon_pixels=8 / 255)


@pytest.fixture(scope="module")
def split():
    recipe = DataRecipe(source="digits", validation_size=100)
    return load_test_split(recipe, settings=PerformanceSettings(), device=CPU.device, num_images=40)


@pytest.fixture
def network():
    spec = NetworkSpec(architecture="tiny", num_classes=10, image_shape=(1, 8, 8))
    return build_classifier(spec, seed=0)


@dataclass(frozen=True)
class Darken:
    """Moves every image by a constant."""

    threat: ThreatModel
    by: float

    def __call__(self, model, x_NCHW, targets, *, keys_N):
        return (x_NCHW - self.by).clamp(0, 1)


def test_worst_case_is_per_image(split, network):
    """Two attacks that break different images leave fewer than either."""
    attacks = {"a": Halves(THREAT, start=0), "b": Halves(THREAT, start=1)}
    result = verify_network(CornerReader(split), attacks, split, performance=CPU, batch_size=10)
    assert result.attacks["a"].accuracy.num_correct < result.clean.num_correct
    assert result.attacks["b"].accuracy.num_correct < result.clean.num_correct
    assert result.worst_case.num_correct < min(
        found.accuracy.num_correct for found in result.attacks.values()
    )
    assert result.worst_case.num_total == result.clean.num_total == 40


class CornerReader(torch.nn.Module):
    """Knows every test image, unless its corner pixel is lit."""

    def __init__(self, split):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        (batch,) = evaluation_batches(split, batch_size=split.num_images)
        self.known, self.labels = batch.x_NCHW.flatten(1), batch.y_N

    def forward(self, x_NCHW):
        nearest = torch.cdist(x_NCHW.flatten(1), self.known).argmin(dim=1)
        is_lit = x_NCHW[:, 0, 0, 0] > 0.01
        labels = torch.where(is_lit, (self.labels[nearest] + 1) % 10, self.labels[nearest])
        return torch.nn.functional.one_hot(labels, 10).float() + 0 * self.weight


@dataclass(frozen=True)
class Halves:
    """Lights the corner of every second image of a batch."""

    threat: ThreatModel
    start: int

    def __call__(self, model, x_NCHW, targets, *, keys_N):
        x_adv = x_NCHW.clone()
        x_adv[self.start :: 2, 0, 0, 0] += self.threat.epsilon_pixels
        return x_adv.clamp(0, 1)


def test_a_point_outside_the_threat_model_never_counts(split, network):
    attacks = {"cheat": Darken(THREAT, by=0.2)}
    with pytest.raises(InvalidEvaluationError, match="left its threat model"):
        verify_network(network, attacks, split, performance=CPU)


def test_network_is_judged_in_eval_mode_and_left_as_it_was(split, network):
    network.train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    verify_network(network, evaluation_attacks(THREAT), split, performance=CPU)
    assert network.training
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_batch_size_changes_nothing(split, network):
    attacks = evaluation_attacks(THREAT)
    small = verify_network(network, attacks, split, performance=CPU, batch_size=7)
    large = verify_network(network, attacks, split, performance=CPU, batch_size=40)
    assert small.clean == large.clean
    assert small.worst_case == large.worst_case
    for name in attacks:
        assert small.attacks[name].accuracy == large.attacks[name].accuracy


def test_progress_adds_up(split, network):
    seen = []
    attacks = {"fgsm": evaluation_attacks(THREAT)["fgsm"]}
    result = verify_network(
        network, attacks, split, performance=CPU, batch_size=16, observe=seen.append
    )
    assert [event.num_done for event in seen] == [16, 32, 40]
    assert seen[-1].num_correct == result.attacks["fgsm"].accuracy.num_correct


def test_not_a_number_is_never_right(split, network):
    with torch.no_grad():
        network.backbone.fc.bias.fill_(torch.nan)
    result = verify_network(network, {}, split, performance=CPU)
    assert result.clean.num_correct == 0


def test_a_point_that_is_not_a_number_never_counts(split, network):
    with pytest.raises(InvalidEvaluationError, match="left its threat model"):
        verify_network(network, {"nan": Darken(THREAT, by=float("nan"))}, split, performance=CPU)
