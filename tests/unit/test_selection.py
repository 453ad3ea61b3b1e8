"""Validation: judged on every held-out image, in eval mode, without touching the network."""

import pytest
import torch

from compressor.data import load_training_data
from compressor.performance import Performance
from compressor.performance_settings import PerformanceSettings
from compressor.proportions import Proportion
from compressor.recipe_file import parse_recipe
from compressor.selection import measure_on_validation

CPU = torch.device("cpu")
PERFORMANCE = Performance(device=CPU)
RECIPE = parse_recipe(
    {
        "name": "demo",
        "data": {"source": "digits", "validation_size": 300},
        "student": {"architecture": "tiny"},
        "method": {"name": "pgd_at"},
        "selection": {"num_steps": 3},
    },
    origin="test",
)


@pytest.fixture(scope="module")
def validation():
    settings = PerformanceSettings(num_workers=1)
    return load_training_data(RECIPE.data, seed=0, settings=settings, device=CPU).validation


@pytest.fixture
def network(make_tiny, validation):
    """Lived-in statistics, so that train mode would answer otherwise."""
    network = make_tiny(num_classes=10, num_channels=validation.image_shape[0])
    network(torch.rand(32, *validation.image_shape, generator=torch.Generator().manual_seed(0)))
    return network


def measure(network, validation):
    return measure_on_validation(network, validation, recipe=RECIPE, performance=PERFORMANCE)


class Constant(torch.nn.Module):
    """Says 3, with a slope that no attack can use."""

    def __init__(self):
        super().__init__()
        self.register_buffer("answer_K", torch.eye(10)[3])

    def forward(self, x_NCHW):
        return self.answer_K + 0 * x_NCHW.flatten(1)[:, :1]


def test_constant_answer_is_right_for_its_class(validation):
    expected = Proportion(num_correct=int((validation.labels_N == 3).sum()), num_total=300)
    assert measure(Constant(), validation) == (expected, expected)


def test_robust_is_not_above_clean_and_repeats(network, validation):
    clean, robust = measure(network, validation)
    assert clean.num_total == robust.num_total == 300
    assert robust.num_correct <= clean.num_correct
    assert measure(network, validation) == (clean, robust)


def test_network_is_left_alone(network, validation):
    network.train()
    network.bn2.eval()
    flags = [module.training for module in network.modules()]
    tensors = {key: value.clone() for key, value in network.state_dict().items()}
    measure(network, validation)
    assert [module.training for module in network.modules()] == flags
    assert all(torch.equal(network.state_dict()[key], value) for key, value in tensors.items())
    assert all(p.grad is None for p in network.parameters())
