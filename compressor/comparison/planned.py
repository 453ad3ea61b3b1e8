"""One method, and one run, of a plan of a comparison."""

from dataclasses import dataclass

from compressor.method_table import InnerAttackRecipe
from compressor.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class PlannedMethod:
    """One row of the comparison."""

    label: str
    recipes: tuple[Recipe, ...]
    """One per seed; all else is the same."""
    teachers: str
    """Which of the base's teachers it takes, and which it leaves."""
    origin: str
    """Where the values of its table come from."""

    @property
    def recipe(self) -> Recipe:
        """Of the first seed."""
        return self.recipes[0]

    @property
    def attack(self) -> InnerAttackRecipe | None:
        """The inner attack, if it has one."""
        attack = getattr(self.recipe.method, "attack", None)
        return attack if isinstance(attack, InnerAttackRecipe) else None


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One method with one seed."""

    label: str
    recipe: Recipe

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.label}-seed{self.recipe.seed}"
