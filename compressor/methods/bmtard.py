"""B-MTARD: balanced multi-teacher adversarial robustness distillation."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from compressor.attacks.protocol import Attack
from compressor.balancers import (
    LossWeightState,
    TemperatureState,
    balance_loss_weights,
    balance_temperatures,
)
from compressor.data import Batch
from compressor.losses import guarded_kl, guarded_negative_entropy, temper
from compressor.methods.protocol import Moment, StepResult, WithoutTensors, read_back
from compressor.student import Student
from compressor.teachers import Teacher


@dataclass(frozen=True, kw_only=True)
class BMTARDState:
    """What one step leaves to the next."""

    temperatures: TemperatureState = field(default_factory=TemperatureState)
    weights: LossWeightState = field(default_factory=LossWeightState)


@dataclass(frozen=True, kw_only=True)
class BMTARD(WithoutTensors):
    """One clean and one robust teacher, their entropies and their losses kept in balance.

    Source: Zhao et al., "Mitigating accuracy-robustness trade-off via balanced multi-teacher
    adversarial distillation", TPAMI 46(12), 2024, as in the authors' released script.
    Deviations: the balancers' state is part of the checkpoint (there it is lost), the best
    epoch is chosen on held-out training images (there on the test set), and in runs of
    fewer than 117,300 steps the step of the temperatures grows, so that the climb takes the same
    share.
    The released element mean over N x K is `loss_scale` x the batch mean, 0.1 at ten classes.
    """

    clean_teacher: Teacher
    robust_teacher: Teacher
    attack: Attack
    loss_scale: float
    temperature_rate: float
    temperature_bounds: tuple[float, float]
    weight_rate: float

    def initial_state(self) -> BMTARDState:
        """Temperatures 1, weights a half each, no reference losses yet."""
        lowest, _ = self.temperature_bounds
        return BMTARDState(temperatures=TemperatureState(robust=lowest, clean=lowest))

    def restore_state(self, values: Mapping[str, Any]) -> BMTARDState:
        """From `dataclasses.asdict` of a state."""
        return BMTARDState(
            temperatures=TemperatureState(**values["temperatures"]),
            weights=LossWeightState(**values["weights"]),
        )

    def step(
        self, student: Student, batch: Batch, state: BMTARDState, moment: Moment
    ) -> tuple[StepResult, BMTARDState]:
        """Attack, two passes of the student, one of each teacher; then balance and weigh."""
        x, y = batch.x_NCHW, batch.y_N
        x_adv = self.attack(student.evaluation_view(), x, y, keys_N=batch.keys_N)

        # Two passes, the adversarial one first: the order decides the BatchNorm statistics.
        student_adv_logits_NK = student.logits(x_adv)
        student_clean_logits_NK = student.logits(x)
        robust_p_NK = temper(self.robust_teacher.logits(x_adv), state.temperatures.robust)
        clean_p_NK = temper(self.clean_teacher.logits(x), state.temperatures.clean)

        robust_loss = self.loss_scale * guarded_kl(robust_p_NK, student_adv_logits_NK).mean()
        clean_loss = self.loss_scale * guarded_kl(clean_p_NK, student_clean_logits_NK).mean()
        robust_value, clean_value, robust_negentropy, clean_negentropy = read_back(
            robust_loss,
            clean_loss,
            guarded_negative_entropy(robust_p_NK).mean(),
            guarded_negative_entropy(clean_p_NK).mean(),
        )

        temperatures = balance_temperatures(  # these are for the next batch
            state.temperatures,
            robust_negative_entropy=robust_negentropy,
            clean_negative_entropy=clean_negentropy,
            rate=self.temperature_rate * moment.rate_factor,
            bounds=self.temperature_bounds,
        )
        weights = balance_loss_weights(  # these are for this one
            state.weights,
            robust_loss=robust_value,
            clean_loss=clean_value,
            rate=self.weight_rate * moment.rate_factor,
        )
        logged = {
            "loss_nats": weights.robust * robust_value + weights.clean * clean_value,
            "robust_loss_nats": robust_value,
            "clean_loss_nats": clean_value,
            "robust_weight_fraction": weights.robust,
            "clean_weight_fraction": weights.clean,
            "robust_temperature_ratio": state.temperatures.robust,
            "clean_temperature_ratio": state.temperatures.clean,
            "robust_teacher_entropy_nats": -robust_negentropy,
            "clean_teacher_entropy_nats": -clean_negentropy,
        }
        total = weights.robust * robust_loss + weights.clean * clean_loss
        next_state = BMTARDState(temperatures=temperatures, weights=weights)
        return StepResult(loss=total, logged=logged), next_state
