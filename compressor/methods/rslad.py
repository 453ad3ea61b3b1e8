"""RSLAD: robust soft label adversarial distillation."""

from dataclasses import dataclass

from compressor.attacks.protocol import Attack
from compressor.data import Batch
from compressor.losses import kl_to_probabilities, temper
from compressor.methods.protocol import Moment, NoState, Stateless, StepResult
from compressor.methods.terms import weighted_sum
from compressor.student import Student
from compressor.teacher import Teacher


@dataclass(frozen=True, kw_only=True)
class RSLAD(Stateless):
    """The robust teacher's answers on clean images replace the labels everywhere.

    Minimises, as means over the batch, s x [w x KL(teacher(x) || student(x')) +
    (1 - w) x KL(teacher(x) || student(x))]. The attack raises that first divergence, from
    Gaussian noise; the teacher never sees an adversarial image.

    Source: Zi, Zhao, Ma and Jiang, "Revisiting adversarial robustness distillation: robust soft
    labels make student better", ICCV 2021, with the reduction of the released script: s = 0.1 is
    its element mean at ten classes, and its ten times that at a hundred.
    Deviation: the divergence is exact; the script adds 1e-5 inside the teacher's logarithm, which
    shifts the value that is logged and no gradient.
    Deviation: the best epoch is chosen on held-out training images (the script saves every epoch
    that it tests).
    """

    robust_teacher: Teacher
    attack: Attack
    robust_weight: float
    loss_scale: float

    def step(
        self, student: Student, batch: Batch, state: NoState, moment: Moment
    ) -> tuple[StepResult, NoState]:
        """Ask the teacher, attack its answers, then two passes: adversarial first."""
        del moment
        x = batch.x_NCHW
        p_NK = temper(self.robust_teacher.logits(x), 1.0)
        x_adv = self.attack(student.evaluation_view(), x, p_NK, keys_N=batch.keys_N)
        robust_loss = self.loss_scale * batch.mean(kl_to_probabilities(student.logits(x_adv), p_NK))
        terms = {"robust_loss_nats": (self.robust_weight, robust_loss)}
        if self.robust_weight < 1:
            clean_loss = self.loss_scale * batch.mean(kl_to_probabilities(student.logits(x), p_NK))
            terms["clean_loss_nats"] = (1 - self.robust_weight, clean_loss)
        return weighted_sum(terms), state
