"""compare: methods under one protocol, from a plan to tables."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from compressor.comparison.estimate import measure_passes, measuring_seconds, training_seconds
from compressor.comparison.folder import ComparisonFolder
from compressor.comparison.measuring import ImageCounts, MeasuringWatchers
from compressor.comparison.passes import Passes, count_passes
from compressor.comparison.plan import ComparisonPlan, PlannedRun
from compressor.comparison.progress import Clock, ComparisonProgress
from compressor.comparison.result import ComparisonResult, write_result
from compressor.comparison.runs import (
    FinishedRun,
    HowToRun,
    Materials,
    complete_run,
    work_left,
)
from compressor.comparison.summary import summarise
from compressor.comparison.tables import to_csv, to_latex, to_markdown
from compressor.data import TrainingData, load_training_data
from compressor.environment import describe_environment
from compressor.errors import RecipeError, RobustCompressError
from compressor.image_sources import open_source
from compressor.methods.build import build_method
from compressor.performance import Performance, resolve_performance
from compressor.recipe import TeacherRecipe
from compressor.reports.comparison_picture import comparison_picture, standalone_svg
from compressor.run_directory import RunDirectory, write_text_atomically
from compressor.schedules import num_steps_of
from compressor.teacher import Teacher
from compressor.training_workflow import load_teachers


@dataclass(frozen=True, kw_only=True)
class Work:
    """One run, and what is left to do for it."""

    planned: PlannedRun
    seconds: Mapping[str, float]
    """Estimated, by part; empty where all is finished."""


@dataclass(frozen=True, kw_only=True)
class PreparedComparison:
    """A comparison that is ready to begin: data, teachers and methods were tried."""

    plan: ComparisonPlan
    folder: ComparisonFolder
    materials: Materials
    passes: Mapping[str, Passes]
    """By label."""
    work: tuple[Work, ...]
    how: HowToRun

    @property
    def left_seconds(self) -> float:
        """Estimated, of everything."""
        return sum(sum(work.seconds.values()) for work in self.work)


def prepare_comparison(
    plan: ComparisonPlan, folder: ComparisonFolder, how: HowToRun
) -> PreparedComparison:
    """Read data and teachers, build every method once, and see what is finished.

    Nothing is written.

    Raises:
        RecipeError: naming every method that cannot be built with its teachers.
        CheckpointError: if a run folder belongs to another recipe or other files.
        RobustCompressError: if data or teachers cannot be used.
    """
    performance = resolve_performance(how.settings)
    recipe = plan.methods[0].recipe
    data = load_training_data(
        recipe.data,
        seed=recipe.seed,
        settings=how.settings,
        device=performance.device,
        download=how.download,
    )
    test = open_source(recipe.data, part="test", download=how.download)
    teachers = _load_all_teachers(plan, data, performance)
    _build_all_methods(plan, data, teachers)
    passes = {method.label: count_passes(method.recipe) for method in plan.methods}
    materials = Materials(
        training_sha256=data.train.content_sha256,
        test_sha256=test.content_sha256,
        class_names=data.train.class_names,
        images=_image_counts(plan, num_test=len(test.labels)),
        teacher_sha256={table.source: teacher.sha256 for table, teacher in teachers.items()},
    )
    by_source = {table.source: teacher for table, teacher in teachers.items()}
    speed = measure_passes(recipe, data, by_source, performance=performance)

    def estimated(planned: PlannedRun) -> Mapping[str, float]:
        seconds = measuring_seconds(planned.recipe, speed, images=materials.images)
        seconds["training"] = training_seconds(
            planned.recipe,
            passes[planned.label],
            speed,
            num_images=data.train.num_images,
            num_validation=data.validation.num_images,
        )
        parts = work_left(planned, folder, materials, retry=how.retry)
        return {part: seconds[part] for part in parts}

    work = tuple(Work(planned=planned, seconds=estimated(planned)) for planned in plan.runs)
    return PreparedComparison(
        plan=plan, folder=folder, materials=materials, passes=passes, work=work, how=how
    )


def compare(
    prepared: PreparedComparison,
    *,
    observe: Callable[[ComparisonProgress], None] = lambda _: None,
    on_run: Callable[[FinishedRun], None] = lambda _: None,
) -> ComparisonResult:
    """Run what is not finished, and write the tables after every run.

    Args:
        prepared: see `prepare_comparison`.
        observe: told several times a second.
        on_run: told of every run that is finished, also by an earlier call.

    Raises:
        InterruptedRunError: when a stop was wished for; what is finished is kept.
        RobustCompressError: of any other kind that is not one run's own failure.
    """
    folder = prepared.folder
    folder.make()
    finished: list[FinishedRun] = []
    clock = Clock([dict(work.seconds) for work in prepared.work], observe=observe)
    with RunDirectory(folder.path).locked():
        for work in prepared.work:
            watch = clock.begin_run(work.planned.name)
            run = complete_run(
                work.planned,
                folder,
                prepared.materials,
                how=prepared.how,
                observe=watch.training,
                watchers=MeasuringWatchers(part=watch.part, verification=watch.verification),
            )
            clock.end_run()
            finished.append(run)
            on_run(run)
            result = _write(prepared, finished)
    return result


def _write(prepared: PreparedComparison, finished: Sequence[FinishedRun]) -> ComparisonResult:
    """The JSON last: where it is, the others are too."""
    performance = resolve_performance(prepared.how.settings)
    result = summarise(
        prepared.plan,
        finished,
        passes=prepared.passes,
        images=prepared.materials.images,
        environment=describe_environment(performance),
    )
    folder, picture = prepared.folder, comparison_picture(result)
    write_text_atomically(folder.markdown, to_markdown(result))
    write_text_atomically(folder.csv, to_csv(result))
    write_text_atomically(folder.latex, to_latex(result))
    if picture is None:
        folder.picture.unlink(missing_ok=True)
    else:
        write_text_atomically(folder.picture, standalone_svg(picture))
    write_result(result, folder.result)
    return result


def _image_counts(plan: ComparisonPlan, *, num_test: int) -> ImageCounts:
    """Never more than there are."""
    wanted = plan.verification
    clean = num_test if wanted.clean_samples is None else min(wanted.clean_samples, num_test)
    return ImageCounts(
        clean=clean,
        white_box=min(wanted.samples, num_test),
        cascade=min(wanted.cascade_samples, num_test),
    )


def _load_all_teachers(
    plan: ComparisonPlan, data: TrainingData, performance: Performance
) -> dict[TeacherRecipe, Teacher]:
    """Each once, however many methods share it."""
    tables = tuple(
        dict.fromkeys(table for method in plan.methods for table in method.recipe.teachers)
    )
    recipe = plan.methods[0].recipe.model_copy(update={"teachers": tables})
    return dict(zip(tables, load_teachers(recipe, data, performance=performance), strict=True))


def _build_all_methods(
    plan: ComparisonPlan, data: TrainingData, teachers: Mapping[TeacherRecipe, Teacher]
) -> None:
    problems = []
    for method in plan.methods:
        recipe = method.recipe
        try:
            build_method(
                recipe.method,
                threat=recipe.threat.build(),
                teachers=[teachers[table] for table in recipe.teachers],
                num_steps=num_steps_of(recipe, num_images=data.train.num_images),
            )
        except RobustCompressError as error:
            problems.append(f"{method.label}: {error}")
    if problems:
        raise RecipeError("not comparable, so nothing was run:\n" + "\n".join(problems))
