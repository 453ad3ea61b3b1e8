"""Attacks that grow along the run: how many steps when; everything else is the method's."""

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
    method = growing(Remembering(attack=FULL), first_num_steps=4, full_from=0.8)
    assert method.step(None, None, 41, Moment(fraction=fraction)) == ("result", 42)
    (attack,) = method.method.seen
    assert attack.num_steps == num_steps
    assert attack.num_steps * attack.step_size_pixels == pytest.approx(20 / 255)
    assert (attack.threat, attack.start) == (THREAT, FULL.start)


def test_the_last_attack_is_that_of_the_method():
    method = growing(Remembering(attack=FULL), first_num_steps=10, full_from=0.0)
    assert method.attacks == [FULL]
    method.step(None, None, 0, Moment())
    assert method.method.seen == [FULL]


def test_built_where_a_recipe_asks_for_it():
    def build(recipe):
        return build_method(recipe, threat=THREAT, teachers=[], num_steps=10)

    attack = InnerAttackRecipe(start="uniform", first_num_steps=3)
    method = build(PGDATRecipe(attack=attack))
    assert isinstance(method, Growing)
    assert [one.num_steps for one in method.attacks] == [3, 4, 5, 6, 7, 8, 9, 10]
    assert isinstance(build(PGDATRecipe()), PGDAT)
    assert not isinstance(build(CrossEntropyRecipe()), Growing)


def test_tensors_are_those_of_the_method():
    tensors = {"a": torch.ones(1)}
    method = Remembering(attack=FULL)
    object.__setattr__(method, "tensors", lambda: tensors)
    assert growing(method, first_num_steps=1, full_from=0.5).tensors() is tensors


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
    assert CIARDRecipe().attack.first_num_steps is None


def test_it_cannot_shrink():
    with pytest.raises(RecipeError, match="first_num_steps 11 is above num_steps 10"):
        recipe_of(first_num_steps=11)
