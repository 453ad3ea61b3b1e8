import hashlib
import json
import math
import os
import pickle
import struct

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from compressor.architectures.build import build_backbone
from compressor.errors import WeightsError
from compressor.weights import (
    count_classes,
    fit_to_layout,
    normalisation_in,
    read_state_dict,
    sha256_of_file,
    write_safetensors,
)


class RunsCode:
    """Unpickling it makes a folder."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.fixture
def tensors():
    return {"conv1.weight": torch.arange(36.0).view(1, 4, 3, 3), "fc.bias": torch.ones(2)}


def build(name, *, num_classes=4, width=0.125, image_shape=(3, 32, 32)):
    return build_backbone(name, num_classes=num_classes, image_shape=image_shape, width=width)


def weights_of(network):
    return {name: t for name, t in network.state_dict().items() if not name.endswith("_tracked")}


def renamed(state, *pairs):
    for old, new in pairs:
        state = {name.replace(old, new): tensor for name, tensor in state.items()}
    return state


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_safetensors_come_back_with_metadata_and_hash(tmp_path, tensors):
    path = tmp_path / "w.safetensors"
    write_safetensors(path, tensors, {"a": "ä", "b": "2"})
    content = read_state_dict(path)
    assert_same(content.tensors, tensors)
    assert content.metadata == {"a": "ä", "b": "2"}
    assert content.sha256 == sha256_of_file(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert_same(load_file(path), tensors)
    assert [file.name for file in tmp_path.iterdir()] == ["w.safetensors"]


def test_layout_in_memory_does_not_reach_the_file(tmp_path, tensors):
    write_safetensors(tmp_path / "a.safetensors", tensors, {})
    strided = {name: t.clone() for name, t in tensors.items()}
    strided["conv1.weight"] = strided["conv1.weight"].to(memory_format=torch.channels_last)
    strided["fc.bias"] = torch.ones(4, requires_grad=True)[::2]
    write_safetensors(tmp_path / "b.safetensors", strided, {})
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_same_content_gives_the_same_bytes(tmp_path, tensors):
    metadata = {f"key{i}": "v" for i in range(12)}
    for number in range(4):
        # The library's own order of texts changes from call to call.
        write_safetensors(tmp_path / f"{number}.safetensors", tensors, metadata)
    assert len({file.read_bytes() for file in tmp_path.iterdir()}) == 1
    content = (tmp_path / "0.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    assert length % 8 == 0
    assert list(json.loads(content[8 : 8 + length])["__metadata__"]) == sorted(metadata)


def test_a_folder_that_cannot_be_written_is_explained(tmp_path, tensors):
    (tmp_path / "file").touch()
    with pytest.raises(WeightsError, match="cannot be written"):
        write_safetensors(tmp_path / "file" / "w.safetensors", tensors, {})


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ".tar"])
def test_checkpoints_of_pytorch_are_read(tmp_path, tensors, suffix):
    torch.save(tensors, tmp_path / f"w{suffix}")
    assert_same(read_state_dict(tmp_path / f"w{suffix}").tensors, tensors)


@pytest.mark.parametrize("new_format", [True, False])
def test_both_formats_of_pytorch_are_read(tmp_path, tensors, new_format):
    torch.save(tensors, tmp_path / "w.pt", _use_new_zipfile_serialization=new_format)
    assert_same(read_state_dict(tmp_path / "w.pt").tensors, tensors)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda t: {"state_dict": t, "epoch": 3},
        lambda t: {"model": {"state_dict": t}, "optimizer": {"lr": 0.1}},
        lambda t: {"net": t, "acc": 93.0},
        lambda t: {"model_state_dict": t},
        lambda t: {"ema": t},
        lambda t: {f"module.{name}": tensor for name, tensor in t.items()},
        lambda t: {f"_orig_mod.module.model.{name}": tensor for name, tensor in t.items()},
        lambda t: {name: nn.Parameter(tensor) for name, tensor in t.items()},
    ],
)
def test_wrapping_is_taken_off(tmp_path, tensors, wrap):
    torch.save(wrap(tensors), tmp_path / "w.pt")
    found = read_state_dict(tmp_path / "w.pt").tensors
    assert_same(found, tensors)
    assert not any(tensor.requires_grad for tensor in found.values())


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("with_torch", [True, False])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path, tensors, with_torch, protocol):
    path, trace = tmp_path / "w.pt", tmp_path / "code-ran"
    malicious = {**tensors, "x": RunsCode(trace)}
    if with_torch:
        torch.save(malicious, path, pickle_protocol=protocol)
    else:
        path.write_bytes(pickle.dumps(RunsCode(trace), protocol=protocol))
    with pytest.raises(WeightsError, match=r"w\.pt wants to run code.*safetensors.*ONNX"):
        read_state_dict(path)
    assert not trace.exists()
    if not with_torch:
        pickle.loads(path.read_bytes())
        assert trace.exists(), "the file of this test must be harmful"


def test_a_whole_pickled_module_is_refused(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "w.pt")
    with pytest.raises(
        WeightsError, match=r"wants to run code.*torch\.nn\.modules\.linear\.Linear"
    ):
        read_state_dict(tmp_path / "w.pt")


def test_pt2_archives_are_refused_without_a_look(tmp_path):
    (tmp_path / "w.pt2").write_bytes(b"anything")
    with pytest.raises(WeightsError, match=r"\.pt2.*execute code.*ONNX"):
        read_state_dict(tmp_path / "w.pt2")


def write_half(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_damaged_files_are_explained(tmp_path, tensors, name):
    path = tmp_path / name
    with pytest.raises(WeightsError, match=f"{name} does not exist"):
        read_state_dict(path)
    path.touch()
    with pytest.raises(WeightsError, match=f"{name} is empty"):
        read_state_dict(path)
    path.write_bytes(b"hello, this is no file of weights")
    with pytest.raises(WeightsError, match=f"{name} is damaged"):
        read_state_dict(path)
    if name == "w.pt":
        torch.save(tensors, path)
    else:
        write_safetensors(path, tensors, {})
    write_half(path)
    with pytest.raises(WeightsError, match=f"{name} is damaged"):
        read_state_dict(path)


def test_folders_and_other_suffixes_are_explained(tmp_path):
    with pytest.raises(WeightsError, match="is a folder"):
        read_state_dict(tmp_path)
    (tmp_path / "w.h5").write_bytes(b"x")
    with pytest.raises(WeightsError, match=r"'\.h5' is not a kind of weights.*\.safetensors"):
        read_state_dict(tmp_path / "w.h5")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list, not a table"),
        ({}, "an empty dict"),
        ({"a": torch.ones(1), "b": 3}, "'b' is a int, not a tensor"),
        ({"module.a": torch.ones(1), "a": torch.ones(1)}, "two networks"),
    ],
)
def test_other_content_is_explained(tmp_path, content, message):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match=message):
        read_state_dict(tmp_path / "w.pt")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_no_numbers_are_refused(tmp_path, tensors, value):
    tensors["fc.bias"][1] = value
    write_safetensors(tmp_path / "w.safetensors", tensors, {})
    with pytest.raises(WeightsError, match=r"'fc\.bias' holds NaN or infinity"):
        read_state_dict(tmp_path / "w.safetensors")


WILD_LAYOUTS = {
    "torchvision": ("resnet18", lambda state: state),
    "kuangliu resnet": (
        "resnet18",
        lambda state: renamed(state, ("downsample", "shortcut"), ("fc.", "linear.")),
    ),
    "kuangliu mobilenet": ("mobilenet_v2", lambda state: state),
    "chenyaofo resnet56": ("resnet56", lambda state: state),
    "TRADES": (
        "wide_resnet_34_10",
        lambda state: (
            state | {f"sub_{name}": t for name, t in state.items() if name.startswith("block1.")}
        ),
    ),
    "DeepMind": (
        "wide_resnet_22_6",
        lambda state: state | {"mean": torch.rand(3, 1, 1), "std": torch.rand(3, 1, 1)},
    ),
}


@pytest.mark.parametrize("layout", WILD_LAYOUTS)
@pytest.mark.parametrize("with_counters", [True, False])
def test_layouts_found_in_the_wild_are_understood(layout, with_counters):
    name, change = WILD_LAYOUTS[layout]
    source, target = build(name), build(name)
    state = source.state_dict() if with_counters else weights_of(source)
    target.load_state_dict(fit_to_layout(change(dict(state)), target), strict=True)
    assert_same(weights_of(target), weights_of(source))


def test_names_of_published_networks_are_ours():
    trades, deepmind = (build(f"wide_resnet_{name}").state_dict() for name in ("34_10", "22_6"))
    assert {"conv1.weight", "block1.layer.0.convShortcut.weight", "bn1.bias"} <= trades.keys()
    assert {"block3.layer.4.conv2.weight", "fc.weight"} <= trades.keys()
    assert {"init_conv.weight", "layer.0.block.0.shortcut.weight"} <= deepmind.keys()
    assert {"layer.2.block.2.batchnorm_1.weight", "logits.bias"} <= deepmind.keys()
    resnet = build("resnet18").state_dict()
    assert {"layer2.0.downsample.0.weight", "layer4.1.bn2.running_var"} <= resnet.keys()


def test_normalisation_inside_a_model_is_found():
    mean, std = torch.tensor([0.5, 0.25, 0.75]).view(3, 1, 1), torch.tensor([0.5])
    found = normalisation_in({"normalize.mean": mean, "normalize.std": std}, num_channels=3)
    assert found == ((0.5, 0.25, 0.75), (0.5, 0.5, 0.5))
    assert normalisation_in({"bn1.running_mean": mean, "mean": mean}, num_channels=3) is None


def test_classes_are_counted_under_any_name():
    network = build("resnet18", num_classes=4)
    wild = renamed(build("resnet18", num_classes=7).state_dict(), ("fc.", "linear."))
    assert count_classes(wild, network) == 7
    assert count_classes({"a": torch.ones(2, 2)}, network) is None


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"num_classes": 7}, r"'fc\.weight'.*\(7, 64\).*\(4, 64\).*7 classes, the network 4"),
        ({"width": 0.25}, r"2 times as wide"),
        ({"image_shape": (1, 32, 32)}, r"images of 1 channels, the network of 3"),
        ({"image_shape": (3, 96, 96)}, r"7x7 convolution, the network with 3x3.*resize_to"),
    ],
)
def test_a_mismatch_is_named_and_explained(source, message):
    with pytest.raises(WeightsError, match=message):
        fit_to_layout(build("resnet18", **source).state_dict(), build("resnet18"))


def test_at_most_three_keys_are_listed():
    with pytest.raises(WeightsError) as caught:
        fit_to_layout(build("tiny").state_dict(), build("resnet18"))
    assert str(caught.value).count("has no") == 3
    assert "more. Next: name the architecture" in str(caught.value)


def test_missing_and_unexpected_keys_are_named():
    state = build("tiny").state_dict()
    del state["fc.bias"]
    state["extra"] = torch.ones(2)
    with pytest.raises(WeightsError, match=r"has no 'fc\.bias' \(4,\); has 'extra' \(2,\)"):
        fit_to_layout(state, build("tiny"))
