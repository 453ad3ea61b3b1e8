"""From the method table of a recipe to a method."""

from collections.abc import Sequence
from typing import Any

from compressor.attacks.build import build_inner_attack
from compressor.losses import cross_entropy, kl_to_probabilities
from compressor.method_recipes import BMTARDRecipe, CrossEntropyRecipe, MethodRecipe, PGDATRecipe
from compressor.methods.bmtard import BMTARD
from compressor.methods.cross_entropy import CrossEntropy
from compressor.methods.pgd_at import PGDAT
from compressor.methods.protocol import Method
from compressor.methods.trades import TRADES
from compressor.recipe import Role
from compressor.teachers import Teacher
from compressor.threat import ThreatModel

_PAPER_TEMPERATURE_RATE = 0.001
_PAPER_NUM_STEPS = 117_300
_MAX_TEMPERATURE_RATE = 0.05


def build_method(
    recipe: MethodRecipe, *, threat: ThreatModel, teachers: Sequence[Teacher], num_steps: int
) -> Method[Any]:
    """The method that `recipe` means, in a run of `num_steps` steps."""
    if isinstance(recipe, BMTARDRecipe):
        return BMTARD(
            clean_teacher=_teacher_of(teachers, "clean"),
            robust_teacher=_teacher_of(teachers, "robust"),
            attack=build_inner_attack(recipe.attack, threat=threat, objective=cross_entropy),
            loss_scale=recipe.loss_scale,
            temperature_rate=resolve_temperature_rate(recipe, num_steps=num_steps),
            temperature_bounds=(recipe.min_temperature, recipe.max_temperature),
            weight_rate=recipe.weight_rate,
        )
    if isinstance(recipe, CrossEntropyRecipe):
        return CrossEntropy()
    if isinstance(recipe, PGDATRecipe):
        attack = build_inner_attack(recipe.attack, threat=threat, objective=cross_entropy)
        return PGDAT(attack=attack)
    attack = build_inner_attack(recipe.attack, threat=threat, objective=kl_to_probabilities)
    return TRADES(attack=attack, beta=recipe.beta)


def resolve_temperature_rate(recipe: BMTARDRecipe, *, num_steps: int) -> float:
    """The step of the temperatures in a run of `num_steps` steps.

    The authors climb from 1 to 10 in 9,000 of 117,300 steps. A run with fewer steps takes
    larger ones, up to 0.05; one with more keeps theirs.
    """
    if recipe.temperature_rate != "scaled":
        return recipe.temperature_rate
    stretched = _PAPER_TEMPERATURE_RATE * _PAPER_NUM_STEPS / num_steps
    return min(max(stretched, _PAPER_TEMPERATURE_RATE), _MAX_TEMPERATURE_RATE)


def _teacher_of(teachers: Sequence[Teacher], role: Role) -> Teacher:
    (teacher,) = [t for t in teachers if t.role == role]
    return teacher
