"""Back from any point within a threat model to its clean image."""

import pytest
import torch

from compressor.attacks.draws import KeyedDraws
from compressor.losses import margin
from compressor.threat import ThreatModel
from compressor.validity.origins import Origins, Watch, border_points, distinct

THREATS = [ThreatModel(epsilon_pixels=8 / 255), ThreatModel(norm="l2", epsilon_pixels=0.5)]
every_threat = pytest.mark.parametrize("threat", THREATS, ids=str)
WEIGHT = torch.randn(4, 192, generator=torch.Generator().manual_seed(5))


def linear(x_NCHW):
    return x_NCHW.flatten(1) @ WEIGHT.T


def draws_of(x, seed=0):
    return KeyedDraws(keys_N=torch.arange(len(x)) + 1_000 * seed)


@every_threat
def test_border_points_are_on_the_border(threat):
    x = torch.full((6, 3, 8, 8), 0.5)
    points = border_points(x, threat, draws_of(x))
    assert torch.allclose(threat.length(points - x), torch.tensor(threat.epsilon_pixels))
    if threat.norm == "linf":
        assert torch.allclose((points - x).abs(), torch.tensor(threat.epsilon_pixels))


@every_threat
def test_border_points_are_images_within_the_threat_model(threat, make_images):
    x, _ = make_images(6)
    x[:, :, 0], x[:, :, 1] = 0, 1
    draws = draws_of(x)
    first, second = border_points(x, threat, draws), border_points(x, threat, draws)
    assert threat.contains(first, x).all()
    assert not torch.equal(first, second)
    assert torch.equal(first, border_points(x, threat, draws_of(x)))


@every_threat
def test_origins_survive_any_change_of_rows(threat, make_images):
    x, _ = make_images(20)
    rows = torch.tensor([3, 3, 19, 0, 7, 3])
    points = border_points(x[rows], threat, draws_of(rows, seed=4))
    assert torch.equal(Origins(x, threat).of(points), rows)


def test_origins_are_exact_for_images_just_over_twice_epsilon_apart():
    threat = ThreatModel(epsilon_pixels=0.1)
    x = torch.full((2, 3, 8, 8), 0.5)
    x[1] += 0.1
    x[1, 2, 7, 7] = 0.71
    point = x[:1] + 0.1  # but for one value it is the other image
    assert Origins(x, threat).of(point).tolist() == [0]


@every_threat
def test_distinct_drops_what_is_within_twice_epsilon(threat, make_images):
    x, _ = make_images(5)
    direction = torch.zeros(3, 8, 8)
    direction[0, 0, 0] = 1
    x[:, 0, 0, 0] = 0.1
    x[3] = x[1] + 1.9 * min(threat.epsilon_pixels, 0.4) * direction
    assert distinct(x, threat).tolist() == [0, 1, 2, 4]
    with pytest.raises(ValueError, match="5 images are nearer"):
        Origins(x, threat)


@every_threat
def test_watch_remembers_the_highest_margin_of_each_image(threat, make_images):
    x, y = make_images(4)
    watch = Watch(linear, x, y, threat=threat)
    points = [border_points(x, threat, draws_of(x, seed)) for seed in range(3)]
    for point in points:
        rows = torch.tensor([2, 0, 2, 3])
        assert torch.equal(watch(point[rows]), linear(point[rows]))
    seen = torch.stack([margin(linear(point), y) for point in points]).amax(dim=0)
    seen[1] = -torch.inf  # never asked
    assert torch.equal(watch.highest_margin_N, seen)


@every_threat
def test_watch_ignores_points_outside(threat, make_images):
    x, y = make_images(3)
    watch = Watch(linear, x, y, threat=threat)
    watch((x + 1.2 * (border_points(x, threat, draws_of(x)) - x)).clamp(0, 1))
    watch(x - 2)
    assert torch.equal(watch.highest_margin_N, torch.full((3,), -torch.inf))


def test_watch_lets_gradients_through(make_images):
    x, y = make_images(3)
    watched = x.clone().requires_grad_()
    margin(Watch(linear, x, y, threat=THREATS[0])(watched), y).sum().backward()
    assert float(watched.grad.abs().sum()) > 0
