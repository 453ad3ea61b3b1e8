import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from compressor.architectures import wide_resnet
from compressor.architectures.build import ARCHITECTURES, build_backbone, infer_width
from compressor.architectures.wide_resnet import same_padding
from compressor.errors import RecipeError, WeightsError

NARROW = {"wide_resnet_22_6": 0.05, "wide_resnet_34_10": 0.03, "wide_resnet_70_16": 0.02}


def build(name, *, image_shape=(3, 32, 32), num_classes=10, width=None):
    width = NARROW.get(name, 0.25) if width is None else width
    return build_backbone(name, num_classes=num_classes, image_shape=image_shape, width=width)


def build_without_weights(name, *, num_classes=10, width=1.0):
    with torch.device("meta"):
        return build(name, num_classes=num_classes, width=width)


@pytest.mark.parametrize(
    ("name", "num_classes", "width", "expected"),
    [
        ("resnet18", 10, 1.0, 11_173_962),
        ("resnet18", 10, 0.5, 2_797_610),
        ("resnet56", 10, 1.0, 855_770),
        ("mobilenet_v2", 10, 1.0, 2_296_922),
        ("wide_resnet_34_10", 10, 1.0, 46_160_474),
        ("wide_resnet_70_16", 10, 1.0, 266_796_506),
        ("wide_resnet_22_6", 100, 1.0, 9_693_108),
        ("tiny", 10, 1.0, 6_418),
        ("vit_6_192", 10, 1.0, 2_693_578),
    ],
)
def test_number_of_parameters_is_the_published_one(name, num_classes, width, expected):
    network = build_without_weights(name, num_classes=num_classes, width=width)
    assert sum(parameter.numel() for parameter in network.parameters()) == expected


@pytest.mark.parametrize("image_shape", [(1, 8, 8), (3, 32, 32), (3, 40, 24), (3, 29, 19)])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_runs_on_every_kind_of_image_and_can_be_traced(name, image_shape):
    if name == "vit_6_192" and image_shape == (3, 29, 19):
        image_shape = (3, 28, 20)  # whole patches
    network = build(name, image_shape=image_shape, num_classes=5).eval()
    x_NCHW = torch.rand(2, *image_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits_NK = network(x_NCHW)
        torch.testing.assert_close(fx.symbolic_trace(network)(x_NCHW), logits_NK)
        in_other_layout_NK = network(x_NCHW.contiguous(memory_format=torch.channels_last))
    assert logits_NK.shape == (2, 5)
    torch.testing.assert_close(in_other_layout_NK, logits_NK, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_images_and_weights_get_gradients(name):
    network = build(name, image_shape=(3, 8, 8)).train()
    x_NCHW = torch.rand(4, 3, 8, 8, requires_grad=True)
    network(x_NCHW).square().sum().backward()
    assert x_NCHW.grad is not None
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "wide_resnet_22_6"])
def test_large_images_are_reduced_early(name):
    sizes = {}
    for side in (64, 72):
        with torch.device("meta"):
            network = build(name, image_shape=(3, side, side))
            layers = [layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)]
            layers[-1].register_forward_hook(
                lambda _layer, _inputs, out, side=side: sizes.update({side: out.shape[-1]})
            )
            network(torch.zeros(2, 3, side, side))
    assert sizes[72] < sizes[64]


@pytest.mark.parametrize("width", [1.0, 0.5, 0.3, 1 / 3, 0.01, 1.25])
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "wide_resnet_70_16"])
def test_width_read_from_weights_builds_the_same_network(name, width):
    state = build_without_weights(name, width=width).state_dict()
    inferred = infer_width(name, state)
    again = build_without_weights(name, width=inferred).state_dict()
    assert {key: t.shape for key, t in again.items()} == {key: t.shape for key, t in state.items()}


def test_inferred_width_is_the_number_that_was_written():
    state = build_without_weights("resnet18", width=0.3).state_dict()
    assert infer_width("resnet18", state) == 0.3


def test_width_of_other_weights_is_refused():
    with pytest.raises(WeightsError, match=r"not weights of resnet18.*'layer1\.0"):
        infer_width("resnet18", build_without_weights("tiny").state_dict())
    mixed = build_without_weights("tiny").state_dict()
    mixed["conv1.weight"] = torch.empty(80, 3, 3, 3)
    with pytest.raises(WeightsError, match="no width of tiny"):
        infer_width("tiny", mixed)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("in_channels", [2, 4])
def test_pre_activation_blocks_compute_what_their_authors_wrote(in_channels, stride):
    """The shortcut starts after the first activation where the shape changes, else before."""
    torch.manual_seed(0)
    x_NCHW = torch.randn(2, in_channels, 8, 8)
    trades = wide_resnet.TradesBlock(in_channels, 4, stride=stride).eval()
    swish = wide_resnet.SwishBlock(in_channels, 4, stride=stride, size_hw=(8, 8)).eval()
    scale = (1 + trades.bn1.eps) ** -0.5  # of BatchNorm with its first statistics
    for block, activate, layers, padding in (
        (trades, F.relu, ("conv1", "conv2", "convShortcut"), (1, 1, 1, 1)),
        (swish, F.silu, ("conv_0", "conv_1", "shortcut"), (2 - stride, 1, 2 - stride, 1)),
    ):
        first, second, shortcut = (block.get_submodule(name) for name in layers)
        active = activate(x_NCHW * scale)
        out = F.conv2d(F.pad(active, padding), first.weight, stride=stride)
        out = F.conv2d(activate(out * scale), second.weight, padding=1)
        changes_shape = stride == 2 or in_channels != 4
        skipped = F.conv2d(active, shortcut.weight, stride=stride) if changes_shape else x_NCHW
        torch.testing.assert_close(block(x_NCHW), skipped + out)


@pytest.mark.parametrize("size", [7, 8])
@pytest.mark.parametrize("stride", [1, 2])
def test_same_padding_gives_a_stride_th_of_the_size(size, stride):
    left, right, top, bottom = same_padding((size, 16), stride=stride)
    assert (size + top + bottom - 3) // stride + 1 == -(-size // stride)
    assert (left, right) == ((0, 1) if stride == 2 else (1, 1))


def test_unknown_names_get_a_suggestion():
    with pytest.raises(RecipeError, match=r"'resnet81' is not known; did you mean resnet18\?"):
        build("resnet81")
    with pytest.raises(RecipeError, match=r"'resnet5O'.*did you mean resnet50"):
        build("torchvision:resnet5O", width=1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_shape": (2, 32, 32)}, "2x32x32"),
        ({"image_shape": (3, 7, 32)}, "3x7x32"),
        ({"num_classes": 1}, "at least 2 classes"),
        ({"width": 0.0}, "width 0.0"),
        ({"width": float("nan")}, "width nan"),
    ],
)
def test_impossible_values_are_refused(change, message):
    with pytest.raises(RecipeError, match=message):
        build("tiny", **change)


def test_torchvision_networks_are_built_for_the_classes():
    network = build(
        "torchvision:mobilenet_v3_small", image_shape=(3, 32, 32), num_classes=7, width=1.0
    )
    assert network.eval()(torch.rand(1, 3, 32, 32)).shape == (1, 7)


@pytest.mark.parametrize(
    ("name", "image_shape", "width", "message"),
    [
        ("torchvision:alexnet", (3, 16, 16), 1.0, "cannot take images of 3x16x16"),
        ("torchvision:resnet18", (1, 32, 32), 1.0, "num_channels = 3"),
        ("torchvision:resnet18", (3, 32, 32), 0.5, "has no width"),
        ("torchvision:inception_v3", (3, 299, 299), 1.0, "no classifier 'inception_v3'"),
    ],
)
def test_what_torchvision_cannot_do_is_refused(name, image_shape, width, message):
    with pytest.raises(RecipeError, match=message):
        build(name, image_shape=image_shape, width=width)
