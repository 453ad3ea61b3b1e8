"""JUnit, SARIF and Markdown: what CI reads is what the gate decided, whatever the names are."""

import re
from xml.etree import ElementTree

import pytest

from compressor.gate.gate import judge
from compressor.gate.outputs import MAX_LISTED, SARIF_RULES, to_junit, to_sarif, to_summary
from compressor.gate.policy import GatePolicy
from compressor.gate.result import GateResult
from compressor.reports.report import ValidityRow

NASTY = '<script>alert("&amp;")</script> | **x** `y` [z](http://e.vil) ]]> \x00\x1b[31m\ud800\n# t'

EVERY_RULE = {
    "clean": {"min_accuracy": 0.5},
    "worst_case": {"min_accuracy": 0.45},
    "attacks": {"pgd_sat": {"min_accuracy": 0.45}, "square": {"min_accuracy": 0.1}},
    "per_class": {"min_clean_accuracy": 0.5, "min_worst_case_accuracy": 0.01},
    "size": {"max_bytes": 10, "max_parameters": 10_000},
    "latency": {"max_median_ms": 10},
    "baseline": {"max_drop": 0.5},
}


def row(status="passed", name="zero_gradient", **changes):
    values = {"found": "9 of 10", "threshold": "alarm above 1 %", "p_value": None, "advice": "do"}
    return ValidityRow(name=name, status=status, **(values | changes))


@pytest.fixture
def result_of(make_report):
    """Judges a report of 1,000 images of which so many stand."""

    def result(num_standing=700, *, tables=EVERY_RULE, setting="inconclusive", **changes):
        report = make_report(
            (None,) * num_standing + ("pgd_sat",) * (1_000 - num_standing), **changes
        )
        head = {"schema": 1, "inconclusive": setting, "threat": {"norm": "linf", "epsilon": 0.03}}
        policy = GatePolicy.model_validate(head | tables)
        return judge(report, policy, baseline=make_report((None,) * 1_000))

    return result


@pytest.fixture
def invalid(result_of):
    return result_of(status="invalid", status_reason="an alarm", validity=(row("alarm"),))


WORST_CASE = {"worst_case": {"min_accuracy": 0.45}}


def cases(result):
    """Test case -> its outcome, of the JUnit form."""
    suite = ElementTree.fromstring(to_junit(result)).find("testsuite")
    found = {}
    for case in suite.findall("testcase"):
        tags = [child.tag for child in case if child.tag != "system-out"]
        found[case.get("name")] = tags[0] if tags else "passed"
    return found


# JUnit


def test_junit_has_one_case_a_check_and_a_rule(result_of):
    result = result_of()
    assert cases(result) == {
        "report": "passed",
        "threat": "passed",
        "protocol": "passed",
        "zero_gradient": "passed",
        "baseline": "passed",
        "clean.min_accuracy": "passed",
        "worst_case.min_accuracy": "passed",
        "attacks.pgd_sat.min_accuracy": "passed",
        "attacks.square.min_accuracy": "error",
        "per_class.min_clean_accuracy": "passed",
        "per_class.min_worst_case_accuracy": "passed",
        "size.max_bytes": "failure",
        "size.max_parameters": "passed",
        "latency.max_median_ms": "passed",
        "baseline.max_drop": "passed",
    }


@pytest.mark.parametrize(
    ("num_standing", "setting", "expected"),
    [
        (600, "warn", "passed"),
        (100, "warn", "failure"),
        (460, "inconclusive", "skipped"),
        (460, "warn", "skipped"),
        (460, "fail", "failure"),
    ],
)
def test_junit_of_each_verdict(result_of, num_standing, setting, expected):
    result = result_of(num_standing, tables=WORST_CASE, setting=setting)
    assert cases(result)["worst_case.min_accuracy"] == expected


def test_junit_of_an_invalid_evaluation_has_errors_and_no_failure(invalid):
    found = cases(invalid)
    assert (found["report"], found["zero_gradient"]) == ("error", "error")
    rules = {name: tag for name, tag in found.items() if name.startswith(("clean", "worst_case"))}
    assert set(rules.values()) == {"skipped"}
    assert "failure" not in found.values()


def test_junit_counts_and_messages(result_of):
    suite = ElementTree.fromstring(to_junit(result_of(100, tables=WORST_CASE))).find("testsuite")
    counts = {key: suite.get(key) for key in ("tests", "failures", "errors", "skipped")}
    assert counts == {"tests": "6", "failures": "1", "errors": "0", "skipped": "0"}
    failure = suite.find("testcase/failure")
    assert "at most 11.70 % with 95 % confidence, shown on 1000 images" in failure.get("message")


def test_every_form_says_which_images_and_which_model(result_of, make_report):
    facts = make_report().data.model_copy(update={"num_planned": 2_000, "num_available": 2_000})
    result = result_of(data=facts, status="incomplete", status_reason="the budget ended")
    images = "1000 of 2000 planned images of digits (content_sha256 eeeeeeeeeeee)"
    found = {"model_sha256": "b" * 64, "images": images}
    suite = ElementTree.fromstring(to_junit(result)).find("testsuite")
    properties = suite.findall("properties/property")
    assert {one.get("name"): one.get("value") for one in properties} == found
    assert suite[0].tag == "properties"
    (run,) = to_sarif(result, policy_uri="gate.toml")["runs"]
    assert run["properties"] == {"verdict": result.verdict} | found
    assert f"n = {images}." in to_summary(result).replace("\\", "")


def test_junit_of_a_check_that_was_not_run(result_of):
    found = cases(result_of(validity=(row("not_run", name="square_helps"),)))
    assert found["square_helps"] == "skipped"


# SARIF


def sarif_results(result):
    return to_sarif(result, policy_uri="ci/gate.toml")["runs"][0]["results"]


@pytest.mark.parametrize("num_standing", [0, 460, 1_000])
def test_sarif_has_what_the_standard_requires(result_of, num_standing):
    log = to_sarif(result_of(num_standing), policy_uri="ci/gate.toml")
    assert log["version"] == "2.1.0"
    assert log["$schema"].endswith("sarif-2.1.0.json")
    (run,) = log["runs"]
    driver = run["tool"]["driver"]
    assert driver["name"]
    assert [rule["id"] for rule in driver["rules"]] == list(SARIF_RULES)
    for rule in driver["rules"]:
        assert rule["shortDescription"]["text"].endswith(".")
        assert re.fullmatch("[a-z-]+", rule["name"])
    for found in run["results"]:
        assert driver["rules"][found["ruleIndex"]]["id"] == found["ruleId"]
        assert found["level"] in {"error", "warning", "note"}
        assert found["message"]["text"]
        (location,) = found["locations"]
        place = location["physicalLocation"]
        assert place["artifactLocation"]["uri"] == "ci/gate.toml"
        assert place["region"]["startLine"] == 1
        assert all(isinstance(text, str) for text in found["partialFingerprints"].values())


def test_sarif_identifiers_are_stable():
    assert {key: name for key, (name, _) in SARIF_RULES.items()} == {
        "RC001": "gradient-masking",
        "RC002": "nothing-verified",
        "RC003": "other-question",
        "RC004": "clean-accuracy",
        "RC005": "worst-case-accuracy",
        "RC006": "attack-accuracy",
        "RC007": "class-accuracy",
        "RC008": "size",
        "RC009": "latency",
        "RC010": "regression",
        "RC011": "newly-broken",
    }


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ({"clean": {"min_accuracy": 0.999}}, "RC004"),
        ({"worst_case": {"min_accuracy": 0.9}}, "RC005"),
        ({"attacks": {"pgd_sat": {"min_accuracy": 0.9}}}, "RC006"),
        ({"attacks": {"square": {"min_accuracy": 0.9}}}, "RC006"),
        ({"per_class": {"min_worst_case_accuracy": 0.9}}, "RC007"),
        ({"size": {"max_bytes": 1}}, "RC008"),
        ({"latency": {"max_median_ms": 1}}, "RC009"),
        ({"baseline": {"max_drop": 0.01}}, "RC010"),
        ({"worst_case": {"min_accuracy": 0.1, "protocol": "AutoAttack (compat)"}}, "RC002"),
        ({"size": {"max_bytes": 10**9}, "threat": {"norm": "l2", "epsilon": 0.1}}, "RC003"),
        ({"size": {"max_bytes": 10**9}, "data": {"content_sha256": "0" * 64}}, "RC003"),
    ],
)
def test_sarif_identifier_of_each_problem(result_of, table, expected):
    found = sarif_results(result_of(600, tables=table))
    assert [one["ruleId"] for one in found if one["ruleId"] != "RC011"] == [expected]


def test_sarif_of_an_alarm(invalid):
    found = sarif_results(invalid)
    assert {(one["ruleId"], one["level"]) for one in found} == {("RC001", "error")}


@pytest.mark.parametrize(("setting", "level"), [("inconclusive", "warning"), ("fail", "error")])
def test_sarif_level_of_what_is_undecided(result_of, setting, level):
    found = sarif_results(result_of(460, tables=WORST_CASE, setting=setting))
    assert [one["level"] for one in found if one["ruleId"] == "RC005"] == [level]


@pytest.mark.parametrize(("num_standing", "level"), [(998, "note"), (900, "warning")])
def test_sarif_tells_a_drop_from_luck(result_of, num_standing, level):
    (found,) = sarif_results(result_of(num_standing, tables=WORST_CASE))
    assert (found["ruleId"], found["level"]) == ("RC011", level)


def test_sarif_of_a_pass_is_empty(result_of):
    assert sarif_results(result_of(1_000, tables=WORST_CASE)) == []


# Markdown


def test_summary_says_the_verdict_first_then_every_rule(result_of):
    text = to_summary(result_of())
    assert text.startswith("## Robustness gate: FAIL\n")
    for part in (
        "| worst_case.min_accuracy | 70.00 % (700 of 1000) |",
        "| size.max_bytes | 25,672 bytes | exact |",
        "| zero_gradient | passed |",
        "300 newly broken and 0 newly fixed of 1000 images",
        "upper bound of the true robust accuracy",
    ):
        assert part in text


def test_summary_lists_some_of_the_broken_and_counts_the_others(result_of):
    text = to_summary(result_of(700))
    assert len(re.findall(r"^\| \d+ \| \w+ \| pgd_sat \|$", text, flags=re.MULTILINE)) == MAX_LISTED
    assert "And 280 more" in text


def test_summary_warns_where_undecided_goes_on(result_of):
    text = to_summary(result_of(460, tables=WORST_CASE, setting="warn"))
    assert "Warning: nothing was decided" in text
    assert "Warning" not in to_summary(result_of(460, tables=WORST_CASE))


def test_summary_of_an_invalid_evaluation_has_no_accuracy(invalid):
    text = to_summary(invalid)
    assert text.startswith("## Robustness gate: INVALID")
    assert "700" not in text
    assert "70.00" not in text


# Strangers


@pytest.fixture
def nasty(result_of, make_report):
    facts = make_report().data
    classes = (NASTY.replace("\ud800", ""), "b", "c", "d")
    name = NASTY.replace("\ud800", "")
    return result_of(
        name=name,
        protocol=name,
        status_reason=name,
        data=facts.model_copy(update={"class_names": classes, "num_planned": 1_000}),
        validity=(row(name=name, found=name),),
    )


def test_names_cannot_break_out_of_xml(nasty):
    root = ElementTree.fromstring(to_junit(nasty))
    assert not list(root.iter("script"))
    assert "\x00" not in to_junit(nasty)


def test_names_cannot_break_out_of_markdown(nasty):
    text = to_summary(nasty)
    assert "<script" not in text.replace("\\<script", "")
    assert "[z](" not in text.replace("\\[z", "")
    assert not re.search(r"^# t", text, flags=re.MULTILINE)
    table = [line for line in text.splitlines() if line.startswith("| zero") or "\\| " in line]
    assert all(len(re.findall(r"(?<!\\)\|", line)) in {0, 4, 6} for line in table)


def test_json_form_can_be_read_again(result_of):
    result = result_of()
    dumped = result.model_dump(mode="json", by_alias=True)
    assert GateResult.model_validate_json(result.model_dump_json(by_alias=True)) == result
    assert dumped["policy"]["schema"] == 1
    assert len(dumped["comparison"]["newly_broken"]) == 300
