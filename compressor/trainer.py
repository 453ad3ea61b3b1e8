"""fit: the loop over epochs and batches. It knows no method, no terminal and no file name."""

import copy
import math
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from compressor.architectures.shared_batch_norm import average_statistics
from compressor.augmentation import Augmentation
from compressor.batch_groups import BatchGroups
from compressor.checkpoint import (
    Best,
    Candidate,
    TrainedTensors,
    TrainState,
    last_good,
    prune_checkpoints,
    save_checkpoint,
)
from compressor.data import Batch, TrainingData, training_batches
from compressor.errors import InterruptedRunError, TerminatedRunError
from compressor.interruption import StopWish
from compressor.methods.protocol import Method, Moment
from compressor.metrics import (
    CandidateValidated,
    CheckpointSaved,
    Observer,
    StepDone,
    TrainingEnded,
    TrainingStarted,
    ValidationStarted,
)
from compressor.not_finite import explain_loss
from compressor.performance_settings import PerformanceSettings
from compressor.ranks import Ranks
from compressor.recipe import Recipe
from compressor.run_directory import RunDirectory
from compressor.schedules import Progress, num_steps_of, rate_factor
from compressor.selection import measure_on_validation
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


def fit(training: Training, state: TrainState) -> TrainState:
    """Train from `state` to the last epoch.

    Returns:
        The final state; `best` names the selected checkpoint.

    Raises:
        NonFiniteLossError: at the first loss that is not finite, before its step is taken.
        TeacherError: if that is a teacher's fault.
        InterruptedRunError: when a stop was wished for; everything is saved.
    """
    recipe = training.recipe
    training.observe(
        TrainingStarted(
            name=recipe.name,
            step=state.step,
            epoch=state.epoch,
            num_steps=training.num_steps,
            num_epochs=recipe.training.epochs,
            num_parameters=sum(p.numel() for p in training.student.network.parameters()),
            is_compiled=training.student.performance.compiled_batch_size is not None,
        )
    )
    if state.step == 0 and not training.run.checkpoint_steps():
        state = _select(training, state) if training.start_is_candidate else state
        _save(training, state)
    while state.epoch < recipe.training.epochs:
        state = _train_epoch(training, state)
        if is_validation_due(training, state.epoch):
            state = _select(training, state)
        _save(training, state)
        _stop_if_wished(training, state)
    best_epoch = state.best.epoch if state.best else state.epoch
    training.observe(TrainingEnded(step=state.step, best_epoch=best_epoch))
    return state


def _train_epoch(training: Training, state: TrainState) -> TrainState:
    """All batches of `state.epoch` that are not done yet."""
    saved_at_seconds = time.monotonic()
    for batch, seconds in _timed(_batches(training, state)):
        started_at_seconds = time.perf_counter()
        values, method_state = take_step(training, batch, state)
        seconds += time.perf_counter() - started_at_seconds
        state = replace(
            state,
            step=state.step + 1,
            batch_in_epoch=state.batch_in_epoch + 1,
            method_state=method_state,
        )
        speed = {"speed_images_per_second": batch.num_images / seconds}
        if state.step % training.settings.log_every_steps == 0 or state.step == 1:
            training.observe(
                StepDone(step=state.step, epoch=state.epoch + 1, values=values | speed)
            )
        if training.groups.is_amid(state.batch_in_epoch):
            continue  # gradients that are not yet used are in no checkpoint
        if time.monotonic() - saved_at_seconds > 60 * training.settings.checkpoint_every_minutes:
            _save(training, state)
            saved_at_seconds = time.monotonic()
        _stop_if_wished(training, state, saving=True)
    return replace(state, epoch=state.epoch + 1, batch_in_epoch=0)


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
        _change_weights(training)
    return {**result.logged, "learning_rate_per_step": learning_rate}, method_state


def _change_weights(training: Training) -> None:
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
    if training.tensors.average is not None and recipe.training.ema_decay is not None:
        _update_average(training.tensors, decay=recipe.training.ema_decay)


@torch.no_grad()
def _update_average(tensors: TrainedTensors, *, decay: float) -> None:
    """Weights and BatchNorm statistics move towards the present ones; counters are copied."""
    for name, value in tensors.network.state_dict().items():
        target = (tensors.average or {})[name]
        if target.is_floating_point():
            target.lerp_(value, 1 - decay)
        else:
            target.copy_(value)


def is_validation_due(training: Training, num_epochs_done: int) -> bool:
    """Whether candidates are measured after so many epochs; after the last one they are."""
    selection, epochs = training.recipe.selection, training.recipe.training.epochs
    if num_epochs_done == epochs:
        return True
    is_late_enough = num_epochs_done >= selection.from_fraction * epochs
    return is_late_enough and num_epochs_done % selection.every_epochs == 0


def _select(training: Training, state: TrainState) -> TrainState:
    """Measure every candidate on held-out images; keep the best mean of clean and robust."""
    training.observe(ValidationStarted(step=state.step))
    best = state.best
    for candidate, network in _candidates(training.tensors):
        clean, robust = measure_on_validation(
            network,
            training.data.validation,
            recipe=training.recipe,
            performance=training.student.performance,
        )
        score = (clean.fraction + robust.fraction) / 2
        is_best = best is None or score > best.score
        if is_best:
            best = Best(
                step=state.step,
                epoch=state.epoch,
                candidate=candidate,
                score=score,
                clean_correct=clean.num_correct,
                robust_correct=robust.num_correct,
                num_validation=clean.num_total,
            )
        training.observe(
            CandidateValidated(
                step=state.step,
                epoch=state.epoch,
                candidate=candidate,
                clean=clean,
                robust=robust,
                is_best=is_best,
            )
        )
    return replace(state, best=best)


def _candidates(tensors: TrainedTensors) -> Iterator[tuple[Candidate, nn.Module]]:
    yield "weights", tensors.network
    if tensors.average is not None:
        averaged = copy.deepcopy(tensors.network)
        averaged.load_state_dict(dict(tensors.average))
        yield "average", averaged


def _batches(training: Training, state: TrainState) -> Iterator[Batch]:
    data = training.recipe.data
    return training_batches(
        training.data.train,
        batch_size=training.recipe.training.batch_size,
        seed=training.recipe.seed,
        epoch=state.epoch,
        first_batch=state.batch_in_epoch,
        augment=Augmentation.of(data),
        ranks=training.ranks,
    )


def _timed(batches: Iterator[Batch]) -> Iterator[tuple[Batch, float]]:
    """Each batch with the seconds that it took to come."""
    while True:
        started_at_seconds = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            return
        yield batch, time.perf_counter() - started_at_seconds


def _save(training: Training, state: TrainState) -> None:
    if not training.ranks.is_first:
        return
    recipe_id, run = training.recipe.recipe_id, training.run
    path = save_checkpoint(run, state, training.tensors, recipe_id=recipe_id)
    kept = training.settings.keep_every_epochs
    kept_steps: set[int] = set()
    if kept is not None:
        per_epoch = training.steps_per_epoch
        kept_steps = {s for s in run.checkpoint_steps() if s and s % (kept * per_epoch) == 0}
    prune_checkpoints(run, state, kept_steps=kept_steps)
    training.observe(CheckpointSaved(step=state.step, path=str(path)))


def _stop_if_wished(training: Training, state: TrainState, *, saving: bool = False) -> None:
    """All ranks after the same step, whichever of them got the signal."""
    number = training.ranks.largest(training.stop.signal_number or 0)
    if not number:
        return
    if saving:
        _save(training, state)
    kind = TerminatedRunError if number == signal.SIGTERM else InterruptedRunError
    raise kind(
        f"stopped after step {state.step} of {training.num_steps}; everything is saved. "
        f"Continue with\n  {training.resume_command}"
    )
