import dataclasses
import json

import onnx  # noqa: TID253 (makes the files)
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper  # noqa: TID253
from torch import Tensor

from compressor.architectures.build import build_backbone
from compressor.errors import ArtefactMismatchError, RecipeError, TeacherError, WeightsError
from compressor.networks import NetworkSpec, build_classifier, save_classifier
from compressor.recipe import TeacherRecipe
from compressor.teachers import CLASS_NAMES_KEY, load_teacher
from compressor.weights import sha256_of_file, write_safetensors

CLASSES = ("ant", "bee", "cat", "dog")
SPEC = NetworkSpec(architecture="tiny", width=0.5, num_classes=4, image_shape=(3, 8, 8))
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)


def load(source, *, class_names=CLASSES, image_shape=(3, 8, 8), role="clean", **settings):
    recipe = TeacherRecipe(role=role, source=str(source), **settings)
    return load_teacher(recipe, class_names=class_names, image_shape=image_shape)


def images(num_images=5, *, size=(3, 8, 8)):
    return torch.rand(num_images, *size, generator=torch.Generator().manual_seed(0))


def write_weights(path, architecture, *, width=0.5, num_classes=4, size=(3, 8, 8), extra=()):
    network = build_backbone(
        architecture, num_classes=num_classes, image_shape=size, width=width
    ).eval()
    write_safetensors(path, network.state_dict() | dict(extra), {})
    return network


@pytest.fixture
def saved(tmp_path):
    """A file that describes itself, and the classifier in it."""
    classifier = build_classifier(SPEC, seed=1).eval()
    save_classifier(tmp_path / "t.safetensors", classifier, SPEC, {"class_names": CLASSES})
    return tmp_path / "t.safetensors", classifier


@pytest.fixture
def save_onnx(tmp_path):
    """Mean over pixels and a linear map, for images of one size."""

    def save(*, metadata=None, size=(3, 8, 8)):
        weight = torch.arange(12.0).view(4, 3).sin()
        graph = helper.make_graph(
            [
                helper.make_node("GlobalAveragePool", ["x"], ["mean"]),
                helper.make_node("Flatten", ["mean"], ["flat"]),
                helper.make_node("Gemm", ["flat", "w"], ["y"], transB=1),
            ],
            "linear",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", *size])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])],
            [numpy_helper.from_array(weight.numpy(), "w")],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        helper.set_model_props(model, metadata or {})
        onnx.save(model, tmp_path / "t.onnx")
        return tmp_path / "t.onnx", weight

    return save


def test_a_file_that_describes_itself(saved):
    path, classifier = saved
    teacher = load(path, role="robust")
    torch.testing.assert_close(teacher.logits(images()), classifier(images()).detach())
    assert (teacher.name, teacher.role, teacher.spec) == ("t.safetensors", "robust", SPEC)
    assert teacher.sha256 == sha256_of_file(path)
    assert teacher.num_bytes == path.stat().st_size
    assert teacher.num_classes == 4
    assert teacher.num_parameters == sum(p.numel() for p in classifier.parameters())


def test_the_folder_of_a_run(saved):
    path, classifier = saved
    run = path.parent / "run-1"
    run.mkdir()
    path.rename(run / "model.safetensors")
    teacher = load(run)
    assert teacher.name == "run-1"
    assert torch.equal(teacher.logits(images()), classifier(images()))
    with pytest.raises(WeightsError, match=r"clean teacher: .*model\.safetensors does not exist"):
        load(path.parent)


@pytest.mark.parametrize(("architecture", "width"), [("tiny", 0.3), ("resnet18", 0.07)])
def test_an_architecture_and_a_file_whose_width_is_read(tmp_path, architecture, width):
    network = write_weights(tmp_path / "w.safetensors", architecture, width=width)
    teacher = load(f"{architecture}:{tmp_path / 'w.safetensors'}")
    assert teacher.spec.width == width
    assert teacher.spec.mean is None
    assert torch.equal(teacher.logits(images()), network(images()))


def test_a_network_of_torchvision(tmp_path):
    size, name = (3, 32, 32), "torchvision:mobilenet_v3_small"
    network = write_weights(tmp_path / "w.safetensors", name, width=1.0, size=size)
    teacher = load(f"{name}:{tmp_path / 'w.safetensors'}", image_shape=size)
    assert torch.equal(teacher.logits(images(size=size)), network(images(size=size)))


@pytest.mark.parametrize(
    ("architecture", "in_file", "in_recipe", "expected"),
    [
        ("tiny", None, None, (None, None)),
        ("tiny", (0.5, 0.25), None, ((0.5,) * 3, (0.25,) * 3)),
        ("tiny", (0.5, 0.25), ((0.1,) * 3, (0.2,) * 3), ((0.1,) * 3, (0.2,) * 3)),
        ("wide_resnet_22_6", None, None, (CIFAR10_MEAN, CIFAR10_STD)),
        ("wide_resnet_22_6", (0.5, 0.25), None, ((0.5,) * 3, (0.25,) * 3)),
        ("wide_resnet_22_6", None, ((0.1,) * 3, (0.2,) * 3), ((0.1,) * 3, (0.2,) * 3)),
    ],
)
def test_whose_normalisation_counts(tmp_path, *, architecture, in_file, in_recipe, expected):
    extra = {}
    if in_file:
        extra = {"mean": torch.full((3, 1, 1), in_file[0]), "std": torch.full((1,), in_file[1])}
    network = write_weights(tmp_path / "w.safetensors", architecture, width=0.1, extra=extra)
    settings = dict(zip(("mean", "std"), in_recipe, strict=True)) if in_recipe else {}
    teacher = load(f"{architecture}:{tmp_path / 'w.safetensors'}", **settings)
    assert (teacher.spec.mean, teacher.spec.std) == expected
    x_NCHW = images()
    if expected[0]:
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in expected)
        x_NCHW = (x_NCHW - mean) / std
    torch.testing.assert_close(teacher.logits(images()), network(x_NCHW).detach())


def test_half_a_normalisation_is_refused(saved):
    with pytest.raises(RecipeError, match="mean and std together"):
        load(saved[0], mean=(0.5, 0.5, 0.5))


def test_logits_are_fit_to_be_targets(saved):
    teacher = load(saved[0])
    temperature = torch.tensor(2.0, requires_grad=True)
    x_NCHW = images().requires_grad_()
    logits_NK = teacher.logits(x_NCHW)
    assert not logits_NK.requires_grad
    (logits_NK / temperature).softmax(dim=1).square().sum().backward()
    assert temperature.grad is not None
    assert x_NCHW.grad is None
    half = dataclasses.replace(teacher, answer=lambda x: teacher.answer(x).bfloat16())
    assert half.logits(x_NCHW).dtype == torch.float32


def test_the_network_is_frozen_and_must_stay_so(saved):
    teacher = load(saved[0])
    network = teacher.network
    assert not any(module.training for module in network.modules())
    assert not any(parameter.requires_grad for parameter in network.parameters())
    network.train()
    with pytest.raises(AssertionError, match="training mode"):
        teacher.logits(images())
    network.eval().requires_grad_()
    with pytest.raises(AssertionError, match="not frozen"):
        teacher.logits(images())


def test_attacks_can_differentiate_by_the_images(saved):
    x_NCHW = images().requires_grad_()
    load(saved[0]).answer(x_NCHW).sum().backward()
    assert isinstance(x_NCHW.grad, Tensor)


def test_logits_with_gradient_lead_to_the_images_and_not_to_the_weights(saved):
    teacher = load(saved[0])
    x_NCHW = images().requires_grad_()
    logits_NK = teacher.logits_with_gradient(x_NCHW)
    torch.testing.assert_close(logits_NK.detach(), teacher.logits(images()))
    logits_NK.square().sum().backward()
    assert x_NCHW.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in teacher.network.parameters())
    assert teacher.require_network("wanted") is teacher.network
    teacher.network.train()
    with pytest.raises(AssertionError, match="training mode"):
        teacher.logits_with_gradient(x_NCHW)


def test_onnx_files_give_no_gradient(save_onnx):
    teacher = load(save_onnx()[0], role="robust")
    with pytest.raises(TeacherError, match=r"^robust teacher t\.onnx: .* no gradient; give its"):
        teacher.logits_with_gradient(images())
    with pytest.raises(TeacherError, match=r"t\.onnx: method 'x' tunes it, but an ONNX file"):
        teacher.require_network("method 'x' tunes it")


def test_onnx_files(save_onnx):
    path, weight = save_onnx(metadata={CLASS_NAMES_KEY: json.dumps(CLASSES)})
    teacher = load(path)
    torch.testing.assert_close(teacher.logits(images()), images().mean(dim=(2, 3)) @ weight.T)
    assert (teacher.network, teacher.spec, teacher.num_parameters) == (None, None, None)
    assert (teacher.num_classes, teacher.sha256) == (4, sha256_of_file(path))
    normalised = load(path, mean=(0.5, 0.5, 0.5), std=(0.5, 0.25, 0.5))
    mean = (images().mean(dim=(2, 3)) - 0.5) / torch.tensor([0.5, 0.25, 0.5])
    torch.testing.assert_close(normalised.logits(images()), mean @ weight.T)


def test_onnx_files_of_another_size_want_resizing(save_onnx):
    path, weight = save_onnx(size=(3, 16, 16))
    with pytest.raises(TeacherError, match=r"3x16x16 .* not 3x8x8.*resize_to"):
        load(path)
    x_NCHW = images()[:, :, :1, :1].expand(-1, -1, 8, 8)  # resizing changes nothing in these
    logits_NK = load(path, resize_to=16).logits(x_NCHW)
    torch.testing.assert_close(logits_NK, x_NCHW[:, :, 0, 0] @ weight.T)


def test_images_of_another_size_are_resized_on_request(saved):
    path, classifier = saved
    with pytest.raises(TeacherError, match=r"3x8x8 .* the data has 3x16x16.*resize_to = 8"):
        load(path, image_shape=(3, 16, 16))
    with pytest.raises(TeacherError, match=r"data has 1x8x8"):
        load(path, image_shape=(1, 8, 8), resize_to=8)
    x_NCHW = images(size=(3, 16, 16))
    smaller = torch.nn.functional.interpolate(x_NCHW, size=(8, 8), mode="bilinear")
    resized = load(path, image_shape=(3, 16, 16), resize_to=8)
    torch.testing.assert_close(resized.logits(x_NCHW), classifier(smaller).detach())


@pytest.mark.parametrize(
    ("class_names", "message"),
    [
        (("ant", "bee", "cat"), "it has 4 classes, the data has 3"),
        (
            ("ant", "cat", "bee", "dog"),
            "it has the classes in another order: label 1 is 'bee' there and 'cat'",
        ),
        (
            ("ant", "bee", "cow", "dog"),
            "it has the classes with other names: label 2 is 'cat' there and 'cow'",
        ),
    ],
)
def test_other_classes_are_refused(saved, save_onnx, class_names, message):
    for path in (saved[0], save_onnx(metadata={CLASS_NAMES_KEY: json.dumps(CLASSES)})[0]):
        with pytest.raises(TeacherError, match=rf"clean teacher: .*{path.name}: {message}"):
            load(path, class_names=class_names)


def test_the_class_count_of_plain_weights_is_checked(tmp_path, save_onnx):
    write_weights(tmp_path / "w.safetensors", "tiny", num_classes=7)
    for source in (f"tiny:{tmp_path / 'w.safetensors'}", save_onnx()[0]):
        with pytest.raises(TeacherError, match=r"it has (7|4) classes, the data has 3"):
            load(source, class_names=CLASSES[:3])


def test_only_the_file_of_the_recipe_is_taken(saved):
    path, _ = saved
    assert load(path, sha256=sha256_of_file(path).upper()).sha256 == sha256_of_file(path)
    with pytest.raises(ArtefactMismatchError, match="the recipe wants 0000"):
        load(path, sha256="0" * 64)


def test_sources_that_lead_nowhere_are_explained(tmp_path, saved):
    with pytest.raises(RecipeError, match=r"'tinny' is not known; did you mean tiny\?"):
        load(f"tinny:{saved[0]}")
    with pytest.raises(WeightsError, match=r"none\.safetensors does not exist"):
        load(f"tiny:{tmp_path / 'none.safetensors'}")
    write_weights(tmp_path / "w.safetensors", "tiny")
    with pytest.raises(WeightsError, match=r"w\.safetensors: .* write ARCHITECTURE:FILE"):
        load(tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=r"not weights of resnet18"):
        load(f"resnet18:{tmp_path / 'w.safetensors'}")


def test_a_path_may_have_a_colon(saved):
    path = saved[0].with_name("a:b.safetensors")
    saved[0].rename(path)
    assert load(path).name == "a:b.safetensors"
    assert load(f"tiny:{path}").name == "a:b.safetensors"


def test_only_finite_images_count_against_the_teacher(saved):
    """A student that has diverged makes images that nobody can answer."""
    teacher = dataclasses.replace(load(saved[0]), answer=lambda x: x.flatten(1)[:, :4] * torch.inf)
    x = torch.zeros(3, 3, 8, 8)  # 0 times infinity is no number
    assert teacher.num_not_finite() == 0
    x[0] = torch.nan
    teacher.logits(x)
    assert teacher.num_not_finite() == 2
    teacher.logits(x[1:2])
    assert teacher.num_not_finite() == 3
