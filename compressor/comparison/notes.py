"""What a reader must know before methods are compared: what is not the same for all of them."""

from collections.abc import Sequence

from compressor.comparison.planned import PlannedMethod
from compressor.method_table import InnerAttackRecipe
from compressor.threat import format_pixels


def notes_on(methods: Sequence[PlannedMethod]) -> tuple[str, ...]:
    """Unequal budgets of attacks, scales of losses, training or numbers of seeds, or one seed."""
    notes = [*_unequal_attacks(methods), *_unequal_scales(methods)]
    if any(method.recipe.training != methods[0].recipe.training for method in methods):
        said = ", ".join(f"{m.label} {m.recipe.training.epochs}" for m in methods)
        notes.append(f"Methods are not trained alike (epochs: {said}); compare their costs too.")
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


def _budget(attack: InnerAttackRecipe, *, epsilon_pixels: float) -> str:
    size = round(attack.step_size_pixels or epsilon_pixels / 4, 9)
    said = f"{attack.num_steps} steps of {format_pixels(size)}"
    first = attack.first_num_steps
    if first is not None and first < attack.num_steps:
        said += f", growing from {first} until {attack.full_from:g} of the run"
    if attack.begins_at > 0:
        said += f", none before {attack.begins_at:g} of it"
    return said
