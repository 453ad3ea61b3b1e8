"""May the numbers of a report be judged at all, and do they answer what the policy asks?

A gate that judges an invalid evaluation would pass exactly the models that hide their gradients
best. Needs no torch.
"""

from collections.abc import Iterator

from compressor.gate.paired import mismatch
from compressor.gate.policy import GatePolicy
from compressor.gate.result import CheckResult
from compressor.reports.report import RobustnessReport
from compressor.threat import ThreatModel

_EPSILON_SLACK = 1e-9  # "8/255" and 0.031372549 are the same question


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
    yield from _threat_check(report, policy)
    yield from _protocol_check(report, policy)
    if baseline is not None:
        problem = mismatch(report, baseline)
        found = "same images, threat and protocol"
        yield _check("baseline", "invalid" if problem else "passed", problem or found)


def _threat_check(report: RobustnessReport, policy: GatePolicy) -> Iterator[CheckResult]:
    if policy.threat is None:
        return
    norm, epsilon = policy.threat.norm, policy.threat.epsilon
    is_same = report.norm == norm and report.epsilon_pixels >= epsilon - _EPSILON_SLACK
    found = ThreatModel(norm=report.norm, epsilon_pixels=report.epsilon_pixels)
    wanted = ThreatModel(norm=norm, epsilon_pixels=epsilon)
    message = f"the report is about {found}, the policy asks for at least {wanted}"
    yield _check("threat", "passed" if is_same else "invalid", message)


def _protocol_check(report: RobustnessReport, policy: GatePolicy) -> Iterator[CheckResult]:
    if policy.worst_case is None:
        return
    wanted = policy.worst_case.protocol
    status = "passed" if report.protocol.startswith(wanted) else "unverified"
    message = f"the protocol is {report.protocol!r}, the policy asks for {wanted!r}"
    yield _check("protocol", status, message)


def _check(name: str, status: str, message: str) -> CheckResult:
    return CheckResult.model_validate({"name": name, "status": status, "message": message})
