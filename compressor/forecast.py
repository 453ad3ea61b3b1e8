"""What a run will cost, from a few of its own steps on this very machine."""

import copy
import resource
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from compressor.augmentation import Augmentation
from compressor.checkpoint import TrainState
from compressor.data import Batch, training_batches
from compressor.host_memory import reachable_bytes
from compressor.out_of_memory import LESS_FOR_TRAINING, what_was_said
from compressor.selection import measure_on_validation
from compressor.trainer import is_validation_due
from compressor.training_step import Training, take_step

NUM_MOMENTS = 10
STEPS_PER_MOMENT = 3
_NUM_WARM_UP = 1
_NUM_VALIDATED = 256
_NUM_CHECKPOINTS = 4
"""The best, the last two, and the one that is being written."""
_MEMORY_RESERVE = 0.9
"""Of what is free; the rest is for those who come."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Seconds, bytes, and what there is of them."""

    num_steps: int
    num_epochs: int
    step_seconds: float
    """Mean over the run, the data included."""
    step_seconds_range: tuple[float, float]
    """Of the moments at which steps were taken: how sure the mean is."""
    num_validations: int
    validation_seconds: float
    """One."""
    peak_memory_bytes: int
    free_memory_bytes: int
    disk_bytes: int
    free_disk_bytes: int

    @property
    def epoch_seconds(self) -> float:
        """Without validation."""
        return self.step_seconds * self.num_steps / self.num_epochs

    @property
    def total_seconds(self) -> float:
        """Steps and validations; teachers' checks and the report are left out."""
        steps = self.step_seconds * self.num_steps
        return steps + self.num_validations * self.validation_seconds

    @property
    def problems(self) -> tuple[str, ...]:
        """What will not fit, and which setting to change."""
        found = []
        if self.peak_memory_bytes > _MEMORY_RESERVE * self.free_memory_bytes:
            found.append(
                f"memory: {_gib(self.peak_memory_bytes)} are needed, "
                f"{_gib(self.free_memory_bytes)} are there; {LESS_FOR_TRAINING}"
            )
        if self.disk_bytes > self.free_disk_bytes:
            found.append(
                f"disk: {_gib(self.disk_bytes)} are needed, {_gib(self.free_disk_bytes)} are free; "
                "choose another folder with --out"
            )
        return tuple(found)


@dataclass(frozen=True, kw_only=True)
class NoForecast:
    """Memory ended while the run was prepared or took its steps, so that there are no numbers."""

    problems: tuple[str, ...]

    @classmethod
    def after(cls, error: Exception) -> "NoForecast":
        """Of an error that is out of memory."""
        return cls(problems=(f"memory: it ended ({what_was_said(error)}); {LESS_FOR_TRAINING}",))


def forecast(training: Training, *, out: Path) -> Forecast:
    """Take steps at moments spread over the run, and validate some images.

    The student of `training` is changed; nothing is written.
    """
    seconds = list(_timed_steps(training))
    validation_seconds = _validation_seconds(training)
    recipe = training.recipe
    num_candidates = 1 if training.tensors.average is None else 2
    due = [is_validation_due(training, epoch) for epoch in range(1, recipe.training.epochs + 1)]
    return Forecast(
        num_steps=training.num_steps,
        num_epochs=recipe.training.epochs,
        step_seconds=statistics.fmean(seconds),
        step_seconds_range=(min(seconds), max(seconds)),
        num_validations=num_candidates * sum(due),
        validation_seconds=validation_seconds,
        peak_memory_bytes=_peak_memory_bytes(training),
        free_memory_bytes=_free_memory_bytes(training),
        disk_bytes=_NUM_CHECKPOINTS * _checkpoint_bytes(training),
        free_disk_bytes=shutil.disk_usage(_existing(out)).free,
    )


def _timed_steps(training: Training) -> Iterator[float]:
    """Seconds of a step at each moment, its batch included: the middle one of several.

    A step that is slow by chance is rarer in a long run than among a few. The first ones of each
    moment warm up and do not count: a method may ask a teacher for the first time there, which
    compiles it.
    """
    batches = _endless_batches(training)
    method_state = training.method.initial_state()
    num_taken = NUM_MOMENTS * (_NUM_WARM_UP + STEPS_PER_MOMENT)
    groups = training.groups  # at least one whole one, so that the weights change and momentum is
    in_epoch = max(0, min(groups.size, groups.num_batches) - num_taken)
    for moment in range(NUM_MOMENTS):
        fraction = (moment + 0.5) / NUM_MOMENTS
        step = int(fraction * training.num_steps)
        state = TrainState(
            step=step,
            epoch=step // training.steps_per_epoch,
            batch_in_epoch=in_epoch,
            method_state=method_state,
        )
        seconds = []
        for _ in range(_NUM_WARM_UP + STEPS_PER_MOMENT):
            began_at_seconds = time.perf_counter()
            _, method_state = take_step(training, next(batches), state)
            in_epoch = (in_epoch + 1) % groups.num_batches
            state = replace(state, batch_in_epoch=in_epoch, method_state=method_state)
            seconds.append(time.perf_counter() - began_at_seconds)
        yield statistics.median(seconds[_NUM_WARM_UP:])


def _endless_batches(training: Training) -> Iterator[Batch]:
    """One epoch after the other; the last, smaller batch is left out."""
    data, batch_size = training.recipe.data, training.recipe.training.batch_size
    epoch = 0
    while True:
        batches = training_batches(
            training.data.train,
            batch_size=batch_size,
            seed=training.recipe.seed,
            epoch=epoch,
            augment=Augmentation.of(data),
        )
        yield from (batch for batch in batches if batch.num_images == batch_size)
        epoch += 1


def _validation_seconds(training: Training) -> float:
    """Of all held-out images, from some of them."""
    held_out = training.data.validation
    num_left_out = max(0, held_out.num_images - _NUM_VALIDATED)
    some = held_out.without(torch.arange(num_left_out))
    network = copy.deepcopy(training.student.network)
    began_at_seconds = time.perf_counter()
    measure_on_validation(
        network, some, recipe=training.recipe, performance=training.student.performance
    )
    seconds = time.perf_counter() - began_at_seconds
    return seconds * held_out.num_images / some.num_images


def _checkpoint_bytes(training: Training) -> int:
    tensors = training.tensors
    kept = [*tensors.network.state_dict().values(), *tensors.network.parameters()]  # and momentum
    kept += [*(tensors.average or {}).values(), *tensors.of_method.values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in kept)


def _peak_memory_bytes(training: Training) -> int:
    device = training.student.performance.device
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _free_memory_bytes(training: Training) -> int:
    """What this process has and what is free besides."""
    device = training.student.performance.device
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    return reachable_bytes()


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that there is."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
