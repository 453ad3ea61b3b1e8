"""What every loss keeps: one value per example, invariance, right and finite gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from compressor.losses import (
    cross_entropy,
    guarded_kl,
    kl_to_probabilities,
    margin,
    softened_kl,
    temper,
)

LABELS = torch.tensor([0, 2, 3, 1, 1])


def logits(seed, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(5, 4, generator=generator, dtype=torch.float64)


P = F.softmax(logits(1), dim=1)
LOSSES = {
    "cross_entropy": lambda z: cross_entropy(z, LABELS),
    "margin": lambda z: margin(z, LABELS),
    "kl_to_probabilities": lambda z: kl_to_probabilities(z, P),
    "guarded_kl": lambda z: guarded_kl(P, z),
    "softened_kl": lambda z: softened_kl(logits(1), z, temperature=3.0),
}
DIVERGENCES = ["kl_to_probabilities", "guarded_kl"]

every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


@every_loss
def test_loss_one_value_per_example(loss):
    values = loss(logits(2))
    assert values.shape == (5,)
    moved = logits(2)
    moved[3] += torch.tensor([1.0, 0.0, -1.0, 0.0])
    assert (loss(moved) != values).tolist() == [False, False, False, True, False]


@every_loss
@pytest.mark.parametrize("constant", [-30.0, 0.5, 1_000.0])
def test_loss_invariant_to_added_constant(loss, constant):
    assert_close(loss(logits(2) + constant), loss(logits(2)), rtol=0, atol=1e-11)


@every_loss
def test_loss_gradient_against_finite_differences(loss):
    assert torch.autograd.gradcheck(loss, logits(2).requires_grad_())


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_finite_at_huge_logits(loss, dtype):
    z = (1e4 * logits(3).sign()).to(dtype).requires_grad_()
    values = loss(z.double()) if dtype == torch.float64 else loss(z)
    values.sum().backward()
    assert torch.isfinite(values).all()
    assert torch.isfinite(z.grad).all()


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_divergence_finite_between_certain_opposites(name, scale):
    p = temper(scale * logits(4), 1.0)
    z = (-scale * logits(4)).requires_grad_()
    value = guarded_kl(p, z) if name == "guarded_kl" else kl_to_probabilities(z, p)
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert torch.isfinite(z.grad).all()


@pytest.mark.parametrize("temperature", [1.0, 2.5, 10.0])
def test_kl_zero_when_student_equals_tempered_teacher(temperature):
    p = temper(logits(5), temperature)
    assert_close(kl_to_probabilities(logits(5) / temperature, p), torch.zeros(5).double())


def test_kl_positive_elsewhere():
    assert (kl_to_probabilities(logits(6), P) > 0).all()


def test_guard_is_a_bias_without_gradient():
    z = logits(7).requires_grad_()
    bias = guarded_kl(P, z) - kl_to_probabilities(z, P)
    expected = (P * torch.log1p(1e-5 / P)).sum(dim=1)
    assert_close(bias, expected, rtol=0, atol=1e-14)
    assert bias.max() < 4e-5
    (gradient,) = torch.autograd.grad(bias.sum(), z)
    assert_close(gradient, torch.zeros_like(z), rtol=0, atol=1e-15)


def test_no_gradient_into_the_teacher():
    teacher = logits(8).requires_grad_()
    p = temper(teacher, 2.0)
    assert not p.requires_grad
    student = logits(9).requires_grad_()
    guarded_kl(p, student).sum().backward()
    assert teacher.grad is None
    assert student.grad is not None


@pytest.mark.parametrize("temperature", [1.0, 2.5, 30.0])
def test_softened_kl_tempers_both_sides_and_keeps_the_size_of_the_gradient(temperature):
    student, teacher = logits(9).requires_grad_(), logits(8).requires_grad_()
    softened_kl(teacher, student, temperature=temperature).sum().backward()
    gap = F.softmax(student / temperature, dim=1) - F.softmax(teacher / temperature, dim=1)
    assert_close(student.grad, temperature * gap.detach())
    assert teacher.grad is None
    assert_close(softened_kl(teacher, teacher, temperature=temperature), torch.zeros(5).double())


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_guarded_kl_gradient_is_not_divided_by_the_temperature(temperature):
    student = logits(9).requires_grad_()
    p = temper(logits(8), temperature)
    guarded_kl(p, student).sum().backward()
    assert_close(student.grad, F.softmax(student.detach(), dim=1) - p)
