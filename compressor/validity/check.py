"""Check: one question that is asked of an evaluation, and the row that answers it.

The checks themselves are in `output_checks.py`, `gradient_checks.py`, `attack_checks.py` and
`active_test.py`; `validity.py` asks them in order.
"""

from dataclasses import dataclass

from compressor.proportions import beta_cdf
from compressor.reports.report import ValidityRow

SIGNIFICANCE = 0.01
"""Below it, the p-value of an exact test is an alarm."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """What is the same whenever this check is run."""

    name: str
    threshold: str
    advice: str
    """What an alarm means and what to do."""

    def judged(self, found: str, *, is_alarm: bool, p_value: float | None = None) -> ValidityRow:
        """The row of a check that was run; `found` says what was measured, with its n."""
        return ValidityRow(
            name=self.name,
            status="alarm" if is_alarm else "passed",
            found=found,
            threshold=self.threshold,
            p_value=p_value,
            advice=self.advice if is_alarm else "",
        )

    def not_run(self, reason: str) -> ValidityRow:
        """The row of a check that says nothing this time."""
        return ValidityRow(
            name=self.name,
            status="not_run",
            found="",
            threshold=self.threshold,
            p_value=None,
            advice=reason,
        )


def binomial_tail(num_events: int, *, num_total: int, probability: float) -> float:
    """P(at least `num_events` of `num_total`), each happening with `probability`; exact."""
    if num_events <= 0:
        return 1.0
    return beta_cdf(probability, a=num_events, b=num_total - num_events + 1)
