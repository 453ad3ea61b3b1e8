"""Gradients of several batches for one change of the weights."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from compressor.batch_groups import BatchGroups
from compressor.checkpoint import TrainState
from compressor.errors import InterruptedRunError
from compressor.interruption import StopWish
from compressor.methods.protocol import StepResult
from compressor.metrics import CheckpointSaved, StepDone
from compressor.performance_settings import PerformanceSettings
from compressor.ranks import Ranks
from compressor.recipe_file import parse_recipe
from compressor.training_step import take_step
from compressor.training_workflow import TrainingRequest, train

STEPS_PER_EPOCH = 5


def recipe_of(**training):
    return parse_recipe(
        {
            "name": "accumulated",
            "data": {"source": "digits", "validation_size": 100},
            "student": {"architecture": "tiny", "width": 0.5},
            "method": {"name": "cross_entropy"},
            "training": {"epochs": 2, "batch_size": 300, **training},
            "selection": {"num_steps": 1},
        },
        origin="the test",
    )


class Squares:
    """A method whose loss is the mean square of what the network answers."""

    def step(self, student, batch, state, moment):
        loss = student.network(batch).square().mean()
        return StepResult(loss=loss, logged={"loss_nats": loss.item()}), state


def test_the_mean_of_the_gradients_of_a_group_is_what_changes_the_weights():
    """Groups of two, two and one; the weights and their average do not move in between."""
    batches = torch.randn(STEPS_PER_EPOCH, 4, 3, generator=torch.Generator().manual_seed(0))
    settings = {"accumulate_batches": 2, "weight_decay": 0.0, "ema_decay": 0.2}
    network, recipe = nn.Linear(3, 2), recipe_of(**settings)
    expected = nn.Linear(3, 2)
    expected.load_state_dict(network.state_dict())
    options = {"lr": 0.1, "momentum": recipe.training.momentum}
    optimizer, reference = (
        torch.optim.SGD(net.parameters(), **options) for net in (network, expected)
    )
    average = {name: t.detach().clone() for name, t in network.state_dict().items()}
    expected_average = network.weight.detach().clone()
    decays = iter((1 / 10, 2 / 11, 0.2))  # 3 / 12 is over the limit
    training = SimpleNamespace(
        tensors=SimpleNamespace(network=network, optimizer=optimizer, average=average),
        recipe=recipe,
        num_steps=2 * STEPS_PER_EPOCH,
        groups=BatchGroups(size=2, num_batches=STEPS_PER_EPOCH),
        fraction_before=0.0,
        ranks=Ranks(),
        method=Squares(),
        student=SimpleNamespace(network=network),
    )
    for place, batch in enumerate(batches):
        state = TrainState(step=place, epoch=0, batch_in_epoch=place, method_state=None)
        take_step(training, batch, state)
        if place in {1, 3, 4}:
            group = batches[place - 1 : place + 1] if place < 4 else batches[4:]
            reference.zero_grad()
            sum(expected(one).square().mean() for one in group).div(len(group)).backward()
            reference.step()
            expected_average.lerp_(expected.weight.detach(), 1 - next(decays))
        torch.testing.assert_close(network.weight, expected.weight)
        torch.testing.assert_close(average["weight"], expected_average)


@pytest.mark.parametrize("size", [1, 3])
def test_nothing_is_saved_within_a_group(size, tmp_path):
    """Five batches an epoch: gradients that are not yet used would be lost."""
    events = []
    settings = PerformanceSettings(
        device="cpu", num_threads=1, checkpoint_every_minutes=1e-9, log_every_steps=1
    )
    request = TrainingRequest(out=tmp_path / "run", settings=settings)
    recipe = recipe_of(accumulate_batches=size, batch_size=240)
    train(recipe, request, observe=events.append)
    saved = {event.step for event in events if isinstance(event, CheckpointSaved)}
    assert len([event for event in events if isinstance(event, StepDone)]) == 10
    assert saved == {1: set(range(11)), 3: {0, 3, 5, 8, 10}}[size]


def test_a_stop_waits_for_the_end_of_the_group(tmp_path):
    stop = StopWish()

    def wish(event):
        if isinstance(event, StepDone) and event.step == 1:
            stop.signal_number = 2

    settings = PerformanceSettings(device="cpu", num_threads=1, log_every_steps=1)
    request = TrainingRequest(out=tmp_path / "run", settings=settings)
    recipe = recipe_of(accumulate_batches=3, batch_size=240)
    with pytest.raises(InterruptedRunError, match="stopped after step 3 of 10"):
        train(recipe, request, observe=wish, stop=stop)
