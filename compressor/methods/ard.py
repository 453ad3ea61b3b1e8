"""ARD: adversarially robust distillation."""

from dataclasses import dataclass

from compressor.attacks.protocol import Attack
from compressor.data import Batch
from compressor.losses import cross_entropy, softened_kl
from compressor.methods.protocol import Moment, NoState, Stateless, StepResult
from compressor.methods.terms import weighted_sum
from compressor.student import Student
from compressor.teacher import Teacher


@dataclass(frozen=True, kw_only=True)
class ARD(Stateless):
    """On adversarial images, answer as the robust teacher does on the clean ones.

    Minimises, as means over the batch, w x s x T^2 KL(teacher(x) / T || student(x') / T) +
    (1 - w) x CE(student(x), y). The attack raises the cross-entropy of the student on the label,
    from a uniform start. Later papers run ARD at T = 1; the authors at 30.

    Source: Goldblum, Fowl, Feizi and Goldstein, "Adversarially robust distillation", AAAI 2020,
    with the reduction of the released script: s = 0.1 is its element mean at ten classes.
    Deviation: the attack meets the student in eval mode; in the script in train mode, where the
    ten inner passes move the BatchNorm statistics.
    Deviation: clean images pass the student only where their loss has a weight; in the script
    they do at w = 1 too, and leave their mark on the BatchNorm statistics alone.
    Deviation: the script's second drop of the learning rate sets the rate of the first one
    again; give `milestones = ["100/200"]` for that.
    """

    robust_teacher: Teacher
    attack: Attack
    temperature: float
    teacher_weight: float
    loss_scale: float

    def step(
        self, student: Student, batch: Batch, state: NoState, moment: Moment
    ) -> tuple[StepResult, NoState]:
        """Attack, one pass of the student on its images, one of the teacher on the clean ones."""
        del moment
        x, y = batch.x_NCHW, batch.y_N
        x_adv = self.attack(student.evaluation_view(), x, y, keys_N=batch.keys_N)
        divergence_N = softened_kl(
            self.robust_teacher.logits(x), student.logits(x_adv), temperature=self.temperature
        )
        terms = {
            "robust_loss_nats": (self.teacher_weight, self.loss_scale * batch.mean(divergence_N))
        }
        if self.teacher_weight < 1:
            clean_loss = batch.mean(cross_entropy(student.logits(x), y))
            terms["clean_loss_nats"] = (1 - self.teacher_weight, clean_loss)
        return weighted_sum(terms), state
