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
    "rc": (
        {"attack": ATTACK | {"first_num_steps": STEPS}},
        [CLEAN, ROBUST],
        passes(STEPS + 2, STEPS + 2, 2),
    ),
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


PHASES = {
    # Labels alone; no teacher is asked.
    "labels": ({"distil_from": 1, "labels_until": 1}, passes(1, 1)),
    # One loss of the logits and one of the map, whose gradients go back through the rest together.
    "both": ({"distil_from": 0, "labels_until": 1}, passes(1, 1, 2)),
    # The teachers' loss enters at the map; the labels' ends at the last layer.
    "teachers": ({"distil_from": 0, "labels_until": 0}, passes(1, 1, 2)),
}


@pytest.mark.parametrize("share", [0, 1])
@pytest.mark.parametrize("phase", PHASES)
def test_every_phase_of_darht_has_one_way_back(phase, share):
    """An attacked batch goes STEPS times there and back besides; teachers see each batch once."""
    settings, clean = PHASES[phase]
    table = {"attack": ATTACK, "adversarial_share": share, **settings}
    found = count_passes(make_recipe("darht", table, [CLEAN, ROBUST]), num_moments=2)
    attack = share * STEPS
    assert (found.student_forwards, found.student_backwards) == (1 + attack, 1 + attack)
    assert (found.teacher_forwards, found.teacher_backwards) == (clean.teacher_forwards, 0)


def test_darht_as_it_is_by_default():
    """Half of the batches have ten steps: 1 + 5 both ways. Of 20 moments, 2.5 %, 7.5 % and so on,
    those from 14.3 % on ask the teacher: all but the first three."""
    found = count_passes(make_recipe("darht", {}, [ROBUST]))
    assert found == passes(6, 6, 17 / 20)


# Student: clean images, the attack, its images; one way back for both losses. Teachers: the robust
# one and the clean one for its share, the clean one once more for its mistakes (the push).
# The copy of the robust one has a way back where it learns: after 50 of 300 epochs.
CIARD = {
    "as it is": ({}, 20, passes(STEPS + 2, STEPS + 2, 3, 17 / 20)),  # all but 2.5, 7.5 and 12.5 %
    "the copy never learns": ({"teacher_learning_rate": 0}, 2, passes(STEPS + 2, STEPS + 2, 3)),
    "no push": ({"push_factor": 0}, 2, passes(STEPS + 2, STEPS + 2, 2, 1)),  # at 25 and 75 %
    # In train mode it is shown the clean images too, before the attack.
    "released": ({"teacher_statistics": "batch"}, 2, passes(STEPS + 2, STEPS + 2, 4, 1)),
}


@pytest.mark.parametrize("case", CIARD)
def test_passes_of_ciard(case):
    settings, num_moments, expected = CIARD[case]
    recipe = make_recipe("ciard", {"attack": ATTACK, **settings}, [CLEAN, ROBUST])
    assert count_passes(recipe, num_moments=num_moments) == expected


def test_attack_steps_are_counted_one_by_one():
    found = [
        count_passes(make_recipe("pgd_at", {"attack": ATTACK | {"num_steps": num}}, []))
        for num in (1, 5)
    ]
    assert found[1].student_forwards - found[0].student_forwards == 4
