"""The margin attack of the distillation papers, there called CW_inf."""

from dataclasses import dataclass

from torch import Tensor

from compressor.attacks.gradients import input_gradient
from compressor.attacks.protocol import Model
from compressor.losses import margin
from compressor.threat import ThreatModel

CONFIDENCE_LOGITS = 50.0


@dataclass(frozen=True, kw_only=True)
class MarginPGD:
    """Steepest steps on the margin loss with confidence 50, from the clean image.

    Source: the evaluation script of CIARD (ICCV 2025), the nearest public form of what the
    B-MTARD paper calls CW. As there, each iterate is projected into the ball, and only the last
    one is clipped to [0, 1].
    """

    threat: ThreatModel
    step_size_pixels: float
    num_steps: int

    def __call__(self, model: Model, x_NCHW: Tensor, targets: Tensor, *, keys_N: Tensor) -> Tensor:
        """See `compressor.attacks.protocol.Attack`; draws nothing from `keys_N`."""
        del keys_N
        x_adv = x_NCHW.clone()
        for _ in range(self.num_steps):
            gradient = input_gradient(model, x_adv, targets, objective=_confident_margin)
            x_adv = self.threat.project_to_ball(
                x_adv + self.step_size_pixels * self.threat.steepest(gradient), x_NCHW
            )
        return x_adv.clamp(0, 1)


def _confident_margin(logits_NK: Tensor, y_N: Tensor) -> Tensor:
    """The margin up to +50, where its gradient ends."""
    return margin(logits_NK, y_N).clamp(max=CONFIDENCE_LOGITS)
