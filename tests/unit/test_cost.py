"""Costs are counted, not guessed."""

import torch

from compressor.architectures.build import build_backbone
from compressor.cost import count_multiply_adds, measure_latencies


def test_multiply_adds_of_a_known_network():
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1),
        torch.nn.Conv2d(8, 8, 3, padding=1, groups=8),
        torch.nn.Flatten(),
        torch.nn.Linear(8 * 16, 5),
    )
    assert count_multiply_adds(network, (3, 4, 4)) == 8 * 16 * 27 + 8 * 16 * 9 + 8 * 16 * 5


def test_multiply_adds_of_resnet18_are_the_published_ones():
    network = build_backbone("resnet18", num_classes=10, image_shape=(3, 32, 32))
    assert 0.55e9 < count_multiply_adds(network, (3, 32, 32)) < 0.56e9


def test_counting_leaves_the_network_as_it_was():
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2)).train()
    count_multiply_adds(network, (1, 8, 8))
    assert network.training
    assert int(network[1].num_batches_tracked) == 0
    assert not network[0]._forward_hooks


def test_latencies_are_ordered_and_interleaved():
    calls = []
    models = {name: lambda x, name=name: calls.append(name) for name in ("a", "b")}
    found = measure_latencies(models, (1, 2, 2))
    assert calls[:4] == ["a", "b", "a", "b"]
    assert all(v.low_ms <= v.median_ms <= v.high_ms for v in found.values())
