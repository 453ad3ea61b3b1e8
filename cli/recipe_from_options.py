"""The few named options of `distill` and `teacher train` resolve into the recipe of the run."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressor.errors import RecipeError, UsageError
from compressor.recipe import Recipe
from compressor.recipe_file import apply_override, load_recipe, parse_recipe, read_table
from compressor.run_directory import RunDirectory

_DEFAULT_DATA: dict[str, dict[str, Any]] = {
    "digits": {"validation_size": 200, "crop_padding_pixels": 1, "horizontal_flip": False},
    "cifar10": {"validation_size": 5_000},
    "cifar100": {"validation_size": 5_000},
}
"""A mirrored digit is another sign."""


@dataclass(frozen=True, kw_only=True)
class NamedOptions:
    """What a recipe needs most often from the command line."""

    data: str | None = None
    clean_teachers: tuple[str, ...] = ()
    robust_teachers: tuple[str, ...] = ()
    student: str | None = None
    method: str | None = None
    """Taken where the recipe names none."""

    @property
    def given(self) -> list[str]:
        """The names of those that were given."""
        values = {
            "--data": self.data,
            "--clean-teacher": self.clean_teachers or None,
            "--robust-teacher": self.robust_teachers or None,
            "--student": self.student,
        }
        return [name for name, value in values.items() if value is not None]


def recipe_from_options(
    path: Path | None,
    named: NamedOptions,
    *,
    overrides: Sequence[str],
    out: Path | None,
    resume: bool,
) -> tuple[Recipe, Path | None]:
    """The recipe that a command line means, and the folder of its run.

    Raises:
        UsageError: if the options contradict each other or do not say enough.
        RecipeError: if the recipe that they add up to is malformed.
    """
    if resume and path is None:
        raise UsageError("--resume: name the run to continue, as in distill RUN --resume")
    if resume and path is not None and path.is_dir():
        changes = [*named.given, *(f"--set {o}" for o in overrides), *(["--out"] if out else [])]
        if changes:
            raise UsageError(
                f"a run is resumed with its own recipe; leave out {', '.join(changes)}"
            )
        return load_recipe(RunDirectory.open(path).resolved_recipe), path
    table = read_table(path) if path is not None else _default_table(named)
    _put_named(table, named)
    for override in overrides:
        apply_override(table, override)
    origin = str(path) if path is not None else "the options"
    return parse_recipe(table, origin=origin), out


def _default_table(named: NamedOptions) -> dict[str, Any]:
    missing = {"--data", "--clean-teacher", "--robust-teacher", "--student"} - set(named.given)
    if missing:
        raise UsageError(
            f"without a recipe, {', '.join(sorted(missing))} must be given too. Recipes to start "
            "from: examples/recipes"
        )
    kind = str(named.data).partition(":")[0]
    data = _DEFAULT_DATA.get(kind, {"validation_size": 1_000})
    return {"name": f"{kind}-bmtard", "data": dict(data), "method": {"name": "bmtard"}}


def _put_named(table: dict[str, Any], named: NamedOptions) -> None:
    if named.data is not None:
        _subtable(table, "data")["source"] = named.data
    if named.student is not None:
        _subtable(table, "student")["architecture"] = named.student
    if named.method is not None:
        _subtable(table, "method").setdefault("name", named.method)
    _put_teachers(table, "clean", named.clean_teachers)
    _put_teachers(table, "robust", named.robust_teachers)


def _put_teachers(table: dict[str, Any], role: str, sources: Sequence[str]) -> None:
    """Change the sources of the teachers of that role, in order, and add those that are missing."""
    if not sources:
        return
    teachers = table.setdefault("teachers", [])
    if not isinstance(teachers, list):
        raise RecipeError(f"teachers in the recipe is {teachers!r}, not a list of [[teachers]]")
    same = [t for t in teachers if isinstance(t, dict) and t.get("role") == role]
    if len(same) > len(sources):
        raise UsageError(
            f"the recipe has {len(same)} {role} teachers and --{role}-teacher names "
            f"{len(sources)}; give the option {len(same)} times, or use "
            "--set teachers.0.source=SPEC for one of them"
        )
    for place, source in enumerate(sources):
        if place < len(same):
            same[place]["source"] = source
        else:
            teachers.append({"role": role, "source": source})


def _subtable(table: dict[str, Any], name: str) -> dict[str, Any]:
    found = table.setdefault(name, {})
    if not isinstance(found, dict):
        raise RecipeError(f"{name} in the recipe is {found!r}, not a table")
    return found
