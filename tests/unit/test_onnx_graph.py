"""An ONNX file as a plain value, and what is no plain graph."""

import numpy as np
import onnx  # noqa: TID253 (makes files)
import pytest
import torch
from onnx import TensorProto, helper  # noqa: TID253

from compressor.errors import WeightsError
from compressor.onnx_graph import NoPlainGraphError, parse, read_graph
from tests.onnx_files import YES, constant, linear_model, model_of_nodes, node, value


@pytest.fixture
def graph_of(tmp_path):
    return lambda model: read_graph(model.SerializeToString(), tmp_path / "some.onnx")


def test_a_file_becomes_values_in_their_order(graph_of):
    low = helper.make_node("Constant", [], ["low"], value=constant("", 0.5))
    model = linear_model(low, node("Clip", "raw low"), name="raw")
    graph = graph_of(model)
    assert [n.op for n in graph.nodes] == ["Flatten", "MatMul", "Clip"]
    assert graph.nodes[2].inputs == ("raw", "low")
    assert graph.nodes[2].name == "Clip_logits"
    assert (graph.input_name, graph.output_name, graph.batch_size) == ("images", "logits", None)
    assert graph.constants["weight"].shape == (64, 10)
    assert graph.constants["low"] == 0.5
    assert [n.op for n in graph.consumers()["raw"]] == ["Clip"]
    assert "logits" not in graph.consumers()


def test_attributes_are_plain(graph_of):
    attributes = {"kernel_shape": [2, 2], "ceil_mode": 1, "auto_pad": "NOTSET"}
    graph = graph_of(model_of_nodes([node("MaxPool", "images", **attributes)]))
    assert graph.nodes[0].attributes == attributes


@pytest.mark.parametrize(
    ("attribute", "expected"),
    [("value_int", 3), ("value_float", 0.5), ("value_ints", [1, 2]), ("value_floats", [0.5])],
)
def test_constants_of_every_kind(graph_of, attribute, expected):
    here = helper.make_node("Constant", [], ["c"], **{attribute: expected})
    graph = graph_of(linear_model(here, node("Identity", "raw"), name="raw"))
    assert graph.constants["c"].tolist() == expected


def test_types_are_kept(graph_of):
    values = [np.float16(1), np.int8(-3), np.uint8(200), np.int64(2**40), np.ones((), bool)]
    constants = [constant(f"c{n}", array) for n, array in enumerate(values)]
    graph = graph_of(linear_model(constants=constants))
    kinds = [torch.float16, torch.int8, torch.uint8, torch.int64, torch.bool]
    assert [graph.constants[f"c{n}"].dtype for n in range(5)] == kinds
    assert graph.constants["c3"] == 2**40


def test_a_fixed_batch_is_known(graph_of):
    assert graph_of(linear_model(inputs=[value("images", [3, 1, 8, 8])])).batch_size == 3


def with_function():
    opsets = [helper.make_opsetid("", 20)]
    body = [helper.make_node("Relu", ["a"], ["b"])]
    model = linear_model(node("Mine", "raw", domain="local"), name="raw")
    model.functions.append(helper.make_function("local", "Mine", ["a"], ["b"], body, opsets))
    return model


def with_branches():
    branch = helper.make_graph(
        [helper.make_node("Identity", ["raw"], ["o"])], "branch", [], [value("o", None)]
    )
    either = node("If", "yes", then_branch=branch, else_branch=branch)
    return linear_model(either, constants=[YES], name="raw")


def with_external_data():
    model = linear_model()
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="weights.bin")
    return model


def with_external_constant():
    tensor = with_external_data().graph.initializer[0]
    here = helper.make_node("Constant", [], ["c"], value=tensor)
    return linear_model(here, node("Identity", "raw"), name="raw")


def without_input():
    return model_of_nodes(
        [node("Identity", "c")], [constant("c", np.zeros((1, 10), np.float32))], inputs=[]
    )


REFUSED = {
    "no input": (without_input, "has 0 inputs, 1 outputs"),
    "two inputs": (
        lambda: linear_model(inputs=[value("images", ["N", 1, 8, 8]), value("more", [1])]),
        "has 2 inputs, 1 outputs",
    ),
    "two outputs": (
        lambda: linear_model(outputs=[value("logits", ["N", 10]), value("flat", ["N", 64])]),
        "has 1 inputs, 2 outputs",
    ),
    "function": (with_function, "has 1 local functions"),
    "branches": (with_branches, "If has a graph inside"),
    "another domain": (
        lambda: linear_model(node("Gelu", "raw", domain="com.microsoft"), name="raw"),
        "uses Gelu of com.microsoft",
    ),
    "data elsewhere": (with_external_data, "keeps weight in another file"),
    "constant elsewhere": (with_external_constant, "keeps weight in another file"),
}


@pytest.mark.parametrize(("build", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_plain_graph_is_refused(graph_of, build, message):
    with pytest.raises(NoPlainGraphError, match=rf"some\.onnx.* {message}"):
        graph_of(build())


def test_weights_that_are_inputs_too_are_constants(graph_of):
    """As older exporters wrote them."""
    inputs = [value("images", ["N", 1, 8, 8]), value("weight", [64, 10])]
    assert graph_of(linear_model(inputs=inputs)).input_name == "images"


@pytest.mark.parametrize("content", [b"hello", b"\x3a" * 5000, b"PK\x03\x04"])
def test_what_is_no_onnx_is_refused(content, tmp_path):
    with pytest.raises(WeightsError, match="is damaged, or not an ONNX file; copy or export it"):
        parse(content, tmp_path / "some.onnx")


def test_constants_can_be_changed(graph_of):
    """PyTorch warns of arrays that it must not write to."""
    weight = graph_of(linear_model()).constants["weight"]
    weight += 1
    assert onnx.numpy_helper.to_array(linear_model().graph.initializer[0])[0, 0] != weight[0, 0]
