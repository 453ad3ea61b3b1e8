"""A float16 file is the same model with half of the bytes, or there is none."""

import numpy as np
import onnx  # noqa: TID253 (looks into files)
import pytest
import torch

from compressor.onnx_model import load_onnx_model
from exporters.to_float16 import write_float16
from exporters.to_onnx import ExportError
from tests.onnx_files import constant, linear_model, linear_weight, node


@pytest.fixture
def half(exported_tiny, tmp_path):
    path = tmp_path / "half.onnx"
    write_float16(exported_tiny.path, path, metadata={"mine": "here"})
    return path


def initializers(path):
    tensors = onnx.load(path).graph.initializer
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in tensors}


def test_weights_are_those_of_float32_rounded(exported_tiny, half):
    whole, halved = initializers(exported_tiny.path), initializers(half)
    weights = {name: value for name, value in whole.items() if value.dtype == np.float32}
    assert len(weights) >= 8
    for name, value in weights.items():
        assert halved[name].dtype == np.float16
        assert np.array_equal(halved[name], value.astype(np.float16)) or value.min() < 1e-6


def test_it_answers_nearly_alike(exported_tiny, half):
    exact = load_onnx_model(exported_tiny.path)(exported_tiny.x_NCHW)
    found = load_onnx_model(half)(exported_tiny.x_NCHW)
    assert 0 < (found - exact).abs().max() < 0.01 * exact.abs().max()
    assert torch.equal(found.argmax(dim=1), exact.argmax(dim=1))


def test_input_and_output_stay_float32(half):
    """So that whoever feeds a float32 file can feed this one."""
    graph = onnx.load(half).graph
    kinds = [value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)]
    assert kinds == [onnx.TensorProto.FLOAT] * 2


def test_nodes_are_in_order(half):
    """The converter appends its casts at the end, which onnx refuses."""
    onnx.checker.check_model(onnx.load(half), full_check=True)


def test_metadata_is_what_is_given(half):
    assert load_onnx_model(half).metadata == {"mine": "here"}


def test_it_has_half_of_the_bytes_and_always_the_same(exported_tiny, half, tmp_path):
    write_float16(exported_tiny.path, tmp_path / "again.onnx", metadata={"mine": "here"})
    assert (tmp_path / "again.onnx").read_bytes() == half.read_bytes()
    weights = sum(v.nbytes for v in initializers(exported_tiny.path).values())
    halved = sum(v.nbytes for v in initializers(half).values())
    assert halved < 0.55 * weights


@pytest.mark.parametrize("largest", [65504.0, 65505.0, -1e9, np.inf])
def test_weights_beyond_float16_are_refused(tmp_path, largest):
    """The converter would cut them without a word."""
    weight = linear_weight()
    weight[3, 4] = largest
    path = tmp_path / "large.onnx"
    onnx.save(linear_model(weight=weight), path)
    if largest == 65504:
        write_float16(path, tmp_path / "half.onnx", metadata={})
        return
    message = rf"weight holds {abs(largest):g}, and float16 ends at 65504; use --precision fp32"
    with pytest.raises(ExportError, match=message.replace("+", r"\+")):
        write_float16(path, tmp_path / "half.onnx", metadata={})
    assert not (tmp_path / "half.onnx").exists()


def test_sizes_and_indices_stay_whole_numbers(tmp_path):
    shape = constant("shape", [-1, 10])
    onnx.save(
        linear_model(node("Reshape", "raw shape"), constants=[shape], name="raw"),
        tmp_path / "a.onnx",
    )
    write_float16(tmp_path / "a.onnx", tmp_path / "b.onnx", metadata={})
    assert initializers(tmp_path / "b.onnx")["shape"].tolist() == [-1, 10]
