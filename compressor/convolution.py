"""Convolutions arranged so that the matrix units of a CPU are busy; what they compute stays.

oneDNN gives the matrix units one row of an image at a time. Rows of few pixels leave most of a tile
empty, so that the last stage of a ResNet costs four times what its products do. And the gradient of
a strided depthwise convolution has no fast kernel in bfloat16: in float32 it is 30 times faster.

N images, C channels, H and W pixels; N = M G with G images side by side.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_MOST_SIDE_BY_SIDE = 16
_CHANNELS_PER_PIXEL, _WHERE_WEIGHTS_LEARN = 48, 24
"""Of a row of the result, from where on the copying is paid for; measured with AMX, batch 128."""


def conv2d(
    x_NCHW: Tensor,
    weight: Tensor,
    bias_C: Tensor | None,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    num_groups: int,
) -> Tensor:
    """As `torch.nn.functional.conv2d`, in another order of work where autocast is on.

    Images become one wide image with columns of zeros between them, where these are narrow and the
    channels many. A strided depthwise convolution has its gradients computed in float32.
    """
    if not torch.is_autocast_enabled(x_NCHW.device.type):
        return F.conv2d(x_NCHW, weight, bias_C, stride, padding, dilation, num_groups)
    if num_groups == len(weight) > 1 and max(stride) > 1:
        y_NCHW: Tensor = _StridedDepthwise.apply(x_NCHW, weight, bias_C, stride, padding, dilation)
        return y_NCHW
    num_beside = math.gcd(len(x_NCHW), _MOST_SIDE_BY_SIDE)
    kernel = weight.shape[2]
    is_centred = kernel > 1 and kernel % 2 == 1 and list(padding) == [kernel // 2] * 2
    is_square = weight.shape[3] == kernel and stride[0] == stride[1]
    width_out = -(-x_NCHW.shape[3] // stride[0])
    per_pixel = _WHERE_WEIGHTS_LEARN if weight.requires_grad else _CHANNELS_PER_PIXEL
    has_enough = num_beside > 1 and len(weight) >= per_pixel * width_out
    if has_enough and is_centred and is_square and max(dilation) == 1 and num_groups == 1:
        return _side_by_side(x_NCHW, weight, bias_C, stride=stride[0], num_beside=num_beside)
    return F.conv2d(x_NCHW, weight, bias_C, stride, padding, dilation, num_groups)


def _side_by_side(
    x_NCHW: Tensor, weight: Tensor, bias_C: Tensor | None, *, stride: int, num_beside: int
) -> Tensor:
    """Every image has zeros to its left and right as before: its padding or those between."""
    width, padding = x_NCHW.shape[3], weight.shape[3] // 2
    gap = padding + -(width + padding) % stride  # every image begins where a stride does
    x_MGHWC = x_NCHW.permute(0, 2, 3, 1).unflatten(0, (-1, num_beside))  # type: ignore[no-untyped-call]
    wide_MHWC = F.pad(x_MGHWC.transpose(1, 2), (0, 0, 0, gap)).flatten(2, 3)

    wide_MCHW = F.conv2d(wide_MHWC.permute(0, 3, 1, 2), weight, bias_C, stride, padding)

    y_MHGWC = wide_MCHW.permute(0, 2, 3, 1).unflatten(2, (num_beside, -1))  # type: ignore[no-untyped-call]
    y_MGHWC = y_MHGWC[:, :, :, : -(-width // stride)].transpose(1, 2)
    y_NCHW: Tensor = y_MGHWC.flatten(0, 1).permute(0, 3, 1, 2)
    return y_NCHW.contiguous(memory_format=torch.channels_last)  # a view where M is 1


class _StridedDepthwise(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917 (torch passes them by position)
        ctx: Any,  # noqa: ANN401 (torch's signature)
        x_NCHW: Tensor,
        weight: Tensor,
        bias_C: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
    ) -> Tensor:
        ctx.save_for_backward(x_NCHW, weight, bias_C)
        ctx.geometry = (stride, padding, dilation)
        return F.conv2d(x_NCHW, weight, bias_C, stride, padding, dilation, len(weight))

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,  # noqa: ANN401
        slope_NCHW: Tensor,
    ) -> tuple[Tensor | None, ...]:
        x_NCHW, weight, bias_C = ctx.saved_tensors
        gradients = torch.ops.aten.convolution_backward(
            slope_NCHW.float(),
            x_NCHW.float(),
            weight.float(),
            None if bias_C is None else bias_C.shape,
            *ctx.geometry,
            False,  # noqa: FBT003 (not transposed)
            (0, 0),
            len(weight),
            ctx.needs_input_grad[:3],
        )
        given = zip(gradients, ctx.saved_tensors, strict=True)
        return (*(None if g is None else g.to(like.dtype) for g, like in given), None, None, None)


class ArrangedConv2d(nn.Conv2d):
    """A layer of `conv2d`; without autocast it is plainly a layer of torch."""

    def __init__(self, like: nn.Conv2d) -> None:
        """With everything that `like` has, whose place it takes."""
        nn.Module.__init__(self)
        vars(self).update(vars(like))

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: A002
        """Between torch's own `forward` and its `conv2d`."""
        if self.padding_mode != "zeros" or isinstance(self.padding, str):
            y_NCHW: Tensor = super()._conv_forward(input, weight, bias)
            return y_NCHW
        return conv2d(
            input,
            weight,
            bias,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            num_groups=self.groups,
        )


def arrange_convolutions(network: nn.Module) -> None:
    """Let every convolution of `network` be arranged, in place; names and parameters stay."""
    layers = [(name, m) for name, m in network.named_modules() if type(m) is nn.Conv2d]
    for name, layer in layers:
        network.set_submodule(name, ArrangedConv2d(layer))
