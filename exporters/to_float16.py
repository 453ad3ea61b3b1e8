"""From a float32 ONNX file to half the bytes: weights and arithmetic in float16."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from exporters.to_onnx import ExportError, model_of, save_checked

if TYPE_CHECKING:
    from onnx import ModelProto

LARGEST_FLOAT16 = 65504.0
"""What is larger becomes infinite."""


def write_float16(float32: Path, path: Path, *, metadata: Mapping[str, str]) -> None:
    """Write the float16 form of a float32 file; input and output stay as they are.

    Args:
        float32: what `exporters.to_onnx.write_onnx` wrote.
        path: the new file.
        metadata: what the file says about itself.

    Raises:
        ExportError: if a weight is too large for float16, or the result is refused.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    model = model_of(float32)
    _refuse_large_weights(model)
    sorted_model = OnnxModel(convert_float_to_float16(model, keep_io_types=True))
    sorted_model.topological_sort()  # the converter appends its casts, which onnx refuses
    save_checked(sorted_model.model, path, metadata)


def _refuse_large_weights(model: "ModelProto") -> None:
    """The converter would cut them without a word."""
    import onnx

    for tensor in model.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        largest = float(abs(values).max(initial=0)) if values.dtype.kind == "f" else 0.0
        if largest > LARGEST_FLOAT16:
            raise ExportError(
                f"{tensor.name} holds {largest:g}, and float16 ends at {LARGEST_FLOAT16:g}; use "
                "--precision fp32 or int8"
            )
