"""What an ONNX file may ask for."""

import time

import numpy as np
import onnx  # noqa: TID253 (makes files)
import pytest
from onnx import helper  # noqa: TID253

from compressor.errors import WeightsError
from compressor.onnx_limits import (
    MAX_DEPTH,
    MAX_ELEMENTS,
    MAX_NODES,
    holds_float16,
    refuse_unreasonable,
)
from tests.onnx_files import YES, constant, linear_model, node, value

LOCAL = [helper.make_opsetid("", 20), helper.make_opsetid("local", 1)]


def refuse(model, tmp_path):
    """As a file would be: bytes again."""
    refuse_unreasonable(onnx.ModelProto.FromString(model.SerializeToString()), tmp_path / "x.onnx")


def chain(length):
    """A linear map, and so many operators in a row that do nothing."""
    nodes = [helper.make_node("Identity", [f"v{n}"], [f"v{n + 1}"]) for n in range(length - 3)]
    last = helper.make_node("Identity", [f"v{length - 3}"], ["logits"])
    return linear_model(*nodes, last, name="v0")


def calling(bodies, *, name="f0"):
    """A call of local functions: f0 whose body calls what it names, and so on."""
    model = linear_model(node(name, "raw", domain="local"), name="raw")
    for own, called in bodies.items():
        body, before = [], "a"
        for place, other in enumerate(called):
            after = "b" if place == len(called) - 1 else f"m{place}"
            domain = "local" if other in bodies else ""
            body.append(helper.make_node(other, [before], [after], domain=domain))
            before = after
        model.functions.append(helper.make_function("local", own, ["a"], ["b"], body, LOCAL))
    return model


def nested(depth):
    """Branches in branches."""

    def branch(*nodes):
        return helper.make_graph(list(nodes), "branch", [], [value("o", None)])

    inner = branch(helper.make_node("Identity", ["raw"], ["o"]))
    for _ in range(depth - 1):
        other = branch(helper.make_node("Identity", ["raw"], ["o"]))
        either = helper.make_node("If", ["yes"], ["o"], then_branch=inner, else_branch=other)
        inner = branch(either)
    other = branch(helper.make_node("Identity", ["raw"], ["o"]))
    top = node("If", "yes", then_branch=inner, else_branch=other)
    return linear_model(top, constants=[YES], name="raw")


def straight(length):
    """A function that calls one that calls one ..."""
    return {f"f{n}": [f"f{n + 1}"] for n in range(length - 1)} | {f"f{length - 1}": ["Relu"]}


def doubling(depth):
    """A function that calls one twice that calls one twice ..."""
    return {f"f{n}": [f"f{n + 1}"] * 2 for n in range(depth - 1)} | {f"f{depth - 1}": ["Relu"]}


TAKEN = {
    "linear": linear_model,
    "long": lambda: chain(1000),
    "functions": lambda: calling(straight(8)),
    "doubled": lambda: calling(doubling(8)),
    "branches": lambda: nested(8),
}


@pytest.mark.parametrize("build", TAKEN.values(), ids=TAKEN)
def test_what_a_classifier_may_be_is_taken(build, tmp_path):
    refuse(build(), tmp_path)


def looping(op):
    body = helper.make_graph([helper.make_node("Identity", ["v"], ["o"])], "body", [], [])
    return linear_model(node(op, "raw", body=body), name="raw")


def expanded(num_elements):
    sizes = [constant("one", np.zeros(1, np.float32)), constant("shape", [num_elements])]
    nodes = [
        helper.make_node("Expand", ["one", "shape"], ["big"]),
        helper.make_node("ReduceMean", ["big"], ["mean"], keepdims=0),
        helper.make_node("Add", ["raw", "mean"], ["logits"]),
    ]
    return linear_model(*nodes, constants=sizes, name="raw")


def in_a_function():
    """The same, in a function, where only its call is seen."""
    body = [
        helper.make_node("Constant", [], ["shape"], value_ints=[2**36]),
        helper.make_node("Constant", [], ["one"], value_floats=[0.0]),
        helper.make_node("Expand", ["one", "shape"], ["big"]),
        helper.make_node("ReduceMean", ["big"], ["mean"], keepdims=0),
        helper.make_node("Add", ["a", "mean"], ["b"]),
    ]
    model = linear_model(node("Big", "raw", domain="local"), name="raw")
    model.functions.append(helper.make_function("local", "Big", ["a"], ["b"], body, LOCAL))
    return model


def declared(*dims):
    model = linear_model()
    model.graph.initializer.append(constant("unused", [1.0]))
    model.graph.initializer[-1].dims[:] = dims
    return model


REFUSED = {
    "too long": (lambda: chain(MAX_NODES + 1), "has 2e\\+04 nodes, and 20000 are read"),
    "too long written out": (lambda: calling(doubling(17)), "has 6.55e\\+04 nodes"),
    "chain of functions": (lambda: calling(straight(MAX_DEPTH + 2)), "deeper than 32 levels"),
    "recursion": (lambda: calling({"f0": ["f0"]}), "deeper than 32 levels"),
    "mutual recursion": (lambda: calling({"f0": ["f1"], "f1": ["f0"]}), "deeper than 32"),
    "doubling": (lambda: calling(doubling(60)), "deeper than 32 levels"),
    "loop": (lambda: looping("Loop"), "uses Loop, which may never end"),
    "scan": (lambda: looping("Scan"), "uses Scan, which may never end"),
    "expanded": (lambda: expanded(2**36), "value 'big' of 68719476736 numbers"),
    "just too large": (lambda: expanded(MAX_ELEMENTS + 1), "more than the 536,870,912"),
    "expanded in a function": (in_a_function, "of 68719476736 numbers"),
    "declared": (lambda: declared(2**40), "value 'unused' of 1099511627776 numbers"),
    "declared in parts": (lambda: declared(2**20, 2**20), "of 1048576x1048576 numbers"),
    "batch": (
        lambda: linear_model(inputs=[value("images", [2**31 - 1, 1, 8, 8])]),
        "value 'images' of 2147483647x1x8x8 numbers",
    ),
}


@pytest.mark.parametrize(("build", "message"), REFUSED.values(), ids=REFUSED)
def test_what_no_classifier_needs_is_refused(build, message, tmp_path):
    model, begin = build(), time.process_time()
    with pytest.raises(WeightsError, match=rf"x\.onnx .*{message}"):
        refuse(model, tmp_path)
    assert time.process_time() - begin < 3


def test_depth_is_that_of_the_deepest_wherever_it_is_called_first(tmp_path):
    """Calls of every function of a chain, from its end on, do not hide how long it is."""
    bodies = straight(MAX_DEPTH + 2)
    model = calling(bodies)
    (call,) = (n for n in model.graph.node if n.domain == "local")
    model.graph.node.remove(call)
    for place, name in enumerate(reversed(bodies)):
        before = "raw" if place == 0 else f"v{place}"
        after = "logits" if place == len(bodies) - 1 else f"v{place + 1}"
        model.graph.node.append(helper.make_node(name, [before], [after], domain="local"))
    with pytest.raises(WeightsError, match="deeper than 32 levels"):
        refuse(model, tmp_path)


def test_the_largest_that_is_allowed_is_taken(tmp_path):
    refuse(expanded(MAX_ELEMENTS), tmp_path)
    refuse(chain(MAX_NODES), tmp_path)
    refuse(calling(straight(MAX_DEPTH)), tmp_path)


@pytest.mark.parametrize(("kind", "expected"), [(np.float16, True), (np.float32, False)])
def test_float16_is_seen(kind, expected):
    assert holds_float16(linear_model(constants=[constant("c", kind(1))])) == expected
