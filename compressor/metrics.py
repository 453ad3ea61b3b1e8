"""What happens during training, as events, and their writers for files.

The trainer calls one function `observe(event)`. The live display is in `cli`.
"""

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event as TensorBoardEvent
from tensorboard.compat.proto.event_pb2 import SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from compressor.atomic_folder import failures_named
from compressor.proportions import Proportion
from compressor.run_directory import RunDirectory, write_text_atomically


@dataclass(frozen=True, kw_only=True)
class TrainingStarted:
    """Before the first step of this process."""

    name: str
    step: int
    epoch: int
    num_steps: int
    num_epochs: int
    num_parameters: int
    is_compiled: bool = False
    """The first step then takes as long as many others."""


@dataclass(frozen=True, kw_only=True)
class StepDone:
    """After the optimiser's step; `step` counts from 1."""

    step: int
    epoch: int
    values: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class ValidationStarted:
    """The network is about to be measured on held-out images."""

    step: int


@dataclass(frozen=True, kw_only=True)
class CandidateValidated:
    """One candidate, measured on the held-out part of the training images."""

    step: int
    epoch: int
    candidate: str
    clean: Proportion
    robust: Proportion
    is_best: bool


@dataclass(frozen=True, kw_only=True)
class CheckpointSaved:
    """A checkpoint is complete on disk."""

    step: int
    path: str


@dataclass(frozen=True, kw_only=True)
class TrainingEnded:
    """After the last step."""

    step: int
    best_epoch: int


Event = (
    TrainingStarted
    | StepDone
    | ValidationStarted
    | CandidateValidated
    | CheckpointSaved
    | TrainingEnded
)
Observer = Callable[[Event], None]


class MetricsFile:
    """Writes `metrics.jsonl`; a resumed run drops what a lost process wrote after its checkpoint.

    Args:
        run: the folder.
        step: steps done at the checkpoint.
        epoch: epochs done and validated at the checkpoint.
    """

    def __init__(self, run: RunDirectory, *, step: int, epoch: int) -> None:
        kept = [line for line in _lines(run) if _is_before(line, step=step, epoch=epoch)]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        write_text_atomically(run.metrics, text)
        # By lines, so that a checkpoint is never ahead of the metrics of its last step.
        self._path = run.metrics
        self._file = run.metrics.open("a", encoding="utf-8", buffering=1)

    def __call__(self, event: Event) -> None:
        """Append steps and validations.

        Raises:
            OSError: with the name of the file, if the disk is full.
        """
        with failures_named(self._path):
            self._note(event)

    def _note(self, event: Event) -> None:
        if isinstance(event, StepDone):
            self._write({"kind": "step", "step": event.step, "epoch": event.epoch, **event.values})
        elif isinstance(event, CandidateValidated):
            self._write({"kind": "validation", **_validation(event)})
        elif isinstance(event, CheckpointSaved | TrainingEnded):
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Write what is buffered."""
        with failures_named(self._path):
            self._file.close()

    def _write(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")


class TensorBoardFiles:
    """Writes the same numbers as TensorBoard events.

    At once, and not in a thread of its own as TensorBoard's writer, whose errors come too late.

    Args:
        run: the folder.
        step: steps done at the checkpoint; TensorBoard drops what a lost process wrote later.
    """

    def __init__(self, run: RunDirectory, *, step: int) -> None:
        self._folder = run.tensorboard
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns()}.{os.getpid()}"
        self._file = (self._folder / name).open("wb")
        self._records = RecordWriter(self._file)
        start = SessionLog(status=SessionLog.START)
        self._write(TensorBoardEvent(file_version="brain.Event:2"))
        self._write(TensorBoardEvent(step=step + 1, session_log=start))

    def __call__(self, event: Event) -> None:
        """Add scalars of steps and validations.

        Raises:
            OSError: with the name of the folder, if the disk is full.
        """
        if isinstance(event, StepDone):
            values = {f"training/{name}": value for name, value in event.values.items()}
        elif isinstance(event, CandidateValidated):
            values = {
                f"validation_{event.candidate}/{kind}_accuracy_fraction": proportion.fraction
                for kind, proportion in (("clean", event.clean), ("robust", event.robust))
            }
        else:
            return
        scalars = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._write(TensorBoardEvent(step=event.step, summary=Summary(value=scalars)))

    def _write(self, event: TensorBoardEvent) -> None:
        event.wall_time = time.time()
        with failures_named(self._folder):
            self._records.write(event.SerializeToString())
            self._records.flush()

    def close(self) -> None:
        """Nothing is buffered."""
        with failures_named(self._folder):
            self._records.close()


def read_metrics(run: RunDirectory) -> list[dict[str, Any]]:
    """All complete lines of `metrics.jsonl`."""
    return _lines(run)


def _lines(run: RunDirectory) -> list[dict[str, Any]]:
    """A line that a killed process left unfinished is no line."""
    if not run.metrics.exists():
        return []
    lines = []
    for text in run.metrics.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def _is_before(line: Mapping[str, Any], *, step: int, epoch: int) -> bool:
    """The last step of an epoch may be in a checkpoint whose epoch is not validated yet."""
    is_validated = line["kind"] != "validation" or line["epoch"] <= epoch
    return bool(line["step"] <= step and is_validated)


def _validation(event: CandidateValidated) -> dict[str, Any]:
    return {
        "step": event.step,
        "epoch": event.epoch,
        "candidate": event.candidate,
        "clean_correct": event.clean.num_correct,
        "robust_correct": event.robust.num_correct,
        "num_validation": event.clean.num_total,
        "is_best": event.is_best,
    }
