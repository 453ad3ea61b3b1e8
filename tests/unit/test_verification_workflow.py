"""A report is about the images, the model and the attack that it names."""

import json
import shutil

import pytest
from PIL import Image

from compressor.attacks.build import selection_attack
from compressor.errors import DataError, RecipeError
from compressor.performance_settings import PerformanceSettings
from compressor.recipe_file import parse_recipe
from compressor.run_directory import RunDirectory
from compressor.threat import ThreatModel
from compressor.training_workflow import TrainingRequest, train
from compressor.verification_workflow import verify_run

SETTINGS = PerformanceSettings(device="cpu", training_dtype="float32", num_threads=1)
TABLE = {
    "name": "verified",
    "data": {"source": "digits", "validation_size": 100},
    "student": {"architecture": "tiny"},
    "method": {"name": "cross_entropy"},
    "training": {"epochs": 1, "batch_size": 300},
    "selection": {"num_steps": 1},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "verified"
    return train(parse_recipe(TABLE, origin="test"), TrainingRequest(out=out, settings=SETTINGS))


@pytest.mark.parametrize("num_steps", [1, 5, 10, 20, 40])
def test_selection_reaches_as_far_with_any_number_of_steps(num_steps):
    attack = selection_attack(ThreatModel(epsilon_pixels=8 / 255), num_steps=num_steps)
    assert attack.num_steps * attack.step_size_pixels == pytest.approx(20 * 0.003)
    assert attack.num_steps * attack.step_size_pixels > attack.threat.epsilon_pixels


def test_inner_attack_of_default_steps_must_reach_the_border_too():
    table = {**TABLE, "method": {"name": "pgd_at", "attack": {"num_steps": 1}}}
    with pytest.raises(RecipeError, match="weaker attacker than the threat says"):
        parse_recipe(table, origin="test")


def test_report_names_the_attack_of_selection(run):
    report = verify_run(run, settings=SETTINGS, num_images=20)
    assert report.selection.attack == "PGD, 1 steps of 0.06"
    assert report.selection.attack in run.report_markdown(20).read_text()


def test_a_part_of_the_images_does_not_overwrite_the_whole(run):
    verify_run(run, settings=SETTINGS)
    whole = run.report_json().read_bytes()
    verify_run(run, settings=SETTINGS, num_images=20)
    assert run.report_json().read_bytes() == whole
    assert json.loads(run.report_json(20).read_text())["clean"]["num_total"] == 20


@pytest.mark.parametrize(("fact", "value"), [("image_shape", [1, 16, 16]), ("class_names", ["a"])])
def test_images_of_another_kind_are_refused(run, tmp_path, fact, value):
    copy = RunDirectory(shutil.copytree(run.path, tmp_path / "copy"))
    copy.facts.write_text(json.dumps(json.loads(copy.facts.read_text()) | {fact: value}))
    with pytest.raises(DataError, match="give the data of the run with --data"):
        verify_run(copy, settings=SETTINGS, num_images=20)


def test_test_images_of_another_size_are_refused_before_training(tmp_path):
    for part, side in (("train", 8), ("test", 16)):
        for name in ("a", "b"):
            folder = tmp_path / "data" / part / name
            folder.mkdir(parents=True)
            for number in range(10):
                Image.new("L", (side, side), number * 20).save(folder / f"{number}.png")
    data = {"source": f"imagefolder:{tmp_path / 'data'}", "validation_size": 4}
    recipe = parse_recipe({**TABLE, "data": data, "training": {"batch_size": 8}}, origin="test")
    with pytest.raises(DataError, match="the test images have 2 classes and shape"):
        train(recipe, TrainingRequest(out=tmp_path / "run", settings=SETTINGS))
    assert not (tmp_path / "run").exists()
