"""One run of a comparison: trained, or found finished; measured, or found measured."""

import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from compressor import __version__
from compressor.comparison.folder import ComparisonFolder
from compressor.comparison.measuring import (
    ImageCounts,
    Measured,
    MeasuringWatchers,
    find_measured,
    measure,
)
from compressor.comparison.planned import PlannedRun
from compressor.comparison.training_record import TrainingRecord, find_record, write_record
from compressor.errors import (
    CheckpointError,
    InterruptedRunError,
    InvalidEvaluationError,
    NonFiniteLossError,
    RunError,
    TeacherError,
)
from compressor.interruption import StopWish
from compressor.metrics import Observer
from compressor.networks import load_trained
from compressor.performance_settings import PerformanceSettings
from compressor.run_directory import RunDirectory, read_facts, read_json, write_json_atomically
from compressor.run_facts import refuse_changed_facts, refuse_other_recipe
from compressor.training_workflow import TrainingRequest, train


@dataclass(frozen=True, kw_only=True)
class Materials:
    """What all runs are made from and measured on, by content."""

    training_sha256: str
    test_sha256: str
    class_names: tuple[str, ...]
    images: ImageCounts
    teacher_sha256: Mapping[str, str]
    """By the source in the recipe."""


@dataclass(frozen=True, kw_only=True)
class HowToRun:
    """What may change between two calls that go on with one comparison."""

    settings: PerformanceSettings
    command: str
    """To type after an interruption."""
    signals: Callable[[], AbstractContextManager[StopWish]]
    """Watches for signals while a run trains."""
    download: bool = False
    accept_teachers: bool = False
    """Begin with a teacher that fails its check."""
    retry: bool = False
    """Try again what failed."""


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """One method with one seed: what it came to."""

    planned: PlannedRun
    record: TrainingRecord | None
    """None: it has no weights, or no numbers."""
    measured: Measured
    failure: str | None = None
    """Why there are none."""


def find_training(
    planned: PlannedRun, folder: ComparisonFolder, materials: Materials
) -> RunDirectory | None:
    """The finished run of this recipe on these data with these teachers; None: not finished.

    Raises:
        CheckpointError: if the folder holds a run of another recipe, or of other files.
        ArtefactMismatchError: if its weights are not those that training wrote.
    """
    run = RunDirectory(folder.run(planned.name))
    if not run.resolved_recipe.is_file():
        return None
    try:
        refuse_other_recipe(run, planned.recipe)
    except CheckpointError:
        raise CheckpointError(
            f"{run.path} is of another recipe; choose another folder with --out, or remove it"
        ) from None
    facts = read_facts(run)
    try:
        refuse_changed_facts(run, facts | _expected(planned, materials))
    except CheckpointError as error:
        raise CheckpointError(f"{error}, or choose another folder with --out") from None
    if "model_sha256" not in facts or not run.model.is_file():
        return None
    load_trained(run)
    return run


def find_failure(planned: PlannedRun, folder: ComparisonFolder, materials: Materials) -> str | None:
    """Why an earlier call could not finish this very run; what it was made from may be mended."""
    try:
        found = read_json(folder.failure(planned.name))
    except RunError:
        return None
    causes = _causes(planned, materials)
    if not isinstance(found, dict) or {key: found.get(key) for key in causes} != causes:
        return None
    return str(found.get("message"))


def work_left(
    planned: PlannedRun, folder: ComparisonFolder, materials: Materials, *, retry: bool
) -> list[str]:
    """The parts of this run that are yet to be done: `training`, `clean`, ...

    Raises:
        RobustCompressError: if its folder belongs to something else.
    """
    if find_failure(planned, folder, materials) is not None and not retry:
        return []
    known = _find(planned, folder, materials)
    missing = known.measured.lacks(materials.images)
    return ["training", *missing] if missing and known.run is None else missing


def complete_run(
    planned: PlannedRun,
    folder: ComparisonFolder,
    materials: Materials,
    *,
    how: HowToRun,
    observe: Observer = lambda _: None,
    watchers: MeasuringWatchers,
) -> FinishedRun:
    """Train and measure what is not there yet.

    A loss or a teacher's answer that is not finite and an attack that cheats are results: they are
    kept, and do not stop the other runs.

    Raises:
        RobustCompressError: of any other kind; what is finished is kept.
    """
    failure, place = find_failure(planned, folder, materials), folder.failure(planned.name)
    if failure is not None and not how.retry:
        return FinishedRun(planned=planned, record=None, measured=Measured(), failure=failure)
    try:
        known = _find(planned, folder, materials)
        if known.run is None and known.measured.lacks(materials.images):
            watchers.part("training")
            _train(planned, folder, how=how, observe=observe)
            known = _find(planned, folder, materials)
        measured = known.measured
        if known.run is not None:
            measured = measure(
                known.run,
                folder,
                measured,
                images=materials.images,
                data=planned.recipe.data,
                test_sha256=materials.test_sha256,
                settings=how.settings,
                watchers=watchers,
            )
    except (NonFiniteLossError, TeacherError, InvalidEvaluationError) as error:
        failure = re.split(r"; |\. (?=[A-Z])", str(error))[0]  # then come advice and folders
        write_json_atomically(place, _causes(planned, materials) | {"message": failure})
        return FinishedRun(planned=planned, record=None, measured=Measured(), failure=failure)
    if known.record is not None:
        write_record(folder.training(planned.name), known.record)
    place.unlink(missing_ok=True)
    return FinishedRun(planned=planned, record=known.record, measured=measured)


@dataclass(frozen=True, kw_only=True)
class _Known:
    """What earlier calls have left of one run."""

    run: RunDirectory | None
    """None: its weights are gone, or never were."""
    record: TrainingRecord | None
    measured: Measured


def _find(planned: PlannedRun, folder: ComparisonFolder, materials: Materials) -> _Known:
    run = find_training(planned, folder, materials)
    record = _find_record(planned, folder, materials, run=run)
    if record is None:
        return _Known(run=run, record=None, measured=Measured())
    measured = find_measured(
        planned.name,
        folder,
        record,
        threat=planned.recipe.threat.build(),
        images=materials.images,
        test_sha256=materials.test_sha256,
    )
    return _Known(run=run, record=record, measured=measured)


def _find_record(
    planned: PlannedRun, folder: ComparisonFolder, materials: Materials, *, run: RunDirectory | None
) -> TrainingRecord | None:
    """The kept one first: of the run itself a part may have been removed since.

    What an earlier version did not keep is added, where the run still knows it.
    """
    place = folder.training(planned.name)
    kept = find_record(place)
    if run is not None:
        if kept is None or kept.model_sha256 != read_facts(run)["model_sha256"]:
            return TrainingRecord.of(run)
        return kept.completed_from(run)
    if kept is None:
        return None
    if kept.recipe_id != planned.recipe.recipe_id:
        what = "another recipe"
    elif kept.made_from != _expected(planned, materials):
        what = "other training images or teachers"
    else:
        return kept
    raise CheckpointError(
        f"{place} is of {what}; choose another folder with --out, or remove its folder"
    )


def _train(
    planned: PlannedRun, folder: ComparisonFolder, *, how: HowToRun, observe: Observer
) -> RunDirectory:
    path = folder.run(planned.name)
    request = TrainingRequest(
        out=path,
        settings=how.settings,
        resume=RunDirectory(path).resolved_recipe.is_file(),
        resume_command=how.command,
        download=how.download,
        accept_teachers=True,  # they were looked at before the first run began
    )
    with how.signals() as stop:
        try:
            return train(planned.recipe, request, observe=observe, stop=stop)
        except InterruptedRunError as error:
            raise type(error)(f"{planned.name}: {error}") from None


def _causes(planned: PlannedRun, materials: Materials) -> dict[str, Any]:
    """All that a failure may come from."""
    return {
        "recipe_id": planned.recipe.recipe_id,
        "version": __version__,
        "test_content_sha256": materials.test_sha256,
        "materials": _expected(planned, materials),
    }


def _expected(planned: PlannedRun, materials: Materials) -> dict[str, Any]:
    """The facts of a run that depend on files; which images are held out is in the recipe."""
    teachers = [
        {"role": table.role, "sha256": materials.teacher_sha256[table.source]}
        for table in planned.recipe.teachers
    ]
    return {
        "training_content_sha256": materials.training_sha256,
        "class_names": list(materials.class_names),
        "teachers": teachers,
    }
