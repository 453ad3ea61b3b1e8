"""GatePolicy: what a student must show before it may ship, as TOML that people write.

Closed and strict: an unknown key, a limit that nothing can miss or nothing can reach, a rule about
attacks that may be as weak as one likes, an empty table and a policy without any rule are errors,
because each of them would let a student through or never let one through without anybody noticing.
Needs no torch.
"""

import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, ValidationError, model_validator

from compressor.closed_table import ClosedTable, Count, FractionText, Positive
from compressor.errors import RobustCompressError
from compressor.threat import Norm

EXAMPLE = "examples/gate.toml"

Inconclusive = Literal["fail", "inconclusive", "warn"]
"""What an undecided gate ends with: exit code 3, 6, or 0 with a loud warning."""

Limit = Annotated[FractionText, Field(gt=0, lt=1)]
"""Below 0 or at 0 every student passes, and no number of images can show an accuracy of 1."""

Confidence = Annotated[float, Field(ge=0.8, lt=1)]
"""With less, luck passes."""


Digits = Annotated[str, Field(pattern="^[0-9a-f]{12,64}$")]
"""A SHA-256 or its beginning, as summaries show it."""

DEFAULT_PROTOCOL = "AutoAttack"
ANY_ATTACKS = "worst of"
"""Begins the protocol of a report that did not run all of AutoAttack."""


class PolicyError(RobustCompressError):
    """A gate policy is malformed, or asks for something that is not there."""


class AccuracyRule(ClosedTable):
    """A limit on one accuracy of the report."""

    min_accuracy: Limit


class WorstCaseRule(AccuracyRule):
    """A limit on the share of images that stand under every attack."""

    protocol: str = Field(default=DEFAULT_PROTOCOL, min_length=1)
    """What the protocol of the report must begin with, for every rule on the worst case. One over
    weak attacks is high, so whoever is content with it must say so: `protocol = "worst of"`."""


class PerClassRule(ClosedTable):
    """Limits that every class must keep."""

    min_clean_accuracy: Limit | None = None
    min_worst_case_accuracy: Limit | None = None


class ThreatRule(ClosedTable):
    """What the attacks of the report must at least have been allowed."""

    norm: Norm
    epsilon: Annotated[FractionText, Field(gt=0)]

    @model_validator(mode="after")
    def _pixels_are_in_the_unit_interval(self) -> Self:
        if self.norm == "linf" and self.epsilon > 1:
            raise ValueError(
                f"threat.epsilon: {self.epsilon:g} is more than a pixel can change (pixels are in "
                '[0, 1]); write eight grey levels as "8/255"'
            )
        return self


class DataRule(ClosedTable):
    """Which images the report must be about."""

    content_sha256: Digits

    def is_about(self, content_sha256: str) -> bool:
        """Whether these are the images."""
        return content_sha256.startswith(self.content_sha256)


class SizeRule(ClosedTable):
    """Limits on the model that was verified."""

    max_bytes: Count | None = None
    max_parameters: Count | None = None


class LatencyRule(ClosedTable):
    """A limit on its median latency, batch 1 on the CPU where it was measured."""

    max_median_ms: Positive | None = None


class BaselineRule(ClosedTable):
    """A report of the model that ships now, and how much worse the new one may be."""

    report: str | None = Field(default=None, min_length=1, exclude=True)
    """Relative to the folder of the policy; not part of any result, as it is a path."""
    max_drop: Annotated[FractionText, Field(ge=0, lt=1)] | None = None
    """Of worst-case accuracy, on the same images; without it the comparison is only shown."""


class Budget(ClosedTable):
    """What `gate --live` may spend."""

    max_samples: Count | None = None
    max_seconds: Positive | None = None


class GatePolicy(ClosedTable):
    """All rules; the gate passes if and only if every one of them does."""

    schema_version: Literal[1] = Field(alias="schema")
    confidence: Confidence = 0.95
    """Of each one-sided bound."""
    inconclusive: Inconclusive = "inconclusive"
    clean: AccuracyRule | None = None
    worst_case: WorstCaseRule | None = None
    attacks: dict[str, AccuracyRule] = {}
    """By the name of the attack in the report."""
    per_class: PerClassRule = PerClassRule()
    threat: ThreatRule | None = None
    data: DataRule | None = None
    size: SizeRule = SizeRule()
    latency: LatencyRule = LatencyRule()
    baseline: BaselineRule = BaselineRule()
    budget: Budget = Budget()

    @property
    def judges_worst_case(self) -> bool:
        """Whether any rule is about the worst case over all attacks."""
        limits = (self.per_class.min_worst_case_accuracy, self.baseline.max_drop)
        return self.worst_case is not None or any(limit is not None for limit in limits)

    @property
    def protocol(self) -> str:
        """What the protocol of a report must begin with, if the worst case is judged."""
        return DEFAULT_PROTOCOL if self.worst_case is None else self.worst_case.protocol

    def accepts_protocol(self, protocol: str) -> bool:
        """Whether a worst case over these attacks may be judged; AutoAttack's is never too weak."""
        is_stronger = self.protocol.startswith(ANY_ATTACKS) and protocol.startswith(
            DEFAULT_PROTOCOL
        )
        return protocol.startswith(self.protocol) or is_stronger

    @model_validator(mode="after")
    def _has_a_rule(self) -> Self:
        limits = [table.model_dump() for table in (self.per_class, self.size, self.latency)]
        values = [value for table in limits for value in table.values()]
        rules = (self.clean, self.worst_case, self.baseline.max_drop, *values)
        if not self.attacks and all(rule is None for rule in rules):
            raise ValueError(
                "there is no rule, so everything would pass; add for example [worst_case] with "
                f"min_accuracy, see {EXAMPLE}"
            )
        return self

    @model_validator(mode="after")
    def _says_what_attacks_are_allowed(self) -> Self:
        if self.threat is None and (self.judges_worst_case or self.attacks):
            raise ValueError(
                "there are rules about accuracy under attack, which any model keeps if the attacks "
                'are allowed too little; add [threat] with norm = "linf" and epsilon = "8/255"'
            )
        return self


def load_policy(path: Path) -> GatePolicy:
    """Read a policy; the path of its baseline is made relative to the current folder.

    Raises:
        PolicyError: with every problem found, each with its dotted key, value and remedy.
    """
    table = _read_toml(path)
    try:
        policy = GatePolicy.model_validate(table)
    except ValidationError as error:
        lines = "".join(f"\n  {_explain(problem)}" for problem in error.errors())
        raise PolicyError(f"{path} is not a gate policy:{lines}") from None
    empty = ", ".join(f"[{name}]" for name, value in table.items() if value == {})
    if empty:
        raise PolicyError(
            f"{path} is not a gate policy: {empty} is empty, so it limits nothing; give it one of "
            f"the limits in {EXAMPLE}, or leave it out"
        )
    if policy.baseline.report is None:
        return policy
    return with_baseline(policy, path.parent / policy.baseline.report)


def with_baseline(policy: GatePolicy, report_path: Path) -> GatePolicy:
    """The same policy with another baseline."""
    baseline = policy.baseline.model_copy(update={"report": str(report_path)})
    return policy.model_copy(update={"baseline": baseline})


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))  # Windows adds a mark
    except FileNotFoundError:
        raise PolicyError(f"{path} does not exist; start from {EXAMPLE}") from None
    except OSError as error:
        raise PolicyError(f"{path} cannot be read: {error.strerror}; a policy is a file") from None
    except UnicodeDecodeError:
        raise PolicyError(f"{path} is not a text file in UTF-8; a policy is TOML") from None
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits
        raise PolicyError(f"{path} is not valid TOML: {error}") from None


_WORDING = {
    "missing": "is missing",
    "int_type": "must be a whole number, without quotes",
    "float_type": "must be a number, without quotes",
    "string_type": 'must be a text in "quotes"',
    "string_too_short": "must not be empty",
    "string_pattern_mismatch": "must be 12 to 64 of the digits 0 to 9 and a to f",
    "model_type": "must be a table of settings",
    "dict_type": "must be a table of settings",
    "finite_number": "must be a finite number",
}
_ADVICE = {
    "min_accuracy": "above 0, or everything passes, and below 1, which no sample can show",
    "min_clean_accuracy": "above 0, or everything passes, and below 1, which no sample can show",
    "min_worst_case_accuracy": "above 0, or everything passes, and below 1",
    "confidence": "0.95 means that a wrong pass has a chance of at most 5 %; below 0.8 luck passes",
    "max_drop": "a fraction: two points are 0.02",
    "content_sha256": "the result of any gate on these images has it, see --out FILE",
    "schema": "this version knows schema = 1",
}


def _explain(problem: Mapping[str, Any]) -> str:
    """One of pydantic's findings in our words."""
    place = [str(part) for part in problem["loc"]]
    dotted, kind, given = ".".join(place), problem["type"], problem["input"]
    if kind == "extra_forbidden":
        return f"{dotted}: unknown key (got {given!r}){_suggestion(place[-1])}"
    if kind == "value_error":
        text = str(problem["ctx"]["error"])
        return f"{dotted}: {text}" if len(place) > 1 or place == ["confidence"] else text
    text = _WORDING.get(kind, problem["msg"].replace("Input should be", "must be"))
    got = "" if kind == "missing" else f" (got {given!r})"
    advice = f"; {_ADVICE[place[-1]]}" if place and place[-1] in _ADVICE else ""
    return f"{dotted or 'the policy'}: {text}{got}{advice}"


def _suggestion(key: str) -> str:
    close = difflib.get_close_matches(key, _keys_of(GatePolicy), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else f"; the keys are in {EXAMPLE}"


def _keys_of(table: type[BaseModel]) -> set[str]:
    tables: list[type[BaseModel]] = [table, WorstCaseRule, PerClassRule, ThreatRule, DataRule]
    tables += [SizeRule, LatencyRule, BaselineRule, Budget]
    return {field.alias or key for one in tables for key, field in one.model_fields.items()}
