"""Live display of training: Rich bars in a terminal, plain lines elsewhere, none with --json."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from cli.output import Output

if TYPE_CHECKING:
    from compressor.metrics import CandidateValidated, Event, StepDone, TrainingStarted

_PLAIN_LINE_EVERY_SECONDS = 30.0
_COMPILING = "compiling in the first step"


@contextmanager
def training_display(output: Output) -> Iterator["Callable[[Event], None]"]:
    """Epoch and total progress, time left, and the accuracies of the last validation."""
    if output.as_json:
        yield lambda _: None
    elif output.console.is_terminal:
        with _bars(output) as progress:
            yield _LiveTraining(output, progress)
    else:
        yield _PlainTraining(output)


def _bars(output: Output) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=output.console,
    )


class _LiveTraining:
    def __init__(self, output: Output, progress: Progress) -> None:
        self._output, self._progress = output, progress
        self._total: TaskID | None = None
        self._epoch: TaskID | None = None
        self._steps_per_epoch = 1

    def __call__(self, event: "Event") -> None:
        from compressor import metrics

        if isinstance(event, metrics.TrainingStarted):
            self._start(event)
        elif isinstance(event, metrics.StepDone):
            self._advance(event)
        elif isinstance(event, metrics.ValidationStarted) and self._epoch is not None:
            self._progress.update(self._epoch, note="validating")
        elif isinstance(event, metrics.CandidateValidated):
            self._output.say(_validation_line(event))
            if self._total is not None:
                self._progress.update(self._total, note=_short_validation(event))
        elif isinstance(event, metrics.TrainingEnded):
            self._finish(event.step)

    def _finish(self, num_steps: int) -> None:
        """Steps are told in tens, so the bars may be a few short."""
        if self._total is not None and self._epoch is not None:
            self._progress.update(self._total, completed=num_steps)
            self._progress.update(self._epoch, completed=self._steps_per_epoch, note="done")

    def _start(self, event: "TrainingStarted") -> None:
        self._steps_per_epoch = event.num_steps // event.num_epochs
        done = event.step
        self._total = self._progress.add_task("all", total=event.num_steps, completed=done, note="")
        note = _COMPILING if event.is_compiled else ""
        self._epoch = self._progress.add_task("epoch", total=self._steps_per_epoch, note=note)

    def _advance(self, event: "StepDone") -> None:
        if self._total is None or self._epoch is None:
            return
        self._progress.update(self._total, completed=event.step)
        in_epoch = event.step - (event.epoch - 1) * self._steps_per_epoch
        speed = f"{event.values['speed_images_per_second']:.0f} images/s"
        note = f"loss {event.values['loss_nats']:.4f}, {speed}"
        self._progress.update(
            self._epoch, completed=in_epoch, description=f"epoch {event.epoch}", note=note
        )


class _PlainTraining:
    def __init__(self, output: Output) -> None:
        self._output = output
        self._last_line_seconds = time.monotonic()
        self._first: tuple[int, float] | None = None
        self._num_steps = 0

    def __call__(self, event: "Event") -> None:
        from compressor import metrics

        if isinstance(event, metrics.TrainingStarted):
            self._num_steps = event.num_steps
            self._first = (event.step, time.monotonic())
            self._output.say(
                f"{event.name}: {event.num_parameters:,} parameters, {event.num_epochs} epochs, "
                f"{event.num_steps} steps, {event.step} of them done"
            )
            if event.is_compiled:
                self._output.say(_COMPILING)
        elif isinstance(event, metrics.StepDone):
            self._maybe_print(event)
        elif isinstance(event, metrics.CandidateValidated):
            self._output.say(_validation_line(event))
        sys.stdout.flush()

    def _maybe_print(self, event: "StepDone") -> None:
        now_seconds = time.monotonic()
        if self._first is None or now_seconds - self._last_line_seconds < _PLAIN_LINE_EVERY_SECONDS:
            return
        self._last_line_seconds = now_seconds
        step, since_seconds = self._first
        per_step_seconds = (now_seconds - since_seconds) / max(1, event.step - step)
        left_minutes = per_step_seconds * (self._num_steps - event.step) / 60
        self._output.say(
            f"epoch {event.epoch}, step {event.step} of {self._num_steps}: "
            f"loss {event.values['loss_nats']:.4f}, "
            f"{event.values['speed_images_per_second']:.0f} images/s, {left_minutes:.1f} min left"
        )


def _validation_line(event: "CandidateValidated") -> str:
    name = "" if event.candidate == "weights" else " (averaged weights)"
    best = ", best so far" if event.is_best else ""
    return f"epoch {event.epoch}{name}: validation {_short_validation(event)}{best}"


def _short_validation(event: "CandidateValidated") -> str:
    clean, robust = 100 * event.clean.fraction, 100 * event.robust.fraction
    return f"clean {clean:.1f} %, robust {robust:.1f} % (n = {event.clean.num_total})"
