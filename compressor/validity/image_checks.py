"""Before all tiers of the validity checks: whether the images are as many as they seem.

N images, C channels, H and W pixels.
"""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

from compressor.reports.report import ValidityRow
from compressor.validity.check import Check

MAX_REPEATED = 0.01
"""Tolerated share: good collections have a few by accident."""

REPEATED_IMAGES = Check(
    name="repeated_images",
    threshold=f"alarm above {100 * MAX_REPEATED:g} %",
    advice="Copies of an image are no further evidence, so the intervals are narrower than what "
    "was seen. Remove the copies from the test images.",
)


def repeated_images(batches: Iterable[Tensor]) -> ValidityRow:
    """How many images [N, C, H, W] in [0, 1] have the 8-bit pixels of an earlier one."""
    seen: set[bytes] = set()
    num_images = 0
    for x_NCHW in batches:
        levels_NCHW = (x_NCHW * 255).round().to(torch.uint8).cpu().contiguous()
        seen.update(hashlib.sha256(image.numpy().tobytes()).digest() for image in levels_NCHW)
        num_images += len(x_NCHW)
    num_repeated = num_images - len(seen)
    return REPEATED_IMAGES.judged(
        f"{num_repeated} of {num_images} images are copies of others",
        is_alarm=num_repeated > MAX_REPEATED * num_images,
    )
