"""CIARD: cyclic iterative adversarial robustness distillation.

N examples, K classes.
"""

import math
from collections.abc import Mapping, Sequence
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
from compressor.methods.teacher_copy import TeacherCopy
from compressor.student import Student
from compressor.teacher import Teacher

_A_PART_OF_ONE = 1e-9
"""Of an image: less than any share that is not zero."""


@dataclass(frozen=True, kw_only=True)
class Push:
    """How far the student is driven from the mistakes of the clean teacher."""

    temperature: float
    factor: float
    matches_decade: bool

    def factor_for(self, push_nats: float, other_nats: Sequence[float]) -> float:
        """What the push is multiplied by, beside the other losses.

        With `matches_decade` it comes to the decade of the smallest of them. 0 where there is
        nothing to push from, or a loss is not a finite number above 0.
        """
        if not all(0 < value < math.inf for value in (push_nats, *other_nats)):
            return 0.0
        if not self.matches_decade:
            return self.factor
        return float(self.factor * 10.0 ** (min(map(_decade, other_nats)) - _decade(push_nats)))


def _decade(nats: float) -> int:
    return math.floor(math.log10(nats))


@dataclass(frozen=True, kw_only=True)
class Retraining:
    """SGD on the copy of the robust teacher."""

    learning_rate: float
    momentum: float
    weight_decay: float
    from_fraction: float

    def rate(self, fraction: float) -> float | None:
        """The rate at that fraction of the run, a cosine to zero at its end; None before."""
        if fraction < self.from_fraction or self.learning_rate == 0:
            return None
        done = (fraction - self.from_fraction) / (1 - self.from_fraction)
        return self.learning_rate * (1 + math.cos(math.pi * done)) / 2


@dataclass(frozen=True, kw_only=True)
class Drops:
    """The rates of both balances, which fall at fractions of the run."""

    at_fractions: Sequence[float]
    factor: float

    def factor_at(self, fraction: float) -> float:
        """On the rates."""
        return float(self.factor ** sum(place <= fraction for place in self.at_fractions))


@dataclass(frozen=True, kw_only=True)
class CIARD:
    """A clean teacher, a robust one that is retrained on the way, and a push from mistakes.

    Minimises w_r L_r + w_c L_c - f P, where L_r = s x mean KL(copy(x') / T_r || student(x')) and
    L_c = s x mean KL(clean(x) / T_c || student(x)), temperatures and weights are balanced as in
    B-MTARD, P = s x mean KL(clean(x') || student(x') / 5) over the images x' that the clean teacher
    gets wrong, and f is the power of ten that brings P to the decade of the smaller of L_r and L_c.
    From 50/300 of the run on, a copy of the robust teacher descends the cross-entropy of x', with
    SGD at 1e-4 that falls along a cosine, momentum 0.1, weight decay 2e-4. The given teacher is
    never changed; the copy with its BatchNorm statistics and momentum is in `tensors`, and so in
    checkpoints.

    Source: Lu et al., "CIARD: cyclic iterative adversarial robustness distillation", ICCV 2025, as
    in the authors' released script; the formulas of the paper itself were not at hand. A second
    script of theirs adds L_r and L_c without weights and says that this is an ablation.

    Deviation: the script keeps the robust teacher in train mode, also while it is "frozen", so its
    BatchNorm statistics drift from the first step. Here they stay; `teacher_statistics = "batch"`
    is as released.
    Deviation: the script means to divide the rates of both balances by ten in epochs 215, 260 and
    285 and divides in every step of them, so that they freeze in the first. Here they fall once
    after each; `balance_drops = ["214/300"]` with `balance_drop_factor = 0` is as released, but for
    less than 0.12 of a step.
    Deviation: both cosines of the script have a factor exp(-s^2 / 100) besides, s from 0 to 1.
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
    weight_rate: float
    balance_drops: Drops
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
        """A pass of the student, the attack, a pass on it, three of teachers; the copy's step."""
        x, y = batch.x_NCHW, batch.y_N
        clean_logits_NK = student.logits(x)  # first: the order decides BatchNorm's statistics
        if self.copy.statistics == "batch":
            self.copy.collect_statistics(x, student.performance)
        x_adv = self.attack(student.evaluation_view(), x, y, keys_N=batch.keys_N)
        adv_logits_NK = student.logits(x_adv)
        robust_logits_NK, label_loss = self._ask_robust(student, x_adv, batch, moment)
        robust_p_NK = temper(robust_logits_NK, state.temperatures[0])
        clean_p_NK = temper(self.clean_teacher.logits(x), state.temperatures[1])
        robust_loss = self.loss_scale * batch.mean(guarded_kl(robust_p_NK, adv_logits_NK))
        clean_loss = self.loss_scale * batch.mean(guarded_kl(clean_p_NK, clean_logits_NK))
        watched = {
            "robust_loss_nats": robust_loss,
            "clean_loss_nats": clean_loss,
            "robust_teacher_entropy_nats": -batch.mean(guarded_negative_entropy(robust_p_NK)),
            "clean_teacher_entropy_nats": -batch.mean(guarded_negative_entropy(clean_p_NK)),
            "robust_teacher_label_loss_nats": label_loss,
            **self._push_losses(adv_logits_NK, x_adv, batch),
        }
        seen = dict(zip(watched, read_back(*watched.values()), strict=True))
        values = seen["robust_loss_nats"], seen["clean_loss_nats"]
        entropies = seen["robust_teacher_entropy_nats"], seen["clean_teacher_entropy_nats"]
        next_state = self._balance(state, values, entropies, moment)
        robust_weight, clean_weight = next_state.weights.weights
        total = robust_weight * robust_loss + clean_weight * clean_loss
        loss_nats = robust_weight * values[0] + clean_weight * values[1]
        logged = {
            "robust_weight_fraction": robust_weight,
            "clean_weight_fraction": clean_weight,
            "robust_temperature_ratio": state.temperatures[0],
            "clean_temperature_ratio": state.temperatures[1],
        }
        if "push_loss_nats" in seen:
            factor = self.push.factor_for(seen["push_loss_nats"], values)
            logged["push_factor_ratio"] = factor
            loss_nats -= factor * seen["push_loss_nats"]
            total = total - factor * watched["push_loss_nats"]
        return StepResult(loss=total, logged={"loss_nats": loss_nats, **seen, **logged}), next_state

    def _ask_robust(
        self, student: Student, x_adv: Tensor, batch: Batch, moment: Moment
    ) -> tuple[Tensor, Tensor]:
        """Logits of the robust teacher [N, K] on x', and its loss there; then the copy descends it.

        The student learns from the answer before that step.
        """
        rate = self.retraining.rate(moment.fraction)
        if rate is None and self.copy.statistics == "kept":
            logits_NK = self.robust_teacher.logits(x_adv)  # the copy would say the same
        else:
            with torch.set_grad_enabled(rate is not None):
                logits_NK = self.copy.logits(x_adv, student.performance)
        loss = batch.mean(cross_entropy(logits_NK, batch.y_N))
        if rate is not None:
            sgd = self.retraining
            self.copy.descend(
                loss,
                rate=rate,
                momentum=sgd.momentum,
                weight_decay=sgd.weight_decay,
                ranks=batch.ranks,
            )
        return logits_NK.detach(), loss.detach()

    def _push_losses(self, adv_logits_NK: Tensor, x_adv: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Scaled mean KL on the images that the clean teacher gets wrong, and their share."""
        if self.push.factor == 0:
            return {}
        teacher_logits_NK = self.clean_teacher.logits(x_adv)
        is_wrong_N = (teacher_logits_NK.argmax(dim=1) != batch.y_N).to(adv_logits_NK.dtype)
        p_NK = temper(teacher_logits_NK, 1.0)
        kl_N = guarded_kl(p_NK, adv_logits_NK / self.push.temperature)
        wrong_fraction = batch.mean(is_wrong_N)
        mean_of_wrong = batch.mean(is_wrong_N * kl_N) / wrong_fraction.clamp(min=_A_PART_OF_ONE)
        return {
            "push_loss_nats": self.loss_scale * mean_of_wrong,
            "push_images_fraction": wrong_fraction,
        }

    def _balance(
        self,
        state: BMTARDState,
        losses: tuple[float, float],
        entropies: tuple[float, float],
        moment: Moment,
    ) -> BMTARDState:
        """Temperatures of the next batch, weights of this one."""
        factor = self.balance_drops.factor_at(moment.fraction)
        temperatures = balance_temperatures(
            state.temperatures,
            [-value for value in entropies],
            rate=self.temperature_rate * factor,
            bounds=self.temperature_bounds,
        )
        weights = balance_loss_weights(
            state.weights, losses, shares=(1.0, 1.0), rate=self.weight_rate * factor
        )
        return BMTARDState(temperatures=temperatures, weights=weights)
