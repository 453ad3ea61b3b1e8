"""Convolutions arranged so that the matrix units of a CPU are busy; what they compute stays.

oneDNN gives the matrix units one row of an image at a time. Rows of few pixels leave most of a tile
empty, so that the last stage of a ResNet costs four times what its products do. And the gradient of
a strided depthwise convolution has no fast kernel in bfloat16: in float32 it is 30 times faster.

N images, C channels, H and W pixels; N = M G with G images side by side.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_MOST_SIDE_BY_SIDE = 16
_CHANNELS_PER_PIXEL = 48
"""Of a row of the result, from where on the copying is paid for; measured with AMX, batch 128."""


class ArrangedConv2d(nn.Conv2d):
    """The same convolution in another order of work where autocast is on; else plainly the same.

    Images become one wide image with columns of zeros between them, where these are narrow and the
    channels many. A strided depthwise convolution computes in float32.
    """

    def __init__(self, like: nn.Conv2d) -> None:
        """With everything that `like` has, whose place it takes."""
        nn.Module.__init__(self)
        vars(self).update(vars(like))
        kernel, stride = like.kernel_size[0], like.stride[0]
        self._is_depthwise_and_strided = 1 < like.in_channels == like.groups and stride > 1
        self._may_be_wide = (
            like.groups == 1
            and like.padding_mode == "zeros"
            and kernel > 1
            and like.kernel_size == (kernel, kernel)
            and like.stride == (stride, stride)
            and like.dilation == (1, 1)
            and like.padding == (kernel // 2, kernel // 2)
            and kernel % 2 == 1
        )

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """See `torch.nn.Conv2d`."""
        if not torch.is_autocast_enabled(x_NCHW.device.type):
            return super().forward(x_NCHW)
        if self._is_depthwise_and_strided:
            return self._in_float32(x_NCHW)
        num_images, _, _, width = x_NCHW.shape
        num_beside = math.gcd(num_images, _MOST_SIDE_BY_SIDE)
        width_out = -(-width // self.stride[0])
        if (
            self._may_be_wide
            and num_beside > 1
            and self.out_channels >= _CHANNELS_PER_PIXEL * width_out
        ):
            return self._side_by_side(x_NCHW, num_beside, width_out)
        return super().forward(x_NCHW)

    def _in_float32(self, x_NCHW: Tensor) -> Tensor:
        device_type = x_NCHW.device.type
        dtype = torch.get_autocast_dtype(device_type)
        with torch.autocast(device_type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            y_NCHW: Tensor = self._conv_forward(x_NCHW.float(), self.weight.float(), bias)
        return y_NCHW.to(dtype)

    def _side_by_side(self, x_NCHW: Tensor, num_beside: int, width_out: int) -> Tensor:
        """Every image has zeros to its left and right as before: its padding or those between."""
        width = x_NCHW.shape[3]
        gap = self.kernel_size[0] // 2
        gap += -(width + gap) % self.stride[0]  # every image begins where a stride does
        x_MGHWC = x_NCHW.permute(0, 2, 3, 1).unflatten(0, (-1, num_beside))  # type: ignore[no-untyped-call]
        wide_MHWC = F.pad(x_MGHWC.transpose(1, 2), (0, 0, 0, gap)).flatten(2, 3)

        wide_MCHW = super().forward(wide_MHWC.permute(0, 3, 1, 2))

        wide_MHWC = wide_MCHW.permute(0, 2, 3, 1)
        y_MHGWC = wide_MHWC.unflatten(2, (num_beside, -1))  # type: ignore[no-untyped-call]
        y_MGHWC = y_MHGWC[:, :, :, :width_out].transpose(1, 2)
        y_NCHW: Tensor = y_MGHWC.flatten(0, 1).permute(0, 3, 1, 2)
        return y_NCHW.contiguous(memory_format=torch.channels_last)  # a view where M is 1


def arrange_convolutions(network: nn.Module) -> None:
    """Let every convolution of `network` be arranged, in place; names and parameters stay."""
    layers = [(name, m) for name, m in network.named_modules() if type(m) is nn.Conv2d]
    for name, layer in layers:
        network.set_submodule(name, ArrangedConv2d(layer))
