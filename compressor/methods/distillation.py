"""Plain knowledge distillation: what one teacher says about clean images."""

from dataclasses import dataclass

from compressor.data import Batch
from compressor.losses import cross_entropy, softened_kl
from compressor.methods.protocol import Moment, NoState, Stateless, StepResult
from compressor.methods.terms import weighted_sum
from compressor.student import Student
from compressor.teacher import Teacher


@dataclass(frozen=True, kw_only=True)
class Distillation(Stateless):
    """Soft targets of a teacher, clean or robust, and the labels; nothing is attacked.

    Minimises, as means over the batch, w x s x T^2 KL(teacher(x) / T || student(x) / T) +
    (1 - w) x CE(student(x), y), with w the weight of the teacher and s the loss scale.

    Source: Hinton, Vinyals and Dean, "Distilling the knowledge in a neural network", NIPS
    workshop 2014. The paper gives no numbers for images.
    Deviation: T = 4 and w = 0.9 are the habit of later comparisons on CIFAR (Tian, Krishnan and
    Isola, "Contrastive representation distillation", ICLR 2020), not of the paper.
    """

    teacher: Teacher
    temperature: float
    teacher_weight: float
    loss_scale: float

    def step(
        self, student: Student, batch: Batch, state: NoState, moment: Moment
    ) -> tuple[StepResult, NoState]:
        """One pass of the student and one of the teacher, on the clean images."""
        del moment
        logits_NK = student.logits(batch.x_NCHW)
        targets_NK = self.teacher.logits(batch.x_NCHW)
        divergence_N = softened_kl(targets_NK, logits_NK, temperature=self.temperature)
        terms = {
            "teacher_loss_nats": (self.teacher_weight, self.loss_scale * batch.mean(divergence_N))
        }
        if self.teacher_weight < 1:
            label_loss = batch.mean(cross_entropy(logits_NK, batch.y_N))
            terms["label_loss_nats"] = (1 - self.teacher_weight, label_loss)
        return weighted_sum(terms), state
