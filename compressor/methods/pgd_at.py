"""PGD-AT: adversarial training on labels."""

from dataclasses import dataclass

from compressor.attacks.protocol import Attack
from compressor.data import Batch
from compressor.losses import cross_entropy
from compressor.methods.protocol import Moment, NoState, Stateless, StepResult, read_back
from compressor.student import Student


@dataclass(frozen=True, kw_only=True)
class PGDAT(Stateless):
    """Minimise the cross-entropy of adversarial images.

    Source: Madry et al., "Towards deep learning models resistant to adversarial attacks",
    ICLR 2018. Deviation: the attack meets the network in eval mode, as in the distillation
    papers, so that the inner steps leave BatchNorm alone.
    """

    attack: Attack

    def step(
        self, student: Student, batch: Batch, state: NoState, moment: Moment
    ) -> tuple[StepResult, NoState]:
        """Attack, then one pass on its images."""
        del moment
        x_adv = self.attack(student.evaluation_view(), batch.x_NCHW, batch.y_N, keys_N=batch.keys_N)
        loss = batch.mean(cross_entropy(student.logits(x_adv), batch.y_N))
        return StepResult(loss=loss, logged={"loss_nats": read_back(loss)[0]}), state
