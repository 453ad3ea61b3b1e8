"""Every operator of the twin gives what ONNX Runtime gives, and has a gradient."""

from pathlib import Path

import numpy as np
import onnxruntime  # noqa: TID253 (the reference)
import pytest
import torch

from compressor.onnx_graph import NoPlainGraphError, read_graph
from compressor.onnx_operators import OPERATORS
from compressor.onnx_twin import differentiable_twin
from tests.onnx_files import constant, model_of_nodes, node, value

RANDOM = np.random.default_rng(0)
VECTOR = np.array([0.5, -1.0, 2.0], np.float32)


def case(op, inputs="images", *constants, **attributes):
    """One operator on the images [N, 3, 8, 8]."""
    return [node(op, inputs, **attributes)], constants


def then(first, *nodes, constants=()):
    """More operators before `first`, which names its inputs."""
    return [*nodes, *first[0]], [*first[1], *constants]


def filled(name, *shape):
    return constant(name, RANDOM.normal(size=shape))


def positive(name, *shape):
    return constant(name, RANDOM.uniform(0.5, 2, size=shape))


FLAT = node("Flatten", "images", "flat")
SIDE = constant("side", VECTOR.reshape(3, 1, 1))
WEIGHT = filled("w", 4, 3, 3, 3)
SCALE, ZERO = constant("scale", 0.01), constant("zero", np.int8(0))
SCALE_3, ZERO_3 = constant("scale", [0.01, 0.02, 0.05]), constant("zero", np.zeros(3, np.int8))
NORM = [positive("w", 3), filled("b", 3), filled("m", 3), positive("v", 3)]

CASES = {
    "Add": case("Add", "images side", SIDE),
    "AveragePool": case("AveragePool", kernel_shape=[2, 2]),
    "AveragePool, padded": case(
        "AveragePool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]
    ),
    "AveragePool, counting the padding": case(
        "AveragePool", kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1
    ),
    "AveragePool, last ones too": case(
        "AveragePool", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1
    ),
    "BatchNormalization": case("BatchNormalization", "images w b m v", *NORM),
    "BatchNormalization, epsilon": case("BatchNormalization", "images w b m v", *NORM, epsilon=0.1),
    "Cast": then(case("Cast", "half", to=1), node("Cast", "images", "half", to=10)),
    "Cast, whole": then(
        case("Cast", "whole", to=1),
        node("Shape", "images", "shape"),
        node("Cast", "shape", "sizes", to=1),
        node("Div", "sizes nine", "parts"),
        node("Cast", "parts", "whole", to=7),
        constants=[constant("nine", 9.0)],
    ),
    "Clip": case("Clip", "images low high", constant("low", 0.2), constant("high", 0.7)),
    "Clip, below": case("Clip", "images low", constant("low", 0.4)),
    "Concat": case("Concat", "images images", axis=1),
    "Conv": case("Conv", "images w", WEIGHT),
    "Conv, bias": case("Conv", "images w b", WEIGHT, filled("b", 4), pads=[1, 1, 1, 1]),
    "Conv, one side padded": case("Conv", "images w", WEIGHT, pads=[0, 0, 1, 1], strides=[2, 2]),
    "Conv, groups": case("Conv", "images w", filled("w", 3, 1, 3, 3), group=3),
    "Conv, dilated": case("Conv", "images w", WEIGHT, dilations=[2, 2]),
    "DequantizeLinear": then(
        case("DequantizeLinear", "steps scale zero", SCALE, ZERO),
        node("QuantizeLinear", "images scale zero", "steps"),
    ),
    "DequantizeLinear, per channel": then(
        case("DequantizeLinear", "steps scale zero", SCALE_3, ZERO_3),
        node("QuantizeLinear", "images scale zero", "steps"),
    ),
    "DequantizeLinear, of a weight": then(
        case("Conv", "images w"),
        node("DequantizeLinear", "steps scale zero", "w", axis=0),
        constants=[
            constant("steps", RANDOM.integers(-127, 128, (3, 3, 3, 3)).astype(np.int8)),
            SCALE_3,
            ZERO_3,
        ],
    ),
    "Div": case("Div", "images side", SIDE),
    "Dropout": case("Dropout"),
    "Elu": case("Elu", alpha=0.5),
    "Erf": case("Erf"),
    "Exp": case("Exp"),
    "Expand": case("Expand", "images shape", constant("shape", [1, 3, 8, 8])),
    "Expand, to more": then(
        case("Expand", "pooled shape", constant("shape", [3, 1, 1, 1, 5])),
        node("GlobalAveragePool", "images", "pooled"),
    ),
    "Flatten": case("Flatten"),
    "Gather": case("Gather", "images index", constant("index", [2, 0]), axis=1),
    "Gather, one": case("Gather", "images index", constant("index", 1), axis=3),
    "Gelu": case("Gelu"),
    "Gelu, tanh": case("Gelu", approximate="tanh"),
    "Gemm": then(case("Gemm", "flat w", filled("w", 192, 5)), FLAT),
    "Gemm, transposed": then(
        case("Gemm", "flat w b", filled("w", 5, 192), filled("b", 5), transB=1), FLAT
    ),
    "Gemm, scaled": then(
        case("Gemm", "flat w b", filled("w", 192, 5), filled("b", 5), alpha=0.5, beta=2.0), FLAT
    ),
    "GlobalAveragePool": case("GlobalAveragePool"),
    "HardSigmoid": case("HardSigmoid"),
    "HardSigmoid, as in MobileNet": case("HardSigmoid", alpha=1 / 6, beta=0.5),
    "HardSwish": case("HardSwish"),
    "Identity": case("Identity"),
    "LayerNormalization": case(
        "LayerNormalization", "images w b", filled("w", 8), filled("b", 8), axis=-1
    ),
    "LayerNormalization, no bias": case(
        "LayerNormalization", "images w", filled("w", 8), axis=-1, epsilon=0.1
    ),
    "LeakyRelu": case("LeakyRelu", alpha=0.2),
    "MatMul": case("MatMul", "images w", filled("w", 8, 5)),
    "MatMul, of two": case("MatMul", "images images"),
    "MaxPool": case("MaxPool", kernel_shape=[2, 2], strides=[2, 2]),
    "MaxPool, padded": case("MaxPool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
    "MaxPool, one side padded": case("MaxPool", kernel_shape=[2, 2], pads=[0, 0, 1, 1]),
    "MaxPool, last ones too": case("MaxPool", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1),
    "Mul": case("Mul", "images side", SIDE),
    "Neg": case("Neg"),
    "Pow": then(
        case("Pow", "positive three", constant("three", 3.0)), node("Exp", "images", "positive")
    ),
    "QuantizeLinear": then(
        case("Cast", "steps", SCALE, ZERO, to=1),
        node("QuantizeLinear", "images scale zero", "steps"),
    ),
    "QuantizeLinear, per channel": then(
        case("Cast", "steps", SCALE_3, ZERO_3, to=1),
        node("QuantizeLinear", "images scale zero", "steps", axis=1),
    ),
    "ReduceMean": case("ReduceMean", "images axes", constant("axes", [-1, -2])),
    "ReduceMean, flat": case("ReduceMean", "images axes", constant("axes", [2, 3]), keepdims=0),
    "Relu": case("Relu"),
    "Reshape": case("Reshape", "images shape", constant("shape", [0, -1])),
    "Resize": case("Resize", "images _ scales", constant("scales", [1.0, 1, 2, 2]), mode="linear"),
    "Resize, to sizes": then(
        case("Resize", "images _ _ sizes", mode="linear"),
        constants=[constant("sizes", [2, 3, 5, 12])],
    ),
    "Resize, of pytorch": case(
        "Resize",
        "images _ scales",
        constant("scales", [1.0, 1, 1.5, 1.5]),
        mode="linear",
        coordinate_transformation_mode="pytorch_half_pixel",
    ),
    "Shape": then(case("Cast", "shape", to=1), node("Shape", "images", "shape")),
    "Shape, part": then(
        case("Cast", "shape", to=1), node("Shape", "images", "shape", start=1, end=3)
    ),
    "Shape, the end": then(case("Cast", "shape", to=1), node("Shape", "images", "shape", start=-2)),
    "Sigmoid": case("Sigmoid"),
    "Slice": case(
        "Slice",
        "images starts ends axes steps",
        constant("starts", [1, 0]),
        constant("ends", [2**62, -1]),
        constant("axes", [1, 3]),
        constant("steps", [1, 2]),
    ),
    "Slice, first axes": case(
        "Slice", "images starts ends", constant("starts", [0, 1]), constant("ends", [9, 3])
    ),
    "Softmax": case("Softmax", axis=1),
    "Softmax, last axis": case("Softmax"),
    "Split": then(
        case("Sub", "left right"), node("Split", "images", "left right", axis=3, num_outputs=2)
    ),
    "Split, by sizes": then(
        case("Concat", "right left", axis=1),
        node("Split", "images sizes", "left right", axis=1),
        constants=[constant("sizes", [1, 2])],
    ),
    "Sqrt": then(case("Sqrt", "positive"), node("Exp", "images", "positive")),
    "Squeeze": then(
        case("Squeeze", "pooled axes", constant("axes", [2, -1])),
        node("GlobalAveragePool", "images", "pooled"),
    ),
    "Sub": case("Sub", "side images", SIDE),
    "Tanh": case("Tanh"),
    "Transpose": case("Transpose", perm=[0, 2, 3, 1]),
    "Transpose, reversed": case("Transpose"),
    "Unsqueeze": case("Unsqueeze", "images axes", constant("axes", [1, 3])),
}
"""Nodes and constants, by the operator and what is special."""


def images(num_images=2):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(num_images, 3, 8, 8, generator=generator) * 2 - 0.7


def file_of(nodes, constants):
    shapes = {"inputs": [value("images", ["N", 3, 8, 8])], "outputs": [value("logits", None)]}
    return model_of_nodes(nodes, constants, **shapes).SerializeToString()


def answer_of_runtime(content, x_NCHW):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": x_NCHW.numpy()})[0])


def twin_of(content):
    return differentiable_twin(read_graph(content, Path("some.onnx")))


@pytest.mark.parametrize(("nodes", "constants"), CASES.values(), ids=CASES)
def test_operator_gives_what_the_runtime_gives(nodes, constants):
    content, x_NCHW = file_of(nodes, constants), images().requires_grad_()
    expected = answer_of_runtime(content, x_NCHW.detach())
    found = twin_of(content)(x_NCHW)
    is_half = any(n.op_type == "Cast" and n.attribute[0].i == 10 for n in nodes)
    error = 1e-3 if is_half else 1e-5  # float16 is computed in float32
    torch.testing.assert_close(found, expected, rtol=10 * error, atol=error)
    if found.requires_grad:
        found.sum().backward()
        assert x_NCHW.grad.isfinite().all()
    else:
        assert nodes[0].op_type == "Shape" or len(nodes) == 3  # whole numbers


def test_every_operator_is_tried():
    assert {name.partition(",")[0] for name in CASES} == OPERATORS.keys()


@pytest.mark.parametrize("num_images", [1, 5])
def test_number_of_images_is_not_built_in(num_images):
    """Where the sizes of a file are computed from those of its input."""
    content = file_of(
        [
            node("Shape", "images", "batch", end=1),
            node("Concat", "batch rest", "target", axis=0),
            node("Expand", "token target", "tokens"),
            node("Add", "images tokens"),
        ],
        [constant("rest", [3, 8, 8]), constant("token", np.ones((1, 3, 1, 8), np.float32))],
    )
    x_NCHW = images(num_images)
    torch.testing.assert_close(twin_of(content)(x_NCHW), answer_of_runtime(content, x_NCHW))


REFUSED = {
    "one-dimensional": (
        case("Conv", "rows w", filled("w", 4, 24, 3)),
        [node("Reshape", "images shape", "rows")],
        [constant("shape", [0, 24, 8])],
        "Conv 'Conv_logits' is not two-dimensional",
    ),
    "auto_pad": (case("Conv", "images w", WEIGHT, auto_pad="SAME_UPPER"), "pads by auto_pad"),
    "pool of one side": (
        case("AveragePool", kernel_shape=[2, 2], pads=[0, 0, 1, 1]),
        "pads one side more than the other",
    ),
    "flat batch": (case("Flatten", axis=2), "keeps more than the batch"),
    "nearest": (
        case("Resize", "images _ scales", constant("scales", [1.0, 1, 2, 2]), mode="nearest"),
        "resizes by nearest, half_pixel",
    ),
    "aligned corners": (
        case(
            "Resize",
            "images _ scales",
            constant("scales", [1.0, 1, 2, 2]),
            mode="linear",
            coordinate_transformation_mode="align_corners",
        ),
        "resizes by linear, align_corners",
    ),
    "backwards": (
        case(
            "Slice",
            "images starts ends axes steps",
            constant("starts", [-1]),
            constant("ends", [-9]),
            constant("axes", [3]),
            constant("steps", [-1]),
        ),
        "goes backwards",
    ),
    "zero point": (
        then(
            case("DequantizeLinear", "steps scale zero", SCALE, constant("zero", np.int8(3))),
            node("QuantizeLinear", "images scale zero", "steps"),
        ),
        "is not symmetric int8",
    ),
    "unsigned": (
        then(
            case("DequantizeLinear", "steps scale zero", SCALE, constant("zero", np.uint8(128))),
            node("QuantizeLinear", "images scale zero", "steps"),
        ),
        "is not symmetric int8",
    ),
    "no zero point": (
        then(
            case("DequantizeLinear", "steps scale", SCALE),
            node("QuantizeLinear", "images scale", "steps"),
        ),
        "is not symmetric int8",
    ),
}


@pytest.mark.parametrize("row", REFUSED.values(), ids=REFUSED)
def test_what_would_be_computed_otherwise_is_refused(row):
    (nodes, constants), *more, message = row
    if more:
        nodes, constants = [*more[0], *nodes], [*constants, *more[1]]
    with pytest.raises(NoPlainGraphError, match=message):
        twin_of(file_of(nodes, constants))(images())
