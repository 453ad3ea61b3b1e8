"""Fake quantisation is the arithmetic of ONNX Runtime, with a gradient."""

import numpy as np
import pytest
import torch

from compressor.onnx_model import load_onnx_model
from compressor.quantization import (
    FakeQuantize,
    FakeQuantizedWeight,
    channel_scales,
    quantize,
    quantized_weights,
)
from tests.onnx_files import constant, model_of_nodes, node, value

ZERO = constant("zero", np.int8(0))


@pytest.fixture
def rounded_by_runtime(tmp_path):
    """What ONNX Runtime makes of up to 640 numbers, as float steps or as values on the grid."""

    def rounded(x, scale, *, back=True):
        nodes = [
            node("Reshape", "images shape", "x"),
            node("QuantizeLinear", "x scale zero", "steps"),
            node("DequantizeLinear", "steps scale zero", "logits")
            if back
            else node("Cast", "steps", "logits", to=1),
        ]
        constants = [ZERO, constant("scale", np.float32(scale)), constant("shape", [1, x.numel()])]
        shapes = {
            "inputs": [value("images", [1, 1, 1, x.numel()])],
            "outputs": [value("logits", [1, x.numel()])],
        }
        path = tmp_path / "rounds.onnx"
        path.write_bytes(model_of_nodes(nodes, constants, **shapes).SerializeToString())
        return load_onnx_model(path)(x.reshape(1, 1, 1, -1)).flatten()

    return rounded


def halves(scale):
    """Every value half-way between two steps, those outside of the range too."""
    return (torch.arange(-140, 140) + 0.5) * scale


@pytest.mark.parametrize("scale", [0.25, 2**-7, 1.0])
def test_halves_are_rounded_to_even_as_the_runtime_does(rounded_by_runtime, scale):
    x = halves(scale)
    expected = rounded_by_runtime(x, scale)
    assert torch.equal(FakeQuantize(scale)(x), expected)
    assert torch.equal(quantize(x, scale) * scale, expected)
    assert torch.equal(quantize(x, scale), rounded_by_runtime(x, scale, back=False))
    assert expected.min() == -128 * scale
    assert expected.max() == 127 * scale


@pytest.mark.parametrize("scale", [0.0123, 0.3, 1 / 3, 7.7])
def test_random_values_are_rounded_as_the_runtime_does(rounded_by_runtime, scale):
    x = torch.randn(640, generator=torch.Generator().manual_seed(0)) * 60 * scale
    expected = rounded_by_runtime(x, scale)
    assert torch.equal(quantize(x, scale) * scale, expected)
    assert torch.equal(FakeQuantize(scale)(x), expected)


def test_bfloat16_is_rounded_as_its_float32_would_be():
    """Of 64 steps and more bfloat16 knows only every half one: the quotient needs float32."""
    x = (torch.arange(-1300, 1300) * 0.0137).bfloat16()
    for rounding in (FakeQuantize(0.137), lambda v: quantize(v, 0.137)):
        exact = rounding(x.float())
        assert torch.equal(rounding(x), exact.to(rounding(x).dtype))


def test_values_on_the_grid_stay():
    scale = 0.1
    x = torch.arange(-128, 128) * scale
    assert torch.allclose(FakeQuantize(scale)(x), x, atol=1e-6)


@pytest.mark.parametrize(
    ("rounding", "inside"),
    [(FakeQuantize(0.5), 1.0), (lambda x: quantize(x, 0.5), 2.0)],
    ids=["fake", "steps"],
)
def test_gradient_goes_straight_through_inside_and_stops_outside(rounding, inside):
    x = torch.tensor([-1000.0, -64.3, -63.9, -0.1, 0.0, 0.26, 63.4, 63.9, 1000.0])
    x.requires_grad_()
    rounding(x).sum().backward()
    expected = torch.tensor([0.0, 0, 1, 1, 1, 1, 1, 0, 0]) * inside
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("axis", [0, 1])
def test_scales_reach_the_largest_weight_of_each_channel(axis):
    weight = torch.randn(4, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    scale_K = channel_scales(weight, axis=axis)
    assert scale_K.shape == (weight.shape[axis],)
    steps = quantized_weights(weight, scale_K, axis=axis)
    assert steps.dtype == torch.int8
    largest = steps.abs().transpose(0, axis).flatten(1).amax(dim=1)
    assert largest.tolist() == [127] * len(scale_K)
    assert steps.min() == -127 or steps.max() == 127
    assert -128 not in steps


@pytest.mark.parametrize("axis", [0, 1])
def test_weights_are_rounded_to_their_nearest_step(axis):
    weight = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    module = FakeQuantizedWeight(weight, axis=axis)
    rounded = module().detach()
    scale_K = channel_scales(weight, axis=axis)
    sizes = [-1, 1] if axis == 0 else [1, -1]
    steps = quantized_weights(weight, scale_K, axis=axis)
    torch.testing.assert_close(rounded, steps * scale_K.reshape(sizes))
    error = (rounded - weight).abs() / scale_K.reshape(sizes)
    assert error.max() <= 0.5001
    assert torch.equal(module.latent, weight)


def test_weights_have_the_gradient_of_what_they_were_before_rounding():
    module = FakeQuantizedWeight(torch.tensor([[0.5, -1.0], [0.0, 3.0]]), axis=0)
    (module() * torch.tensor([[1.0, 2.0], [3.0, 4.0]])).sum().backward()
    assert module.latent.grad.tolist() == [[1, 2], [3, 4]]


def test_scales_follow_a_weight_that_grows():
    module = FakeQuantizedWeight(torch.tensor([[0.5, -1.0]]), axis=0)
    with torch.no_grad():
        module.latent[0, 1] = -4.0
    assert module.channel_scales().tolist() == pytest.approx([4 / 127])
    assert module()[0, 1] == -4.0


def test_a_channel_of_zeros_stays_zero():
    weight = torch.zeros(2, 3)
    weight[1, 0] = 1.0
    scale_K = channel_scales(weight, axis=0)
    assert scale_K.min() > 0
    assert quantized_weights(weight, scale_K, axis=0)[0].tolist() == [0, 0, 0]
    assert FakeQuantizedWeight(weight, axis=0)()[0].tolist() == [0, 0, 0]
