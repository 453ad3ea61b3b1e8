"""What a reader must know before methods are compared: what is not the same for all of them."""

from collections.abc import Sequence

from compressor.comparison.dotted import assignments, dotted
from compressor.comparison.planned import PlannedMethod
from compressor.method_table import InnerAttackRecipe
from compressor.threat import format_pixels


def notes_on(methods: Sequence[PlannedMethod]) -> tuple[str, ...]:
    """Unequal budgets of attacks, scales of losses, training or numbers of seeds, or one seed."""
    notes = [*_unequal_attacks(methods), *_unequal_scales(methods), *_unequal_trainings(methods)]
    counts = {len(method.recipes) for method in methods}
    if len(counts) > 1:
        notes.append("Methods have different numbers of seeds; pairs are of those in common.")
    if max(counts) == 1:
        notes.append("One seed: no spread is known, and a difference may be the seed's.")
    return tuple(notes)


def _unequal_attacks(methods: Sequence[PlannedMethod]) -> list[str]:
    budgets: dict[str, list[str]] = {}
    for method in methods:
        if method.attack is not None:
            epsilon_pixels = method.recipe.threat.epsilon_pixels
            budget = _budget(method.attack, epsilon_pixels=epsilon_pixels)
            budgets.setdefault(budget, []).append(method.label)
    if len(budgets) < 2:
        return []
    said = "; ".join(f"{', '.join(labels)}: {budget}" for budget, labels in budgets.items())
    return [f"Inner attacks differ in their budget ({said})."]


def _unequal_scales(methods: Sequence[PlannedMethod]) -> list[str]:
    scales: dict[float, list[str]] = {}
    for method in methods:
        scale = getattr(method.recipe.method, "loss_scale", None)
        if scale is not None:
            scales.setdefault(scale, []).append(method.label)
    if len(scales) < 2:
        return []
    said = "; ".join(f"{', '.join(labels)}: {scale:g}" for scale, labels in scales.items())
    return [
        f"loss_scale differs ({said}); it scales the gradient of what is distilled, so a short run "
        "learns less where it is small."
    ]


def _unequal_trainings(methods: Sequence[PlannedMethod]) -> list[str]:
    """Those trained alike together, each with the keys that are not the same for all."""
    tables = {m.label: dotted(m.recipe.training.model_dump(mode="json")) for m in methods}
    first, *others = tables.values()
    shared = {key for key in first if all(t.get(key, ...) == first[key] for t in others)}
    groups: dict[str, list[str]] = {}
    for label, table in tables.items():
        own = {key: value for key, value in table.items() if key not in shared}
        groups.setdefault(assignments(own), []).append(label)
    if len(groups) < 2:
        return []
    said = "; ".join(f"{', '.join(labels)}: {own}" for own, labels in groups.items())
    return [f"Methods are not trained alike ({said}); compare their costs too."]


def _budget(attack: InnerAttackRecipe, *, epsilon_pixels: float) -> str:
    size = round(attack.resolved_step_size_pixels(epsilon_pixels), 9)
    said = f"{attack.num_steps} steps of {format_pixels(size)}"
    first = attack.first_num_steps
    if first is not None and first < attack.num_steps:
        said += f", growing from {first} until {attack.full_from:g} of the run"
    if attack.begins_at > 0:
        said += f", none before {attack.begins_at:g} of it"
    return said
