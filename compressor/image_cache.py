"""Decoded images kept on disk, so that a second run need not decode them again.

An entry is named by the hash of what it was decoded from, and carries the hash of what it
holds. An entry that is not exactly right is decoded again.
"""

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

_FORMAT_VERSION = "1"  # raise it when decoding changes
_IMAGES = "images_NCHW"
_LOGGER = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Where decoded images are kept: ROBUST_COMPRESS_CACHE, or below the user's cache folder."""
    if chosen := os.environ.get("ROBUST_COMPRESS_CACHE"):
        return Path(chosen)
    user_cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(user_cache) / "robust-compress"


def cached_images(
    content_sha256: str, decode: Callable[[], NDArray[np.uint8]]
) -> NDArray[np.uint8]:
    """The images with this content, from the cache, or from `decode` and then into the cache.

    A cache that cannot be written costs time, not correctness, so it is only logged.

    Args:
        content_sha256: Hash of everything that decides the result of `decode`.
        decode: Returns uint8 [N, C, H, W].
    """
    path = cache_folder() / f"images-{_FORMAT_VERSION}-{content_sha256}.safetensors"
    images_NCHW = _read_entry(path)
    if images_NCHW is None:
        images_NCHW = decode()
        try:
            _write_entry(path, images_NCHW)
        except OSError as error:
            _LOGGER.warning("decoded images are not cached in %s: %s", path.parent, error)
    return images_NCHW


def _read_entry(path: Path) -> NDArray[np.uint8] | None:
    try:
        with safe_open(path, framework="numpy") as entry:
            images_NCHW: NDArray[np.uint8] = entry.get_tensor(_IMAGES)
            expected = (entry.metadata() or {}).get("sha256")
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError) as error:
        _LOGGER.warning("cached images %s are damaged (%s); decoding again", path, error)
        return None
    if _sha256(images_NCHW) != expected:
        _LOGGER.warning("cached images %s have another hash; decoding again", path)
        return None
    return images_NCHW


def _write_entry(path: Path, images_NCHW: NDArray[np.uint8]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="writing-") as folder:
        unfinished = Path(folder) / path.name
        try:
            save_file({_IMAGES: images_NCHW}, unfinished, {"sha256": _sha256(images_NCHW)})
        except SafetensorError as error:  # what safetensors makes of a full disk
            raise OSError(str(error)) from error
        unfinished.replace(path)


def _sha256(images_NCHW: NDArray[np.uint8]) -> str:
    digest = hashlib.sha256(repr((images_NCHW.dtype.str, images_NCHW.shape)).encode())
    digest.update(np.ascontiguousarray(images_NCHW).data)
    return digest.hexdigest()
