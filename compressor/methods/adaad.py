"""AdaAD: adaptive adversarial distillation."""

from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.attacks.protocol import Attack
from compressor.data import Batch
from compressor.losses import kl_divergence, kl_to_probabilities, temper
from compressor.methods.protocol import Moment, NoState, Stateless, StepResult
from compressor.methods.terms import weighted_sum
from compressor.student import Student
from compressor.teacher import Teacher


def disagreement(joint_logits_N2K: Tensor, y_N: Tensor) -> Tensor:
    """KL(teacher || student), shape [N], of joint logits: the student's K, then the teacher's.

    The objective of AdaAD's attack; both networks pass a gradient on, and labels play no part.
    """
    del y_N
    student_logits_NK, teacher_logits_NK = joint_logits_N2K.chunk(2, dim=1)
    return kl_divergence(teacher_logits_NK, student_logits_NK)


@dataclass(frozen=True, kw_only=True)
class AdaAD(Stateless):
    """Search where student and robust teacher differ most, and learn the teacher's answer there.

    Minimises, as means over the batch, s x [w x KL(teacher(x') || student(x')) +
    (1 - w) x KL(teacher(x) || student(x))]. The attack raises that first divergence through both
    networks at once, from Gaussian noise, so each of its steps costs a pass back through the
    teacher too.

    Source: Huang et al., "Boosting accuracy and robustness of student models via adaptive
    adversarial distillation", CVPR 2023, with the reduction of the released script on CIFAR-10:
    s = 0.1 is its element mean at ten classes. On CIFAR-100 the script takes the batch mean,
    s = 1, ten times the RSLAD habit there.
    Deviation: epsilon is the recipe's, 8/255 as in the authors' README; the script's own default
    is 16/255.
    Deviation: clean images pass the student only where their loss has a weight; in the script
    they do at w = 1 too, and leave their mark on the BatchNorm statistics alone.
    Deviation: the best epoch is chosen on held-out training images (there on the test set).
    """

    robust_teacher: Teacher
    """Must give gradients with respect to images."""
    attack: Attack
    """Its objective is `disagreement`."""
    robust_weight: float
    loss_scale: float

    def step(
        self, student: Student, batch: Batch, state: NoState, moment: Moment
    ) -> tuple[StepResult, NoState]:
        """Attack the disagreement, then both networks where it was found; clean images first."""
        del moment
        x, view = batch.x_NCHW, student.evaluation_view()

        def ask_both(x_NCHW: Tensor) -> Tensor:
            teacher_logits_NK = self.robust_teacher.logits_with_gradient(x_NCHW)
            return torch.cat([view(x_NCHW), teacher_logits_NK], dim=1)

        x_adv = self.attack(ask_both, x, batch.y_N, keys_N=batch.keys_N)
        terms = {}
        if self.robust_weight < 1:
            clean_loss = batch.mean(self._divergence(student.logits(x), x))
            terms["clean_loss_nats"] = (1 - self.robust_weight, clean_loss)
        robust_loss = batch.mean(self._divergence(student.logits(x_adv), x_adv))
        terms["robust_loss_nats"] = (self.robust_weight, robust_loss)
        return weighted_sum(terms), state

    def _divergence(self, student_logits_NK: Tensor, x_NCHW: Tensor) -> Tensor:
        """Scaled KL(teacher || student), shape [N]; the teacher's answer is given."""
        p_NK = temper(self.robust_teacher.logits(x_NCHW), 1.0)
        return self.loss_scale * kl_to_probabilities(student_logits_NK, p_NK)
