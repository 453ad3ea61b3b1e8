"""The active test: what is planted is there, good attacks find it, poor ones do not."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from compressor.attacks.apgd import APGD
from compressor.attacks.draws import KeyedDraws
from compressor.attacks.fixed import FixedAttack
from compressor.attacks.pgd import PGD
from compressor.attacks.targeted import Targeted
from compressor.losses import margin, targeted_dlr
from compressor.networks import NetworkSpec, build_classifier
from compressor.threat import ThreatModel
from compressor.validity import active_test as module
from compressor.validity.active_test import active_test, penultimate_features, plant
from compressor.validity.origins import border_points, inner_points

LINF = ThreatModel(epsilon_pixels=16 / 255)
L2 = ThreatModel(norm="l2", epsilon_pixels=0.5)
every_threat = pytest.mark.parametrize("threat", [LINF, L2], ids=str)


@pytest.fixture(scope="module")
def network(make_tiny):
    return make_tiny(width=1.0).eval()


@pytest.fixture(scope="module")
def features(network, make_images):
    return penultimate_features(network, make_images(1)[0])


@pytest.fixture(scope="module")
def x(make_images):
    return make_images(24)[0]


def row_of(features, x, threat, attack, *, num_queries=20):
    keys_N = torch.arange(len(x)) * 7_919
    return active_test(
        features, x, keys_N=keys_N, threat=threat, attack=attack, num_queries=num_queries
    )


def apgd(threat, *, num_steps=10):
    return APGD(threat=threat, objective=margin, num_steps=num_steps)


def pgd(threat, *, step_size_pixels):
    attack = PGD(threat=threat, step_size_pixels=step_size_pixels, num_steps=10)
    return FixedAttack(attack=attack)


@every_threat
def test_plant_puts_an_adversarial_image_in_every_ball(threat, features, x):
    keys_N = torch.arange(len(x))
    planted, places_M = plant(features, x, keys_N=keys_N, threat=threat)
    assert len(places_M) >= 0.9 * len(x)
    draws = KeyedDraws(keys_N=keys_N)
    half = range(module.NUM_COMMON // 2)
    common = [x, *(inner_points(x, threat, draws) for _ in half)]
    common += [border_points(x, threat, draws) for _ in half]
    candidates = [border_points(x, threat, draws) for _ in range(module.NUM_CANDIDATES)]
    for point in common:
        assert (planted(point[places_M]).argmax(dim=1) == 0).all()
    answers = torch.stack([planted(point[places_M]).argmax(dim=1) for point in candidates])
    assert (answers == 1).any(dim=0).all()
    assert all(threat.contains(point, x).all() for point in (*common, *candidates))


def test_plant_with_more_features_than_points(x):
    def features(x_NCHW):
        flat = x_NCHW.flatten(1)
        return torch.cat([flat, flat**2], dim=1)

    planted, places_M = plant(features, x, keys_N=torch.arange(len(x)), threat=LINF)
    assert planted.weight_MD.isfinite().all()
    assert len(places_M) == len(x)
    assert row_of(features, x, LINF, apgd(LINF)).status == "passed"


def test_plant_answers_images_in_any_order(features, x):
    planted, places_M = plant(features, x, keys_N=torch.arange(len(x)), threat=LINF)
    rows = torch.tensor([3, 1, 3, 0])
    together = planted(x[places_M])
    torch.testing.assert_close(planted(x[places_M][rows]), together[rows])


@every_threat
@pytest.mark.parametrize("seed", range(2))
def test_active_test_passes_good_attacks(threat, seed, make_tiny, make_images):
    x, _ = make_images(24, seed=seed)
    features = penultimate_features(make_tiny(seed=seed, width=1.0).eval(), x)
    attack = Targeted(attack=APGD(threat=threat, objective=targeted_dlr, num_steps=10))
    for search in (apgd(threat), attack):
        row = row_of(features, x, threat, search)
        assert row.status == "passed"
        num_found, num_planted = map(int, row.found.split("found ")[1].split()[0:3:2])
        assert num_found >= 0.95 * num_planted
        assert num_planted >= 20


@every_threat
@pytest.mark.parametrize(
    "broken", ["a hundredth of the step", "wrong sign", "a tenth of epsilon", "rounded features"]
)
def test_active_test_alarms_for_poor_attacks(broken, threat, features, x):
    epsilon = threat.epsilon_pixels
    attack = apgd(threat)
    if broken == "a hundredth of the step":
        attack = pgd(threat, step_size_pixels=epsilon / 400)
    elif broken == "wrong sign":
        attack = pgd(threat, step_size_pixels=-epsilon / 4)
    elif broken == "a tenth of epsilon":
        attack = apgd(replace(threat, epsilon_pixels=epsilon / 10))
    row = row_of(
        (lambda x: features((100 * x).round() / 100)) if "rounded" in broken else features,
        x,
        threat,
        attack,
    )
    assert row.status == "alarm"
    assert row.p_value < 0.01


def test_active_test_counts_only_points_within_the_threat_model(features, x):
    far = replace(LINF, epsilon_pixels=2 * LINF.epsilon_pixels)
    row = row_of(features, x, LINF, pgd(far, step_size_pixels=far.epsilon_pixels))
    assert row.status == "alarm"
    assert "found 0 of" in row.found


@pytest.mark.parametrize(
    ("num_found", "num_chance", "expected"),
    [
        (32, 0, "passed"),
        (27, 0, "passed"),
        (26, 0, "alarm"),
        (0, 0, "alarm"),
        (32, 16, "passed"),
        (32, 17, "not_run"),
        (26, 32, "alarm"),
    ],
)
def test_active_test_verdict_is_exact(num_found, num_chance, expected):
    row = module._verdict(num_found, num_chance, num_planted=32, num_queries=100)
    assert row.status == expected
    if expected == "not_run":
        assert "random search with 100 queries 17" in row.advice


def test_active_test_says_so_where_nothing_can_be_planted(x):
    row = row_of(lambda x: torch.ones(len(x), 5), x, LINF, apgd(LINF))
    assert row.status == "not_run"
    assert "24 images" in row.advice


def test_active_test_leaves_out_images_that_cannot_be_told_apart(features, x):
    row = row_of(features, torch.cat([x[:12], x[:12]]), LINF, apgd(LINF))
    num_planted = int(row.found.split(" of ")[1].split()[0])
    assert num_planted <= 12


def test_penultimate_features_are_what_the_last_layer_is_given(network, features, make_images):
    x, _ = make_images(5)
    with torch.no_grad():
        assert torch.equal(network.fc(features(x)), network(x))
    assert isinstance(network.fc, nn.Linear)  # ours is a copy
    assert all(p.requires_grad for p in network.parameters())
    assert not any(module._forward_hooks for module in network.modules())


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "wide_resnet_34_10", "tiny"])
def test_penultimate_features_of_our_networks(name):
    spec = NetworkSpec(architecture=name, width=0.05, num_classes=4, image_shape=(3, 8, 8))
    classifier = build_classifier(spec, seed=0).eval()
    features = penultimate_features(classifier, torch.rand(2, 3, 8, 8))
    assert features is not None
    assert features(torch.rand(3, 3, 8, 8)).dim() == 2


@pytest.mark.parametrize(
    "network",
    [
        nn.Sequential(nn.Conv2d(3, 4, 8), nn.Flatten()),
        nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.ReLU(), nn.LogSoftmax(dim=1)),
        nn.Linear(8, 4),
    ],
    ids=["no linear layer", "something after it", "nothing else"],
)
def test_penultimate_features_need_a_linear_layer_at_the_end(network):
    assert penultimate_features(network, torch.rand(2, 3, 8, 8)) is None
