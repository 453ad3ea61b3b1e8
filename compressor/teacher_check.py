"""A short look at a teacher before hours are spent on it."""

from dataclasses import dataclass

import torch

from compressor.attacks.protocol import Attack
from compressor.data import Batch
from compressor.errors import TeacherError
from compressor.folding import EvaluationView
from compressor.performance import Performance
from compressor.proportions import Proportion
from compressor.teachers import Teacher

_CONFIDENCE = 0.99
_ROBUST_FLOOR = 0.02
"""A teacher below this share under a short PGD has no robustness to teach."""


@dataclass(frozen=True, kw_only=True)
class TeacherCheck:
    """What a teacher scored on one batch of held-out training images."""

    teacher: Teacher
    clean: Proportion
    robust: Proportion | None
    """Under a short PGD; None where the teacher gives no gradient."""
    problem: str | None
    """Why it is unfit for its role, if it is."""


def check_teacher(
    teacher: Teacher, batch: Batch, *, attack: Attack, performance: Performance
) -> TeacherCheck:
    """Clean accuracy, and accuracy under a short attack where there is a gradient."""
    clean = _count(teacher.logits(batch.x_NCHW), batch)
    robust = None
    if teacher.network is not None:
        view = EvaluationView(teacher.network, performance)
        x_adv = attack(view, batch.x_NCHW, batch.y_N, keys_N=batch.keys_N)
        robust = _count(teacher.logits(x_adv), batch)
    problem = _problem(teacher, clean, robust)
    return TeacherCheck(teacher=teacher, clean=clean, robust=robust, problem=problem)


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


def _count(logits_NK: torch.Tensor, batch: Batch) -> Proportion:
    correct = int((logits_NK.argmax(dim=1) == batch.y_N).sum())
    return Proportion(num_correct=correct, num_total=len(batch.y_N))
