"""A run that is killed in a validation, which may last longer than its killer waits."""

import pytest

import compressor.trainer
from compressor.metrics import read_metrics
from compressor.performance_settings import PerformanceSettings
from compressor.recipe_file import parse_recipe
from compressor.run_directory import RunDirectory
from compressor.training_workflow import TrainingRequest, train

SETTINGS = PerformanceSettings(device="cpu", training_dtype="float32", num_threads=1)
RECIPE = parse_recipe(
    {
        "name": "lost",
        "data": {"source": "digits", "validation_size": 300},
        "student": {"architecture": "tiny"},
        "method": {"name": "cross_entropy"},
        "training": {"epochs": 2, "batch_size": 250},
        "selection": {"num_steps": 1, "from_fraction": 0.0},
    },
    origin="the test",
)
STEPS_PER_EPOCH = 4


def run_to(out, *, resume=False):
    return train(RECIPE, TrainingRequest(out=out, settings=SETTINGS, resume=resume))


def test_no_step_is_lost_and_the_validation_is_made_up_for(monkeypatch, tmp_path):
    undisturbed = run_to(tmp_path / "undisturbed")

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(compressor.trainer, "measure_on_validation", killed)
        with pytest.raises(KeyboardInterrupt):
            run_to(tmp_path / "killed")
    assert RunDirectory(tmp_path / "killed").checkpoint_steps() == [0, STEPS_PER_EPOCH]

    steps, original = [], compressor.trainer.take_step
    monkeypatch.setattr(
        compressor.trainer, "take_step", lambda *call: steps.append(1) or original(*call)
    )
    resumed = run_to(tmp_path / "killed", resume=True)
    assert len(steps) == STEPS_PER_EPOCH
    assert resumed.model.read_bytes() == undisturbed.model.read_bytes()
    validations = [
        [line for line in read_metrics(run) if line["kind"] == "validation"]
        for run in (resumed, undisturbed)
    ]
    assert validations[0] == validations[1]
