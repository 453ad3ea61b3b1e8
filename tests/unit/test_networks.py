import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn

from compressor.errors import RecipeError, WeightsError
from compressor.networks import (
    NETWORK_KEY,
    Classifier,
    NetworkSpec,
    build_classifier,
    count_parameters,
    evaluation_mode,
    load_classifier,
    save_classifier,
)
from compressor.weights import write_safetensors

SPEC = NetworkSpec(architecture="tiny", width=0.5, num_classes=4, image_shape=(3, 8, 8))
FULL_SPEC = dataclasses.replace(SPEC, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 0.2), resize_to=12)


@pytest.fixture(name="x_NCHW")
def make_x():
    return torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_spec_survives_metadata():
    assert NetworkSpec.from_metadata(FULL_SPEC.to_metadata()) == FULL_SPEC
    assert NetworkSpec.from_metadata(SPEC.to_metadata()) == SPEC


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": (0.5, 0.5, 0.5)}, "mean and std together"),
        ({"mean": (0.5,), "std": (0.5, 0.5, 0.5)}, "mean has 1 values for images of 3"),
        ({"mean": (0.5,) * 3, "std": (0.5, 0.0, 0.5)}, "std must be above 0"),
    ],
)
def test_impossible_normalisation_is_refused(change, message):
    with pytest.raises(RecipeError, match=message):
        dataclasses.replace(SPEC, **change)


@pytest.mark.parametrize("text", ["{", "[]", '{"image_shape": [3, 8]}', '{"new_key": 1}'])
def test_strange_metadata_are_explained(text):
    with pytest.raises(WeightsError, match="cannot be understood"):
        NetworkSpec.from_metadata({NETWORK_KEY: text})
    with pytest.raises(WeightsError, match="write ARCHITECTURE:FILE"):
        NetworkSpec.from_metadata({})


def test_preprocessing_resizes_then_normalises(x_NCHW):
    classifier = build_classifier(FULL_SPEC, seed=0).eval()
    seen = []
    classifier.backbone.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    logits_NK = classifier(x_NCHW)
    larger = F.interpolate(x_NCHW, size=(12, 12), mode="bilinear", align_corners=False)
    for channel, (mean, std) in enumerate(zip(FULL_SPEC.mean, FULL_SPEC.std, strict=True)):
        torch.testing.assert_close(seen[0][:, channel], (larger[:, channel] - mean) / std)
    assert logits_NK.shape == (5, 4)


def test_without_preprocessing_the_backbone_sees_the_images(x_NCHW):
    classifier = build_classifier(dataclasses.replace(SPEC, resize_to=8), seed=0).eval()
    assert torch.equal(classifier(x_NCHW), classifier.backbone(x_NCHW))
    assert classifier.preprocessing(x_NCHW) is x_NCHW


def test_constants_of_preprocessing_move_but_are_not_saved():
    classifier = build_classifier(FULL_SPEC, seed=0)
    assert all(name.startswith("backbone.") for name in classifier.state_dict())
    assert classifier.to(torch.float64).preprocessing.mean_C11.dtype == torch.float64


def test_a_resized_network_has_the_stem_of_its_own_size():
    spec = dataclasses.replace(SPEC, architecture="resnet18", width=0.05, resize_to=96)
    assert build_classifier(spec, seed=0).backbone.conv1.weight.shape[-1] == 7


def test_the_seed_decides_the_weights_whatever_the_global_state():
    torch.manual_seed(1)
    first = build_classifier(SPEC, seed=7).state_dict()
    torch.manual_seed(2)
    second = build_classifier(SPEC, seed=7).state_dict()
    other = build_classifier(SPEC, seed=8).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["backbone.conv1.weight"], other["backbone.conv1.weight"])


def test_building_leaves_global_randomness_alone(monkeypatch):
    def refuse(_seed):
        raise AssertionError("this also seeds accelerators, whose state is not put back")

    monkeypatch.setattr(torch, "manual_seed", refuse)
    before = torch.get_rng_state()
    build_classifier(SPEC, seed=7)
    assert torch.equal(torch.get_rng_state(), before)


def trained_a_little(spec):
    classifier = build_classifier(spec, seed=3).train()
    classifier(torch.rand(8, *spec.image_shape))  # statistics of BatchNorm other than at the start
    return classifier.eval()


@pytest.mark.parametrize("spec", [SPEC, FULL_SPEC])
def test_a_saved_classifier_comes_back_equal(tmp_path, x_NCHW, spec):
    classifier = trained_a_little(spec)
    save_classifier(tmp_path / "m.safetensors", classifier, spec, {})
    loaded, loaded_spec = load_classifier(tmp_path / "m.safetensors")
    assert loaded_spec == spec
    assert not any(module.training for module in loaded.modules())
    assert torch.equal(loaded(x_NCHW), classifier(x_NCHW))
    state = classifier.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())


def test_the_file_is_plain_for_others(tmp_path):
    classifier = trained_a_little(SPEC)
    metadata = {"class_names": ("a", "b"), "recipe_id": "1f"}
    save_classifier(tmp_path / "m.safetensors", classifier, SPEC, metadata)
    with safe_open(tmp_path / "m.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(classifier.backbone.state_dict())
        written = file.metadata()
    assert json.loads(written["robust_compress.class_names"]) == ["a", "b"]
    assert written["robust_compress.recipe_id"] == "1f"


@pytest.mark.parametrize("spec", [None, dataclasses.replace(SPEC, num_classes=5)])
def test_a_file_that_does_not_fit_is_named(tmp_path, spec):
    path = tmp_path / "m.safetensors"
    backbone = build_classifier(SPEC, seed=0).backbone
    write_safetensors(path, backbone.state_dict(), spec.to_metadata() if spec else {})
    with pytest.raises(WeightsError, match=r"m\.safetensors: the file"):
        load_classifier(path)


def test_evaluation_mode_puts_back_the_mode_of_each_layer():
    classifier = build_classifier(SPEC, seed=0).train()
    classifier.backbone.bn1.eval()

    def fail_inside():
        with evaluation_mode(classifier):
            assert not any(module.training for module in classifier.modules())
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    modes = {name: module.training for name, module in classifier.named_modules()}
    assert [name for name, training in modes.items() if not training] == ["backbone.bn1"]


def test_parameters_are_counted_without_buffers():
    network = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    network[0].weight.requires_grad = False
    assert count_parameters(network) == 3 * 2 + 2 + 2 + 2
    assert isinstance(build_classifier(SPEC, seed=0), Classifier)
