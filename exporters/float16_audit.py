"""What a float16 file would do on hardware that computes in float16.

ONNX Runtime computes it in float32 on a CPU, and rounds only the weights, so a value that float16
cannot hold would first be seen on the device.

N images, C channels, H rows, W columns.
"""

import math

import torch
from torch import Tensor, nn

from compressor.onnx_twin import OnnxTwin
from exporters.held_out import BATCH_SIZE
from exporters.to_float16 import LARGEST_FLOAT16


@torch.no_grad()
def overflows(twin: OnnxTwin, x_NCHW: Tensor) -> list[str]:
    """Operators whose answers to some images float16 cannot hold, in words; empty if none.

    Args:
        twin: of the file; it computes in float32.
        x_NCHW: images in [0, 1].
    """
    largest: dict[int, float] = {}
    handles = []
    for place, step in enumerate(twin.steps):

        def note(_: nn.Module, __: object, found: object, *, place: int = place) -> None:
            for value in found if isinstance(found, tuple) else (found,):
                if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
                    reached = float(value.abs().max())
                    worst = max(largest.get(place, 0.0), reached)
                    largest[place] = math.nan if math.isnan(reached) else worst

        handles.append(step.register_forward_hook(note))
    try:
        for part in torch.split(x_NCHW, BATCH_SIZE):
            twin(part)
    finally:
        for handle in handles:
            handle.remove()
    return [
        f"{twin.steps[place].extra_repr()} reaches {reached:.3g}, and float16 ends at "
        f"{LARGEST_FLOAT16:g}"
        for place, reached in sorted(largest.items())
        if not reached <= LARGEST_FLOAT16
    ]
