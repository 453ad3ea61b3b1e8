"""Budget: by how much accuracies may fall when a network becomes a file."""

from dataclasses import dataclass

from compressor.paired_difference import PairedDrop

DEFAULT_MAX_ROBUST_DROP = 0.01
"""One point."""
DEFAULT_MAX_CLEAN_DROP = 0.02


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Fractions of the held-out images by which accuracies may fall; point estimates decide."""

    max_clean_drop: float = DEFAULT_MAX_CLEAN_DROP
    max_robust_drop: float = DEFAULT_MAX_ROBUST_DROP

    def exceeded(self, *, clean_drop: PairedDrop, robust_drop: PairedDrop) -> list[str]:
        """In words."""
        judged = (
            ("clean accuracy", clean_drop, self.max_clean_drop),
            ("accuracy under attack", robust_drop, self.max_robust_drop),
        )
        return [
            f"{what} falls by {drop}, allowed are {100 * limit:g} points"
            for what, drop, limit in judged
            if drop.fraction > limit
        ]

    def __str__(self) -> str:
        clean, robust = 100 * self.max_clean_drop, 100 * self.max_robust_drop
        return f"{clean:g} points of clean accuracy, {robust:g} of accuracy under attack"


DEFAULT_BUDGET = Budget()
