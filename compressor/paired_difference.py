"""How much a proportion dropped from one model to another on the same images, with an interval."""

import math
from dataclasses import dataclass

_Z_95 = 1.959963984540054


@dataclass(frozen=True, kw_only=True)
class PairedDrop:
    """Images that only the first model gets right against those that only the second does.

    Raises:
        ValueError: if the counts are impossible, or there is nothing to count.
    """

    num_newly_broken: int
    num_newly_fixed: int
    num_total: int

    def __post_init__(self) -> None:
        """Refuse impossible counts."""
        counts = (self.num_newly_broken, self.num_newly_fixed)
        if min(counts) < 0 or sum(counts) > self.num_total or self.num_total == 0:
            raise ValueError(f"{counts} of {self.num_total} is not a paired difference")

    @property
    def fraction(self) -> float:
        """The point estimate, in [-1, 1]; above 0 where the second model is worse."""
        return (self.num_newly_broken - self.num_newly_fixed) / self.num_total

    def interval_95(self) -> tuple[float, float]:
        """Two-sided score interval.

        Source: Tango, "Equivalence test and confidence interval for the difference in proportions
        for the paired-sample design", Statistics in Medicine 17, 1998.
        """
        return self._solve(_Z_95), self._solve(-_Z_95)

    def _solve(self, z: float) -> float:
        """The drop whose score is `z`; the score falls as the drop rises."""
        low, high = -1.0, 1.0
        while high - low > 1e-10:
            middle = (low + high) / 2
            if self._score(middle) > z:
                low = middle
            else:
                high = middle
        return (low + high) / 2

    def _score(self, drop: float) -> float:
        n, b, c = self.num_total, self.num_newly_broken, self.num_newly_fixed
        linear = -b - c + (2 * n - b + c) * drop
        root = math.sqrt(max(linear**2 + 8 * n * c * drop * (1 - drop), 0.0))
        fixed_share = (root - linear) / (4 * n)
        variance = n * (2 * fixed_share + drop * (1 - drop))
        distance = b - c - n * drop
        if variance <= 0:
            return math.copysign(math.inf, distance) if distance else 0.0
        return distance / math.sqrt(variance)

    def __str__(self) -> str:
        """For people: `0.40 points (-0.50 to 1.30; 9 newly broken, 7 fixed of 500)`."""
        low, high = self.interval_95()
        return (
            f"{100 * self.fraction:.2f} points ({100 * low:.2f} to {100 * high:.2f}; "
            f"{self.num_newly_broken} newly broken, {self.num_newly_fixed} fixed of "
            f"{self.num_total})"
        )
