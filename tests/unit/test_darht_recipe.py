"""Recipes of DARHT: sense by default, every released setting within reach, the authors' epochs."""

from pathlib import Path

import pytest

from compressor.errors import RecipeError, TeacherError
from compressor.method_recipes import DARHTAttackRecipe, DARHTRecipe
from compressor.methods.build import build_method
from compressor.networks import NetworkSpec, build_classifier
from compressor.recipe import portable_dict
from compressor.recipe_file import apply_override, parse_recipe, read_table
from compressor.schedules import Progress, rate_factor
from compressor.teacher import Teacher

EXAMPLE = Path(__file__).parents[2] / "examples" / "recipes" / "cifar100-darht.toml"


def example(*overrides):
    table = read_table(EXAMPLE)
    for override in overrides:
        apply_override(table, override)
    return parse_recipe(table, origin=EXAMPLE.name)


def released_overrides():
    """Those that the head of the example lists."""
    words = EXAMPLE.read_text().split("What is released comes with:")[1].split("But for")[0]
    return [part.strip(" #\n").replace("'", "") for part in words.split("--set ")[1:]]


def test_the_example_says_sense_at_every_slip():
    recipe = example()
    assert recipe.method == DARHTRecipe(attack=DARHTAttackRecipe(step_size_pixels=2 / 255))
    assert (recipe.training.epochs, recipe.training.batch_size) == (350, 256)
    assert (recipe.training.weight_decay, recipe.seed) == (5e-4, 7)
    assert len(recipe.teachers) == 4


def test_the_released_run_is_what_the_example_lists():
    recipe = example(*released_overrides())
    assert recipe.threat.epsilon_pixels == 0.031
    assert recipe.method == DARHTRecipe(
        last_layer="frozen",
        normalise_trust=False,
        skip_above_nats=8.0,
        teacher_mode="train",
        attack=DARHTAttackRecipe(step_size_pixels=0.003, may_fall_short=True),
    )
    per_epoch = 196
    rates = [
        recipe.training.learning_rate
        * rate_factor(
            recipe.training.schedule,
            Progress(epoch=e, step=e * per_epoch, num_epochs=350, num_steps=350 * per_epoch),
        )
        for e in range(350)
    ]
    expected = [0.0] * 3 + [0.1] * 113 + [0.01] * 45 + [1e-3] * 25 + [1e-4] * 164
    assert rates == pytest.approx(expected, rel=1e-12)


def build(recipe, *, with_networks):
    """The method of the recipe, its teachers tiny networks, or mere answers as of ONNX files."""
    spec = NetworkSpec(architecture="tiny", num_classes=10, image_shape=(1, 8, 8), width=0.5)
    teachers = [
        Teacher(
            name=table.source,
            role=table.role,
            answer=(network := build_classifier(spec, seed=place)),
            network=network if with_networks else None,
            spec=spec if with_networks else None,
            num_parameters=None,
            num_classes=10,
            sha256="",
            num_bytes=0,
        )
        for place, table in enumerate(recipe.teachers)
    ]
    threat = recipe.threat.build()
    return build_method(recipe.method, threat=threat, teachers=teachers, num_steps=350 * 196)


def test_the_example_can_be_built_with_its_onnx_teachers():
    assert len(build(example(), with_networks=False).teachers) == 4


def test_what_is_released_can_be_built_with_networks_and_but_for_one_switch_with_answers():
    overrides = released_overrides()
    assert len(overrides) == 9
    assert build(example(*overrides), with_networks=True).has_drawing_teachers
    with pytest.raises(TeacherError, match="is an ONNX file, which has no layers in train"):
        build(example(*overrides), with_networks=False)
    others = [switch for switch in overrides if switch != "method.teacher_mode=train"]
    assert len(others) == 8
    assert not build(example(*others), with_networks=False).has_drawing_teachers


def test_the_first_teacher_normalises_as_the_script_builds_it():
    first = example().teachers[0]
    assert first.source.startswith("wide_resnet_70_16:")
    assert first.mean == (0.5071, 0.4865, 0.4409)
    assert first.std == (0.2673, 0.2564, 0.2762)


def test_phases_change_at_the_epochs_of_the_authors():
    recipe = example().method
    for epoch, phase in ((49, 1), (50, 2), (117, 2), (118, 3)):
        fraction = Progress(epoch=epoch, step=epoch * 196, num_epochs=350, num_steps=350 * 196)
        begun = (fraction.fraction >= recipe.distil_from) + (
            fraction.fraction >= recipe.labels_until
        )
        assert begun + 1 == phase


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method.attack.step_size_pixels=0.003", "reach only 0.03 of epsilon 0.03137"),
        ("method.distil_from=0.9", "method.distil_from 0.9 is after method.labels_until 0.33"),
        ("teachers=[]", "takes .* teacher, the recipe has 0"),
        ("method.last_layer=warm", "'labels', 'frozen' or 'decaying' .got 'warm'"),
    ],
)
def test_what_cannot_be_is_refused(override, message):
    with pytest.raises(RecipeError, match=message):
        example(override)


def test_a_last_layer_that_nobody_ever_trains_is_refused():
    settings = ["method.labels_until=0", "method.distil_from=0"]
    example(*settings)
    with pytest.raises(RecipeError, match="never train the last layer"):
        example(*settings, "method.last_layer=frozen")


def test_schedules_without_idle_epochs_keep_their_identity():
    assert "idle_fraction" not in portable_dict(example())["training"]["schedule"]
    idle = example("training.schedule.idle_fraction=3/350")
    assert portable_dict(idle)["training"]["schedule"]["idle_fraction"] == 3 / 350
    assert idle.recipe_id != example().recipe_id
