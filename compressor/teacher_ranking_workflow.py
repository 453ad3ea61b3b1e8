"""teacher rank: from some teachers and a data set to a ranking with a recommended set.

N images, T teachers.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from compressor.data import TrainingSplit, evaluation_batches, load_training_data
from compressor.errors import DataError, RobustCompressError, TeacherError, UsageError
from compressor.folding import EvaluationView
from compressor.performance import Performance, resolve_performance
from compressor.performance_settings import PerformanceSettings
from compressor.recipe import DataRecipe, Recipe, TeacherRecipe
from compressor.recipe_file import load_recipe
from compressor.reports.teacher_ranking import Seen, TeacherRanking
from compressor.run_directory import RunDirectory, read_facts
from compressor.teacher import Teacher
from compressor.teacher_ranking import RankingProgress, measure_teachers
from compressor.teacher_ranking_record import (
    Found,
    notes_on,
    ranked_teachers,
    recommend,
    transfer_cells,
)
from compressor.teachers import load_model
from compressor.threat import DEFAULT_THREAT, ThreatModel
from compressor.verification.request import fitting_batch_size

MIN_STEPS = 40
"""Fewer steps of APGD flatter."""
_MAX_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class RankingRequest:
    """What is asked for."""

    sources: Sequence[str]
    """Whatever `TeacherRecipe.source` takes; or one recipe, for its teachers, data and threat."""
    data_source: str | None = None
    """Instead of the recipe's."""
    num_images: int = 500
    threat: ThreatModel | None = None
    """Instead of the recipe's."""
    num_steps: int = MIN_STEPS
    num_wanted: int = 3
    transfer_weight: float = 0.5
    settings: PerformanceSettings = PerformanceSettings()
    download: bool = False


class _Asked(NamedTuple):
    """The request, its recipe read."""

    tables: list[TeacherRecipe]
    data: DataRecipe
    seed: int
    threat: ThreatModel


def rank_teachers(
    request: RankingRequest, *, observe: Callable[[RankingProgress], None] = lambda _: None
) -> tuple[TeacherRanking, list[TeacherRecipe]]:
    """Measure teachers on images of the training part and recommend some; nothing is written.

    They are those that every run of the split holds out; other teachers may have learnt from them.

    Args:
        request: what is asked for.
        observe: told several times a second.

    Returns:
        The ranking, and the tables of its teachers for a recipe, in its order.

    Raises:
        UsageError: if the request contradicts itself.
        TeacherError: if a teacher does not fit the data, is there twice, or answers no numbers.
        RobustCompressError: if a recipe, a file or the data cannot be used.
    """
    asked = _read(request)
    performance = dataclasses.replace(
        resolve_performance(request.settings), training_dtype=torch.float32
    )
    split = _held_out(asked, request, performance)
    teachers = [_load(table, split, performance) for table in asked.tables]
    teachers = _named(teachers, asked.tables)
    batch_size = min(fitting_batch_size(split.image_shape), _MAX_BATCH)
    measured = measure_teachers(
        teachers,
        list(evaluation_batches(split, batch_size=batch_size, seed=asked.seed)),
        threat=asked.threat,
        num_steps=request.num_steps,
        observe=observe,
    )
    found = Found(teachers=teachers, measured=measured)
    seen = [_has_seen(table.source, asked, split) for table in asked.tables]
    ranking = TeacherRanking(
        data=asked.data.source.partition(":")[0],
        content_sha256=split.content_sha256,
        index_sha256=split.index_sha256,
        class_names=split.class_names,
        num_images=split.num_images,
        seed=asked.seed,
        norm=asked.threat.norm,
        epsilon_pixels=asked.threat.epsilon_pixels,
        num_steps=request.num_steps,
        teachers=ranked_teachers(
            found, sources=[table.source for table in asked.tables], seen=seen
        ),
        transfer=transfer_cells(found),
        chosen=recommend(
            found, num_wanted=request.num_wanted, transfer_weight=request.transfer_weight
        ),
        notes=notes_on(found, seen=seen),
    )
    return ranking, [asked.tables[place] for place in found.order]


def _read(request: RankingRequest) -> _Asked:
    """Its recipe, if there is one among the sources, gives what is not named."""
    paths = [source for source in request.sources if is_recipe(source)]
    if len(paths) > 1:
        raise UsageError(f"{' and '.join(paths)} are two recipes; name one, and teachers besides")
    recipe = load_recipe(Path(paths[0])) if paths else None
    tables: list[TeacherRecipe] = []
    for source in request.sources:
        if recipe is not None and is_recipe(source):
            tables += recipe.teachers
        else:
            tables.append(TeacherRecipe(role="robust", source=source))
    if not tables:
        raise UsageError(f"{paths[0]} has no teachers, and no others are named")
    default = recipe.threat.build() if recipe is not None else DEFAULT_THREAT
    return _Asked(
        tables=tables,
        data=_data_recipe(request, recipe),
        seed=recipe.seed if recipe is not None else 0,
        threat=request.threat or default,
    )


def is_recipe(source: str) -> bool:
    """Whether it is a recipe that is meant, not a teacher."""
    return Path(source).suffix == ".toml" and ":" not in source


def _data_recipe(request: RankingRequest, recipe: Recipe | None) -> DataRecipe:
    """So many images are held out: of a recipe's own, which are more, the first."""
    num_images = request.num_images
    if recipe is None and request.data_source is None:
        raise UsageError(
            "which images? Name the data with --data, such as cifar10:ROOT or imagefolder:PATH, or "
            "give a recipe among the teachers"
        )
    if recipe is None:
        return DataRecipe(source=str(request.data_source), validation_size=num_images)
    if num_images > recipe.data.validation_size:
        raise UsageError(
            f"{num_images} images were asked for, but the recipe holds only "
            f"{recipe.data.validation_size} out of training; give --samples "
            f"{recipe.data.validation_size} or less, or raise data.validation_size"
        )
    changes: dict[str, object] = {"validation_size": num_images, "training_size": None}
    if request.data_source is not None:
        changes["source"] = request.data_source
    return recipe.data.model_copy(update=changes)


def _held_out(asked: _Asked, request: RankingRequest, performance: Performance) -> TrainingSplit:
    """The first images, classes balanced, of those that every run of this split holds out."""
    try:
        return load_training_data(
            asked.data,
            seed=asked.seed,
            settings=request.settings,
            device=performance.device,
            download=request.download,
        ).validation
    except DataError as error:  # where the number is the problem, it is that of an option
        raise DataError(str(error).replace("data.validation_size", "--samples")) from None


def _load(table: TeacherRecipe, split: TrainingSplit, performance: Performance) -> Teacher:
    """On the device, in the fast form of its eval mode."""
    teacher = load_model(table, class_names=split.class_names, image_shape=split.image_shape)
    if teacher.network is None:
        return teacher
    performance.place_network(teacher.network)
    return dataclasses.replace(teacher, answer=EvaluationView(teacher.network, performance))


def _named(teachers: Sequence[Teacher], tables: Sequence[TeacherRecipe]) -> list[Teacher]:
    """Each with a name of its own: where two files are called the same, the whole source."""
    known: dict[object, str] = {}
    for teacher, table in zip(teachers, tables, strict=True):
        identity = (teacher.sha256, str(teacher.spec or (table.mean, table.std, table.resize_to)))
        if identity in known:
            raise TeacherError(
                f"{known[identity]} and {table.source} are the same teacher; name it once"
            )
        known[identity] = table.source
    count = Counter(teacher.name for teacher in teachers)
    return [
        teacher if count[teacher.name] == 1 else dataclasses.replace(teacher, name=table.source)
        for teacher, table in zip(teachers, tables, strict=True)
    ]


def _has_seen(source: str, asked: _Asked, split: TrainingSplit) -> Seen:
    """Of a run it is known what it was trained on; of a file alone it is not."""
    path = Path(source)
    run = RunDirectory(path.parent if path.name == "model.safetensors" else path)
    try:
        recipe, facts = load_recipe(run.resolved_recipe), read_facts(run)
    except RobustCompressError:
        return "unknown"
    if facts["training_content_sha256"] != split.content_sha256:
        return "unknown"
    has_held_out = recipe.data.validation_size >= split.num_images
    theirs = recipe.data.split_seed_in_run(recipe.seed)
    is_same_split = theirs == asked.data.split_seed_in_run(asked.seed)
    return "no" if is_same_split and has_held_out else "yes"
