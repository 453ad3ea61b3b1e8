"""TRADES: accuracy and invariance as two terms."""

from dataclasses import dataclass

import torch.nn.functional as F

from compressor.attacks.protocol import Attack
from compressor.data import Batch
from compressor.losses import cross_entropy, kl_divergence
from compressor.methods.protocol import Moment, NoState, Stateless, StepResult
from compressor.methods.terms import weighted_sum
from compressor.student import Student


@dataclass(frozen=True, kw_only=True)
class TRADES(Stateless):
    """Cross-entropy on clean images plus beta x KL from clean to adversarial answers.

    Source: Zhang et al., "Theoretically principled trade-off between robustness and accuracy",
    ICML 2019, as in the authors' released script. The inner attack raises that same KL, from
    Gaussian noise, in eval mode.
    Deviation: one clean pass serves both terms; the script makes another after the adversarial
    one, for the same loss, which moves the BatchNorm statistics.
    """

    attack: Attack
    beta: float

    def step(
        self, student: Student, batch: Batch, state: NoState, moment: Moment
    ) -> tuple[StepResult, NoState]:
        """Attack the answer, then two passes, clean first."""
        del moment
        view = student.evaluation_view()
        clean_p_NK = F.softmax(view(batch.x_NCHW), dim=1)
        x_adv = self.attack(view, batch.x_NCHW, clean_p_NK, keys_N=batch.keys_N)
        clean_logits_NK = student.logits(batch.x_NCHW)
        adv_logits_NK = student.logits(x_adv)
        terms = {
            "clean_loss_nats": (1.0, batch.mean(cross_entropy(clean_logits_NK, batch.y_N))),
            "robust_loss_nats": (
                self.beta,
                batch.mean(kl_divergence(clean_logits_NK, adv_logits_NK)),
            ),
        }
        return weighted_sum(terms), state
