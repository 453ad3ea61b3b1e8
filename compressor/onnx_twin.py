"""OnnxTwin: the function of an ONNX file, rebuilt in PyTorch from the very numbers in it.

ONNX Runtime gives no gradient, and a quantised graph hides what it would be. The twin computes the
same thing with the scales and weights of the file, in float32 with straight-through rounding, so an
attacker can follow it; the trainable twin is what quantisation-aware fine-tuning trains.

N images, C channels, H and W pixels, K classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressor.onnx_gradients import refuse_stopped_gradient
from compressor.onnx_graph import NoPlainGraphError, OnnxGraph, OnnxNode
from compressor.onnx_operators import OPERATORS
from compressor.quantization import FakeQuantize, FakeQuantizedWeight

NUM_LEVELS = 255
"""Of a byte above 0."""
_WEIGHTED = {"Conv", "Gemm", "MatMul"}


class _OperatorCall(nn.Module):
    """One node of the file."""

    def __init__(self, node: OnnxNode) -> None:
        super().__init__()
        self.node = node

    def forward(self, *inputs: Tensor | None) -> Any:  # noqa: ANN401 (one tensor or several)
        """See `compressor.onnx_operators`."""
        return OPERATORS[self.node.op](self.node, *inputs)

    def extra_repr(self) -> str:
        """For people."""
        return f"{self.node.op} {self.node.name}"


@dataclass(frozen=True, kw_only=True, eq=False)
class _Step:
    module: nn.Module
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    trains: str | None = None
    """The constant of the file that the module makes, if it is trained."""


class OnnxTwin(nn.Module):
    """Images in [0, 1], float [N, C, H, W] -> logits [N, K], differentiable.

    Made by `differentiable_twin` or `trainable_twin`.
    """

    def __init__(
        self,
        graph: OnnxGraph,
        steps: Sequence[_Step],
        *,
        constants: Mapping[str, Tensor],
        trained_constants: Sequence[str],
        takes_bytes: bool,
    ) -> None:
        super().__init__()
        self._takes_bytes, self._batch_size = takes_bytes, graph.batch_size
        self._input_name, self._output_name = graph.input_name, graph.output_name
        self._values = [(step.inputs, step.outputs) for step in steps]
        self.steps = nn.ModuleList([step.module for step in steps])
        self._trained_steps = {step.trains: n for n, step in enumerate(steps) if step.trains}
        needed = dict.fromkeys(name for step in steps for name in step.inputs if name in constants)
        self.place_of = {name: f"constant_{place}" for place, name in enumerate(needed)}
        """Name of a constant in the file -> name of its tensor here."""
        for name, place in self.place_of.items():
            if name in trained_constants:
                self.register_parameter(place, nn.Parameter(constants[name].clone()))
            else:
                self.register_buffer(place, constants[name], persistent=False)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Logits [N, K]."""
        if self._takes_bytes:
            levels = x_NCHW * NUM_LEVELS
            x_NCHW = levels + (levels.round() - levels).detach()
        if self._batch_size is None:
            return self._answer(x_NCHW)
        num_missing = -len(x_NCHW) % self._batch_size
        filled_NCHW = F.pad(x_NCHW, (0, 0, 0, 0, 0, 0, 0, num_missing))
        parts = torch.split(filled_NCHW, self._batch_size)
        return torch.cat([self._answer(part) for part in parts])[: len(x_NCHW)]

    def _answer(self, x_NCHW: Tensor) -> Tensor:
        values: dict[str, Any] = {"": None, self._input_name: x_NCHW}
        values |= {name: getattr(self, place) for name, place in self.place_of.items()}
        for module, (inputs, outputs) in zip(self.steps, self._values, strict=True):
            found = module(*(values[name] for name in inputs))
            several = found if isinstance(found, tuple) else (found,)
            values.update(zip(outputs, several, strict=False))
        return values[self._output_name]  # type: ignore[no-any-return]

    def trained_constants(self) -> dict[str, Tensor]:
        """What training moved, by the name of the constant in the file.

        Weights as they are before rounding; biases.
        """
        found: dict[str, Tensor] = {}
        for name, place in self._trained_steps.items():
            weight = self.steps[place]
            if isinstance(weight, FakeQuantizedWeight):
                found[name] = weight.latent.detach()
        for name, place_name in self.place_of.items():
            value = getattr(self, place_name)
            if isinstance(value, nn.Parameter):
                found[name] = value.detach()
        return found

    def named_rounders(self) -> dict[str, FakeQuantize]:
        """What rounds activations, by the name of the tensor that it rounds."""
        return {
            inputs[0]: module
            for module, (inputs, _) in zip(self.steps, self._values, strict=True)
            if isinstance(module, FakeQuantize)
        }


def differentiable_twin(graph: OnnxGraph, *, takes_bytes: bool = False) -> OnnxTwin:
    """What an attacker follows; nothing in it can be trained.

    Raises:
        NoPlainGraphError: if an operator is not among those of `compressor.onnx_operators`, the
            gradient stops on the way, or the arithmetic is not symmetric int8.
    """
    return _twin(graph, {}, takes_bytes=takes_bytes).requires_grad_(False)  # noqa: FBT003


def trainable_twin(
    graph: OnnxGraph, float_weights: Mapping[str, Tensor], *, takes_bytes: bool = False
) -> OnnxTwin:
    """A quantised file as a network whose weights and biases can be trained.

    Args:
        graph: of the int8 file; the scales of its activations stay as they are.
        float_weights: what its int8 weights were before rounding, by the name of the constant in
            the int8 file.
        takes_bytes: whether the file takes bytes.

    Raises:
        NoPlainGraphError: as `differentiable_twin`.
    """
    return _twin(graph, float_weights, takes_bytes=takes_bytes)


def _twin(graph: OnnxGraph, latents: Mapping[str, Tensor], *, takes_bytes: bool) -> OnnxTwin:
    _refuse_unknown(graph)
    refuse_stopped_gradient(graph)
    constants = {name: _as_computed(value) for name, value in graph.constants.items()}
    pairs = _rounding_pairs(graph)
    steps: list[_Step] = []
    for node in graph.nodes:
        first, output = node.inputs[0] if node.inputs else "", node.outputs[0]
        if first in latents and node.op == "DequantizeLinear":
            weight = FakeQuantizedWeight(latents[first], axis=node.attributes.get("axis", 1))
            steps.append(_Step(module=weight, inputs=(), outputs=node.outputs, trains=first))
        elif all(name in constants or not name for name in node.inputs):
            constants[output] = _folded(node, [constants.get(name) for name in node.inputs])
        elif output in pairs:
            module = FakeQuantize(float(constants[node.inputs[1]]))
            steps.append(_Step(module=module, inputs=(first,), outputs=(pairs[output],)))
        elif output not in pairs.values():
            call = _OperatorCall(node)
            steps.append(_Step(module=call, inputs=node.inputs, outputs=node.outputs))
    return OnnxTwin(
        graph,
        steps,
        constants=constants,
        trained_constants=_biases(graph, constants) if latents else (),
        takes_bytes=takes_bytes,
    )


def _folded(node: OnnxNode, inputs: Sequence[Tensor | None]) -> Any:  # noqa: ANN401 (one or several)
    """What a node makes of constants, of which a file may have any."""
    try:
        return OPERATORS[node.op](node, *inputs)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise NoPlainGraphError(
            f"operator {node.op} {node.name!r} cannot be computed ({type(error).__name__})"
        ) from error


def _refuse_unknown(graph: OnnxGraph) -> None:
    unknown = sorted({node.op for node in graph.nodes} - OPERATORS.keys())
    if unknown:
        raise NoPlainGraphError(f"it has operators without a derivative here: {', '.join(unknown)}")


def _rounding_pairs(graph: OnnxGraph) -> dict[str, str]:
    """Output of a QuantizeLinear -> output of the DequantizeLinear that is its only reader.

    Both of one symmetric int8 scale, so that one module does both at once.
    """
    readers = graph.consumers()
    pairs = {}
    for node in graph.nodes:
        if node.op != "QuantizeLinear" or node.inputs[0] in graph.constants:
            continue
        reader, *others = readers.get(node.outputs[0], [node])
        if others:
            continue
        step = _scale_and_zero(graph, node)
        is_other_half = reader.op == "DequantizeLinear" and _scale_and_zero(graph, reader) == step
        if step is not None and is_other_half:
            pairs[node.outputs[0]] = reader.outputs[0]
    return pairs


def _scale_and_zero(graph: OnnxGraph, node: OnnxNode) -> tuple[float, int] | None:
    """Of a tensor with one scale and the zero point 0; None for any other."""
    if len(node.inputs) < 3 or not {*node.inputs[1:]} <= graph.constants.keys():
        return None
    scale, zero = (graph.constants[name] for name in node.inputs[1:])
    if scale.numel() != 1 or zero.dtype != torch.int8 or zero.any():
        return None
    return float(scale), 0


def _biases(graph: OnnxGraph, constants: Mapping[str, Tensor]) -> list[str]:
    biased = [node for node in graph.nodes if node.op in _WEIGHTED and len(node.inputs) > 2]
    return [node.inputs[2] for node in biased if node.inputs[2] in constants]


def _as_computed(value: Tensor) -> Tensor:
    """float16 is computed in float32."""
    return value.float() if value.is_floating_point() else value
