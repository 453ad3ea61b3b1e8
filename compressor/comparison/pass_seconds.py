"""What one image costs in one pass through each network, on this machine."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compressor.attacks.gradients import input_gradient
from compressor.comparison.folder import ComparisonFolder
from compressor.comparison.planned import PlannedMethod
from compressor.comparison.result import PassSecondsRow, read_result
from compressor.data import TrainingData
from compressor.errors import RunError
from compressor.losses import cross_entropy
from compressor.networks import build_classifier
from compressor.performance import Performance
from compressor.recipe import Recipe
from compressor.student import Student
from compressor.teacher import Teacher
from compressor.training_preparation import network_spec

_BATCH_SIZE = 64
_NUM_ROUNDS = 4
"""The first warms up."""
_SAME_MACHINE = ("processor", "device", "number_format", "is_compiled", "num_threads", "torch")


@dataclass(frozen=True, kw_only=True)
class PassSeconds:
    """What one image costs in one pass, measured once; another load of the machine changes it."""

    student_forward: float
    student_backward: float
    teacher_forward: Mapping[str, float]
    """By the source in the recipe."""

    def of(self, recipe: Recipe, *, num_images: int) -> PassSecondsRow:
        """For one method, whose teachers are asked equally often; see `PassSecondsRow`."""
        teachers = [self.teacher_forward[table.source] for table in recipe.teachers]
        return PassSecondsRow(
            student_forward=self.student_forward,
            student_backward=self.student_backward,
            teacher_forward=sum(teachers) / len(teachers) if teachers else 0.0,
            num_images=num_images,
        )


def measure_passes(
    recipe: Recipe,
    data: TrainingData,
    teachers: Mapping[str, Teacher],
    *,
    performance: Performance,
) -> PassSeconds:
    """Time the student of `recipe` and every teacher on one batch, in turn; each its best round.

    In turn, so that a machine that slows down slows all of them.
    """
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

    def there_and_back() -> object:
        return input_gradient(view, x_NCHW, y_N, objective=cross_entropy)

    calls = [ask(view), there_and_back, *(ask(teacher.logits) for teacher in teachers.values())]
    forward, both, *others = _seconds_per_image(calls, performance)
    return PassSeconds(
        student_forward=forward,
        student_backward=max(both - forward, forward),
        teacher_forward=dict(zip(teachers, others, strict=True)),
    )


def find_pass_seconds(
    folder: ComparisonFolder, methods: Sequence[PlannedMethod], environment: Mapping[str, Any]
) -> dict[str, PassSecondsRow] | None:
    """What the result of an earlier call has, by label, if it has all of it from this machine.

    Or the tables of a call that has nothing left to do would change.
    """
    try:
        earlier = read_result(folder.result)
    except RunError:
        return None
    if any(earlier.environment.get(key) != environment.get(key) for key in _SAME_MACHINE):
        return None
    rows = {row.runs[0].recipe_id: row.pass_seconds for row in earlier.methods}
    found = {method.label: rows.get(method.recipe.recipe_id) for method in methods}
    known = {label: row for label, row in found.items() if row is not None}
    return known if len(known) == len(methods) else None


def _seconds_per_image(
    calls: Sequence[Callable[[], object]], performance: Performance
) -> list[float]:
    best = [float("inf")] * len(calls)
    for number in range(_NUM_ROUNDS):
        for place, call in enumerate(calls):
            started_at_seconds = time.perf_counter()
            call()
            if performance.device.type == "cuda":
                torch.cuda.synchronize(performance.device)
            if number > 0:
                best[place] = min(best[place], time.perf_counter() - started_at_seconds)
    return [seconds / _BATCH_SIZE for seconds in best]
