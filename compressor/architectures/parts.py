"""What several architectures share: channel counts under a width factor, and the stem.

C channels, H and W pixels.
"""

from torch import nn

MAX_SIDE_OF_CIFAR_STEM = 64
"""Pixels. Larger images are reduced by four before the first stage, as on ImageNet."""


def scale_channels(channels: int, width: float) -> int:
    """`channels` times `width`, rounded to a whole number of at least one."""
    return max(1, round(channels * width))


def has_imagenet_stem(image_shape: tuple[int, int, int]) -> bool:
    """Whether images (C, H, W) are so large that the stem has to reduce them."""
    return max(image_shape[1:]) > MAX_SIDE_OF_CIFAR_STEM


def stem_convolution(image_shape: tuple[int, int, int], out_channels: int) -> nn.Conv2d:
    """3x3 of stride 1 for images up to 64 pixels, 7x7 of stride 2 above (He et al. 2016)."""
    if has_imagenet_stem(image_shape):
        return nn.Conv2d(image_shape[0], out_channels, 7, stride=2, padding=3, bias=False)
    return nn.Conv2d(image_shape[0], out_channels, 3, padding=1, bias=False)


def stem_pooling(image_shape: tuple[int, int, int]) -> nn.Module:
    """The 3x3 max-pooling that follows the 7x7 stem; nothing after the 3x3 one."""
    if has_imagenet_stem(image_shape):
        return nn.MaxPool2d(3, stride=2, padding=1)
    return nn.Identity()
