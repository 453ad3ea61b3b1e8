"""Images of one size as uint8 arrays: decoded from files on all cores, or held in memory.

Every file that cannot be used is found in one pass and named in one error. Imports neither
torch nor anything that does, so that decoding processes stay small.

N images, C channels, H rows, W columns; pixels are uint8.
"""

import hashlib
import multiprocessing
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from compressor.errors import DataError

ImageShape = tuple[int, int, int]
"""Channels, rows, columns."""

_PIECE = 256  # files per task: large against the cost of a task, small against a split
_MIN_FILES_FOR_PROCESSES = 2048  # below, starting processes costs more than it saves
_NUM_NAMED = 5
_CHANNELS = {"L": 1, "RGB": 3}
_MODES = {1: "L", 3: "RGB"}
_DEEP_MODES = ("I", "F")  # and I;16 and its kin: conversion to 8 bits would clip, not scale
_PIL_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    Image.DecompressionBombError,
)
_Result = TypeVar("_Result")
Problem = tuple[str, str]
"""Name of the file, what is wrong."""


class _UnusableImageError(Exception):
    """Says what is wrong with one image; becomes a line of a `DataError`."""


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How stored images become arrays; None leaves them as they are."""

    image_size: int | None = None
    """Resize the shorter side to this and crop the centre."""
    num_channels: int | None = None
    """Convert to grey (1) or RGB (3)."""

    def apply(self, image: Image.Image) -> NDArray[np.uint8]:
        """The image as uint8 [C, H, W].

        Raises:
            DataError: if the pixels have a format that this decoding does not turn into 8 bits.
        """
        try:
            return _to_array(image, self)
        except _UnusableImageError as error:
            raise DataError(f"an image cannot be used: {error}") from None


@dataclass(frozen=True, kw_only=True)
class ImageFiles:
    """Images in files, decoded when asked for."""

    folder: Path
    names: tuple[str, ...]
    """Relative to `folder`, with forward slashes."""
    decoding: Decoding
    image_shape: ImageShape
    """What every image must have once decoded."""

    def __len__(self) -> int:
        return len(self.names)

    def read(self, position: int) -> NDArray[np.uint8]:
        """One image, uint8 [C, H, W].

        Raises:
            DataError: if the file cannot be used.
        """
        name = self.names[position]
        try:
            return _read(self, name)
        except _UnusableImageError as error:
            raise _bad_files([(name, str(error))], self.folder) from None

    def read_all(self, *, num_workers: int) -> NDArray[np.uint8]:
        """All images, uint8 [N, C, H, W], decoded by `num_workers` processes.

        Raises:
            DataError: naming the files that cannot be used.
        """
        images_NCHW = np.empty((len(self), *self.image_shape), dtype=np.uint8)
        problems: list[Problem] = []
        start = 0
        for piece_NCHW, found in _map_pieces(_decode_piece, self, num_workers=num_workers):
            problems += found
            if not problems:  # otherwise only the remaining problems are of interest
                images_NCHW[start : start + len(piece_NCHW)] = piece_NCHW
            start += len(piece_NCHW)
        self.refuse(problems)
        return images_NCHW

    def problems(self, *, num_workers: int) -> list[Problem]:
        """Decode everything and keep nothing but the files that cannot be used."""
        pieces = _map_pieces(_check_piece, self, num_workers=num_workers)
        return [problem for found in pieces for problem in found]

    def refuse(self, problems: Sequence[Problem]) -> None:
        """Nothing, if there are none.

        Raises:
            DataError: naming the files that cannot be used.
        """
        if problems:
            raise _bad_files(problems, self.folder)

    def check(self, *, num_workers: int) -> None:
        """Decode everything and keep nothing.

        Raises:
            DataError: naming the files that cannot be used.
        """
        self.refuse(self.problems(num_workers=num_workers))

    def content_sha256(self) -> str:
        """Hash of the bytes of the files in their order, and of the decoding.

        Names do not count: the same images in another folder are the same images.

        Raises:
            DataError: if a file cannot be read.
        """
        digest = hashlib.sha256(repr((self.decoding, self.image_shape)).encode())
        for name in self.names:
            try:
                content = (self.folder / name).read_bytes()
            except OSError as error:
                raise _bad_files([(name, error.strerror or str(error))], self.folder) from None
            digest.update(f"\n{len(content)}\n".encode())
            digest.update(content)
        return digest.hexdigest()


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageArray:
    """Images that are in memory from the start."""

    images_NCHW: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.images_NCHW)

    @property
    def image_shape(self) -> ImageShape:
        """Channels, rows, columns."""
        _, channels, rows, columns = self.images_NCHW.shape
        return channels, rows, columns

    def read(self, position: int) -> NDArray[np.uint8]:
        """One image, uint8 [C, H, W]."""
        image_CHW: NDArray[np.uint8] = self.images_NCHW[position]
        return image_CHW

    def content_sha256(self) -> str:
        """Hash of the shape and the pixels."""
        digest = hashlib.sha256(repr(self.images_NCHW.shape).encode())
        digest.update(np.ascontiguousarray(self.images_NCHW).data)
        return digest.hexdigest()


def image_files(folder: Path, names: Sequence[str], decoding: Decoding) -> ImageFiles:
    """The files, with the shape of the first one that can be decoded.

    Raises:
        DataError: if none of them can be decoded.
    """
    problems = []
    for name in names:
        try:
            channels, rows, columns = _decode(folder / name, decoding).shape
        except _UnusableImageError as error:
            problems.append((name, str(error)))
            continue
        shape = (channels, rows, columns)
        return ImageFiles(folder=folder, names=tuple(names), decoding=decoding, image_shape=shape)
    raise _bad_files(problems, folder)


def _read(files: ImageFiles, name: str) -> NDArray[np.uint8]:
    image_CHW = _decode(files.folder / name, files.decoding)
    have, want = image_CHW.shape, files.image_shape
    if have == want:
        return image_CHW
    if have[0] != want[0]:
        raise _UnusableImageError(
            f"{have[0]} channels where the first image has {want[0]}; "
            "set data.num_channels to convert all images"
        )
    raise _UnusableImageError(
        f"{have[2]}x{have[1]} pixels where the first image has {want[2]}x{want[1]}; "
        "set data.image_size to resize all images"
    )


def _decode(path: Path, decoding: Decoding) -> NDArray[np.uint8]:
    try:
        with Image.open(path) as image:
            return _to_array(image, decoding)
    except UnidentifiedImageError:
        raise _UnusableImageError("is not an image that can be read") from None
    except _PIL_ERRORS as error:
        raise _UnusableImageError(f"is damaged ({error})") from None


def _to_array(image: Image.Image, decoding: Decoding) -> NDArray[np.uint8]:
    if image.mode.startswith(_DEEP_MODES):
        raise _UnusableImageError(f"has pixels of mode {image.mode}; store it with 8 bits")
    if decoding.num_channels is not None:
        image = _with_mode(image, _MODES[decoding.num_channels])
    if image.mode not in _CHANNELS:
        raise _UnusableImageError(
            f"has pixels of mode {image.mode}; set data.num_channels to convert all images"
        )
    if decoding.image_size is not None:
        image = _resize_and_crop(image, decoding.image_size)
    pixels: NDArray[np.uint8] = np.asarray(image, dtype=np.uint8)
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _with_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode == "P":  # a palette may be transparent, which only RGBA keeps without a warning
        image = image.convert("RGBA")
    return image if image.mode == mode else image.convert(mode)


def _resize_and_crop(image: Image.Image, size: int) -> Image.Image:
    shorter = min(image.size)
    width, height = (max(size, round(side * size / shorter)) for side in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _map_pieces(
    task: Callable[[ImageFiles], _Result], files: ImageFiles, *, num_workers: int
) -> Iterator[_Result]:
    """Results of `task` for consecutive pieces of the files, in order."""
    pieces = [
        replace(files, names=files.names[start : start + _PIECE])
        for start in range(0, len(files), _PIECE)
    ]
    if num_workers == 1 or len(files) < _MIN_FILES_FOR_PROCESSES:
        yield from map(task, pieces)
        return
    # Processes, because threads queue for the interpreter lock around each small image.
    with ProcessPoolExecutor(num_workers, mp_context=_fast_context()) as pool:
        yield from pool.map(task, pieces)


def _fast_context() -> Any:  # noqa: ANN401 (the class of a context depends on the platform)
    # Forking takes milliseconds and works from scripts without a main guard. The children use
    # PIL and NumPy only, so threads and devices of the parent do not matter to them.
    return multiprocessing.get_context("fork" if sys.platform == "linux" else None)


def _decode_piece(files: ImageFiles) -> tuple[NDArray[np.uint8], list[Problem]]:
    images_NCHW = np.zeros((len(files), *files.image_shape), dtype=np.uint8)
    problems = []
    for row, name in enumerate(files.names):
        try:
            images_NCHW[row] = _read(files, name)
        except _UnusableImageError as error:
            problems.append((name, str(error)))
    return images_NCHW, problems


def _check_piece(files: ImageFiles) -> list[Problem]:
    return _decode_piece(files)[1]


def _bad_files(problems: Sequence[Problem], folder: Path) -> DataError:
    count = "1 file" if len(problems) == 1 else f"{len(problems)} files"
    lines = [f"  {name}: {problem}" for name, problem in problems[:_NUM_NAMED]]
    if len(problems) > _NUM_NAMED:
        lines.append(f"  and {len(problems) - _NUM_NAMED} more")
    return DataError(
        f"{count} in {folder} cannot be used; repair or remove them\n" + "\n".join(lines)
    )
