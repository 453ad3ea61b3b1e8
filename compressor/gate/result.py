"""GateResult: what the gate decided about every rule and why; its JSON is its dump."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from compressor.errors import ExitCode
from compressor.gate.paired import Comparison
from compressor.gate.policy import GatePolicy

GateVerdict = Literal["pass", "fail", "inconclusive", "unverified", "invalid"]
"""`invalid`: the evaluation or the question is wrong, so its numbers say nothing. `unverified`:
what the policy asks for was never attacked. Neither is ever a pass or a fail."""

Outcome = Literal["pass", "fail", "inconclusive", "unverified"]
RuleVerdict = Literal["pass", "fail", "inconclusive", "unverified", "not judged"]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class RuleResult(_Table):
    """One rule: what was measured, what that shows, and what is required."""

    rule: str
    """Its dotted key in the policy."""
    verdict: RuleVerdict
    measured: str
    """With its n."""
    shown: str
    """The bound on the population that decided, or both of them."""
    required: str
    message: str
    """All of it in sentences."""
    limit: float
    num_correct: int | None = None
    num_total: int | None = None
    lower_bound: float | None = None
    upper_bound: float | None = None
    parts: tuple["RuleResult", ...] = ()
    """One for each class, where the rule is about all of them."""


class CheckResult(_Table):
    """Whether the numbers may be judged at all."""

    name: str
    status: Literal["passed", "invalid", "unverified", "not run"]
    message: str


class ImageFacts(_Table):
    """Which images, as the report says."""

    source: str
    """`imagefolder`, `cifar10` ...: without its folder."""
    content_sha256: str
    """Of all test images and labels."""
    index_sha256: str
    """Of the positions that were planned."""


class GateResult(_Table):
    """The verdict, everything that led to it, and what it is about."""

    schema_version: Literal[1] = 1
    verdict: GateVerdict
    exit_code: int
    reason: str
    name: str
    model_sha256: str
    bounded: str
    """What the bounds are bounds of."""
    caveat: str
    report_status: str
    num_images: int
    num_planned: int
    data: ImageFacts
    policy: GatePolicy
    checks: tuple[CheckResult, ...]
    rules: tuple[RuleResult, ...]
    comparison: Comparison | None

    @property
    def images(self) -> str:
        """`60 images of digits`."""
        of_planned = f" of {self.num_planned} planned" * (self.num_images < self.num_planned)
        return f"{self.num_images}{of_planned} images of {self.data.source}"


def exit_code_of(verdict: GateVerdict, policy: GatePolicy) -> ExitCode:
    """The code of the command; the policy says what an undecided gate is worth."""
    return {
        "pass": ExitCode.DONE,
        "fail": ExitCode.GATE_FAILED,
        "inconclusive": {
            "fail": ExitCode.GATE_FAILED,
            "inconclusive": ExitCode.INCONCLUSIVE,
            "warn": ExitCode.DONE,
        }[policy.inconclusive],
        "unverified": ExitCode.INVALID,
        "invalid": ExitCode.INVALID,
    }[verdict]
