"""May the numbers of a report be judged at all, and do they answer what the policy asks?

A gate that judges an invalid evaluation would pass exactly the models that hide their gradients
best. Needs no torch.
"""

from collections.abc import Iterator

from compressor.gate.paired import EPSILON_SLACK, Asked, mismatch
from compressor.gate.policy import GatePolicy
from compressor.gate.result import CheckResult
from compressor.reports.report import RobustnessReport
from compressor.threat import ThreatModel


def check_report(
    report: RobustnessReport, policy: GatePolicy, baseline: RobustnessReport | None
) -> Iterator[CheckResult]:
    """The status of the report, its own validity checks, and whether the question is the same."""
    status = report.status if report.status in {"invalid", "unverified"} else "passed"
    yield _check("report", status, f"{report.status}: {report.status_reason}")
    if report.worst_case is None or all(row.kind != "white-box" for row in report.attacks):
        yield _check("white-box", "unverified", "no white-box attack was run")
    words = {"passed": "passed", "alarm": "invalid", "not_run": "not run"}
    for row in report.validity:
        parts = (row.found, row.threshold, row.advice)
        message = row.advice if row.status == "not_run" else "; ".join(filter(None, parts))
        yield _check(row.name, words[row.status], message)
    yield from check_question(Asked.of(report), policy, baseline)


def check_question(
    asked: Asked, policy: GatePolicy, baseline: RobustnessReport | None
) -> Iterator[CheckResult]:
    """Whether a verification answers what the policy asks, and can be compared as it asks."""
    yield from _threat_check(asked, policy)
    yield from _data_check(asked, policy)
    yield from _protocol_check(asked, policy)
    if baseline is not None:
        problem = mismatch(asked, baseline)
        found = "same images, threat and protocol"
        yield _check("baseline", "invalid" if problem else "passed", problem or found)


def _threat_check(asked: Asked, policy: GatePolicy) -> Iterator[CheckResult]:
    if policy.threat is None:
        return
    found = asked.threat
    wanted = ThreatModel(norm=policy.threat.norm, epsilon_pixels=policy.threat.epsilon)
    is_large = found.epsilon_pixels >= wanted.epsilon_pixels - EPSILON_SLACK
    is_same = found.norm == wanted.norm and is_large
    message = f"the attacks were allowed {found}, the policy asks for at least {wanted}"
    yield _check("threat", "passed" if is_same else "invalid", message)


def _data_check(asked: Asked, policy: GatePolicy) -> Iterator[CheckResult]:
    if policy.data is None:
        return
    found, wanted = asked.content_sha256, policy.data.content_sha256
    message = f"the images have content_sha256 {found}, the policy asks for {wanted}"
    yield _check("data", "passed" if policy.data.is_about(found) else "invalid", message)


def _protocol_check(asked: Asked, policy: GatePolicy) -> Iterator[CheckResult]:
    if not policy.judges_worst_case:
        return
    message = f"the protocol is {asked.protocol!r}, the policy asks for {policy.protocol!r}"
    status = "passed" if policy.accepts_protocol(asked.protocol) else "unverified"
    yield _check("protocol", status, message)


def _check(name: str, status: str, message: str) -> CheckResult:
    return CheckResult.model_validate({"name": name, "status": status, "message": message})
