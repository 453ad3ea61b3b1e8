"""Golden: images that are replayed wherever a model goes, and what it must answer.

N images, C channels, H and W pixels, K classes.
"""

import io
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from exporters.to_onnx import ExportError

Array = np.ndarray[Any, Any]
_NO_TIME = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Golden:
    """Clean images, adversarial images made of them, and the logits of one or more models.

    Attributes:
        clean_NCHW: of the type that the files take: float32 in [0, 1], or uint8.
        adversarial_NCHW: of the same type.
        labels_N: the true ones, integers.
        clean_logits_NK: by precision, such as int8-mixed.
        adversarial_logits_NK: by precision.
    """

    clean_NCHW: Array
    adversarial_NCHW: Array
    labels_N: Array
    clean_logits_NK: Mapping[str, Array]
    adversarial_logits_NK: Mapping[str, Array]

    def check(
        self,
        *,
        image_shape: tuple[int, ...],
        dtype: str,
        num_classes: int,
        precisions: Sequence[str],
    ) -> None:
        """Refuse arrays that do not fit one another, or the files that they go with.

        Args:
            image_shape: (C, H, W).
            dtype: of the images: float32 or uint8.
            num_classes: K.
            precisions: of the models; there must be logits of each, and of no other.

        Raises:
            ExportError: if one does not fit.
        """
        num_images = len(self.clean_NCHW)
        if not num_images:
            raise ExportError("there are no golden images")
        for images in (self.clean_NCHW, self.adversarial_NCHW):
            _check_images(images, shape=(num_images, *image_shape), dtype=dtype)
        labels = self.labels_N
        if labels.shape != (num_images,) or set(labels.tolist()) - set(range(num_classes)):
            raise ExportError(f"golden labels must be {num_images} numbers below {num_classes}")
        for logits in (self.clean_logits_NK, self.adversarial_logits_NK):
            if sorted(logits) != sorted(precisions):
                raise ExportError(f"golden logits of {sorted(logits)} for files of {precisions}")
            for precision, values in logits.items():
                _check_logits(values, shape=(num_images, num_classes), precision=precision)

    def to_npz(self) -> bytes:
        """As `np.load(allow_pickle=False)` reads it; without the time, which `np.savez` stamps.

        The arrays are clean_NCHW, adversarial_NCHW, labels_N, and for each precision
        PRECISION_clean_NK and PRECISION_adversarial_NK.
        """
        arrays = {
            "clean_NCHW": self.clean_NCHW,
            "adversarial_NCHW": self.adversarial_NCHW,
            "labels_N": self.labels_N.astype(np.int64),
        }
        for precision in sorted(self.clean_logits_NK):
            arrays[f"{precision}_clean_NK"] = self.clean_logits_NK[precision]
            arrays[f"{precision}_adversarial_NK"] = self.adversarial_logits_NK[precision]
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
            for name, array in arrays.items():
                content = io.BytesIO()
                np.lib.format.write_array(content, np.ascontiguousarray(array), allow_pickle=False)
                archive.writestr(zipfile.ZipInfo(f"{name}.npy", _NO_TIME), content.getvalue())
        return buffer.getvalue()


def _check_images(images: Array, *, shape: tuple[int, ...], dtype: str) -> None:
    if images.shape != shape or images.dtype != np.dtype(dtype):
        raise ExportError(
            f"golden images are {images.dtype} {images.shape}, and the files take {dtype} {shape}"
        )
    if dtype != "uint8" and not (images.min() >= 0 and images.max() <= 1):
        raise ExportError("golden images have pixels outside [0, 1]")


def _check_logits(logits: Array, *, shape: tuple[int, ...], precision: str) -> None:
    if logits.shape != shape or logits.dtype.kind != "f" or not np.isfinite(logits).all():
        raise ExportError(
            f"golden logits of {precision} are {logits.dtype} {logits.shape}, or not finite; they "
            f"must be finite floats of shape {shape}"
        )
