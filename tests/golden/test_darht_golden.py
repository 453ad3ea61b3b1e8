"""DARHT against an oracle in plain numpy: a linear student, three phases, losses and gradients."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from compressor.architectures.teacher_map import add_teacher_map
from compressor.attacks import pgd
from compressor.attacks.build import build_inner_attack
from compressor.data import Batch
from compressor.losses import cross_entropy
from compressor.method_table import InnerAttackRecipe
from compressor.methods.darht import DARHT, DARHTState, trust_of
from compressor.methods.protocol import Moment
from compressor.performance import Performance
from compressor.student import Student
from compressor.threat import ThreatModel

NUM_STEPS, NUM_IMAGES, NUM_PIXELS, NUM_TEACHERS, NUM_CLASSES = 12, 6, 12, 3, 4
EPSILON, STEP_SIZE, ATTACK_STEPS = 0.1, 0.03, 5
DISTIL_FROM, LABELS_UNTIL = 0.25, 0.75
RATE, MOMENTUM, WEIGHT_DECAY = 0.02, 0.9, 5e-3
IS_ADVERSARIAL = [0, 1, 1, 1, 0, 1, 0, 0, 1, 0, 1, 1]
RELEASED = {"normalise_trust": False, "skip_above_nats": 2.5}


def waves(*shape, phase):
    """Numbers in [-1, 1] without pattern."""
    count = np.arange(np.prod(shape), dtype=np.float64)
    return np.sin(12.9898 * count + 78.233 * phase + 0.001 * count * count).reshape(shape)


def first_layers():
    inner = NUM_TEACHERS * NUM_CLASSES
    return {
        "w1": 0.9 * waves(inner, NUM_PIXELS, phase=1.0),
        "b1": 0.2 * waves(inner, phase=1.3),
        "w2": 0.7 * waves(NUM_CLASSES, inner, phase=1.7),
        "b2": 0.1 * waves(NUM_CLASSES, phase=2.1),
    }


TEACHERS = [(1.0 + i) * waves(NUM_CLASSES, NUM_PIXELS, phase=5.0 + i) for i in range(NUM_TEACHERS)]


def batch_of(step):
    images = 0.5 + 0.5 * waves(NUM_IMAGES, NUM_PIXELS, phase=10.0 + step)
    labels = (np.arange(NUM_IMAGES) * 7 + step) % NUM_CLASSES
    return images, labels, np.sqrt(2) * waves(NUM_IMAGES, NUM_PIXELS, phase=100.0 + step)


def softmax(logits):
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def mean_log_loss(probabilities, labels):
    return -np.log(probabilities[np.arange(len(labels)), labels]).mean()


def oracle_attack(net, images, labels, noise):
    onehot = np.eye(NUM_CLASSES)[labels]
    point = images + 0.001 * noise
    for _ in range(ATTACK_STEPS):
        logits = (point @ net["w1"].T + net["b1"]) @ net["w2"].T + net["b2"]
        slope = (softmax(logits) - onehot) @ net["w2"] @ net["w1"]
        point = point + STEP_SIZE * np.sign(slope)
        point = np.clip(np.clip(point, images - EPSILON, images + EPSILON), 0, 1)
    return point


def oracle_step(net, step, *, last_layer, normalise_trust=True):
    """Losses by name, and the gradient of each layer; None where there is none at all."""
    images, labels, noise = batch_of(step)
    u = oracle_attack(net, images, labels, noise) if IS_ADVERSARIAL[step] else images
    inner = u @ net["w1"].T + net["b1"]
    answer = softmax(inner @ net["w2"].T + net["b2"])
    losses = {"label_loss_nats": mean_log_loss(answer, labels), "loss_nats": 0.0}
    to_inner = np.zeros_like(inner)
    to_logits = (answer - np.eye(NUM_CLASSES)[labels]) / NUM_IMAGES
    fraction = step / NUM_STEPS
    if fraction < LABELS_UNTIL:
        losses["loss_nats"] += losses["label_loss_nats"]
        to_inner += to_logits @ net["w2"]
    if fraction >= DISTIL_FROM:
        targets = [softmax(u @ weights.T) for weights in TEACHERS]
        trust = np.array([np.exp(-mean_log_loss(p, labels)) for p in targets])
        trust = trust / trust.sum() if normalise_trust else trust
        losses["distillation_loss_nats"] = 0.0
        for place, (p, v) in enumerate(zip(targets, trust, strict=True)):
            own = slice(place * NUM_CLASSES, (place + 1) * NUM_CLASSES)
            q = softmax(inner[:, own])
            divergence = (p * (np.log(p) - np.log(q))).sum(axis=1).mean()
            losses["distillation_loss_nats"] += v * divergence
            losses[f"teacher_{place + 1}_trust_ratio"] = v
            losses[f"teacher_{place + 1}_loss_nats"] = divergence
            to_inner[:, own] += v * (q - p) / NUM_IMAGES
        losses["loss_nats"] += losses["distillation_loss_nats"]
    if fraction >= LABELS_UNTIL and last_layer == "labels":
        losses["loss_nats"] += losses["label_loss_nats"]
    if fraction >= LABELS_UNTIL and last_layer != "labels":
        to_logits = 0 * to_logits
    gradients = {
        "w1": to_inner.T @ u,
        "b1": to_inner.sum(axis=0),
        "w2": to_logits.T @ inner,
        "b2": to_logits.sum(axis=0),
    }
    if fraction >= LABELS_UNTIL and last_layer == "frozen":
        gradients |= {"w2": None, "b2": None}
    return losses, gradients


def run_oracle(*, last_layer="labels", normalise_trust=True, skip_above_nats=None):
    net, rows = first_layers(), []
    speed = {name: np.zeros_like(value) for name, value in net.items()}
    for step in range(NUM_STEPS):
        losses, gradients = oracle_step(
            net, step, last_layer=last_layer, normalise_trust=normalise_trust
        )
        is_skipped = skip_above_nats is not None and losses["label_loss_nats"] > skip_above_nats
        for name, gradient in gradients.items():
            if gradient is None or is_skipped:
                gradients[name] = None
                continue
            speed[name] = MOMENTUM * speed[name] + gradient + WEIGHT_DECAY * net[name]
            net[name] = net[name] - RATE * speed[name]
        rows.append((losses, gradients, {name: value.copy() for name, value in net.items()}))
    return rows


def make_student():
    network = nn.Sequential(nn.Flatten(), nn.Linear(NUM_PIXELS, NUM_CLASSES)).double()
    head = add_teacher_map(network, num_classes=NUM_CLASSES, num_teachers=NUM_TEACHERS, seed=0)
    layers = first_layers()
    for layer, weight, bias in ((head.to_map, "w1", "b1"), (head.to_logits, "w2", "b2")):
        layer.weight.data = torch.from_numpy(layers[weight])
        layer.bias.data = torch.from_numpy(layers[bias])
    return Student(network, Performance(device=torch.device("cpu"))), head


def linear_teacher(weights):
    return SimpleNamespace(logits=lambda x_NCHW: x_NCHW.flatten(1) @ weights.T)


def make_method(**settings):
    teachers = [linear_teacher(torch.from_numpy(weights)) for weights in TEACHERS]
    attack = InnerAttackRecipe(num_steps=ATTACK_STEPS, step_size_pixels=STEP_SIZE)
    threat = ThreatModel(epsilon_pixels=EPSILON)
    sound = {
        "adversarial_share": 0.5,
        "last_layer": "labels",
        "normalise_trust": True,
        "skip_above_nats": None,
        "has_drawing_teachers": False,
        "statistics": {},
    }
    return DARHT(
        teachers=teachers,
        attack=build_inner_attack(attack, threat=threat, objective=cross_entropy),
        distil_from=DISTIL_FROM,
        labels_until=LABELS_UNTIL,
        **(sound | settings),
    )


def run_ours(**settings):
    (student, head), method, rows = make_student(), make_method(**settings), []
    tensors = {
        "w1": head.to_map.weight,
        "b1": head.to_map.bias,
        "w2": head.to_logits.weight,
        "b2": head.to_logits.bias,
    }
    optimizer = torch.optim.SGD(
        student.network.parameters(), lr=RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
    )
    for step in range(NUM_STEPS):
        images, labels, noise = map(torch.from_numpy, batch_of(step))
        images, noise = (values.view(NUM_IMAGES, 3, 2, 2) for values in (images, noise))
        ids = torch.arange(NUM_IMAGES)
        batch = Batch(x_NCHW=images, y_N=labels, index_N=ids, keys_N=ids)
        state = DARHTState(draw=0.49 if IS_ADVERSARIAL[step] else 0.5)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pgd, "normal", lambda *_, noise=noise, **__: noise)
            result, _ = method.step(student, batch, state, Moment(fraction=step / NUM_STEPS))
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()
        rows.append((result, {n: t.grad for n, t in tensors.items()}, _copied(tensors)))
    return rows


def _copied(tensors):
    return {name: tensor.detach().clone().numpy() for name, tensor in tensors.items()}


CASES = {
    "default": {},
    "frozen": {"last_layer": "frozen"},
    "released": {"last_layer": "decaying", **RELEASED},
}


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_darht_float64_equals_the_oracle(settings):
    ours, theirs = run_ours(**settings), run_oracle(**settings)
    assert len(ours) == len(theirs) == NUM_STEPS
    for (result, gradients, layers), (losses, expected_gradients, expected_layers) in zip(
        ours, theirs, strict=True
    ):
        logged = {name: result.logged[name] for name in losses}
        assert logged == pytest.approx(losses, rel=0, abs=1e-10)
        for name, expected in expected_gradients.items():
            if expected is None:
                assert gradients[name] is None
            else:
                np.testing.assert_allclose(gradients[name], expected, rtol=0, atol=1e-10)
            np.testing.assert_allclose(layers[name], expected_layers[name], rtol=0, atol=1e-10)


def test_the_loss_with_a_graph_is_the_logged_one():
    for result, *_ in run_ours():
        assert result.loss.item() == pytest.approx(result.logged["loss_nats"], rel=0, abs=1e-12)


def test_the_sequence_exercises_every_mechanism():
    skipped = [row[0].logged["skipped_fraction"] for row in run_ours(**CASES["released"])]
    assert 0 < sum(skipped) < NUM_STEPS / 2
    phases = [set(row[0].logged) for row in run_ours()]
    assert "distillation_loss_nats" not in phases[0]
    assert "distillation_loss_nats" in phases[3]
    kinds = {(step * 4 // NUM_STEPS, IS_ADVERSARIAL[step]) for step in range(NUM_STEPS)}
    assert len(kinds) == 8  # each quarter has clean and attacked batches


def test_trust_and_loss_of_the_reference():
    """Numbers of the description of the released script."""
    label_losses = torch.tensor([0.3, 1.2, 0.8, 2.0], dtype=torch.float64)
    divergences = torch.tensor([0.9, 0.7, 0.8, 1.1], dtype=torch.float64)
    trust = trust_of(label_losses, normalise=False)
    assert trust.tolist() == pytest.approx(
        [0.74081822, 0.30119421, 0.44932896, 0.13533528], abs=5e-9
    )
    assert float(trust.sum()) == pytest.approx(1.62667668, abs=1e-8)
    assert float((trust * divergences).sum()) == pytest.approx(1.38590433, abs=1e-8)
    normalised = trust_of(label_losses, normalise=True)
    assert normalised.tolist() == pytest.approx((trust / trust.sum()).tolist(), rel=1e-12)
