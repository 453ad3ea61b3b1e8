"""Small ONNX files for tests, and changes that are planted in them."""

from pathlib import Path

import numpy as np
import onnx  # noqa: TID253 (makes the files)
from onnx import TensorProto, helper, numpy_helper  # noqa: TID253

OPSET = 20


def constant(name, value):
    """A tensor of a file; numbers of Python become float32 or int64."""
    array = np.asarray(value)
    is_double = array.dtype == np.float64
    return numpy_helper.from_array(array.astype(np.float32) if is_double else array, name)


YES = constant("yes", np.ones((), bool))


def node(op, inputs, outputs="logits", **attributes):
    """A named operator; names of values are separated by spaces, and an absent one is `_`."""
    names = ["" if name == "_" else name for name in inputs.split()]
    return helper.make_node(
        op, names, outputs.split(), name=f"{op}_{outputs.split()[0]}", **attributes
    )


def value(name, shape, kind=TensorProto.FLOAT):
    """An input or an output."""
    return helper.make_tensor_value_info(name, kind, shape)


def model_of_nodes(nodes, constants=(), *, inputs=None, outputs=None, opset=OPSET, **others):
    """From `images` [N, 1, 8, 8] to `logits` [N, 10], unless told."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [value("images", ["N", 1, 8, 8])] if inputs is None else inputs,
        [value("logits", ["N", 10])] if outputs is None else outputs,
        list(constants),
    )
    domains = {n.domain for n in nodes} - {""}
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
    return helper.make_model(graph, opset_imports=opsets, **({"ir_version": 10} | others))


def linear_weight(num_classes=10, *, side=8):
    """Seeded [pixels, classes]."""
    return np.random.default_rng(0).normal(size=(side * side, num_classes)).astype(np.float32)


def linear_model(*after, constants=(), weight=None, name="logits", **options):
    """A linear map, which is then called `name`, and the nodes that go on from there."""
    weight = linear_weight() if weight is None else weight
    nodes = [node("Flatten", "images", "flat"), node("MatMul", "flat weight", name), *after]
    return model_of_nodes(nodes, [constant("weight", weight), *constants], **options)


def appended(model, op, *, constants=(), **attributes):
    """The same file, with one operator more, on its output."""
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    name = copy.graph.output[0].name
    for place in copy.graph.node:
        place.output[:] = ["before" if output == name else output for output in place.output]
    copy.graph.initializer.extend(constants)
    inputs = ["before", *(tensor.name for tensor in constants)]
    copy.graph.node.append(helper.make_node(op, inputs, [name], name="appended", **attributes))
    return copy


def other_off_the_grey_levels(model):
    """The same file, but with 1000 more for the first of 10 classes between whole grey levels.

    float16 has only whole numbers near 1024; a twin computes in float32 and sees no difference.
    """
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    pixels, answer = copy.graph.input[0].name, copy.graph.output[0].name
    for place in copy.graph.node:
        place.output[:] = ["before" if name == answer else name for name in place.output]
    values = {"many": 255.0, "far": 1024.0, "zero": 0.0, "one": 1.0}
    values |= {"sides": [1, 2, 3], "last": [1], "bias": np.eye(10)[0] * 1000}
    copy.graph.initializer.extend(constant(name, value) for name, value in values.items())
    copy.graph.node.extend(
        [
            node("Mul", f"{pixels} many", "levels"),
            node("Add", "levels far", "moved"),
            node("Cast", "moved", "half", to=TensorProto.FLOAT16),
            node("Cast", "half", "back", to=TensorProto.FLOAT),
            node("Sub", "back moved", "off"),
            node("Mul", "off off", "squared"),
            node("ReduceMean", "squared sides", "mean_square", keepdims=0),
            node("Mul", "mean_square many", "much"),
            node("Clip", "much zero one", "share"),
            node("Unsqueeze", "share last", "shares"),
            node("Mul", "shares bias", "more"),
            node("Add", "before more", answer),
        ]
    )
    return copy


def in_steps(model, num_steps):
    """The same file, which rounds its images to so many steps, while its twin does not notice."""
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    pixels = copy.graph.input[0].name
    for place in copy.graph.node:
        place.input[:] = ["seen" if name == pixels else name for name in place.input]
    values = {"steps": float(num_steps), "far": 1024.0}
    copy.graph.initializer.extend(constant(name, value) for name, value in values.items())
    nodes = [
        node("Mul", f"{pixels} steps", "levels"),
        node("Add", "levels far", "moved"),
        node("Cast", "moved", "half", to=TensorProto.FLOAT16),
        node("Cast", "half", "back", to=TensorProto.FLOAT),
        node("Sub", "back far", "whole"),
        node("Div", "whole steps", "seen"),
        *copy.graph.node,
    ]
    del copy.graph.node[:]
    copy.graph.node.extend(nodes)
    return copy


def without_twin(file, path):
    """Write a file that answers as `file` does, by an operator that nobody differentiates here."""
    onnx.save(appended(onnx.load(file), "Sum"), path)
    return Path(path)
