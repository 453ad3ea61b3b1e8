"""From a float32 ONNX file to 8 bits, in the one form that ONNX Runtime and TensorRT both take.

QuantizeLinear and DequantizeLinear pairs in front of every convolution and linear layer: symmetric
int8, weights with one scale per output channel, activations with one per tensor, biases in float.
Outputs of layers stay in float, so that TensorRT can fuse what follows a convolution into it before
rounding. BatchNorm is already folded into the convolutions by `exporters.to_onnx`.
"""

import contextlib
import io
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from compressor.errors import UsageError
from compressor.quantization import channel_scales, quantized_weights
from exporters.to_onnx import ExportError, model_of, save_checked

if TYPE_CHECKING:
    import numpy
    from onnx import ModelProto
    from onnxruntime.quantization.calibrate import TensorsData

CalibrationMethod = Literal["minmax", "entropy", "percentile"]
CALIBRATION_METHODS: tuple[CalibrationMethod, ...] = ("minmax", "entropy", "percentile")
QUANTIZED_OPERATORS = ("Conv", "Gemm", "MatMul")

_ONNX_FLOAT = 1
_REFUSED = MappingProxyType(
    {
        "distribution": "it is made for 8-bit floats; with int8 it wrecks a model without an error",
        "dynamic": "TensorRT has no dynamic quantisation of convolutions",
        "max": "it is called minmax here",
    }
)
_SETTINGS: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        "minmax": {"symmetric": True},
        # With ONNX Runtime's own 128 bins for 128 levels there is nothing to choose, and entropy
        # would be minmax under another name.
        "entropy": {"symmetric": True, "num_bins": 1024, "num_quantized_bins": 128},
        "percentile": {"symmetric": True, "num_bins": 2048, "percentile": 99.99},
    }
)


_SHORT_ENDS: Mapping[str, str] = MappingProxyType(
    {
        "_DequantizeLinear_Output": "_dq",
        "_QuantizeLinear_Output": "_q",
        "_DequantizeLinear": "_dq",
        "_QuantizeLinear": "_q",
    }
)
"""Of names that ONNX Runtime makes, the longest first."""


def calibration_method(name: str) -> CalibrationMethod:
    """The method of this name.

    Raises:
        UsageError: if there is none that gives a sound int8 model, with the reason.
    """
    for method in CALIBRATION_METHODS:
        if name == method:
            return method
    reason = _REFUSED.get(name, "it is not known")
    raise UsageError(
        f"calibration method {name!r} is refused: {reason}; use {', '.join(CALIBRATION_METHODS)}"
    )


def calibrate(
    float32: Path, batches_NCHW: "Iterable[numpy.ndarray]", *, method: CalibrationMethod
) -> "TensorsData":
    """The range of every tensor that will be rounded.

    Args:
        float32: the file that will be quantised.
        batches_NCHW: training images in the type of its input, a batch at a time; only one batch
            and a histogram of each tensor are in memory.
        method: how a range follows from the values seen.

    Raises:
        ExportError: if there is no image, or a value is not finite.
    """
    from onnxruntime.quantization.calibrate import CalibrationMethod as Methods
    from onnxruntime.quantization.calibrate import create_calibrator

    kinds = {
        "minmax": Methods.MinMax,
        "entropy": Methods.Entropy,
        "percentile": Methods.Percentile,
    }
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        calibrator = create_calibrator(
            float32,
            list(QUANTIZED_OPERATORS),
            augmented_model_path=str(Path(folder) / "augmented.onnx"),
            calibrate_method=kinds[method],
            extra_options=dict(_SETTINGS[method]),
        )
        (image_input,) = calibrator.infer_session.get_inputs()
        num_batches = 0
        for batch_NCHW in _of_size(image_input.shape[0], batches_NCHW):
            calibrator.collect_data(_OneBatch({image_input.name: batch_NCHW}))
            num_batches += 1
        if not num_batches:
            raise ExportError("there are no images to calibrate with")
        return calibrator.compute_data()


def largest_magnitudes(ranges: "TensorsData") -> dict[str, float]:
    """Where the range of each tensor ends, by its name."""
    return {
        name: max(abs(limit.item()) for limit in found.range_value)
        for name, found in ranges.items()
    }


def _of_size(
    batch_size: int | str | None, batches_NCHW: "Iterable[numpy.ndarray]"
) -> "Iterator[numpy.ndarray]":
    """Batches as a file takes them; one that is not full repeats its last image."""
    if not isinstance(batch_size, int):
        yield from batches_NCHW
        return
    for batch_NCHW in batches_NCHW:
        for start in range(0, len(batch_NCHW), batch_size):
            rows = [min(start + row, len(batch_NCHW) - 1) for row in range(batch_size)]
            yield batch_NCHW[rows]


def quantized_layers(float32: Path) -> list[str]:
    """Names of the convolutions and linear layers of a file, in order."""
    graph = model_of(float32).graph
    constants = {tensor.name for tensor in graph.initializer}
    return [
        node.name
        for node in graph.node
        if node.op_type in QUANTIZED_OPERATORS and constants & {*node.input}
    ]


def write_int8(
    float32: Path,
    path: Path,
    ranges: "TensorsData",
    *,
    kept_in_float: Sequence[str] = (),
    metadata: Mapping[str, str],
) -> None:
    """Write the int8 form of a float32 file, checked, as a whole or not at all.

    Args:
        float32: what `exporters.to_onnx.write_onnx` wrote.
        path: the new file.
        ranges: what `calibrate` found.
        kept_in_float: names of layers that are not to be quantised.
        metadata: what the file says about itself.

    Raises:
        ExportError: if the result breaks a rule of TensorRT.
    """
    save_checked(_quantized(float32, ranges, kept_in_float), path, metadata)


def write_fine_tuned(
    int8: Path, path: Path, trained: Mapping[str, Tensor], *, metadata: Mapping[str, str]
) -> None:
    """Write an int8 file again with other weights; its activations keep their scales.

    Args:
        int8: the file whose twin was trained.
        path: the new file.
        trained: weights before rounding, and biases, by the name of the constant.
        metadata: what the file says about itself.
    """
    from onnx import numpy_helper

    model = model_of(int8)
    places = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type != "DequantizeLinear" or node.input[0] not in trained:
            continue
        latent = trained[node.input[0]]
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        scale_K = channel_scales(latent, axis=axis)
        rounded = quantized_weights(latent, scale_K, axis=axis)
        for name, value in ((node.input[0], rounded), (node.input[1], scale_K)):
            places[name].CopyFrom(numpy_helper.from_array(value.numpy(), name))
    for name, value in trained.items():
        if places[name].data_type == _ONNX_FLOAT:
            places[name].CopyFrom(numpy_helper.from_array(value.numpy(), name))
    save_checked(model, path, metadata)


def _quantized(float32: Path, ranges: "TensorsData", kept_in_float: Sequence[str]) -> "ModelProto":
    from onnxruntime.quantization import QDQQuantizer, QuantType

    layers = quantized_layers(float32)
    quantizer = QDQQuantizer(
        model_of(float32),
        per_channel=True,
        reduce_range=False,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QInt8,
        tensors_range=ranges,
        nodes_to_quantize=[name for name in layers if name not in kept_in_float],
        nodes_to_exclude=list(kept_in_float),
        op_types_to_quantize=list(QUANTIZED_OPERATORS),
        extra_options={
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "QuantizeBias": False,
            "OpTypesToExcludeOutputQuantization": list(QUANTIZED_OPERATORS),
        },
    )
    quantizer.quantize_model()
    quantizer.model.topological_sort()
    model: ModelProto = quantizer.model.model
    # It stamps the domains of all operators that it could have used.
    used = {node.domain for node in model.graph.node} | {""}
    kept = [entry for entry in model.opset_import if entry.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(kept)
    _shorten(model)
    return model


def _shorten(model: "ModelProto") -> None:
    """Long names and shapes of what is gone are 3 % of a float32 file with many small layers."""
    del model.graph.value_info[:]
    for node in model.graph.node:
        node.name = _short(node.name)
        for names in (node.input, node.output):
            names[:] = [_short(name) for name in names]


def _short(name: str) -> str:
    for long, short in _SHORT_ENDS.items():
        if name.endswith(long):
            return name.removesuffix(long) + short
    return name


class _OneBatch:
    """A calibration reader of ONNX Runtime that holds one batch."""

    def __init__(self, inputs: "dict[str, numpy.ndarray]") -> None:
        self._inputs: dict[str, numpy.ndarray] | None = inputs

    def get_next(self) -> "dict[str, numpy.ndarray] | None":
        inputs, self._inputs = self._inputs, None
        return inputs
