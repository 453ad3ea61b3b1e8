"""Recipes as people write them: TOML, `--set key=value`, and errors in our own words.

All problems of a recipe are reported at once, each with its dotted key.
"""

import difflib
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from compressor.errors import RecipeError, UsageError
from compressor.method_recipes import DARHTAttackRecipe, MethodRecipe
from compressor.method_table import InnerAttackRecipe
from compressor.recipe import (
    DataRecipe,
    MilestonesRecipe,
    OneCycleRecipe,
    Recipe,
    SelectionRecipe,
    StudentRecipe,
    TeacherRecipe,
    ThreatRecipe,
    TrainingRecipe,
)


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
        text = path.read_text(encoding="utf-8-sig")  # editors on Windows add a mark
        table = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except FileNotFoundError:
        raise RecipeError(
            f"{path} does not exist. Recipes to start from: examples/recipes"
        ) from None
    except IsADirectoryError:
        raise RecipeError(
            f"{path} is a folder, not a recipe; name a .toml file, or continue a run with --resume"
        ) from None
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{path} is not a text file in UTF-8; a recipe is a TOML file") from None
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits
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
    except (ValueError, RecursionError):
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


def _item(place: object, key: str, override: str) -> Any:  # noqa: ANN401 (parsed TOML)
    if isinstance(place, list) and key.isdecimal() and int(key) < len(place):
        return place[int(key)]
    have = f"a list of {len(place)}" if isinstance(place, list) else repr(place)
    raise UsageError(f"--set {override!r}: there is no {key!r} in {have}")


_WORDING = {
    "missing": "is missing",
    "string_pattern_mismatch": "must be of letters a to z, digits, dots, dashes and underscores",
    "string_too_long": "must have at most 100 letters",
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
    tables += [TeacherRecipe, InnerAttackRecipe, DARHTAttackRecipe, MilestonesRecipe]
    tables += [OneCycleRecipe, TrainingRecipe, SelectionRecipe]
    tables += get_args(get_args(MethodRecipe)[0])
    return sorted({key for table in tables for key in table.model_fields})
