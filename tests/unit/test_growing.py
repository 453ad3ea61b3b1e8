"""Attacks that change along the run: how many steps when; everything else is the method's."""

from dataclasses import dataclass, field

import pytest
import torch

from compressor.attacks.pgd import PGD
from compressor.errors import RecipeError
from compressor.method_recipes import CIARDRecipe, CrossEntropyRecipe, PGDATRecipe
from compressor.method_table import InnerAttackRecipe
from compressor.methods.build import build_method
from compressor.methods.growing import Growing, growing
from compressor.methods.pgd_at import PGDAT
from compressor.methods.protocol import Moment
from compressor.recipe_file import parse_recipe
from compressor.threat import ThreatModel

THREAT = ThreatModel(epsilon_pixels=8 / 255)
FULL = PGD(threat=THREAT, step_size_pixels=2 / 255, num_steps=10)


@dataclass(frozen=True, kw_only=True)
class Remembering:
    """A method that only notes its attack."""

    attack: PGD
    seen: list = field(default_factory=list)

    def step(self, student, batch, state, moment):
        self.seen.append(self.attack)
        return "result", state + 1


@pytest.mark.parametrize(
    ("fraction", "num_steps"),
    [(0.0, 4), (0.1332, 4), (0.1334, 5), (0.5, 7), (0.7999, 9), (0.8, 10), (0.9999, 10)],
)
def test_steps_grow_evenly_and_reach_as_far(fraction, num_steps):
    method = growing(Remembering(attack=FULL), begins_at=0.0, first_num_steps=4, full_from=0.8)
    assert method.step(None, None, 41, Moment(fraction=fraction)) == ("result", 42)
    (attack,) = method.method.seen
    assert attack.num_steps == num_steps
    assert attack.num_steps * attack.step_size_pixels == pytest.approx(20 / 255)
    assert (attack.threat, attack.start) == (THREAT, FULL.start)


@pytest.mark.parametrize(
    ("fraction", "num_steps"),
    [(0.0, 0), (0.1999, 0), (0.2001, 8), (0.4999, 8), (0.5001, 9), (0.7999, 9), (0.8, 10)],
)
def test_steps_grow_from_where_the_attack_begins(fraction, num_steps):
    method = growing(Remembering(attack=FULL), begins_at=0.2, first_num_steps=8, full_from=0.8)
    method.step(None, None, 0, Moment(fraction=fraction))
    (attack,) = method.method.seen
    assert attack.num_steps == num_steps


def test_before_it_begins_the_images_stay_clean():
    method = growing(Remembering(attack=FULL), begins_at=0.5, first_num_steps=10, full_from=0.8)
    (start, none), (begins_at, full) = method.phases
    assert (start, begins_at, full) == (0.0, 0.5, FULL)
    images = torch.rand(3, 1, 4, 4)
    assert torch.equal(none(None, images, None, keys_N=torch.arange(3)), images)


def test_the_last_attack_is_that_of_the_method():
    method = growing(Remembering(attack=FULL), begins_at=0.0, first_num_steps=10, full_from=0.8)
    assert method.phases == [(0.0, FULL)]
    method.step(None, None, 0, Moment())
    assert method.method.seen == [FULL]


def test_built_where_a_recipe_asks_for_it():
    def build(recipe):
        return build_method(recipe, threat=THREAT, teachers=[], num_steps=10)

    def num_steps(**attack):
        method = build(PGDATRecipe(attack=InnerAttackRecipe(start="uniform", **attack)))
        assert isinstance(method, Growing)
        return [attack.num_steps for _, attack in method.phases]

    assert num_steps(first_num_steps=3) == [3, 4, 5, 6, 7, 8, 9, 10]
    assert num_steps(begins_at=0.3) == [0, 10]
    assert num_steps(begins_at=0.3, first_num_steps=8) == [0, 8, 9, 10]
    assert isinstance(build(PGDATRecipe()), PGDAT)
    assert not isinstance(build(CrossEntropyRecipe()), Growing)


def test_tensors_are_those_of_the_method():
    tensors = {"a": torch.ones(1)}
    method = Remembering(attack=FULL)
    object.__setattr__(method, "tensors", lambda: tensors)
    assert growing(method, begins_at=0.1, first_num_steps=1, full_from=0.5).tensors() is tensors


def recipe_of(**attack):
    table = {
        "name": "grown",
        "data": {"source": "digits", "validation_size": 100},
        "student": {"architecture": "tiny"},
        "method": {"name": "pgd_at", "attack": attack},
    }
    return parse_recipe(table, origin="the test")


def test_recipes_that_do_not_grow_keep_their_identity():
    assert recipe_of().recipe_id == recipe_of(full_from=0.5).recipe_id
    assert recipe_of(first_num_steps=5).recipe_id != recipe_of().recipe_id
    grown = recipe_of(first_num_steps=5, full_from=0.5)
    assert grown.recipe_id != recipe_of(first_num_steps=5).recipe_id
    assert recipe_of(begins_at=0.3).recipe_id != recipe_of().recipe_id
    assert recipe_of(begins_at=0.0).recipe_id == recipe_of().recipe_id
    assert CIARDRecipe().attack.first_num_steps is None


def test_it_cannot_shrink():
    with pytest.raises(RecipeError, match="first_num_steps 11 is above num_steps 10"):
        recipe_of(first_num_steps=11)


def test_it_must_begin_in_time():
    with pytest.raises(RecipeError, match="begins_at 1 leaves no time for the attack"):
        recipe_of(begins_at=1.0)
    with pytest.raises(RecipeError, match="to grow; it must be below full_from"):
        recipe_of(begins_at=0.8, first_num_steps=2)
