"""What an attack is: a callable value that leaves no trace.

It does not switch modes, move devices, keep the model or leave gradients behind. `model` is
any function images [N, C, H, W] -> logits [N, K], already in eval mode.
"""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from compressor.threat import ThreatModel

Model = Callable[[Tensor], Tensor]
"""Images in [0, 1], float [N, C, H, W] -> logits [N, K]."""

Objective = Callable[[Tensor, Tensor], Tensor]
"""(logits [N, K], targets) -> what the attacker raises, one value per example [N]."""


class Attack(Protocol):
    """Searches within `threat` for images that the model gets wrong."""

    @property
    def threat(self) -> ThreatModel:
        """What the attacker may do."""

    def __call__(self, model: Model, x_NCHW: Tensor, targets: Tensor, *, keys_N: Tensor) -> Tensor:
        """Adversarial images, same shape as `x_NCHW`, inside the threat model.

        Args:
            model: the function under attack.
            x_NCHW: images in [0, 1]; not changed.
            targets: labels [N], or whatever the attack's objective takes.
            keys_N: one key per sample; the only source of randomness.
        """
