"""What to say when a loss is not a finite number: whose fault it is, and what to do."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from compressor.data import Batch
from compressor.errors import NonFiniteLossError, RobustCompressError, TeacherError
from compressor.ranks import Ranks
from compressor.teacher import Teacher

_NUM_SHOWN = 16


def explain_loss(
    values: Mapping[str, float],
    batch: Batch,
    *,
    step: int,
    teachers: Iterable[Teacher],
    of_method: Mapping[str, Tensor],
    ranks: Ranks,
    last_good: str,
) -> RobustCompressError:
    """The error of a step that is not taken: a teacher's, the method's or the student's.

    Args:
        values: what was logged.
        batch: the images of the step.
        step: counted from 1.
        teachers: as they were given.
        of_method: what the method changes besides the student.
        ranks: those that share the step, each of which asks its teachers other images.
        last_good: where the newest checkpoint is.
    """
    where = f"the loss of step {step} is not finite"
    kept = f"The step was not taken. Last good checkpoint: {last_good}"
    for teacher in teachers:
        num_bad = ranks.largest(teacher.num_not_finite())
        if num_bad:
            return TeacherError(
                f"{where}: the {teacher.role} teacher {teacher.name} answered {num_bad} images "
                f"with numbers that are not finite. {kept}. Check its file, mean and std, or take "
                "another teacher"
            )
    bad = not_finite_names(of_method)
    if bad:
        return NonFiniteLossError(
            f"{where}: so is {', '.join(bad[:3])}, which the method trains besides the student. "
            f"{kept}. Try a smaller method.teacher_learning_rate or training.learning_rate"
        )
    indices = batch.index_N.tolist()
    shown = ", ".join(map(str, indices[:_NUM_SHOWN]))
    more = ", ..." if len(indices) > _NUM_SHOWN else ""
    return NonFiniteLossError(
        f"{where} ({dict(values)}); images {shown}{more} of the training split. {kept}. "
        "Try a smaller training.learning_rate, training.gradient_clip_norm = 1.0, or "
        "--dtype float32"
    )


def not_finite_names(tensors: Mapping[str, Tensor]) -> list[str]:
    """Those with a number that is not finite; waits for the device once for each."""
    return [name for name, value in tensors.items() if not bool(torch.isfinite(value).all())]
