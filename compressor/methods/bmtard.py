"""B-MTARD: balanced multi-teacher adversarial robustness distillation."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from compressor.attacks.protocol import Attack
from compressor.balancers import LossWeightState, balance_loss_weights, balance_temperatures
from compressor.data import Batch
from compressor.methods.protocol import Moment, StepResult, WithoutTensors, read_back
from compressor.methods.teacher_set import TeacherSet
from compressor.student import Student


@dataclass(frozen=True, kw_only=True)
class BMTARDState:
    """What one step leaves to the next, in the order of the teachers' set."""

    temperatures: tuple[float, ...]
    weights: LossWeightState

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "BMTARDState":
        """The inverse of `dataclasses.asdict`, also after a trip through JSON."""
        return cls(
            temperatures=tuple(values["temperatures"]),
            weights=LossWeightState.from_dict(values["weights"]),
        )


@dataclass(frozen=True, kw_only=True)
class BMTARD(WithoutTensors):
    """Clean and robust teachers, their entropies and their losses kept in balance.

    Minimises sum of w_i L_i, with L_i = s x mean of KL(softmax(teacher_i / T_i) || student) on the
    adversarial images for robust teachers and on the clean ones for clean teachers. Entropy-based
    balance moves each T_i by steps of fixed size; normalization loss balance makes w_i an
    exponential moving average of the parts of the relative losses r_i = L_i / (L_i of batch 1).

    Source: Zhao et al., "Mitigating accuracy-robustness trade-off via balanced multi-teacher
    adversarial distillation", TPAMI 46(12), 2024, as in the authors' released script.
    The authors': one clean and one robust teacher. With these, temperatures and weights are theirs
    to the last bit for the same losses, entropies and rates. The losses differ by rounding: s x
    mean over images of a sum over classes here, one mean over N x K there. So do rates after the
    second drop: rate x 0.1^2 here, (rate x 0.1) x 0.1 there.
    Ours: any number of teachers, at least one of each role. Each temperature steps against the
    teacher whose entropy is farthest from its own, so that all entropies come together. The goal of
    w_i is c_i r_i / sum of c_j r_j, where c_i is 1 / (number of distinct teachers in its role): the
    roles are balanced by the means of their relative losses and do not gain weight by numbers.
    Neither the order of teachers nor a copy of one changes anything: it is asked once, and its
    weight is shared. See `compressor.balancers` and `TeacherSet`.

    Deviation: the balancers' state is part of the checkpoint (there it is lost).
    Deviation: the best epoch is chosen on held-out training images (there on the test set).
    Deviation: in runs of fewer than 117,300 steps the step of the temperatures grows, so that the
    climb takes the same share.
    The released element mean over N x K is s = 0.1 at ten classes.
    """

    teachers: TeacherSet
    attack: Attack
    loss_scale: float
    temperature_rate: float
    temperature_bounds: tuple[float, float]
    weight_rate: float

    def initial_state(self) -> BMTARDState:
        """The lowest temperatures, a half of the weight for each role, no reference losses yet."""
        lowest, _ = self.temperature_bounds
        return BMTARDState(
            temperatures=tuple(lowest for _ in self.teachers.members),
            weights=LossWeightState(weights=self.teachers.equal_weights),
        )

    def restore_state(self, values: Mapping[str, Any]) -> BMTARDState:
        """From `dataclasses.asdict` of a state."""
        return BMTARDState.from_dict(values)

    def step(
        self, student: Student, batch: Batch, state: BMTARDState, moment: Moment
    ) -> tuple[StepResult, BMTARDState]:
        """Attack, two passes of the student, one of each teacher; then balance and weigh."""
        terms = self.teachers.terms(
            student,
            batch,
            attack=self.attack,
            temperatures=state.temperatures,
            loss_scale=self.loss_scale,
        )
        values = read_back(*terms.losses, *terms.negative_entropies)
        losses, negative_entropies = values[: len(values) // 2], values[len(values) // 2 :]

        temperatures = balance_temperatures(  # these are for the next batch
            state.temperatures,
            negative_entropies,
            rate=self.temperature_rate * moment.rate_factor,
            bounds=self.temperature_bounds,
        )
        weighing = balance_loss_weights(  # these are for this one
            state.weights,
            losses,
            shares=self.teachers.shares,
            rate=self.weight_rate * moment.rate_factor,
        )
        result = self.teachers.weighed(terms, losses, weighing.weights)
        entropies = [-value for value in negative_entropies]
        logged = {
            **result.logged,
            **self.teachers.logged("temperature_ratio", state.temperatures),
            **self.teachers.logged("teacher_entropy_nats", entropies),
        }
        next_state = BMTARDState(temperatures=temperatures, weights=weighing)
        return replace(result, logged=logged), next_state
