"""Each rule of a policy, put to a report: what was measured, what that shows, and the verdict.

A point estimate never decides. A rule on an accuracy passes if the exact one-sided lower bound of
the population accuracy reaches the limit, fails if the upper bound stays below it, and is
inconclusive in between. Needs no torch.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from compressor.gate_policy import GatePolicy
from compressor.gate_result import RuleResult, RuleVerdict
from compressor.paired import Comparison
from compressor.proportions import Proportion
from compressor.report import CostRow, Count, RobustnessReport, class_counts
from compressor.sequential import Judged, Look, LowerBound, judge_look
from compressor.threat import ThreatModel

_WITHOUT_ATTACK = "the population accuracy without an attack"
_SEVERITY: tuple[RuleVerdict, ...] = ("fail", "unverified", "inconclusive", "pass")


@dataclass(frozen=True, kw_only=True)
class Question:
    """Is `subject` at least `limit`?"""

    rule: str
    limit: float
    subject: str
    """What is bounded."""
    count: Count | None
    if_missing: str = ""
    """Why there is no count."""
    verdict_if_missing: RuleVerdict = "unverified"
    num_planned: int
    """As `Look.num_planned`."""
    num_alike: int = 1

    @property
    def look(self) -> Look | None:
        """For the bounds; None where there is no count."""
        if self.count is None:
            return None
        return Look(
            rule=self.rule,
            limit=self.limit,
            count=Proportion(
                num_correct=self.count.num_correct, num_total=self.count.num_total
            ),
            num_planned=self.num_planned,
            num_alike=self.num_alike,
        )


def worst(verdicts: Sequence[Outcome]) -> Outcome:
    """Of several rules that must all pass."""
    return min(verdicts, key=_SEVERITY.index)


def accuracy_questions(report: RobustnessReport, policy: GatePolicy) -> list[Question]:
    """The rules on accuracies over all images."""
    ask = partial(Question, num_planned=report.data.num_planned)
    questions = []
    if policy.clean is not None:
        questions.append(
            ask(
                rule="clean.min_accuracy",
                limit=policy.clean.min_accuracy,
                subject=_WITHOUT_ATTACK,
                count=report.clean,
            )
        )
    if policy.worst_case is not None:
        questions.append(
            ask(
                rule="worst_case.min_accuracy",
                limit=policy.worst_case.min_accuracy,
                subject=bounded_by(report),
                count=report.worst_case,
                if_missing="the report has no worst case",
            )
        )
    rows = {row.name: row for row in report.attacks}
    for name, rule in policy.attacks.items():
        row, missing = rows.get(name), f"{name} tried only the images that earlier attacks had left"
        if row is None:
            missing = f"{name} was not run; the report has {', '.join(rows) or 'no attack'}"
        questions.append(
            ask(
                rule=f"attacks.{name}.min_accuracy",
                limit=rule.min_accuracy,
                subject=f"the population accuracy under {name} alone ({describe_threat(report)})",
                count=row and row.accuracy,
                if_missing=missing,
            )
        )
    return questions


def class_questions(report: RobustnessReport, policy: GatePolicy) -> list[list[Question]]:
    """For each rule on classes one question a class."""
    counts = {name: (clean, standing) for name, clean, standing in class_counts(report)}
    num_open = report.data.num_planned - report.clean.num_total
    num_alike, questions = len(report.data.class_names), []
    for place, (key, limit) in enumerate(policy.per_class.model_dump().items()):
        if limit is None:
            continue
        subject = (_WITHOUT_ATTACK, bounded_by(report))[place]
        some = []
        for name in report.data.class_names:
            count = counts[name][place] if name in counts else None
            some.append(
                Question(
                    rule=f"per_class.{key}",
                    limit=limit,
                    subject=f"class {name}: {subject}",
                    count=count,
                    if_missing="no image of it was attacked",
                    verdict_if_missing="inconclusive",
                    num_planned=num_open + (count.num_total if count else 0),
                    num_alike=num_alike,
                )
            )
        questions.append(some)
    return questions


def looks(report: RobustnessReport, policy: GatePolicy) -> list[Look]:
    """All rules on accuracies that the report can answer, for `sequential.decide`."""
    by_class = class_questions(report, policy)
    questions = [*accuracy_questions(report, policy), *(q for some in by_class for q in some)]
    return [look for look in (question.look for question in questions) if look is not None]


def judge_accuracy(
    question: Question, report: RobustnessReport, *, confidence: float, lower_bound: LowerBound
) -> RuleResult:
    """One rule on one accuracy."""
    look, required = question.look, f"at least {percent(question.limit)}"
    if look is None:
        return RuleResult(
            rule=question.rule,
            verdict=question.verdict_if_missing,
            measured="nothing",
            shown="-",
            required=required,
            message=f"{question.subject}: {question.if_missing}",
            limit=question.limit,
        )
    judged = judge_look(look, confidence=confidence, lower_bound=lower_bound)
    shown = _shown(judged)
    message = (
        f"{question.subject} is {shown} with {100 * confidence:g} % confidence, shown on "
        f"{look.count.num_total} images of which {look.count.num_correct} are correct; "
        f"{required} is required{incomplete_note(report)}"
    )
    return RuleResult(
        rule=question.rule,
        verdict=judged.verdict,
        measured=str(look.count),
        shown=shown,
        required=required,
        message=message,
        limit=question.limit,
        num_correct=look.count.num_correct,
        num_total=look.count.num_total,
        lower_bound=judged.lower,
        upper_bound=judged.upper,
    )


def judge_classes(parts: tuple[RuleResult, ...]) -> RuleResult:
    """One rule on all classes: each must pass, so none needs a correction to pass."""
    verdict = worst([part.verdict for part in parts])
    decisive = [part for part in parts if part.verdict == verdict]
    weakest = min(decisive, key=lambda part: part.lower_bound or 0.0)
    return weakest.model_copy(
        update={
            "message": f"{len(decisive)} of {len(parts)} classes: {verdict}; the weakest of them, "
            f"{weakest.message}",
            "parts": parts,
        }
    )


def judge_cost(report: RobustnessReport, policy: GatePolicy) -> Iterator[RuleResult]:
    """Size and latency of the verified model; exact, but a latency is of one machine."""
    row = _cost_of_target(report)
    for rule, limit, unit, value in (
        ("size.max_bytes", policy.size.max_bytes, "bytes", row and row.num_bytes),
        (
            "size.max_parameters",
            policy.size.max_parameters,
            "parameters",
            row and row.num_parameters,
        ),
        ("latency.max_median_ms", policy.latency.max_median_ms, "ms", row and row.latency_ms),
    ):
        if limit is None:
            continue
        measured = "nothing" if value is None else f"{value:,} {unit}"
        where = f" on {report.environment.get('processor', 'an unnamed processor')}"
        verdict: RuleVerdict = "inconclusive"
        if value is not None:
            verdict = "pass" if value <= limit else "fail"
        yield RuleResult(
            rule=rule,
            verdict=verdict,
            measured=measured,
            shown="-",
            required=f"at most {limit:,} {unit}",
            message=f"{measured} measured{where if unit == 'ms' else ''}; at most {limit:,} "
            f"{unit} allowed",
            limit=limit,
        )


def judge_drop(
    comparison: Comparison | None, policy: GatePolicy, *, lower_bound: LowerBound
) -> Iterator[RuleResult]:
    """How much worst-case accuracy the population lost against the baseline."""
    limit = policy.baseline.max_drop
    if limit is not None and comparison is not None:
        yield _judge_drop
    low, high = comparison.drop_bounds(policy.confidence, lower_bound)
    verdict: RuleVerdict = "inconclusive"
    if high <= limit:
        verdict = "pass"
    elif low > limit:
        verdict = "fail"
    words = {"pass": f"at most {_ceil(high)}", "fail": f"at least {_floor(low)}"}
    shown = words.get(verdict, f"{_floor(low)} to {_ceil(high)}")
    num_broken, num_images = len(comparison.newly_broken), comparison.num_images
    measured = (
        f"{100 * comparison.drop_fraction:.2f} % ({num_broken} newly broken, "
        f"{comparison.num_newly_fixed} newly fixed of {num_images})"
    )
    yield RuleResult(
        rule="baseline.max_drop",
        verdict=verdict,
        measured=measured,
        shown=shown,
        required=f"at most {percent(limit)}",
        message=f"the drop of population accuracy under the attack suite against "
        f"{comparison.baseline_name} is {shown} with {100 * policy.confidence:g} % confidence: "
        f"{measured}; at most {percent(limit)} is allowed",
        limit=limit,
        num_total=num_images,
        lower_bound=low,
        upper_bound=high,
    )


def bounded_by(report: RobustnessReport) -> str:
    """What a worst-case bound is a bound of; never of robustness itself."""
    return (
        f"the population accuracy under the attack suite {report.protocol} "
        f"({describe_threat(report)})"
    )


def describe_threat(report: RobustnessReport) -> str:
    """`linf 8/255`."""
    return str(ThreatModel(norm=report.norm, epsilon_pixels=report.epsilon_pixels))


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
        return f"at least {_floor(judged.lower)}"
    if judged.verdict == "fail":
        return f"at most {_ceil(judged.upper)}"
    return f"between {_floor(judged.lower)} and {_ceil(judged.upper)}"


def _floor(fraction: float) -> str:
    """Rounded so that it claims no more than the bound."""
    return f"{math.floor(10_000 * fraction) / 100:.2f} %"


def _ceil(fraction: float) -> str:
    return f"{math.ceil(10_000 * fraction) / 100:.2f} %"


def _cost_of_target(report: RobustnessReport) -> CostRow | None:
    """The one row of the model that was verified, if there is exactly one."""
    heads = ("student ", "target ") if report.target.kind != "onnx" else ("target ",)
    rows = [
        row for row in report.cost if row.name.startswith(heads) or row.name == report.name
    ]
    return rows[0] if len(rows) == 1 else None
