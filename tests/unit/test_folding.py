"""EvaluationView: the same function as eval mode, without touching the network."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from compressor.architectures.build import build_backbone
from compressor.folding import EvaluationView
from compressor.performance import Performance

CPU = torch.device("cpu")
PLAIN = Performance(device=CPU)
NETWORKS = {"tiny": 1.0, "resnet18": 0.125, "mobilenet_v2": 0.25}


def images(seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(4, 3, 16, 16, generator=generator).to(dtype)


def train_a_little(network, seed, dtype=torch.float64):
    """Gives weights and BatchNorm statistics that are not those of the start."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    network.train()
    for step in range(3):
        optimizer.zero_grad()
        logits = network(images(100 * seed + step, dtype))
        F.cross_entropy(logits, torch.arange(4)).backward()
        optimizer.step()
    optimizer.zero_grad()


def logits_and_gradient(model, x):
    leaf = x.clone().requires_grad_()
    logits = model(leaf)
    (gradient,) = torch.autograd.grad(logits[:, 0].sum() - logits[:, 1].sum(), leaf)
    return logits.detach(), gradient


def check_equal_to_eval_mode(view, network, x):
    network.eval()
    expected = logits_and_gradient(network, x)
    network.train()
    for ours, theirs in zip(logits_and_gradient(view, x), expected, strict=True):
        scale = max(1.0, float(theirs.abs().max()))
        assert_close(ours, theirs, rtol=0, atol=1e-12 * scale)


class Branching(nn.Module):
    """torch.fx cannot follow an `if` on values."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x_NCHW):
        out = self.bn(self.conv(x_NCHW)).mean(dim=(2, 3))
        return out if bool(x_NCHW.sum() > 0) else -out


class Awkward(nn.Module):
    """Biases, a BatchNorm without affine, one without a convolution, and a forked convolution."""

    def __init__(self):
        super().__init__()
        self.first, self.conv, self.fork = (nn.Conv2d(3, 3, 3) for _ in range(3))
        self.bn_first = nn.BatchNorm2d(3)
        self.bn_plain = nn.BatchNorm2d(3, affine=False)
        self.bn_fork = nn.BatchNorm2d(3, eps=0.1)
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(3, 4)

    def forward(self, x_NCHW):
        out = self.bn_plain(self.first(self.bn_first(x_NCHW))).relu()
        out = self.bn_fork(self.conv(out))
        forked = self.fork(out)
        return self.fc(self.dropout((forked + forked.relu()).mean(dim=(2, 3))))


class Twice(nn.Module):
    """One convolution called twice, before two different BatchNorms."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)
        self.bn_first, self.bn_second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.fc = nn.Linear(3, 4)

    def forward(self, x_NCHW):
        out = self.bn_first(self.conv(x_NCHW)).relu()
        return self.fc(self.bn_second(self.conv(out)).mean(dim=(2, 3)))


class Tied(nn.Module):
    """Two convolutions with one weight, a BatchNorm after one of them."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)
        self.second.weight = self.first.weight
        self.bn, self.fc = nn.BatchNorm2d(3), nn.Linear(3, 4)

    def forward(self, x_NCHW):
        return self.fc(self.second(self.bn(self.first(x_NCHW)).relu()).mean(dim=(2, 3)))


class Constant(nn.Module):
    """Makes a tensor in its forward pass, as torchvision's maxvit_t does."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 4)

    def forward(self, x_NCHW):
        return self.fc(self.bn(self.conv(x_NCHW)).mean(dim=(2, 3)) * torch.tensor([2.0, 3.0]))


def build(name):
    torch.manual_seed(0)
    custom = {
        "branching": Branching,
        "awkward": Awkward,
        "twice": Twice,
        "tied": Tied,
        "constant": Constant,
    }
    if name in custom:
        return custom[name]().double()
    return build_backbone(
        name, num_classes=4, image_shape=(3, 16, 16), width=NETWORKS[name]
    ).double()


@pytest.mark.parametrize(
    "name",
    [
        *NETWORKS,
        "branching",
        "awkward",
        "twice",
        "tied",
        "constant",
    ],
)
def test_view_equals_eval_mode_now_and_after_more_training(name):
    network = build(name)
    train_a_little(network, seed=1)
    view = EvaluationView(network, PLAIN)
    check_equal_to_eval_mode(view, network, images())
    before = view(images())
    train_a_little(network, seed=2)
    assert torch.equal(view(images()), before)  # until it is refreshed
    view.refresh()
    check_equal_to_eval_mode(view, network, images())
    assert not torch.allclose(view(images()), before)


@pytest.mark.parametrize("name", [*NETWORKS, "branching", "awkward"])
def test_view_leaves_the_network_alone(name):
    network = build(name).train()
    next(m for m in network.modules() if isinstance(m, nn.BatchNorm2d)).eval()
    flags = [module.training for module in network.modules()]
    tensors = {key: value.clone() for key, value in network.state_dict().items()}
    view = EvaluationView(network, PLAIN)
    logits_and_gradient(view, images())
    view.refresh()
    assert [module.training for module in network.modules()] == flags
    assert all(torch.equal(network.state_dict()[key], value) for key, value in tensors.items())
    assert all(p.requires_grad and p.grad is None for p in network.parameters())


@pytest.mark.parametrize("name", NETWORKS)
def test_view_has_no_batchnorm_left(name):
    view = EvaluationView(build(name), PLAIN)
    kinds = {type(module) for module in view._module.modules()}
    assert nn.Conv2d in kinds
    assert nn.BatchNorm2d not in kinds


@pytest.mark.parametrize("name", NETWORKS)
def test_bfloat16_view_answers_in_float32(name):
    network = build(name).float()
    train_a_little(network, seed=1, dtype=torch.float32)
    view = EvaluationView(network, Performance(device=CPU, training_dtype=torch.bfloat16))
    x = images(dtype=torch.float32)
    ours, gradient = logits_and_gradient(view, x)
    theirs, _ = logits_and_gradient(network.eval(), x)
    assert ours.dtype == gradient.dtype == torch.float32
    assert_close(ours, theirs, rtol=0, atol=0.05 * float(theirs.abs().max()))
    assert float((ours - theirs).abs().max()) > 0
    assert all(p.dtype == torch.float32 for p in network.parameters())


def test_batchnorm_without_statistics_is_refused():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
    with pytest.raises(TypeError, match="without running statistics"):
        EvaluationView(network, PLAIN)
