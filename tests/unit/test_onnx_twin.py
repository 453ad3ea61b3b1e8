"""Exported files answer as their network, and their twins as the files, in every precision."""

from functools import partial

import onnx  # noqa: TID253 (makes files)
import onnxruntime  # noqa: TID253 (the reference)
import pytest
import torch
import torchvision
from torchvision.models.mobilenetv3 import InvertedResidualConfig, MobileNetV3
from torchvision.models.vision_transformer import VisionTransformer

from compressor.networks import NetworkSpec, build_classifier
from compressor.onnx_graph import NoPlainGraphError, read_graph
from compressor.onnx_model import load_onnx_model
from compressor.onnx_twin import differentiable_twin, trainable_twin
from compressor.quantization import FakeQuantize
from compressor.quantization_workflow import float_weights
from exporters.int8.to_int8 import calibrate, quantized_layers, write_fine_tuned, write_int8
from exporters.to_float16 import write_float16
from exporters.to_onnx import OnnxForm, write_onnx
from tests.onnx_files import constant, linear_model, model_of_nodes, node

SMALL = (3, 8, 8)


def ours(architecture, *, width, seed=0):
    spec = NetworkSpec(
        architecture=architecture,
        width=width,
        num_classes=10,
        image_shape=SMALL,
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.3, 0.4),
    )
    return build_classifier(spec, seed=seed)


def mobilenet_v3():
    """torchvision's, with every operator that it has, but two blocks instead of eleven."""
    options = {"use_se": True, "dilation": 1, "width_mult": 1.0}
    blocks = [
        InvertedResidualConfig(16, 3, 16, 16, activation="RE", stride=2, **options),
        InvertedResidualConfig(16, 5, 32, 24, activation="HS", stride=1, **options),
    ]
    return MobileNetV3(blocks, last_channel=64, num_classes=10)


NETWORKS = {
    "tiny": (partial(ours, "tiny", width=0.5), SMALL),
    "resnet18": (partial(ours, "resnet18", width=1 / 32), SMALL),
    "mobilenet_v2": (partial(ours, "mobilenet_v2", width=1 / 16), SMALL),
    "resnet56": (partial(ours, "resnet56", width=1 / 8), SMALL),
    "wide_resnet_22_6": (partial(ours, "wide_resnet_22_6", width=1 / 48), SMALL),
    "wide_resnet_34_10": (partial(ours, "wide_resnet_34_10", width=1 / 80), SMALL),
    "torchvision resnet18": (partial(torchvision.models.resnet18, num_classes=10), (3, 32, 32)),
    "torchvision mobilenet_v3": (mobilenet_v3, (3, 32, 32)),
    "torchvision vision transformer": (
        partial(
            VisionTransformer,
            image_size=16,
            patch_size=4,
            num_layers=1,
            num_heads=2,
            hidden_dim=16,
            mlp_dim=32,
            num_classes=10,
        ),
        (3, 16, 16),
    ),
}
"""How it is built, and for which images."""


def images(num_images, image_shape=SMALL, *, seed=0, takes_bytes=False):
    generator = torch.Generator().manual_seed(seed)
    x_NCHW = torch.rand(num_images, *image_shape, generator=generator)
    return (x_NCHW * 255).round() / 255 if takes_bytes else x_NCHW


@torch.no_grad()
def settled(build, image_shape):
    """A seeded network whose statistics are those of some images, so that it tells images apart."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build().train()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the mean of all batches
    for seed in range(2):
        network(images(32, image_shape, seed=10 + seed))
    last = [module for module in network.modules() if isinstance(module, torch.nn.Linear)][-1]
    torch.nn.init.normal_(last.weight, generator=torch.Generator().manual_seed(0))
    last.bias -= network.eval()(images(32, image_shape, seed=10)).mean(dim=0)
    return network


@pytest.fixture(scope="module", params=NETWORKS)
def exported(request, tmp_path_factory):
    """A network, its image shape, and its file in float32."""
    build, image_shape = NETWORKS[request.param]
    network = settled(build, image_shape)
    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    write_onnx(network, path, form=OnnxForm(image_shape=image_shape), metadata={})
    return network, image_shape, path


def rounded(float32, path, image_shape, *, takes_bytes=False):
    """The int8 file."""
    batches = [images(16, image_shape, seed=20 + seed) for seed in range(2)]
    if takes_bytes:
        batches = [(batch * 255).round().to(torch.uint8) for batch in batches]
    ranges = calibrate(float32, (batch.numpy() for batch in batches), method="minmax")
    write_int8(float32, path, ranges, metadata={})
    return path


def twin_of(path):
    model = load_onnx_model(path)
    graph = read_graph(model.content, path)
    return model, differentiable_twin(graph, takes_bytes=model.takes_bytes).eval()


@torch.no_grad()
def error_fraction(found, expected):
    """Of the power of what differs from image to image; the mean would hide errors."""
    return float((found - expected).norm() / (expected - expected.mean(dim=0)).norm())


def test_float32_is_the_network_and_its_twin(exported):
    network, image_shape, path = exported
    model, twin = twin_of(path)
    x_NCHW = images(40, image_shape)
    with torch.no_grad():
        of_network = network(x_NCHW)
    assert torch.equal(model(x_NCHW).argmax(dim=1), of_network.argmax(dim=1))
    assert len(of_network.argmax(dim=1).unique()) > 1
    assert error_fraction(model(x_NCHW), of_network) < 1e-4
    assert error_fraction(twin(x_NCHW), of_network) < 1e-4


def test_twin_has_the_gradient_of_the_network(exported):
    network, image_shape, path = exported
    _, twin = twin_of(path)
    gradients = []
    for model in (network, twin):
        x_NCHW = images(4, image_shape).requires_grad_()
        model(x_NCHW).square().sum().backward()
        gradients.append(x_NCHW.grad)
    assert gradients[0].norm() > 0
    assert float((gradients[0] - gradients[1]).norm() / gradients[0].norm()) < 1e-3
    assert not any(parameter.requires_grad for parameter in twin.parameters())


def test_float16_is_its_twin(exported, tmp_path):
    _, image_shape, path = exported
    write_float16(path, tmp_path / "half.onnx", metadata={})
    model, twin = twin_of(tmp_path / "half.onnx")
    x_NCHW = images(40, image_shape)
    assert error_fraction(twin(x_NCHW), model(x_NCHW)) < 0.02
    assert model.num_bytes < path.stat().st_size


def test_int8_is_its_twin(exported, tmp_path):
    """Unless ONNX Runtime rounds the biases as well, which it does by itself.

    Sums are taken in another order, so now and then a value falls on the other side of a step.
    """
    _, image_shape, path = exported
    model, twin = twin_of(rounded(path, tmp_path / "int8.onnx", image_shape))
    x_NCHW = images(40, image_shape)
    session = onnxruntime.InferenceSession(
        model.content,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=["WeightBiasQuantization"],
    )
    (logits_NK,) = session.run(None, {"images": x_NCHW.numpy()})
    difference_N = (twin(x_NCHW) - torch.from_numpy(logits_NK)).norm(dim=1)
    assert (difference_N < 1e-4).float().mean() > 0.7
    assert error_fraction(twin(x_NCHW), torch.from_numpy(logits_NK)) < 0.1
    assert error_fraction(twin(x_NCHW), load_onnx_model(path)(x_NCHW)) > 1e-3  # it does round
    rounders = [m for m in twin.modules() if isinstance(m, FakeQuantize)]
    assert len(twin.named_rounders()) == len(rounders) <= len(quantized_layers(path))
    x_NCHW.requires_grad_()
    twin(x_NCHW).sum().backward()
    assert x_NCHW.grad.norm() > 0


def test_int8_in_the_runtime_is_nearly_its_twin(rounded_tiny):
    """With every optimisation, as it is deployed."""
    model, twin = twin_of(rounded_tiny[1])
    x_NCHW = images(200)
    assert error_fraction(twin(x_NCHW), model(x_NCHW)) < 0.03
    assert (twin(x_NCHW).argmax(dim=1) == model(x_NCHW).argmax(dim=1)).float().mean() > 0.97


@pytest.mark.parametrize("num_images", [1, 3, 7])
def test_a_file_of_one_batch_size_that_takes_bytes_is_its_twin(bytes_file, num_images, tmp_path):
    network, path = bytes_file
    x_NCHW = images(num_images, takes_bytes=True)
    int8 = rounded(path, tmp_path / "int8.onnx", SMALL, takes_bytes=True)
    for file in (path, int8):
        model, twin = twin_of(file)
        assert (model.batch_size, model.takes_bytes) == (3, True)
        found, expected = twin(x_NCHW), model(x_NCHW)
        assert found.shape == (num_images, 10)
        torch.testing.assert_close(found, expected, rtol=0.01, atol=0.05)
    with torch.no_grad():
        torch.testing.assert_close(twin_of(path)[0](x_NCHW), network(x_NCHW), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def bytes_file(tmp_path_factory):
    network = settled(partial(ours, "tiny", width=0.5), SMALL)
    path = tmp_path_factory.mktemp("bytes") / "model.onnx"
    form = OnnxForm(image_shape=SMALL, takes_bytes=True, static_batch=3)
    write_onnx(network, path, form=form, metadata={})
    return network, path


def test_pixels_between_bytes_have_a_gradient(bytes_file):
    """The file rounds them; an attacker must get past that."""
    _, twin = twin_of(bytes_file[1])
    x_NCHW = (images(3, takes_bytes=True) + 0.3 / 255).requires_grad_()
    logits = twin(x_NCHW)
    torch.testing.assert_close(logits, twin(images(3, takes_bytes=True)))
    logits.sum().backward()
    assert x_NCHW.grad.norm() > 0


# The twin that is trained


@pytest.fixture(scope="module")
def rounded_tiny(tmp_path_factory):
    """Files in float32 and int8."""
    folder = tmp_path_factory.mktemp("rounded")
    network = settled(partial(ours, "tiny", width=0.5), SMALL)
    write_onnx(network, folder / "model.onnx", form=OnnxForm(image_shape=SMALL), metadata={})
    return folder / "model.onnx", rounded(folder / "model.onnx", folder / "int8.onnx", SMALL)


def trainable(float32, int8):
    graph = read_graph(int8.read_bytes(), int8)
    weights = float_weights(graph, read_graph(float32.read_bytes(), float32))
    return trainable_twin(graph, weights), weights


def test_a_trainable_twin_begins_as_the_file(rounded_tiny):
    float32, int8 = rounded_tiny
    twin, weights = trainable(float32, int8)
    x_NCHW = images(20)
    assert error_fraction(twin(x_NCHW), load_onnx_model(int8)(x_NCHW)) < 0.01
    constants = twin.trained_constants()
    assert {name: value for name, value in constants.items() if name in weights}.keys() == (
        weights.keys()
    )
    assert len(constants) == len(weights) + 4 == 8  # and the biases


def test_what_was_trained_is_what_the_file_then_computes(rounded_tiny, tmp_path):
    float32, int8 = rounded_tiny
    twin, _ = trainable(float32, int8)
    before = {name: value.clone() for name, value in twin.trained_constants().items()}
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.01)
    x_NCHW = images(20)
    loss = torch.nn.functional.cross_entropy(twin(x_NCHW), torch.arange(20) % 10)
    loss.backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in twin.parameters())
    optimizer.step()
    trained = twin.trained_constants()
    assert all(not torch.equal(trained[name], value) for name, value in before.items())
    write_fine_tuned(int8, tmp_path / "tuned.onnx", trained, metadata={"a": "b"})
    tuned = load_onnx_model(tmp_path / "tuned.onnx")
    assert tuned.metadata == {"a": "b"}
    assert error_fraction(tuned(x_NCHW), twin(x_NCHW)) < 0.01
    assert error_fraction(tuned(x_NCHW), load_onnx_model(int8)(x_NCHW)) > 0.01


# What has no twin


def graph_of(model, tmp_path):
    return read_graph(model.SerializeToString(), tmp_path / "some.onnx")


def test_an_unknown_operator_is_named(tmp_path):
    graph = graph_of(
        linear_model(node("Sin", "raw", "sine"), node("Sum", "sine"), name="raw"), tmp_path
    )
    with pytest.raises(NoPlainGraphError, match="without a derivative here: Sin, Sum$"):
        differentiable_twin(graph)


def test_a_constant_that_cannot_be_computed_is_explained(tmp_path):
    sizes = [constant("a", [1.0, 2.0]), constant("b", [1.0, 2.0, 3.0])]
    nodes = [node("Add", "a b", "c"), node("Add", "images c")]
    graph = graph_of(model_of_nodes(nodes, sizes), tmp_path)
    with pytest.raises(NoPlainGraphError, match="Add 'Add_c' cannot be computed"):
        differentiable_twin(graph)


def test_asymmetric_activations_have_no_twin(rounded_tiny, tmp_path):
    """They would be attacked as what they are not."""
    model = onnx.load(rounded_tiny[1])
    for tensor in model.graph.initializer:
        if tensor.name.endswith("zero_point") and not tensor.dims:
            tensor.CopyFrom(constant(tensor.name, torch.tensor(5, dtype=torch.int8).numpy()))
    with pytest.raises(NoPlainGraphError, match="is not symmetric int8"):
        differentiable_twin(graph_of(model, tmp_path))(images(1))
