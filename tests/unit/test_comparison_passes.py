"""Passes per training image: what each method says it does, against calls that are counted."""

import pytest

from compressor.comparison.passes import Passes, count_passes
from compressor.recipe_file import parse_recipe

STEPS = 3
CLEAN = {"role": "clean", "source": "tiny:clean.pt"}
ROBUST = {"role": "robust", "source": "tiny:robust.pt"}
ATTACK = {"num_steps": STEPS, "step_size_pixels": "8/255"}


def passes(student_forwards, student_backwards, teacher_forwards=0.0, teacher_backwards=0.0):
    return Passes(
        student_forwards=student_forwards,
        student_backwards=student_backwards,
        teacher_forwards=teacher_forwards,
        teacher_backwards=teacher_backwards,
    )


TABLE = {
    "cross_entropy": ({}, [], passes(1, 1)),
    "pgd_at": ({"attack": ATTACK}, [], passes(STEPS + 1, STEPS + 1)),
    # The clean answer is the target of the attack; then clean and adversarial images.
    "trades": ({"attack": ATTACK}, [], passes(STEPS + 3, STEPS + 2)),
    "bmtard": ({"attack": ATTACK}, [CLEAN, ROBUST], passes(STEPS + 2, STEPS + 2, 2)),
    "mtard": ({"attack": ATTACK}, [CLEAN, ROBUST], passes(STEPS + 2, STEPS + 2, 2)),
    "distillation": ({}, [ROBUST], passes(1, 1, 1)),
    "ard": ({"attack": ATTACK}, [ROBUST], passes(STEPS + 1, STEPS + 1, 1)),
    "rslad": ({"attack": ATTACK}, [ROBUST], passes(STEPS + 2, STEPS + 2, 1)),
    # Without a begin, every step asks teacher and student about both images.
    "iad": ({"attack": ATTACK, "begin_fraction": 0}, [ROBUST], passes(STEPS + 2, STEPS + 2, 2)),
    # Every step of the attack goes there and back through the teacher too.
    "adaad": ({"attack": ATTACK}, [ROBUST], passes(STEPS + 1, STEPS + 1, STEPS + 1, STEPS)),
}


def make_recipe(name, settings, teachers):
    table = {
        "name": "counted",
        "data": {"source": "digits", "validation_size": 10},
        "student": {"architecture": "resnet18"},
        "teachers": teachers,
        "method": {"name": name, **settings},
    }
    return parse_recipe(table, origin="the test")


@pytest.mark.parametrize("name", TABLE)
def test_passes_of_each_method(name):
    settings, teachers, expected = TABLE[name]
    recipe = make_recipe(name, settings, teachers)
    assert count_passes(recipe, num_moments=2) == expected


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_coins_fall_evenly(share):
    """Every attacked batch goes through the student STEPS times more."""
    recipe = make_recipe("darht", {"attack": ATTACK, "adversarial_share": share}, [ROBUST])
    assert count_passes(recipe).student_forwards == 1 + share * STEPS


def test_attack_steps_are_counted_one_by_one():
    found = [
        count_passes(make_recipe("pgd_at", {"attack": ATTACK | {"num_steps": num}}, []))
        for num in (1, 5)
    ]
    assert found[1].student_forwards - found[0].student_forwards == 4
