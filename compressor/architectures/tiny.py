"""A network of three convolutions, for demonstrations and tests.

N images, C channels, H and W pixels, K classes.
"""

from torch import Tensor, nn

from compressor.architectures.parts import scale_channels

CHANNELS = (8, 16, 32)


class Tiny(nn.Module):
    """Three of convolution, batch normalisation and ReLU; global pooling; a linear layer."""

    def __init__(
        self, *, num_classes: int, image_shape: tuple[int, int, int], width: float
    ) -> None:
        super().__init__()
        first, second, third = (scale_channels(channels, width) for channels in CHANNELS)
        self.conv1 = nn.Conv2d(image_shape[0], first, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(first, second, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(second)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv3 = nn.Conv2d(second, third, 3, stride=2, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(third)
        self.relu3 = nn.ReLU(inplace=True)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(third, num_classes)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Logits [N, K]."""
        out_NCHW = self.relu1(self.bn1(self.conv1(x_NCHW)))
        out_NCHW = self.relu2(self.bn2(self.conv2(out_NCHW)))
        out_NCHW = self.relu3(self.bn3(self.conv3(out_NCHW)))
        return self.fc(self.avgpool(out_NCHW).flatten(1))  # type: ignore[no-any-return]


def build_tiny(*, num_classes: int, image_shape: tuple[int, int, int], width: float) -> nn.Module:
    """6,418 parameters at 10 classes and 3x32x32."""
    return Tiny(num_classes=num_classes, image_shape=image_shape, width=width)
