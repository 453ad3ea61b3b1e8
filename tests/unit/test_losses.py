"""Losses and entropies against worked numbers: two examples of four classes."""

import math

import pytest
import torch
from torch.testing import assert_close

from compressor.losses import (
    LOG_GUARD,
    cross_entropy,
    guarded_kl,
    guarded_negative_entropy,
    kl_to_probabilities,
    margin,
    temper,
)

ROBUST_TEACHER = torch.tensor([[2.0, 1.0, 0.5, 0.0], [0.2, 1.8, 0.9, 0.1]], dtype=torch.float64)
CLEAN_TEACHER = torch.tensor([[9.0, 1.0, 0.0, -1.0], [0.0, 7.0, 2.0, 1.0]], dtype=torch.float64)
STUDENT_ADV = torch.tensor([[1.0, 0.8, 0.2, 0.0], [0.5, 0.6, 0.4, 0.1]], dtype=torch.float64)
STUDENT_CLEAN = torch.tensor([[1.5, 0.5, 0.0, 0.2], [0.1, 1.2, 0.6, 0.3]], dtype=torch.float64)
TEACHERS = {"robust": ROBUST_TEACHER, "clean": CLEAN_TEACHER}
NUM_CLASSES = 4
# Printed to eight decimals.
PRINTED = {"rtol": 0, "atol": 6e-9}


def element_mean(values_N):
    """The mean over examples and classes that the released code takes."""
    return values_N.mean() / NUM_CLASSES


@pytest.mark.parametrize(
    ("teacher", "temperature", "expected"),
    [
        (
            "robust",
            1,
            [
                [0.57925853, 0.21309730, 0.12925005, 0.07839412],
                [0.11271895, 0.55830063, 0.22698810, 0.10199233],
            ],
        ),
        (
            "clean",
            1,
            [
                [0.99949598, 0.00033529, 0.00012335, 0.00004538],
                [0.00090274, 0.98997298, 0.00667039, 0.00245390],
            ],
        ),
        (
            "clean",
            2.5,
            [
                [0.92046996, 0.03752038, 0.02515067, 0.01685900],
                [0.04725449, 0.77708332, 0.10516679, 0.07049541],
            ],
        ),
    ],
)
def test_temper_worked_probabilities(teacher, temperature, expected):
    p = temper(TEACHERS[teacher], temperature)
    assert_close(p, torch.tensor(expected, dtype=torch.float64), **PRINTED)


ENTROPIES = [
    # temperature, teacher, entropy in nats, guarded negative entropy as an element mean
    ("robust", 1, 1.12532564, -0.28132141),
    ("robust", 1.001, 1.12580275, -0.28144069),
    ("robust", 2, 1.31872774, -0.32967193),
    ("robust", 2.5, 1.34328982, -0.33581246),
    ("robust", 4, 1.36976485, -0.34243121),
    ("robust", 5, 1.37579385, -0.34393846),
    ("robust", 10, 1.38371567, -0.34591892),
    ("clean", 1, 0.03461125, -0.00864301),
    ("clean", 1.001, 0.03477766, -0.00868461),
    ("clean", 2, 0.36663253, -0.09164814),
    ("clean", 2.5, 0.56247868, -0.14060967),
    ("clean", 4, 0.96590981, -0.24146745),
    ("clean", 5, 1.10565260, -0.27640315),
    ("clean", 10, 1.31785933, -0.32945483),
]


@pytest.mark.parametrize(("teacher", "temperature", "entropy", "guarded"), ENTROPIES)
def test_entropies_worked_table(teacher, temperature, entropy, guarded):
    p = temper(TEACHERS[teacher], temperature)
    assert float(-torch.xlogy(p, p).sum(1).mean()) == pytest.approx(entropy, abs=6e-9)
    ours = float(element_mean(guarded_negative_entropy(p)))
    assert ours == pytest.approx(guarded, abs=6e-9)


@pytest.mark.parametrize(
    ("teacher", "expected"),
    [("robust", [1.10976700, 1.14088427]), ("clean", [0.00475039, 0.06447211])],
)
def test_entropy_is_per_sample(teacher, expected):
    p = temper(TEACHERS[teacher], 1)
    exact = -guarded_negative_entropy(p) + (p * torch.log1p(LOG_GUARD / p)).sum(1)
    assert_close(exact, torch.tensor(expected, dtype=torch.float64), **PRINTED)


@pytest.mark.parametrize(
    ("wrong_mass", "expected", "tolerance"),
    [
        (0.0, 9.99995e-7, 1e-12),
        (0.9, -0.23024851, 6e-9),  # uniform
        (1e-3, -0.00100083, 6e-9),
        (1e-5, -1.14076e-5, 6e-11),
        (8e-7, -3.3e-10, 6e-12),
        (1e-7, 8.7e-7, 6e-9),
    ],
)
def test_guarded_negative_entropy_near_one_hot(wrong_mass, expected, tolerance):
    p = torch.full((1, 10), wrong_mass / 9, dtype=torch.float64)
    p[0, 0] = 1 - wrong_mass
    ours = float(guarded_negative_entropy(p).mean()) / 10
    assert ours == pytest.approx(expected, abs=tolerance)


LOSSES = [
    # teacher, its temperature, student, with the guard, without it
    ("robust", 1, STUDENT_ADV, 0.03171869, 0.03170869),
    ("clean", 1, STUDENT_CLEAN, 0.17361325, 0.17360345),
    ("clean", 2.5, STUDENT_CLEAN, 0.07513483, 0.30049931 / 4),
]


@pytest.mark.parametrize(("teacher", "temperature", "student", "guarded", "exact"), LOSSES)
def test_kl_worked_losses(*, teacher, temperature, student, guarded, exact):
    p = temper(TEACHERS[teacher], temperature)
    assert float(element_mean(guarded_kl(p, student))) == pytest.approx(guarded, abs=6e-9)
    assert float(element_mean(kl_to_probabilities(student, p))) == pytest.approx(exact, abs=6e-9)


@pytest.mark.parametrize(
    ("teacher", "temperature", "student", "expected"),
    [
        (
            "robust",
            1,
            STUDENT_ADV,
            [
                [-0.02498589, 0.01218822, 0.00515157, 0.00764610],
                [0.01987449, -0.03225115, 0.00235871, 0.01001795],
            ],
        ),
        (
            "clean",
            2.5,
            STUDENT_CLEAN,
            [
                [-0.04798216, 0.01998605, 0.01182298, 0.01617313],
                [0.01227689, -0.04250857, 0.01683400, 0.01339769],
            ],
        ),
    ],
)
def test_guarded_kl_worked_gradients(teacher, temperature, student, expected):
    leaf = student.clone().requires_grad_()
    element_mean(guarded_kl(temper(TEACHERS[teacher], temperature), leaf)).backward()
    assert_close(leaf.grad, torch.tensor(expected, dtype=torch.float64), **PRINTED)


def test_cross_entropy_uniform_is_log_of_classes():
    assert_close(cross_entropy(torch.zeros(3, 4), torch.arange(3)), torch.full((3,), math.log(4)))


@pytest.mark.parametrize(("label", "expected"), [(0, -1.0), (1, 1.0), (2, 1.5), (3, 2.0)], ids=str)
def test_margin_of_first_worked_row(label, expected):
    assert margin(ROBUST_TEACHER[:1], torch.tensor([label])).tolist() == [expected]


def test_losses_in_float32_agree_to_six_digits():
    p = temper(ROBUST_TEACHER.float(), 1.0)
    loss = element_mean(guarded_kl(p, STUDENT_ADV.float()))
    assert float(loss) == pytest.approx(0.03171869, rel=1e-5)
