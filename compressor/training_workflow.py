"""train: from a recipe to a finished run. What `distill` and `teacher train` call."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressor.architectures.build import find_architecture
from compressor.architectures.shared_batch_norm import share_batch_norm
from compressor.architectures.teacher_map import add_teacher_map, merge_teacher_map
from compressor.attacks.pgd import PGD
from compressor.checkpoint import TrainState, load_candidate, load_checkpoint
from compressor.compilation import batch_size_to_compile
from compressor.curves import write_curves
from compressor.data import Batch, TrainingData, evaluation_batches, load_training_data
from compressor.environment import describe_environment, settings_dict
from compressor.errors import DataError
from compressor.folding import EvaluationView
from compressor.image_sources import open_source
from compressor.interruption import StopWish
from compressor.methods.build import build_method
from compressor.metrics import Event, MetricsFile, Observer, TensorBoardFiles
from compressor.networks import Classifier, NetworkSpec, build_classifier, save_classifier
from compressor.performance import Performance, resolve_performance
from compressor.performance_settings import PerformanceSettings
from compressor.ranks import joined_ranks
from compressor.ranks_limits import refuse_on_ranks
from compressor.recipe import Recipe, resolved_dict
from compressor.run_directory import RunDirectory, read_facts, write_json_atomically
from compressor.run_facts import (
    as_it_began,
    refuse_changed_facts,
    refuse_other_recipe,
    run_facts,
    with_absolute_paths,
)
from compressor.schedules import num_steps_of
from compressor.student import Student
from compressor.teacher import Teacher
from compressor.teacher_check import TeacherCheck, check_teacher, refuse_unfit
from compressor.teachers import load_teacher
from compressor.trainer import Training, fit, trained_tensors
from compressor.weights import sha256_of_file

_TEACHER_CHECK_IMAGES = 512
_TEACHER_CHECK_BATCH = 64
_TEACHER_CHECK_STEPS = 5


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
    run = RunDirectory.open(request.out) if request.resume else RunDirectory.vacant(request.out)
    settings = as_it_began(run, request.settings) if request.resume else request.settings
    performance = resolve_performance(settings)
    with joined_ranks(performance.device, purpose="training") as ranks:
        performance = dataclasses.replace(performance, ranks=ranks)
        refuse_on_ranks(recipe, num_ranks=ranks.num_ranks)
        data = _load_data(recipe, settings, performance, download=request.download)
        performance = with_compilation(recipe, settings, performance, data)
        teachers = load_teachers(recipe, data, performance=performance)
        method = build_method(
            recipe.method,
            threat=recipe.threat.build(),
            teachers=teachers,
            num_steps=num_steps_of(recipe, num_images=data.train.num_images),
        )
        checks = check_teachers(teachers, recipe, data)
        for check in checks:
            on_teacher(check)
            if not request.accept_teachers:
                refuse_unfit(check)
        spec = network_spec(recipe, data)
        network = student_network(recipe, spec)
        if ranks.num_ranks > 1 and recipe.training.batch_norm == "whole_batch":
            share_batch_norm(network, ranks)
        student = Student(network, performance)
        facts = run_facts(recipe, data, checks, num_ranks=ranks.num_ranks)
        ranks.wait()  # until all have seen that the folder is vacant
        with _begun(run, recipe, request, facts=facts, performance=performance):
            training = Training(
                recipe=recipe,
                settings=settings,
                run=run,
                data=data,
                student=student,
                method=method,
                teachers=teachers,
                tensors=trained_tensors(student, recipe, method),
                observe=observe,
                resume_command=request.resume_command,
                stop=stop or StopWish(),
            )
            _fit_and_finish(training, spec, resume=request.resume)
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
            settings = {"settings": settings_dict(request.settings)}
            write_json_atomically(run.environment, describe_environment(performance) | settings)
            write_json_atomically(run.facts, facts)
        if is_first:
            resolved = resolved_dict(with_absolute_paths(recipe))
            write_json_atomically(run.resolved_recipe, resolved)
        yield


def _load_data(
    recipe: Recipe, settings: PerformanceSettings, performance: Performance, *, download: bool
) -> TrainingData:
    data = load_training_data(
        recipe.data,
        seed=recipe.seed,
        settings=settings,
        device=performance.device,
        download=download,
    )
    refuse_single_image_batches(recipe, data)
    _refuse_other_test_images(recipe, data, download=download)
    return data


def with_compilation(
    recipe: Recipe, settings: PerformanceSettings, performance: Performance, data: TrainingData
) -> Performance:
    """The same, and whether the networks of this run are compiled.

    Raises:
        DeviceError: if that was asked for and cannot be.
    """
    batch_size = batch_size_to_compile(
        settings,
        performance,
        batch_size=recipe.training.batch_size,
        num_steps=num_steps_of(recipe, num_images=data.train.num_images),
    )
    return dataclasses.replace(performance, compiled_batch_size=batch_size)


def network_spec(recipe: Recipe, data: TrainingData) -> NetworkSpec:
    """The network that the recipe asks for, for the images that there are."""
    return NetworkSpec(
        architecture=recipe.student.architecture,
        width=recipe.student.width,
        num_classes=len(data.train.class_names),
        image_shape=data.train.image_shape,
        mean=recipe.student.mean,
        std=recipe.student.std,
    )


def student_network(recipe: Recipe, spec: NetworkSpec) -> Classifier:
    """The network as it trains: with the layers that the method adds until training ends.

    Raises:
        RecipeError: if the method needs a network that ends in another way.
    """
    network = build_classifier(spec, seed=recipe.seed)
    if recipe.method.has_teacher_map:
        add_teacher_map(
            network,
            num_classes=spec.num_classes,
            num_teachers=len(recipe.teachers),
            seed=recipe.seed,
        )
    return network


def load_teachers(
    recipe: Recipe, data: TrainingData, *, performance: Performance
) -> tuple[Teacher, ...]:
    """All teachers of the recipe, on the device, in the fast form of their eval mode."""
    teachers = []
    for table in recipe.teachers:
        teacher = load_teacher(
            table, class_names=data.train.class_names, image_shape=data.train.image_shape
        )
        if teacher.network is not None:
            performance.place_network(teacher.network)
            view = EvaluationView(teacher.network, performance)
            teacher = dataclasses.replace(teacher, answer=view)
        teachers.append(teacher)
    return tuple(teachers)


def check_teachers(
    teachers: Sequence[Teacher], recipe: Recipe, data: TrainingData
) -> list[TeacherCheck]:
    """A short look at each teacher, on held-out images.

    Raises:
        TeacherError: if an answer is not finite.
    """
    attack = PGD(
        threat=recipe.threat.build(),
        step_size_pixels=recipe.threat.epsilon_pixels / 2,
        num_steps=_TEACHER_CHECK_STEPS,
    )
    return [check_teacher(t, _spread_batches(data), attack=attack) for t in teachers]


def _spread_batches(data: TrainingData) -> Iterator[Batch]:
    """Held-out images spread evenly over the split, which may be sorted by class."""
    stride = -(-data.validation.num_images // _TEACHER_CHECK_IMAGES)
    for batch in evaluation_batches(data.validation, batch_size=stride * _TEACHER_CHECK_BATCH):
        yield Batch(
            x_NCHW=batch.x_NCHW[::stride],
            y_N=batch.y_N[::stride],
            index_N=batch.index_N[::stride],
            keys_N=batch.keys_N[::stride],
        )


def _fit_and_finish(training: Training, spec: NetworkSpec, *, resume: bool) -> None:
    run, recipe, method = training.run, training.recipe, training.method
    state = TrainState(step=0, epoch=0, batch_in_epoch=0, method_state=method.initial_state())
    if resume and run.checkpoint_steps():
        state = load_checkpoint(
            run,
            training.tensors,
            recipe_id=recipe.recipe_id,
            restore_method_state=method.restore_state,
        )
    if not training.ranks.is_first:
        fit(dataclasses.replace(training, observe=lambda _: None), state)
        return
    with writing_metrics(training, state) as observed:
        state = fit(observed, state)
    write_curves(run, title=recipe.name)
    if state.best is None:
        raise AssertionError("the last epoch is always validated")
    network = student_network(recipe, spec)
    network.load_state_dict(load_candidate(run, state.best))
    merge_teacher_map(network)
    metadata = {"recipe_id": recipe.recipe_id, "class_names": training.data.train.class_names}
    save_classifier(run.model, network, spec, metadata)
    facts = read_facts(run) | {"model_sha256": sha256_of_file(run.model)}
    write_json_atomically(run.facts, facts)


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


def refuse_single_image_batches(recipe: Recipe, data: TrainingData) -> None:
    """BatchNorm in train mode cannot normalise over one value.

    Raises:
        DataError: if the last batch of an epoch would be of one image, or the first not full.
    """
    num_images, batch_size = data.train.num_images, recipe.training.batch_size
    if num_images < batch_size:
        raise DataError(
            f"{num_images} training images are fewer than training.batch_size = {batch_size}; "
            "set a smaller training.batch_size"
        )
    if num_images % batch_size == 1:
        better = next(
            size for size in range(batch_size + 1, num_images + 1) if num_images % size != 1
        )
        raise DataError(
            f"{num_images} training images in batches of {batch_size} leave a last batch of one, "
            f"which BatchNorm cannot train on; set training.batch_size = {better}"
        )


def _refuse_other_test_images(recipe: Recipe, data: TrainingData, *, download: bool) -> None:
    """Classes and size of the test images, before hours are spent; their pixels stay unseen."""
    test = open_source(recipe.data, part="test", download=download)
    train = data.train
    if (test.class_names, test.image_shape) != (train.class_names, train.image_shape):
        raise DataError(
            f"the test images have {len(test.class_names)} classes and shape {test.image_shape}, "
            f"those of training {len(train.class_names)} and {train.image_shape}; set "
            "data.image_size and data.num_channels to convert all images"
        )
