"""Projected gradient descent in the L-infinity ball: training's inner attack, FGSM, PGD."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from compressor.attacks.protocol import Model, Objective
from compressor.losses import cross_entropy
from compressor.randomness import Stream, normal, uniform
from compressor.threat import ThreatModel

Start = Literal["gaussian", "uniform", "zero"]

GAUSSIAN_START_STD_PIXELS = 0.001


@dataclass(frozen=True, kw_only=True)
class PGD:
    """Steps along the sign of the gradient, each projected into the ball and then into [0, 1].

    Source: Madry et al., "Towards deep learning models resistant to adversarial attacks",
    ICLR 2018 (`start="uniform"`). With `start="gaussian"` (standard deviation 0.001) it is the
    inner attack of TRADES, RSLAD, MTARD and B-MTARD; as in their released code the start is
    not clipped before its first forward pass, and the last iterate is returned.
    """

    threat: ThreatModel
    step_size_pixels: float
    num_steps: int
    start: Start = "uniform"
    objective: Objective = cross_entropy

    def __call__(self, model: Model, x_NCHW: Tensor, targets: Tensor, *, keys_N: Tensor) -> Tensor:
        """See `compressor.attacks.protocol.Attack`."""
        x_adv = self._start_from(x_NCHW, keys_N)
        for _ in range(self.num_steps):
            gradient = input_gradient(model, x_adv, targets, objective=self.objective)
            x_adv = x_adv + self.step_size_pixels * gradient.sign()
            x_adv = self.threat.project(x_adv, x_NCHW)
        return x_adv.clamp(0, 1)

    def _start_from(self, x_NCHW: Tensor, keys_N: Tensor) -> Tensor:
        if self.start == "zero":
            return x_NCHW.clone()
        draw = normal if self.start == "gaussian" else uniform
        noise = draw(keys_N, stream=Stream.ATTACK_START, shape=x_NCHW.shape[1:]).to(x_NCHW.dtype)
        if self.start == "gaussian":
            return x_NCHW + GAUSSIAN_START_STD_PIXELS * noise
        return x_NCHW + self.threat.epsilon_pixels * (2 * noise - 1)


def input_gradient(
    model: Model, x_NCHW: Tensor, targets: Tensor, *, objective: Objective
) -> Tensor:
    """Gradient of each example's objective with respect to its image, shape of `x_NCHW`.

    Gradients of parameters are neither computed nor touched.
    """
    with torch.enable_grad():
        x = x_NCHW.detach().requires_grad_(True)  # noqa: FBT003 (torch's signature)
        total = objective(model(x), targets).sum()
        (gradient,) = torch.autograd.grad(total, x)
    return gradient
