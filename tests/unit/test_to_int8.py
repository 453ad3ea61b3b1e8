"""An int8 file has the one form that ONNX Runtime and TensorRT both take."""

import weakref

import numpy as np
import onnx  # noqa: TID253 (looks into files)
import pytest
import torch

from compressor.errors import UsageError
from compressor.onnx_graph import read_graph
from compressor.onnx_model import load_onnx_model
from exporters.int8.audit import broken_rules
from exporters.int8.to_int8 import (
    CALIBRATION_METHODS,
    calibrate,
    calibration_method,
    quantized_layers,
    write_int8,
)
from exporters.to_onnx import ExportError, OnnxForm, write_onnx


def batches(exported_tiny, *, batch_size=40, num=160):
    return (part.numpy() for part in torch.split(exported_tiny.x_NCHW[:num], batch_size))


@pytest.fixture(scope="module")
def ranges(exported_tiny):
    return {
        method: calibrate(exported_tiny.path, batches(exported_tiny), method=method)
        for method in CALIBRATION_METHODS
    }


@pytest.fixture
def int8(exported_tiny, ranges, tmp_path):
    """The file of minmax."""
    path = tmp_path / "int8.onnx"
    write_int8(exported_tiny.path, path, ranges["minmax"], metadata={"mine": "here"})
    return path


def limits(ranges):
    """Lowest and highest by the name of the tensor."""
    return {name: tuple(v.item() for v in found.range_value) for name, found in ranges.items()}


def graph_of(path):
    return read_graph(path.read_bytes(), path)


def initializers(path):
    tensors = onnx.load(path).graph.initializer
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in tensors}


def accuracy(path, exported_tiny):
    answers_N = load_onnx_model(path)(exported_tiny.x_NCHW).argmax(dim=1)
    return float((answers_N == exported_tiny.y_N).float().mean())


# The file


def test_layers_are_named_in_order(exported_tiny):
    assert quantized_layers(exported_tiny.path) == ["conv1", "conv2", "conv3", "fc"]


def test_layers_read_rounded_weights_and_rounded_activations(int8):
    graph = graph_of(int8)
    makers = {name: node for node in graph.nodes for name in node.outputs}
    layers = [node for node in graph.nodes if node.op in {"Conv", "Gemm", "MatMul"}]
    assert len(layers) == 4
    for layer in layers:
        activation, weight = (makers[name] for name in layer.inputs[:2])
        assert activation.op == weight.op == "DequantizeLinear"
        assert makers[activation.inputs[0]].op == "QuantizeLinear"
        assert graph.constants[weight.inputs[0]].dtype == torch.int8
        num_outputs = graph.constants[weight.inputs[0]].shape[weight.attributes["axis"]]
        assert graph.constants[weight.inputs[1]].shape == (num_outputs,)
        assert graph.constants[activation.inputs[1]].numel() == 1
        bias = graph.constants[layer.inputs[2]]  # TensorRT refuses rounded ones
        assert bias.dtype == torch.float32


def test_nothing_is_rounded_but_what_layers_read(int8):
    """So that TensorRT can fuse what follows a convolution before it rounds."""
    graph = graph_of(int8)
    readers = graph.consumers()
    for node in graph.nodes:
        if node.op == "DequantizeLinear":
            assert {reader.op for reader in readers[node.outputs[0]]} <= {"Conv", "Gemm", "MatMul"}
    assert sum(node.op == "QuantizeLinear" for node in graph.nodes) == 4


def test_zero_points_are_zero_of_int8(int8):
    zeros = [value for name, value in initializers(int8).items() if "zero_point" in name]
    assert zeros
    assert all(zero.dtype == np.int8 and not zero.any() for zero in zeros)
    assert broken_rules(graph_of(int8)) == []


def test_weights_are_not_in_the_file_a_second_time(int8, exported_tiny):
    floats = sum(value.size for value in initializers(int8).values() if value.dtype == np.float32)
    weights = sum(value.size for value in initializers(int8).values() if value.dtype == np.int8)
    assert floats < 0.1 * weights
    assert int8.stat().st_size < exported_tiny.path.stat().st_size


def test_only_used_domains_are_declared(int8):
    model = onnx.load(int8)
    assert [entry.domain for entry in model.opset_import] == [""]


def test_metadata_is_what_is_given(int8):
    assert load_onnx_model(int8).metadata == {"mine": "here"}


@pytest.mark.parametrize("method", CALIBRATION_METHODS)
def test_methods_give_a_sound_file(exported_tiny, ranges, tmp_path, method):
    path = tmp_path / "int8.onnx"
    write_int8(exported_tiny.path, path, ranges[method], metadata={})
    assert accuracy(path, exported_tiny) > accuracy(exported_tiny.path, exported_tiny) - 0.03
    assert accuracy(exported_tiny.path, exported_tiny) > 0.9


def test_methods_differ(ranges):
    """Were entropy left with as many bins as levels, it would be minmax under another name."""
    found = {method: limits(values) for method, values in ranges.items()}
    name = max(found["minmax"], key=lambda name: found["minmax"][name][1])
    highest = [found[method][name][1] for method in ("minmax", "percentile", "entropy")]
    assert highest == sorted(highest, reverse=True)
    assert len(set(highest)) == 3


def test_ranges_are_symmetric_and_those_of_the_images(exported_tiny, ranges):
    low, high = limits(ranges["minmax"])["images"]
    assert low == -high
    assert high == pytest.approx(float(exported_tiny.x_NCHW[:160].abs().max()))


@pytest.mark.parametrize("method", CALIBRATION_METHODS)
def test_the_same_images_give_the_same_bytes(exported_tiny, ranges, tmp_path, method):
    again = calibrate(exported_tiny.path, batches(exported_tiny), method=method)
    contents = []
    for found in (ranges[method], again):
        path = tmp_path / f"{len(contents)}.onnx"
        write_int8(exported_tiny.path, path, found, metadata={"b": "1", "a": "2"})
        contents.append(path.read_bytes())
    assert contents[0] == contents[1]


@pytest.mark.parametrize("kept", [[0], [1, 3], [0, 1, 2, 3]])
def test_layers_that_are_kept_stay_in_float(exported_tiny, ranges, tmp_path, kept):
    names = quantized_layers(exported_tiny.path)
    path = tmp_path / "mixed.onnx"
    write_int8(
        exported_tiny.path,
        path,
        ranges["minmax"],
        kept_in_float=[names[place] for place in kept],
        metadata={},
    )
    graph = graph_of(path)
    makers = {name: node.op for node in graph.nodes for name in node.outputs}
    layers = [node for node in graph.nodes if node.op in {"Conv", "Gemm", "MatMul"}]
    for place, layer in enumerate(layers):
        is_rounded = makers.get(layer.inputs[1]) == "DequantizeLinear"
        assert is_rounded == (place not in kept)
        assert (makers.get(layer.inputs[0]) == "DequantizeLinear") == is_rounded
    exact = load_onnx_model(exported_tiny.path)(exported_tiny.x_NCHW)
    found = load_onnx_model(path)(exported_tiny.x_NCHW)
    assert torch.allclose(found, exact, atol=1e-4) == (len(kept) == 4)


def test_a_file_is_written_as_a_whole_or_not_at_all(exported_tiny, ranges, tmp_path, monkeypatch):
    (tmp_path / "int8.onnx").write_bytes(b"before")

    def refuse(*_, **__):
        raise onnx.checker.ValidationError("planted")

    monkeypatch.setattr(onnx.checker, "check_model", refuse)
    with pytest.raises(ExportError, match=r"onnx\.checker refuses the exported graph: planted"):
        write_int8(exported_tiny.path, tmp_path / "int8.onnx", ranges["minmax"], metadata={})
    assert (tmp_path / "int8.onnx").read_bytes() == b"before"
    assert len(list(tmp_path.iterdir())) == 1


# Calibration


@pytest.mark.parametrize("method", ["minmax", "percentile"])
def test_batches_are_asked_for_one_at_a_time_and_let_go(exported_tiny, method):
    """ONNX Runtime would read all of them first, and keep every output of every image."""
    alive = []

    def watched():
        for batch in batches(exported_tiny, batch_size=20):
            assert sum(reference() is not None for reference in alive) <= 1
            copy = batch.copy()
            alive.append(weakref.ref(copy))
            yield copy
            del copy

    calibrate(exported_tiny.path, watched(), method=method)
    assert len(alive) == 8


@pytest.mark.parametrize("method", ["minmax", "percentile"])
def test_ranges_hardly_depend_on_the_batches(exported_tiny, ranges, method):
    """The last batch is not full, and histograms are merged."""
    odd = calibrate(exported_tiny.path, batches(exported_tiny, batch_size=70), method=method)
    for name, (_, high) in limits(ranges[method]).items():
        assert limits(odd)[name][1] == pytest.approx(high, rel=0.1)


def test_calibration_without_images_is_refused(exported_tiny):
    with pytest.raises(ExportError, match="there are no images to calibrate with"):
        calibrate(exported_tiny.path, iter(()), method="minmax")


def test_calibration_prints_nothing(exported_tiny, capfd):
    calibrate(exported_tiny.path, batches(exported_tiny, num=40), method="percentile")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("batch_size", [3])
def test_a_file_of_one_batch_size_is_calibrated_too(exported_tiny, ranges, tmp_path, batch_size):
    form = OnnxForm(image_shape=(3, 8, 8), static_batch=batch_size)
    write_onnx(exported_tiny.network, tmp_path / "fixed.onnx", form=form, metadata={})
    fixed = limits(calibrate(tmp_path / "fixed.onnx", batches(exported_tiny), method="minmax"))
    free = limits(ranges["minmax"])
    common = free.keys() & fixed.keys()
    assert len(common) > 4
    for name in common:
        assert fixed[name] == pytest.approx(free[name], rel=1e-5)


@pytest.mark.parametrize("name", CALIBRATION_METHODS)
def test_methods_are_known(name):
    assert calibration_method(name) == name


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("distribution", "it is made for 8-bit floats; with int8 it wrecks a model"),
        ("dynamic", "TensorRT has no dynamic quantisation of convolutions"),
        ("max", "it is called minmax here"),
        ("Entropy", "it is not known"),
    ],
)
def test_other_methods_are_refused_with_the_reason(name, reason):
    with pytest.raises(UsageError, match=f"'{name}' is refused: {reason}.*use minmax, entropy"):
        calibration_method(name)
