"""A method whose inner attack begins with few steps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor

from compressor.attacks.pgd import PGD
from compressor.data import Batch
from compressor.methods.protocol import Method, Moment, StepResult
from compressor.student import Student


class Attacking(Method[Any], Protocol):
    """A method with one attack, as a frozen dataclass."""

    attack: PGD


@dataclass(frozen=True, kw_only=True)
class Growing:
    """The same method with one attack after the other, each for the same share of the run.

    A young student is fooled by few steps, so the many that a trained one needs are spent when
    they are needed. Fewer steps are larger ones that reach as far.

    Source: the idea of Cai, Du, Liu and Song, "Curriculum adversarial training", IJCAI 2018, whose
    attacks grow with the accuracy; here they grow with the time, which every run knows before.
    """

    method: Attacking
    attacks: Sequence[PGD]
    full_from: float
    """The last attack begins at this fraction of the run."""

    def initial_state(self) -> Any:  # noqa: ANN401 (of the method)
        """Of the method."""
        return self.method.initial_state()

    def restore_state(self, values: Mapping[str, object]) -> Any:  # noqa: ANN401
        """Of the method."""
        return self.method.restore_state(values)

    def tensors(self) -> Mapping[str, Tensor]:
        """Of the method."""
        return self.method.tensors()

    def step(
        self,
        student: Student,
        batch: Batch,
        state: Any,  # noqa: ANN401 (of the method)
        moment: Moment,
    ) -> tuple[StepResult, Any]:
        """A step of the method with the attack of this moment."""
        last = len(self.attacks) - 1
        is_full = moment.fraction >= self.full_from
        place = last if is_full else int(moment.fraction / self.full_from * last)
        method: Attacking = replace(self.method, attack=self.attacks[place])  # type: ignore[type-var]
        return method.step(student, batch, state, moment)


def growing(method: Attacking, *, first_num_steps: int, full_from: float) -> Growing:
    """`method`, whose attack begins with so many steps and grows by one at a time."""
    full = method.attack
    reach_pixels = full.num_steps * full.step_size_pixels
    attacks = [
        replace(full, num_steps=number, step_size_pixels=reach_pixels / number)
        for number in range(first_num_steps, full.num_steps)
    ]
    return Growing(method=method, attacks=[*attacks, full], full_from=full_from)
