"""Metrics: lines as they were observed, and what a resumed run keeps of them."""

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from compressor.metrics import (
    CandidateValidated,
    CheckpointSaved,
    MetricsFile,
    StepDone,
    TensorBoardFiles,
    TrainingEnded,
    TrainingStarted,
    ValidationStarted,
    read_metrics,
)
from compressor.proportions import Proportion
from compressor.run_directory import RunDirectory


@pytest.fixture
def run(tmp_path):
    return RunDirectory(tmp_path)


def write(run, events, *, step=0, epoch=1):
    file = MetricsFile(run, step=step, epoch=epoch)
    for event in events:
        file(event)
    file.close()


def steps(first, last):
    return [StepDone(step=n, epoch=1, values={"loss_nats": n / 3}) for n in range(first, last + 1)]


def steps_in(run):
    return [line["step"] for line in read_metrics(run)]


def test_steps_and_validations_are_lines(run):
    validated = CandidateValidated(
        step=2,
        epoch=1,
        candidate="average",
        clean=Proportion(num_correct=9, num_total=10),
        robust=Proportion(num_correct=5, num_total=10),
        is_best=True,
    )
    started = TrainingStarted(
        name="x", step=0, epoch=0, num_steps=2, num_epochs=1, num_parameters=5
    )
    silent = [ValidationStarted(step=2), CheckpointSaved(step=2, path="p")]
    write(run, [started, *steps(1, 2), *silent, validated, TrainingEnded(step=2, best_epoch=1)])
    assert read_metrics(run) == [
        {"kind": "step", "step": 1, "epoch": 1, "loss_nats": 1 / 3},
        {"kind": "step", "step": 2, "epoch": 1, "loss_nats": 2 / 3},
        {
            "kind": "validation",
            "step": 2,
            "epoch": 1,
            "candidate": "average",
            "clean_correct": 9,
            "robust_correct": 5,
            "num_validation": 10,
            "is_best": True,
        },
    ]


@pytest.mark.parametrize(("step", "kept"), [(0, []), (3, [1, 2, 3]), (5, [1, 2, 3, 4, 5])])
def test_resume_drops_what_came_after_the_checkpoint(run, step, kept):
    write(run, steps(1, 5))
    write(run, steps(step + 1, step + 2), step=step)
    assert steps_in(run) == [*kept, step + 1, step + 2]


@pytest.mark.parametrize("rest", ['{"kind": "st', '{"kind": "step", "step": 4, "loss_na', "\x00"])
def test_half_written_last_line_is_no_line(run, rest):
    write(run, steps(1, 3))
    with run.metrics.open("a") as file:
        file.write(rest)
    assert steps_in(run) == [1, 2, 3]
    write(run, steps(4, 5), step=3)
    assert steps_in(run) == [1, 2, 3, 4, 5]
    assert all(json.loads(line) for line in run.metrics.read_text().splitlines())


def test_checkpoint_makes_the_lines_durable(run):
    file = MetricsFile(run, step=0, epoch=0)
    for event in [*steps(1, 3), CheckpointSaved(step=3, path="p")]:
        file(event)
    assert steps_in(run) == [1, 2, 3]  # before `close`
    file.close()


def test_no_file_has_no_lines(run):
    assert read_metrics(run) == []


def test_validation_is_repeated_where_its_epoch_was_not_saved(run):
    """A checkpoint after the last step of an epoch may come before the epoch's validation."""
    validated = CandidateValidated(
        step=2,
        epoch=1,
        candidate="weights",
        clean=Proportion(num_correct=9, num_total=10),
        robust=Proportion(num_correct=5, num_total=10),
        is_best=True,
    )
    write(run, [*steps(1, 2), validated])
    write(run, [validated], step=2, epoch=0)
    assert [line["kind"] for line in read_metrics(run)] == ["step", "step", "validation"]
    write(run, [], step=2, epoch=1)
    assert [line["kind"] for line in read_metrics(run)] == ["step", "step", "validation"]


def tensorboard(run, events, *, step=0):
    files = TensorBoardFiles(run, step=step)
    for event in events:
        files(event)
    files.close()


def test_tensorboard_shows_what_was_not_lost(run):
    """Steps 4 and 5 came after the checkpoint of a process that was killed."""
    tensorboard(run, steps(1, 5))
    validated = CandidateValidated(
        step=6,
        epoch=1,
        candidate="weights",
        clean=Proportion(num_correct=9, num_total=10),
        robust=Proportion(num_correct=5, num_total=10),
        is_best=True,
    )
    tensorboard(run, [*steps(4, 6), validated], step=3)
    found = EventAccumulator(str(run.tensorboard)).Reload()
    losses = [(e.step, pytest.approx(e.value)) for e in found.Scalars("training/loss_nats")]
    assert losses == [(n, n / 3) for n in range(1, 7)]
    (robust,) = found.Scalars("validation_weights/robust_accuracy_fraction")
    assert (robust.step, robust.value) == (6, 0.5)


@pytest.mark.parametrize(
    ("make", "name"), [(MetricsFile, "metrics.jsonl"), (TensorBoardFiles, "tensorboard")]
)
def test_full_disk_is_an_error_that_names_the_file(run, limited_files, make, name):
    started = {"step": 0, "epoch": 0} if make is MetricsFile else {"step": 0}
    file = make(run, **started)
    with limited_files(0), pytest.raises(OSError, match=f"File too large.*{name}"):
        file(*steps(1, 1))
    file.close()
