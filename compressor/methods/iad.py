"""IAD: introspective adversarial distillation."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from compressor.attacks.protocol import Attack
from compressor.data import Batch
from compressor.losses import cross_entropy, kl_divergence, softened_kl
from compressor.method_recipes import SelfTarget, TeacherTrust
from compressor.methods.protocol import Moment, NoState, Stateless, StepResult
from compressor.methods.terms import weighted_sum
from compressor.student import Student
from compressor.teacher import Teacher


@dataclass(frozen=True, kw_only=True)
class IAD(Stateless):
    """Trust the robust teacher image by image, as far as it withstands the student's attack.

    Until `begin_fraction` of the run this is ARD, attack included. From then on it minimises, with
    the trust q = p_teacher(y | x')^beta of each image, as means over the batch,
    w x s x [q x T^2 KL(teacher(x) / T || student(x') / T) +
    (1 - q) x KL(student(x) || student(x'))] + (1 - w) x CE(student(x), y).

    Source: Zhu et al., "Reliable adversarial distillation with unreliable teachers", ICLR 2022,
    as IAD-I: the teacher's targets are its answers on clean images. Of the paper itself only the
    abstract was at hand, not its formulas.
    Deviation: q weighs the teacher too. The authors' released script of IAD-I does not, which
    `teacher_trust = "full"` reproduces; that of IAD-II does. Which of them the paper's formula of
    IAD-I is could not be checked: its abstract says "partially instead of fully trust".
    Introspection is the script's with `self_target = "live"`, which also moves the clean answers
    towards the adversarial ones; `"detached"` is ours and takes the clean answers as given.
    Deviation: the attack meets the student in eval mode, in the script in train mode.
    Deviation: at most one clean pass of the student, and none before the beginning at w = 1; the
    script makes one there and two afterwards, which moves the BatchNorm statistics.
    Deviation: the learning rate can drop twice; the slip is that of ARD's script.
    Deviation: the best epoch is chosen on held-out training images by the mean of clean and robust
    accuracy (there on the test set by robust accuracy).
    """

    robust_teacher: Teacher
    attack: Attack
    temperature: float
    teacher_weight: float
    loss_scale: float
    begin_fraction: float
    trust_exponent: float
    teacher_trust: TeacherTrust
    self_target: SelfTarget

    def step(
        self, student: Student, batch: Batch, state: NoState, moment: Moment
    ) -> tuple[StepResult, NoState]:
        """Attack, then two passes, adversarial first; with trust the teacher answers both."""
        x, y = batch.x_NCHW, batch.y_N
        x_adv = self.attack(student.evaluation_view(), x, y, keys_N=batch.keys_N)
        adv_logits_NK = student.logits(x_adv)
        teacher_N = softened_kl(
            self.robust_teacher.logits(x), adv_logits_NK, temperature=self.temperature
        )
        has_begun = moment.fraction >= self.begin_fraction
        if not has_begun and self.teacher_weight == 1:
            return weighted_sum({"robust_loss_nats": self._scaled(batch, teacher_N)}), state

        terms, also_logged = {}, {}
        clean_logits_NK = student.logits(x)
        if has_begun:
            trust_N = self._trust(x_adv, y)
            own_NK = clean_logits_NK.detach() if self.self_target == "detached" else clean_logits_NK
            self_N = (1 - trust_N) * kl_divergence(own_NK, adv_logits_NK)
            teacher_N = trust_N * teacher_N if self.teacher_trust == "weighted" else teacher_N
            terms["introspection_loss_nats"] = self._scaled(batch, self_N)
            also_logged["teacher_trust_fraction"] = batch.mean(trust_N)
        if self.teacher_weight < 1:
            label_loss = batch.mean(cross_entropy(clean_logits_NK, y))
            terms["clean_loss_nats"] = (1 - self.teacher_weight, label_loss)
        terms["robust_loss_nats"] = self._scaled(batch, teacher_N)
        return weighted_sum(terms, also_logged=also_logged), state

    def _scaled(self, batch: Batch, divergence_N: Tensor) -> tuple[float, Tensor]:
        """Weight, and scaled batch mean."""
        return self.teacher_weight, self.loss_scale * batch.mean(divergence_N)

    def _trust(self, x_adv_NCHW: Tensor, y_N: Tensor) -> Tensor:
        """Trust of each image [N], in [0, 1]."""
        p_NK = F.softmax(self.robust_teacher.logits(x_adv_NCHW), dim=1)
        return p_NK.gather(1, y_N[:, None])[:, 0] ** self.trust_exponent
