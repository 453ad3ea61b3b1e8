"""compare: methods under one protocol, from a plan to tables."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from compressor.comparison.estimate import measuring_seconds, training_seconds
from compressor.comparison.folder import ComparisonFolder
from compressor.comparison.measuring import ImageCounts, MeasuringWatchers
from compressor.comparison.pass_seconds import PassSeconds, find_pass_seconds, measure_passes
from compressor.comparison.passes import Passes, count_passes
from compressor.comparison.plan import ComparisonPlan
from compressor.comparison.planned import PlannedRun
from compressor.comparison.progress import Clock, ComparisonProgress
from compressor.comparison.result import ComparisonResult, PassSecondsRow, write_result
from compressor.comparison.runs import (
    FinishedRun,
    HowToRun,
    Materials,
    complete_run,
    find_failure,
    work_left,
)
from compressor.comparison.summary import summarise
from compressor.comparison.tables import to_csv, to_latex, to_markdown
from compressor.data import TrainingData, load_training_data
from compressor.environment import describe_environment
from compressor.errors import RecipeError, RobustCompressError, TeacherError
from compressor.image_sources import open_source
from compressor.methods.build import build_method
from compressor.performance import Performance, resolve_performance
from compressor.recipe import Recipe, TeacherRecipe
from compressor.reports.comparison_picture import comparison_picture
from compressor.reports.svg import standalone_svg
from compressor.run_directory import RunDirectory, write_text_atomically
from compressor.schedules import num_steps_of
from compressor.teacher import Teacher
from compressor.teacher_check import refuse_unfit
from compressor.training_preparation import (
    check_teachers,
    load_teachers,
    refuse_small_batches,
)


@dataclass(frozen=True, kw_only=True)
class Work:
    """One run, and what is left to do for it."""

    planned: PlannedRun
    seconds: Mapping[str, float]
    """Estimated, by part; empty where nothing is left."""
    failure: str | None
    """Why an earlier call came to nothing; it is not tried again."""


@dataclass(frozen=True, kw_only=True)
class PreparedComparison:
    """A comparison that is ready to begin: data, teachers and methods were tried."""

    plan: ComparisonPlan
    folder: ComparisonFolder
    materials: Materials
    passes: Mapping[str, Passes]
    """By label."""
    pass_seconds: Mapping[str, PassSecondsRow]
    """By label, as the result gives them."""
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
        RecipeError: naming every method that cannot be built with its teachers, and every teacher
            that is unfit.
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
    for method in plan.methods:
        refuse_small_batches(method.recipe, data, num_ranks=1)
    test = open_source(recipe.data, part="test", download=how.download)
    teachers = _load_all_teachers(plan, data, performance)
    materials = Materials(
        training_sha256=data.train.content_sha256,
        test_sha256=test.content_sha256,
        class_names=data.train.class_names,
        images=_image_counts(plan, num_test=len(test.labels)),
        teacher_sha256={table.source: teacher.sha256 for table, teacher in teachers.items()},
    )
    left = {run.name: work_left(run, folder, materials, retry=how.retry) for run in plan.runs}
    to_train = [run.recipe for run in plan.runs if "training" in left[run.name]]
    unfit = _unfit_teachers(to_train, data, teachers)
    unbuildable = _unbuildable_methods(plan, data, teachers)
    if problems := unbuildable + ([] if how.accept_teachers else unfit):
        raise RecipeError("not comparable, so nothing was run:\n" + "\n".join(problems))
    passes = {method.label: count_passes(method.recipe) for method in plan.methods}
    by_source = {table.source: teacher for table, teacher in teachers.items()}
    speed = measure_passes(recipe, data, by_source, performance=performance)
    kept = find_pass_seconds(folder, plan.methods, describe_environment(performance))
    num_images = data.train.num_images
    now = {m.label: speed.of(m.recipe, num_images=num_images) for m in plan.methods}
    work = []
    for run in plan.runs:
        seconds = _seconds_of(run, passes[run.label], speed, data=data, images=materials.images)
        parts = {part: seconds[part] for part in left[run.name]}
        failure = None if how.retry else find_failure(run, folder, materials)
        work.append(Work(planned=run, seconds=parts, failure=failure))
    return PreparedComparison(
        plan=plan,
        folder=folder,
        materials=materials,
        passes=passes,
        pass_seconds=kept or now,
        work=tuple(work),
        how=how,
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
        pass_seconds=prepared.pass_seconds,
        images=prepared.materials.images,
        environment=describe_environment(performance),
        also_measured=prepared.folder.measured(),
    )
    folder, picture = prepared.folder, comparison_picture(result)
    page = to_markdown(result, picture, picture_name=folder.picture.name)
    write_text_atomically(folder.markdown, page)
    write_text_atomically(folder.csv, to_csv(result))
    write_text_atomically(folder.latex, to_latex(result))
    if picture is None:
        folder.picture.unlink(missing_ok=True)
    else:
        write_text_atomically(folder.picture, standalone_svg(picture))
    write_result(result, folder.result)
    return result


def _seconds_of(
    run: PlannedRun, passes: Passes, speed: PassSeconds, *, data: TrainingData, images: ImageCounts
) -> dict[str, float]:
    """Estimated, by part, were nothing done yet."""
    training = training_seconds(
        run.recipe,
        passes,
        speed,
        num_images=data.train.num_images,
        num_validation=data.validation.num_images,
    )
    return {"training": training, **measuring_seconds(run.recipe, speed, images=images)}


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


def _unbuildable_methods(
    plan: ComparisonPlan, data: TrainingData, teachers: Mapping[TeacherRecipe, Teacher]
) -> list[str]:
    """What each method says that cannot be built with its teachers."""
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
    return problems


def _unfit_teachers(
    recipes: Sequence[Recipe], data: TrainingData, teachers: Mapping[TeacherRecipe, Teacher]
) -> list[str]:
    """What is wrong with the teachers of these recipes, whose data and threat are the same."""
    tables = dict.fromkeys(table for recipe in recipes for table in recipe.teachers)
    problems = []
    for check in check_teachers([teachers[t] for t in tables], recipes[0], data) if tables else ():
        try:
            refuse_unfit(check)
        except TeacherError as error:
            problems.append(str(error))
    return problems
