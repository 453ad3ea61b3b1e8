"""Proportions that never travel without their n, and exact bounds on what they estimate."""

import functools
import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Proportion:
    """`num_correct` out of `num_total`.

    Raises:
        ValueError: if the counts are impossible, or there is nothing to count.
    """

    num_correct: int
    num_total: int

    def __post_init__(self) -> None:
        """Refuse impossible counts."""
        if not 0 <= self.num_correct <= self.num_total or self.num_total == 0:
            raise ValueError(f"{self.num_correct} of {self.num_total} is not a proportion")

    @property
    def fraction(self) -> float:
        """The point estimate, in [0, 1]."""
        return self.num_correct / self.num_total

    def lower_bound(self, confidence: float = 0.95) -> float:
        """One-sided exact lower bound (Clopper and Pearson, Biometrika 26, 1934)."""
        if self.num_correct == 0:
            return 0.0
        failures = self.num_total - self.num_correct
        return beta_quantile(1 - confidence, a=self.num_correct, b=failures + 1)

    def upper_bound(self, confidence: float = 0.95) -> float:
        """One-sided exact upper bound (Clopper and Pearson, Biometrika 26, 1934)."""
        if self.num_correct == self.num_total:
            return 1.0
        failures = self.num_total - self.num_correct
        return beta_quantile(confidence, a=self.num_correct + 1, b=failures)

    @functools.cache  # noqa: B019 (a small value, asked for again and again)
    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Two-sided exact interval: each side errs with half of 1 - `confidence`."""
        side = (1 + confidence) / 2
        return self.lower_bound(side), self.upper_bound(side)

    def __str__(self) -> str:
        """For people: `52.00 % (5200 of 10000)`."""
        return f"{100 * self.fraction:.2f} % ({self.num_correct} of {self.num_total})"


def beta_quantile(probability: float, *, a: float, b: float) -> float:
    """The x at which the Beta(a, b) distribution function equals `probability`, by bisection."""
    low, high = 0.0, 1.0
    while high - low > 1e-12:
        middle = (low + high) / 2
        if beta_cdf(middle, a=a, b=b) < probability:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def beta_cdf(x: float, *, a: float, b: float) -> float:
    """Distribution function of Beta(a, b): the regularised incomplete beta function.

    Continued fraction of the NIST Digital Library of Mathematical Functions, 8.17.22,
    evaluated by Lentz's method; used on the side where it converges fast.
    """
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - beta_cdf(1 - x, a=b, b=a)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    log_front += a * math.log(x) + b * math.log1p(-x)
    return math.exp(log_front) / (a * _beta_fraction(x, a=a, b=b))


def _beta_fraction(x: float, *, a: float, b: float) -> float:
    tiny = 1e-300
    value, c, d = 1.0, 1.0, 0.0
    for i in range(1, 10_000):
        m = i // 2
        if i % 2:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        d = 1 / ((1 + term * d) or tiny)
        c = (1 + term / c) or tiny
        value *= c * d
        if abs(c * d - 1) < 1e-15:
            return value
    raise ArithmeticError(f"the incomplete beta function did not converge at {x}, {a}, {b}")
