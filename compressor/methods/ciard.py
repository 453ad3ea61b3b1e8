"""CIARD: cyclic iterative adversarial robustness distillation.

N examples, K classes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compressor.attacks.protocol import Attack
from compressor.balancers import LossWeightState, balance_loss_weights, balance_temperatures
from compressor.data import Batch
from compressor.losses import cross_entropy, guarded_kl, guarded_negative_entropy, temper
from compressor.methods.bmtard import BMTARDState
from compressor.methods.protocol import Moment, StepResult, read_back
from compressor.methods.teacher_copy import Statistics, TeacherCopy
from compressor.student import Student
from compressor.teacher import Teacher


@dataclass(frozen=True, kw_only=True)
class Push:
    """How far the student is driven from the mistakes of the clean teacher."""

    temperature: float = 5.0
    factor: float = 1.0
    matches_decade: bool = True

    def factor_for(self, push_nats: float, other_nats: float) -> float:
        """What the push is multiplied by, beside losses whose mean is `other_nats`.

        With `matches_decade` the push has between a tenth of that mean and all of it. 0 where
        there is nothing to push from, or a loss is not a finite number above 0.
        """
        if not (0 < push_nats < math.inf and 0 < other_nats < math.inf):
            return 0.0
        if not self.matches_decade:
            return self.factor
        return float(self.factor * 10.0 ** math.floor(math.log10(other_nats / push_nats)))


@dataclass(frozen=True, kw_only=True)
class Retraining:
    """SGD on the copy of the robust teacher."""

    learning_rate: float = 1e-4
    momentum: float = 0.1
    from_fraction: float = 50 / 300
    statistics: Statistics = "kept"

    def rate(self, fraction: float) -> float | None:
        """The rate at that fraction of the run, a cosine to zero at its end; None before."""
        if fraction < self.from_fraction:
            return None
        done = (fraction - self.from_fraction) / (1 - self.from_fraction)
        return self.learning_rate * (1 + math.cos(math.pi * done)) / 2


@dataclass(frozen=True, kw_only=True)
class CIARD:
    """A clean teacher, a robust one that is retrained on the way, and a push from mistakes.

    Minimises 2 (w_r L_r + w_c L_c) - f P, where L_r = s x mean KL(copy(x') / T_r || student(x'))
    and L_c = s x mean KL(clean(x) / T_c || student(x)) as in B-MTARD, with its entropy-based
    balance, and P = s x mean KL(clean(x') || student(x') / 5) over the images x' that the clean
    teacher gets wrong. The weights are a half each, so that the losses add up 1:1. From 50/300 of
    the run on, a copy of the robust teacher descends the cross-entropy of x', with SGD at 1e-4 that
    falls along a cosine, momentum 0.1. The given teacher is never changed; the copy with its
    BatchNorm statistics and momentum is in `tensors`, and so in checkpoints.

    Source: Lu et al., "CIARD: cyclic iterative adversarial robustness distillation", ICCV 2025, by
    a description of its released script.
    Guessed, since the description does not say: that f is the power of ten that brings P to between
    a tenth and all of the mean of L_r and L_c; that P is a mean over the wrong images alone, on
    the clean teacher at temperature 1; that x' is the attack of B-MTARD; that the cosine of the
    copy ends with the run; and that its SGD has no weight decay.

    Deviation: the script keeps the robust teacher in train mode, also while it is "frozen", so its
    BatchNorm statistics drift from the first step. Here they stay; `teacher_statistics = "batch"`
    is as released.
    Deviation: the script lowers the rates of temperatures and weights tenfold in every step from
    epoch 215 on, so that they freeze there. Here they follow the learning rate;
    `temperature_until_fraction = 215/300` is as released, but for less than 0.12 steps in all.
    Deviation: the script computes the weights of normalization loss balance and does not use
    them. Here, too, losses add up 1:1, and `weight_rate = 0.025` turns the balance on.
    Deviation: the best epoch is chosen on held-out training images, and checkpoints hold the state
    and the copy.
    """

    clean_teacher: Teacher
    robust_teacher: Teacher
    copy: TeacherCopy
    """Of the robust teacher, which answers itself until the copy begins to differ."""
    attack: Attack
    loss_scale: float
    temperature_rate: float
    temperature_bounds: tuple[float, float]
    temperature_until_fraction: float
    weight_rate: float
    push: Push
    retraining: Retraining

    def initial_state(self) -> BMTARDState:
        """Lowest temperatures and equal weights, the robust teacher's first."""
        lowest, _ = self.temperature_bounds
        weights = LossWeightState(weights=(0.5, 0.5))
        return BMTARDState(temperatures=(lowest, lowest), weights=weights)

    def restore_state(self, values: Mapping[str, Any]) -> BMTARDState:
        """From `dataclasses.asdict` of a state."""
        return BMTARDState.from_dict(values)

    def tensors(self) -> Mapping[str, Tensor]:
        """The copy of the robust teacher and its momentum."""
        return self.copy.tensors()

    def step(
        self, student: Student, batch: Batch, state: BMTARDState, moment: Moment
    ) -> tuple[StepResult, BMTARDState]:
        """Attack, two passes of the student, three of teachers; then a step of the copy."""
        x, y = batch.x_NCHW, batch.y_N
        x_adv = self.attack(student.evaluation_view(), x, y, keys_N=batch.keys_N)
        adv_logits_NK, clean_logits_NK = student.logits(x_adv), student.logits(x)
        robust_logits_NK, copy_loss = self._ask_robust(student, x_adv, y, moment)
        robust_p_NK = temper(robust_logits_NK, state.temperatures[0])
        clean_p_NK = temper(self.clean_teacher.logits(x), state.temperatures[1])
        push, wrong_fraction = self._push_loss(adv_logits_NK, x_adv, y)
        robust_loss = self.loss_scale * guarded_kl(robust_p_NK, adv_logits_NK).mean()
        clean_loss = self.loss_scale * guarded_kl(clean_p_NK, clean_logits_NK).mean()
        robust_value, clean_value, push_value, *others = read_back(
            robust_loss,
            clean_loss,
            push,
            guarded_negative_entropy(robust_p_NK).mean(),
            guarded_negative_entropy(clean_p_NK).mean(),
            wrong_fraction,
            copy_loss,
        )
        factor = self.push.factor_for(push_value, (robust_value + clean_value) / 2)
        next_state = self._balance(state, (robust_value, clean_value), others[:2], moment)
        robust_weight, clean_weight = (2 * weight for weight in next_state.weights.weights)
        total = robust_weight * robust_loss + clean_weight * clean_loss
        value = robust_weight * robust_value + clean_weight * clean_value
        logged = {
            "loss_nats": value - factor * push_value,
            "robust_loss_nats": robust_value,
            "clean_loss_nats": clean_value,
            "push_loss_nats": push_value,
            "push_factor_ratio": factor,
            "push_images_fraction": others[2],
            "robust_weight_fraction": robust_weight / 2,
            "clean_weight_fraction": clean_weight / 2,
            "robust_temperature_ratio": state.temperatures[0],
            "clean_temperature_ratio": state.temperatures[1],
            "robust_teacher_entropy_nats": -others[0],
            "clean_teacher_entropy_nats": -others[1],
            "robust_teacher_label_loss_nats": others[3],
        }
        if factor > 0:
            total = total - factor * push
        return StepResult(loss=total, logged=logged), next_state

    def _ask_robust(
        self, student: Student, x_adv: Tensor, y_N: Tensor, moment: Moment
    ) -> tuple[Tensor, Tensor]:
        """Logits of the robust teacher [N, K] and their cross-entropy; then the copy descends it.

        The student learns from the answer before that step.
        """
        rate = self.retraining.rate(moment.fraction)
        if rate is None and self.retraining.statistics == "kept":
            logits_NK = self.robust_teacher.logits(x_adv)  # the copy would say the same
        else:
            with torch.set_grad_enabled(rate is not None):
                logits_NK = self.copy.logits(x_adv, student.performance)
        loss = cross_entropy(logits_NK, y_N).mean()
        if rate is not None:
            self.copy.descend(loss, rate=rate, momentum=self.retraining.momentum)
        return logits_NK.detach(), loss.detach()

    def _push_loss(
        self, adv_logits_NK: Tensor, x_adv: Tensor, y_N: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Scaled mean KL on the images that the clean teacher gets wrong, and their share."""
        teacher_logits_NK = self.clean_teacher.logits(x_adv)
        is_wrong_N = (teacher_logits_NK.argmax(dim=1) != y_N).to(adv_logits_NK.dtype)
        p_NK = temper(teacher_logits_NK, 1.0)
        kl_N = guarded_kl(p_NK, adv_logits_NK / self.push.temperature)
        push = self.loss_scale * (is_wrong_N * kl_N).sum() / is_wrong_N.sum().clamp(min=1)
        return push, is_wrong_N.mean()

    def _balance(
        self,
        state: BMTARDState,
        losses: tuple[float, float],
        negative_entropies: list[float],
        moment: Moment,
    ) -> BMTARDState:
        """Temperatures of the next batch, weights of this one."""
        is_moving = moment.fraction < self.temperature_until_fraction
        temperatures = balance_temperatures(
            state.temperatures,
            negative_entropies,
            rate=self.temperature_rate * moment.rate_factor if is_moving else 0.0,
            bounds=self.temperature_bounds,
        )
        weights = balance_loss_weights(
            state.weights,
            losses,
            shares=(1.0, 1.0),
            rate=self.weight_rate * moment.rate_factor,
        )
        return BMTARDState(temperatures=temperatures, weights=weights)
