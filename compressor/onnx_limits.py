"""What an ONNX file may ask for, looked at before a runtime believes it.

A file of a few kilobytes can ask for terabytes, for a program without end, or for functions nested
so deeply that the runtime crashes. What an image classifier never needs is refused here. Sizes that
the file computes are not known; where they are too large for this machine the runtime fails, which
is an error as well.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from compressor.errors import WeightsError
from compressor.onnx_graph import with_inferred_shapes

if TYPE_CHECKING:
    from onnx import FunctionProto, GraphProto, ModelProto, NodeProto

MAX_FILE_BYTES = 2**31
"""Of one message of protobuf."""
MAX_NODES = 20_000
"""With functions written out. The largest classifiers of torchvision have a few thousand."""
MAX_ELEMENTS = 2**29
"""Of one value at batch size 1, or at the fixed one: 2 GiB in float32."""
MAX_DEPTH = 32
"""Of functions in functions and graphs in graphs."""
_FLOAT16 = 10
_UNBOUNDED = frozenset({"Loop", "Scan"})
_SMALL_BYTES = 4096
"""Constants up to here may be sizes of other values, the others are weights."""

_Key = tuple[str, str, str]
"""Domain, name and overload of a function."""


def refuse_unreasonable(model: "ModelProto", origin: Path) -> None:
    """Refuse a file that no classifier of images looks like.

    Args:
        model: parsed; its weights are taken out of it.
        origin: the file, for messages.

    Raises:
        WeightsError: if it has too many nodes, nests too deeply, loops, or has a value that is too
            large.
    """
    counter = _Counter(functions={_key(function): function for function in model.functions})
    try:
        num_nodes = counter.size(model.graph.node, depth=0).num_nodes
    except _TooDeepError:
        raise WeightsError(
            f"{origin} nests functions or graphs deeper than {MAX_DEPTH} levels, which no image "
            "classifier does; export it again without them"
        ) from None
    if counter.unbounded:
        raise WeightsError(
            f"{origin} uses {', '.join(sorted(counter.unbounded))}, which may never end; export it "
            "again without loops"
        )
    if num_nodes > MAX_NODES:
        raise WeightsError(
            f"{origin} has {num_nodes:.3g} nodes, and {MAX_NODES} are read; no image classifier "
            "needs as many"
        )
    _refuse_large_values(model, origin)


def holds_float16(model: "ModelProto") -> bool:
    """Whether any of its weights is float16."""
    graphs = _all_graphs(model.graph)
    return any(tensor.data_type == _FLOAT16 for graph in graphs for tensor in graph.initializer)


class _TooDeepError(Exception):
    """Functions or graphs are nested without end, or nearly."""


@dataclass(frozen=True, kw_only=True)
class _Size:
    num_nodes: int
    num_levels: int
    """Of functions or graphs inside each other."""


@dataclass(frozen=True, kw_only=True)
class _Counter:
    """Counts nodes as if every call of a function were written out."""

    functions: "Mapping[_Key, FunctionProto]"
    known: "dict[_Key, _Size]" = field(default_factory=dict)
    unbounded: set[str] = field(default_factory=set)

    def size(self, nodes: "Sequence[NodeProto]", *, depth: int) -> _Size:
        if depth > MAX_DEPTH:
            raise _TooDeepError
        if len(nodes) > MAX_NODES:
            return _Size(num_nodes=len(nodes), num_levels=0)
        sizes = [self._of_node(node, depth=depth) for node in nodes]
        num_levels = max((size.num_levels for size in sizes), default=0)
        if depth + num_levels > MAX_DEPTH:
            raise _TooDeepError
        return _Size(num_nodes=sum(size.num_nodes for size in sizes), num_levels=num_levels)

    def _of_node(self, node: "NodeProto", *, depth: int) -> _Size:
        key = (node.domain, node.op_type, node.overload)
        if key in self.functions:
            if key not in self.known:
                inner = self.size(self.functions[key].node, depth=depth + 1)
                self.known[key] = replace(inner, num_levels=inner.num_levels + 1)
            return self.known[key]
        if node.op_type in _UNBOUNDED:
            self.unbounded.add(node.op_type)
        inners = [self.size(graph.node, depth=depth + 1) for graph in _graphs_of(node)]
        return _Size(
            num_nodes=1 + sum(inner.num_nodes for inner in inners),
            num_levels=max((1 + inner.num_levels for inner in inners), default=0),
        )


def _refuse_large_values(model: "ModelProto", origin: Path) -> None:
    for graph in _all_graphs(model.graph):
        for tensor in graph.initializer:
            _refuse_large(tensor.dims, tensor.name, origin)
            if len(tensor.raw_data) > _SMALL_BYTES:
                tensor.ClearField("raw_data")  # only its size is needed from here on
    for graph in _all_graphs(with_inferred_shapes(model).graph):
        for value in (*graph.input, *graph.output, *graph.value_info):
            sides = [side.dim_value for side in value.type.tensor_type.shape.dim]
            _refuse_large(sides, value.name, origin)


def _refuse_large(sides: Sequence[int], name: str, origin: Path) -> None:
    """A side that is not known is 0 here and counts as 1."""
    if math.prod(side for side in sides if side > 0) > MAX_ELEMENTS:
        shape = "x".join(str(side) if side else "any" for side in sides)
        raise WeightsError(
            f"{origin} has a value {name!r} of {shape} numbers, more than the {MAX_ELEMENTS:,} "
            "that are allowed; no image classifier needs as many"
        )


def _all_graphs(graph: "GraphProto") -> "Iterator[GraphProto]":
    yield graph
    for node in graph.node:
        for inner in _graphs_of(node):
            yield from _all_graphs(inner)


def _graphs_of(node: "NodeProto") -> "list[GraphProto]":
    """Branches and bodies."""
    found = []
    for attribute in node.attribute:
        if attribute.HasField("g"):
            found.append(attribute.g)
        found.extend(attribute.graphs)
    return found


def _key(function: "FunctionProto") -> _Key:
    return function.domain, function.name, function.overload
