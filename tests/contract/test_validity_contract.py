"""Masked models and broken attacks raise the alarm that is theirs; healthy ones raise none.

Everything goes through `check_validity`, on small networks that are trained here.
"""

import copy
import functools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compressor.architectures.tiny import build_tiny
from compressor.attacks.apgd import APGD
from compressor.attacks.draws import KeyedDraws
from compressor.attacks.pgd import PGD
from compressor.attacks.search import SearchResult, by_logits
from compressor.attacks.targeted import Targeted
from compressor.losses import dlr, margin, targeted_dlr
from compressor.threat import ThreatModel
from compressor.validity.active_test import ACTIVE_TEST, penultimate_features
from compressor.validity.attack_checks import ATTACK_CHECKS
from compressor.validity.claim import Claim
from compressor.validity.gradient_checks import GRADIENT_CHECKS
from compressor.validity.origins import border_points
from compressor.validity.output_checks import OUTPUT_CHECKS
from compressor.validity.validity import check_validity

EPSILON = 16 / 255
THREAT = ThreatModel(epsilon_pixels=EPSILON)
NUM_IMAGES, NUM_STEPS = 128, 10
KEYS = torch.arange(NUM_IMAGES) * 7_919 + 3
ATTACK = APGD(threat=THREAT, objective=dlr, num_steps=NUM_STEPS)
ALL_CHECKS = (*OUTPUT_CHECKS, *GRADIENT_CHECKS, *ATTACK_CHECKS, ACTIVE_TEST)


def noisy(prototypes, num_images, generator):
    y = torch.arange(num_images) % len(prototypes)
    noise = 0.1 * torch.randn(num_images, 3, 8, 8, generator=generator)
    return (prototypes[y] + noise).clamp(0, 1), y


@functools.cache
def train(seed, *, is_robust=False, temperature=1.0, learning_rate=0.1):
    """A network that tells four noisy prototypes apart, and new images of them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build_tiny(num_classes=4, image_shape=(3, 8, 8), width=1.0)
    generator = torch.Generator().manual_seed(seed + 100)
    prototypes = torch.rand(4, 3, 8, 8, generator=generator) * 0.3 + 0.35
    optimizer = torch.optim.SGD(network.parameters(), lr=learning_rate, momentum=0.9)
    attack = PGD(threat=THREAT, step_size_pixels=EPSILON / 2, num_steps=3)
    for step in range(60):
        x, y = noisy(prototypes, 64, generator)
        if is_robust:
            x = attack(network.eval(), x, y, keys_N=KEYS[:64] + step)
        optimizer.zero_grad()
        F.cross_entropy(network.train()(x) / temperature, y).backward()
        optimizer.step()
    optimizer.zero_grad()
    return network.eval(), *noisy(prototypes, NUM_IMAGES, generator)


@pytest.fixture
def plain():
    return train(0)


@pytest.fixture
def robust():
    return train(0, is_robust=True)


def claim_of(model, x, y, *, attack=ATTACK, **changes):
    """What an evaluation with this attack alone would say."""
    draws = KeyedDraws(keys_N=KEYS[: len(y)])
    found = attack.search(model, x, y, draws=draws, judge=by_logits).x_adv_NCHW
    with torch.no_grad():
        broken_N = by_logits(found, model(found), y)
    values = {
        "model": model,
        "x_NCHW": x,
        "y_N": y,
        "keys_N": KEYS[: len(y)],
        "threat": THREAT,
        "attack": attack,
        "num_steps": NUM_STEPS,
        "broken_by_white_box_N": broken_N,
        "broken_by_square_N": torch.zeros_like(broken_N),
    }
    return Claim(**(values | changes))


def untried(model, x, y, **changes):
    """A claim whose attacks are not reached."""
    broken_N = torch.zeros_like(y, dtype=torch.bool)
    values = {"model": model, "x_NCHW": x, "y_N": y, "keys_N": KEYS, "threat": THREAT}
    return Claim(
        **values | {"attack": ATTACK, "num_steps": 1, "broken_by_white_box_N": broken_N} | changes
    )


def alarms(rows):
    assert [row.name for row in rows] == [check.name for check in ALL_CHECKS]
    return {row.name for row in rows if row.status == "alarm"}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_validity_healthy_model_raises_no_alarm(seed, norm):
    network, x, y = train(seed, is_robust=True)
    threat = THREAT if norm == "linf" else ThreatModel(norm="l2", epsilon_pixels=0.5)
    attack = APGD(threat=threat, objective=targeted_dlr, num_steps=NUM_STEPS)
    claim = claim_of(
        network,
        x,
        y,
        attack=Targeted(attack=attack),
        threat=threat,
        teachers={"clean": train(seed + 10)[0]},
        features=penultimate_features(network, x),
    )
    rows = check_validity(claim)
    assert alarms(rows) == set()
    assert {row.name for row in rows if row.status == "not_run"} == set()


class Masked(nn.Module):
    """A network behind something that hides its gradients or changes what it is."""

    def __init__(self, network, forward):
        super().__init__()
        self.network, self._forward = copy.deepcopy(network), forward

    def forward(self, x_NCHW):
        return self._forward(self.network, x_NCHW)


def with_noise(network, x):
    return network(x + 0.01 * torch.randn(x.shape))


def with_one_bad_answer(network, x):
    is_like_the_fourth = x[:, 0, 0, 0] == train(0)[1][3, 0, 0, 0]
    return torch.where(is_like_the_fourth[:, None], torch.nan, network(x))


def with_optimisation(network, x):
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(network(x).logsumexp(dim=1).sum(), x)
    return network(x - 0.01 * gradient.sign())


def with_bad_gradient(network, x):
    return network(x) + 0 * (x - x.detach()).abs().sqrt().sum()


MASKS = {
    "rounded input": (lambda f, x: f((15 * x).round() / 15), {"zero_gradient"}),
    "detached input": (lambda f, x: f(x.detach()), {"zero_gradient"}),
    "gradient of not-a-number": (with_bad_gradient, {"finite_gradients"}),
    "large logits": (lambda f, x: 1e4 * f(x), {"saturated_loss"}),
    "softmax": (lambda f, x: f(x).softmax(dim=1), {"probabilities"}),
    "log-softmax": (lambda f, x: f(x).log_softmax(dim=1), {"log_probabilities"}),
    "noise": (with_noise, {"random_outputs"}),
    "dropout": (lambda f, x: f(F.dropout(x, 0.1)), {"random_outputs"}),
    "one answer of not-a-number": (with_one_bad_answer, {"finite_outputs"}),
    "optimisation": (with_optimisation, {"dynamic_model"}),
}


@pytest.mark.parametrize("name", MASKS)
def test_validity_masked_model_raises_its_own_alarm(name, plain):
    network, x, y = plain
    forward, expected = MASKS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        rows = check_validity(untried(Masked(network, forward), x, y))
    assert alarms(rows) == expected


def test_validity_temperature_distilled_model_has_a_saturated_loss():
    network, x, y = train(2, temperature=50, learning_rate=3.0)
    assert alarms(check_validity(untried(network, x, y))) == {"saturated_loss"}


def test_validity_batchnorm_in_training_mode_depends_on_the_batch(plain):
    network, x, y = plain
    network = copy.deepcopy(network).train()
    state = {name: value.clone() for name, value in network.state_dict().items()}
    assert alarms(check_validity(untried(network, x, y))) == {"batch_dependence"}
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert all(module.training for module in network.modules())


@pytest.mark.parametrize(
    ("scale", "shift", "kind"), [(255.0, 0.0, "8-bit"), (4.0, -2.0, "normalised")]
)
def test_validity_input_outside_the_unit_range(scale, shift, kind, plain):
    network, x, y = plain
    model = Masked(network, lambda f, x: f((x - shift) / scale))
    rows = check_validity(untried(model, scale * x + shift, y))
    assert alarms(rows) == {"input_range"}
    assert kind in rows[0].found


@pytest.mark.parametrize(
    "threat",
    [
        ThreatModel(epsilon_pixels=8.0),
        ThreatModel(epsilon_pixels=8 / 255 / 255),
        ThreatModel(norm="l2", epsilon_pixels=128.0),
        ThreatModel(norm="l2", epsilon_pixels=0.5 / 255 / 255),
    ],
    ids=str,
)
def test_validity_epsilon_in_wrong_units(threat, plain):
    network, x, y = plain
    assert alarms(check_validity(untried(network, x, y, threat=threat))) == {"epsilon_units"}


@pytest.mark.parametrize("name", ["softmax", "rounded input"])
def test_validity_names_the_cause_of_what_was_not_run(name, plain):
    network, x, y = plain
    forward, (cause,) = MASKS[name]
    rows = check_validity(untried(Masked(network, forward), x, y))
    later = [row for row in rows if row.name in {c.name for c in (*ATTACK_CHECKS, ACTIVE_TEST)}]
    assert {row.status for row in later} == {"not_run"}
    assert {row.advice for row in later} == {f"explained by {cause}"}


def test_validity_shattered_gradients_are_no_secret_to_a_teacher(robust):
    network, x, y = robust
    model = Masked(network, lambda f, x: f(x + 0.001 * torch.sin(5_000 * x)))
    rows = check_validity(claim_of(model, x, y, teachers={"robust": network}))
    assert {"transfer", "converged", "unconstrained"} <= alarms(rows)


class Broken:
    """A search made of one function that returns images."""

    threat = THREAT

    def __init__(self, attack):
        self._attack = attack

    def search(self, model, x_NCHW, y_N, *, draws, judge):
        del judge
        zeros = torch.zeros_like(y_N)
        return SearchResult(
            x_adv_NCHW=self._attack(model, x_NCHW, y_N, draws),
            is_fooled_N=zeros.bool(),
            num_forwards_N=zeros,
            num_backwards_N=zeros,
        )


def pgd(*, step=EPSILON / 4):
    attack = PGD(threat=THREAT, step_size_pixels=step, num_steps=NUM_STEPS, objective=margin)
    return lambda model, x, y, draws: attack(model, x, y, keys_N=draws.keys_N)


def with_wrong_labels(model, x, y, draws):
    return pgd()(model, x, (y + 1) % model(x[:1]).shape[1], draws)


def with_a_bad_last_step(model, x, y, draws):
    model(pgd()(model, x, y, draws))
    return border_points(x, THREAT, draws)


BROKEN_ATTACKS = {
    "returns the clean image": Broken(lambda model, x, y, draws: x.clone()),
    "a tenth of epsilon": replace(ATTACK, threat=replace(THREAT, epsilon_pixels=EPSILON / 10)),
    "wrong labels": Broken(with_wrong_labels),
    "wrong sign": Broken(pgd(step=-EPSILON / 4)),
    "step 100 times too small": Broken(pgd(step=EPSILON / 400)),
    "last iterate worse than the best": Broken(with_a_bad_last_step),
}


@pytest.mark.parametrize("name", BROKEN_ATTACKS)
def test_validity_broken_attack_raises_an_alarm(name, robust):
    network, x, y = robust
    features = penultimate_features(network, x)
    claim = claim_of(network, x, y, attack=BROKEN_ATTACKS[name], features=features)
    assert claim.broken_by_white_box_N.sum() < 10  # it flatters: others break about 50
    found = alarms(check_validity(claim))
    loss_alarm = "silent_success" if "last iterate" in name else "converged"
    assert found == {"more_search", loss_alarm, "active_test"}


def test_validity_attack_stopped_early_raises_an_alarm(robust):
    network, x, y = robust
    attack = PGD(
        threat=THREAT, step_size_pixels=EPSILON / 20, num_steps=4, start="zero", objective=margin
    )
    attack = Broken(lambda model, x, y, draws, attack=attack: attack(model, x, y, keys_N=KEYS))
    rows = check_validity(claim_of(network, x, y, attack=attack))
    assert {"more_search", "converged"} <= alarms(rows)


def test_validity_without_white_box_attacks_judges_none(plain):
    network, x, y = plain
    rows = check_validity(untried(network, x, y, broken_by_white_box_N=None))
    not_run = {row.name: row.advice for row in rows if row.status == "not_run"}
    assert not_run.pop("active_test") == "the model has no linear layer at its end"
    assert set(not_run) == {check.name for check in ATTACK_CHECKS} - {"unconstrained"}
    assert set(not_run.values()) == {"the white-box attacks were not run"}


def test_validity_model_without_a_right_answer_judges_no_gradient(plain):
    network, x, y = plain
    rows = check_validity(untried(network, x, (network(x).argmin(dim=1))))
    names = {row.name for row in rows if row.advice == "no image is answered correctly"}
    assert names == {check.name for check in (*GRADIENT_CHECKS, *ATTACK_CHECKS)}


def test_validity_leaves_no_trace(robust):
    network, x, y = robust
    network, x_before = copy.deepcopy(network), x.clone()
    state = {name: value.clone() for name, value in network.state_dict().items()}
    random_state = torch.get_rng_state()
    claim = claim_of(network, x, y, features=penultimate_features(network, x))
    first = check_validity(claim)
    assert first == check_validity(claim)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(x, x_before)
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in network.parameters())
    assert not any(module.training for module in network.modules())


def test_validity_takes_the_first_images(robust):
    network, x, y = robust
    rows = {row.name: row for row in check_validity(claim_of(network, x, y), num_images=16)}
    assert rows["zero_gradient"].found.endswith("of 16 images")
    assert rows["unconstrained"].found.endswith("of 16 images stand")
