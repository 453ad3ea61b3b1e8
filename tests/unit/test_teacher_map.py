"""The two-layer head: slices, one layer of two, and which layer it replaces."""

import pytest
import torch
from torch import nn

from compressor.architectures.build import build_backbone
from compressor.architectures.teacher_map import (
    StudentTeacherHead,
    add_teacher_map,
    find_teacher_map,
    merge_teacher_map,
)
from compressor.errors import RecipeError
from compressor.folding import EvaluationView
from compressor.performance import Performance
from compressor.student import Student

CPU = Performance(device=torch.device("cpu"))


def make_head(*, whole_numbers=False):
    torch.manual_seed(0)
    head = StudentTeacherHead(7, num_teachers=3, num_classes=4).double()
    if whole_numbers:
        for tensor in head.parameters():
            tensor.data = torch.randint(-9, 10, tensor.shape).double()
    return head


@pytest.fixture
def student(make_tiny):
    network = make_tiny()
    add_teacher_map(network, num_classes=4, num_teachers=3, seed=5)
    return Student(network, CPU)


def test_each_teacher_owns_neighbours():
    head = StudentTeacherHead(5, num_teachers=2, num_classes=3)
    slices = head.slices(torch.arange(1.0, 7.0)[None])
    assert slices.tolist() == [[[1, 2, 3], [4, 5, 6]]]
    assert torch.equal(head.read_out(slices), head.to_logits(torch.arange(1.0, 7.0)[None]))


def test_one_layer_is_exactly_two_where_products_are_exact():
    """Whole numbers leave no rounding, so no order of sums can excuse a difference."""
    head = make_head(whole_numbers=True)
    features = torch.randint(-9, 10, (50, 7)).double()
    assert torch.equal(head.merged()(features), head(features))


def test_one_layer_is_two_to_rounding():
    head = make_head()
    features = torch.randn(50, 7, dtype=torch.float64)
    assert torch.allclose(head.merged()(features), head(features), rtol=0, atol=1e-14)


def test_float32_is_rounded_once():
    head = make_head().float()
    exact = make_head().float().double().merged()
    merged = head.merged()
    assert merged.weight.dtype == torch.float32
    assert torch.equal(merged.weight, exact.weight.float())
    assert torch.equal(merged.bias, exact.bias.float())


def test_merging_keeps_the_network_and_takes_the_map_away(make_tiny, make_images):
    network, plain = make_tiny().eval(), make_tiny()
    add_teacher_map(network, num_classes=4, num_teachers=3, seed=5)
    x_NCHW, _ = make_images()
    before = network(x_NCHW)
    merge_teacher_map(network)
    assert torch.allclose(network(x_NCHW), before, rtol=0, atol=1e-6)
    assert find_teacher_map(network) is None
    assert list(network.state_dict()) == list(plain.state_dict())
    assert not network.fc.training
    plain.load_state_dict(network.state_dict())
    merged = {name: value.clone() for name, value in network.state_dict().items()}
    merge_teacher_map(network)  # nothing is left to merge
    assert all(torch.equal(merged[name], value) for name, value in network.state_dict().items())


def test_parameters_as_the_authors_counted():
    with torch.device("meta"):
        network = build_backbone("resnet18", num_classes=100, image_shape=(3, 32, 32))
        add_teacher_map(network, num_classes=100, num_teachers=4, seed=0)
    assert sum(p.numel() for p in network.parameters()) == 11_414_132


@pytest.mark.parametrize(
    ("name", "side", "place"),
    [
        ("tiny", 32, "fc"),
        ("resnet18", 32, "fc"),
        ("resnet56", 32, "fc"),
        ("mobilenet_v2", 32, "linear"),
        ("wide_resnet_34_10", 32, "fc"),
        ("torchvision:mobilenet_v3_small", 64, "classifier.3"),
        ("torchvision:vgg11", 64, "classifier.6"),
        ("torchvision:swin_t", 64, "head"),
        ("torchvision:vit_b_32", 224, "heads.head"),
    ],
)
def test_it_replaces_the_layer_that_gives_the_logits(name, side, place):
    with torch.device("meta"):
        network = build_backbone(name, num_classes=10, image_shape=(3, side, side)).eval()
        head = add_teacher_map(network, num_classes=10, num_teachers=2, seed=0)
        assert network.get_submodule(place) is head
        answers = []
        head.register_forward_hook(lambda *call: answers.append(call[-1]))
        assert network(torch.zeros(2, 3, side, side)) is answers[0]


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), "is none"),
        (nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), "has to give 4 logits; .* is 1"),
        (nn.Linear(12, 4), "has to give 4 logits"),
    ],
)
def test_a_network_without_such_a_layer_is_refused(network, message):
    with pytest.raises(RecipeError, match=message) as caught:
        add_teacher_map(network, num_classes=4, num_teachers=2, seed=0)
    assert "student.architecture" in str(caught.value)


def test_weights_follow_from_the_seed_alone(make_tiny):
    def weights(seed):
        head = add_teacher_map(make_tiny(), num_classes=4, num_teachers=2, seed=seed)
        return torch.cat([p.flatten() for p in head.parameters()])

    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    first = weights(1)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(4)
    assert torch.equal(weights(1), first)
    assert not torch.equal(weights(2), first)


def test_the_student_gives_both_of_one_pass(student, make_images):
    x_NCHW, _ = make_images(6)
    logits_NK, map_NMK = student.logits_and_map(x_NCHW)
    assert map_NMK.shape == (6, 3, 4)
    assert torch.equal(student.read_out(map_NMK), logits_NK)
    assert int(student.network.bn1.num_batches_tracked) == 1
    assert not find_teacher_map(student.network).to_map._forward_hooks
    map_NMK[:, 1].sum().backward()
    slope = find_teacher_map(student.network).to_map.weight.grad.abs().sum(dim=1)
    assert [bool(part.any()) for part in slope.split(4)] == [False, True, False]


def test_only_the_last_layer_learns_from_a_map_without_a_graph(student, make_images):
    x_NCHW, _ = make_images()
    _, map_NMK = student.logits_and_map(x_NCHW)
    student.read_out(map_NMK.detach()).sum().backward()
    moved = {name for name, p in student.network.named_parameters() if p.grad is not None}
    assert moved == {"fc.to_logits.weight", "fc.to_logits.bias"}


def test_a_plain_student_has_no_map(tiny_network, make_images):
    student = Student(tiny_network, CPU)
    with pytest.raises(TypeError, match="no teacher map"):
        student.logits_and_map(make_images()[0])
    with pytest.raises(TypeError, match="no teacher map"):
        student.read_out(torch.zeros(2, 3, 4))


def test_attackers_meet_the_same_function(student, make_images):
    x_NCHW, _ = make_images()
    view = EvaluationView(student.network, CPU)
    student.network.eval()
    assert torch.allclose(view(x_NCHW), student.network(x_NCHW), rtol=0, atol=1e-6)
