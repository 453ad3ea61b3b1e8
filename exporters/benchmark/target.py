"""BenchTarget: something that answers images, what is known about it, and how to open it.

N images, C channels, H and W pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from compressor.onnx_providers import Provider

Images = NDArray[np.float32] | NDArray[np.uint8]
Answer = Callable[[Images], None]
"""Takes images [N, C, H, W] and makes their logits, both as arrays of the host."""
ImageShape = tuple[int, int, int]  # (C, H, W)


@dataclass(frozen=True, kw_only=True)
class BenchTarget:
    """Something that answers images, and how to open it."""

    name: str
    kind: Literal["pytorch", "onnx", "engine"]
    source: str
    """With which `find_targets` finds this target alone, in another process."""
    folder: Path
    """Of its run, or else of the file."""
    precision: str
    sha256: str
    source_sha256: str | None
    """Of the weights that it was made from, where it says so."""
    threat: str | None = None
    """That it claims to withstand, as the text of a `ThreatModel`; None: it does not say."""
    is_stale: bool = False
    """It lies in a run whose network now is another than that which it was made from."""
    num_bytes: int
    image_shape: ImageShape
    takes_bytes: bool = False
    """Pixels are uint8 instead of float32 in [0, 1]."""
    runs_on: str
    is_on_cpu: bool = True
    provider: Provider = "cpu"
    """Of ONNX Runtime, where that runs it."""
    sidecar_sha256: str | None = None
    """By which an engine is trusted."""
    batch_size: int | None = None
    """The only one that it takes; None: any."""
    why_not: str = ""
    """It must not or cannot be run here; then it is not opened."""
    open: Callable[[int], Answer] = field(repr=False, compare=False)
    """From a number of threads; may set that of the process, which `measure` puts back."""

    def images(self, batch_size: int) -> Images:
        """Seeded uniform images of the shape and type that it takes."""
        shape, generator = (batch_size, *self.image_shape), np.random.default_rng(0)
        if self.takes_bytes:
            return generator.integers(0, 256, shape, dtype=np.uint8)
        return generator.random(shape, dtype=np.float32)
