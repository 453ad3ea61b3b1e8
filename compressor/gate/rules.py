"""Each rule of a policy, put to a report: what was measured, what that shows, and the verdict.

A point estimate never decides. A rule on an accuracy passes if the exact one-sided lower bound of
the population accuracy reaches the limit, fails if the upper bound stays below it, and is
inconclusive in between. Needs no torch.
"""

import math
from collections.abc import Iterator, Sequence

from compressor.gate.paired import Comparison
from compressor.gate.policy import GatePolicy
from compressor.gate.questions import Question
from compressor.gate.result import Outcome, RuleResult
from compressor.gate.sequential import Judged, LowerBound, judge_look
from compressor.reports.report import CostRow, RobustnessReport, TargetFacts

_SEVERITY: tuple[Outcome, ...] = ("fail", "unverified", "inconclusive", "pass")


def worst(rules: Sequence[RuleResult]) -> Outcome:
    """The verdict on several rules that must all pass."""
    verdicts = {rule.verdict for rule in rules}
    return next(outcome for outcome in _SEVERITY if outcome in verdicts)


def judge_accuracy(
    question: Question, report: RobustnessReport, *, confidence: float, lower_bound: LowerBound
) -> RuleResult:
    """One rule on one accuracy."""
    look, rule = question.look, _unanswered(question)
    if look is None:
        return rule
    judged = judge_look(look, confidence=confidence, lower_bound=lower_bound)
    shown = _shown(judged)
    message = (
        f"{question.subject} is {_in_words(shown)} with {100 * confidence:g} % confidence, shown "
        f"on {look.count.num_total} images of which {look.count.num_correct} are correct; "
        f"{_in_words(rule.required)} is required{incomplete_note(report)}"
    )
    found = {
        "verdict": judged.verdict,
        "measured": str(look.count),
        "shown": shown,
        "message": message,
        "num_correct": look.count.num_correct,
        "num_total": look.count.num_total,
        "lower_bound": judged.lower,
        "upper_bound": judged.upper,
    }
    return rule.model_copy(update=found)


def _unanswered(question: Question) -> RuleResult:
    return RuleResult(
        rule=question.rule,
        verdict=question.verdict_if_missing,
        measured="nothing",
        shown="-",
        required=f">= {percent(question.limit)}",
        message=f"{question.subject}: {question.if_missing}",
        limit=question.limit,
    )


def judge_classes(parts: tuple[RuleResult, ...]) -> RuleResult:
    """One rule on all classes: each must pass, so none needs a correction to pass."""
    verdict = worst(parts)
    decisive = [part for part in parts if part.verdict == verdict]
    weakest = min(decisive, key=lambda part: part.lower_bound or 0.0)
    text = f"{len(decisive)} of {len(parts)} classes: {verdict}; the weakest of them, "
    return weakest.model_copy(update={"message": text + weakest.message, "parts": parts})


def judge_cost(report: RobustnessReport, policy: GatePolicy) -> Iterator[RuleResult]:
    """Size and latency of the verified model; exact, but a latency is of one machine."""
    row = _cost_of_target(report)
    where = f"batch 1 on {report.environment.get('processor', 'an unnamed processor')}"
    rules: list[tuple[str, float | None, str, str]] = [
        ("size.max_bytes", policy.size.max_bytes, "num_bytes", "bytes"),
        ("size.max_parameters", policy.size.max_parameters, "num_parameters", "parameters"),
        ("latency.max_median_ms", policy.latency.max_median_ms, "latency_ms", f"ms, {where}"),
    ]
    for rule, limit, column, unit in rules:
        if limit is not None:
            yield _at_most(rule, getattr(row, column, None), limit, unit)


def _at_most(rule: str, value: float | None, limit: float, unit: str) -> RuleResult:
    required = f"<= {limit:,} {unit.partition(',')[0]}"
    measured, verdict = "nothing", "inconclusive"
    if value is not None:
        measured = f"{value:,} {unit}"
        verdict = "pass" if value <= limit else "fail"
    return RuleResult.model_validate(
        {
            "rule": rule,
            "verdict": verdict,
            "measured": measured,
            "shown": "exact" if value is not None else "-",
            "required": required,
            "message": f"{measured} measured; {_in_words(required)} allowed",
            "limit": limit,
        }
    )


def judge_drop(
    comparison: Comparison | None, policy: GatePolicy, *, lower_bound: LowerBound
) -> Iterator[RuleResult]:
    """How much worst-case accuracy the population lost; None where reports cannot be compared."""
    limit = policy.baseline.max_drop
    if limit is None:
        return
    rule = RuleResult(
        rule="baseline.max_drop",
        verdict="unverified",
        measured="nothing",
        shown="-",
        required=f"<= {percent(limit)}",
        message="there is nothing to compare with",
        limit=limit,
    )
    if comparison is None:
        yield rule
        return
    low, high = comparison.drop_bounds(policy.confidence, lower_bound)
    verdict, shown = "inconclusive", f"{_floor(low)} to {_ceil(high)}"
    if high <= limit:
        verdict, shown = "pass", f"<= {_ceil(high)}"
    elif low > limit:
        verdict, shown = "fail", f">= {_floor(low)}"
    measured = (
        f"{100 * comparison.drop_fraction:.2f} % ({len(comparison.newly_broken)} newly broken, "
        f"{comparison.num_newly_fixed} newly fixed of {comparison.num_images})"
    )
    message = (
        f"the population accuracy under the attack suite is lower than that of "
        f"{comparison.baseline_name} by {_in_words(shown)}, with {100 * policy.confidence:g} % "
        f"confidence: {measured}; "
        f"{_in_words(rule.required)} is allowed"
    )
    yield rule.model_copy(
        update={
            "verdict": verdict,
            "measured": measured,
            "shown": shown,
            "message": message,
            "num_total": comparison.num_images,
            "lower_bound": low,
            "upper_bound": high,
        }
    )


def incomplete_note(report: RobustnessReport) -> str:
    """What every line of an incomplete report must say."""
    if report.status != "incomplete":
        return ""
    return (
        f" (incomplete: {report.clean.num_total} of {report.data.num_planned} planned images, "
        "bounds that hold whenever it was stopped)"
    )


def percent(fraction: float) -> str:
    """Of a limit: `25 %`."""
    return f"{100 * fraction:.6g} %"


def _shown(judged: Judged) -> str:
    if judged.verdict == "pass":
        return f">= {_floor(judged.lower)}"
    if judged.verdict == "fail":
        return f"<= {_ceil(judged.upper)}"
    return f"{_floor(judged.lower)} to {_ceil(judged.upper)}"


def _in_words(comparison: str) -> str:
    """`>= 25 %` as `at least 25 %`; `20 % to 30 %` as `between 20 % and 30 %`."""
    if " to " in comparison:
        return "between " + comparison.replace(" to ", " and ")
    return comparison.replace(">=", "at least").replace("<=", "at most")


def _floor(fraction: float) -> str:
    """Rounded so that it claims no more than the bound."""
    return f"{math.floor(10_000 * fraction) / 100:.2f} %"


def _ceil(fraction: float) -> str:
    return f"{math.ceil(10_000 * fraction) / 100:.2f} %"


def _cost_of_target(report: RobustnessReport) -> CostRow | None:
    """The one row of the model that was verified, if there is exactly one."""
    rows = [row for row in report.cost if _is_target(row.name, report.target)]
    return rows[0] if len(rows) == 1 else None


def _is_target(name: str, target: TargetFacts) -> bool:
    if target.kind == "run":
        return name.startswith("student ")
    if target.kind in {"onnx", "engine"}:
        return name.endswith(f".{target.kind}")
    return name == target.architecture.partition(",")[0]
