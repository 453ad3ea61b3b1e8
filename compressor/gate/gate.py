"""The robustness gate: may this student ship?

It passes if and only if every rule passes (an intersection-union test: Berger, Multiparameter
hypothesis testing and acceptance sampling, Technometrics 24, 1982). A student that misses any
limit therefore passes with a chance of at most 1 - confidence, however many rules there are. A
report whose own checks raised an alarm, or that answers another question than the policy asks, is
neither passed nor failed. Needs no torch.
"""

from collections.abc import Iterator, Sequence
from functools import partial

from compressor.gate.checks import check_report
from compressor.gate.paired import Comparison, compare
from compressor.gate.policy import GatePolicy, PolicyError
from compressor.gate.questions import accuracy_questions, bounded_by, class_questions, looks
from compressor.gate.result import (
    CheckResult,
    GateResult,
    GateVerdict,
    ImageFacts,
    RuleResult,
    exit_code_of,
)
from compressor.gate.rules import (
    incomplete_note,
    judge_accuracy,
    judge_classes,
    judge_cost,
    judge_drop,
    worst,
)
from compressor.gate.sequential import Decision, Ending, LowerBound, decide, early_look, last_look
from compressor.proportions import Proportion
from compressor.reports.report import RobustnessReport


def judge(
    report: RobustnessReport,
    policy: GatePolicy,
    *,
    baseline: RobustnessReport | None = None,
) -> GateResult:
    """Put a report to a policy.

    Args:
        report: of the model that wants to ship.
        policy: the rules.
        baseline: a report of the model that ships now, on the same images.

    Raises:
        PolicyError: if the policy limits a drop and there is no baseline.
    """
    require_baseline(policy, baseline)
    checks = tuple(check_report(report, policy, baseline))
    bars = [check for check in checks if check.status in {"invalid", "unverified"}]
    comparison = compare(report, baseline) if baseline is not None and not bars else None
    rules = tuple(_rules(report, policy, comparison, baseline=baseline))
    verdict, reason = _barred(bars) if bars else _combined(rules)
    return GateResult(
        verdict=verdict,
        exit_code=int(exit_code_of(verdict, policy)),
        reason=reason,
        name=report.name,
        model_sha256=report.target.sha256,
        bounded=f"Bounds are of {bounded_by(report)}, each with {100 * policy.confidence:g} % "
        f"confidence{incomplete_note(report)}.",
        caveat=report.caveat,
        report_status=report.status,
        num_images=report.clean.num_total,
        num_planned=report.data.num_planned,
        data=ImageFacts(
            source=report.data.source,
            content_sha256=report.data.content_sha256,
            index_sha256=report.data.index_sha256,
        ),
        policy=policy,
        checks=checks,
        rules=tuple(map(_not_judged, rules)) if bars else rules,
        comparison=comparison,
    )


def judge_live(
    report: RobustnessReport, policy: GatePolicy, *, baseline: RobustnessReport | None = None
) -> GateResult:
    """As `judge`, for an evaluation that the gate itself could have ended early."""
    return judge(report.model_copy(update={"looks": "many"}), policy, baseline=baseline)


def decide_live(
    report: RobustnessReport, policy: GatePolicy, *, baseline: RobustnessReport | None = None
) -> Decision:
    """What the images attacked so far decide; ask after every chunk, then report by `judge_live`.

    `report` holds all finished images. They must be a random part, and each must have gone
    through the whole cascade; `check_question` must have passed. The gate passes early only if the
    rules that need no sampling, and the comparison with the baseline, pass too.
    """
    decision = decide(looks(report, policy), confidence=policy.confidence)
    if decision.verdict != "pass":
        return decision
    result = judge_live(report, policy, baseline=baseline)
    # invalid: no image in common with the baseline so far; what else it can be was asked before
    may_change = result.verdict in {"inconclusive", "invalid"} and report.status == "incomplete"
    verdict: Ending = "inconclusive"
    if result.verdict in {"pass", "fail"}:
        verdict = "pass" if result.verdict == "pass" else "fail"
    elif may_change:
        verdict = "undecided"
    return Decision(verdict=verdict, reason=result.reason, judged=decision.judged)


def require_baseline(policy: GatePolicy, baseline: RobustnessReport | None) -> None:
    """A drop is from something.

    Raises:
        PolicyError: if the policy limits a drop and there is no baseline.
    """
    if policy.baseline.max_drop is not None and baseline is None:
        raise PolicyError(
            "baseline.max_drop needs a report of the model that ships now: set baseline.report in "
            "the policy, or give --baseline REPORT"
        )


def _bound_for(*reports: RobustnessReport) -> LowerBound:
    """How accuracies are bounded: for one look at a number of images that was fixed before, if so.

    An incomplete report may have been ended by what was found.
    """
    if any(report.status == "incomplete" for report in reports):
        return early_look
    is_last_of_many = any(report.looks == "many" for report in reports)
    return last_look if is_last_of_many else Proportion.lower_bound


def _rules(
    report: RobustnessReport,
    policy: GatePolicy,
    comparison: Comparison | None,
    *,
    baseline: RobustnessReport | None,
) -> Iterator[RuleResult]:
    ask = partial(
        judge_accuracy,
        report=report,
        confidence=policy.confidence,
        lower_bound=_bound_for(report),
    )
    yield from map(ask, accuracy_questions(report, policy))
    for questions in class_questions(report, policy):
        yield judge_classes(tuple(map(ask, questions)))
    yield from judge_cost(report, policy)
    both = (report,) if baseline is None else (report, baseline)
    yield from judge_drop(comparison, policy, lower_bound=_bound_for(*both))


def _barred(bars: Sequence[CheckResult]) -> tuple[GateVerdict, str]:
    is_invalid = any(check.status == "invalid" for check in bars)
    reason = "; ".join(f"{check.name}: {check.message}" for check in bars)
    return "invalid" if is_invalid else "unverified", reason


def _combined(rules: Sequence[RuleResult]) -> tuple[GateVerdict, str]:
    verdict = worst(rules)
    if verdict == "pass":
        return verdict, f"all {len(rules)} rules passed"
    decisive = [rule for rule in rules if rule.verdict == verdict]
    return verdict, "; ".join(f"{rule.rule}: {rule.message}" for rule in decisive)


def _not_judged(rule: RuleResult) -> RuleResult:
    """Without a number, so that none can be quoted."""
    return RuleResult(
        rule=rule.rule,
        verdict="not judged",
        measured="-",
        shown="-",
        required=rule.required,
        message=f"{rule.required} is required; not judged, as the evaluation cannot be believed "
        "or answers another question",
        limit=rule.limit,
    )
