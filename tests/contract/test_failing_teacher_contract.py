"""Every method with teachers: one that stops answering with numbers in the middle is named."""

import dataclasses
from typing import get_args

import pytest
import torch

from compressor import training_preparation
from compressor.errors import ExitCode, TeacherError
from compressor.method_recipes import MethodRecipe
from compressor.metrics import StepDone
from compressor.networks import NetworkSpec, build_classifier, save_classifier
from compressor.performance_settings import PerformanceSettings
from compressor.recipe_file import parse_recipe
from compressor.training_workflow import TrainingRequest, train

ATTACK = {"num_steps": 1, "step_size_pixels": "8/255"}
METHODS = {
    "adaad": {"attack": ATTACK},
    "ard": {"attack": ATTACK},
    "bmtard": {"attack": ATTACK},
    "ciard": {"attack": ATTACK},
    "darht": {"attack": ATTACK, "distil_from": 0.0},
    "distillation": {},
    "iad": {"attack": ATTACK},
    "mtard": {"attack": ATTACK},
    "rc": {"attack": ATTACK | {"first_num_steps": 1}},
    "rslad": {"attack": ATTACK},
}
WITHOUT_TEACHERS = {"cross_entropy", "pgd_at", "trades"}
ROLES = {"bmtard": 2, "ciard": 2, "darht": 2, "mtard": 2, "rc": 2}
CASES = [(name, failing) for name in METHODS for failing in range(ROLES.get(name, 1))]


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory):
    spec = NetworkSpec(architecture="tiny", num_classes=10, image_shape=(1, 8, 8))
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    save_classifier(path, build_classifier(spec, seed=1), spec, {})
    return path


def test_no_method_is_forgotten():
    union, _ = get_args(MethodRecipe)
    names = {table.model_fields["name"].default for table in get_args(union)}
    assert names == set(METHODS) | WITHOUT_TEACHERS


def num_asked(name, failing):
    """Images in a step of 400: CIARD asks its clean teacher about the attacked ones too."""
    return 800 if (name, failing) == ("ciard", 1) else 400


@pytest.mark.parametrize(("name", "failing"), CASES)
def test_it_is_named_and_the_step_is_not_taken(name, failing, teacher_file, tmp_path, monkeypatch):
    """It answers well when it is checked and in the first step, and not at all in the second."""
    roles = ["robust", "clean"][: ROLES.get(name, 1)]
    table = {
        "name": "contract",
        "data": {"source": "digits", "validation_size": 100, "crop_padding_pixels": 1},
        "student": {"architecture": "tiny"},
        "teachers": [{"role": role, "source": str(teacher_file)} for role in roles],
        "method": {"name": name, **METHODS[name]},
        "training": {"epochs": 3, "batch_size": 400, "learning_rate": 0.05},
        "selection": {"num_steps": 1},
    }
    done = []
    load = training_preparation.load_teachers

    def load_teachers(*arguments, **named):
        teachers = load(*arguments, **named)
        sound = teachers[failing].answer

        def answer(x_NCHW):
            return sound(x_NCHW) * (torch.nan if done else 1)

        bad = dataclasses.replace(teachers[failing], answer=answer, name="the-bad-one")
        return [bad if place == failing else t for place, t in enumerate(teachers)]

    monkeypatch.setattr(training_preparation, "load_teachers", load_teachers)
    settings = PerformanceSettings(
        device="cpu", training_dtype="float32", num_threads=1, log_every_steps=1
    )
    request = TrainingRequest(out=tmp_path / "run", settings=settings, accept_teachers=True)

    def observe(event):
        if isinstance(event, StepDone):
            done.append(event.step)

    with pytest.raises(TeacherError) as caught:
        train(parse_recipe(table, origin="the test"), request, observe=observe)
    message = str(caught.value)
    for part in (
        "the loss of step 2 is not finite",
        f"the {roles[failing]} teacher the-bad-one answered {num_asked(name, failing)} images",
        "The step was not taken",
    ):
        assert part in message
    assert caught.value.exit_code == ExitCode.KNOWN_ERROR
    assert done == [1]
