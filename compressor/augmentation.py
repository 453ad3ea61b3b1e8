"""Random crops and flips of a whole batch at once, on the device that holds it.

B images, C channels, H rows, W columns.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from compressor.randomness import Stream, uniform
from compressor.recipe import DataRecipe

_WIDEST_ASPECT = 4 / 3


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What is done to each training image at random."""

    crop_padding_pixels: int
    """Pad with this much black on each side, then cut out the original size; 0 for nothing."""
    horizontal_flip: bool
    """Mirror every second image, left to right."""
    min_crop_area: float | None = None
    """In place of that: cut out at least this fraction of the image, and enlarge it again."""

    @classmethod
    def of(cls, recipe: DataRecipe) -> "Augmentation":
        """What the recipe asks for."""
        return cls(
            crop_padding_pixels=recipe.crop_padding_pixels,
            horizontal_flip=recipe.horizontal_flip,
            min_crop_area=recipe.min_crop_area,
        )

    def apply(self, images_BCHW: Tensor, keys_B: Tensor) -> Tensor:
        """The images changed, [B, C, H, W].

        What happens to an image depends on its key only.

        Args:
            images_BCHW: uint8.
            keys_B: int64 keys of the samples in this epoch, on the same device.

        Returns:
            Pixels from 0 to 255: uint8, or float32 where crops are enlarged.
        """
        if self.horizontal_flip:
            is_flipped_B = uniform(keys_B, stream=Stream.FLIP) < 0.5
        else:
            is_flipped_B = torch.zeros_like(keys_B, dtype=torch.bool)
        if self.min_crop_area is None:
            return _padded_crop(
                images_BCHW, keys_B, is_flipped_B, padding_pixels=self.crop_padding_pixels
            )
        return _resized_crop(images_BCHW, keys_B, is_flipped_B, min_area=self.min_crop_area)


def _padded_crop(
    images_BCHW: Tensor, keys_B: Tensor, is_flipped_B: Tensor, *, padding_pixels: int
) -> Tensor:
    num_images, _, height, width = images_BCHW.shape
    device = images_BCHW.device
    rows_BH = torch.arange(height, device=device).repeat(num_images, 1)
    columns_BW = torch.arange(width, device=device).repeat(num_images, 1)
    columns_BW = torch.where(is_flipped_B[:, None], columns_BW.flip(1), columns_BW)
    rows_BH = rows_BH + _offsets(keys_B, stream=Stream.CROP_ROW, padding_pixels=padding_pixels)
    columns_BW = columns_BW + _offsets(
        keys_B, stream=Stream.CROP_COLUMN, padding_pixels=padding_pixels
    )
    padded_BCHW = F.pad(images_BCHW, (padding_pixels,) * 4)
    image_B = torch.arange(num_images, device=device)
    padded_BHWC = padded_BCHW.permute(0, 2, 3, 1)  # so that the pixels below stay together
    cut_BHWC = padded_BHWC[image_B[:, None, None], rows_BH[:, :, None], columns_BW[:, None, :]]
    return cut_BHWC.permute(0, 3, 1, 2)


def _offsets(keys_B: Tensor, *, stream: Stream, padding_pixels: int) -> Tensor:
    """Where the cut begins in the padded image, int64 [B, 1], from 0 to 2 * padding_pixels."""
    return (uniform(keys_B, stream=stream) * (2 * padding_pixels + 1)).long()[:, None]


def _resized_crop(
    images_BCHW: Tensor, keys_B: Tensor, is_flipped_B: Tensor, *, min_area: float
) -> Tensor:
    """The crop that trains networks on ImageNet (Szegedy et al., CVPR 2015), for a whole batch.

    Where an aspect does not fit into the image a narrower one is drawn, not another area, so each
    image takes one draw.
    """
    draws_4B = torch.stack(
        [
            uniform(keys_B, stream=stream)
            for stream in (
                Stream.CROP_AREA,
                Stream.CROP_ASPECT,
                Stream.CROP_ROW,
                Stream.CROP_COLUMN,
            )
        ]
    )
    log_area_B = torch.log(min_area + (1 - min_area) * draws_4B[0])
    widest_B = torch.clamp(-log_area_B, max=math.log(_WIDEST_ASPECT))
    log_aspect_B = widest_B * (2 * draws_4B[1] - 1)
    height_B = torch.exp((log_area_B - log_aspect_B) / 2)  # of the whole, as are the offsets below
    width_B = torch.exp((log_area_B + log_aspect_B) / 2)
    row_B = (1 - height_B) * (2 * draws_4B[2] - 1)  # the centre; -1 and 1 are the edges
    column_B = (1 - width_B) * (2 * draws_4B[3] - 1)
    zeros_B = torch.zeros_like(row_B)
    mirrored_B = torch.where(is_flipped_B, -width_B, width_B)
    boxes_B23 = torch.stack(
        [
            torch.stack([mirrored_B, zeros_B, column_B], dim=1),
            torch.stack([zeros_B, height_B, row_B], dim=1),
        ],
        dim=1,
    )
    grid_BHW2 = F.affine_grid(boxes_B23, list(images_BCHW.shape), align_corners=False)
    return F.grid_sample(
        images_BCHW.float().contiguous(memory_format=torch.channels_last),
        grid_BHW2,
        padding_mode="border",
        align_corners=False,
    )
