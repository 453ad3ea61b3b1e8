"""The moving average of the weights: its factor, and how often the weights have changed."""

import pytest
import torch
from torch import nn

from compressor.batch_groups import BatchGroups
from compressor.checkpoint import TrainedTensors
from compressor.training_step import _update_average, average_decay


@pytest.mark.parametrize(
    ("num_changes", "expected"), [(0, 0.1), (8, 0.5), (80, 0.9), (8990, 0.999), (10**6, 0.999)]
)
def test_factor_grows_to_its_limit(num_changes, expected):
    assert average_decay(0.999, num_changes=num_changes) == pytest.approx(expected, rel=1e-12)


def test_a_short_run_has_forgotten_its_start():
    """Weights that jump from 1 to 0 in the first change; a constant 0.999 would leave 0.39."""
    network = nn.BatchNorm1d(1)
    average = {name: t.detach().clone() for name, t in network.state_dict().items()}
    tensors = TrainedTensors(network=network, optimizer=None, average=average, of_method={})
    nn.init.zeros_(network.weight)
    network.num_batches_tracked += 7
    for num_changes in range(948):
        _update_average(tensors, decay=average_decay(0.999, num_changes=num_changes))
    assert 0 <= float(average["weight"]) < 1e-9
    assert int(average["num_batches_tracked"]) == 7


@pytest.mark.parametrize(("size", "num_batches"), [(1, 4), (3, 7), (3, 6), (5, 4)])
def test_changes_are_counted_over_epochs(size, num_batches):
    groups = BatchGroups(size=size, num_batches=num_batches)
    num_done = 0
    for epoch in range(3):
        for batch in range(num_batches):
            assert groups.num_changes(epoch=epoch, batch_in_epoch=batch) == num_done
            num_done += not groups.is_amid(batch + 1)


def test_average_is_the_exponential_one():
    network = nn.Linear(1, 1, bias=False)
    average = {"weight": torch.ones(1, 1)}
    tensors = TrainedTensors(network=network, optimizer=None, average=average, of_method={})
    for value in (3.0, 5.0):
        nn.init.constant_(network.weight, value)
        _update_average(tensors, decay=0.75)
    assert float(average["weight"]) == pytest.approx(0.75 * (0.75 * 1 + 0.25 * 3) + 0.25 * 5)
