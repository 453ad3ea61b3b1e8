"""From the method table of a recipe to a method."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import Tensor

from compressor.attacks.build import build_inner_attack
from compressor.losses import cross_entropy, kl_to_probabilities
from compressor.method_recipes import (
    AdaADRecipe,
    ARDRecipe,
    BalancedRecipe,
    BMTARDRecipe,
    CIARDRecipe,
    CrossEntropyRecipe,
    DARHTRecipe,
    DistillationRecipe,
    IADRecipe,
    MethodRecipe,
    MTARDRecipe,
    PGDATRecipe,
    RCRecipe,
    RSLADRecipe,
)
from compressor.methods.adaad import AdaAD, disagreement
from compressor.methods.ard import ARD
from compressor.methods.bmtard import BMTARD
from compressor.methods.ciard import CIARD, Drops, Push, Retraining
from compressor.methods.cross_entropy import CrossEntropy
from compressor.methods.darht import DARHT
from compressor.methods.distillation import Distillation
from compressor.methods.growing import Attacking, growing
from compressor.methods.iad import IAD
from compressor.methods.mtard import MTARD
from compressor.methods.pgd_at import PGDAT
from compressor.methods.protocol import Method
from compressor.methods.rslad import RSLAD
from compressor.methods.teacher_copy import TeacherCopy
from compressor.methods.teacher_modes import Answering, collected_statistics, drawing_teachers
from compressor.methods.teacher_set import TeacherSet
from compressor.methods.trades import TRADES
from compressor.recipe import Role
from compressor.teacher import Teacher
from compressor.threat import ThreatModel

_PAPER_TEMPERATURE_RATE = 0.001
_PAPER_NUM_STEPS = 117_300
_MAX_TEMPERATURE_RATE = 0.05


def build_method(
    recipe: MethodRecipe, *, threat: ThreatModel, teachers: Sequence[Teacher], num_steps: int
) -> Method[Any]:
    """The method that `recipe` means, in a run of `num_steps` steps.

    Raises:
        TeacherError: if a teacher only answers, and the method needs its gradients.
    """
    _refuse_mere_answers(recipe, teachers)
    method = _build(recipe, threat=threat, teachers=teachers, num_steps=num_steps)
    attack = getattr(recipe, "attack", None)
    if attack is None or not attack.changes:
        return method
    return growing(
        cast("Attacking", method),
        begins_at=attack.begins_at,
        first_num_steps=attack.first_num_steps or attack.num_steps,
        full_from=attack.full_from,
    )


def _build(
    recipe: MethodRecipe, *, threat: ThreatModel, teachers: Sequence[Teacher], num_steps: int
) -> Method[Any]:
    if isinstance(recipe, _OneTeacherRecipe):
        return _build_with_one_teacher(recipe, threat=threat, teachers=teachers)
    if isinstance(recipe, BMTARDRecipe | RCRecipe):
        return BMTARD(
            teachers=TeacherSet.of(teachers),
            attack=build_inner_attack(recipe.attack, threat=threat, objective=cross_entropy),
            loss_scale=recipe.loss_scale,
            temperature_rate=resolve_temperature_rate(recipe, num_steps=num_steps),
            temperature_bounds=(recipe.min_temperature, recipe.max_temperature),
            weight_rate=recipe.weight_rate,
        )
    if isinstance(recipe, MTARDRecipe):
        return MTARD(
            teachers=TeacherSet.of(teachers),
            attack=build_inner_attack(recipe.attack, threat=threat, objective=cross_entropy),
            loss_scale=recipe.loss_scale,
            weight_rate=recipe.weight_rate,
            relative_loss_exponent=recipe.relative_loss_exponent,
        )
    if isinstance(recipe, CIARDRecipe):
        return _ciard(recipe, threat=threat, teachers=teachers, num_steps=num_steps)
    if isinstance(recipe, DARHTRecipe):
        return _darht(recipe, threat=threat, teachers=teachers)
    if isinstance(recipe, CrossEntropyRecipe):
        return CrossEntropy()
    if isinstance(recipe, PGDATRecipe):
        attack = build_inner_attack(recipe.attack, threat=threat, objective=cross_entropy)
        return PGDAT(attack=attack)
    attack = build_inner_attack(recipe.attack, threat=threat, objective=kl_to_probabilities)
    return TRADES(attack=attack, beta=recipe.beta)


_OneTeacherRecipe = AdaADRecipe | ARDRecipe | DistillationRecipe | IADRecipe | RSLADRecipe


def _build_with_one_teacher(
    recipe: _OneTeacherRecipe, *, threat: ThreatModel, teachers: Sequence[Teacher]
) -> Method[Any]:
    (teacher,) = teachers
    if isinstance(recipe, DistillationRecipe):
        return Distillation(
            teacher=teacher,
            temperature=recipe.temperature,
            teacher_weight=recipe.teacher_weight,
            loss_scale=recipe.loss_scale,
        )
    if isinstance(recipe, ARDRecipe):
        return ARD(
            robust_teacher=teacher,
            attack=build_inner_attack(recipe.attack, threat=threat, objective=cross_entropy),
            temperature=recipe.temperature,
            teacher_weight=recipe.teacher_weight,
            loss_scale=recipe.loss_scale,
        )
    if isinstance(recipe, IADRecipe):
        return IAD(
            robust_teacher=teacher,
            attack=build_inner_attack(recipe.attack, threat=threat, objective=cross_entropy),
            temperature=recipe.temperature,
            teacher_weight=recipe.teacher_weight,
            loss_scale=recipe.loss_scale,
            begin_fraction=recipe.begin_fraction,
            trust_exponent=recipe.trust_exponent,
            teacher_trust=recipe.teacher_trust,
            self_target=recipe.self_target,
        )
    if isinstance(recipe, RSLADRecipe):
        return RSLAD(
            robust_teacher=teacher,
            attack=build_inner_attack(recipe.attack, threat=threat, objective=kl_to_probabilities),
            robust_weight=recipe.robust_weight,
            loss_scale=recipe.loss_scale,
        )
    return AdaAD(
        robust_teacher=teacher,
        attack=build_inner_attack(recipe.attack, threat=threat, objective=disagreement),
        robust_weight=recipe.robust_weight,
        loss_scale=recipe.loss_scale,
    )


def _refuse_mere_answers(recipe: MethodRecipe, teachers: Sequence[Teacher]) -> None:
    if recipe.needs_teacher_networks:
        for teacher in teachers:
            teacher.require_network(f"method {recipe.name!r} takes gradients through it")


def resolve_temperature_rate(recipe: BalancedRecipe, *, num_steps: int) -> float:
    """The step of the temperatures in a run of `num_steps` steps.

    The authors climb from 1 to 10 in 9,000 of 117,300 steps. A run with fewer steps takes
    larger ones, up to 0.05; one with more keeps theirs.
    """
    if recipe.temperature_rate != "scaled":
        return recipe.temperature_rate
    stretched = _PAPER_TEMPERATURE_RATE * _PAPER_NUM_STEPS / num_steps
    return min(max(stretched, _PAPER_TEMPERATURE_RATE), _MAX_TEMPERATURE_RATE)


def _ciard(
    recipe: CIARDRecipe, *, threat: ThreatModel, teachers: Sequence[Teacher], num_steps: int
) -> CIARD:
    robust_teacher = _teacher_of(teachers, "robust")
    return CIARD(
        clean_teacher=_teacher_of(teachers, "clean"),
        robust_teacher=robust_teacher,
        copy=TeacherCopy(
            robust_teacher,
            statistics=recipe.teacher_statistics,
            purpose="method 'ciard' retrains a copy of it",
        ),
        attack=build_inner_attack(recipe.attack, threat=threat, objective=cross_entropy),
        loss_scale=recipe.loss_scale,
        temperature_rate=resolve_temperature_rate(recipe, num_steps=num_steps),
        temperature_bounds=(recipe.min_temperature, recipe.max_temperature),
        weight_rate=recipe.weight_rate,
        balance_drops=Drops(at_fractions=recipe.balance_drops, factor=recipe.balance_drop_factor),
        push=Push(
            temperature=recipe.push_temperature,
            factor=recipe.push_factor,
            matches_decade=recipe.push_matches_decade,
        ),
        retraining=Retraining(
            learning_rate=recipe.teacher_learning_rate,
            momentum=recipe.teacher_momentum,
            weight_decay=recipe.teacher_weight_decay,
            from_fraction=recipe.teacher_from_fraction,
        ),
    )


def _darht(recipe: DARHTRecipe, *, threat: ThreatModel, teachers: Sequence[Teacher]) -> DARHT:
    answering: Sequence[Answering] = teachers
    statistics: Mapping[str, Tensor] = {}
    if recipe.teacher_mode != "eval":
        answering = copies = drawing_teachers(teachers, mode=recipe.teacher_mode)
        statistics = collected_statistics(copies) if recipe.teacher_mode == "train" else {}
    return DARHT(
        teachers=answering,
        attack=build_inner_attack(recipe.attack, threat=threat, objective=cross_entropy),
        adversarial_share=recipe.adversarial_share,
        distil_from=recipe.distil_from,
        labels_until=recipe.labels_until,
        last_layer=recipe.last_layer,
        normalise_trust=recipe.normalise_trust,
        skip_above_nats=recipe.skip_above_nats,
        has_drawing_teachers=recipe.teacher_mode != "eval",
        statistics=statistics,
    )


def _teacher_of(teachers: Sequence[Teacher], role: Role) -> Teacher:
    (teacher,) = [t for t in teachers if t.role == role]
    return teacher
