"""Some clean and some robust teachers as one value: who counts how much, and under which name.

N examples, K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from compressor.attacks.protocol import Attack
from compressor.data import Batch
from compressor.logged_names import logged_name
from compressor.losses import guarded_kl, guarded_negative_entropy, temper
from compressor.methods.protocol import StepResult
from compressor.recipe import Role
from compressor.student import Student
from compressor.teacher import Teacher

_ROLES: tuple[Role, ...] = ("robust", "clean")
"""Robust ones first, as in the released scripts."""
WEIGHT = "weight_fraction"
"""The one quantity that copies share."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """A teacher, asked once however often it was named."""

    teacher: Teacher
    positions: tuple[int, ...]
    """Its places among the teachers of its role in the recipe, from 1; two where it was named
    twice."""


@dataclass(frozen=True, kw_only=True)
class TeacherTerms:
    """What each teacher has to say about one batch, in the order of the members."""

    losses: tuple[Tensor, ...]
    """Scaled mean of KL(teacher || student) on the images of its role, a scalar each."""
    negative_entropies: tuple[Tensor, ...]
    """Mean over the batch of the teacher's sum of p log(p + guard), a scalar each."""


@dataclass(frozen=True, kw_only=True)
class TeacherSet:
    """Distinct teachers: robust ones first, in each role in the order of their content.

    So neither the order in a recipe nor a teacher that is named twice can change a number, not
    even by rounding. Near copies, such as two checkpoints of one run, count as two teachers.
    """

    members: tuple[Member, ...]

    @classmethod
    def of(cls, teachers: Sequence[Teacher]) -> "TeacherSet":
        """From teachers in any order."""
        members: list[Member] = []
        for role in _ROLES:
            of_role = [teacher for teacher in teachers if teacher.role == role]
            names = [teacher.identity for teacher in of_role]
            for name in sorted(set(names)):
                places = tuple(place for place, found in enumerate(names, 1) if found == name)
                members.append(Member(teacher=of_role[places[0] - 1], positions=places))
        return cls(members=tuple(members))

    @property
    def shares(self) -> tuple[float, ...]:
        """What each member counts in its role: they sum to 1 in each role."""
        roles = [member.teacher.role for member in self.members]
        return tuple(1 / roles.count(role) for role in roles)

    @property
    def equal_weights(self) -> tuple[float, ...]:
        """Half for each role, the same for each member of it."""
        return tuple(share / 2 for share in self.shares)

    def terms(
        self,
        student: Student,
        batch: Batch,
        *,
        attack: Attack,
        temperatures: Sequence[float],
        loss_scale: float,
    ) -> TeacherTerms:
        """Attack, then robust teachers on adversarial images and clean ones on clean images.

        Args:
            student: in train mode.
            batch: clean images and labels.
            attack: on the student in eval mode.
            temperatures: of each member; of teachers only, and without a factor T squared.
            loss_scale: factor on the mean over the batch.
        """
        x, y = batch.x_NCHW, batch.y_N
        x_adv = attack(student.evaluation_view(), x, y, keys_N=batch.keys_N)
        images: dict[Role, Tensor] = {"robust": x_adv, "clean": x}
        # Two passes, the adversarial one first: the order decides the BatchNorm statistics.
        student_logits = {role: student.logits(images[role]) for role in _ROLES}
        losses, negative_entropies = [], []
        for member, temperature in zip(self.members, temperatures, strict=True):
            role = member.teacher.role
            p_NK = temper(member.teacher.logits(images[role]), temperature)
            losses.append(loss_scale * batch.mean(guarded_kl(p_NK, student_logits[role])))
            negative_entropies.append(batch.mean(guarded_negative_entropy(p_NK)))
        return TeacherTerms(losses=tuple(losses), negative_entropies=tuple(negative_entropies))

    def logged(self, quantity: str, values: Sequence[float]) -> dict[str, float]:
        """Values of the members by name, as `robust_loss_nats`.

        With several teachers of a role the name has the position: `robust_loss_2_nats`. Those that
        are copies of one another have the same values, and share a weight equally.

        Args:
            quantity: with its unit, as `loss_nats`.
            values: one of each member.
        """
        named = {}
        for role in _ROLES:
            of_role = [
                (position, value / len(member.positions) if quantity == WEIGHT else value)
                for member, value in zip(self.members, values, strict=True)
                if member.teacher.role == role
                for position in member.positions
            ]
            for position, value in sorted(of_role):
                place = position if len(of_role) > 1 else 0
                named[logged_name(role, quantity, position=place)] = value
        return named

    def weighed(
        self, terms: TeacherTerms, losses: Sequence[float], weights: Sequence[float]
    ) -> StepResult:
        """The weighted sum of the losses, and what is logged of it.

        Args:
            terms: of this batch.
            losses: the same losses as floats.
            weights: of each member.
        """
        products = [weight * loss for weight, loss in zip(weights, losses, strict=True)]
        logged = {
            "loss_nats": sum(products),
            **self.logged("loss_nats", losses),
            **self.logged(WEIGHT, weights),
        }
        return StepResult(loss=_weighted_total(weights, terms.losses), logged=logged)


def _weighted_total(weights: Sequence[float], losses: Sequence[Tensor]) -> Tensor:
    """Sum of weight x loss, in the order given: the order decides the rounding."""
    total = weights[0] * losses[0]
    for weight, loss in zip(weights[1:], losses[1:], strict=True):
        total = total + weight * loss
    return total
