"""Training images from which the ranges of an int8 file are found.

Never test images, and never the held-out ones on which the result is judged.

N images, C channels, H rows, W columns.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

from compressor.data import Batch, TrainingSplit, evaluation_batches
from compressor.onnx_model import as_bytes
from compressor.sample_order import representative_order
from compressor.threat import ThreatModel
from exporters.held_out import BATCH_SIZE, attacked

if TYPE_CHECKING:
    import numpy

CalibrationKind = Literal["clean", "adversarial", "mixed"]
CALIBRATION_KINDS: tuple[CalibrationKind, ...] = ("clean", "adversarial", "mixed")
DEFAULT_NUM_IMAGES = 512


@dataclass(frozen=True, kw_only=True, eq=False)
class CalibrationImages:
    """Images of the training split, attacked or not, a batch at a time."""

    network: nn.Module
    """Against which they are attacked, in eval mode."""
    split: TrainingSplit
    threat: ThreatModel
    num_images: int
    kind: CalibrationKind
    takes_bytes: bool = False

    @property
    def index_sha256(self) -> str:
        """Which images, as little-endian int64 positions in the training images."""
        index_N = self.split.index_N[self._places()]
        return hashlib.sha256(index_N.cpu().numpy().astype("<i8").tobytes()).hexdigest()

    def batches(self) -> "Iterator[numpy.ndarray]":
        """Batches [N, C, H, W] in the type that the file takes; one is in memory at a time."""
        for place, batch in enumerate(
            evaluation_batches(self.split, batch_size=self._batch_size, order_N=self._places())
        ):
            is_attacked = self.kind == "adversarial" or (self.kind == "mixed" and place % 2)
            x_NCHW = self._attacked(batch) if is_attacked else batch.x_NCHW
            yield as_input(x_NCHW, takes_bytes=self.takes_bytes)

    @property
    def _num_chosen(self) -> int:
        return min(self.num_images, self.split.num_images)

    @property
    def _num_batches(self) -> int:
        """At least two, as every second one is attacked where images are mixed."""
        return max(-(-self._num_chosen // BATCH_SIZE), min(2, self._num_chosen))

    @property
    def _batch_size(self) -> int:
        return -(-self._num_chosen // self._num_batches)

    def _places(self) -> Tensor:
        """Every batch is like the whole split, which may have one class after the other."""
        return representative_order(self.split.labels_N, self.split.index_N)[: self._num_chosen]

    def _attacked(self, batch: Batch) -> Tensor:
        return attacked(self.network, batch, threat=self.threat)


def as_input(x_NCHW: Tensor, *, takes_bytes: bool) -> "numpy.ndarray":
    """Images in [0, 1] as the array that a file takes."""
    if takes_bytes:
        x_NCHW = as_bytes(x_NCHW)
    array: numpy.ndarray = x_NCHW.detach().cpu().contiguous().numpy()
    return array
