"""Tables of the methods with one teacher: the papers' numbers, and what contradicts itself."""

from pathlib import Path

import pytest

from compressor.errors import RecipeError
from compressor.method_recipes import (
    AdaADRecipe,
    ARDRecipe,
    DistillationRecipe,
    IADRecipe,
    RSLADRecipe,
)
from compressor.method_table import InnerAttackRecipe
from compressor.recipe_file import load_recipe, parse_recipe
from compressor.schedules import Progress, rate_factor

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"
UNIFORM = InnerAttackRecipe(num_steps=10, step_size_pixels=None, start="uniform")
GAUSSIAN = InnerAttackRecipe(num_steps=10, step_size_pixels=None, start="gaussian")
PAPERS = {
    "ard": ARDRecipe(temperature=30.0, teacher_weight=1.0, loss_scale=0.1, attack=UNIFORM),
    "iad": IADRecipe(
        temperature=1.0,
        teacher_weight=1.0,
        loss_scale=1.0,
        begin_fraction=0.3,
        trust_exponent=0.1,
        teacher_trust="weighted",
        self_target="live",
        attack=UNIFORM,
    ),
    "rslad": RSLADRecipe(robust_weight=5 / 6, loss_scale=0.1, attack=GAUSSIAN),
    "adaad": AdaADRecipe(robust_weight=1.0, loss_scale=0.1, attack=GAUSSIAN),
}
DROPS = {"ard": [100, 150], "iad": [100, 150], "rslad": [215, 260, 285], "adaad": [100, 150]}


def parse(name, roles, **method):
    table = {
        "name": "demo",
        "data": {"source": "digits", "validation_size": 100},
        "student": {"architecture": "tiny"},
        "teachers": [{"role": role, "source": "tiny:t.safetensors"} for role in roles],
        "method": {"name": name, **method},
    }
    return parse_recipe(table, origin="demo.toml")


@pytest.mark.parametrize("name", PAPERS)
def test_defaults_are_the_papers(name):
    assert parse(name, ["robust"]).method == PAPERS[name]


def test_defaults_of_plain_distillation():
    expected = DistillationRecipe(temperature=4.0, teacher_weight=0.9, loss_scale=1.0)
    assert parse("distillation", ["clean"]).method == expected
    assert parse("distillation", ["robust"]).method == expected


@pytest.mark.parametrize("name", PAPERS)
def test_paper_recipe_is_the_default_and_resolves_to_the_papers_epochs(name):
    recipe = load_recipe(RECIPES / f"cifar10-{name}.toml")
    attack = recipe.method.attack.model_copy(update={"step_size_pixels": None})
    assert recipe.method.attack.step_size_pixels == 2 / 255
    assert recipe.method.model_copy(update={"attack": attack}) == PAPERS[name]
    epochs = recipe.training.epochs
    assert epochs == (300 if name == "rslad" else 200)
    assert recipe.training.weight_decay == (5e-4 if name == "adaad" else 2e-4)
    assert (recipe.training.learning_rate, recipe.training.batch_size) == (0.1, 128)
    factors = [
        rate_factor(
            recipe.training.schedule,
            Progress(epoch=epoch, step=391 * epoch, num_epochs=epochs, num_steps=391 * epochs),
        )
        for epoch in range(epochs)
    ]
    drops = [epoch for epoch in range(1, epochs) if factors[epoch] < 0.5 * factors[epoch - 1]]
    assert drops == DROPS[name]
    assert factors[-1] == pytest.approx(0.1 ** len(drops))


@pytest.mark.parametrize("name", PAPERS)
@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ([], "takes 1 robust teacher, the recipe has 0"),
        (["clean"], "takes 1 robust teacher, the recipe has 0"),
        (["robust", "robust"], "takes 1 robust teacher, the recipe has 2"),
        (["clean", "robust"], "takes 0 clean teachers, the recipe has 1"),
    ],
)
def test_one_robust_teacher_is_wanted(name, roles, message):
    with pytest.raises(RecipeError, match=message):
        parse(name, roles)


@pytest.mark.parametrize("roles", [[], ["clean", "robust"], ["clean", "clean"]])
def test_distillation_wants_one_teacher_of_either_role(roles):
    with pytest.raises(RecipeError, match=f"takes .* teacher, the recipe has {len(roles)}"):
        parse("distillation", roles)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("ard", "teacher_weight", 0.0),  # would train on clean images alone
        ("iad", "teacher_weight", 0.0),
        ("rslad", "robust_weight", 0.0),
        ("adaad", "robust_weight", "0/6"),
        ("distillation", "teacher_weight", 0.0),
        ("rslad", "robust_weight", "7/6"),
        ("ard", "temperature", 0.0),
        ("iad", "trust_exponent", -0.1),
        ("iad", "begin_fraction", 1.5),
        ("iad", "self_target", "frozen"),
    ],
)
def test_values_without_sense_are_refused(name, key, value):
    roles = ["clean" if name == "distillation" else "robust"]
    with pytest.raises(RecipeError, match=rf"method\.{key}: "):
        parse(name, roles, **{key: value})


def test_only_adaad_needs_more_than_answers():
    tables = [*PAPERS.values(), DistillationRecipe()]
    assert [table.name for table in tables if table.needs_teacher_networks] == ["adaad"]
