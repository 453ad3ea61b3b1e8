"""What people write to ask for a comparison: a TOML file, or a recipe and the names of methods.

A comparison file::

    reference = "bmtard"            # the method that others are tested against; default: the first
    seeds = 3

    [base]
    recipe = "cifar10-small.toml"   # beside this file
    set = ["training.epochs=8"]

    [verification]                  # how many test images; the attacks are always the same
    samples = 2000
    cascade_samples = 300

    [[methods]]
    name = "bmtard"
    settings = { loss_scale = 1.0 } # keys of the method's own table

    [[methods]]
    name = "trades"
    label = "trades-3"
    seeds = 2                       # only the first two
    settings = { beta = 3.0 }
    training = { epochs = 12 }      # where a shorter run is to be compared; the result says so

Needs no torch.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from compressor.closed_table import ClosedTable, Count, TupleOf
from compressor.errors import RecipeError, UsageError
from compressor.recipe import Role
from compressor.recipe_file import read_table

LABEL = r"^[A-Za-z0-9][A-Za-z0-9._+-]*$"
_Place = Annotated[int, Field(ge=0, le=127)]
_Images = Annotated[int, Field(ge=0)]
_MAX_LETTERS = 60  # of a value in a message


class MethodEntry(ClosedTable):
    """One `[[methods]]` table."""

    name: str
    """Of the method, as in `method.name` of a recipe."""
    label: Annotated[str, Field(max_length=40, pattern=LABEL)] | None = None
    """What tables and folders call it; None: its name."""
    teachers: TupleOf[_Place | Role] | None = None
    """Which of the base's: places counted from 0, or a role for the next one of that role. None: as
    many of each role as the method takes, the first ones."""
    seeds: Count | None = None
    """Only the first so many; None: all."""
    settings: dict[str, Any] = {}
    """Keys of the method's own table."""
    training: dict[str, Any] = {}
    """Keys of the recipe's table `training` that differ from the base's. A result says so."""

    @property
    def shown_label(self) -> str:
        """What tables and folders call it."""
        return self.label or self.name


class BaseTable(ClosedTable):
    """The recipe that all methods share, but for its method."""

    recipe: str
    """Beside the comparison file."""
    set: TupleOf[str] = ()
    """`key=value`, as `--set` takes them."""


class VerificationTable(ClosedTable):
    """On how many test images; the choice of attacks is not here, as of no recipe."""

    clean_samples: Count | None = None
    """None: all test images."""
    samples: _Images = 2000
    """For PGD_sat, PGD_trades and CW_inf; 0: these are not run."""
    cascade_samples: _Images = 300
    """For the AutoAttack-style cascade; 0: it is not run."""


class ComparisonRequest(ClosedTable):
    """The whole file."""

    base: BaseTable
    methods: Annotated[TupleOf[MethodEntry], Field(min_length=1, max_length=40)]
    reference: str | None = None
    """A label; None: the first."""
    seeds: Annotated[int, Field(ge=1, le=100)] = 1
    """The seed of the base recipe, and those after it."""
    verification: VerificationTable = VerificationTable()


def read_request(path: Path, *, names: str | None) -> ComparisonRequest:
    """A comparison file, or a recipe with the names of methods.

    Args:
        path: a file of either kind; tables called `base` or `methods` make it a comparison.
        names: methods with commas between them; of a comparison file, the labels to keep.

    Raises:
        UsageError: if a recipe comes without names, or a label is not in the file.
        RecipeError: if the file cannot be read, or is no comparison.
    """
    table = read_table(path)
    wanted = None if names is None else _split_names(names)
    if not {"base", "methods"} & table.keys():
        if wanted is None:
            raise UsageError(
                f"{path} is a recipe: say which methods to compare, as in --methods bmtard,trades"
            )
        methods = [{"name": name} for name in wanted]
        return _parse({"base": {"recipe": str(path)}, "methods": methods}, origin="--methods")
    request = _parse(table, origin=str(path))
    recipe = str(path.parent / request.base.recipe)
    base = request.base.model_copy(update={"recipe": recipe})
    kept = request.methods if wanted is None else _kept(request, wanted)
    return request.model_copy(update={"base": base, "methods": kept})


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What the command line says; None: as the file does."""

    seeds: int | None = None
    reference: str | None = None
    clean_samples: int | None = None
    samples: int | None = None
    cascade_samples: int | None = None


def with_wishes(request: ComparisonRequest, wishes: Wishes) -> ComparisonRequest:
    """The request, where the command line does not say otherwise."""
    given = {name: value for name, value in asdict(wishes).items() if value is not None}
    own: dict[str, Any] = {key: given.pop(key) for key in ("seeds", "reference") if key in given}
    verification = request.verification.model_copy(update=given)
    return request.model_copy(update={**own, "verification": verification})


def _split_names(names: str) -> list[str]:
    found = [name.strip() for name in names.split(",") if name.strip()]
    if not found:
        raise UsageError("--methods names no method; for example --methods bmtard,trades")
    return found


def _kept(request: ComparisonRequest, wanted: list[str]) -> tuple[MethodEntry, ...]:
    known = {entry.shown_label: entry for entry in request.methods}
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise UsageError(
            f"--methods {','.join(unknown)}: the file has no such label; it has {', '.join(known)}"
        )
    return tuple(known[name] for name in wanted)


def _parse(table: dict[str, Any], *, origin: str) -> ComparisonRequest:
    try:
        return ComparisonRequest.model_validate(table)
    except ValidationError as error:
        lines = [f"  {_explain(problem)}" for problem in error.errors()]
    raise RecipeError(f"{origin} is no comparison:\n" + "\n".join(lines))


def _explain(problem: Any) -> str:  # noqa: ANN401 (one of pydantic's findings)
    place, given = ".".join(str(part) for part in problem["loc"]), repr(problem["input"])
    given = given if len(given) <= _MAX_LETTERS else f"{given[:_MAX_LETTERS]}..."
    kinds = {
        "missing": "is missing",
        "too_short": "must have at least one table",
        "extra_forbidden": f"unknown key (got {given})",
        "string_pattern_mismatch": (
            f"must be of letters a to z, digits, dots, dashes and underscores (got {given})"
        ),
    }
    text = problem["msg"].replace("Input should", "must")
    return f"{place}: {kinds.get(problem['type'], f'{text} (got {given})')}"
