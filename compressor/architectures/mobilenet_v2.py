"""MobileNet-V2 in the form that CIFAR work uses.

Source: Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks" (CVPR
2018), as changed in kuangliu's pytorch-cifar, the second student of B-MTARD. Differs from
the paper: ReLU instead of ReLU6; a 1x1 convolution on the shortcut where the stride is 1
and the channels differ; on images up to 64 pixels, stride 1 in the stem and in the second
stage. Parameters are named as there. Initialisation is PyTorch's default.

N images, C channels, H and W pixels, K classes.
"""

from typing import NamedTuple

from torch import Tensor, nn

from compressor.architectures.parts import has_imagenet_stem, scale_channels


class Stage(NamedTuple):
    """One row of table 2 of the paper."""

    expansion: int
    out_channels: int
    num_blocks: int
    stride: int


STEM_CHANNELS = 32
HEAD_CHANNELS = 1280
STAGES = (
    Stage(1, 16, 1, 1),
    Stage(6, 24, 2, 2),
    Stage(6, 32, 3, 2),
    Stage(6, 64, 4, 2),
    Stage(6, 96, 3, 1),
    Stage(6, 160, 3, 2),
    Stage(6, 320, 1, 1),
)


class InvertedResidual(nn.Module):
    """Expand by 1x1, filter each channel by 3x3, project by 1x1; a shortcut at stride 1."""

    def __init__(self, in_channels: int, out_channels: int, *, expansion: int, stride: int) -> None:
        super().__init__()
        hidden = expansion * in_channels
        self.conv1 = nn.Conv2d(in_channels, hidden, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(
            hidden, hidden, 3, stride=stride, padding=1, groups=hidden, bias=False
        )
        self.bn2 = nn.BatchNorm2d(hidden)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv3 = nn.Conv2d(hidden, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.has_shortcut = stride == 1
        self.shortcut: nn.Module = nn.Identity()
        if self.has_shortcut and in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Features [N, out_channels, H / stride, W / stride]."""
        out_NCHW: Tensor = self.relu1(self.bn1(self.conv1(x_NCHW)))
        out_NCHW = self.relu2(self.bn2(self.conv2(out_NCHW)))
        out_NCHW = self.bn3(self.conv3(out_NCHW))
        return out_NCHW + self.shortcut(x_NCHW) if self.has_shortcut else out_NCHW


class MobileNetV2(nn.Module):
    """Stem, seventeen inverted residuals, a 1x1 head, global pooling and a linear layer."""

    def __init__(
        self, *, num_classes: int, image_shape: tuple[int, int, int], width: float
    ) -> None:
        super().__init__()
        is_large = has_imagenet_stem(image_shape)
        channels = scale_channels(STEM_CHANNELS, width)
        self.conv1 = nn.Conv2d(
            image_shape[0], channels, 3, stride=2 if is_large else 1, padding=1, bias=False
        )
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU(inplace=True)
        blocks = []
        for number, stage in enumerate(STAGES):
            out_channels = scale_channels(stage.out_channels, width)
            first_stride = 1 if number == 1 and not is_large else stage.stride
            for stride in [first_stride] + [1] * (stage.num_blocks - 1):
                blocks.append(
                    InvertedResidual(
                        channels, out_channels, expansion=stage.expansion, stride=stride
                    )
                )
                channels = out_channels
        self.layers = nn.Sequential(*blocks)
        head_channels = scale_channels(HEAD_CHANNELS, width)
        self.conv2 = nn.Conv2d(channels, head_channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(head_channels)
        self.relu2 = nn.ReLU(inplace=True)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(head_channels, num_classes)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Logits [N, K]."""
        out_NCHW = self.layers(self.relu1(self.bn1(self.conv1(x_NCHW))))
        out_NCHW = self.relu2(self.bn2(self.conv2(out_NCHW)))
        return self.linear(self.avgpool(out_NCHW).flatten(1))  # type: ignore[no-any-return]


def build_mobilenet_v2(
    *, num_classes: int, image_shape: tuple[int, int, int], width: float
) -> nn.Module:
    """2,296,922 parameters at 10 classes and 3x32x32."""
    return MobileNetV2(num_classes=num_classes, image_shape=image_shape, width=width)
