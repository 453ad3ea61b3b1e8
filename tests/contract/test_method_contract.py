"""One table over every method: interrupted and resumed equals left alone; nothing is skipped."""

import dataclasses
import json
import shutil
import signal
from pathlib import Path

import pytest
import torch

from compressor import curves
from compressor.errors import (
    CheckpointError,
    InterruptedRunError,
    NonFiniteLossError,
    TerminatedRunError,
)
from compressor.interruption import StopWish
from compressor.metrics import CandidateValidated, StepDone, read_metrics
from compressor.networks import NetworkSpec, build_classifier, save_classifier
from compressor.performance_settings import PerformanceSettings
from compressor.recipe_file import load_recipe, parse_recipe
from compressor.run_directory import RunDirectory
from compressor.training_workflow import TrainingRequest, train

ATTACK = {"num_steps": 2, "step_size_pixels": "8/255"}
METHODS = {
    "adaad": {"name": "adaad", "attack": ATTACK, "robust_weight": 0.75},
    "ard": {"name": "ard", "attack": ATTACK, "teacher_weight": 0.75},
    "bmtard": {"name": "bmtard", "attack": {"num_steps": 2, "step_size_pixels": "8/255"}},
    "ciard": {"name": "ciard", "attack": ATTACK, "balance_drops": [0.5]},
    "ciard_released": {"name": "ciard", "attack": ATTACK, "teacher_statistics": "batch"},
    "cross_entropy": {"name": "cross_entropy"},
    "darht": {"name": "darht", "attack": ATTACK},
    "darht_released": {
        "name": "darht",
        "attack": ATTACK,
        "last_layer": "decaying",
        "normalise_trust": False,
        "skip_above_nats": 2.5,
        "teacher_mode": "train",
    },
    "distillation": {"name": "distillation"},
    "iad": {"name": "iad", "attack": ATTACK, "begin_fraction": 0.5},
    "mtard": {"name": "mtard", "attack": ATTACK, "relative_loss_exponent": 2.0},
    "pgd_at": {"name": "pgd_at", "attack": {"num_steps": 2, "step_size_pixels": "8/255"}},
    "rc": {"name": "rc", "attack": {"num_steps": 3}},
    "rslad": {"name": "rslad", "attack": ATTACK},
    "trades": {"name": "trades", "attack": {"num_steps": 2, "step_size_pixels": "8/255"}},
}
ROLES = {
    "adaad": ["robust"],
    "ard": ["robust"],
    "bmtard": ["clean", "robust"],
    "ciard": ["clean", "robust"],
    "ciard_released": ["clean", "robust"],
    "darht": ["robust", "clean", "robust"],
    "darht_released": ["robust", "robust"],
    "distillation": ["clean"],
    "iad": ["robust"],
    "mtard": ["clean", "robust"],
    "rc": ["clean", "robust"],
    "rslad": ["robust"],
}
SETTINGS = PerformanceSettings(
    device="cpu", training_dtype="float32", num_threads=1, log_every_steps=1
)


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    """Drawing takes two thirds of a run as short as these."""
    monkeypatch.setattr(curves, "write_curves", lambda *_, **__: None)


@pytest.fixture(scope="session")
def teacher_file(tmp_path_factory):
    spec = NetworkSpec(architecture="tiny", num_classes=10, image_shape=(1, 8, 8))
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    save_classifier(path, build_classifier(spec, seed=1), spec, {})
    return path


@pytest.fixture
def make_recipe(teacher_file):
    def make(method, **training):
        roles = ROLES.get(method, [])
        table = {
            "name": "contract",
            "data": {"source": "digits", "validation_size": 100, "crop_padding_pixels": 1},
            "student": {"architecture": "tiny"},
            "teachers": [{"role": role, "source": str(teacher_file)} for role in roles],
            "method": METHODS[method],
            "training": {"epochs": 2, "batch_size": 400, "learning_rate": 0.05, **training},
            "selection": {"num_steps": 1},
        }
        return parse_recipe(table, origin="the test")

    return make


def run(recipe, out, *, resume=False, stop=None, observe=lambda _: None):
    request = TrainingRequest(out=out, settings=SETTINGS, resume=resume, accept_teachers=True)
    return train(recipe, request, stop=stop, observe=observe)


def content(folder: RunDirectory) -> tuple[bytes, list]:
    lines = [
        {name: value for name, value in line.items() if not name.startswith("speed")}
        for line in read_metrics(folder)
    ]
    return folder.model.read_bytes(), lines


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stop_after", [1, 3, 4])
def test_resume_equals_not_resuming(method, stop_after, make_recipe, tmp_path):
    recipe = make_recipe(method, ema_decay=0.5)
    undisturbed = run(recipe, tmp_path / "undisturbed")
    stop = StopWish()

    def stop_later(event):
        if isinstance(event, StepDone) and event.step == stop_after:
            stop.signal_number = signal.SIGINT

    with pytest.raises(InterruptedRunError, match="--resume"):
        run(recipe, tmp_path / "stopped", stop=stop, observe=stop_later)
    resumed = run(recipe, tmp_path / "stopped", resume=True)
    assert content(resumed) == content(undisturbed)


def test_resume_from_an_older_checkpoint(make_recipe, tmp_path):
    recipe = make_recipe("bmtard", epochs=3)
    done = run(recipe, tmp_path / "run")
    before = content(done)
    newest = done.checkpoint(done.checkpoint_steps()[-1])
    newest.rename(tmp_path / "away")
    assert content(run(recipe, tmp_path / "run", resume=True)) == before


def test_sigterm_ends_with_its_own_code(make_recipe, tmp_path):
    stop = StopWish(signal_number=signal.SIGTERM)
    with pytest.raises(TerminatedRunError) as caught:
        run(make_recipe("cross_entropy"), tmp_path / "run", stop=stop)
    assert caught.value.exit_code == 143


@pytest.mark.parametrize("method", METHODS)
def test_non_finite_loss_stops_before_the_step(method, make_recipe, tmp_path):
    recipe = make_recipe(method, learning_rate=1e30, epochs=4)
    with pytest.raises(NonFiniteLossError, match="not finite") as caught:
        run(recipe, tmp_path / "run")
    message = str(caught.value)
    assert "step-" in message
    assert "learning_rate" in message
    for step in RunDirectory(tmp_path / "run").checkpoint_steps():
        state = json.loads(
            (RunDirectory(tmp_path / "run").checkpoint(step) / "train_state.json").read_text()
        )
        assert state["step"] == step


def test_state_survives_json(make_recipe, tmp_path):
    """What a checkpoint stores of a method brings back an equal state."""
    from compressor.balancers import LossWeightState
    from compressor.methods.bmtard import BMTARD, BMTARDState

    state = BMTARDState(
        temperatures=(1.1, 0.1 + 0.2),
        weights=LossWeightState(weights=(1 / 3, 2 / 3), first_losses=(0.7, 1e-17)),
    )
    stored = json.loads(json.dumps(dataclasses.asdict(state)))
    assert BMTARD.restore_state(None, stored) == state


def test_averaged_weights_are_a_candidate_of_their_own(make_recipe, tmp_path):
    seen = []
    run(
        make_recipe("cross_entropy", ema_decay=0.9),
        tmp_path / "run",
        observe=lambda e: seen.append(e) if isinstance(e, CandidateValidated) else None,
    )
    assert {event.candidate for event in seen} == {"weights", "average"}


def test_gradient_clipping_bounds_the_first_step(make_recipe, tmp_path):
    """With momentum 0 and no decay, the first step is no longer than rate x norm."""
    training = {"epochs": 1, "momentum": 0.0, "weight_decay": 0.0, "learning_rate": 1.0}
    recipe = make_recipe("cross_entropy", gradient_clip_norm=0.01, batch_size=1200, **training)
    done = run(recipe, tmp_path / "run")
    from compressor.networks import load_classifier

    trained, spec = load_classifier(done.model)
    start = build_classifier(spec, seed=recipe.seed)
    pairs = zip(trained.parameters(), start.parameters(), strict=True)
    moved = torch.cat([(a - b).detach().flatten() for a, b in pairs])
    assert 0 < float(moved.norm()) <= 0.01 + 1e-6


def test_a_second_run_in_the_same_folder_is_refused_while_the_first_holds_it(tmp_path):
    from compressor.errors import RunError

    folder = RunDirectory(tmp_path)
    with folder.locked(), pytest.raises(RunError, match="another process"), folder.locked():
        pass


def test_a_run_goes_on_with_its_own_teachers(make_recipe, tmp_path):
    recipe = make_recipe("bmtard")
    run(recipe, tmp_path / "run")
    spec = NetworkSpec(architecture="tiny", num_classes=10, image_shape=(1, 8, 8))
    other = tmp_path / "other.safetensors"
    save_classifier(other, build_classifier(spec, seed=2), spec, {})
    moved = [t.model_copy(update={"source": str(other)}) for t in recipe.teachers]
    with pytest.raises(CheckpointError, match="its teachers were"):
        run(recipe.model_copy(update={"teachers": tuple(moved)}), tmp_path / "run", resume=True)


def test_a_run_goes_on_in_its_own_number_format(make_recipe, tmp_path):
    recipe = make_recipe("cross_entropy")
    run(recipe, tmp_path / "run")
    settings = SETTINGS.model_copy(update={"training_dtype": "bfloat16"})
    request = TrainingRequest(out=tmp_path / "run", settings=settings, resume=True)
    with pytest.raises(CheckpointError, match="is trained in float32, not in bfloat16"):
        train(recipe, request)
    request = TrainingRequest(
        out=tmp_path / "run", settings=PerformanceSettings(num_threads=1), resume=True
    )
    train(recipe, request)


def test_paths_in_a_run_work_from_any_folder(make_recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = make_recipe("bmtard")
    teachers = [t.model_copy(update={"source": "teacher.safetensors"}) for t in recipe.teachers]
    shutil.copy(recipe.teachers[0].source, "teacher.safetensors")
    done = run(recipe.model_copy(update={"teachers": tuple(teachers)}), Path("run"))
    stored = load_recipe(done.resolved_recipe)
    assert [t.source for t in stored.teachers] == [str(tmp_path / "teacher.safetensors")] * 2
