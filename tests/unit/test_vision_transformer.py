"""The vision transformer is torchvision's, for images of any shape that its patches divide."""

import pytest
import torch
import torchvision

from compressor.architectures import vision_transformer
from compressor.architectures.build import build_backbone, infer_width
from compressor.architectures.vision_transformer import NUM_BLOCKS, Attention
from compressor.errors import RecipeError
from compressor.networks import NetworkSpec, build_classifier
from compressor.onnx_graph import read_graph
from compressor.onnx_model import load_onnx_model
from compressor.onnx_twin import differentiable_twin
from exporters.to_onnx import OnnxForm, write_onnx


def build(image_shape=(3, 32, 32), *, width=1.0, num_classes=10):
    return build_backbone(
        "vit_6_192", num_classes=num_classes, image_shape=image_shape, width=width
    ).eval()


def in_torchvisions_names(state):
    """Tensors of ours as torchvision calls them."""
    names = {"patches": "conv_proj", "positions": "encoder.pos_embedding", "norm": "encoder.ln"}
    names |= {"fc": "heads.head"}
    inner = {"norm1": "ln_1", "norm2": "ln_2", "fc1": "mlp.0", "fc2": "mlp.3"}
    inner |= {"attention.out": "self_attention.out_proj"}
    renamed = {}
    for key, tensor in state.items():
        for ours, theirs in names.items():
            if key.startswith(ours):
                key = theirs + key.removeprefix(ours)
        for number in range(NUM_BLOCKS):
            key = key.replace(f"blocks.{number}.", f"encoder.layers.encoder_layer_{number}.")
        for ours, theirs in inner.items():
            key = key.replace(f".{ours}.", f".{theirs}.")
        key = key.replace(".attention.qkv.", ".self_attention.in_proj_")
        renamed[key] = tensor
    return renamed


def test_it_computes_what_torchvision_does():
    torch.manual_seed(0)
    ours = build()
    theirs = torchvision.models.VisionTransformer(
        image_size=32,
        patch_size=4,
        num_layers=6,
        num_heads=3,
        hidden_dim=192,
        mlp_dim=768,
        num_classes=10,
    ).eval()
    theirs.load_state_dict(in_torchvisions_names(ours.state_dict()))
    x_NCHW = torch.rand(3, 3, 32, 32)
    torch.testing.assert_close(ours(x_NCHW), theirs(x_NCHW), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("image_shape", "num_tokens"),
    [((1, 8, 8), 5), ((3, 32, 32), 65), ((3, 28, 60), 106), ((3, 64, 64), 257), ((3, 80, 96), 31)],
)
def test_patches_are_larger_on_larger_images(image_shape, num_tokens):
    network = build(image_shape, width=0.1)
    assert network.positions.shape[1] == num_tokens
    assert network(torch.rand(2, *image_shape)).shape == (2, 10)


@pytest.mark.parametrize(
    ("image_shape", "message"),
    [
        ((3, 30, 32), r"patches of 4x4 pixels, and 3x30x32 .* data.image_size = 28 or 32"),
        ((1, 9, 9), r"1x9x9 .* data.image_size = 8 or 12"),
        ((3, 100, 100), r"patches of 16x16 pixels, and 3x100x100 .* data.image_size = 96 or 112"),
    ],
)
def test_images_that_leave_a_rest_are_refused(image_shape, message):
    with pytest.raises(RecipeError, match=message):
        build(image_shape)


@pytest.mark.parametrize("width", [1.0, 0.5, 0.3, 1 / 3, 0.01, 1.25])
def test_heads_have_a_third_of_the_features_rounded(width):
    network = build(width=width)
    features = network.patches.weight.shape[0]
    attention = network.blocks[0].attention
    assert isinstance(attention, Attention)
    assert attention.head_features == max(1, round(features / 3))
    assert infer_width("vit_6_192", network.state_dict()) == pytest.approx(width, abs=0.003)


def test_it_starts_with_answers_that_have_a_gradient():
    network = build((3, 8, 8))
    x_NCHW = torch.rand(4, 3, 8, 8, requires_grad=True)
    network(x_NCHW).square().sum().backward()
    assert (x_NCHW.grad.flatten(1).abs().amax(dim=1) > 1e-4).all()


def test_its_file_answers_alike_and_has_a_twin(tmp_path, monkeypatch):
    """Attention is made of operators that the twin knows, so the file can be attacked itself."""
    monkeypatch.setattr(vision_transformer, "NUM_BLOCKS", 1)  # exporting takes long
    spec = NetworkSpec(architecture="vit_6_192", width=0.1, num_classes=4, image_shape=(3, 16, 16))
    network = build_classifier(spec, seed=0).eval()
    path = tmp_path / "vit.onnx"
    write_onnx(network, path, form=OnnxForm(image_shape=(3, 16, 16)), metadata={})
    x_NCHW = torch.rand(5, 3, 16, 16)
    expected = network(x_NCHW).detach()
    model = load_onnx_model(path)
    twin = differentiable_twin(read_graph(path.read_bytes(), path))
    for answer in (model, twin):
        torch.testing.assert_close(answer(x_NCHW).detach(), expected, rtol=1e-4, atol=1e-5)
