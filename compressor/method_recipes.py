"""The method tables of recipes: what each method of distillation can be told.

Defaults are what the paper states; where its script differs by a slip, the field says so.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from compressor.closed_table import (
    Count,
    FractionText,
    NonNegative,
    Positive,
    TupleOf,
    UnitFraction,
)
from compressor.method_table import ONE, SOME, InnerAttackRecipe, MethodTable, TeacherNeed

PositiveShare = Annotated[FractionText, Field(gt=0, le=1)]


class BalancedRecipe(MethodTable):
    """The two balances of B-MTARD, which others have too; defaults are its authors' settings."""

    temperature_rate: NonNegative | Literal["scaled"] = "scaled"
    """Step of all temperatures. `scaled`: 0.001 x 117,300 / steps of this run, at most 0.05,
    so that the climb takes the same share of a short run as of the authors' 300 epochs."""
    min_temperature: Positive = 1.0
    max_temperature: Positive = 10.0
    weight_rate: UnitFraction = 0.025
    """Of normalization loss balance."""

    def problems(self) -> list[str]:
        """The bounds of the temperatures."""
        lowest, highest = self.min_temperature, self.max_temperature
        if lowest <= highest:
            return []
        return [f"method.min_temperature {lowest} is above method.max_temperature {highest}"]


class BMTARDRecipe(BalancedRecipe):
    """Balanced multi-teacher adversarial distillation; defaults are the authors' settings.

    The ablation of the paper: `temperature_rate = 0` is without entropy-based balance, all teachers
    stay at `min_temperature`; `weight_rate = 0` is without normalization loss balance, each role
    keeps half of the weight. Both at 0 are the baseline, neither at 0 is the method.
    """

    teachers: ClassVar[TeacherNeed] = TeacherNeed(clean=SOME, robust=SOME)
    name: Literal["bmtard"] = "bmtard"
    loss_scale: Positive = 0.1
    """Factor on the batch-mean KL; 0.1 is the authors' element mean at ten classes."""
    attack: InnerAttackRecipe = InnerAttackRecipe()


class RCAttackRecipe(InnerAttackRecipe):
    """The inner attack of `rc`: few long steps; without a size, three eighths of epsilon."""

    step_size_of_epsilon: ClassVar[float] = 3 / 8
    num_steps: Count = 4
    first_num_steps: Count | None = 2


class RCRecipe(BalancedRecipe):
    """B-MTARD against an attack that grows from two steps to four, in place of ten from the first.

    Ours. The loss and both balances are those of `bmtard`; what the attack no longer costs is for
    more epochs, of smaller batches, as in `examples/recipes/cifar10-rc.toml`.
    """

    teachers: ClassVar[TeacherNeed] = TeacherNeed(clean=SOME, robust=SOME)
    name: Literal["rc"] = "rc"
    loss_scale: Positive = 1.0
    """Factor on the batch-mean KL."""
    attack: RCAttackRecipe = RCAttackRecipe()


class CrossEntropyRecipe(MethodTable):
    """Plain training on the labels: clean teachers, and the baseline without defence."""

    name: Literal["cross_entropy"] = "cross_entropy"


class PGDATRecipe(MethodTable):
    """Adversarial training on the labels (Madry et al. 2018)."""

    name: Literal["pgd_at"] = "pgd_at"
    attack: InnerAttackRecipe = InnerAttackRecipe(start="uniform")


class TRADESRecipe(MethodTable):
    """Adversarial training with a KL trade-off (Zhang et al. 2019)."""

    name: Literal["trades"] = "trades"
    beta: NonNegative = 6.0
    attack: InnerAttackRecipe = InnerAttackRecipe()


class DARHTAttackRecipe(InnerAttackRecipe):
    """The inner attack of DARHT; as it is given, it raises the cross-entropy of the logits."""

    may_fall_short: bool = False
    """Let an attack through whose steps together do not reach epsilon. Released: 10 steps of
    0.003 at epsilon 0.031, so that at most 16 % of the pixels reach the border."""

    def problems(self, *, epsilon_pixels: float) -> list[str]:
        """As of any attack, where it is not meant to fall short."""
        return [] if self.may_fall_short else super().problems(epsilon_pixels=epsilon_pixels)


class DARHTRecipe(MethodTable):
    """Distillation from heterogeneous teachers through a student-teacher map.

    Where the released script and sense disagree, the default is sense, and the field says what
    is released. `examples/recipes/cifar100-darht.toml` lists all released values in one place.
    """

    teachers: ClassVar[TeacherNeed] = TeacherNeed(clean=range(65), robust=range(65), together=SOME)
    has_teacher_map: ClassVar[bool] = True
    name: Literal["darht"] = "darht"
    adversarial_share: UnitFraction = 0.5
    """Probability that a batch is attacked; else it is clean, and never both."""
    distil_from: UnitFraction = 50 / 350
    """Before this fraction of the run the student learns from labels alone."""
    labels_until: UnitFraction = 118 / 350
    """From this fraction of the run on it learns from teachers alone."""
    last_layer: Literal["labels", "frozen", "decaying"] = "labels"
    """Who moves the layer from map to logits once the teachers are alone, whose loss does not see
    it. `labels`: the cross-entropy, whose gradient ends there, so that the logits stay a reading
    of a map that goes on changing. `frozen`: no one, as the released script with PyTorch 2 and
    later. `decaying`: weight decay and momentum, as the script with earlier ones."""
    normalise_trust: bool = True
    """Weights of the teachers sum to one in every batch. Released: false; the script computes
    the normalised ones and does not use them, so that the strength of distillation falls with the
    quality of the teachers on the batch."""
    skip_above_nats: Positive | None = None
    """Take no step where the cross-entropy of a batch is above this. Released: 8.0."""
    teacher_mode: Literal["eval", "dropout", "train"] = "eval"
    """How teachers answer. `dropout`: their dropout draws, all else as in `eval` (Monte Carlo
    dropout of one sample). `train`: besides, BatchNorm takes the statistics of the batch and
    collects them; released, where nobody calls `eval`. Both need networks, not ONNX files."""
    attack: DARHTAttackRecipe = DARHTAttackRecipe()

    def problems(self) -> list[str]:
        """Phases that leave a part of the run, or the last layer, without a loss."""
        if self.distil_from > self.labels_until:
            return [
                f"method.distil_from {self.distil_from:.4g} is after method.labels_until "
                f"{self.labels_until:.4g}: nothing would be learnt between them; make "
                "labels_until the later one"
            ]
        if self.labels_until == 0 and self.last_layer != "labels":
            return [
                f"method.labels_until 0 and method.last_layer {self.last_layer!r} never train the "
                'last layer; raise labels_until, or set last_layer = "labels"'
            ]
        return []


class DistillationRecipe(MethodTable):
    """Knowledge distillation on clean images from one teacher of either role (Hinton et al.)."""

    teachers: ClassVar[TeacherNeed] = TeacherNeed(clean=range(2), robust=range(2), together=ONE)
    name: Literal["distillation"] = "distillation"
    temperature: Positive = 4.0
    """Of both sides; the divergence is multiplied by its square."""
    teacher_weight: PositiveShare = 0.9
    """The labels have the rest."""
    loss_scale: Positive = 1.0
    """Factor on the batch-mean KL."""


class ARDRecipe(MethodTable):
    """Adversarially robust distillation (Goldblum et al. 2020)."""

    teachers: ClassVar[TeacherNeed] = TeacherNeed(robust=ONE)
    name: Literal["ard"] = "ard"
    temperature: Positive = 30.0
    """Of both sides; the divergence is multiplied by its square. Later papers compare with 1."""
    teacher_weight: PositiveShare = 1.0
    """The labels of clean images have the rest."""
    loss_scale: Positive = 0.1
    """Factor on the batch-mean KL; 0.1 is the authors' element mean at ten classes."""
    attack: InnerAttackRecipe = InnerAttackRecipe(start="uniform")


TeacherTrust = Literal["weighted", "full"]
SelfTarget = Literal["live", "detached"]


class IADRecipe(MethodTable):
    """Introspective adversarial distillation, IAD-I (Zhu et al. 2022)."""

    teachers: ClassVar[TeacherNeed] = TeacherNeed(robust=ONE)
    name: Literal["iad"] = "iad"
    temperature: Positive = 1.0
    """Of teacher and student, not of the introspection."""
    teacher_weight: PositiveShare = 1.0
    """Of teacher and introspection; the labels of clean images have the rest."""
    loss_scale: Positive = 1.0
    """Factor on the batch-mean KL; the authors' script takes the batch mean."""
    begin_fraction: UnitFraction = 60 / 200
    """Share of the run that is ARD."""
    trust_exponent: NonNegative = 0.1
    """Trust is the teacher's probability of the label on the adversarial image, to this power."""
    teacher_trust: TeacherTrust = "weighted"
    """`weighted`: trust is a factor on the teacher's term, too; released in IAD-II. `full`: only
    its complement is one, on the introspection; released in IAD-I."""
    self_target: SelfTarget = "live"
    """Whether introspection also moves the clean answers; released: `live`."""
    attack: InnerAttackRecipe = InnerAttackRecipe(start="uniform")


class RSLADRecipe(MethodTable):
    """Robust soft label adversarial distillation (Zi et al. 2021)."""

    teachers: ClassVar[TeacherNeed] = TeacherNeed(robust=ONE)
    name: Literal["rslad"] = "rslad"
    robust_weight: PositiveShare = 5 / 6
    """Of adversarial images; clean ones have the rest."""
    loss_scale: Positive = 0.1
    """Factor on the batch-mean KL; 0.1 is the authors' element mean at ten classes."""
    attack: InnerAttackRecipe = InnerAttackRecipe()


class AdaADRecipe(MethodTable):
    """Adaptive adversarial distillation (Huang et al. 2023)."""

    teachers: ClassVar[TeacherNeed] = TeacherNeed(robust=ONE)
    needs_teacher_networks: ClassVar[bool] = True
    name: Literal["adaad"] = "adaad"
    robust_weight: PositiveShare = 1.0
    """Of adversarial images; clean ones have the rest."""
    loss_scale: Positive = 0.1
    """Factor on the batch-mean KL; 0.1 is the authors' element mean at ten classes. They take the
    batch mean, 1, on CIFAR-100."""
    attack: InnerAttackRecipe = InnerAttackRecipe()


class MTARDRecipe(MethodTable):
    """B-MTARD before its temperatures (Zhao et al. 2022); defaults are the authors' settings."""

    teachers: ClassVar[TeacherNeed] = TeacherNeed(clean=SOME, robust=SOME)
    name: Literal["mtard"] = "mtard"
    loss_scale: Positive = 0.1
    """Factor on the batch-mean KL; 0.1 is the authors' element mean at ten classes, and their ten
    times that at a hundred."""
    weight_rate: UnitFraction = 0.025
    relative_loss_exponent: NonNegative = 1.0
    """Above 1 the loss that fell less gets still more weight; at 0 the weights stay equal."""
    attack: InnerAttackRecipe = InnerAttackRecipe()


class CIARDRecipe(BalancedRecipe):
    """Two teachers, one of them retrained on the way (CIARD 2025).

    Where the released script slips, the default is sense, and the field says what is released.
    """

    teachers: ClassVar[TeacherNeed] = TeacherNeed(clean=ONE, robust=ONE)
    name: Literal["ciard"] = "ciard"
    loss_scale: Positive = 0.1
    """Factor on the batch-mean KL; 0.1 is the authors' element mean at ten classes."""
    balance_drops: TupleOf[UnitFraction] = (215 / 300, 260 / 300, 285 / 300)
    """Where the rates of both balances fall."""
    balance_drop_factor: UnitFraction = 0.1
    """Released: in effect 0 from 214/300 on; the script falls in every step of an epoch."""
    push_factor: NonNegative = 1.0
    """On the push away from the mistakes of the clean teacher; 0 is without it."""
    push_matches_decade: bool = True
    """Multiply the push by the power of ten that brings it to the decade of the smaller loss."""
    push_temperature: Positive = 5.0
    """Of the student in the push."""
    teacher_learning_rate: NonNegative = 1e-4
    """Of the copy of the robust teacher, at first; then a cosine to zero. 0 keeps the teacher."""
    teacher_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.1
    teacher_weight_decay: NonNegative = 2e-4
    teacher_from_fraction: UnitFraction = 50 / 300
    """The copy learns from here on."""
    teacher_statistics: Literal["kept", "batch"] = "kept"
    """BatchNorm of the copy: `kept` as the teacher came. `batch`: released, in train mode from
    the first step, so that its statistics drift even while it does not learn."""
    attack: InnerAttackRecipe = InnerAttackRecipe()


MethodRecipe = Annotated[
    AdaADRecipe
    | ARDRecipe
    | BMTARDRecipe
    | CIARDRecipe
    | CrossEntropyRecipe
    | DARHTRecipe
    | DistillationRecipe
    | IADRecipe
    | MTARDRecipe
    | PGDATRecipe
    | RCRecipe
    | RSLADRecipe
    | TRADESRecipe,
    Field(discriminator="name"),
]
