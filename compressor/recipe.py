"""Recipe: everything that decides the result of a run, as a closed, frozen, typed table.

Read from TOML. Unknown keys are errors, all problems are reported at once, and the
resolved recipe is written into the run. What changes only the speed is in
`PerformanceSettings` and never part of `recipe_id`.
"""

import difflib
import hashlib
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from compressor.errors import RecipeError, UsageError
from compressor.threat import ThreatModel, parse_fraction


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


_T = TypeVar("_T")
_Tuple = Annotated[tuple[_T, ...], BeforeValidator(_as_tuple)]
_Fraction = Annotated[float, BeforeValidator(parse_fraction)]
_Pixels = Annotated[_Fraction, Field(gt=0, le=1)]
_UnitFraction = Annotated[_Fraction, Field(ge=0, le=1)]
_NonNegative = Annotated[float, Field(ge=0)]
_Positive = Annotated[float, Field(gt=0)]
_Count = Annotated[int, Field(ge=1)]

Role = Literal["clean", "robust"]


class ThreatRecipe(_Table):
    """What the attacker may do; pixel quantities are fractions such as `"8/255"`."""

    norm: Literal["linf"] = "linf"
    epsilon_pixels: _Pixels = 8 / 255

    def build(self) -> ThreatModel:
        """The value that attacks use."""
        return ThreatModel(norm=self.norm, epsilon_pixels=self.epsilon_pixels)


class DataRecipe(_Table):
    """Which images, and how they are augmented.

    `source` is `digits`, `imagefolder:PATH`, `cifar10:ROOT`, `cifar100:ROOT`,
    `fashion-mnist:ROOT` or `tiny-imagenet:ROOT`.
    """

    source: str
    validation_size: _Count
    """Training images held out for selection, the same number of each class up to one."""
    image_size: _Count | None = None
    """Resize the shorter side to this and crop the centre; without it all sizes must agree."""
    num_channels: Literal[1, 3] | None = None
    """Convert every image; without it all images must have the channels of the first."""
    crop_padding_pixels: Annotated[int, Field(ge=0)] = 4
    horizontal_flip: bool = True


class StudentRecipe(_Table):
    """The network to train."""

    architecture: str
    width: _Positive = 1.0
    """Factor on the number of channels."""
    mean: _Tuple[float] | None = None
    std: _Tuple[_Positive] | None = None


class TeacherRecipe(_Table):
    """A network to learn from: `source` is `ARCH:FILE`, `FILE.onnx` or a run folder."""

    role: Role
    source: str
    mean: _Tuple[float] | None = None
    """Per-channel mean that the teacher subtracts itself, for teachers trained that way."""
    std: _Tuple[_Positive] | None = None
    resize_to: _Count | None = None
    """Side length that the teacher was trained on, where it differs from the data."""
    sha256: str | None = None
    """Refuse any other file."""


class InnerAttackRecipe(_Table):
    """Projected gradient descent inside training."""

    num_steps: _Count = 10
    step_size_pixels: _Pixels | None = None
    """None: a quarter of epsilon, as 2/255 is of 8/255."""
    start: Literal["gaussian", "uniform", "zero"] = "gaussian"
    """`gaussian` has standard deviation 0.001; `uniform` fills the ball."""


class BMTARDRecipe(_Table):
    """Balanced multi-teacher adversarial distillation; defaults are the authors' settings."""

    name: Literal["bmtard"] = "bmtard"
    loss_scale: _Positive = 0.1
    """Factor on the batch-mean KL; 0.1 is the authors' element mean at ten classes."""
    temperature_rate: _NonNegative | Literal["scaled"] = "scaled"
    """Step of both temperatures. `scaled`: 0.001 x 117,300 / steps of this run, at most 0.05,
    so that the climb takes the same share of a short run as of the authors' 300 epochs."""
    min_temperature: _Positive = 1.0
    max_temperature: _Positive = 10.0
    weight_rate: _UnitFraction = 0.025
    attack: InnerAttackRecipe = InnerAttackRecipe()


class CrossEntropyRecipe(_Table):
    """Plain training on the labels: clean teachers, and the baseline without defence."""

    name: Literal["cross_entropy"] = "cross_entropy"


class PGDATRecipe(_Table):
    """Adversarial training on the labels (Madry et al. 2018)."""

    name: Literal["pgd_at"] = "pgd_at"
    attack: InnerAttackRecipe = InnerAttackRecipe(start="uniform")


class TRADESRecipe(_Table):
    """Adversarial training with a KL trade-off (Zhang et al. 2019)."""

    name: Literal["trades"] = "trades"
    beta: _NonNegative = 6.0
    attack: InnerAttackRecipe = InnerAttackRecipe()


MethodRecipe = Annotated[
    BMTARDRecipe | CrossEntropyRecipe | PGDATRecipe | TRADESRecipe, Field(discriminator="name")
]


class MilestonesRecipe(_Table):
    """Multiply the rates by `decay` at each fraction of the run; defaults: 215, 260, 285 of 300."""

    kind: Literal["milestones"] = "milestones"
    milestones: _Tuple[_UnitFraction] = (215 / 300, 260 / 300, 285 / 300)
    decay: Annotated[float, Field(gt=0, le=1)] = 0.1


class OneCycleRecipe(_Table):
    """Linear rise to the full rate, then cosine to zero (after Smith and Topin 2018)."""

    kind: Literal["one_cycle"] = "one_cycle"
    warmup_fraction: _UnitFraction = 0.3
    initial_factor: _UnitFraction = 0.04


class CosineRecipe(_Table):
    """Cosine from the full rate to zero (Loshchilov and Hutter 2017)."""

    kind: Literal["cosine"] = "cosine"


ScheduleRecipe = Annotated[
    MilestonesRecipe | OneCycleRecipe | CosineRecipe, Field(discriminator="kind")
]


class TrainingRecipe(_Table):
    """SGD and its schedule; defaults are the authors' settings."""

    epochs: _Count = 300
    batch_size: _Count = 128
    learning_rate: _Positive = 0.1
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = False
    weight_decay: _NonNegative = 2e-4
    schedule: ScheduleRecipe = MilestonesRecipe()
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Also keep an exponential moving average of the weights as a second candidate."""
    gradient_clip_norm: _Positive | None = None


class SelectionRecipe(_Table):
    """Choosing the best epoch on the held-out part of the training images, never on test."""

    every_epochs: _Count = 1
    from_fraction: _UnitFraction = 0.0
    """No validation before this fraction of the run; the last epoch always has one."""
    num_steps: _Count = 20
    """Steps of the PGD that measures robust validation accuracy (step 0.003 at 8/255)."""


class Recipe(_Table):
    """The whole experiment.

    How the result is verified is not in it: a recipe that chose its own examiners could print a
    number that flatters.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    threat: ThreatRecipe = ThreatRecipe()
    data: DataRecipe
    student: StudentRecipe
    teachers: _Tuple[TeacherRecipe] = ()
    method: MethodRecipe
    training: TrainingRecipe = TrainingRecipe()
    selection: SelectionRecipe = SelectionRecipe()

    @model_validator(mode="after")
    def _check_parts_fit(self) -> "Recipe":
        problems = [*_teacher_problems(self), *_attack_problems(self), *_schedule_problems(self)]
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


class PerformanceSettings(_Table):
    """What may change the speed of a run but not its meaning; recorded, not in `recipe_id`."""

    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:N`."""
    training_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """`auto`: bfloat16 autocast where the device multiplies matrices in it."""
    num_threads: _Count | None = None
    num_workers: _Count | None = None
    """Processes that decode images; None: all cores."""
    memory_budget_mib: _Count = 4096
    """Data sets larger than this, as uint8, are streamed from disk."""
    cache_images: bool = True
    log_every_steps: _Count = 10
    checkpoint_every_minutes: _Positive = 10.0
    keep_every_epochs: _Count | None = None
    """Keep the checkpoint of every such epoch, beside the best and the last two."""


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from TOML (or from the resolved JSON in a run) and apply `key=value` texts.

    Raises:
        RecipeError: with every problem found, each with its dotted key.
        UsageError: if an override is not `key=value`.
    """
    table = read_table(path)
    for override in overrides:
        apply_override(table, override)
    return parse_recipe(table, origin=str(path))


def parse_recipe(table: Mapping[str, Any], *, origin: str) -> Recipe:
    """A `Recipe` from plain tables; `origin` is named in the error.

    Raises:
        RecipeError: with every problem found, each with its dotted key.
    """
    try:
        return Recipe.model_validate(dict(table))
    except ValidationError as error:
        lines = [line for problem in error.errors() for line in _explain(problem)]
        count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
        raise RecipeError(
            f"{origin}: {count} in the recipe\n" + "\n".join(f"  {line}" for line in lines)
        ) from None


def read_table(path: Path) -> dict[str, Any]:
    """The tables of a TOML or JSON file.

    Raises:
        RecipeError: if the file is missing, unreadable, or not what its name says.
    """
    try:
        text = path.read_text(encoding="utf-8")
        table = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except FileNotFoundError:
        raise RecipeError(
            f"{path} does not exist. Recipes to start from: examples/recipes"
        ) from None
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{path} is not a text file in UTF-8; a recipe is a TOML file") from None
    except (tomllib.TOMLDecodeError, json.JSONDecodeError) as error:
        kind = path.suffix[1:].upper() or "TOML"
        raise RecipeError(f"{path} is not valid {kind}: {error}") from None
    if not isinstance(table, dict):
        raise RecipeError(f"{path} holds a {type(table).__name__}, not tables of settings")
    return table


def apply_override(table: dict[str, Any], override: str) -> None:
    """Set one dotted key, in place: `training.epochs=3`, `teachers.0.source=FILE`.

    The value is read as TOML, and taken as a string where it is not TOML.

    Raises:
        UsageError: if the text has no `=`, or the key does not lead to a setting.
    """
    dotted, equals, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        raise UsageError(f"--set {override!r} is not KEY=VALUE; for example training.epochs=3")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    place: Any = table
    for key in keys[:-1]:
        is_table = isinstance(place, dict)
        place = place.setdefault(key, {}) if is_table else _item(place, key, override)
    if isinstance(place, dict):
        place[keys[-1]] = value
    elif isinstance(place, list):
        _item(place, keys[-1], override)
        place[int(keys[-1])] = value
    else:
        raise UsageError(f"--set {override!r}: {'.'.join(keys[:-1])} holds {place!r}, not a table")


def resolved_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe with every default filled in, as plain JSON values."""
    return recipe.model_dump(mode="json")


def portable_dict(recipe: Recipe) -> dict[str, Any]:
    """`resolved_dict` without folders: `imagefolder:/a/b` becomes `imagefolder`.

    What is committed, published or hashed carries no path of the machine it was made on.
    """
    table = resolved_dict(recipe)
    table["data"]["source"] = recipe.data.source.partition(":")[0]
    for teacher in table["teachers"]:
        teacher["source"] = _kind_of_teacher(teacher["source"])
    return table


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


def _item(place: object, key: str, override: str) -> Any:  # noqa: ANN401 (parsed TOML)
    if isinstance(place, list) and key.isdigit() and int(key) < len(place):
        return place[int(key)]
    have = f"a list of {len(place)}" if isinstance(place, list) else repr(place)
    raise UsageError(f"--set {override!r}: there is no {key!r} in {have}")


def _teacher_problems(recipe: Recipe) -> list[str]:
    needed = {"clean": 1, "robust": 1} if recipe.method.name == "bmtard" else {}
    problems = []
    for role in ("clean", "robust"):
        count = sum(teacher.role == role for teacher in recipe.teachers)
        if count != needed.get(role, 0):
            problems.append(
                f"teachers: method {recipe.method.name!r} takes {needed.get(role, 0)} {role} "
                f"teacher, the recipe has {count}; give --{role}-teacher ARCH:FILE or a "
                "[[teachers]] table"
            )
    return problems if needed or recipe.teachers else []


def _attack_problems(recipe: Recipe) -> list[str]:
    attack = getattr(recipe.method, "attack", None)
    if not isinstance(attack, InnerAttackRecipe) or attack.step_size_pixels is None:
        return []
    reach, epsilon = attack.num_steps * attack.step_size_pixels, recipe.threat.epsilon_pixels
    if reach >= epsilon:
        return []
    return [
        f"method.attack: {attack.num_steps} steps of {attack.step_size_pixels:.4g} reach only "
        f"{reach:.4g} of epsilon {epsilon:.4g}; the student would train against a weaker "
        "attacker than the threat says"
    ]


def _schedule_problems(recipe: Recipe) -> list[str]:
    problems = []
    schedule = recipe.training.schedule
    if isinstance(schedule, MilestonesRecipe):
        if list(schedule.milestones) != sorted(set(schedule.milestones)):
            problems.append(f"training.schedule.milestones must rise: {list(schedule.milestones)}")
    method = recipe.method
    if isinstance(method, BMTARDRecipe) and method.min_temperature > method.max_temperature:
        problems.append(
            f"method.min_temperature {method.min_temperature} is above "
            f"method.max_temperature {method.max_temperature}"
        )
    if recipe.training.nesterov and recipe.training.momentum == 0:
        problems.append("training.nesterov needs training.momentum above 0")
    return problems


_WORDING = {
    "missing": "is missing",
    "bool_type": "must be true or false, without quotes",
    "int_type": "must be a whole number, without quotes",
    "float_type": "must be a number, without quotes",
    "string_type": 'must be a text in "quotes"',
    "tuple_type": "must be a list in [brackets]",
    "finite_number": "must be a finite number",
    "model_type": "must be a table of settings",
    "model_attributes_type": "must be a table of settings",
}


def _explain(problem: Mapping[str, Any]) -> list[str]:
    """One of pydantic's findings in our words; several lines for our own cross checks."""
    place = _without_union_tags([str(part) for part in problem["loc"]])
    dotted, kind, given = ".".join(place), problem["type"], problem["input"]
    if kind == "extra_forbidden":
        return [f"{dotted}: unknown key (got {given!r}){_suggestion(place)}"]
    if kind == "missing":
        return [f"{dotted}: is missing"]
    if kind == "value_error" and not place:
        return str(problem["ctx"]["error"]).splitlines()
    if kind == "value_error":
        return [f"{dotted}: {problem['ctx']['error']}"]
    if kind == "union_tag_not_found":
        return [f"{dotted}: needs the key {problem['ctx']['discriminator']} (got {given!r})"]
    if kind == "union_tag_invalid":
        context = problem["ctx"]
        return [f"{dotted}: {context['tag']!r} is not one of {context['expected_tags']}"]
    text = _WORDING.get(kind, problem["msg"].replace("Input should be", "must be"))
    hint = ""
    if "_pixels" in dotted and kind in {"less_than_equal", "greater_than"}:
        hint = '; pixels are in [0, 1], write eight grey levels as "8/255"'
    return [f"{dotted}: {text} (got {given!r}){hint}"]


def _without_union_tags(place: list[str]) -> list[str]:
    """Pydantic adds the chosen member of a union to the place: `method.bmtard.weight_rate`."""
    kept = place[:1]
    for before, part in zip(place, place[1:], strict=False):
        is_tag = before in {"method", "schedule"} or part == "literal['scaled']" or part == "float"
        kept += [] if is_tag else [part]
    return kept


def _suggestion(place: Sequence[str]) -> str:
    close = difflib.get_close_matches(place[-1], _all_keys(), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def _all_keys() -> list[str]:
    tables: list[type[BaseModel]] = [Recipe, ThreatRecipe, DataRecipe, StudentRecipe]
    tables += [TeacherRecipe, InnerAttackRecipe, BMTARDRecipe, TRADESRecipe, MilestonesRecipe]
    tables += [OneCycleRecipe, TrainingRecipe, SelectionRecipe]
    return sorted({key for table in tables for key in table.model_fields})
