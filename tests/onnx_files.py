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


def without_twin(file, path):
    """Write a file that answers as `file` does, by an operator that nobody differentiates here."""
    onnx.save(appended(onnx.load(file), "Sum"), path)
    return Path(path)
