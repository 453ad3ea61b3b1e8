"""Values that float16 cannot hold are found where ONNX Runtime does not show them."""

from pathlib import Path

import pytest
import torch

from compressor.onnx_graph import read_graph
from compressor.onnx_model import load_onnx_model
from compressor.onnx_twin import differentiable_twin
from exporters.float16_audit import overflows
from exporters.to_float16 import write_float16
from tests.onnx_files import constant, linear_model, node


def scaled(factor, tmp_path):
    """A linear map in float16 whose logits are multiplied on the way, and divided again."""
    there, back = constant("there", float(factor)), constant("back", 1 / factor)
    nodes = [node("Mul", "raw there", "high"), node("Relu", "high", "cut"), node("Mul", "cut back")]
    model = linear_model(*nodes, constants=[there, back], name="raw")
    (tmp_path / "a.onnx").write_bytes(model.SerializeToString())
    write_float16(tmp_path / "a.onnx", tmp_path / "b.onnx", metadata={})
    return tmp_path / "b.onnx"


def images(num=100):
    return torch.rand(num, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def twin_of(path):
    return differentiable_twin(read_graph(path.read_bytes(), Path(path)))


def test_what_overflows_is_named(tmp_path):
    path = scaled(30_000, tmp_path)
    assert load_onnx_model(path)(images()).isfinite().all()  # on a CPU it does no harm
    first, second = overflows(twin_of(path), images())
    assert first.startswith("Mul Mul_high reaches ")
    assert second.startswith("Relu Relu_cut reaches ")
    assert first.endswith("and float16 ends at 65504")


def test_what_fits_is_left_alone(tmp_path, exported_tiny):
    assert overflows(twin_of(scaled(100, tmp_path)), images()) == []
    write_float16(exported_tiny.path, tmp_path / "half.onnx", metadata={})
    assert overflows(twin_of(tmp_path / "half.onnx"), exported_tiny.x_NCHW) == []


@pytest.mark.parametrize("place", [0, 99])
def test_one_image_is_enough(tmp_path, place):
    x_NCHW = images() * 1e-3
    x_NCHW[place] = images(1)[0]
    assert len(overflows(twin_of(scaled(30_000, tmp_path)), x_NCHW)) == 2


def test_what_is_no_number_does_not_fit(tmp_path):
    x_NCHW = images(3)
    x_NCHW[1] = torch.nan
    assert len(overflows(twin_of(scaled(2, tmp_path)), x_NCHW)) >= 3


def test_looking_leaves_no_trace(tmp_path):
    twin = twin_of(scaled(2, tmp_path))
    overflows(twin, images(3))
    assert not any(module._forward_hooks for module in twin.modules())
