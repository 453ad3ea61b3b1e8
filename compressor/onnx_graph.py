"""An ONNX file as a plain value: nodes in order, constants as tensors. Nothing is executed."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compressor.errors import WeightsError

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

_STANDARD_DOMAINS = {"", "ai.onnx"}


class NoPlainGraphError(WeightsError):
    """The file is not one flat graph of standard operators."""


@dataclass(frozen=True, kw_only=True, eq=False)
class OnnxNode:
    """One operator."""

    op: str
    name: str
    inputs: tuple[str, ...]
    """Empty for an optional input that is absent."""
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class OnnxGraph:
    """One input, one output, and what happens between."""

    nodes: tuple[OnnxNode, ...]
    constants: Mapping[str, Tensor] = field(repr=False)
    input_name: str
    output_name: str
    batch_size: int | None = None
    """The only one; None: any."""

    def consumers(self) -> dict[str, list[OnnxNode]]:
        """The nodes that read each value, by its name."""
        found: dict[str, list[OnnxNode]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(node.inputs):
                found.setdefault(name, []).append(node)
        return found


def read_graph(content: bytes, origin: Path) -> OnnxGraph:
    """The graph of a file that ONNX Runtime has already accepted.

    Raises:
        NoPlainGraphError: if it has subgraphs, functions, operators of other domains, constants
            in other files, or more than one input or output.
    """
    model = parse(content, origin)
    graph = model.graph
    constants = {tensor.name: _tensor(tensor, origin) for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in constants]
    if len(inputs) != 1 or len(graph.output) != 1:
        raise NoPlainGraphError(f"{origin} has {len(inputs)} inputs, {len(graph.output)} outputs")
    _refuse_functions(model, origin)
    nodes = []
    for proto in graph.node:
        if proto.op_type == "Constant":
            constants[proto.output[0]] = _constant(proto, origin)
        else:
            nodes.append(_node(proto, origin))
    return OnnxGraph(
        nodes=tuple(nodes),
        constants=constants,
        input_name=inputs[0].name,
        output_name=graph.output[0].name,
        batch_size=inputs[0].type.tensor_type.shape.dim[0].dim_value or None,
    )


def parse(content: bytes, origin: Path) -> "ModelProto":
    """The messages of a file, of whatever it holds.

    Raises:
        WeightsError: if they are not those of ONNX.
    """
    import onnx  # heavy; only where a file is read

    try:
        model: ModelProto = onnx.ModelProto.FromString(content)
    except Exception:  # noqa: BLE001 (protobuf's error has no type that mypy knows)
        raise WeightsError(
            f"{origin} is damaged, or not an ONNX file; copy or export it again"
        ) from None
    return model


def with_inferred_shapes(model: "ModelProto") -> "ModelProto":
    """The model with local functions written out, and the shape of each value that has one.

    Where onnx cannot infer them they are missing.
    """
    import onnx
    import onnx.inliner

    try:
        if model.functions:
            model = onnx.inliner.inline_local_functions(model)
        # With `data_prop` it would itself make as many messages as a vector has places.
        inferred: ModelProto = onnx.shape_inference.infer_shapes(model)
    except Exception:  # noqa: BLE001 (onnx raises whatever it meets; the runtime says what is wrong)
        return model
    return inferred


def _refuse_functions(model: "ModelProto", origin: Path) -> None:
    if model.functions:
        raise NoPlainGraphError(f"{origin} has {len(model.functions)} local functions")


def _node(proto: "NodeProto", origin: Path) -> OnnxNode:
    import onnx

    if proto.domain not in _STANDARD_DOMAINS:
        raise NoPlainGraphError(f"{origin} uses {proto.op_type} of {proto.domain}")
    attributes = {}
    for attribute in proto.attribute:
        value = onnx.helper.get_attribute_value(attribute)
        if isinstance(value, onnx.GraphProto) or attribute.type == onnx.AttributeProto.GRAPHS:
            raise NoPlainGraphError(f"{origin}: {proto.op_type} has a graph inside")
        if isinstance(value, onnx.TensorProto):
            value = _tensor(value, origin)
        attributes[attribute.name] = value.decode() if isinstance(value, bytes) else value
    return OnnxNode(
        op=proto.op_type,
        name=proto.name,
        inputs=tuple(proto.input),
        outputs=tuple(proto.output),
        attributes=attributes,
    )


def _constant(proto: "NodeProto", origin: Path) -> Tensor:
    (value,) = _node(proto, origin).attributes.values()
    return value if isinstance(value, Tensor) else torch.tensor(value)


def _tensor(proto: Any, origin: Path) -> Tensor:  # noqa: ANN401 (a TensorProto)
    import onnx

    if proto.data_location == onnx.TensorProto.EXTERNAL:
        raise NoPlainGraphError(f"{origin} keeps {proto.name} in another file")
    # numpy's array is read-only
    return torch.from_numpy(onnx.numpy_helper.to_array(proto).copy())
