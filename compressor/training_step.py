"""One step of a run: what it needs, and what it changes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from compressor.architectures.shared_batch_norm import average_statistics
from compressor.batch_groups import BatchGroups
from compressor.checkpoint import TrainedTensors, TrainState, last_good
from compressor.data import Batch, TrainingData
from compressor.interruption import StopWish
from compressor.methods.protocol import Method, Moment
from compressor.metrics import Observer
from compressor.not_finite import explain_loss
from compressor.performance_settings import PerformanceSettings
from compressor.ranks import Ranks
from compressor.recipe import Recipe
from compressor.run_directory import RunDirectory
from compressor.schedules import Progress, num_steps_of, rate_factor
from compressor.student import Student
from compressor.teacher import Teacher


@dataclass(frozen=True, kw_only=True)
class Training:
    """The parts of one training run; the mutable ones are the tensors of the student."""

    recipe: Recipe
    settings: PerformanceSettings
    run: RunDirectory
    data: TrainingData
    student: Student
    method: Method[Any]
    tensors: TrainedTensors
    observe: Observer
    teachers: Sequence[Teacher] = ()
    """Those of the method, to be named where one is at fault."""
    resume_command: str
    """What to type after an interruption."""
    stop: StopWish = field(default_factory=StopWish)
    start_is_candidate: bool = False
    """Whether the weights before the first step may be selected: they may be good already."""
    fraction_before: float = 0.0
    """Of the run that the method knows, what was over before this training began."""

    @property
    def ranks(self) -> Ranks:
        """The processes that share every step; only the first one writes and observes."""
        return self.student.performance.ranks

    @property
    def steps_per_epoch(self) -> int:
        """Batches of one epoch, the last smaller one included."""
        return self.num_steps // self.recipe.training.epochs

    @property
    def groups(self) -> BatchGroups:
        """Of batches between two changes of the weights."""
        size = self.recipe.training.accumulate_batches
        return BatchGroups(size=size, num_batches=self.steps_per_epoch)

    @property
    def num_steps(self) -> int:
        """Steps of the whole run."""
        return num_steps_of(self.recipe, num_images=self.data.train.num_images)


def trained_tensors(student: Student, recipe: Recipe, method: Method[Any]) -> TrainedTensors:
    """Optimiser, moving average and what the method changes, at the start of a run."""
    training = recipe.training
    optimizer = torch.optim.SGD(
        student.network.parameters(),
        lr=training.learning_rate,
        momentum=training.momentum,
        weight_decay=training.weight_decay,
        nesterov=training.nesterov,
    )
    average = None
    if training.ema_decay is not None:
        average = {name: t.detach().clone() for name, t in student.network.state_dict().items()}
    return TrainedTensors(
        network=student.network,
        optimizer=optimizer,
        average=average,
        of_method=method.tensors(),
    )


def take_step(
    training: Training, batch: Batch, state: TrainState
) -> tuple[dict[str, float], object]:
    """One step, in place: what is logged of it, and the method's next state.

    Raises:
        NonFiniteLossError: if the loss is not finite; the step is not taken.
        TeacherError: if that is a teacher's fault.
    """
    optimizer, recipe = training.tensors.optimizer, training.recipe
    progress = Progress(
        epoch=state.epoch,
        step=state.step,
        num_epochs=recipe.training.epochs,
        num_steps=training.num_steps,
    )
    factor = rate_factor(recipe.training.schedule, progress)
    before = training.fraction_before
    fraction = before + (1 - before) * progress.fraction
    moment = Moment(fraction=fraction, rate_factor=factor)
    result, method_state = training.method.step(training.student, batch, state.method_state, moment)
    if not math.isfinite(result.logged["loss_nats"]):
        raise explain_loss(
            result.logged,
            batch,
            step=state.step + 1,
            teachers=training.teachers,
            of_method=training.tensors.of_method,
            ranks=training.ranks,
            last_good=last_good(training.run),
        )
    learning_rate = recipe.training.learning_rate * factor
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    place, num_in_group = training.groups.place(state.batch_in_epoch)
    if place == 0:
        optimizer.zero_grad(set_to_none=True)
    (result.loss / num_in_group).backward()  # type: ignore[no-untyped-call]
    if place == num_in_group - 1:
        _change_weights(training, state)
    return {**result.logged, "learning_rate_per_step": learning_rate}, method_state


def _change_weights(training: Training, state: TrainState) -> None:
    """By the gradients of all ranks and batches of the group."""
    optimizer, recipe = training.tensors.optimizer, training.recipe
    training.ranks.sum_gradients(training.student.network.parameters())
    if recipe.training.gradient_clip_norm is not None:
        torch.nn.utils.clip_grad_norm_(
            training.student.network.parameters(), recipe.training.gradient_clip_norm
        )
    optimizer.step()
    if recipe.training.batch_norm == "own_images":
        average_statistics(training.student.network, training.ranks)
    if recipe.training.ema_decay is not None:
        num_changes = training.groups.num_changes(
            epoch=state.epoch, batch_in_epoch=state.batch_in_epoch
        )
        decay = average_decay(recipe.training.ema_decay, num_changes=num_changes)
        _update_average(training.tensors, decay=decay)


def average_decay(limit: float, *, num_changes: int) -> float:
    """Factor of the average before the next change: it grows to `limit` with the changes so far.

    The average spans a ninth of them at most. With a constant factor the random weights of the
    start stay in it: after 948 changes at 0.999 they were 39 % of it, and it knew nothing. The ramp
    is that of TensorFlow's ExponentialMovingAverage with `num_updates`.
    """
    return min(limit, (1 + num_changes) / (10 + num_changes))


@torch.no_grad()
def _update_average(tensors: TrainedTensors, *, decay: float) -> None:
    """Weights and BatchNorm statistics move towards the present ones; counters are copied."""
    for name, value in tensors.network.state_dict().items():
        target = (tensors.average or {})[name]
        if target.is_floating_point():
            target.lerp_(value, 1 - decay)
        else:
            target.copy_(value)
