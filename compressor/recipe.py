"""Recipe: everything that decides the result of a run, as a closed, frozen, typed table.

Unknown keys are errors. What changes only the speed is in `PerformanceSettings` and never part
of `recipe_id`. `recipe_file.py` reads recipes and explains what is wrong with one.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    model_validator,
)

from compressor.closed_table import (
    ClosedTable,
    Count,
    NonNegative,
    Pixels,
    Positive,
    Side,
    TupleOf,
    UnitFraction,
)
from compressor.method_recipes import MethodRecipe
from compressor.method_table import InnerAttackRecipe
from compressor.threat import ThreatModel

Role = Literal["clean", "robust"]


class ThreatRecipe(ClosedTable):
    """What the attacker may do; pixel quantities are fractions such as `"8/255"`."""

    norm: Literal["linf"] = "linf"
    epsilon_pixels: Pixels = 8 / 255

    def build(self) -> ThreatModel:
        """The value that attacks use."""
        return ThreatModel(norm=self.norm, epsilon_pixels=self.epsilon_pixels)


class DataRecipe(ClosedTable):
    """Which images, and how they are augmented.

    `source` is `digits`, `imagefolder:PATH`, `cifar10:ROOT`, `cifar100:ROOT`,
    `fashion-mnist:ROOT` or `tiny-imagenet:ROOT`.
    """

    source: str
    validation_size: Count
    """Training images held out for selection, the same number of each class up to one."""
    split_seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    """Decides which those are; None: the seed of the run. Runs that are compared on images that
    none of them was trained on need one split for all of their seeds."""
    training_size: Count | None = None
    """Train on so many of the others, the same number of each class up to one; None: on all."""
    image_size: Side | None = None
    """Resize the shorter side to this and crop the centre; without it all sizes must agree."""
    num_channels: Literal[1, 3] | None = None
    """Convert every image; without it all images must have the channels of the first."""
    crop_padding_pixels: Annotated[int, Field(ge=0, le=4096)] = 4
    """Pad with this much black on each side, then cut out the original size at random."""
    horizontal_flip: bool = True
    min_crop_area: Annotated[float, Field(gt=0, lt=1)] | None = None
    """In place of that, as is usual for ImageNet: cut out a part of at least this fraction of the
    image at random, and enlarge it to the original size; needs `crop_padding_pixels = 0`."""

    def split_seed_in_run(self, seed: int) -> int:
        """The seed that decides which images are held out in a run of that seed."""
        return seed if self.split_seed is None else self.split_seed


class StudentRecipe(ClosedTable):
    """The network to train."""

    architecture: str
    width: Annotated[float, Field(gt=0, le=100)] = 1.0
    """Factor on the number of channels."""
    mean: TupleOf[float] | None = None
    std: TupleOf[Positive] | None = None


class TeacherRecipe(ClosedTable):
    """A network to learn from: `source` is `ARCH:FILE`, `FILE.onnx` or a run folder."""

    role: Role
    source: str
    mean: TupleOf[float] | None = None
    """Per-channel mean that the teacher subtracts itself, for teachers trained that way."""
    std: TupleOf[Positive] | None = None
    resize_to: Side | None = None
    """Side length that the teacher was trained on, where it differs from the data."""
    sha256: str | None = None
    """Refuse any other file."""


class MilestonesRecipe(ClosedTable):
    """Multiply the rates by `decay` at each fraction of the run; defaults: 215, 260, 285 of 300."""

    kind: Literal["milestones"] = "milestones"
    milestones: TupleOf[UnitFraction] = (215 / 300, 260 / 300, 285 / 300)
    decay: Annotated[float, Field(gt=0, le=1)] = 0.1
    idle_fraction: UnitFraction = 0.0
    """The rates are zero before this fraction of the run. The script of DARHT: 3/350, by a warm-up
    that is never stepped; BatchNorm and momentum alone move then."""


class OneCycleRecipe(ClosedTable):
    """Linear rise to the full rate, then cosine to zero (after Smith and Topin 2018)."""

    kind: Literal["one_cycle"] = "one_cycle"
    warmup_fraction: UnitFraction = 0.3
    initial_factor: UnitFraction = 0.04


class CosineRecipe(ClosedTable):
    """Cosine from the full rate to zero (Loshchilov and Hutter 2017)."""

    kind: Literal["cosine"] = "cosine"


ScheduleRecipe = Annotated[
    MilestonesRecipe | OneCycleRecipe | CosineRecipe, Field(discriminator="kind")
]


class TrainingRecipe(ClosedTable):
    """SGD and its schedule; defaults are the authors' settings."""

    epochs: Count = 300
    batch_size: Annotated[int, Field(ge=2)] = 128
    """BatchNorm cannot train on one image."""
    accumulate_batches: Count = 1
    """Add up the gradients of so many batches for one change of the weights, where a larger batch
    does not fit into memory. BatchNorm and the balances of a method see single batches."""
    learning_rate: Positive = 0.1
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = False
    weight_decay: NonNegative = 2e-4
    schedule: ScheduleRecipe = MilestonesRecipe()
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Also keep an exponential moving average of the weights as a second candidate. After n changes
    of them the factor is (1 + n) / (10 + n), if that is less: a short run forgets its start."""
    gradient_clip_norm: Positive | None = None
    batch_norm: Literal["whole_batch", "own_images"] = "whole_batch"
    """Where several processes share a batch, what BatchNorm normalises by. With `own_images` each
    takes those that it has, as many scripts do, and the number of processes is a part of what is
    learnt."""


class SelectionRecipe(ClosedTable):
    """Choosing the best epoch on the held-out part of the training images, never on test."""

    every_epochs: Count = 1
    from_fraction: UnitFraction = 0.0
    """No validation before this fraction of the run; the last epoch always has one."""
    num_steps: Count = 20
    """Steps of the PGD that measures robust validation accuracy: 20 of 0.003 at 8/255, or fewer
    and longer ones that reach as far."""


class Recipe(ClosedTable):
    """The whole experiment.

    How the result is verified is not in it: a recipe that chose its own examiners could print a
    number that flatters.
    """

    name: Annotated[str, Field(max_length=100, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    threat: ThreatRecipe = ThreatRecipe()
    data: DataRecipe
    student: StudentRecipe
    teachers: TupleOf[TeacherRecipe] = ()
    method: MethodRecipe
    training: TrainingRecipe = TrainingRecipe()
    selection: SelectionRecipe = SelectionRecipe()

    @model_validator(mode="after")
    def _check_parts_fit(self) -> "Recipe":
        problems = [
            *_teacher_problems(self),
            *_attack_problems(self),
            *_data_problems(self.data),
            *self.method.problems(),
            *_training_problems(self),
        ]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def recipe_id(self) -> str:
        """SHA-256 of the resolved recipe without the places where its files lie.

        Files are identified by their content in the run, so one experiment has one
        identity on every machine.
        """
        return hashlib.sha256(canonical_json(portable_dict(self)).encode()).hexdigest()


def resolved_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe with every default filled in, as plain JSON values."""
    return recipe.model_dump(mode="json")


def portable_dict(recipe: Recipe) -> dict[str, Any]:
    """`resolved_dict` without folders: `imagefolder:/a/b` becomes `imagefolder`.

    What is committed, published or hashed carries no path of the machine it was made on.
    """
    table = resolved_dict(recipe)
    _drop_later_settings(table)
    table["data"]["source"] = recipe.data.source.partition(":")[0]
    for teacher in table["teachers"]:
        teacher["source"] = _kind_of_teacher(teacher["source"])
    return table


_LATER_SETTINGS: Mapping[str, object] = MappingProxyType(
    {
        "data.split_seed": None,
        "data.training_size": None,
        "data.min_crop_area": None,
        "training.accumulate_batches": 1,
        "training.batch_norm": "whole_batch",
        "training.schedule.idle_fraction": 0.0,
        "method.attack.begins_at": 0.0,
        "method.attack.first_num_steps": None,
    }
)
"""What recipes did not have at first, with what they did then: such recipes keep their identity."""


def _drop_later_settings(table: dict[str, Any]) -> None:
    """In place, where they change nothing."""
    for name, usual in _LATER_SETTINGS.items():
        *path, key = name.split(".")
        place: Any = table
        for part in path:
            place = place.get(part) or {}
        if key in place and place[key] == usual:
            del place[key]
    attack = table["method"].get("attack") or {}
    if "first_num_steps" not in attack:
        attack.pop("full_from", None)


def _kind_of_teacher(source: str) -> str:
    """The architecture of `ARCH:FILE`; else `onnx`, `safetensors` or `run`."""
    kind, colon, rest = source.partition(":")
    if colon and "/" not in kind:
        return f"{kind}:{rest.partition(':')[0]}" if kind == "torchvision" else kind
    suffix = Path(source).suffix.lstrip(".")
    return suffix if suffix in {"onnx", "safetensors"} else "run"


def canonical_json(value: object) -> str:
    """JSON with one spelling for one value, to be hashed."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _teacher_problems(recipe: Recipe) -> list[str]:
    roles = [teacher.role for teacher in recipe.teachers]
    problems = recipe.method.teachers.problems(
        num_clean=roles.count("clean"), num_robust=roles.count("robust")
    )
    return [f"teachers: method {recipe.method.name!r} {problem}" for problem in problems]


def _attack_problems(recipe: Recipe) -> list[str]:
    attack = getattr(recipe.method, "attack", None)
    if not isinstance(attack, InnerAttackRecipe):
        return []
    return attack.problems(epsilon_pixels=recipe.threat.epsilon_pixels)


def _data_problems(data: DataRecipe) -> list[str]:
    if data.min_crop_area is None or data.crop_padding_pixels == 0:
        return []
    return [
        f"data.min_crop_area = {data.min_crop_area:g} crops in place of padding; set "
        f"data.crop_padding_pixels to 0 (it is {data.crop_padding_pixels})"
    ]


def _training_problems(recipe: Recipe) -> list[str]:
    problems = []
    schedule = recipe.training.schedule
    if isinstance(schedule, MilestonesRecipe):
        if list(schedule.milestones) != sorted(set(schedule.milestones)):
            problems.append(f"training.schedule.milestones must rise: {list(schedule.milestones)}")
    if recipe.training.nesterov and recipe.training.momentum == 0:
        problems.append("training.nesterov needs training.momentum above 0")
    return problems
