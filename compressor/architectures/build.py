"""From the name of an architecture to a network, and from weights back to the width factor.

C channels, H and W pixels, N images, K classes.
"""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor, nn

from compressor.architectures import mobilenet_v2, resnet, tiny, vision_transformer, wide_resnet
from compressor.architectures.parts import scale_channels
from compressor.errors import RecipeError, WeightsError

TORCHVISION_PREFIX = "torchvision:"
MIN_IMAGE_SIDE = 8
"""Pixels."""


class Builder(Protocol):
    """Builds the network for images (C, H, W), with channels scaled by `width`."""

    def __call__(
        self, *, num_classes: int, image_shape: tuple[int, int, int], width: float
    ) -> nn.Module:
        """The network."""
        ...


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """How to build a network, and which tensors tell its width."""

    build: Builder
    width_tensors: Mapping[str, int] = field(default_factory=dict)
    """Name of a tensor -> its first dimension at width 1; empty where there is no width."""


def _mobilenet_width_tensors() -> dict[str, int]:
    names = {"conv1.weight": mobilenet_v2.STEM_CHANNELS, "conv2.weight": mobilenet_v2.HEAD_CHANNELS}
    position = 0
    for stage in mobilenet_v2.STAGES:
        names[f"layers.{position}.conv3.weight"] = stage.out_channels
        position += stage.num_blocks
    return names


def _resnet_width_tensors(stage_channels: tuple[int, ...]) -> dict[str, int]:
    return {f"layer{i}.0.conv1.weight": base for i, base in enumerate(stage_channels, start=1)}


def _swish_width_tensors(widening: int) -> dict[str, int]:
    stages = enumerate(wide_resnet.STAGE_CHANNELS)
    names = {f"layer.{i}.block.0.conv_0.weight": base * widening for i, base in stages}
    return {"init_conv.weight": wide_resnet.STEM_CHANNELS, **names}


def _trades_width_tensors(widening: int) -> dict[str, int]:
    stages = enumerate(wide_resnet.STAGE_CHANNELS, start=1)
    names = {f"block{i}.layer.0.conv1.weight": base * widening for i, base in stages}
    return {"conv1.weight": wide_resnet.STEM_CHANNELS, **names}


ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "mobilenet_v2": Architecture(
            build=mobilenet_v2.build_mobilenet_v2, width_tensors=_mobilenet_width_tensors()
        ),
        "resnet18": Architecture(
            build=resnet.build_resnet18,
            width_tensors=_resnet_width_tensors(resnet.RESNET18_CHANNELS),
        ),
        "resnet56": Architecture(
            build=resnet.build_resnet56,
            width_tensors=_resnet_width_tensors(resnet.RESNET56_CHANNELS),
        ),
        "tiny": Architecture(
            build=tiny.build_tiny,
            width_tensors={f"conv{i}.weight": base for i, base in enumerate(tiny.CHANNELS, 1)},
        ),
        "vit_6_192": Architecture(
            build=vision_transformer.build_vit_6_192,
            width_tensors={"patches.weight": vision_transformer.TOKEN_FEATURES},
        ),
        "wide_resnet_22_6": Architecture(
            build=wide_resnet.build_wide_resnet_22_6, width_tensors=_swish_width_tensors(6)
        ),
        "wide_resnet_34_10": Architecture(
            build=wide_resnet.build_wide_resnet_34_10, width_tensors=_trades_width_tensors(10)
        ),
        "wide_resnet_70_16": Architecture(
            build=wide_resnet.build_wide_resnet_70_16, width_tensors=_swish_width_tensors(16)
        ),
    }
)
"""Every network of ours. `torchvision:NAME` gives torchvision's classifiers besides."""


def find_architecture(name: str) -> Architecture:
    """The architecture called `name`, one of `ARCHITECTURES` or `torchvision:NAME`.

    Raises:
        RecipeError: if there is none; the message lists the names and the nearest one.
    """
    if name.startswith(TORCHVISION_PREFIX):
        bare = name.removeprefix(TORCHVISION_PREFIX)
        known = _torchvision_names()
        if bare not in known:
            close = difflib.get_close_matches(bare, known, n=3)
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            raise RecipeError(f"torchvision has no classifier {bare!r} that can be used{hint}")
        return Architecture(build=partial(_build_torchvision, bare))
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    close = difflib.get_close_matches(name, ARCHITECTURES, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise RecipeError(
        f"architecture {name!r} is not known; {hint}"
        f"there are: {', '.join(sorted(ARCHITECTURES))}, and torchvision:NAME"
    )


def build_backbone(
    name: str, *, num_classes: int, image_shape: tuple[int, int, int], width: float = 1.0
) -> nn.Module:
    """A network from images [N, C, H, W] to logits [N, K], without preprocessing.

    Args:
        name: one of `ARCHITECTURES`, or `torchvision:NAME`.
        num_classes: K.
        image_shape: (C, H, W), C 1 or 3, H and W at least 8. Up to 64 pixels the network has
            the stem of CIFAR networks, above it that of ImageNet networks.
        width: factor on all numbers of channels, each rounded to at least one.

    Raises:
        RecipeError: if one of these values cannot be.
    """
    architecture = find_architecture(name)
    channels, height, width_pixels = image_shape
    if channels not in (1, 3) or min(height, width_pixels) < MIN_IMAGE_SIDE:
        raise RecipeError(
            f"{name}: images of {_times(image_shape)} cannot be used; 1 or 3 channels and at "
            f"least {MIN_IMAGE_SIDE}x{MIN_IMAGE_SIDE} pixels are needed"
        )
    if num_classes < 2:
        raise RecipeError(f"{name}: a classifier needs at least 2 classes, not {num_classes}")
    if not (math.isfinite(width) and width > 0):
        raise RecipeError(f"{name}: width {width} must be a number above 0")
    return architecture.build(num_classes=num_classes, image_shape=image_shape, width=width)


def infer_width(name: str, state_dict: Mapping[str, Tensor]) -> float:
    """The simplest width factor that gives the channels of the tensors in `state_dict`.

    Any factor that rounds to the same channels builds the same network; among them the one
    with the fewest decimals is taken. 1.0 for `torchvision:NAME`.

    Raises:
        RecipeError: if the architecture is not known.
        WeightsError: if a tensor is missing, or no one factor gives all channels.
    """
    base_channels = find_architecture(name).width_tensors
    if not base_channels:
        return 1.0
    missing = [key for key in base_channels if key not in state_dict]
    if missing:
        raise WeightsError(
            f"these are not weights of {name}: there is no {missing[0]!r} "
            f"(the file begins with {', '.join(list(state_dict)[:3])}); name the right architecture"
        )
    found = [(base, int(state_dict[key].shape[0])) for key, base in base_channels.items()]
    low = max(0.0 if count == 1 else (count - 0.5) / base for base, count in found)
    high = min((count + 0.5) / base for base, count in found)
    for digits in range(13):
        candidate = round((low + high) / 2, digits)
        if all(scale_channels(base, candidate) == count for base, count in found) and candidate:
            return candidate
    listed = ", ".join(f"{count} for {base}" for base, count in found)
    raise WeightsError(f"no width of {name} has the channels of these weights: {listed}")


def _torchvision_names() -> list[str]:
    import torchvision  # here, as it takes more than a second and few networks need it

    # These two have auxiliary outputs, so their answer in training mode is not one tensor.
    names: list[str] = torchvision.models.list_models(module=torchvision.models)
    return [name for name in names if name not in ("googlenet", "inception_v3")]


def _build_torchvision(
    name: str, *, num_classes: int, image_shape: tuple[int, int, int], width: float
) -> nn.Module:
    import torchvision

    if width != 1:
        raise RecipeError(f"torchvision:{name} has no width; remove width = {width}")
    if image_shape[0] != 3:
        raise RecipeError(
            f"torchvision:{name} takes images of 3 channels, not {image_shape[0]}; "
            "set data.num_channels = 3"
        )
    # A pass without data finds out what sizes the network can take.
    with torch.device("meta"), torch.no_grad():
        shadow: nn.Module = torchvision.models.get_model(
            name, weights=None, num_classes=num_classes
        ).eval()
        try:
            shadow(torch.zeros(1, *image_shape))
        except (RuntimeError, AssertionError, ValueError) as error:
            raise RecipeError(
                f"torchvision:{name} cannot take images of {_times(image_shape)} ({error}); set "
                "data.image_size, or resize_to of a teacher, to its size (mostly 224), or use "
                "another network"
            ) from error
    network: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=num_classes)
    return network


def _times(image_shape: tuple[int, int, int]) -> str:
    return "x".join(map(str, image_shape))
