"""Where the images of a run lie while it runs: on the device, or streamed from their files.

Both storages give the same bytes. N images, B images of a batch, C channels, H rows, W columns.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from compressor.allocator import give_freed_memory_back
from compressor.errors import DataError
from compressor.image_cache import cached_images
from compressor.image_decoding import ImageArray, ImageFiles
from compressor.image_sources import ImageSource
from compressor.performance import num_usable_cores
from compressor.performance_settings import PerformanceSettings
from compressor.ranks import ALONE, Ranks, num_ranks_here_of_environment

_BYTES_PER_MIB = 2**20
_BATCHES_BETWEEN_RETURNS = 16
"""Kept memory falls into pieces, into which blocks of tens of MiB do not fit: up to 5 GiB of it
were seen in an epoch of 20,000 images of 224 pixels."""


class ImageStorage(Protocol):
    """Gives batches of images on the device."""

    def batches(self, positions: Iterable[Tensor]) -> Iterator[Tensor]:
        """For each int64 [B] of positions on the device, uint8 [B, C, H, W] on the device."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ResidentImages:
    """All images as one tensor on the device, channels last so that pixels are read together."""

    images_NHWC: Tensor

    def batches(self, positions: Iterable[Tensor]) -> Iterator[Tensor]:
        """See `ImageStorage`."""
        for position_B in positions:
            yield self.images_NHWC[position_B].permute(0, 3, 1, 2)


@dataclass(frozen=True, kw_only=True, eq=False)
class StreamedImages:
    """Images read by worker processes when they are needed; one worker prepares one batch."""

    images: ImageFiles | ImageArray
    num_workers: int
    device: torch.device

    def batches(self, positions: Iterable[Tensor]) -> Iterator[Tensor]:
        """See `ImageStorage`."""
        batches = list(positions)
        give_freed_memory_back()  # the workers are forked
        flat = iter(torch.cat(batches).tolist()) if batches else iter(())  # one read-back an epoch
        loader = DataLoader(
            _BatchDataset(self.images),
            sampler=[list(islice(flat, len(position_B))) for position_B in batches],
            batch_size=None,
            num_workers=self.num_workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # or it would draw from the global one
        )
        for number, images_BCHW in enumerate(loader):
            if number % _BATCHES_BETWEEN_RETURNS == 0:
                give_freed_memory_back()
            yield images_BCHW.to(self.device, non_blocking=True)


class _BatchDataset(Dataset[Tensor]):
    """Its items are whole batches, and its indices lists of positions."""

    def __init__(self, images: ImageFiles | ImageArray) -> None:
        self._images = images

    def __getitem__(self, positions: list[int]) -> Tensor:
        if not positions:  # of a last batch that is smaller than the number of ranks
            return torch.empty(0, *self._images.image_shape, dtype=torch.uint8)
        return torch.from_numpy(np.stack([self._images.read(position) for position in positions]))


def store_images(
    source: ImageSource,
    *,
    settings: PerformanceSettings,
    device: torch.device,
    ranks: Ranks = ALONE,
) -> ImageStorage:
    """Hold the images on the device if the memory budget allows, else stream them.

    Either way every image has been decoded once on this host before this returns, so that a damaged
    file is found now and not in the middle of a run. Of `ranks`, those of one host share that work;
    none returns before all have done their part.

    Raises:
        DataError: naming the files that cannot be used.
    """
    num_workers = settings.num_workers or _share_of_cores()
    images = source.images
    if source.num_bytes > settings.memory_budget_mib * _BYTES_PER_MIB:
        if isinstance(images, ImageFiles):
            _check_together(images, ranks, num_workers=num_workers)
        return StreamedImages(images=images, num_workers=num_workers, device=device)
    if isinstance(images, ImageArray):
        images_NCHW = images.images_NCHW
    elif settings.cache_images:
        images_NCHW = _cached_once(source, images, ranks, settings=settings)
    else:
        images_NCHW = images.read_all(num_workers=num_workers)
    images_NHWC = torch.from_numpy(images_NCHW).permute(0, 2, 3, 1).contiguous()
    return ResidentImages(images_NHWC=images_NHWC.to(device))


def _check_together(images: ImageFiles, ranks: Ranks, *, num_workers: int) -> None:
    """Each rank of a host decodes its part of the files, and all know what all have found."""
    own = replace(images, names=images.names[ranks.of_this_host().part(len(images))])
    found = ranks.gather(own.problems(num_workers=num_workers))
    # Hosts that read one disk find the same.
    images.refuse(list(dict.fromkeys(problem for problems in found for problem in problems)))


def _cached_once(
    source: ImageSource, images: ImageFiles, ranks: Ranks, *, settings: PerformanceSettings
) -> NDArray[np.uint8]:
    """From the cache, which the first rank of each host fills on all cores while others wait."""

    def load(num_workers: int) -> NDArray[np.uint8]:
        decode = partial(images.read_all, num_workers=num_workers)
        return cached_images(source.content_sha256, decode)

    images_NCHW: NDArray[np.uint8] | None = None
    own_error: DataError | None = None
    if ranks.of_this_host().is_first:
        try:
            images_NCHW = load(settings.num_workers or num_usable_cores())
        except DataError as error:
            own_error = error
    for one in ranks.gather(own_error):
        if one is not None:
            raise one
    if images_NCHW is None:
        return load(settings.num_workers or _share_of_cores())
    return images_NCHW


def _share_of_cores() -> int:
    """Those of this process, if each of the launcher's processes on this host has as many."""
    return max(1, num_usable_cores() // num_ranks_here_of_environment())
