"""Recipes: the authors' defaults, what is refused and how, identity, and overrides."""

import copy
import json
from pathlib import Path

import pytest
from safetensors import safe_open

from compressor.errors import RecipeError, UsageError
from compressor.method_recipes import BMTARDRecipe
from compressor.method_table import InnerAttackRecipe
from compressor.methods.build import resolve_temperature_rate
from compressor.recipe import TrainingRecipe, portable_dict, resolved_dict
from compressor.recipe_file import apply_override, load_recipe, parse_recipe, read_table

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples" / "recipes").glob("*.toml"))

MINIMAL = {
    "name": "demo",
    "data": {"source": "digits", "validation_size": 100},
    "student": {"architecture": "tiny"},
    "method": {"name": "bmtard"},
    "teachers": [
        {"role": "clean", "source": "resnet56:/data/clean.safetensors"},
        {"role": "robust", "source": "wide_resnet_34_10:/data/robust.safetensors"},
    ],
}


def recipe_with(*overrides):
    table = copy.deepcopy(MINIMAL)
    for override in overrides:
        apply_override(table, override)
    return parse_recipe(table, origin="demo.toml")


def problems_of(*overrides):
    with pytest.raises(RecipeError) as caught:
        recipe_with(*overrides)
    return str(caught.value)


def leaves(value, place=""):
    """Dotted keys of everything that is not a table."""
    if isinstance(value, dict) or (
        isinstance(value, list) and value and isinstance(value[0], dict)
    ):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [leaf for key, inner in items for leaf in leaves(inner, f"{place}.{key}")]
    return [place.removeprefix(".")]


def test_bmtard_defaults_are_the_authors():
    recipe = recipe_with()
    assert recipe.training == TrainingRecipe(
        epochs=300, batch_size=128, learning_rate=0.1, momentum=0.9, weight_decay=2e-4
    )
    assert not recipe.training.nesterov
    assert recipe.training.ema_decay is None
    assert recipe.training.gradient_clip_norm is None
    assert [round(300 * m) for m in recipe.training.schedule.milestones] == [215, 260, 285]
    assert recipe.training.schedule.decay == 0.1
    assert recipe.method == BMTARDRecipe(
        loss_scale=0.1,
        temperature_rate="scaled",
        min_temperature=1.0,
        max_temperature=10.0,
        weight_rate=0.025,
        attack=InnerAttackRecipe(num_steps=10, step_size_pixels=None, start="gaussian"),
    )
    assert recipe.threat.epsilon_pixels == 8 / 255
    assert recipe.data.crop_padding_pixels == 4
    assert recipe.data.horizontal_flip
    assert recipe.seed == 0


@pytest.mark.parametrize(
    ("num_steps", "rate"),
    [
        (117_300, 0.001),
        (234_600, 0.001),
        (11_730, 0.01),
        (58_650, 0.002),
        (2_346, 0.05),
        (2_345, 0.05),
        (1, 0.05),
    ],
)
def test_temperature_rate_scaled(num_steps, rate):
    resolved = resolve_temperature_rate(BMTARDRecipe(), num_steps=num_steps)
    assert resolved == pytest.approx(rate, rel=1e-12)
    assert 0.001 <= resolved <= 0.05


def test_temperature_rate_of_the_authors_run_is_exact():
    assert resolve_temperature_rate(BMTARDRecipe(), num_steps=117_300) == 0.001


@pytest.mark.parametrize("rate", [0.0, 0.001, 0.3])
def test_temperature_rate_given_is_kept(rate):
    recipe = BMTARDRecipe(temperature_rate=rate)
    assert resolve_temperature_rate(recipe, num_steps=5) == rate


@pytest.mark.parametrize(
    ("override", "place", "value"),
    [
        ("training.epochs=3", "training.epochs", 3),
        ("threat.epsilon_pixels=4/255", "threat.epsilon_pixels", 4 / 255),
        ('threat.epsilon_pixels="4/255"', "threat.epsilon_pixels", 4 / 255),
        ("name=other", "name", "other"),
        ("student.mean=[0.5, 0.5, 0.5]", "student.mean", (0.5, 0.5, 0.5)),
        ("data.horizontal_flip=false", "data.horizontal_flip", False),
        ("method.attack.start=uniform", "method.attack.start", "uniform"),
        (" training.learning_rate = 0.02", "training.learning_rate", 0.02),
        ("teachers.1.source=a=b.onnx", "teachers.1.source", "a=b.onnx"),
        ("method.temperature_rate=0.002", "method.temperature_rate", 0.002),
    ],
)
def test_override_sets_one_key(override, place, value):
    found = recipe_with(override)
    for key in place.split("."):
        found = found[int(key)] if key.isdigit() else getattr(found, key)
    assert found == value


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.epochs", "is not KEY=VALUE"),
        ("=3", "is not KEY=VALUE"),
        ("training..epochs=3", "is not KEY=VALUE"),
        ("teachers.2.source=x", "there is no '2' in a list of 2"),
        ("teachers.clean.source=x", "there is no 'clean' in a list of 2"),
        ("name.first=x", "holds 'demo', not a table"),
    ],
)
def test_override_refused(override, message):
    with pytest.raises(UsageError, match=message):
        recipe_with(override)


def test_all_problems_are_reported_at_once():
    text = problems_of("training.epochs=0", "method.weight_rat=1", "student={}")
    assert text.startswith("demo.toml: 3 problems in the recipe")
    for part in ("training.epochs:", "method.weight_rat: unknown key", "student.architecture: is"):
        assert part in text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.epoch=3"], "training.epoch: unknown key (got 3); did you mean epochs?"),
        (["method.weight_rat=1.0"], "did you mean weight_rate?"),
        (["training.learnin_rate=1.0"], "did you mean learning_rate?"),
        (["method.name=bmtrd"], "'bmtrd' is not one of"),
        (["training.epochs=3.5"], "training.epochs: must be a whole number"),
        (['training.epochs="3"'], "training.epochs: must be a whole number, without quotes"),
        (['data.horizontal_flip="no"'], "must be true or false"),
        (["threat.epsilon_pixels=8"], 'write eight grey levels as "8/255"'),
        (["threat.epsilon_pixels=eight"], "is not a number"),
        (["training.learning_rate=nan"], "training.learning_rate: must be"),
        (["training.schedule={}"], "training.schedule: needs the key 'kind'"),
        (["name=../escape"], "name:"),
        (["seed=-1"], "seed:"),
        (["method.attack.step_size_pixels=0.001"], "reach only 0.01 of epsilon"),
        (["method.min_temperature=11.0"], "is above method.max_temperature"),
        (["training.momentum=0.0", "training.nesterov=true"], "needs training.momentum above 0"),
        (['training.schedule={kind="milestones", milestones=[0.9, 0.5]}'], "must rise"),
        (["teachers=[]"], "takes at least 1 clean teacher, the recipe has 0"),
        (["teachers.0.role=robust"], "takes at least 1 clean teacher, the recipe has 0"),
        (["method.name=ciard", "teachers.0.role=robust"], "1 robust teacher, the recipe has 2"),
        (["method.name=pgd_at"], "takes 0 clean teachers, the recipe has 1"),
    ],
)
def test_problem_is_explained(overrides, message):
    assert message in problems_of(*overrides)


CHANGES = {
    "name": "other",
    "seed": "1",
    "threat.norm": None,  # has one value only
    "threat.epsilon_pixels": "4/255",
    "data.source": "fashion-mnist:/data",
    "data.split_seed": "0",
    "data.training_size": "1000",
    "data.validation_size": "200",
    "data.image_size": "16",
    "data.num_channels": "3",
    "data.crop_padding_pixels": "2",
    "data.horizontal_flip": "false",
    "data.min_crop_area": None,  # takes the place of the padding; see below
    "student.architecture": "resnet18",
    "student.width": "0.5",
    "student.mean": "[0.5]",
    "student.std": "[0.5]",
    "teachers.0.role": None,  # the other then has the wrong role
    "teachers.0.source": "tiny:/data/clean.safetensors",
    "teachers.0.mean": "[0.5]",
    "teachers.0.std": "[0.5]",
    "teachers.0.resize_to": "32",
    "teachers.0.sha256": "00ff",
    "teachers.1.role": None,
    "teachers.1.source": "tiny:/data/robust.safetensors",
    "teachers.1.mean": "[0.5]",
    "teachers.1.std": "[0.5]",
    "teachers.1.resize_to": "32",
    "teachers.1.sha256": "00ff",
    "method.name": None,  # the teachers then do not fit
    "method.loss_scale": "0.2",
    "method.temperature_rate": "0.001",
    "method.min_temperature": "2.0",
    "method.max_temperature": "5.0",
    "method.weight_rate": "0.05",
    "method.attack.num_steps": "7",
    "method.attack.step_size_pixels": "3/255",
    "method.attack.start": "zero",
    "method.attack.begins_at": "0.3",
    "method.attack.first_num_steps": "5",
    "method.attack.full_from": None,  # says nothing alone; see test_growing.py
    "training.epochs": "3",
    "training.batch_size": "64",
    "training.accumulate_batches": "2",
    "training.learning_rate": "0.05",
    "training.momentum": "0.8",
    "training.nesterov": "true",
    "training.weight_decay": "0.0",
    "training.schedule.kind": None,  # changed as a whole below
    "training.schedule.milestones": "[0.5]",
    "training.schedule.decay": "0.5",
    "training.schedule.idle_fraction": "0.01",
    "training.ema_decay": "0.999",
    "training.gradient_clip_norm": "1.0",
    "training.batch_norm": "own_images",
    "selection.every_epochs": "2",
    "selection.from_fraction": "0.5",
    "selection.num_steps": "10",
}


def test_changes_cover_every_setting():
    assert set(leaves(resolved_dict(recipe_with()))) == set(CHANGES)


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, value in CHANGES.items() if value is not None]
)
def test_recipe_id_changes_with_every_setting(key, value):
    overrides = [f"{key}={value}"]
    if key.startswith("training.schedule."):
        overrides.insert(0, 'training.schedule={kind="milestones"}')
    assert recipe_with(*overrides).recipe_id != recipe_with().recipe_id


@pytest.mark.parametrize(
    "override",
    [
        'training.schedule={kind="one_cycle"}',
        'training.schedule={kind="cosine"}',
    ],
)
def test_recipe_id_changes_with_the_schedule(override):
    assert recipe_with(override).recipe_id != recipe_with().recipe_id


def test_recipe_id_changes_with_the_manner_of_the_crop():
    padded, *resized = (
        recipe_with("data.crop_padding_pixels=0", *more).recipe_id
        for more in ([], ["data.min_crop_area=0.08"], ["data.min_crop_area=0.25"])
    )
    assert len({padded, *resized}) == 3


SAME_BUT_FOR_THE_PLACE = [
    ("data.source=imagefolder:/a/b", "data.source=imagefolder:/c"),
    ("teachers.0.source=tiny:/a.safetensors", "teachers.0.source=tiny:C.safetensors"),
    ("teachers.0.source=/a/b.onnx", "teachers.0.source=c.onnx"),
    ("teachers.0.source=runs/one", "teachers.0.source=/elsewhere/two"),
    ("teachers.0.source=torchvision:resnet18:/a.pt", "teachers.0.source=torchvision:resnet18:b.pt"),
]
AWKWARD_FOLDERS = [
    pytest.param("teachers.0.source=runs/one", f"teachers.0.source={path}")
    for path in ("runs/teacher-v1.2", "/a/b:c/run")
]


@pytest.mark.parametrize(("here", "there"), [*SAME_BUT_FOR_THE_PLACE, *AWKWARD_FOLDERS])
def test_recipe_id_does_not_change_with_a_path(here, there):
    assert recipe_with(here).recipe_id == recipe_with(there).recipe_id


@pytest.mark.parametrize(
    "override", [override for pair in SAME_BUT_FOR_THE_PLACE for override in pair]
)
def test_portable_dict_has_no_path(override):
    text = json.dumps(portable_dict(recipe_with(override)))
    assert "/" not in text
    assert ".safetensors" not in text


def test_default_written_out_is_the_same_recipe():
    assert recipe_with("training.epochs=300").recipe_id == recipe_with().recipe_id


@pytest.mark.parametrize("name", ["cifar10-small", "cifar10-mobilenet"])
def test_a_setting_that_comes_later_leaves_older_recipes_their_identity(name):
    """Published students carry the identity that their recipe had when they were trained."""
    with safe_open(ROOT / "docs/results" / name / "model.safetensors", framework="pt") as file:
        stored = file.metadata()["robust_compress.recipe_id"]
    assert load_recipe(ROOT / "examples/recipes" / f"{name}.toml").recipe_id == stored


def test_round_trip_through_resolved_json(tmp_path):
    recipe = recipe_with("student.mean=[0.1, 0.2, 0.3]", "threat.epsilon_pixels=4/255")
    path = tmp_path / "recipe.resolved.json"
    path.write_text(json.dumps(resolved_dict(recipe)))
    again = load_recipe(path)
    assert again == recipe
    assert again.recipe_id == recipe.recipe_id


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.toml", None, "does not exist"),
        ("bad.toml", b"name = ", "is not valid TOML"),
        ("bad.json", b"{", "is not valid JSON"),
        ("list.json", b"[]", "holds a list"),
        ("binary.toml", b"\xff\xfe\x00", "is not a text file in UTF-8"),
        ("empty.toml", b"", "problems in the recipe"),
    ],
)
def test_unreadable_file_is_explained(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RecipeError, match=message):
        load_recipe(path)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_parses(path):
    table = read_table(path)
    if table["method"]["name"] == "bmtard":
        table.setdefault("teachers", [{"role": "clean"}, {"role": "robust"}])
    for place, teacher in enumerate(table.get("teachers", [])):
        if not teacher.get("source"):
            apply_override(table, f"teachers.{place}.source=tiny:teacher.safetensors")
    recipe = parse_recipe(table, origin=path.name)
    assert recipe.recipe_id
