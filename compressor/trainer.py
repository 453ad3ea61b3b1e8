"""fit: the loop over epochs and batches. It knows no method, no terminal and no file name."""

import copy
import signal
import time
from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from compressor.augmentation import Augmentation
from compressor.checkpoint import (
    Best,
    Candidate,
    TrainedTensors,
    TrainState,
    prune_checkpoints,
    save_checkpoint,
)
from compressor.data import Batch, training_batches
from compressor.errors import InterruptedRunError, TerminatedRunError
from compressor.metrics import (
    CandidateValidated,
    CheckpointSaved,
    StepDone,
    TrainingEnded,
    TrainingStarted,
    ValidationStarted,
)
from compressor.selection import measure_on_validation
from compressor.training_step import Training, take_step


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
            # It may take longer than a killer waits; from here on a resumed run begins with it.
            before = replace(state, epoch=state.epoch - 1, batch_in_epoch=training.steps_per_epoch)
            _save(training, before)
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
