"""What a run will cost: the arithmetic, what is said where it does not fit, and steps that are
really those of the run."""

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import compressor.forecast
from compressor.errors import RunError
from compressor.forecast import Forecast
from compressor.forecast_workflow import forecast_run
from compressor.performance_settings import PerformanceSettings
from compressor.recipe_file import parse_recipe

SETTINGS = PerformanceSettings(device="cpu", training_dtype="float32", num_threads=1)
GIB = 2**30
FORECAST = Forecast(
    num_steps=200,
    num_epochs=4,
    step_seconds=0.5,
    step_seconds_range=(0.4, 0.7),
    num_validations=3,
    validation_seconds=10.0,
    peak_memory_bytes=2 * GIB,
    free_memory_bytes=8 * GIB,
    disk_bytes=GIB,
    free_disk_bytes=2 * GIB,
)


def recipe_of(**training):
    table = {
        "name": "planned",
        "data": {"source": "digits", "validation_size": 300},
        "student": {"architecture": "tiny"},
        "method": {"name": "pgd_at", "attack": {"num_steps": 4}},
        "training": {"epochs": 10, "batch_size": 100} | training,
        "selection": {"from_fraction": 0.5, "every_epochs": 2, "num_steps": 2},
    }
    return parse_recipe(table, origin="the test")


def test_totals():
    assert (FORECAST.epoch_seconds, FORECAST.total_seconds) == (25, 130)
    assert FORECAST.problems == ()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"peak_memory_bytes": 8 * GIB}, ["8.00 GiB are needed", "training.batch_size"]),
        ({"free_disk_bytes": GIB // 2}, ["0.50 GiB are free", "--out"]),
    ],
)
def test_what_does_not_fit_is_named_with_what_to_change(change, words):
    (problem,) = dataclasses.replace(FORECAST, **change).problems
    assert all(word in problem for word in words)


def test_steps_are_spread_over_the_run_and_validations_counted(monkeypatch, tmp_path):
    steps, original = [], compressor.forecast.take_step

    def noted(training, batch, state):
        steps.append((state.step, state.epoch, batch.num_images))
        return original(training, batch, state)

    monkeypatch.setattr(compressor.forecast, "take_step", noted)
    found = forecast_run(recipe_of(ema_decay=0.9), SETTINGS, out=tmp_path / "never" / "run")
    assert {epoch for _, epoch, _ in steps} == set(range(10))
    assert {num_images for _, _, num_images in steps} == {100}
    assert found.num_steps == 10 * 10
    assert found.num_validations == 2 * 3  # epochs 6, 8 and 10; weights and their average
    low, high = found.step_seconds_range
    assert 0 < low <= found.step_seconds <= high
    assert found.disk_bytes == 4 * 4 * (3 * 6_274 + 2 * 2 * compressor_statistics())
    assert list(tmp_path.iterdir()) == []


def compressor_statistics():
    """Numbers of mean and variance in the BatchNorms of `tiny`, and their counters twice."""
    from compressor.networks import NetworkSpec, build_classifier

    spec = NetworkSpec(architecture="tiny", num_classes=10, image_shape=(1, 8, 8))
    buffers = dict(build_classifier(spec, seed=0).named_buffers())
    return sum(b.numel() * (b.element_size() // 4) for b in buffers.values()) / 2


@pytest.mark.parametrize("place", [0, 2])
def test_what_is_slow_once_in_a_part_of_the_run_is_not_multiplied(monkeypatch, tmp_path, place):
    """As a teacher that is asked, and compiled, for the first time in the middle of the run.

    And as a step that another program delays.
    """
    original, asked = compressor.forecast.take_step, []

    def slow_at_first_in_the_middle(training, batch, state):
        if state.epoch >= 5:
            asked.append(state.epoch)
            if len(asked) == 1 + place:
                time.sleep(1)
        return original(training, batch, state)

    monkeypatch.setattr(compressor.forecast, "take_step", slow_at_first_in_the_middle)
    found = forecast_run(recipe_of(), SETTINGS, out=tmp_path / "run")
    assert asked[0] == 5
    assert found.step_seconds_range[1] < 1 / 3  # nor in the mean of its moment


@pytest.mark.parametrize(("size", "num_changes"), [(1, 30), (4, 7), (40, 1)])
def test_the_weights_change_as_in_the_run(monkeypatch, tmp_path, size, num_changes):
    """Momentum and the average take memory from the first change on; ten batches an epoch."""
    changed, original = [], torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda *args: changed.append(1) or original(*args))
    epochs = 10 if size < 40 else 40
    recipe = recipe_of(accumulate_batches=size, epochs=epochs)
    forecast_run(recipe, SETTINGS, out=tmp_path / "run")
    assert len(changed) >= num_changes


def test_a_run_that_would_be_refused_has_no_forecast(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"mine")
    with pytest.raises(RunError, match="exists"):
        forecast_run(recipe_of(), SETTINGS, out=tmp_path)


def test_a_slow_step_is_seen(monkeypatch, tmp_path):
    original = compressor.forecast.take_step

    def slow(*arguments):
        time.sleep(0.02)
        return original(*arguments)

    monkeypatch.setattr(compressor.forecast, "take_step", slow)
    found = forecast_run(recipe_of(), SETTINGS, out=tmp_path)
    assert found.step_seconds > 0.02
    assert found.total_seconds > 0.02 * 100


def test_the_command_tells_it_as_json(tmp_path):
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(recipe_of().model_dump(mode="json")))
    command = [sys.executable, "-m", "cli.main", "plan", recipe, "--threads", "1", "--json"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    table = json.loads(done.stdout)
    assert table["num_steps"] == 100
    assert table["total_seconds"] > 0
    assert table["problems"] == []
