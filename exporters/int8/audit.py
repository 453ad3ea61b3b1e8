"""What can be wrong with an int8 file that runs: rules of TensorRT, scales that do not fit.

N images, K output channels.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.onnx_graph import OnnxGraph, OnnxNode
from compressor.onnx_twin import OnnxTwin
from compressor.quantization import INT8_MAX, FakeQuantize, channel_scales
from exporters.held_out import BATCH_SIZE
from exporters.int8.to_int8 import QUANTIZED_OPERATORS

_MIN_USED_FRACTION = 0.4
"""Of the range of an activation. Ranges found on training images are used to 0.7 and more on
others; half of it unused costs a bit."""
_MAX_SATURATED_FRACTION = 0.05
_HALF_STEP = 0.5001
"""Largest rounding error of a weight, in steps, with room for float32."""
_SCALE_ERROR = 0.01
_SMALLEST_STEP = 1e-12


@dataclass(frozen=True, kw_only=True)
class RangeUse:
    """How an activation fits the 8 bits that it is given."""

    name: str
    used_fraction: float
    """Largest magnitude seen over the largest that fits; above 1: something was cut off."""
    saturated_fraction: float
    """Of its values."""


def broken_rules(graph: OnnxGraph) -> list[str]:
    """What TensorRT would refuse, or ONNX Runtime compute otherwise."""
    found = []
    for node in graph.nodes:
        if node.op not in {"QuantizeLinear", "DequantizeLinear"}:
            continue
        zero = graph.constants.get(node.inputs[2]) if len(node.inputs) > 2 else None
        if zero is None or zero.dtype != torch.int8:
            kind = "no zero point" if zero is None else str(zero.dtype).removeprefix("torch.")
            found.append(f"{node.name} has {kind}; TensorRT takes int8")
        elif bool(zero.any()):
            largest = int(zero.abs().max())
            found.append(f"{node.name} has the zero point {largest}; TensorRT takes 0 only")
    return found


def misfit_weights(graph: OnnxGraph, float_weights: Mapping[str, Tensor]) -> list[str]:
    """Layers whose int8 weights are not the float weights rounded to the nearest step.

    Args:
        graph: of the int8 file.
        float_weights: of its layers, by the name of their node.
    """
    found = []
    makers = {node.outputs[0]: node for node in graph.nodes}
    for node in graph.nodes:
        maker = makers.get(node.inputs[1]) if node.name in float_weights else None
        if maker is not None and maker.op == "DequantizeLinear":
            steps = _error_in_steps(graph, maker, float_weights[node.name])
            if not steps <= _HALF_STEP:
                found.append(f"weights of {node.name} are {steps:.1f} steps from the float weights")
    return found


def misfit_scales(graph: OnnxGraph, largest: Mapping[str, float]) -> list[str]:
    """Activations whose steps are not those of the range that was found for them.

    Args:
        graph: of the int8 file.
        largest: magnitude that the range of each tensor ends at, by its name.
    """
    found = []
    for node in graph.nodes:
        name = node.inputs[0] if node.inputs else ""
        if node.op != "QuantizeLinear" or name not in largest:
            continue
        scale = float(graph.constants[node.inputs[1]].max())
        factor = scale / max(largest[name] / INT8_MAX, _SMALLEST_STEP)
        if not abs(factor - 1) <= _SCALE_ERROR:
            found.append(f"the scale of {name} is {factor:.3g} times that of its calibrated range")
    return found


def layer_weights(graph: OnnxGraph) -> dict[str, Tensor]:
    """The weights of a float file, by the name of their node."""
    return {
        node.name: graph.constants[node.inputs[1]]
        for node in graph.nodes
        if node.op in QUANTIZED_OPERATORS and node.inputs[1] in graph.constants
    }


def _error_in_steps(graph: OnnxGraph, maker: OnnxNode, weight: Tensor) -> float:
    """In steps as they should be, since a coarse one would hide its own error."""
    stored, scale_K = (graph.constants[name] for name in maker.inputs[:2])
    axis = maker.attributes.get("axis", 1)
    sizes = [1] * weight.dim()
    sizes[axis] = -1
    proper = channel_scales(weight, axis=axis).reshape(sizes)
    error = stored.float() * scale_K.reshape(sizes) - weight
    return float((error.abs() / proper).max())


@torch.no_grad()
def range_use(twin: OnnxTwin, x_NCHW: Tensor) -> list[RangeUse]:
    """How the activations of some images fit their 8 bits, in order."""
    largest: dict[str, float] = {}
    saturated: dict[str, list[float]] = {}
    handles = []
    for name, module in twin.named_rounders().items():

        def note(module: FakeQuantize, inputs: tuple[Tensor, ...], *, name: str = name) -> None:
            steps = inputs[0].abs() / module.scale
            largest[name] = max(largest.get(name, 0.0), float(steps.max()) / INT8_MAX)
            saturated.setdefault(name, []).append(float((steps > INT8_MAX + 1).float().mean()))

        handles.append(module.register_forward_pre_hook(note))
    try:
        for part in torch.split(x_NCHW, BATCH_SIZE):
            twin(part)
    finally:
        for handle in handles:
            handle.remove()
    return [
        RangeUse(
            name=name,
            used_fraction=largest[name],
            saturated_fraction=sum(saturated[name]) / len(saturated[name]),
        )
        for name in largest
    ]


def misfit_ranges(uses: list[RangeUse]) -> list[str]:
    """Activations whose scale is too coarse or too fine."""
    found = []
    for use in uses:
        if use.used_fraction < _MIN_USED_FRACTION:
            found.append(
                f"the scale of {use.name} is too coarse: {100 * use.used_fraction:.0f} % of its "
                "range is used"
            )
        if use.saturated_fraction > _MAX_SATURATED_FRACTION:
            found.append(
                f"the scale of {use.name} is too fine: {100 * use.saturated_fraction:.1f} % of its "
                "values are cut off"
            )
    return found


def audit(
    graph: OnnxGraph,
    twin: OnnxTwin | None,
    x_NCHW: Tensor,
    *,
    float_weights: Mapping[str, Tensor],
    largest: Mapping[str, float],
) -> list[str]:
    """Everything that is wrong with an int8 file, in words; empty if nothing is.

    Args:
        graph: of the file.
        twin: of the file; None if its arithmetic is not that of int8 here, which is a broken rule.
        x_NCHW: images that it was not calibrated on.
        float_weights: what its weights were rounded from, by the name of the node.
        largest: magnitude that the range of each tensor ends at, by its name.
    """
    ranges = [] if twin is None else misfit_ranges(range_use(twin, x_NCHW))
    scales = misfit_scales(graph, largest)
    return [*broken_rules(graph), *misfit_weights(graph, float_weights), *scales, *ranges]
