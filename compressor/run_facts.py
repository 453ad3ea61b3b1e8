"""What a run is made of, by content and without paths; and that it stays so when it goes on."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compressor.attacks.build import selection_attack
from compressor.data import TrainingData
from compressor.errors import CheckpointError
from compressor.method_recipes import BalancedRecipe
from compressor.methods.build import resolve_temperature_rate
from compressor.performance_settings import PerformanceSettings
from compressor.ranks import launch_of_environment, num_ranks_of_environment
from compressor.recipe import Recipe
from compressor.recipe_file import load_recipe
from compressor.reports.report import Count
from compressor.run_directory import RunDirectory, read_facts, read_json
from compressor.schedules import num_steps_of
from compressor.teacher_check import TeacherCheck


def run_facts(
    recipe: Recipe, data: TrainingData, checks: Sequence[TeacherCheck], *, num_ranks: int
) -> dict[str, Any]:
    """Hashes of data and teachers, sizes, and what the recipe leaves to be resolved."""
    train, validation = data.train, data.validation
    num_steps = num_steps_of(recipe, num_images=train.num_images)
    attack = selection_attack(recipe.threat.build(), num_steps=recipe.selection.num_steps)
    facts: dict[str, Any] = {
        "class_names": list(train.class_names),
        "image_shape": list(train.image_shape),
        "training_content_sha256": train.content_sha256,
        "num_training": train.num_images,
        "num_validation": validation.num_images,
        "validation_index_sha256": validation.index_sha256,
        "num_steps": num_steps,
        "selection_attack": f"PGD, {attack.num_steps} steps of {attack.step_size_pixels:.4g}",
        "teachers": [_teacher_facts(check) for check in checks],
    }
    if isinstance(recipe.method, BalancedRecipe):
        rate = resolve_temperature_rate(recipe.method, num_steps=num_steps)
        facts["temperature_rate_per_step"] = rate
    if recipe.training.batch_norm == "own_images":  # else their number is a matter of speed
        facts["num_processes"] = num_ranks
    return facts


def refuse_changed_facts(run: RunDirectory, facts: dict[str, Any]) -> None:
    """A run goes on with the data and the teachers that it began with.

    Raises:
        CheckpointError: naming what is different now.
    """
    before = read_facts(run)
    for name in ("training_content_sha256", "validation_index_sha256", "class_names"):
        if before.get(name) != facts[name]:
            raise CheckpointError(
                f"{run.path} cannot go on: {name} was {before.get(name)}, now it is {facts[name]}; "
                "give the data that the run began with"
            )
    counts = before.get("num_processes"), facts.get("num_processes")
    if counts[0] != counts[1]:
        raise CheckpointError(
            f"{run.path} cannot go on with {counts[1]} processes: it has training.batch_norm = "
            f'"own_images" and began with {counts[0]}; give as many with --nproc'
        )
    teachers = [[(t["role"], t["sha256"]) for t in f["teachers"]] for f in (before, facts)]
    if teachers[0] != teachers[1]:
        raise CheckpointError(
            f"{run.path} cannot go on: its teachers were {teachers[0]}, now they are "
            f"{teachers[1]}; give the teachers that the run began with"
        )


def refuse_other_recipe(run: RunDirectory, recipe: Recipe) -> None:
    """A run goes on with the recipe that it began with, wherever the files lie now.

    Raises:
        CheckpointError: if it is another one.
    """
    began = load_recipe(run.resolved_recipe)
    if began.recipe_id != recipe.recipe_id:
        raise CheckpointError(
            f"{run.path} belongs to another recipe (id {began.recipe_id[:8]}, now "
            f"{recipe.recipe_id[:8]}); resume with the run's own recipe, {run.resolved_recipe}"
        )


def is_of_this_launch(run: RunDirectory) -> bool:
    """Whether the processes began this run and were then started again by their launcher."""
    launch = launch_of_environment()
    if launch is None or not run.resolved_recipe.is_file():
        return False
    before = read_json(run.environment)
    return isinstance(before, dict) and before.get("launch") == launch


def as_it_began(run: RunDirectory, settings: PerformanceSettings) -> PerformanceSettings:
    """The settings of a resumed run: what is not asked for stays as it was.

    But for the threads of each process, where there is another number of processes now.

    Raises:
        CheckpointError: if another number format is asked for.
    """
    before = read_json(run.environment)
    number_format = before.get("number_format") if isinstance(before, dict) else None
    if number_format not in {"float32", "bfloat16"}:
        raise CheckpointError(
            f"{run.environment} is damaged: it does not say in which number format the run began; "
            "copy the run again, or begin anew"
        )
    if settings.training_dtype not in {"auto", number_format}:
        raise CheckpointError(
            f"{run.path} is trained in {number_format}, not in {settings.training_dtype}; leave "
            "--dtype out"
        )
    num_threads = settings.num_threads
    if num_threads is None and before.get("num_processes", 1) == num_ranks_of_environment():
        num_threads = before.get("num_threads")
    changes = {"training_dtype": number_format, "num_threads": num_threads}
    if settings.compile == "auto":
        changes["compile"] = "on" if before.get("is_compiled") else "off"
    return settings.model_copy(update=changes)


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """The same recipe, to be used from any folder."""
    kind, colon, location = recipe.data.source.partition(":")
    source = f"{kind}:{Path(location).expanduser().absolute()}" if colon else kind
    teachers = []
    for teacher in recipe.teachers:
        head, colon, file = teacher.source.rpartition(":")
        if Path(teacher.source).exists():
            head, colon, file = "", "", teacher.source
        path = Path(file).expanduser().absolute()
        teachers.append(teacher.model_copy(update={"source": f"{head}{colon}{path}"}))
    data = recipe.data.model_copy(update={"source": source})
    return recipe.model_copy(update={"data": data, "teachers": tuple(teachers)})


def _teacher_facts(check: TeacherCheck) -> dict[str, Any]:
    return {
        "role": check.teacher.role,
        "name": check.teacher.name,
        "sha256": check.teacher.sha256,
        "clean": Count.of(check.clean).model_dump(),
        "robust": Count.of(check.robust).model_dump() if check.robust else None,
    }
