"""Wide residual networks with pre-activation, in the two layouts of published robust teachers.

Source: Zagoruyko and Komodakis, "Wide Residual Networks" (BMVC 2016).

* `wide_resnet_34_10`: ReLU, names of the TRADES code (Zhang et al., ICML 2019). Its
  checkpoints also hold a `sub_block1` that its forward pass never uses; it is not built here.
* `wide_resnet_70_16` and `wide_resnet_22_6`: Swish, names of DeepMind's code (Gowal et al.,
  "Uncovering the Limits of Adversarial Training against Norm-Bounded Adversarial Examples",
  2020). Convolutions of stride 2 are padded as TensorFlow's "SAME" does: at even sizes only
  on the right and at the bottom. DeepMind's code does that at any size and so cannot take
  odd ones; here odd sizes get TensorFlow's symmetric padding. Their models subtract mean and
  std themselves; here that is preprocessing, outside the network.

Initialisation is PyTorch's default. N images, C channels, H and W pixels, K classes.
"""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from compressor.architectures.parts import (
    has_imagenet_stem,
    scale_channels,
    stem_convolution,
    stem_pooling,
)

STEM_CHANNELS = 16
STAGE_CHANNELS = (16, 32, 64)
"""Before the widening factor that the names carry."""


class TradesBlock(nn.Module):
    """Twice normalise, ReLU and 3x3; the 1x1 shortcut, if any, starts after the first ReLU."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int) -> None:
        super().__init__()
        self.changes_shape = stride != 1 or in_channels != out_channels
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.convShortcut: nn.Module = nn.Identity()
        if self.changes_shape:
            self.convShortcut = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Features [N, out_channels, H / stride, W / stride]."""
        active_NCHW = self.relu1(self.bn1(x_NCHW))
        skipped_NCHW = self.convShortcut(active_NCHW if self.changes_shape else x_NCHW)
        out_NCHW = self.conv2(self.relu2(self.bn2(self.conv1(active_NCHW))))
        return skipped_NCHW + out_NCHW  # type: ignore[no-any-return]


class TradesGroup(nn.Module):
    """The blocks of one stage, under the name `layer`."""

    def __init__(
        self, in_channels: int, out_channels: int, *, num_blocks: int, stride: int
    ) -> None:
        super().__init__()
        blocks = [TradesBlock(in_channels, out_channels, stride=stride)]
        for _ in range(num_blocks - 1):
            blocks.append(TradesBlock(out_channels, out_channels, stride=1))
        self.layer = nn.Sequential(*blocks)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Features [N, out_channels, H / stride, W / stride]."""
        return self.layer(x_NCHW)  # type: ignore[no-any-return]


class TradesWideResNet(nn.Module):
    """Three stages of pre-activation blocks, as in the TRADES code."""

    def __init__(
        self,
        *,
        depth: int,
        widening: int,
        num_classes: int,
        image_shape: tuple[int, int, int],
        width: float,
    ) -> None:
        super().__init__()
        num_blocks = (depth - 4) // 6
        stem = scale_channels(STEM_CHANNELS, width)
        first, second, third = (scale_channels(c * widening, width) for c in STAGE_CHANNELS)
        self.conv1 = stem_convolution(image_shape, stem)
        self.maxpool = stem_pooling(image_shape)
        self.block1 = TradesGroup(stem, first, num_blocks=num_blocks, stride=1)
        self.block2 = TradesGroup(first, second, num_blocks=num_blocks, stride=2)
        self.block3 = TradesGroup(second, third, num_blocks=num_blocks, stride=2)
        self.bn1 = nn.BatchNorm2d(third)
        self.relu = nn.ReLU(inplace=True)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(third, num_classes)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Logits [N, K]."""
        out_NCHW = self.maxpool(self.conv1(x_NCHW))
        out_NCHW = self.block3(self.block2(self.block1(out_NCHW)))
        out_NCHW = self.avgpool(self.relu(self.bn1(out_NCHW)))
        return self.fc(out_NCHW.flatten(1))  # type: ignore[no-any-return]


class SwishBlock(nn.Module):
    """As `TradesBlock`, with Swish and TensorFlow's padding for inputs of `size_hw` pixels."""

    def __init__(
        self, in_channels: int, out_channels: int, *, stride: int, size_hw: tuple[int, int]
    ) -> None:
        super().__init__()
        self.changes_shape = stride != 1 or in_channels != out_channels
        self.padding = same_padding(size_hw, stride=stride)
        self.batchnorm_0 = nn.BatchNorm2d(in_channels)
        self.relu_0 = nn.SiLU()
        self.conv_0 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, bias=False)
        self.batchnorm_1 = nn.BatchNorm2d(out_channels)
        self.relu_1 = nn.SiLU()
        self.conv_1 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut: nn.Module = nn.Identity()
        if self.changes_shape:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Features [N, out_channels, H / stride, W / stride]."""
        active_NCHW = self.relu_0(self.batchnorm_0(x_NCHW))
        skipped_NCHW = self.shortcut(active_NCHW if self.changes_shape else x_NCHW)
        out_NCHW = self.conv_0(F.pad(active_NCHW, self.padding))
        out_NCHW = self.conv_1(self.relu_1(self.batchnorm_1(out_NCHW)))
        return skipped_NCHW + out_NCHW  # type: ignore[no-any-return]


class SwishGroup(nn.Module):
    """The blocks of one stage, under the name `block`; `size_hw` is that of its input."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        num_blocks: int,
        stride: int,
        size_hw: tuple[int, int],
    ) -> None:
        super().__init__()
        blocks = [SwishBlock(in_channels, out_channels, stride=stride, size_hw=size_hw)]
        for _ in range(num_blocks - 1):
            # At stride 1 the padding is the same for every size.
            blocks.append(SwishBlock(out_channels, out_channels, stride=1, size_hw=size_hw))
        self.block = nn.Sequential(*blocks)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Features [N, out_channels, H / stride, W / stride]."""
        return self.block(x_NCHW)  # type: ignore[no-any-return]


class SwishWideResNet(nn.Module):
    """Three stages of Swish blocks, as in DeepMind's code, for images of one size."""

    def __init__(
        self,
        *,
        depth: int,
        widening: int,
        num_classes: int,
        image_shape: tuple[int, int, int],
        width: float,
    ) -> None:
        super().__init__()
        channels = scale_channels(STEM_CHANNELS, width)
        self.init_conv = stem_convolution(image_shape, channels)
        self.maxpool = stem_pooling(image_shape)
        reduction = 4 if has_imagenet_stem(image_shape) else 1
        size_hw = _reduced(image_shape[1:], by=reduction)
        groups = []
        for base, stride in zip(STAGE_CHANNELS, (1, 2, 2), strict=True):
            out_channels = scale_channels(base * widening, width)
            group = SwishGroup(
                channels,
                out_channels,
                num_blocks=(depth - 4) // 6,
                stride=stride,
                size_hw=size_hw,
            )
            groups.append(group)
            channels, size_hw = out_channels, _reduced(size_hw, by=stride)
        self.layer = nn.Sequential(*groups)
        self.batchnorm = nn.BatchNorm2d(channels)
        self.relu = nn.SiLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.logits = nn.Linear(channels, num_classes)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Logits [N, K]."""
        out_NCHW = self.layer(self.maxpool(self.init_conv(x_NCHW)))
        out_NCHW = self.avgpool(self.relu(self.batchnorm(out_NCHW)))
        return self.logits(out_NCHW.flatten(1))  # type: ignore[no-any-return]


def same_padding(size_hw: tuple[int, int], *, stride: int) -> tuple[int, int, int, int]:
    """TensorFlow's "SAME" padding of a 3x3 convolution: left, right, top, bottom, in pixels."""
    sides: list[int] = []
    for size in reversed(size_hw):
        total = max((math.ceil(size / stride) - 1) * stride + 3 - size, 0)
        sides += [total // 2, total - total // 2]
    return sides[0], sides[1], sides[2], sides[3]


def build_wide_resnet_34_10(
    *, num_classes: int, image_shape: tuple[int, int, int], width: float
) -> nn.Module:
    """46,160,474 parameters at 10 classes and 3x32x32."""
    return TradesWideResNet(
        depth=34, widening=10, num_classes=num_classes, image_shape=image_shape, width=width
    )


def build_wide_resnet_70_16(
    *, num_classes: int, image_shape: tuple[int, int, int], width: float
) -> nn.Module:
    """266,796,506 parameters at 10 classes and 3x32x32."""
    return SwishWideResNet(
        depth=70, widening=16, num_classes=num_classes, image_shape=image_shape, width=width
    )


def build_wide_resnet_22_6(
    *, num_classes: int, image_shape: tuple[int, int, int], width: float
) -> nn.Module:
    """9,693,108 parameters at 100 classes and 3x32x32."""
    return SwishWideResNet(
        depth=22, widening=6, num_classes=num_classes, image_shape=image_shape, width=width
    )


def _reduced(size_hw: tuple[int, int], *, by: int) -> tuple[int, int]:
    return math.ceil(size_hw[0] / by), math.ceil(size_hw[1] / by)
