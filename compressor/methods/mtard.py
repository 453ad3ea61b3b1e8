"""MTARD: multi-teacher adversarial robustness distillation, the method before B-MTARD."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from compressor.attacks.protocol import Attack
from compressor.balancers import LossWeightState, balance_loss_weights
from compressor.data import Batch
from compressor.methods.protocol import Moment, StepResult, WithoutTensors, read_back
from compressor.methods.teacher_set import TeacherSet
from compressor.student import Student


@dataclass(frozen=True, kw_only=True)
class MTARD(WithoutTensors):
    """Clean and robust teachers at temperature 1, their losses kept in balance.

    Minimises sum of w_i L_i, with L_i = s x mean of KL(teacher_i || student) on the adversarial
    images for robust teachers and on the clean ones for clean teachers, and w_i an exponential
    moving average of r_i^b / sum of r_j^b, where r_i = L_i / (L_i of batch 1).

    Source: Zhao et al., "Enhanced accuracy and robustness via multi-teacher adversarial
    distillation", ECCV 2022, as in the authors' released script, where b = 1. It is B-MTARD without
    entropy-based balance.
    The authors': one clean and one robust teacher. Ours: any number, as in `BMTARD`.

    Deviation: the script moves the clean weight and takes the robust one as 1 minus it; here both
    are moved and divided by their sum, which differs by rounding alone.
    Deviation: the state is part of the checkpoint (there it is lost), and the best epoch is chosen
    on held-out training images (the script saves every evaluated epoch).
    The released element mean over N x K is s = 0.1 at ten classes; at a hundred the script
    multiplies by ten, so that it is s = 0.1 too.
    """

    teachers: TeacherSet
    attack: Attack
    loss_scale: float
    weight_rate: float
    relative_loss_exponent: float

    def initial_state(self) -> LossWeightState:
        """A half of the weight for each role, no reference losses yet."""
        return LossWeightState(weights=self.teachers.equal_weights)

    def restore_state(self, values: Mapping[str, Any]) -> LossWeightState:
        """From `dataclasses.asdict` of a state."""
        return LossWeightState.from_dict(values)

    def step(
        self, student: Student, batch: Batch, state: LossWeightState, moment: Moment
    ) -> tuple[StepResult, LossWeightState]:
        """Attack, two passes of the student, adversarial first, one of each teacher; then weigh."""
        terms = self.teachers.terms(
            student,
            batch,
            attack=self.attack,
            temperatures=[1.0] * len(self.teachers.members),
            loss_scale=self.loss_scale,
        )
        losses = read_back(*terms.losses)
        weighing = balance_loss_weights(
            state,
            losses,
            shares=self.teachers.shares,
            rate=self.weight_rate * moment.rate_factor,
            exponent=self.relative_loss_exponent,
        )
        return self.teachers.weighed(terms, losses, weighing.weights), weighing
