"""What every method table has: how many teachers the method takes, and its inner attack."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from compressor.closed_table import ClosedTable, Count, Pixels, UnitFraction

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
                is_many = count > need[-1]
                limit = f"at most {need[-1]}" if is_many else f"at least {need[0]}"
                number = f"{need[0]}" if len(need) == 1 else limit
                advice = _FEWER if is_many else _MORE.format(role=role.strip() or "robust")
                plural = "" if need[-1 if is_many else 0] == 1 else "s"
                found.append(
                    f"takes {number}{role} teacher{plural}, the recipe has {count}; {advice}"
                )
        return found


_MORE = "give --{role}-teacher ARCH:FILE or a [[teachers]] table"
_FEWER = "remove the [[teachers]] tables and options that are too many"


class MethodTable(ClosedTable):
    """What all methods can say about themselves."""

    teachers: ClassVar[TeacherNeed] = TeacherNeed()
    needs_teacher_networks: ClassVar[bool] = False
    """Whether answers of its teachers are not enough, as those of an ONNX file: it takes gradients
    through them."""
    has_teacher_map: ClassVar[bool] = False
    """Whether the student trains with a `StudentTeacherHead`, which ends with training."""

    def problems(self) -> list[str]:
        """Values that contradict each other, in words that begin with the key."""
        return []


class InnerAttackRecipe(ClosedTable):
    """Projected gradient descent inside training."""

    step_size_of_epsilon: ClassVar[float] = 1 / 4
    """Where the recipe gives none."""
    num_steps: Count = 10
    step_size_pixels: Pixels | None = None
    """None: a quarter of epsilon, as 2/255 is of 8/255."""
    start: Literal["gaussian", "uniform", "zero"] = "gaussian"
    """`gaussian` has standard deviation 0.001; `uniform` fills the ball."""
    begins_at: UnitFraction = 0.0
    """Before this fraction of the run, learn from clean images in place of attacked ones too."""
    first_num_steps: Count | None = None
    """Begin with so many steps, larger ones that reach as far, and take one more at a time;
    None: all from the beginning."""
    full_from: UnitFraction = 0.8
    """With `first_num_steps`: all `num_steps` from this fraction of the run on."""

    @property
    def changes(self) -> bool:
        """Whether it is not the same along the whole run."""
        return self.first_num_steps is not None or self.begins_at > 0

    def resolved_step_size_pixels(self, epsilon_pixels: float) -> float:
        """As given, or its part of epsilon."""
        return self.step_size_pixels or self.step_size_of_epsilon * epsilon_pixels

    def problems(self, *, epsilon_pixels: float) -> list[str]:
        """Whether its steps reach the border of the ball, in words that begin with the key."""
        if self.first_num_steps is not None and self.first_num_steps > self.num_steps:
            return [
                f"method.attack.first_num_steps {self.first_num_steps} is above num_steps "
                f"{self.num_steps}, to which it grows"
            ]
        if self.begins_at >= (1 if self.first_num_steps is None else self.full_from):
            return [
                f"method.attack.begins_at {self.begins_at:g} leaves no time for the attack"
                + ("" if self.first_num_steps is None else " to grow; it must be below full_from")
            ]
        step_size_pixels = self.resolved_step_size_pixels(epsilon_pixels)
        reach = self.num_steps * step_size_pixels
        if reach >= epsilon_pixels:
            return []
        return [
            f"method.attack: {self.num_steps} steps of {step_size_pixels:.4g} reach only "
            f"{reach:.4g} of epsilon {epsilon_pixels:.4g}; the student would train against a "
            "weaker attacker than the threat says. Raise num_steps or step_size_pixels"
        ]
