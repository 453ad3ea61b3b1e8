"""From a recipe to what a run needs before its first step: data, teachers, method, student."""

import dataclasses
from collections.abc import Iterator, Sequence

from compressor.architectures.shared_batch_norm import share_batch_norm
from compressor.architectures.teacher_map import add_teacher_map
from compressor.attacks.pgd import PGD
from compressor.compilation import batch_size_to_compile
from compressor.data import Batch, TrainingData, evaluation_batches, load_training_data
from compressor.errors import DataError
from compressor.folding import EvaluationView
from compressor.image_sources import open_source
from compressor.methods.build import build_method
from compressor.networks import Classifier, NetworkSpec, build_classifier
from compressor.performance import Performance
from compressor.performance_settings import PerformanceSettings
from compressor.ranks_limits import refuse_on_ranks
from compressor.recipe import Recipe
from compressor.run_directory import RunDirectory
from compressor.schedules import num_steps_of
from compressor.student import Student
from compressor.teacher import Teacher
from compressor.teacher_check import TeacherCheck, check_teacher
from compressor.teachers import load_teacher
from compressor.training_step import Training, trained_tensors

_TEACHER_CHECK_IMAGES = 512
_TEACHER_CHECK_BATCH = 64
_TEACHER_CHECK_STEPS = 5


def prepare_training(
    recipe: Recipe,
    settings: PerformanceSettings,
    performance: Performance,
    *,
    run: RunDirectory,
    download: bool = False,
) -> Training:
    """Data, teachers, method and student of a run, before its first step; nobody watches it.

    Raises:
        RobustCompressError: of the kind that fits, if one of them is not usable.
    """
    ranks = performance.ranks
    refuse_on_ranks(recipe, num_ranks=ranks.num_ranks)
    data = _load_data(recipe, settings, performance, download=download)
    performance = _with_compilation(recipe, settings, performance, data)
    teachers = load_teachers(recipe, data, performance=performance)
    method = build_method(
        recipe.method,
        threat=recipe.threat.build(),
        teachers=teachers,
        num_steps=num_steps_of(recipe, num_images=data.train.num_images),
    )
    network = student_network(recipe, network_spec(recipe, data))
    if ranks.num_ranks > 1 and recipe.training.batch_norm == "whole_batch":
        share_batch_norm(network, ranks)
    student = Student(network, performance)
    return Training(
        recipe=recipe,
        settings=settings,
        run=run,
        data=data,
        student=student,
        method=method,
        teachers=teachers,
        tensors=trained_tensors(student, recipe, method),
        observe=lambda _: None,
        resume_command="",
    )


def _load_data(
    recipe: Recipe, settings: PerformanceSettings, performance: Performance, *, download: bool
) -> TrainingData:
    data = load_training_data(
        recipe.data,
        seed=recipe.seed,
        settings=settings,
        device=performance.device,
        download=download,
        ranks=performance.ranks,
    )
    refuse_small_batches(recipe, data, num_ranks=performance.ranks.num_ranks)
    _refuse_other_test_images(recipe, data, download=download)
    return data


def _with_compilation(
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


def refuse_small_batches(recipe: Recipe, data: TrainingData, *, num_ranks: int) -> None:
    """BatchNorm in train mode cannot normalise over one value.

    Raises:
        DataError: if the last batch of an epoch would be of one image, or the first not full; or
            if one of `num_ranks` would have fewer than two where each normalises by its own.
    """
    num_images, batch_size = data.train.num_images, recipe.training.batch_size
    if num_images < batch_size:
        raise DataError(
            f"{num_images} training images are fewer than training.batch_size = {batch_size}; "
            "set a smaller training.batch_size"
        )
    by_own = recipe.training.batch_norm == "own_images"
    fewest = 2 * num_ranks if by_own else 2

    def fits(size: int) -> bool:
        return size >= fewest and (num_images % size == 0 or num_images % size >= fewest)

    if not fits(batch_size):
        better = next((n for n in range(batch_size + 1, num_images + 1) if fits(n)), num_images)
        shared = f" for {num_ranks} processes, each by its own images" if fewest > 2 else ""
        raise DataError(
            f"{num_images} training images in batches of {batch_size} leave a last batch of "
            f"{num_images % batch_size or batch_size}{shared}, which BatchNorm cannot train on; "
            f"set training.batch_size = {better}"
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
