"""Projected gradient descent: training's inner attack, FGSM, PGD."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from compressor.attacks.gradients import input_gradient
from compressor.attacks.protocol import Model, Objective
from compressor.losses import cross_entropy
from compressor.randomness import Stream, normal, uniform
from compressor.threat import ThreatModel

Start = Literal["gaussian", "uniform", "zero"]

GAUSSIAN_START_STD_PIXELS = 0.001


@dataclass(frozen=True, kw_only=True)
class PGD:
    """Steepest steps of the norm (Linf: the sign), each projected into the ball and into [0, 1].

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
            x_adv = x_adv + self.step_size_pixels * self.threat.steepest(gradient)
            x_adv = self.threat.project(x_adv, x_NCHW)
        return x_adv.clamp(0, 1)

    def _start_from(self, x_NCHW: Tensor, keys_N: Tensor) -> Tensor:
        if self.start == "zero":
            return x_NCHW.clone()
        shape, epsilon = x_NCHW.shape[1:], self.threat.epsilon_pixels
        if self.start == "uniform" and self.threat.norm == "linf":
            noise = uniform(keys_N, stream=Stream.ATTACK_START, shape=shape).to(x_NCHW.dtype)
            return x_NCHW + epsilon * (2 * noise - 1)
        noise = normal(keys_N, stream=Stream.ATTACK_START, shape=shape).to(x_NCHW.dtype)
        if self.start == "gaussian":
            return x_NCHW + GAUSSIAN_START_STD_PIXELS * noise
        # The radius of a uniform point in a ball of d dimensions is u ** (1 / d).
        u_N = uniform(keys_N, stream=Stream.ATTACK_RADIUS).to(x_NCHW.dtype)
        radius = epsilon * u_N ** (1 / shape.numel())
        return x_NCHW + radius.view(-1, 1, 1, 1) * self.threat.steepest(noise)
