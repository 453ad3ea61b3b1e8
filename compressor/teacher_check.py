"""A short look at a teacher before hours are spent on it."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from compressor.attacks.protocol import Attack
from compressor.data import Batch
from compressor.errors import TeacherError
from compressor.proportions import Proportion
from compressor.teacher import Teacher

_CONFIDENCE = 0.99
_ROBUST_FLOOR = 0.02
"""A teacher below this share under a short PGD has no robustness to teach."""


@dataclass(frozen=True, kw_only=True)
class TeacherCheck:
    """What a teacher scored on some held-out training images."""

    teacher: Teacher
    clean: Proportion
    robust: Proportion | None
    """Under a short PGD; None where the teacher gives no gradient."""
    problem: str | None
    """Why it is unfit for its role, if it is."""


def check_teacher(teacher: Teacher, batches: Iterable[Batch], *, attack: Attack) -> TeacherCheck:
    """Clean accuracy, and accuracy under a short attack where there is a gradient.

    Raises:
        TeacherError: if an answer is not finite, which nobody can accept: the loss would not be.
    """
    num_clean, num_robust, num_total = 0, 0, 0
    for batch in batches:
        num_total += len(batch.y_N)
        num_clean += _num_correct(teacher, batch.x_NCHW, batch.y_N, kind="clean")
        if teacher.network is not None:
            x_adv = attack(teacher.answer, batch.x_NCHW, batch.y_N, keys_N=batch.keys_N)
            num_robust += _num_correct(teacher, x_adv, batch.y_N, kind="adversarial")
    clean = Proportion(num_correct=num_clean, num_total=num_total)
    robust = Proportion(num_correct=num_robust, num_total=num_total)
    found = robust if teacher.network is not None else None
    problem = _problem(teacher, clean, found)
    return TeacherCheck(teacher=teacher, clean=clean, robust=found, problem=problem)


def refuse_unfit(check: TeacherCheck) -> None:
    """Stop before hours are spent.

    Raises:
        TeacherError: if the teacher is unfit for its role.
    """
    if check.problem is not None:
        raise TeacherError(
            f"{check.problem}. Check the file, the architecture, mean and std, and the order of "
            "the classes; --accept-teachers goes on all the same"
        )


def _problem(teacher: Teacher, clean: Proportion, robust: Proportion | None) -> str | None:
    num_classes = teacher.num_classes
    who = f"the {teacher.role} teacher {teacher.name}"
    if clean.lower_bound(_CONFIDENCE) <= 1 / num_classes:
        return f"{who} is no better than chance: {clean} correct with {num_classes} classes"
    if teacher.role == "robust" and robust is not None and robust.fraction <= _ROBUST_FLOOR:
        return f"{who} is not robust: a short PGD leaves {robust} correct"
    return None


def refuse_not_finite(teacher: Teacher, logits_NK: Tensor, *, kind: str) -> None:
    """Stop at the first answer that is no number.

    Args:
        teacher: who answered.
        logits_NK: what.
        kind: of the images, such as `clean`.

    Raises:
        TeacherError: if any logit is not finite.
    """
    num_bad = int((~logits_NK.isfinite().all(dim=1)).sum())
    if num_bad:
        raise TeacherError(
            f"the {teacher.role} teacher {teacher.name} answers {num_bad} of {len(logits_NK)} "
            f"{kind} images with numbers that are not finite; check the file, mean and std, or "
            "take another teacher"
        )


def _num_correct(teacher: Teacher, x_NCHW: Tensor, y_N: Tensor, *, kind: str) -> int:
    logits_NK = teacher.logits(x_NCHW)
    refuse_not_finite(teacher, logits_NK, kind=kind)
    return int((logits_NK.argmax(dim=1) == y_N).sum())
