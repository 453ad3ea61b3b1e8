"""Attack mechanics on models that can be worked by hand."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from compressor.attacks import pgd
from compressor.attacks.gradients import evaluate, in_parts, input_gradient
from compressor.attacks.margin import CONFIDENCE_LOGITS, MarginPGD
from compressor.attacks.pgd import PGD
from compressor.losses import cross_entropy
from compressor.threat import ThreatModel

EPSILON, STEP = 8 / 255, 2 / 255
THREAT = ThreatModel(epsilon_pixels=EPSILON)
X = torch.tensor([0.010, 0.500, 0.995], dtype=torch.float64).view(1, 3, 1, 1)
W = torch.tensor([[1, -2, 0.5], [-1, 1, 0.25]], dtype=torch.float64)
NOISE = torch.tensor([0.0005, -0.0010, 0.0003], dtype=torch.float64).view(1, 3, 1, 1)
LABEL = torch.tensor([0])
KEYS = torch.tensor([7])


def linear(x_NCHW):
    return x_NCHW.flatten(1) @ W.T


@pytest.fixture
def worked_noise(monkeypatch):
    monkeypatch.setattr(pgd, "normal", lambda keys_N, *, stream, shape: NOISE / 0.001)


def worked_attack(num_steps):
    return PGD(threat=THREAT, step_size_pixels=STEP, num_steps=num_steps, start="gaussian")


@pytest.mark.usefixtures("worked_noise")
@pytest.mark.parametrize(
    ("num_steps", "expected"),
    [
        (0, (0.0105, 0.499, 0.9953)),
        (1, (0.00265686, 0.50684314, 0.98745686)),
        (2, (0, 0.51468627, 0.97961373)),
        (4, (0, 0.53037255, 0.96392745)),
        *((n, (0, 0.53137255, 0.96362745)) for n in range(5, 11)),
    ],
)
def test_pgd_worked_steps(num_steps, expected):
    x_adv = worked_attack(num_steps)(linear, X, LABEL, keys_N=KEYS)
    assert x_adv.flatten().tolist() == pytest.approx(expected, abs=6e-9)


@pytest.mark.usefixtures("worked_noise")
def test_pgd_worked_objective_rises():
    final = worked_attack(10)(linear, X, LABEL, keys_N=KEYS)
    assert float(cross_entropy(linear(X + NOISE), LABEL)) == pytest.approx(1.48423249, abs=6e-9)
    assert float(cross_entropy(linear(final), LABEL)) == pytest.approx(1.58305919, abs=6e-9)


def test_pgd_first_forward_pass_sees_the_unclipped_start(monkeypatch):
    monkeypatch.setattr(pgd, "normal", lambda keys_N, *, stream, shape: NOISE * 1e5)
    seen = []

    def watched(x_NCHW):
        seen.append(x_NCHW.detach().clone())
        return linear(x_NCHW)

    worked_attack(2)(watched, X, LABEL, keys_N=KEYS)
    assert_close(seen[0], X + 100 * NOISE)
    assert float(seen[0].max()) > 1
    assert float(seen[1].max()) <= 1


@pytest.mark.parametrize(("start", "spread"), [("zero", 0.0), ("uniform", EPSILON)])
def test_pgd_start_without_steps(start, spread):
    x = torch.full((64, 3, 4, 4), 0.5, dtype=torch.float64)
    attack = PGD(threat=THREAT, step_size_pixels=STEP, num_steps=0, start=start)
    offset = attack(linear, x, torch.zeros(64), keys_N=torch.arange(64)) - x
    assert float(offset.abs().max()) <= spread
    assert float(offset.mean()) == pytest.approx(0, abs=spread / 20)
    assert float(offset.abs().mean()) == pytest.approx(spread / 2, rel=0.05)


def test_pgd_gaussian_start_has_standard_deviation_of_a_thousandth():
    x = torch.full((64, 3, 4, 4), 0.5, dtype=torch.float64)
    offset = worked_attack(0)(linear, x, torch.zeros(64), keys_N=torch.arange(64)) - x
    assert float(offset.std()) == pytest.approx(0.001, rel=0.05)


def naive_margin_attack(x_NCHW, y_N, *, num_steps):
    """One image, one pixel and one class at a time; finite differences for the gradient."""
    results = []
    for x, y in zip(x_NCHW, y_N.tolist(), strict=True):
        start, adv = x.flatten().tolist(), x.flatten().tolist()
        for _ in range(num_steps):
            signs = []
            for i in range(len(adv)):
                up, down = adv.copy(), adv.copy()
                up[i], down[i] = adv[i] + 1e-6, adv[i] - 1e-6
                slope = naive_margin(up, y) - naive_margin(down, y)
                signs.append(0 if abs(slope) < 1e-12 else (1 if slope > 0 else -1))
            moved = [a + STEP * s for a, s in zip(adv, signs, strict=True)]
            adv = [min(max(m, s - EPSILON), s + EPSILON) for m, s in zip(moved, start, strict=True)]
        results.append([min(max(a, 0.0), 1.0) for a in adv])
    return torch.tensor(results, dtype=torch.float64).view_as(x_NCHW)


def naive_margin(pixels, y):
    logits = naive_logits(pixels)
    wrong = max(value for k, value in enumerate(logits) if k != y)
    return min(wrong - logits[y], CONFIDENCE_LOGITS)


def naive_logits(pixels):
    a, b, c = pixels
    return [a - 2 * b * b + 0.5 * c, b - a + 0.25 * c, 3 * a * c - b, 0.1 + a - c]


def curved(x_NCHW):
    a, b, c = x_NCHW.flatten(1).unbind(1)
    columns = [a - 2 * b * b + 0.5 * c, b - a + 0.25 * c, 3 * a * c - b, 0.1 + a - c]
    return torch.stack(columns, dim=1)


@pytest.mark.parametrize("num_steps", [0, 1, 3, 10])
def test_margin_pgd_equals_naive_reference(num_steps):
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(12, 3, 1, 1, generator=generator, dtype=torch.float64)
    x[0] = torch.tensor([0.0, 1.0, 0.99]).view(3, 1, 1)
    y = torch.arange(12) % 4
    attack = MarginPGD(threat=THREAT, step_size_pixels=STEP, num_steps=num_steps)
    ours = attack(curved, x, y, keys_N=torch.arange(12))
    assert_close(ours, naive_margin_attack(x, y, num_steps=num_steps), rtol=0, atol=1e-12)


def test_margin_pgd_rests_beyond_confidence():
    def steep(x_NCHW):
        return 1_000 * linear(x_NCHW)

    attack = MarginPGD(threat=THREAT, step_size_pixels=STEP, num_steps=5)
    assert_close(attack(steep, X, LABEL, keys_N=KEYS), X, rtol=0, atol=0)


def test_margin_pgd_clips_only_the_last_iterate():
    seen = []

    def watched(x_NCHW):
        seen.append(float(x_NCHW.detach().min()))
        return linear(x_NCHW)

    attack = MarginPGD(threat=THREAT, step_size_pixels=STEP, num_steps=4)
    x_adv = attack(watched, X, LABEL, keys_N=KEYS)
    assert min(seen) < 0
    assert float(x_adv.min()) == 0


def test_input_gradient_of_linear_model():
    gradient = input_gradient(linear, X, LABEL, objective=lambda logits, y: logits[:, 1])
    assert_close(gradient.flatten(), W[1])


def test_input_gradient_is_per_example(tiny_network, make_images):
    network = tiny_network.double().eval()
    x, y = make_images(dtype=torch.float64)
    together = input_gradient(network, x, y, objective=cross_entropy)
    alone = input_gradient(network, x[2:3], y[2:3], objective=cross_entropy)
    assert_close(together[2:3], alone, rtol=0, atol=1e-12)


def test_a_model_in_parts_is_the_same_function_and_gradient(tiny_network, make_images):
    """And no part is larger than allowed, on the way back neither."""
    x, y = make_images(11)
    network, sizes = tiny_network.double().eval(), []

    def watched(x_NCHW):
        sizes.append(len(x_NCHW))
        return network(x_NCHW)

    parts = in_parts(watched, max_rows=4)
    x = x.double()
    whole = evaluate(network, x, y, objective=cross_entropy)
    found = evaluate(parts, x, y, objective=cross_entropy)
    torch.testing.assert_close(found.logits_NK, whole.logits_NK)
    torch.testing.assert_close(found.gradient_NCHW, whole.gradient_NCHW)
    assert sorted(sizes) == [3, 3, 4, 4, 4, 4]  # each part once and once again
    sizes.clear()
    torch.testing.assert_close(parts(x), whole.logits_NK)
    assert sizes == [4, 4, 3]


def test_input_gradient_leaves_no_trace(tiny_network, make_images):
    x, y = make_images()
    with torch.no_grad():  # the caller's switch does not matter
        gradient = input_gradient(tiny_network.eval(), x, y, objective=cross_entropy)
    assert gradient.abs().sum() > 0
    assert not gradient.requires_grad
    assert not x.requires_grad
    assert x.grad is None
    assert all(p.grad is None and p.requires_grad for p in tiny_network.parameters())


def test_input_gradient_keeps_existing_parameter_gradients(make_images):
    x, y = make_images()
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4))
    network(x).sum().backward()
    before = [p.grad.clone() for p in network.parameters()]
    input_gradient(network, x, y, objective=cross_entropy)
    assert all(torch.equal(p.grad, g) for p, g in zip(network.parameters(), before, strict=True))
