"""Whether a gradient passes through every node of a file that depends on the image.

All operators that have a twin can be computed; at some inputs of some of them PyTorch takes no
gradient. A file that led its images through one of those would answer as its twin, and every attack
that follows the twin would stand still.
"""

from collections.abc import Mapping
from types import MappingProxyType

from compressor.onnx_graph import NoPlainGraphError, OnnxGraph, OnnxNode

FLOAT_TYPES: Mapping[int, str] = MappingProxyType(
    {1: "float", 10: "float16", 11: "double", 16: "bfloat16"}
)
"""By number in onnx.TensorProto."""
_OTHER_TYPES: Mapping[int, str] = MappingProxyType(
    {2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 9: "bool"}
    | {12: "uint32", 13: "uint64"}
)
_NUM_FOLLOWED: Mapping[str, int] = MappingProxyType(
    {
        "BatchNormalization": 3,  # not the statistics
        "Clip": 1,
        "Dropout": 1,
        "Expand": 1,
        "Gather": 1,
        "ReduceMean": 1,
        "Reshape": 1,
        "Resize": 1,
        "Slice": 1,
        "Split": 1,
        "Squeeze": 1,
        "Unsqueeze": 1,
    }
)
"""So many of the first inputs have a gradient; the others are read as plain numbers."""


def refuse_stopped_gradient(graph: OnnxGraph) -> None:
    """Go through the nodes in order, as the gradient does from the image.

    Raises:
        NoPlainGraphError: if what depends on the pixels reaches an input without a gradient.
    """
    of_pixels = {graph.input_name}
    for node in graph.nodes:
        places = [place for place, name in enumerate(node.inputs) if name in of_pixels]
        if not places or node.op == "Shape":  # which depends on the number of pixels only
            continue
        stops = _stops(node, last_place=places[-1])
        if stops:
            raise NoPlainGraphError(f"its gradient stops at node {node.name!r} ({stops})")
        of_pixels.update(node.outputs)


def _stops(node: OnnxNode, *, last_place: int) -> str:
    """What takes no gradient; empty if nothing does."""
    if node.op == "Cast":
        kind = int(node.attributes["to"])
        return "" if kind in FLOAT_TYPES else f"Cast to {_OTHER_TYPES.get(kind, f'type {kind}')}"
    if last_place >= _NUM_FOLLOWED.get(node.op, len(node.inputs)):
        return f"input {last_place + 1} of {node.op} depends on the image"
    return ""
