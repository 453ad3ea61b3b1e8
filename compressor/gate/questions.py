"""The questions that a policy asks about accuracies, with the counts that answer them.

Needs no torch.
"""

from collections import Counter
from dataclasses import dataclass
from functools import partial

from compressor.gate.policy import GatePolicy
from compressor.gate.result import RuleVerdict
from compressor.gate.sequential import Look
from compressor.proportions import Proportion
from compressor.reports.consistency import WRONG_CLEAN
from compressor.reports.report import Count, RobustnessReport
from compressor.threat import ThreatModel

_WITHOUT_ATTACK = "the population accuracy without an attack"


@dataclass(frozen=True, kw_only=True)
class Question:
    """Is `subject` at least `limit`?"""

    rule: str
    limit: float
    subject: str
    """What is bounded."""
    count: Proportion | None
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
            count=self.count,
            num_planned=self.num_planned,
            num_alike=self.num_alike,
        )


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
                count=_proportion(report.clean),
            )
        )
    if policy.worst_case is not None:
        questions.append(
            ask(
                rule="worst_case.min_accuracy",
                limit=policy.worst_case.min_accuracy,
                subject=bounded_by(report),
                count=_proportion(report.worst_case),
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
                count=_proportion(row.accuracy if row else None),
                if_missing=missing,
            )
        )
    return questions


def class_questions(report: RobustnessReport, policy: GatePolicy) -> list[list[Question]]:
    """For each rule on classes one question a class."""
    names, labels = report.data.class_names, report.samples.label
    broken_by = list(zip(labels, report.samples.broken_by, strict=True))
    total = Counter(labels)
    clean = Counter(label for label, broken in broken_by if broken != WRONG_CLEAN)
    standing = Counter(label for label, broken in broken_by if broken is None)
    num_open = report.data.num_planned - report.clean.num_total
    limits = policy.per_class
    return [
        [
            Question(
                rule=f"per_class.{key}",
                limit=limit,
                subject=f"class {name}: {subject}",
                count=Proportion(num_correct=correct[y], num_total=total[y]) if total[y] else None,
                if_missing="no image of it was attacked",
                verdict_if_missing="inconclusive",
                num_planned=num_open + total[y],
                num_alike=len(names),
            )
            for y, name in enumerate(names)
        ]
        for key, limit, subject, correct in (
            ("min_clean_accuracy", limits.min_clean_accuracy, _WITHOUT_ATTACK, clean),
            (
                "min_worst_case_accuracy",
                limits.min_worst_case_accuracy,
                bounded_by(report),
                standing,
            ),
        )
        if limit is not None
    ]


def looks(report: RobustnessReport, policy: GatePolicy) -> list[Look]:
    """All rules on accuracies that the report can answer, for `sequential.decide`."""
    by_class = class_questions(report, policy)
    questions = [*accuracy_questions(report, policy), *(q for some in by_class for q in some)]
    return [look for look in (question.look for question in questions) if look is not None]


def bounded_by(report: RobustnessReport) -> str:
    """What a worst-case bound is a bound of; never of robustness itself."""
    return (
        f"the population accuracy under the attack suite {report.protocol} "
        f"({describe_threat(report)})"
    )


def describe_threat(report: RobustnessReport) -> str:
    """`linf 8/255`."""
    return str(ThreatModel(norm=report.norm, epsilon_pixels=report.epsilon_pixels))


def _proportion(count: Count | None) -> Proportion | None:
    if count is None:
        return None
    return Proportion(num_correct=count.num_correct, num_total=count.num_total)
