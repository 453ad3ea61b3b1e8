"""How long runs will take: passes per image times what a pass takes on this machine."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from compressor.attacks.gradients import input_gradient
from compressor.attacks.stages import build_stages
from compressor.comparison.measurements import CASCADE, WHITE_BOX
from compressor.comparison.measuring import ImageCounts
from compressor.comparison.passes import Passes
from compressor.data import TrainingData
from compressor.losses import cross_entropy
from compressor.networks import build_classifier
from compressor.performance import Performance
from compressor.recipe import Recipe
from compressor.student import Student
from compressor.teacher import Teacher
from compressor.training_preparation import network_spec

_BATCH_SIZE = 64
_STANDING_SHARE = 0.5
"""Of the images, against which every attack of the cascade has to run to its end; a guess."""
_ENDS_ON_ALL = "apgd_ce"
"""The attack of the cascade that meets all images."""


@dataclass(frozen=True, kw_only=True)
class PassSeconds:
    """What one image costs in one pass, measured once; another load of the machine changes it."""

    student_forward: float
    student_backward: float
    teacher_forward: Mapping[str, float]
    """By the source in the recipe."""


def measure_passes(
    recipe: Recipe,
    data: TrainingData,
    teachers: Mapping[str, Teacher],
    *,
    performance: Performance,
) -> PassSeconds:
    """Time the student of `recipe` and every teacher on one batch; the best of two."""
    network = build_classifier(network_spec(recipe, data), seed=0)
    view = Student(network, performance).evaluation_view()
    shape = (_BATCH_SIZE, *data.train.image_shape)
    x_NCHW = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(performance.device)
    x_NCHW = x_NCHW.contiguous(memory_format=torch.channels_last)
    y_N = torch.zeros(_BATCH_SIZE, dtype=torch.int64, device=performance.device)

    def ask(model: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        def asking() -> object:
            with torch.no_grad():
                return model(x_NCHW)

        return asking

    forward = _seconds_per_image(ask(view), performance)
    both = _seconds_per_image(
        lambda: input_gradient(view, x_NCHW, y_N, objective=cross_entropy), performance
    )
    return PassSeconds(
        student_forward=forward,
        student_backward=max(both - forward, forward),
        teacher_forward={
            source: _seconds_per_image(ask(teacher.logits), performance)
            for source, teacher in teachers.items()
        },
    )


def training_seconds(
    recipe: Recipe, passes: Passes, seconds: PassSeconds, *, num_images: int, num_validation: int
) -> float:
    """All steps and all validations of one run; a teacher's way back takes twice its way there."""
    teachers = [seconds.teacher_forward[table.source] for table in recipe.teachers]
    teacher = sum(teachers) / len(teachers) if teachers else 0.0
    per_image = (
        passes.student_forwards * seconds.student_forward
        + passes.student_backwards * seconds.student_backward
        + (passes.teacher_forwards + 2 * passes.teacher_backwards) * teacher
    )
    selection, epochs = recipe.selection, recipe.training.epochs
    num_validated = 1 + ceil(epochs * (1 - selection.from_fraction)) // selection.every_epochs
    both = seconds.student_forward + seconds.student_backward
    validation = num_validated * num_validation * selection.num_steps * both
    candidates = 1 if recipe.training.ema_decay is None else 2
    return epochs * num_images * per_image + candidates * validation


def measuring_seconds(
    recipe: Recipe, seconds: PassSeconds, *, images: ImageCounts
) -> dict[str, float]:
    """By part; of the cascade as if half of the images stood to the end."""
    threat = recipe.threat.build()

    def attacked(names: Sequence[str], num_images: int) -> float:
        total = 0.0
        for stage in build_stages(names, threat=threat, mode="fast", batch_size=_BATCH_SIZE):
            meets_all = stage.tries_all or stage.name == _ENDS_ON_ALL
            share = 1.0 if meets_all else _STANDING_SHARE
            forwards = stage.max_forwards * seconds.student_forward
            total += share * (forwards + stage.max_backwards * seconds.student_backward)
        return num_images * total

    return {
        "clean": images.clean * seconds.student_forward,
        "white_box": attacked(WHITE_BOX, images.white_box),
        "cascade": attacked(CASCADE, images.cascade),
    }


def _seconds_per_image(call: Callable[[], object], performance: Performance) -> float:
    best = float("inf")
    for _ in range(3):  # the first one warms up
        started_at_seconds = time.perf_counter()
        call()
        if performance.device.type == "cuda":
            torch.cuda.synchronize(performance.device)
        best = min(best, time.perf_counter() - started_at_seconds)
    return best / _BATCH_SIZE
