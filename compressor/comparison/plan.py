"""ComparisonPlan: which runs a comparison is made of, with one recipe each. Needs no torch."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from compressor.comparison.dotted import assignments
from compressor.comparison.notes import notes_on
from compressor.comparison.planned import PlannedMethod, PlannedRun
from compressor.comparison.request import ComparisonRequest, MethodEntry, VerificationTable
from compressor.errors import RecipeError, UsageError
from compressor.method_recipes import MethodRecipe
from compressor.method_table import MethodTable
from compressor.recipe import TeacherRecipe
from compressor.recipe_file import apply_override, parse_recipe, read_table

_BUDGET = ("num_steps", "step_size_pixels")


@dataclass(frozen=True, kw_only=True)
class ComparisonPlan:
    """Everything that will be run."""

    base_name: str
    methods: tuple[PlannedMethod, ...]
    reference: str
    """A label."""
    verification: VerificationTable
    notes: tuple[str, ...]
    """What a reader of the result must know, such as unequal attack budgets."""

    @property
    def runs(self) -> tuple[PlannedRun, ...]:
        """The first seed of every method before the second of any: all are comparable early."""
        num_seeds = max(len(method.recipes) for method in self.methods)
        return tuple(
            PlannedRun(label=method.label, recipe=method.recipes[place])
            for place in range(num_seeds)
            for method in self.methods
            if place < len(method.recipes)
        )


def make_plan(request: ComparisonRequest, *, overrides: Sequence[str] = ()) -> ComparisonPlan:
    """Every run that is asked for, or every reason why it cannot be.

    Raises:
        RecipeError: naming each method that cannot be compared, and why.
        UsageError: if the reference or an override is not understood.
    """
    path = Path(request.base.recipe)
    base = read_table(path)
    for override in (*request.base.set, *overrides):
        apply_override(base, override)
    _refuse_lost_settings(request, base, overrides)
    shared = parse_recipe({**base, **_own_method(base)}, origin=str(path))
    labels = [entry.shown_label for entry in request.methods]
    twice = [label for label, count in Counter(labels).items() if count > 1]
    if twice:
        raise RecipeError(
            f"two methods are called {twice[0]}; give each [[methods]] table a label of its own"
        )
    reference = request.reference or labels[0]
    if reference not in labels:
        raise UsageError(f"there is no method {reference!r} to refer to; use {', '.join(labels)}")
    teachers = _teachers_of(base, origin=str(path))
    methods, problems = [], []
    for entry in request.methods:
        try:
            methods.append(_planned(entry, base, teachers, num_seeds=request.seeds))
        except RecipeError as error:
            problems.append(str(error))
    if problems:
        raise RecipeError("not comparable, so nothing was run:\n" + "\n".join(problems))
    return ComparisonPlan(
        base_name=shared.name,
        methods=tuple(methods),
        reference=reference,
        verification=request.verification,
        notes=notes_on(methods),
    )


def _refuse_lost_settings(
    request: ComparisonRequest, base: Mapping[str, Any], overrides: Sequence[str]
) -> None:
    """Of the base's method nobody reads more than the budget, unless it is compared itself.

    And what a method says of its own training is not changed from outside.
    """
    for override in overrides:
        key = override.partition("=")[0].strip()
        own = [e.shown_label for e in request.methods if key in _training_keys(e)]
        if own:
            raise UsageError(
                f"--set {key} does not reach {', '.join(own)}, whose {key} is in the comparison "
                "file; change it there"
            )
    method = base.get("method")
    name = method.get("name") if isinstance(method, dict) else None
    if name in {entry.name for entry in request.methods}:
        return
    budget = {f"method.attack.{key}" for key in _BUDGET}
    if any(_takes_scale_of_base(entry) for entry in request.methods):
        budget.add("method.loss_scale")
    for override in (*request.base.set, *overrides):
        key = override.partition("=")[0].strip()
        if f"{key}.".startswith("method.") and key not in budget:
            raise UsageError(
                f"--set {key} changes {name}, which is not compared; use settings in a comparison "
                "file"
            )


def _takes_scale_of_base(entry: MethodEntry) -> bool:
    kind = _method_tables().get(entry.name, MethodTable)
    return "loss_scale" in kind.model_fields and "loss_scale" not in entry.settings


def _training_keys(entry: MethodEntry) -> set[str]:
    return {f"training.{key}" for key in entry.training}


def _own_method(base: Mapping[str, Any]) -> dict[str, Any]:
    """The base's own method with as many teachers as it needs, whichever there are."""
    method = base.get("method", {"name": "cross_entropy"})
    name = method.get("name") if isinstance(method, dict) else None
    kind = _method_tables().get(str(name), MethodTable)
    num_clean, num_robust = kind.teachers.clean[0], kind.teachers.robust[0]
    num_robust = max(num_robust, kind.teachers.together[0] - num_clean)
    roles = ["clean"] * num_clean + ["robust"] * num_robust
    return {"method": method, "teachers": [{"role": role, "source": "any"} for role in roles]}


def _planned(
    entry: MethodEntry,
    base: Mapping[str, Any],
    teachers: Sequence[Mapping[str, Any]],
    *,
    num_seeds: int,
) -> PlannedMethod:
    label, known = entry.shown_label, _method_tables()
    if entry.name not in known:
        raise RecipeError(
            f"{label}: there is no method {entry.name!r}; use {', '.join(sorted(known))}"
        )
    kind = known[entry.name]
    places = _chosen(entry, kind, teachers)
    own, said = _method_table(entry, kind, base.get("method", {}))
    count = num_seeds if entry.seeds is None else min(entry.seeds, num_seeds)
    first = base.get("seed", 0)
    table = {**base, "name": label, "method": own, "teachers": [teachers[i] for i in places]}
    if entry.training:
        table["training"] = _merged(base.get("training", {}), entry.training)
        said += f"; of training: {assignments(entry.training)}"
    recipes = tuple(
        parse_recipe({**table, "seed": first + place}, origin=label) for place in range(count)
    )
    return PlannedMethod(
        label=label,
        recipes=recipes,
        teachers=_teacher_text(recipes[0].teachers, num_left=len(teachers) - len(places)),
        origin=said,
    )


def _method_table(
    entry: MethodEntry, kind: type[MethodTable], base: object
) -> tuple[dict[str, Any], str]:
    """The method's defaults, then what the base says of it or of its budget, then `settings`.

    The budget: steps of the inner attack, and `loss_scale`, on which it depends how much a short
    run learns at all.
    """
    base = base if isinstance(base, dict) else {}
    table: dict[str, Any] = {"name": entry.name}
    said = "defaults"
    if base.get("name") == entry.name:
        table, said = _merged(table, base), "as in the base recipe"
    else:
        taken = []
        if "loss_scale" in base and _takes_scale_of_base(entry):
            table["loss_scale"] = base["loss_scale"]
            taken.append("loss_scale")
        if "attack" in kind.model_fields and isinstance(base.get("attack"), dict):
            budget = {key: base["attack"][key] for key in _BUDGET if key in base["attack"]}
            if budget:
                table["attack"] = budget
                taken += [f"attack.{key}" for key in budget]
        if taken:
            said += f", {' and '.join(taken)} of the base recipe"
    if entry.settings:
        table = _merged(table, entry.settings)
        said += f"; set here: {assignments(entry.settings)}"
    return table, said


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Tables within tables too; one of another kind takes the place of the one below."""
    if below.get("kind") != above.get("kind", below.get("kind")):
        return dict(above)
    merged = dict(below)
    for key, value in above.items():
        inner = merged.get(key)
        both = isinstance(inner, dict) and isinstance(value, dict)
        merged[key] = _merged(inner, value) if both else value  # type: ignore[arg-type]
    return merged


def _chosen(
    entry: MethodEntry, kind: type[MethodTable], teachers: Sequence[Mapping[str, Any]]
) -> list[int]:
    """Places of the teachers that the method takes."""
    places: dict[str, list[int]] = {"clean": [], "robust": []}
    for place, teacher in enumerate(teachers):
        places[teacher["role"]].append(place)
    if entry.teachers is not None:
        return _named(entry, places, num_teachers=len(teachers))
    need = kind.teachers
    robust = places["robust"][: need.robust[-1]]
    clean = places["clean"][: need.clean[-1]]
    # Where all is too many: first those who know the images that the method learns from.
    first, second = (robust, clean) if "attack" in kind.model_fields else (clean, robust)
    return sorted([*first, *second][: need.together[-1]])


def _named(entry: MethodEntry, places: Mapping[str, list[int]], *, num_teachers: int) -> list[int]:
    """Places that `teachers` of the entry means."""
    waiting = {role: list(some) for role, some in places.items()}
    found: list[int] = []
    for wanted in entry.teachers or ():
        place = wanted
        if isinstance(wanted, str):
            if not waiting[wanted]:
                raise RecipeError(
                    f"{entry.shown_label}: the base recipe has {len(places[wanted])} {wanted} "
                    f"teachers, fewer than methods.teachers = {list(entry.teachers or ())} names"
                )
            place = waiting[wanted].pop(0)
        elif wanted >= num_teachers:
            raise RecipeError(
                f"{entry.shown_label}: methods.teachers names place {wanted}, counted from 0; the "
                f"base recipe has {num_teachers} teachers"
            )
        found.append(int(place))
    if len(set(found)) < len(found):
        raise RecipeError(f"{entry.shown_label}: methods.teachers names a teacher twice")
    return found


def _teachers_of(base: Mapping[str, Any], *, origin: str) -> list[dict[str, Any]]:
    """The `[[teachers]]` tables, as far as they must be right to be chosen from."""
    teachers = base.get("teachers", [])
    if not isinstance(teachers, list) or not all(isinstance(t, dict) for t in teachers):
        raise RecipeError(f"{origin}: teachers is {teachers!r}, not a list of [[teachers]] tables")
    for place, teacher in enumerate(teachers):
        if teacher.get("role") not in {"clean", "robust"}:
            raise RecipeError(
                f"{origin}: teachers.{place}.role is {teacher.get('role')!r}; use clean or robust"
            )
    return teachers


def _teacher_text(teachers: Sequence[TeacherRecipe], *, num_left: int) -> str:
    names = [f"{t.role} {Path(t.source.rpartition(':')[2]).name}" for t in teachers]
    left = f" ({num_left} of the base left out)" if num_left else ""
    return (", ".join(names) or "none") + left


def _method_tables() -> dict[str, type[MethodTable]]:
    """Every method that recipes know, by name."""
    kinds = get_args(get_args(MethodRecipe)[0])
    return {kind.model_fields["name"].default: kind for kind in kinds}
