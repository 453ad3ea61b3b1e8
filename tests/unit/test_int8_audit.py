"""What can be wrong with an int8 file that runs."""

import numpy as np
import onnx  # noqa: TID253 (changes files)
import pytest
import torch

from compressor.onnx_graph import NoPlainGraphError, read_graph
from compressor.onnx_twin import differentiable_twin
from exporters.int8.audit import (
    RangeUse,
    audit,
    broken_rules,
    layer_weights,
    misfit_ranges,
    misfit_scales,
    misfit_weights,
    range_use,
)
from exporters.int8.to_int8 import calibrate, largest_magnitudes, write_int8


@pytest.fixture(scope="module")
def ranges(exported_tiny):
    batches = (part.numpy() for part in torch.split(exported_tiny.x_NCHW[:100], 50))
    return calibrate(exported_tiny.path, batches, method="minmax")


@pytest.fixture(scope="module")
def int8(exported_tiny, ranges, tmp_path_factory):
    path = tmp_path_factory.mktemp("audited") / "int8.onnx"
    write_int8(exported_tiny.path, path, ranges, metadata={})
    return path


@pytest.fixture
def audited(exported_tiny, weights, ranges):
    """What is said of a graph."""

    def look(graph):
        x_NCHW = exported_tiny.x_NCHW[100:]
        try:
            twin = differentiable_twin(graph)
            twin(x_NCHW[:1])
        except NoPlainGraphError:
            twin = None
        largest = largest_magnitudes(ranges)
        return audit(graph, twin, x_NCHW, float_weights=weights, largest=largest)

    return look


@pytest.fixture
def weights(exported_tiny):
    return layer_weights(graph_of(exported_tiny.path))


def graph_of(path):
    return read_graph(path.read_bytes(), path)


def changed(path, tmp_path, change):
    """The graph of a file whose constants, by name, went through a function."""
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        found = change(tensor.name, array)
        if found is not None:
            tensor.CopyFrom(onnx.numpy_helper.from_array(found.astype(found.dtype), tensor.name))
    onnx.save(model, tmp_path / "changed.onnx")
    return graph_of(tmp_path / "changed.onnx")


def test_a_sound_file_is_left_alone(int8, audited):
    assert audited(graph_of(int8)) == []


def test_layers_and_their_weights(weights, exported_tiny):
    parameters = dict(exported_tiny.network.named_parameters())
    assert list(weights) == ["conv1", "conv2", "conv3", "fc"]
    for name, weight in weights.items():
        assert weight.numel() == parameters[f"{name}.weight"].numel()


# Rules


def scalar_zero(value, kind):
    """Zero points of activations become this."""

    def change(name, array):
        if name.endswith("zero_point") and not array.shape:
            return np.array(value, kind)
        return None

    return change


def test_a_zero_point_that_tensorrt_refuses_is_named(int8, tmp_path, audited):
    graph = changed(int8, tmp_path, scalar_zero(3, np.int8))
    found = broken_rules(graph)
    assert len(found) == 8  # pairs in front of four layers
    assert "images_q has the zero point 3; TensorRT takes 0 only" in found
    assert set(found) <= set(audited(graph))


def test_a_type_that_tensorrt_refuses_is_named(int8, tmp_path):
    graph = changed(int8, tmp_path, scalar_zero(0, np.uint8))
    assert "has uint8; TensorRT takes int8" in broken_rules(graph)[0]


def test_a_zero_point_that_is_not_there_is_uint8_by_default(int8, tmp_path):
    model = onnx.load(int8)
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            del node.input[2]
    onnx.save(model, tmp_path / "short.onnx")
    found = broken_rules(graph_of(tmp_path / "short.onnx"))
    assert len(found) == 4
    assert all("has no zero point; TensorRT takes int8" in text for text in found)


# Weights


@pytest.mark.parametrize("factor", [4.0, 2.0, 1.02, 0.5])
def test_weights_on_another_scale_are_named(int8, tmp_path, audited, weights, factor):
    def change(name, array):
        return array * np.float32(factor) if name == "conv2.weight_scale" else None

    graph = changed(int8, tmp_path, change)
    (found,) = misfit_weights(graph, weights)
    assert found.startswith("weights of conv2 are ")
    assert found in audited(graph)


def test_one_weight_that_is_two_steps_off_is_named(int8, tmp_path, weights):
    def change(name, array):
        if name != "fc.weight_quantized":
            return None
        moved = array.copy()
        moved[1, 1] += 2 if moved[1, 1] < 100 else -2
        return moved

    (found,) = misfit_weights(changed(int8, tmp_path, change), weights)
    assert found.startswith("weights of fc are ")


def test_a_coarse_scale_does_not_hide_its_own_error(int8, tmp_path, weights):
    """Weights rounded well, but to steps four times as large."""

    def change(name, array):
        if name == "conv3.weight_scale":
            return array * np.float32(4)
        if name == "conv3.weight_quantized":
            return np.round(array / 4).astype(np.int8)
        return None

    (found,) = misfit_weights(changed(int8, tmp_path, change), weights)
    assert found.startswith("weights of conv3 are ")


def test_weights_in_another_order_are_named(int8, tmp_path, weights):
    def change(name, array):
        return array[:, ::-1].copy() if name == "fc.weight_quantized" else None

    (found,) = misfit_weights(changed(int8, tmp_path, change), weights)
    assert found.startswith("weights of fc are ")


def test_layers_in_float_have_no_error(exported_tiny, weights):
    assert misfit_weights(graph_of(exported_tiny.path), weights) == []


# Ranges


def activation_scale(place, factor):
    """The scale of the activation in front of one layer times a factor."""
    scales = []

    def change(name, array):
        if name.endswith("_scale") and not array.shape:
            scales.append(name)
            return array * np.float32(factor) if len(scales) == place + 1 else None
        return None

    return change


def test_ranges_of_training_images_are_used_by_others(int8, exported_tiny):
    uses = range_use(differentiable_twin(graph_of(int8)), exported_tiny.x_NCHW[100:])
    assert len(uses) == 4
    assert uses[0].name == "images"
    assert all(0.7 < use.used_fraction < 1.4 for use in uses)
    assert all(use.saturated_fraction < 0.01 for use in uses)


@pytest.mark.parametrize("place", range(4))
def test_a_scale_four_times_too_coarse_is_named(int8, tmp_path, audited, place):
    graph = changed(int8, tmp_path, activation_scale(place, 4))
    calibrated, found = audited(graph)
    assert calibrated.endswith(" is 4 times that of its calibrated range")
    assert found.startswith("the scale of ")
    assert "is too coarse: " in found
    assert 15 < float(found.split("coarse: ")[1].split(" %")[0]) < 35


@pytest.mark.parametrize("place", range(4))
def test_a_scale_far_too_fine_is_named(int8, tmp_path, audited, place):
    graph = changed(int8, tmp_path, activation_scale(place, 0.1))
    found = audited(graph)
    (fine,) = [text for text in found if "is too fine: " in text]  # what follows may be too coarse
    assert fine.endswith(" % of its values are cut off")


@pytest.mark.parametrize(("factor", "num"), [(0.5, 1), (0.98, 1), (0.995, 0), (1.02, 1)])
def test_scales_are_those_of_the_calibrated_ranges(int8, tmp_path, ranges, factor, num):
    """Whatever images use of them; ranges may be cut by design."""
    graph = changed(int8, tmp_path, activation_scale(2, factor))
    found = misfit_scales(graph, largest_magnitudes(ranges))
    assert len(found) == num
    assert all(f"is {factor:g} times that of its calibrated range" in text for text in found)


@pytest.mark.parametrize(
    ("used", "saturated", "words"),
    [
        (0.39, 0.0, ["the scale of x is too coarse: 39 % of its range is used"]),
        (0.41, 0.0, []),
        (3.0, 0.049, []),
        (3.0, 0.051, ["the scale of x is too fine: 5.1 % of its values are cut off"]),
    ],
)
def test_limits_of_ranges(used, saturated, words):
    use = RangeUse(name="x", used_fraction=used, saturated_fraction=saturated)
    assert misfit_ranges([use]) == words


def test_looking_leaves_no_trace(int8, exported_tiny):
    twin = differentiable_twin(graph_of(int8))
    range_use(twin, exported_tiny.x_NCHW[:10])
    assert not any(module._forward_pre_hooks for module in twin.modules())
