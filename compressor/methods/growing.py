"""A method whose inner attack begins late, or with few steps."""

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
    """The same method with one attack after the other.

    A young student is fooled by few steps, so the many that a trained one needs are spent when
    they are needed. Fewer steps are larger ones that reach as far. Before the first of them the
    student learns from clean images, in place of attacked ones too.

    Sources: Cai, Du, Liu and Song, "Curriculum adversarial training", IJCAI 2018, whose attacks
    grow with the accuracy; here they grow with the time, which every run knows before. Gupta, Dube
    and Verma, "Improving the affordability of robustness training for DNNs", CVPRW 2020 (arXiv
    2002.04237), begin without any.
    """

    method: Attacking
    phases: Sequence[tuple[float, PGD]]
    """Where in the run each attack begins, rising from 0."""

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
        attack = next(
            attack for begins_at, attack in reversed(self.phases) if begins_at <= moment.fraction
        )
        method: Attacking = replace(self.method, attack=attack)  # type: ignore[type-var]
        return method.step(student, batch, state, moment)


def growing(
    method: Attacking, *, begins_at: float, first_num_steps: int, full_from: float
) -> Growing:
    """`method`, attacked from `begins_at` on; the steps grow one at a time until `full_from`."""
    full = method.attack
    reach_pixels = full.num_steps * full.step_size_pixels
    fewer = range(first_num_steps, full.num_steps)
    phases = [(0.0, replace(full, num_steps=0, start="zero"))] if begins_at > 0 else []
    phases += [
        (
            begins_at + (full_from - begins_at) * place / len(fewer),
            replace(full, num_steps=num_steps, step_size_pixels=reach_pixels / num_steps),
        )
        for place, num_steps in enumerate(fewer)
    ]
    return Growing(method=method, phases=[*phases, (full_from if fewer else begins_at, full)])
