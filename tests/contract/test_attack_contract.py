"""What every attack keeps: the threat model, the network, its input, and its own randomness."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from compressor.attacks.build import build_inner_attack, evaluation_attacks, selection_attack
from compressor.folding import EvaluationView
from compressor.losses import cross_entropy
from compressor.method_table import InnerAttackRecipe
from compressor.performance import Performance
from compressor.threat import ThreatModel

ATTACK_NAMES = [
    *evaluation_attacks(ThreatModel(epsilon_pixels=8 / 255)),
    "inner_gaussian",
    "inner_uniform",
    "inner_zero",
    "selection",
]
STARTS_AT_THE_IMAGE = {"fgsm", "cw_inf", "inner_zero"}
EPSILONS = [1 / 255, 8 / 255, 16 / 255]
PERFORMANCE = Performance(device=torch.device("cpu"))


def build(name, epsilon_pixels=8 / 255):
    threat = ThreatModel(epsilon_pixels=epsilon_pixels)
    if name == "selection":
        return selection_attack(threat, num_steps=20)
    if name.startswith("inner_"):
        recipe = InnerAttackRecipe(start=name.removeprefix("inner_"))
        return build_inner_attack(recipe, threat=threat, objective=cross_entropy)
    return evaluation_attacks(threat)[name]


def without_steps(attack):
    return type(attack)(**{**vars(attack), "num_steps": 0})


def keys_of(x_NCHW):
    return torch.arange(len(x_NCHW)) * 7_919 + 3


def with_extremes(x_NCHW):
    """Black and white patches, where only the clip to [0, 1] holds."""
    x = x_NCHW.clone()
    x[:, :, :2], x[:, :, -2:] = 0, 1
    return x


@pytest.fixture(scope="module")
def trained(make_trained):
    """With lived-in BatchNorm statistics."""
    network, x, y = make_trained(24)
    return network.double(), x.double(), y


def linear_model(num_classes=4, num_channels=3):
    generator = torch.Generator().manual_seed(num_classes)
    weights = torch.randn(num_classes, num_channels * 64, generator=generator).double()
    return lambda x_NCHW: x_NCHW.flatten(1) @ weights.T / 8


every_attack = pytest.mark.parametrize("name", ATTACK_NAMES)


@every_attack
@pytest.mark.parametrize("epsilon", EPSILONS)
def test_attack_stays_within_the_threat_model(name, epsilon, trained):
    network, x, y = trained
    x = with_extremes(x)
    x_adv = build(name, epsilon)(network, x, y, keys_N=keys_of(x))
    assert x_adv.shape == x.shape
    assert x_adv.dtype == x.dtype
    assert not x_adv.requires_grad
    assert float((x_adv - x).abs().max()) <= epsilon + 1e-12
    assert float(x_adv.min()) >= 0
    assert float(x_adv.max()) <= 1


@every_attack
@pytest.mark.parametrize("epsilon", EPSILONS)
def test_attack_reaches_the_border_at_every_radius(name, epsilon):
    x = torch.full((4, 3, 8, 8), 0.5, dtype=torch.float64)
    y = torch.arange(4)
    x_adv = build(name, epsilon)(linear_model(), x, y, keys_N=keys_of(x))
    distance = (x_adv - x).abs()
    assert float(distance.max()) == pytest.approx(epsilon, abs=1e-12)
    # 20 steps of 0.003 cross 96 % of the way from a random start to the far border.
    assert float((distance > epsilon - 1e-9).double().mean()) > 0.9


@pytest.mark.parametrize(
    ("name", "num_steps", "step_over_epsilon"),
    [
        ("fgsm", 1, 1.0),
        ("pgd_sat", 20, 1 / 4),
        ("pgd_trades", 20, 0.003 * 255 / 8),
        ("cw_inf", 30, 1 / 4),
        ("inner_gaussian", 10, 1 / 4),
        ("selection", 20, 0.003 * 255 / 8),
    ],
)
@pytest.mark.parametrize("epsilon", EPSILONS)
def test_attack_has_the_parameters_of_the_field_scaled_to_epsilon(
    *, name, num_steps, step_over_epsilon, epsilon
):
    attack = build(name, epsilon)
    assert attack.num_steps == num_steps
    assert attack.step_size_pixels == pytest.approx(step_over_epsilon * epsilon, rel=1e-12)


@every_attack
def test_attack_leaves_the_network_alone(name, trained):
    network, x, y = trained
    check_untouched(network, network, name, (x, y))


@every_attack
def test_attack_through_a_view_leaves_the_training_network_alone(name, make_tiny, make_images):
    network = make_tiny(dtype=torch.float64).train()
    network.bn2.eval()  # frozen on purpose
    x, y = make_images(dtype=torch.float64)
    network(x)
    check_untouched(network, EvaluationView(network, PERFORMANCE), name, (x, y))


def check_untouched(network, model, name, images):
    x, y = images
    flags = [module.training for module in network.modules()]
    tensors = {key: value.clone() for key, value in network.state_dict().items()}
    x_before, y_before = x.clone(), y.clone()
    build(name)(model, x, y, keys_N=keys_of(x))
    assert [module.training for module in network.modules()] == flags
    assert all(torch.equal(network.state_dict()[key], value) for key, value in tensors.items())
    assert all(p.grad is None and p.requires_grad for p in network.parameters())
    assert torch.equal(x, x_before)
    assert torch.equal(y, y_before)
    assert not x.requires_grad
    assert x.grad is None


@every_attack
def test_attack_same_keys_give_the_same_tensor(name, trained):
    network, x, y = trained
    attack, keys = build(name), keys_of(x)
    first = attack(network, x, y, keys_N=keys)
    torch.rand(3)  # the global generator does not matter
    assert torch.equal(first, attack(network, x, y, keys_N=keys))


@every_attack
def test_attack_other_keys_matter_where_the_start_is_random(name, trained):
    network, x, y = trained
    attack = without_steps(build(name))
    first = attack(network, x, y, keys_N=keys_of(x))
    second = attack(network, x, y, keys_N=keys_of(x) + 1)
    assert torch.equal(first, second) == (name in STARTS_AT_THE_IMAGE)


@every_attack
@pytest.mark.parametrize(
    "rows", [[5], [5, 2], list(range(23, -1, -1))], ids=["one", "two", "permuted"]
)
def test_attack_sample_does_not_depend_on_its_batch(name, rows, trained):
    network, x, y = trained
    keys, attack = keys_of(x), build(name)
    together = attack(network, x, y, keys_N=keys)
    apart = attack(network, x[rows], y[rows], keys_N=keys[rows])
    assert_close(apart, together[rows], rtol=0, atol=1e-12)


@every_attack
def test_attack_larger_radius_is_not_weaker(name, trained):
    network, x, y = trained

    def num_correct(epsilon):
        x_adv = build(name, epsilon)(network, x, y, keys_N=keys_of(x))
        return int((network(x_adv).argmax(1) == y).sum())

    clean = int((network(x).argmax(1) == y).sum())
    assert clean > 20  # or the comparison says nothing
    assert num_correct(32 / 255) <= num_correct(8 / 255) <= clean
    assert num_correct(32 / 255) < clean


@every_attack
def test_attack_zero_steps_returns_the_start(name, trained):
    network, x, y = trained
    attack = without_steps(build(name))
    x_adv = attack(network, x, y, keys_N=keys_of(x))
    if name in STARTS_AT_THE_IMAGE:
        assert torch.equal(x_adv, x)
    else:
        assert float((x_adv - x).abs().max()) > 0
        elsewhere = attack(linear_model(), x, y, keys_N=keys_of(x))
        assert torch.equal(x_adv, elsewhere)  # no model was asked


@every_attack
@pytest.mark.parametrize("num_channels", [1, 3])
@pytest.mark.parametrize("num_classes", [2, 4])
def test_attack_raises_the_loss_of_a_plain_function(name, num_channels, num_classes, make_images):
    model = linear_model(num_classes, num_channels)
    x, y = make_images(num_classes=num_classes, num_channels=num_channels, dtype=torch.float64)
    x_adv = build(name)(model, x, y, keys_N=keys_of(x))
    assert (cross_entropy(model(x_adv), y) > cross_entropy(model(x), y)).all()


@every_attack
def test_attack_accepts_layers_without_batchnorm(name, make_images):
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    x, y = make_images(2)
    assert build(name)(network, x, y, keys_N=keys_of(x)).shape == x.shape
