"""Residual networks of basic blocks: CIFAR ResNet-18 and ResNet-56.

Source: He et al., "Deep Residual Learning for Image Recognition" (CVPR 2016). Parameters
are named as in torchvision's ResNet. ResNet-18 on small images is the student of B-MTARD:
a 3x3 stem and no max-pooling. ResNet-56 is the narrow CIFAR network (16, 32, 64 channels),
here with 1x1 convolutions on the shortcuts, which is the form of the clean CIFAR-10 teacher
of B-MTARD; the paper itself has shortcuts without parameters (855,770 and 853,018
parameters at ten classes). Initialisation is PyTorch's default.

N images, C channels, H and W pixels, K classes.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from compressor.architectures.parts import scale_channels, stem_convolution, stem_pooling

RESNET18_CHANNELS = (64, 128, 256, 512)
RESNET56_CHANNELS = (16, 32, 64)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU(inplace=True)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Features [N, out_channels, H / stride, W / stride]."""
        out_NCHW = self.relu1(self.bn1(self.conv1(x_NCHW)))
        out_NCHW = self.bn2(self.conv2(out_NCHW))
        return self.relu2(out_NCHW + self.downsample(x_NCHW))  # type: ignore[no-any-return]


class ResNet(nn.Module):
    """Stages of basic blocks; every stage but the first halves height and width."""

    def __init__(
        self,
        *,
        stage_channels: Sequence[int],
        blocks_per_stage: int,
        num_classes: int,
        image_shape: tuple[int, int, int],
    ) -> None:
        super().__init__()
        channels = stage_channels[0]
        self.conv1 = stem_convolution(image_shape, channels)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = stem_pooling(image_shape)
        self.stage_names = [f"layer{number}" for number in range(1, len(stage_channels) + 1)]
        for name, out_channels in zip(self.stage_names, stage_channels, strict=True):
            stride = 1 if name == "layer1" else 2
            blocks = [BasicBlock(channels, out_channels, stride=stride)]
            for _ in range(blocks_per_stage - 1):
                blocks.append(BasicBlock(out_channels, out_channels, stride=1))
            self.add_module(name, nn.Sequential(*blocks))
            channels = out_channels
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Logits [N, K]."""
        out_NCHW = self.maxpool(self.relu(self.bn1(self.conv1(x_NCHW))))
        for name in self.stage_names:
            out_NCHW = self.get_submodule(name)(out_NCHW)
        return self.fc(self.avgpool(out_NCHW).flatten(1))  # type: ignore[no-any-return]


def build_resnet18(
    *, num_classes: int, image_shape: tuple[int, int, int], width: float
) -> nn.Module:
    """Four stages of two blocks; 11,173,962 parameters at 10 classes and 3x32x32."""
    return ResNet(
        stage_channels=[scale_channels(channels, width) for channels in RESNET18_CHANNELS],
        blocks_per_stage=2,
        num_classes=num_classes,
        image_shape=image_shape,
    )


def build_resnet56(
    *, num_classes: int, image_shape: tuple[int, int, int], width: float
) -> nn.Module:
    """Three stages of nine blocks; 855,770 parameters at 10 classes and 3x32x32."""
    return ResNet(
        stage_channels=[scale_channels(channels, width) for channels in RESNET56_CHANNELS],
        blocks_per_stage=9,
        num_classes=num_classes,
        image_shape=image_shape,
    )
