"""Recipes with teachers of both roles: the files, the number of teachers, the options."""

from pathlib import Path

import pytest

from cli.recipe_from_options import NamedOptions, recipe_from_options
from compressor.errors import RecipeError, UsageError
from compressor.logged_names import logged_name, series_of_teachers
from compressor.method_recipes import BMTARDRecipe, CIARDRecipe, MTARDRecipe
from compressor.method_table import TeacherNeed
from compressor.methods.build import resolve_temperature_rate
from compressor.recipe_file import load_recipe
from compressor.reports.training_figures import training_figures
from compressor.schedules import Progress, rate_factor

EXAMPLES = Path(__file__).parents[2] / "examples" / "recipes"
PAPER = EXAMPLES / "cifar10-paper.toml"


def example(name, *overrides):
    return load_recipe(EXAMPLES / f"cifar10-{name}.toml", overrides)


def test_mtard_recipe_is_the_authors():
    recipe, paper = example("mtard"), load_recipe(PAPER)
    same_attack = MTARDRecipe().attack.model_copy(update={"step_size_pixels": 2 / 255})
    assert recipe.method == MTARDRecipe(attack=same_attack)
    assert (recipe.training, recipe.threat) == (paper.training, paper.threat)


def test_ciard_recipe_is_the_authors_with_the_slips_left_out():
    recipe, paper = example("ciard"), load_recipe(PAPER)
    same_attack = CIARDRecipe().attack.model_copy(update={"step_size_pixels": 2 / 255})
    assert recipe.method == CIARDRecipe(attack=same_attack, temperature_rate=0.001)
    assert resolve_temperature_rate(CIARDRecipe(), num_steps=11_730) == pytest.approx(0.01)
    assert recipe.training.epochs == 300
    assert (
        recipe.training.model_copy(update={"schedule": paper.training.schedule}) == paper.training
    )


@pytest.mark.parametrize(
    ("epoch", "factor"), [(0, 1.0), (75, 1.0), (149, 1.0), (150, 1.0), (225, 0.5), (299, 0.0)]
)
def test_ciard_rate_holds_for_half_of_the_run_and_falls_along_a_cosine(epoch, factor):
    progress = Progress(epoch=epoch, step=391 * epoch, num_epochs=300, num_steps=391 * 300)
    schedule = example("ciard").training.schedule
    assert rate_factor(schedule, progress) == pytest.approx(factor, abs=2e-4)


@pytest.mark.parametrize("name", ["mtard", "ciard"])
def test_every_setting_of_the_method_is_part_of_the_identity(name):
    changes = {
        "loss_scale": "1.0",
        "weight_rate": "0.5",
        "relative_loss_exponent": "2.0",
        "temperature_rate": "0.5",
        "min_temperature": "2.0",
        "max_temperature": "5.0",
        "balance_drops": "[0.5]",
        "balance_drop_factor": "0.0",
        "push_factor": "0.0",
        "push_matches_decade": "false",
        "push_temperature": "1.0",
        "teacher_learning_rate": "0.0",
        "teacher_momentum": "0.9",
        "teacher_weight_decay": "0.0",
        "teacher_from_fraction": "0.0",
        "teacher_statistics": "batch",
    }
    settings = set(type(example(name).method).model_fields) - {"name", "attack"}
    assert settings <= set(changes)
    for key in settings:
        changed = example(name, f"method.{key}={changes[key]}")
        assert changed.recipe_id != example(name).recipe_id, key


def test_ciard_bounds_of_the_temperatures():
    with pytest.raises(RecipeError, match=r"method.min_temperature 11.0 is above"):
        example("ciard", "method.min_temperature=11.0")


@pytest.mark.parametrize(
    ("num_clean", "num_robust", "found"),
    [
        (1, 1, []),
        (64, 64, []),
        (2, 0, ["takes at least 1 robust teacher, the recipe has 0"]),
        (65, 1, ["takes at most 64 clean teachers, the recipe has 65"]),
    ],
)
def test_number_of_teachers(num_clean, num_robust, found):
    for table in (BMTARDRecipe, MTARDRecipe):
        problems = table.teachers.problems(num_clean=num_clean, num_robust=num_robust)
        assert [problem.partition(";")[0] for problem in problems] == found


def test_exact_number_of_teachers_is_said_exactly():
    (problem,) = TeacherNeed(robust=range(1, 2)).problems(num_clean=0, num_robust=2)
    assert problem.startswith("takes 1 robust teacher, the recipe has 2; remove")


def from_options(path, **named):
    return recipe_from_options(path, NamedOptions(**named), overrides=[], out=None, resume=False)[0]


def test_options_name_several_teachers_in_order():
    named = {"clean_teachers": ("tiny:a", "tiny:b"), "robust_teachers": ("tiny:c", "tiny:d")}
    recipe = from_options(PAPER, **named)
    found = [(teacher.role, teacher.source) for teacher in recipe.teachers]
    first, added = [("clean", "tiny:a"), ("robust", "tiny:c")], [("clean", "tiny:b")]
    assert found == [*first, *added, ("robust", "tiny:d")]
    bare = from_options(None, data="digits", student="tiny", **named)
    assert sorted(t.source for t in bare.teachers) == ["tiny:a", "tiny:b", "tiny:c", "tiny:d"]


def test_options_that_leave_a_teacher_unnamed_are_refused(tmp_path):
    more = tmp_path / "more.toml"
    more.write_text(
        PAPER.read_text().replace("[method]", '[[teachers]]\nrole="clean"\nsource="x"\n[method]')
    )
    with pytest.raises(UsageError, match="has 2 clean teachers and --clean-teacher names 1; give"):
        from_options(more, clean_teachers=("tiny:a",))


def test_names_of_series_are_read_as_they_are_written():
    names = ["loss_nats", "robust_teacher_loss_nats", "push_loss_nats", "learning_rate_per_step"]
    assert series_of_teachers(names, "loss_nats") == []
    wanted = [("clean", 0), ("robust", 1), ("robust", 2), ("robust", 10)]
    names += [logged_name(role, "loss_nats", position=place) for role, place in wanted]
    found = series_of_teachers(names, "loss_nats")
    assert [(series.role, series.position) for series in found] == wanted
    assert [series.label for series in found] == ["clean", "robust 1", "robust 2", "robust 10"]
    assert [series.line_style for series in found[:3]] == ["-", "-", "--"]


def test_figures_of_several_teachers_have_a_line_for_each():
    steps = [
        {"kind": "step", "step": step, "loss_nats": 1.0, "clean_loss_nats": 0.5}
        | {f"robust_loss_{place}_nats": place / step for place in (1, 2, 3)}
        for step in range(1, 9)
    ]
    (losses,) = training_figures(steps)
    for part in ("robust_loss_1_nats from 1 to", "robust_loss_3_nats from 3 to", "clean_loss_nats"):
        assert part in losses.alt
