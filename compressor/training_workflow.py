"""train: from a recipe to a finished run. What `distill` and `teacher train` call."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressor.architectures.build import find_architecture
from compressor.architectures.teacher_map import merge_teacher_map
from compressor.checkpoint import TrainState, load_candidate, load_checkpoint
from compressor.environment import describe_environment, settings_dict
from compressor.errors import RunError
from compressor.interruption import StopWish
from compressor.metrics import Event, MetricsFile, Observer, TensorBoardFiles
from compressor.networks import save_classifier
from compressor.performance import Performance, resolve_performance
from compressor.performance_settings import PerformanceSettings
from compressor.ranks import joined_ranks, launch_of_environment
from compressor.recipe import Recipe, resolved_dict
from compressor.run_directory import RunDirectory, read_facts, write_json_atomically
from compressor.run_facts import (
    as_it_began,
    is_of_this_launch,
    refuse_changed_facts,
    refuse_other_recipe,
    run_facts,
    with_absolute_paths,
)
from compressor.teacher_check import TeacherCheck, refuse_unfit
from compressor.trainer import fit
from compressor.training_preparation import (
    check_teachers,
    network_spec,
    prepare_training,
    student_network,
)
from compressor.training_step import Training
from compressor.weights import sha256_of_file, sha256_of_tensors


@dataclass(frozen=True, kw_only=True)
class TrainingRequest:
    """What `train` needs besides the recipe."""

    out: Path
    settings: PerformanceSettings = PerformanceSettings()
    resume: bool = False
    resume_command: str = "robust-compress distill RUN --resume"
    download: bool = False
    accept_teachers: bool = False
    """Go on with a teacher that fails its check."""


def train(
    recipe: Recipe,
    request: TrainingRequest,
    *,
    observe: Observer = lambda _: None,
    on_teacher: Callable[[TeacherCheck], None] = lambda _: None,
    stop: StopWish | None = None,
) -> RunDirectory:
    """Train what the recipe says into a run folder, or continue a run that was interrupted.

    Data and teachers are checked before anything is written.

    Raises:
        RobustCompressError: of the kind that fits; nothing existing is ever overwritten.
    """
    find_architecture(recipe.student.architecture)
    if is_of_this_launch(RunDirectory(request.out)):  # a process was killed, and all began again
        request = dataclasses.replace(request, resume=True)
    run = RunDirectory.open(request.out) if request.resume else RunDirectory.vacant(request.out)
    settings = as_it_began(run, request.settings) if request.resume else request.settings
    performance = resolve_performance(settings)
    with joined_ranks(performance.device, purpose="training") as ranks:
        performance = dataclasses.replace(performance, ranks=ranks)
        training = prepare_training(
            recipe, settings, performance, run=run, download=request.download
        )
        checks = check_teachers(training.teachers, recipe, training.data)
        for check in checks:
            on_teacher(check)
            if not request.accept_teachers:
                refuse_unfit(check)
        training = dataclasses.replace(
            training,
            observe=observe,
            resume_command=request.resume_command,
            stop=stop or StopWish(),
        )
        facts = run_facts(recipe, training.data, checks, num_ranks=ranks.num_ranks)
        ranks.wait()  # until all have seen that the folder is vacant
        performance = training.student.performance
        with _begun(run, recipe, request, facts=facts, performance=performance):
            _fit_and_finish(training, resume=request.resume)
            ranks.wait()
    return run


@contextmanager
def _begun(
    run: RunDirectory,
    recipe: Recipe,
    request: TrainingRequest,
    *,
    facts: dict[str, Any],
    performance: Performance,
) -> Iterator[None]:
    """Hold the folder of a run, which says what the run is; the first of the ranks does."""
    is_first = performance.ranks.is_first
    if is_first:
        run.make()
    with run.locked() if is_first else nullcontext():
        if request.resume:
            refuse_other_recipe(run, recipe)
            refuse_changed_facts(run, facts)
        elif is_first:
            RunDirectory.vacant(run.path)  # another process may have been faster
            asked = {"settings": settings_dict(request.settings), "launch": launch_of_environment()}
            write_json_atomically(run.environment, describe_environment(performance) | asked)
            write_json_atomically(run.facts, facts)
        if is_first:
            resolved = resolved_dict(with_absolute_paths(recipe))
            write_json_atomically(run.resolved_recipe, resolved)
        yield


def _fit_and_finish(training: Training, *, resume: bool) -> None:
    run, recipe, method = training.run, training.recipe, training.method
    state = TrainState(step=0, epoch=0, batch_in_epoch=0, method_state=method.initial_state())
    newest = training.ranks.gather(run.checkpoint_steps()[-1:])[0]
    if resume and newest:
        state = load_checkpoint(
            run,
            training.tensors,
            recipe_id=recipe.recipe_id,
            restore_method_state=method.restore_state,
            step=newest[0],
        )
    refuse_unlike_beginnings(training, state)
    if not training.ranks.is_first:
        fit(dataclasses.replace(training, observe=lambda _: None), state)
        return
    with writing_metrics(training, state) as observed:
        state = fit(observed, state)
    from compressor.curves import write_curves  # here, as of several processes one draws

    write_curves(run, title=recipe.name)
    if state.best is None:
        raise AssertionError("the last epoch is always validated")
    spec = network_spec(recipe, training.data)
    network = student_network(recipe, spec)
    network.load_state_dict(load_candidate(run, state.best))
    merge_teacher_map(network)
    metadata = {"recipe_id": recipe.recipe_id, "class_names": training.data.train.class_names}
    save_classifier(run.model, network, spec, metadata)
    facts = read_facts(run) | {"model_sha256": sha256_of_file(run.model)}
    write_json_atomically(run.facts, facts)


def refuse_unlike_beginnings(training: Training, state: TrainState) -> None:
    """They would train different networks and add up their gradients, and nobody would see it.

    Raises:
        RunError: if the ranks do not all begin after the same step with the same weights.
    """
    if training.ranks.num_ranks == 1:
        return
    weights_sha256 = sha256_of_tensors(training.student.network.state_dict())
    found = training.ranks.gather((state.step, weights_sha256))
    unlike = [rank for rank, other in enumerate(found) if other != found[0]]
    if unlike:
        raise RunError(
            f"process {unlike[0]} would begin with other weights (step {found[unlike[0]][0]}) than "
            f"the first one (step {found[0][0]}); check that all of them have the same software "
            "and see the same files, then go on with --resume"
        )


@contextmanager
def writing_metrics(training: Training, state: TrainState) -> Iterator[Training]:
    """The same training, its events also written to the files of its run."""
    metrics = MetricsFile(training.run, step=state.step, epoch=state.epoch)
    tensorboard = TensorBoardFiles(training.run, step=state.step)

    def observe(event: Event) -> None:
        metrics(event)
        tensorboard(event)
        training.observe(event)

    with closing(metrics), closing(tensorboard):
        yield dataclasses.replace(training, observe=observe)
