"""Enlarged crops: where they lie, how large they are, and what is in them."""

import math

import numpy as np
import pytest
import torch

from compressor.augmentation import Augmentation
from compressor.randomness import Stream, sample_keys, uniform

SIDE = 12


def enlarged(*, min_area, horizontal_flip=False):
    return Augmentation(
        crop_padding_pixels=0, horizontal_flip=horizontal_flip, min_crop_area=min_area
    )


def keys_of(number):
    return sample_keys(torch.arange(number), seed=0, epoch=0)


def corners(min_area, *, number=4000):
    """Top left and bottom right of every crop, as rows and columns from 0 to 1."""
    ramp = (torch.arange(64).float() * 4).expand(64, 64)
    images = torch.stack([ramp.T, ramp]).to(torch.uint8).expand(number, 2, 64, 64)
    cut = enlarged(min_area=min_area).apply(images, keys_of(number))
    slope = (cut[:, :, 48, 48] - cut[:, :, 16, 16]) / (32 * 4)  # away from the edges
    start = (cut[:, :, 16, 16] / 4 + 0.5) / 64 - slope * (16 + 0.5) / 64
    return start, start + slope


@pytest.mark.parametrize("horizontal_flip", [False, True])
def test_enlarged_crops_are_those_of_a_naive_reference(horizontal_flip):
    images = torch.randint(0, 256, (40, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(1))
    keys = keys_of(40)
    augment = enlarged(min_area=0.1, horizontal_flip=horizontal_flip)
    cut = augment.apply(images.to(torch.uint8), keys)
    draws = {stream: uniform(keys, stream=stream).double().tolist() for stream in Stream}
    for number in range(40):
        area = 0.1 + 0.9 * draws[Stream.CROP_AREA][number]
        widest = min(math.log(4 / 3), -math.log(area))
        aspect = math.exp(widest * (2 * draws[Stream.CROP_ASPECT][number] - 1))
        height, width = math.sqrt(area / aspect), math.sqrt(area * aspect)
        top = draws[Stream.CROP_ROW][number] * (1 - height) * SIDE
        left = draws[Stream.CROP_COLUMN][number] * (1 - width) * SIDE
        expected = bilinear(
            images[number].double().numpy(),
            rows=top + (np.arange(SIDE) + 0.5) * height - 0.5,
            columns=left + (np.arange(SIDE) + 0.5) * width - 0.5,
        )
        if horizontal_flip and draws[Stream.FLIP][number] < 0.5:
            expected = expected[:, :, ::-1]
        np.testing.assert_allclose(cut[number].numpy(), expected, atol=0.02)


def bilinear(image, *, rows, columns):
    rows, columns = np.clip(rows, 0, SIDE - 1), np.clip(columns, 0, SIDE - 1)
    upper = np.minimum(np.floor(rows).astype(int), SIDE - 2)
    left = np.minimum(np.floor(columns).astype(int), SIDE - 2)
    down, right = (rows - upper)[:, None], (columns - left)[None, :]
    return (
        image[:, upper][:, :, left] * (1 - down) * (1 - right)
        + image[:, upper + 1][:, :, left] * down * (1 - right)
        + image[:, upper][:, :, left + 1] * (1 - down) * right
        + image[:, upper + 1][:, :, left + 1] * down * right
    )


def test_areas_are_uniform_and_crops_lie_within_the_image():
    start, end = corners(0.25)
    assert start.min() > -1e-3
    assert end.max() < 1 + 1e-3
    sides = end - start
    areas = sides.prod(dim=1)
    assert areas.min().item() == pytest.approx(0.25, abs=0.01)
    assert areas.max().item() == pytest.approx(1.0, abs=0.01)
    assert areas.mean().item() == pytest.approx(0.625, abs=0.02)
    aspects = sides[:, 1] / sides[:, 0]
    assert aspects.min().item() == pytest.approx(3 / 4, abs=0.02)
    assert aspects.max().item() == pytest.approx(4 / 3, abs=0.03)


def test_half_of_the_images_are_mirrored():
    ramp = torch.arange(SIDE).to(torch.uint8).expand(2000, 1, SIDE, SIDE)
    cut = enlarged(min_area=0.5, horizontal_flip=True).apply(ramp, keys_of(2000))
    is_mirrored = cut[:, 0, 0, 0] > cut[:, 0, 0, -1]
    assert is_mirrored.float().mean().item() == pytest.approx(0.5, abs=0.05)


def test_a_crop_depends_on_its_key_only():
    images = torch.randint(0, 256, (30, 3, SIDE, SIDE), dtype=torch.uint8)
    augment = enlarged(min_area=0.08, horizontal_flip=True)
    whole = augment.apply(images, keys_of(30))
    parts = [augment.apply(images[i : i + 7], keys_of(30)[i : i + 7]) for i in range(0, 30, 7)]
    assert torch.equal(torch.cat(parts), whole)
    assert whole.dtype == torch.float32
