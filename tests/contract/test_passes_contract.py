"""Every method: which passes a step makes, in which order, and what they leave in BatchNorm.

In train mode every pass of the student moves the statistics of its BatchNorm, and the last one
moves them most. So the order is a part of a method, and an attack may not leave a mark.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from compressor.architectures.teacher_map import add_teacher_map
from compressor.data import Batch
from compressor.method_recipes import (
    AdaADRecipe,
    ARDRecipe,
    BMTARDRecipe,
    CIARDRecipe,
    CrossEntropyRecipe,
    DARHTAttackRecipe,
    DARHTRecipe,
    DistillationRecipe,
    IADRecipe,
    MethodRecipe,
    MTARDRecipe,
    PGDATRecipe,
    RCAttackRecipe,
    RCRecipe,
    RSLADRecipe,
    TRADESRecipe,
)
from compressor.method_table import InnerAttackRecipe
from compressor.methods.build import build_method
from compressor.methods.darht import DARHTState
from compressor.methods.protocol import Method, Moment
from compressor.networks import NetworkSpec, build_classifier
from compressor.performance import Performance
from compressor.student import Student
from compressor.teacher import Teacher
from compressor.threat import ThreatModel

ATTACK = InnerAttackRecipe(num_steps=2, step_size_pixels=4 / 255)
ADVERSARIAL_FIRST = ["attack", "adversarial", "clean"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A method, and what it asks of the student in a step in the middle of its run."""

    table: Any
    roles: tuple[str, ...] = ()
    events: list[str]
    state: Any = None
    """None for the initial one."""


CASES = {
    "adaad": Case(
        table=AdaADRecipe(attack=ATTACK), roles=("robust",), events=["attack", "adversarial"]
    ),
    "adaad with clean": Case(
        table=AdaADRecipe(attack=ATTACK, robust_weight=0.5),
        roles=("robust",),
        events=["attack", "clean", "adversarial"],
    ),
    "ard": Case(
        table=ARDRecipe(attack=ATTACK), roles=("robust",), events=["attack", "adversarial"]
    ),
    "ard with labels": Case(
        table=ARDRecipe(attack=ATTACK, teacher_weight=0.5),
        roles=("robust",),
        events=ADVERSARIAL_FIRST,
    ),
    "bmtard": Case(
        table=BMTARDRecipe(attack=ATTACK), roles=("clean", "robust"), events=ADVERSARIAL_FIRST
    ),
    "ciard": Case(
        table=CIARDRecipe(attack=ATTACK),
        roles=("clean", "robust"),
        events=["clean", "attack", "adversarial"],
    ),
    "ciard as released": Case(
        table=CIARDRecipe(attack=ATTACK, teacher_statistics="batch"),
        roles=("clean", "robust"),
        events=["clean", "attack", "adversarial"],
    ),
    "cross_entropy": Case(table=CrossEntropyRecipe(), events=["clean"]),
    "darht, attacked": Case(
        table=DARHTRecipe(attack=DARHTAttackRecipe(num_steps=2)),
        roles=("robust", "clean"),
        state=DARHTState(draw=0.0),
        events=["attack", "adversarial"],
    ),
    "darht, clean": Case(
        table=DARHTRecipe(attack=DARHTAttackRecipe(num_steps=2)),
        roles=("robust", "clean"),
        state=DARHTState(draw=0.9),
        events=["clean"],
    ),
    "distillation": Case(table=DistillationRecipe(), roles=("clean",), events=["clean"]),
    "iad": Case(table=IADRecipe(attack=ATTACK), roles=("robust",), events=ADVERSARIAL_FIRST),
    "mtard": Case(
        table=MTARDRecipe(attack=ATTACK), roles=("clean", "robust"), events=ADVERSARIAL_FIRST
    ),
    "pgd_at": Case(table=PGDATRecipe(attack=ATTACK), events=["attack", "adversarial"]),
    "rc": Case(
        table=RCRecipe(attack=RCAttackRecipe(num_steps=2, first_num_steps=None)),
        roles=("clean", "robust"),
        events=ADVERSARIAL_FIRST,
    ),
    "rslad": Case(table=RSLADRecipe(attack=ATTACK), roles=("robust",), events=ADVERSARIAL_FIRST),
    "trades": Case(table=TRADESRecipe(attack=ATTACK), events=["attack", "clean", "adversarial"]),
}
MIDDLE = Moment(fraction=0.5)
SPEC = NetworkSpec(architecture="tiny", num_classes=10, image_shape=(1, 8, 8))

every_method = pytest.mark.parametrize("name", CASES)


def make_student(case):
    network = build_classifier(SPEC, seed=0)
    if case.table.name == "darht":
        add_teacher_map(network, num_classes=10, num_teachers=len(case.roles), seed=0)
    return Student(network, Performance(device=torch.device("cpu")))


def make_method(case):
    facts = {"spec": SPEC, "num_parameters": 1, "num_classes": 10, "sha256": "", "num_bytes": 0}
    teachers = []
    for seed, role in enumerate(case.roles, 1):
        network = build_classifier(SPEC, seed=seed)
        teachers.append(Teacher(name="t", role=role, answer=network, network=network, **facts))
    threat = ThreatModel(epsilon_pixels=8 / 255)
    return build_method(case.table, threat=threat, teachers=teachers, num_steps=10)


def make_batch():
    x = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(8)
    return Batch(x_NCHW=x, y_N=ids, index_N=ids, keys_N=ids)


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What happened in a step."""

    events: list[str] = field(default_factory=list)
    images: list[Tensor] = field(default_factory=list)
    """Of each pass of the student."""
    statistics: list[Mapping[str, Tensor]] = field(default_factory=list)
    """Of the student before and after the attack."""
    answers: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Of the attacked model to the first image: among the others, and alone."""


def statistics_of(student):
    return {name: value.clone() for name, value in student.network.named_buffers()}


def watch_step(case, student) -> Seen:
    """A step whose attack and whose passes of the student are seen."""
    method: Method[Any] = make_method(case)
    batch, seen = make_batch(), Seen()

    def note_pass(module, arguments):
        assert module.training
        (x_NCHW,) = arguments
        seen.events.append("clean" if torch.equal(x_NCHW, batch.x_NCHW) else "adversarial")
        seen.images.append(x_NCHW.detach().clone())

    if hasattr(method, "attack"):
        given = method.attack

        def attack(model, x_NCHW, targets, *, keys_N):
            seen.events.append("attack")
            seen.statistics.append(statistics_of(student))
            with torch.no_grad():
                seen.answers.append((model(x_NCHW)[:1], model(x_NCHW[:1])))
            x_adv = given(model, x_NCHW, targets, keys_N=keys_N)
            seen.statistics.append(statistics_of(student))
            return x_adv

        object.__setattr__(method, "attack", attack)
    hook = student.network.register_forward_pre_hook(note_pass)
    method.step(student, batch, case.state or method.initial_state(), MIDDLE)
    hook.remove()
    return seen


def test_no_method_is_forgotten():
    union, _ = get_args(MethodRecipe)
    assert {type(case.table) for case in CASES.values()} == set(get_args(union))


@every_method
def test_passes_and_their_order(name):
    assert watch_step(CASES[name], make_student(CASES[name])).events == CASES[name].events


@every_method
def test_batch_norm_holds_what_the_passes_left_and_nothing_else(name):
    """A second student that only makes the same passes ends with the same statistics."""
    student, other = make_student(CASES[name]), make_student(CASES[name])
    seen = watch_step(CASES[name], student)
    for x_NCHW in seen.images:
        other.logits(x_NCHW)
    expected = statistics_of(other)
    assert expected
    for buffer, value in statistics_of(student).items():
        assert torch.equal(value, expected[buffer]), buffer


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "attack" in case.events])
def test_the_attack_meets_the_student_in_eval_mode(name):
    """So it changes no statistics, and no image's answer depends on the others."""
    seen = watch_step(CASES[name], make_student(CASES[name]))
    before, after = seen.statistics
    assert all(torch.equal(value, before[buffer]) for buffer, value in after.items())
    ((among_others, alone),) = seen.answers
    assert_close(among_others, alone, rtol=1e-4, atol=1e-5)
