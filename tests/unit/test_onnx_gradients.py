"""A file through which no gradient passes has no twin, however well that would answer."""

from pathlib import Path

import numpy as np
import pytest
import torch

from compressor.onnx_gradients import FLOAT_TYPES, refuse_stopped_gradient
from compressor.onnx_graph import NoPlainGraphError, OnnxNode, read_graph
from compressor.onnx_operators import OPERATORS
from compressor.onnx_twin import differentiable_twin
from tests.onnx_files import constant, linear_weight, model_of_nodes, node

WEIGHT = constant("weight", linear_weight())
LOGITS = [node("Flatten", "seen", "flat"), node("MatMul", "flat weight")]
"""Of the value `seen`, [N, 1, 8, 8]."""


def graph_of(nodes, constants=()):
    model = model_of_nodes([*nodes, *LOGITS], [WEIGHT, *constants])
    return read_graph(model.SerializeToString(), Path("some.onnx"))


def cast(kind):
    return [
        node("Mul", "images many", "levels"),
        node("Cast", "levels", "whole", to=kind),
        node("Cast", "whole", "back", to=1),
        node("Div", "back many", "seen"),
    ]


MANY = constant("many", 255.0)
MEAN = [node("ReduceMean", "images", "mean", keepdims=0)]
ONES = constant("ones", np.ones(1, np.float32))
STOPPED = {
    "int64": (cast(7), [MANY], "node 'Cast_whole' (Cast to int64)"),
    "uint8": (cast(2), [MANY], "node 'Cast_whole' (Cast to uint8)"),
    "bool": (cast(9), [MANY], "node 'Cast_whole' (Cast to bool)"),
    "a kind of tomorrow": (cast(99), [MANY], "node 'Cast_whole' (Cast to type 99)"),
    "bounds": (
        [*MEAN, node("Clip", "images _ mean", "seen")],
        [],
        "node 'Clip_seen' (input 3 of Clip depends on the image)",
    ),
    "a constant between bounds of the image": (
        [*MEAN, node("Clip", "half _ mean", "grey"), node("Expand", "grey sizes", "seen")],
        [constant("half", np.full((1, 1, 8, 8), 0.5, np.float32)), constant("sizes", [1, 1, 8, 8])],
        "node 'Clip_grey' (input 3 of Clip depends on the image)",
    ),
    "statistics": (
        [
            node("ReduceMean", "images all", "mean", keepdims=0),
            node("BatchNormalization", "images ones ones mean ones", "seen"),
        ],
        [constant("all", [0, 2, 3]), ONES],
        "node 'BatchNormalization_seen' (input 4 of BatchNormalization depends on the image)",
    ),
    "scales": (
        [
            node("ReduceMean", "images all", "mean", keepdims=0),
            node("Concat", "mean mean mean mean", "scales", axis=0),
            node("Resize", "images _ scales", "seen", mode="linear"),
        ],
        [constant("all", [0, 2, 3])],
        "node 'Resize_seen' (input 3 of Resize depends on the image)",
    ),
    "a side way that hardly counts": (
        [*cast(7)[:3], node("Div", "back many", "steps")]
        + [node("Mul", "images tiny", "whisper"), node("Add", "steps whisper", "seen")],
        [MANY, constant("tiny", 1e-9)],
        "node 'Cast_whole' (Cast to int64)",
    ),
}


@pytest.mark.parametrize(("nodes", "constants", "where"), STOPPED.values(), ids=STOPPED)
def test_where_the_gradient_stops_is_named(nodes, constants, where):
    graph = graph_of(nodes, constants)
    with pytest.raises(NoPlainGraphError) as refusal:
        differentiable_twin(graph)
    assert str(refusal.value) == f"its gradient stops at {where}"


@pytest.mark.parametrize("op", ["Round", "Floor", "Sign", "Where", "Greater", "ArgMax"])
def test_steps_have_no_twin_either(op):
    """They are no operators of twins at all."""
    names = {"Where": "yes images images", "Greater": "images images"}.get(op, "images")
    graph = graph_of([node(op, names, "seen")], [constant("yes", np.ones((), bool))])
    with pytest.raises(NoPlainGraphError, match=f"without a derivative here: {op}"):
        differentiable_twin(graph)


def test_the_number_of_pixels_is_not_the_image():
    """Files compute shapes from those of their input, in whole numbers."""
    nodes = [
        node("Shape", "images", "shape"),
        node("Cast", "shape", "sizes", to=1),
        node("Cast", "sizes", "whole", to=7),
        node("Reshape", "images whole", "seen"),
    ]
    refuse_stopped_gradient(graph_of(nodes))
    x_NCHW = torch.rand(2, 1, 8, 8, requires_grad=True)
    differentiable_twin(graph_of(nodes))(x_NCHW).sum().backward()
    assert x_NCHW.grad.norm() > 0


@pytest.mark.parametrize("kind", FLOAT_TYPES)
def test_a_gradient_passes_from_float_to_float(kind):
    refuse_stopped_gradient(graph_of(cast(kind), [MANY]))


SCALE = torch.full((), 0.1)
SEVERAL = {
    "Add": [(2, 3), (2, 3)],
    "BatchNormalization": [(2, 3, 4, 4), (3,), (3,), torch.zeros(3), torch.ones(3)],
    "Clip": [(2, 3), torch.tensor(-9.0), torch.tensor(9.0)],
    "Concat": [(2, 3), (2, 3)],
    "Conv": [(2, 3, 4, 4), (5, 3, 3, 3), (5,)],
    "Div": [(2, 3), (2, 3)],
    "Gemm": [(2, 3), (3, 4), (4,)],
    "LayerNormalization": [(2, 3), (3,), (3,)],
    "MatMul": [(2, 3), (3, 4)],
    "Mul": [(2, 3), (2, 3)],
    "Pow": [(2, 3), (2, 3)],
    "QuantizeLinear": [(2, 3), SCALE, torch.zeros((), dtype=torch.int8)],
    "Sub": [(2, 3), (2, 3)],
}
"""Shapes of the inputs that a gradient is followed to; other inputs as they are."""


@pytest.mark.parametrize("op", SEVERAL)
def test_every_input_that_is_followed_has_a_gradient(op):
    generator = torch.Generator().manual_seed(0)
    inputs = [
        (torch.rand(given, generator=generator) + 0.5).requires_grad_()
        if isinstance(given, tuple)
        else given
        for given in SEVERAL[op]
    ]
    step = OnnxNode(op=op, name=op, inputs=(), outputs=("y",), attributes={"axis": 1})
    weights = torch.rand(OPERATORS[op](step, *inputs).shape, generator=generator)
    (OPERATORS[op](step, *inputs) * weights).sum().backward()
    for value in inputs:
        if value.requires_grad:
            assert value.grad is not None
            assert value.grad.abs().sum() > 0
