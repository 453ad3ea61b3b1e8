"""Random crops and flips of a whole batch at once, on the device that holds it.

B images, C channels, H rows, W columns.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from compressor.randomness import Stream, uniform


def crop_and_flip(
    images_BCHW: Tensor, keys_B: Tensor, *, padding_pixels: int, horizontal_flip: bool
) -> Tensor:
    """Cut the original size out of the images with a black border, and mirror half of them.

    What happens to an image depends on its key only.

    Args:
        images_BCHW: Any dtype.
        keys_B: int64 keys of the samples in this epoch, on the same device.
        padding_pixels: Width of the border on each side; 0 for no crop.
        horizontal_flip: Mirror left to right with probability one half.

    Returns:
        [B, C, H, W] in the dtype of the images, channels last in memory.
    """
    num_images, _, height, width = images_BCHW.shape
    device = images_BCHW.device
    rows_BH = torch.arange(height, device=device).repeat(num_images, 1)
    columns_BW = torch.arange(width, device=device).repeat(num_images, 1)
    if horizontal_flip:
        is_flipped_B = uniform(keys_B, stream=Stream.FLIP) < 0.5
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
