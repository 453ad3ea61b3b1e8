"""What every method without teachers keeps: a mean over any batch, in either number format."""

import dataclasses

import pytest
import torch
from torch.testing import assert_close

from compressor.data import Batch
from compressor.method_recipes import CrossEntropyRecipe, PGDATRecipe, TRADESRecipe
from compressor.method_table import InnerAttackRecipe
from compressor.methods.build import build_method
from compressor.methods.protocol import Moment
from compressor.networks import NetworkSpec, build_classifier
from compressor.performance import Performance
from compressor.student import Student
from compressor.threat import ThreatModel

ATTACK = InnerAttackRecipe(num_steps=2, step_size_pixels=4 / 255)
TABLES = {
    "cross_entropy": CrossEntropyRecipe(),
    "pgd_at": PGDATRecipe(attack=ATTACK),
    "trades": TRADESRecipe(attack=ATTACK),
}
SPEC = NetworkSpec(architecture="tiny", num_classes=10, image_shape=(1, 8, 8))

every_method = pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)


def make_student(dtype=torch.float32):
    """Sure enough of itself that clean and adversarial answers differ by more than rounding."""
    network = build_classifier(SPEC, seed=0)
    with torch.no_grad():
        network.backbone.fc.weight.mul_(10)
    return Student(network, Performance(device=torch.device("cpu"), training_dtype=dtype))


def make_batch(num_images=8, *, repeats=1):
    x = torch.rand(num_images, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(num_images).repeat(repeats)
    x = x.repeat(repeats, 1, 1, 1)
    return Batch(x_NCHW=x, y_N=ids % 10, index_N=ids, keys_N=ids)


def take_step(table, student, *, batch=None, attack=None):
    """One step, and its gradients in the student."""
    threat = ThreatModel(epsilon_pixels=8 / 255)
    method = build_method(table, threat=threat, teachers=[], num_steps=10)
    if attack is not None and hasattr(method, "attack"):
        method = dataclasses.replace(method, attack=attack)
    state = method.initial_state()
    result, after = method.step(student, batch or make_batch(), state, Moment())
    assert after == state
    assert method.tensors() == {}
    result.loss.backward()
    return result


def slopes(student):
    return torch.cat([p.grad.flatten() for p in student.network.parameters()])


@every_method
@pytest.mark.parametrize("num_images", [1, 2])
def test_small_batches(table, num_images):
    student = make_student()
    result = take_step(table, student, batch=make_batch(num_images))
    assert result.loss.shape == ()
    assert torch.isfinite(result.loss)
    assert torch.isfinite(slopes(student)).all()
    assert slopes(student).any()


@every_method
def test_the_images_stay_as_they_are(table):
    batch = make_batch()
    take_step(table, make_student(), batch=batch)
    assert torch.equal(batch.x_NCHW, make_batch().x_NCHW)
    assert not batch.x_NCHW.requires_grad


@every_method
def test_the_loss_is_a_mean_over_images(table):
    """A batch twice over has the same loss and the same gradient."""
    once, twice = make_student(), make_student()
    first, second = take_step(table, once), take_step(table, twice, batch=make_batch(repeats=2))
    assert_close(first.loss, second.loss, rtol=1e-5, atol=0)
    assert_close(slopes(once), slopes(twice), rtol=1e-3, atol=1e-5)


@every_method
def test_bfloat16_is_close_to_float32(table):
    """On the same attacked images: a search of rounded numbers ends elsewhere."""

    def attack(model, x_NCHW, targets, *, keys_N):
        assert targets.dtype in {torch.int64, torch.float32}
        return (x_NCHW + 0.4 * x_NCHW.flip(0)).clamp(0, 1)

    exact, rough = make_student(), make_student(torch.bfloat16)
    first = take_step(table, exact, attack=attack)
    second = take_step(table, rough, attack=attack)
    assert second.loss.dtype == torch.float32
    assert second.logged == pytest.approx(first.logged, rel=0.05)
    assert torch.cosine_similarity(slopes(exact), slopes(rough), dim=0) > 0.97


@every_method
def test_the_logged_loss_is_the_minimised_one(table):
    result = take_step(table, make_student())
    assert result.logged["loss_nats"] == pytest.approx(result.loss.item(), rel=1e-6)
