"""The method tables of recipes: what each method of distillation can be told.

Defaults are what the paper states; where its script differs by a slip, the field says so.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from compressor.closed_table import (
    ClosedTable,
    Count,
    NonNegative,
    Pixels,
    Positive,
    UnitFraction,
)

NONE, ONE, SOME = range(1), range(1, 2), range(1, 65)
"""Numbers of teachers."""


@dataclass(frozen=True, kw_only=True)
class TeacherNeed:
    """How many teachers a method takes."""

    clean: range = NONE
    robust: range = NONE
    together: range = range(129)

    def problems(self, *, num_clean: int, num_robust: int) -> list[str]:
        """What is wrong with numbers of teachers, and what to do."""
        counts = (
            (" clean", num_clean, self.clean),
            (" robust", num_robust, self.robust),
            ("", num_clean + num_robust, self.together),
        )
        found = []
        for role, count, need in counts:
            if count not in need:
                number = f"{need[0]}" if len(need) == 1 else f"{need[0]} to {need[-1]}"
                advice = _FEWER if count > need[-1] else _MORE.format(role=role.strip() or "robust")
                found.append(f"takes {number}{role} teacher, the recipe has {count}; {advice}")
        return found


_MORE = "give --{role}-teacher ARCH:FILE or a [[teachers]] table"
_FEWER = "remove the [[teachers]] tables and options that are too many"


class MethodTable(ClosedTable):
    """What all methods can say about themselves."""

    teachers: ClassVar[TeacherNeed] = TeacherNeed()

    def problems(self) -> list[str]:
        """Values that contradict each other, in words that begin with the key."""
        return []


class InnerAttackRecipe(ClosedTable):
    """Projected gradient descent inside training."""

    num_steps: Count = 10
    step_size_pixels: Pixels | None = None
    """None: a quarter of epsilon, as 2/255 is of 8/255."""
    start: Literal["gaussian", "uniform", "zero"] = "gaussian"
    """`gaussian` has standard deviation 0.001; `uniform` fills the ball."""


class BMTARDRecipe(MethodTable):
    """Balanced multi-teacher adversarial distillation; defaults are the authors' settings."""

    teachers: ClassVar[TeacherNeed] = TeacherNeed(clean=ONE, robust=ONE)
    name: Literal["bmtard"] = "bmtard"
    loss_scale: Positive = 0.1
    """Factor on the batch-mean KL; 0.1 is the authors' element mean at ten classes."""
    temperature_rate: NonNegative | Literal["scaled"] = "scaled"
    """Step of both temperatures. `scaled`: 0.001 x 117,300 / steps of this run, at most 0.05,
    so that the climb takes the same share of a short run as of the authors' 300 epochs."""
    min_temperature: Positive = 1.0
    max_temperature: Positive = 10.0
    weight_rate: UnitFraction = 0.025
    attack: InnerAttackRecipe = InnerAttackRecipe()

    def problems(self) -> list[str]:
        """The bounds of the temperatures."""
        if self.min_temperature <= self.max_temperature:
            return []
        return [
            f"method.min_temperature {self.min_temperature} is above method.max_temperature "
            f"{self.max_temperature}"
        ]


class CrossEntropyRecipe(MethodTable):
    """Plain training on the labels: clean teachers, and the baseline without defence."""

    name: Literal["cross_entropy"] = "cross_entropy"


class PGDATRecipe(MethodTable):
    """Adversarial training on the labels (Madry et al. 2018)."""

    name: Literal["pgd_at"] = "pgd_at"
    attack: InnerAttackRecipe = InnerAttackRecipe(start="uniform")


class TRADESRecipe(MethodTable):
    """Adversarial training with a KL trade-off (Zhang et al. 2019)."""

    name: Literal["trades"] = "trades"
    beta: NonNegative = 6.0
    attack: InnerAttackRecipe = InnerAttackRecipe()


MethodRecipe = Annotated[
    BMTARDRecipe | CrossEntropyRecipe | PGDATRecipe | TRADESRecipe, Field(discriminator="name")
]
