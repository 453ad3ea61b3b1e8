"""Fake quantisation: 8-bit arithmetic done in float, so that it has a gradient.

Symmetric int8 throughout (zero point 0), which is what ONNX Runtime and TensorRT both compute.
Rounding is half to even, as in ONNX. Its derivative is taken as that of the identity inside the
range and as 0 where the value saturates (straight-through estimator).

Source: Bengio, Leonard, Courville, "Estimating or propagating gradients through stochastic neurons
for conditional computation", 2013; Jacob et al., "Quantization and training of neural networks for
efficient integer-arithmetic-only inference", CVPR 2018.
"""

from typing import Any

import torch
from torch import Tensor, nn

INT8_MIN, INT8_MAX = -128, 127
WEIGHT_MAX = 127
"""Weights use -127 to 127, so that the range is symmetric."""
_SMALLEST_SCALE = 1e-12
"""Of a channel whose weights are all 0."""


class FakeQuantize(nn.Module):
    """Activations [N, ...] rounded to the int8 grid of one scale, which is a plain number."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """Values on the grid, shape and format of `x`."""
        rounded: Tensor = _OnGrid.apply(x, self.scale)
        return rounded

    def extra_repr(self) -> str:
        """For people."""
        return f"scale={self.scale:.3g}"


class FakeQuantizedWeight(nn.Module):
    """A float weight, and what 8 bits make of it, each output channel with a scale of its own."""

    def __init__(self, weight: Tensor, *, axis: int) -> None:
        super().__init__()
        self.latent = nn.Parameter(weight.detach().clone())
        """What the optimiser moves."""
        self.axis = axis
        """Of the output channels."""
        self.zero_K: Tensor
        self.register_buffer("zero_K", torch.zeros(weight.shape[axis]), persistent=False)

    def forward(self) -> Tensor:
        """The weight on its int8 grid, float32; the scales follow the largest weights."""
        return torch.fake_quantize_per_channel_affine(
            self.latent, self.channel_scales(), self.zero_K, self.axis, -WEIGHT_MAX, WEIGHT_MAX
        )

    @torch.no_grad()
    def channel_scales(self) -> Tensor:
        """Size of one step in each of K output channels."""
        return channel_scales(self.latent, axis=self.axis)


def channel_scales(weight: Tensor, *, axis: int) -> Tensor:
    """Scales [K] at which the largest weight of each output channel is 127 steps."""
    others = [place for place in range(weight.dim()) if place != axis]
    return (weight.abs().amax(dim=others) / WEIGHT_MAX).clamp(min=_SMALLEST_SCALE)


def quantized_weights(weight: Tensor, scale_K: Tensor, *, axis: int) -> Tensor:
    """The int8 values of a weight, shape of `weight`, for the scales of its output channels."""
    sizes = [1] * weight.dim()
    sizes[axis] = -1
    return (weight / scale_K.reshape(sizes)).round().clamp(-WEIGHT_MAX, WEIGHT_MAX).to(torch.int8)


def quantize(x: Tensor, scale: Tensor | float) -> Tensor:
    """The quotient rounded to whole steps in int8 range, float of the shape of `x`.

    `scale` must broadcast against `x`. The rounding is straight-through.
    """
    steps: Tensor = _Steps.apply(x, scale)
    return steps


# torch.fake_quantize_per_tensor_affine takes 4 to 9 times as long on a CPU, and multiplies by the
# inverse of the scale, which rounds ties to the other side than the runtimes do.


def _steps(x: Tensor, scale: Tensor | float) -> Tensor:
    """In float32 at least: in bfloat16 the quotient itself would be rounded to half steps."""
    quotient = x.to(torch.promote_types(x.dtype, torch.float32)) / scale
    return quotient.round_().clamp_(INT8_MIN, INT8_MAX)


def _inside(slope: Tensor, x: Tensor, scale: Tensor | float) -> Tensor:
    """The slope where `x` does not saturate, 0 elsewhere."""
    if isinstance(scale, Tensor):
        x, scale = x / scale, 1.0
    low, high = (INT8_MIN - 0.5) * scale, (INT8_MAX + 0.5) * scale
    kept: Tensor = torch.ops.aten.hardtanh_backward(slope, x, low, high)
    return kept


class _Steps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor | float) -> Tensor:  # noqa: ANN401 (torch's)
        ctx.save_for_backward(x)
        ctx.scale = scale
        return _steps(x, scale)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        (x,) = ctx.saved_tensors
        return _inside(slope, x, ctx.scale).to(x.dtype) / ctx.scale, None


class _OnGrid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(x)
        ctx.scale = scale
        return _steps(x, scale).mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        (x,) = ctx.saved_tensors
        return _inside(slope, x, ctx.scale), None
