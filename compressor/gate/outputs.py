"""A gate's result for the machines and pages of CI: JUnit XML, SARIF and a Markdown summary.

Names and advice come from strangers; each form escapes them. Needs no torch.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any
from xml.etree import ElementTree

from compressor import __version__
from compressor.gate.paired import Comparison, describe_comparison
from compressor.gate.result import CheckResult, GateResult, RuleResult
from compressor.reports.markdown import markdown_table, plain

MAX_LISTED = 20
"""So many newly broken images are listed for people; the JSON has all."""

SARIF_RULES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "RC001": ("gradient-masking", "A check of the evaluation itself raised an alarm."),
        "RC002": ("nothing-verified", "What the policy asks for was never attacked."),
        "RC003": ("other-question", "The report or its baseline answers another question."),
        "RC004": ("clean-accuracy", "Accuracy without an attack must be shown to reach a limit."),
        "RC005": ("worst-case-accuracy", "Worst-case accuracy must be shown to reach a limit."),
        "RC006": ("attack-accuracy", "Accuracy under an attack must be shown to reach a limit."),
        "RC007": ("class-accuracy", "The accuracy of every class must be shown to reach a limit."),
        "RC008": ("size", "The model must not be larger than a limit."),
        "RC009": ("latency", "The model must not be slower than a limit."),
        "RC010": ("regression", "Worst-case accuracy must not be shown to drop by a limit."),
        "RC011": ("newly-broken", "Images broke that stood with the baseline."),
    }
)
"""Identifier -> name and what it says. An identifier never changes its meaning."""

_ID_OF_TABLE = MappingProxyType(
    {
        "clean": "RC004",
        "worst_case": "RC005",
        "attacks": "RC006",
        "per_class": "RC007",
        "size": "RC008",
        "latency": "RC009",
        "baseline": "RC010",
    }
)
_OTHER_QUESTION = {"threat", "data", "baseline"}


def to_junit(result: GateResult) -> str:
    """One test case per check and per rule.

    What makes the evaluation unbelievable is an error, a limit that is missed a failure. An
    undecided rule, or one that was not judged, is skipped; if the policy says that undecided is
    failed, it is a failure.
    """
    name = f"robust-compress gate: {_xml(result.name)}"
    suite = ElementTree.Element("testsuite", name=name)
    properties = ElementTree.SubElement(suite, "properties")
    for key, value in _circumstances(result).items():
        ElementTree.SubElement(properties, "property", name=key, value=_xml(value))
    for check in result.checks:
        _add_check(suite, check)
    for rule in result.rules:
        _add_rule(suite, rule, undecided=result.policy.inconclusive)
    suite.set("tests", str(len(suite.findall("testcase"))))
    for plural, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        suite.set(plural, str(len(suite.findall(f"testcase/{tag}"))))
    root = ElementTree.Element("testsuites")
    root.append(suite)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def to_sarif(result: GateResult, *, policy_uri: str) -> dict[str, Any]:
    """SARIF 2.1.0: what keeps the gate from passing, and newly broken images.

    Args:
        result: of the gate.
        policy_uri: where the policy lies in the repository; alerts are shown there.
    """
    return {
        "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "version": "2.1.0",
        "runs": [
            {
                "tool": {"driver": _driver()},
                "results": [
                    _sarif_result(place, policy_uri=policy_uri) for place in _problems(result)
                ],
                "properties": {"verdict": result.verdict, **_circumstances(result)},
            }
        ],
    }


def to_summary(result: GateResult) -> str:
    """The page of a CI job: verdict, rules, what broke, and what was not shown."""
    blocks = [
        f"## Robustness gate: {result.verdict.upper()}",
        f"**{plain(result.name)}** - {plain(result.reason)}",
        plain(f"n = {_images(result)}."),
    ]
    if result.verdict == "inconclusive" and result.policy.inconclusive == "warn":
        blocks.append("**Warning: nothing was decided; the policy lets this go on.**")
    rows = [
        (rule.rule, rule.measured, rule.shown, rule.required, rule.verdict.upper())
        for rule in result.rules
    ]
    blocks.append(_table(("rule", "measured", "shown", "required", "verdict"), rows))
    checks = [(check.name, check.status, check.message) for check in result.checks]
    blocks += ["### May the numbers be believed?", _table(("check", "status", "found"), checks)]
    if result.comparison is not None:
        blocks += _comparison_blocks(result.comparison)
    blocks += [plain(result.bounded), plain(result.caveat)]
    return "\n\n".join(blocks) + "\n"


def _circumstances(result: GateResult) -> dict[str, str]:
    """What the verdict is about."""
    return {"model_sha256": result.model_sha256, "images": _images(result)}


def _images(result: GateResult) -> str:
    return f"{result.images} (content_sha256 {result.data.content_sha256[:12]})"


def _add_check(suite: ElementTree.Element, check: CheckResult) -> None:
    case = _case(suite, "validity", check.name)
    if check.status == "not run":
        ElementTree.SubElement(case, "skipped", message=_xml(check.message))
    elif check.status != "passed":
        _problem(case, "error", check.status, check.message)


def _add_rule(suite: ElementTree.Element, rule: RuleResult, *, undecided: str) -> None:
    case = _case(suite, "rule", rule.rule)
    if rule.verdict == "fail" or (rule.verdict == "inconclusive" and undecided == "fail"):
        _problem(case, "failure", rule.verdict, rule.message)
    elif rule.verdict == "unverified":
        _problem(case, "error", rule.verdict, rule.message)
    elif rule.verdict != "pass":
        message = _xml(f"{rule.verdict}: {rule.message}")
        ElementTree.SubElement(case, "skipped", message=message)
    ElementTree.SubElement(case, "system-out").text = _xml(f"{rule.verdict}: {rule.message}")


def _case(suite: ElementTree.Element, kind: str, name: str) -> ElementTree.Element:
    classname = f"robust-compress.gate.{kind}"
    return ElementTree.SubElement(suite, "testcase", classname=classname, name=_xml(name))


def _problem(case: ElementTree.Element, tag: str, kind: str, message: str) -> None:
    ElementTree.SubElement(case, tag, type=kind, message=_xml(message)).text = _xml(message)


def _xml(text: str) -> str:
    """Without the characters that XML 1.0 has no way to write."""
    return re.sub("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text)


def _driver() -> dict[str, Any]:
    return {
        "name": "robust-compress gate",
        "version": __version__,
        "rules": [
            {"id": key, "name": name, "shortDescription": {"text": text}}
            for key, (name, text) in SARIF_RULES.items()
        ],
    }


def _problems(result: GateResult) -> Iterator[tuple[str, str, str, str]]:
    """(identifier, level, what it is about, message)."""
    for check in result.checks:
        if check.status in {"invalid", "unverified"}:
            key = "RC003" if check.name in _OTHER_QUESTION else "RC001"
            key = "RC002" if check.status == "unverified" else key
            yield key, "error", check.name, check.message
    for rule in result.rules:
        key = _ID_OF_TABLE[rule.rule.partition(".")[0]]
        if rule.verdict in {"fail", "unverified"}:
            yield key, "error", rule.rule, rule.message
        elif rule.verdict == "inconclusive":
            level = "error" if result.policy.inconclusive == "fail" else "warning"
            yield key, level, rule.rule, f"inconclusive: {rule.message}"
    if result.comparison is not None and result.comparison.newly_broken:
        level = "warning" if result.comparison.has_dropped else "note"
        yield "RC011", level, "newly broken", describe_comparison(result.comparison)


def _sarif_result(problem: tuple[str, str, str, str], *, policy_uri: str) -> dict[str, Any]:
    key, level, about, message = problem
    return {
        "ruleId": key,
        "ruleIndex": list(SARIF_RULES).index(key),
        "level": level,
        "message": {"text": f"{about}: {message}"},
        "locations": [
            {
                "physicalLocation": {
                    "artifactLocation": {"uri": policy_uri},
                    "region": {"startLine": 1},
                }
            }
        ],
        "partialFingerprints": {"robustCompressGate/v1": f"{key}/{about}"},
    }


def _comparison_blocks(comparison: Comparison) -> list[str]:
    blocks = [f"### Against {plain(comparison.baseline_name)}"]
    blocks.append(plain(describe_comparison(comparison)))
    listed = comparison.newly_broken[:MAX_LISTED]
    if listed:
        rows = [(str(image.index), image.label, image.attack) for image in listed]
        blocks.append(_table(("newly broken image", "class", "broken by"), rows))
    num_more = len(comparison.newly_broken) - len(listed)
    return [*blocks, f"And {num_more} more, in the JSON."] if num_more else blocks


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [[plain(cell) for cell in row] for row in rows]
    return markdown_table(header, cells, align="l" * len(header))
