"""The gate: bounds decide and estimates do not; what cannot be believed is never passed."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressor.errors import ExitCode
from compressor.gate.gate import decide_live, judge, judge_live
from compressor.gate.policy import GatePolicy, PolicyError
from compressor.gate.questions import looks
from compressor.gate.sequential import early_look, last_look
from compressor.proportions import Proportion
from compressor.reports.report import TargetFacts, TestFacts, ValidityRow


def policy(**tables):
    """A policy for the threat of the reports; without tables, a limit on the worst case of 45 %."""
    tables = tables or {"worst_case": {"min_accuracy": 0.45}}
    threat = {"norm": "linf", "epsilon": 8 / 255}
    return GatePolicy.model_validate({"schema": 1, "threat": threat} | tables)


@pytest.fixture
def standing(make_report):
    """Builds a report in which so many of so many images stand; the classes share them evenly."""

    def make(num_standing, num_images, *, num_wrong=0, **changes):
        num_broken = num_images - num_standing - num_wrong
        kinds = (None,) * num_standing + ("pgd_sat",) * num_broken + ("clean",) * num_wrong
        return make_report(kinds, **changes)

    return make


@pytest.fixture
def incomplete(standing):
    """As `standing`, of a report whose budget ended."""

    def make(num_standing, num_images, *, planned, **changes):
        facts = standing(1, 1).data.model_copy(update={"num_planned": planned})
        reason = "the budget ended"
        values = {"status": "incomplete", "status_reason": reason, "data": facts} | changes
        return standing(num_standing, num_images, **values)

    return make


def verdict(report, *, against=None, **tables):
    return judge(report, policy(**tables), baseline=against).verdict


ALARM = ValidityRow(
    name="zero_gradient",
    status="alarm",
    found="9 of 10 images have a zero gradient",
    threshold="alarm above 1 %",
    p_value=None,
    advice="attack with a margin loss",
)


# Accuracies


@pytest.mark.parametrize(
    ("num_standing", "num_images", "expected"),
    [
        (477, 1_000, "pass"),
        (476, 1_000, "inconclusive"),
        (460, 1_000, "inconclusive"),  # the estimate is above the limit
        (424, 1_000, "inconclusive"),
        (423, 1_000, "fail"),
        (3, 3, "inconclusive"),
        (4, 4, "pass"),
        (0, 5, "inconclusive"),
        (0, 6, "fail"),
        (1, 1, "inconclusive"),
    ],
)
def test_worst_case_is_decided_by_exact_bounds(standing, num_standing, num_images, expected):
    assert verdict(standing(num_standing, num_images)) == expected


@given(st.integers(1, 120), st.data(), st.sampled_from([0.051, 0.3, 0.45, 0.9]))
def test_verdict_is_that_of_the_binomial_tails(make_report, n, data, limit):
    """Against sums that share no code with the bounds."""
    k = data.draw(st.integers(0, n))
    terms = [math.comb(n, i) * limit**i * (1 - limit) ** (n - i) for i in range(n + 1)]
    as_many, as_few = math.fsum(terms[k:]), math.fsum(terms[: k + 1])
    expected = "pass" if as_many <= 0.05 else "fail" if as_few < 0.05 else "inconclusive"
    report = make_report((None,) * k + ("pgd_sat",) * (n - k))
    assert verdict(report, worst_case={"min_accuracy": limit}) == expected


def test_clean_and_attack_rules_take_their_own_counts(standing):
    report = standing(300, 1_000, num_wrong=100)
    row = report.attacks[0].model_copy(update={"accuracy": report.clean})
    report = report.model_copy(update={"attacks": (row, *report.attacks[1:])})
    result = judge(
        report,
        policy(
            clean={"min_accuracy": 0.85},
            worst_case={"min_accuracy": 0.35},
            attacks={"pgd_sat": {"min_accuracy": 0.85}},
        ),
    )
    assert [(rule.rule, rule.num_correct, rule.verdict) for rule in result.rules] == [
        ("clean.min_accuracy", 900, "pass"),
        ("worst_case.min_accuracy", 300, "fail"),
        ("attacks.pgd_sat.min_accuracy", 900, "pass"),
    ]
    assert result.verdict == "fail"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("apgd_t", "apgd_t tried only the images that earlier attacks had left"),
        ("pgd_sta", "pgd_sta was not run; the report has pgd_sat, apgd_t, square"),
    ],
)
def test_an_attack_without_an_accuracy_of_its_own_is_unverified(standing, name, says):
    result = judge(standing(90, 100), policy(attacks={name: {"min_accuracy": 0.1}}))
    assert (result.verdict, result.exit_code) == ("unverified", ExitCode.INVALID)
    assert says in result.reason


def test_every_message_has_n_the_bound_and_what_is_bounded(standing):
    rule = judge(standing(477, 1_000), policy()).rules[0]
    assert rule.message == (
        "the population accuracy under the attack suite AutoAttack-style (linf 8/255) is at least "
        "45.05 % with 95 % confidence, shown on 1000 images of which 477 are correct; at least "
        "45 % is required"
    )
    assert (rule.measured, rule.shown, rule.required) == (
        "47.70 % (477 of 1000)",
        ">= 45.05 %",
        ">= 45 %",
    )
    assert rule.lower_bound == Proportion(num_correct=477, num_total=1_000).lower_bound(0.95)


def test_bounds_are_rounded_so_that_they_claim_no_more(standing):
    rule = judge(standing(466, 1_000), policy()).rules[0]
    assert rule.lower_bound == pytest.approx(0.4396521)
    assert rule.shown == "43.96 % to 49.25 %"
    rule = judge(standing(555, 1_000), policy(worst_case={"min_accuracy": 0.57})).rules[0]
    assert rule.upper_bound == pytest.approx(0.5812045)
    assert rule.shown.endswith("to 58.13 %")


@pytest.mark.parametrize(("confidence", "expected"), [(0.9, "pass"), (0.95, "inconclusive")])
def test_confidence_is_that_of_the_policy(standing, confidence, expected):
    table = {"min_accuracy": 0.45}
    assert verdict(standing(473, 1_000), worst_case=table, confidence=confidence) == expected


# Classes


def test_every_class_must_pass(make_report):
    kinds = tuple("pgd_sat" if i % 4 == 2 and i < 100 else None for i in range(400))
    rule = judge(make_report(kinds), policy(per_class={"min_worst_case_accuracy": 0.9})).rules[0]
    assert rule.verdict == "fail"
    assert [part.verdict for part in rule.parts] == ["pass", "pass", "fail", "pass"]
    assert "1 of 4 classes: fail; the weakest of them, class two:" in rule.message
    assert (rule.num_correct, rule.num_total) == (75, 100)


def test_classes_clean_and_worst_case_differ(make_report):
    kinds = tuple("pgd_sat" if i % 4 == 1 else None for i in range(400))
    both = {"min_worst_case_accuracy": 0.5, "min_clean_accuracy": 0.5}
    rules = judge(make_report(kinds), policy(per_class=both)).rules
    assert [rule.verdict for rule in rules] == ["pass", "fail"]


def test_a_class_without_images_is_not_passed(standing):
    report = standing(100, 100)
    facts = report.data.model_copy(update={"class_names": (*report.data.class_names, "four")})
    rule = judge(
        standing(100, 100, data=facts), policy(per_class={"min_clean_accuracy": 0.5})
    ).rules[0]
    assert rule.verdict == "inconclusive"
    assert "class four" in rule.message


def test_no_class_fails_by_being_one_of_many(make_report):
    """Each of 4 classes has a quarter of the permitted error to fail with."""
    one, all_ = (
        Proportion(num_correct=34, num_total=100).upper_bound(c) for c in (0.95, 1 - 0.05 / 4)
    )
    limit = (one + all_) / 2
    kinds = tuple(None if i // 4 < 34 else "pgd_sat" for i in range(400))
    assert verdict(make_report(kinds), per_class={"min_worst_case_accuracy": limit}) == (
        "inconclusive"
    )


# Size and latency


@pytest.mark.parametrize(
    ("tables", "expected"),
    [
        ({"size": {"max_bytes": 25_672}}, "pass"),
        ({"size": {"max_bytes": 25_671}}, "fail"),
        ({"size": {"max_parameters": 6_417}}, "fail"),
        ({"latency": {"max_median_ms": 1.5}}, "pass"),
        ({"latency": {"max_median_ms": 1.4}}, "fail"),
        ({"size": {"max_bytes": 30_000}, "latency": {"max_median_ms": 1}}, "fail"),
    ],
)
def test_cost_rules(standing, tables, expected):
    assert verdict(standing(9, 10), **tables) == expected


@pytest.mark.parametrize("names", [(), ("clean teacher resnet18",), ("student a", "student b")])
def test_cost_that_was_not_measured_is_inconclusive(standing, names):
    row = standing(1, 1).cost[0]
    cost = tuple(row.model_copy(update={"name": name}) for name in names)
    assert verdict(standing(9, 10, cost=cost), latency={"max_median_ms": 100}) == "inconclusive"


@pytest.mark.parametrize(
    ("kind", "num_bytes"), [("run", 1_000), ("weights", 2_000), ("onnx", 3_000)]
)
def test_cost_is_that_of_what_was_verified(standing, kind, num_bytes):
    row = standing(1, 1).cost[0]
    sizes = {"clean teacher tiny": 9_000, "student tiny": 1_000, "tiny": 2_000, "m.onnx": 3_000}
    cost = tuple(row.model_copy(update={"name": n, "num_bytes": b}) for n, b in sizes.items())
    target = TargetFacts(
        kind=kind, architecture="tiny, width 1", sha256="b" * 64, source_sha256=None
    )
    result = judge(standing(9, 10, cost=cost, target=target), policy(size={"max_bytes": 1}))
    assert result.rules[0].measured == f"{num_bytes:,} bytes"


# What may not be judged


@pytest.mark.parametrize("num_standing", [0, 500, 1_000])
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"status": "invalid", "status_reason": "an alarm", "validity": (ALARM,)}, "invalid"),
        (
            {"status": "unverified", "status_reason": "no attack", "worst_case": None},
            "unverified",
        ),
    ],
)
def test_invalid_and_unverified_are_neither_passed_nor_failed(
    standing, num_standing, changes, expected
):
    result = judge(standing(num_standing, 1_000, **changes), policy())
    assert (result.verdict, result.exit_code) == (expected, ExitCode.INVALID)
    assert changes["status_reason"] in result.reason
    (rule,) = result.rules
    assert (rule.verdict, rule.measured, rule.shown) == ("not judged", "-", "-")
    assert rule.num_total is None
    assert str(num_standing) not in rule.message.replace("1000", "") or num_standing == 0


def test_an_alarm_says_what_was_found_and_what_to_do(standing):
    report = standing(9, 10, status="invalid", status_reason="an alarm", validity=(ALARM,))
    reason = judge(report, policy()).reason
    assert (
        "9 of 10 images have a zero gradient; alarm above 1 %; attack with a margin loss" in reason
    )


def test_no_policy_lets_an_undecided_gate_outweigh_an_alarm(standing):
    report = standing(9, 10, status="invalid", status_reason="an alarm", validity=(ALARM,))
    rules = {"worst_case": {"min_accuracy": 0.1}, "inconclusive": "warn"}
    assert judge(report, policy(**rules)).exit_code == ExitCode.INVALID


@pytest.mark.parametrize("status", ["verified", "incomplete"])
def test_without_a_white_box_attack_nothing_is_verified(incomplete, standing, status):
    """Whatever the report says about itself."""
    report = standing(10, 10) if status == "verified" else incomplete(10, 10, planned=20)
    rows = tuple(row.model_copy(update={"kind": "black-box"}) for row in report.attacks)
    classes = {"per_class": {"min_worst_case_accuracy": 0.1}}
    for change in ({"attacks": rows}, {"attacks": ()}, {"worst_case": None}):
        for tables in ({}, classes):
            assert verdict(report.model_copy(update=change), **tables) == "unverified"


@pytest.mark.parametrize(
    ("norm", "epsilon", "expected"),
    [
        ("linf", 8 / 255, "pass"),
        ("linf", 0.0313725490, "pass"),
        ("linf", 4 / 255, "pass"),
        ("linf", 9 / 255, "invalid"),
        ("l2", 8 / 255, "invalid"),
    ],
)
def test_threat_must_be_at_least_the_one_asked_for(standing, norm, epsilon, expected):
    threat = {"norm": norm, "epsilon": epsilon}
    rules = {"worst_case": {"min_accuracy": 0.45}, "threat": threat}
    result = judge(standing(90, 100), policy(**rules))
    assert result.verdict == expected
    assert (expected == "pass") == ("linf 8/255" not in result.reason)


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [("AutoAttack", "pass"), ("AutoAttack (compat)", "unverified"), ("auto", "unverified")],
)
def test_a_worst_case_over_other_attacks_is_unverified(standing, wanted, expected):
    rule = {"min_accuracy": 0.45, "protocol": wanted}
    assert verdict(standing(90, 100), worst_case=rule) == expected


WORST_CASE_RULES = {
    "worst_case": {"min_accuracy": 0.45},
    "per_class": {"min_worst_case_accuracy": 0.1},
    "baseline": {"max_drop": 0.9},
}


@pytest.mark.parametrize("name", WORST_CASE_RULES)
def test_weak_attacks_pass_only_where_the_policy_says_so(standing, name):
    """Whatever rule takes the worst case; without a word about the protocol it is AutoAttack's."""
    report = standing(900, 1_000).model_copy(update={"protocol": "worst of fgsm"})
    rules = {name: WORST_CASE_RULES[name]}
    result = judge(report, policy(**rules), baseline=report)
    assert result.verdict == "unverified"
    assert "protocol: the protocol is 'worst of fgsm', the policy asks for 'Auto" in result.reason
    content = rules | {"worst_case": {"min_accuracy": 0.45, "protocol": "worst of"}}
    assert verdict(report, against=report, **content) == "pass"


@pytest.mark.parametrize("name", WORST_CASE_RULES)
def test_autoattack_is_enough_where_less_is(standing, name):
    report = standing(900, 1_000)
    content = {"worst_case": {"min_accuracy": 0.45, "protocol": "worst of fgsm"}}
    rules = {name: WORST_CASE_RULES[name]} | content
    assert verdict(report, against=report, **rules) == "pass"


@pytest.mark.parametrize(
    "rules", [{"clean": {"min_accuracy": 0.5}}, {"attacks": {"pgd_sat": {"min_accuracy": 0.5}}}]
)
def test_rules_without_a_worst_case_take_any_attacks(standing, rules):
    report = standing(90, 100).model_copy(update={"protocol": "worst of fgsm"})
    assert verdict(report, **rules) == "pass"


@pytest.mark.parametrize("name", WORST_CASE_RULES)
def test_a_radius_that_is_too_small_is_invalid_for_every_rule(standing, name):
    report = standing(900, 1_000, epsilon_pixels=1 / 255)
    assert verdict(report, against=report, **{name: WORST_CASE_RULES[name]}) == "invalid"


@pytest.mark.parametrize(
    ("digits", "expected"), [("e" * 64, "pass"), ("e" * 12, "pass"), ("0" * 64, "invalid")]
)
def test_images_must_be_those_that_the_policy_names(standing, digits, expected):
    rules = {"worst_case": {"min_accuracy": 0.45}, "data": {"content_sha256": digits}}
    result = judge(standing(90, 100), policy(**rules))
    assert result.verdict == expected
    says = f"data: the images have content_sha256 {'e' * 64}, the policy asks for {'0' * 64}"
    assert (says in result.reason) == (expected == "invalid")


# Incomplete reports


def test_incomplete_reports_need_more_to_pass_and_say_so(incomplete, standing):
    found = {}
    for k in range(45, 80):
        result = judge(incomplete(k, 100, planned=1_000), policy())
        found.setdefault(result.verdict, k)
        assert "incomplete: 100 of 1000 planned images" in result.rules[0].message
        assert "incomplete: 100 of 1000 planned images" in result.bounded
    complete = next(k for k in range(45, 80) if verdict(standing(k, 100)) == "pass")
    assert found["pass"] > complete + 3
    bound = early_look(Proportion(num_correct=found["pass"], num_total=100), 0.95)
    assert (
        judge(incomplete(found["pass"], 100, planned=1_000), policy()).rules[0].lower_bound == bound
    )


def test_incomplete_reports_can_fail(incomplete):
    assert verdict(incomplete(5, 100, planned=1_000)) == "fail"


# The baseline


def test_drop_passes_fails_and_is_undecided(standing):
    before = standing(500, 1_000)
    for now, limit, expected in ((500, 0.02, "pass"), (480, 0.02, "inconclusive")):
        table = {"max_drop": limit}
        assert verdict(standing(now, 1_000), against=before, baseline=table) == expected


@pytest.mark.parametrize("changes", [{"looks": "many"}, {"status": "incomplete"}])
def test_a_drop_is_bounded_as_the_looser_of_both_reports(standing, changes):
    """A baseline that was stopped by what was found is as little a fixed sample as a report."""
    report, rule = standing(480, 1_000), {"max_drop": 0.019}
    before = standing(490, 1_000)
    assert verdict(report, baseline=rule, against=before) == "pass"
    stopped = standing(490, 1_000, **changes)
    assert verdict(report, baseline=rule, against=stopped) == "inconclusive"


def test_a_limit_on_the_drop_needs_a_baseline(standing):
    with pytest.raises(PolicyError, match="set baseline.report in the policy, or give --baseline"):
        judge(standing(9, 10), policy(baseline={"max_drop": 0.1}))


def test_a_drop_is_shown_even_if_it_is_allowed(standing):
    result = judge(
        standing(450, 1_000), policy(baseline={"max_drop": 0.2}), baseline=standing(500, 1_000)
    )
    assert result.verdict == "pass"
    assert len(result.comparison.newly_broken) == 50
    assert result.comparison.has_dropped


def test_a_baseline_without_a_limit_is_only_compared(standing):
    result = judge(standing(900, 1_000), policy(), baseline=standing(1_000, 1_000))
    assert result.verdict == "pass"
    assert result.comparison.has_dropped


def test_a_baseline_of_other_images_is_invalid(standing):
    report = standing(900, 1_000)
    other = report.data.model_copy(update={"content_sha256": "0" * 64})
    result = judge(
        report, policy(baseline={"max_drop": 0.5}), baseline=standing(900, 1_000, data=other)
    )
    assert result.verdict == "invalid"
    assert "baseline: their images (content_sha256) differ" in result.reason
    assert result.comparison is None
    assert [rule.verdict for rule in result.rules] == ["not judged"]


# The result


@pytest.mark.parametrize(
    ("setting", "code"),
    [("inconclusive", ExitCode.INCONCLUSIVE), ("fail", ExitCode.GATE_FAILED), ("warn", 0)],
)
def test_exit_code_of_an_undecided_gate(standing, setting, code):
    rules = {"worst_case": {"min_accuracy": 0.45}, "inconclusive": setting}
    result = judge(standing(460, 1_000), policy(**rules))
    assert (result.verdict, result.exit_code) == ("inconclusive", code)


@pytest.mark.parametrize(("num_standing", "code"), [(900, 0), (100, ExitCode.GATE_FAILED)])
@pytest.mark.parametrize("setting", ["inconclusive", "fail", "warn"])
def test_exit_codes_of_decisions_do_not_depend_on_that(standing, num_standing, code, setting):
    rules = {"worst_case": {"min_accuracy": 0.45}, "inconclusive": setting}
    assert judge(standing(num_standing, 1_000), policy(**rules)).exit_code == code


def test_a_failure_outweighs_what_is_undecided_or_unverified(standing):
    rules = {
        "clean": {"min_accuracy": 0.999},
        "worst_case": {"min_accuracy": 0.5},
        "attacks": {"square": {"min_accuracy": 0.1}},
    }
    result = judge(standing(400, 1_000), policy(**rules))
    assert [rule.verdict for rule in result.rules] == ["inconclusive", "fail", "unverified"]
    assert result.verdict == "fail"
    assert result.reason.startswith("worst_case.min_accuracy: ")


def test_result_says_what_it_is_about_and_what_it_does_not_show(standing):
    report = standing(900, 1_000)
    result = judge(report, policy())
    assert result.model_sha256 == report.target.sha256
    assert result.caveat == report.caveat
    facts = (result.data.source, result.data.content_sha256, result.data.index_sha256)
    assert facts == ("digits", "e" * 64, "f" * 64)
    assert result.images == "1000 images of digits"
    assert "AutoAttack-style (linf 8/255), each with 95 % confidence." in result.bounded


# Live


def test_live_decides_early_and_the_report_that_it_leaves_says_the_same(incomplete):
    expected = {70: "pass", 48: "undecided", 20: "fail"}
    for k, verdict_ in expected.items():
        report = incomplete(k, 100, planned=1_000)
        assert decide_live(report, policy()).verdict == verdict_
        kept = {"undecided": "inconclusive"}.get(verdict_, verdict_)
        assert judge_live(report, policy()).verdict == judge(report, policy()).verdict == kept


def test_live_fails_when_nothing_else_can_come(incomplete):
    """3 of 19 is not enough evidence, but the one image that is open cannot save it."""
    report = incomplete(3, 19, planned=20)
    assert decide_live(report, policy()).verdict == "fail"
    assert judge_live(report, policy()).verdict == "fail"


def test_live_at_the_planned_number_has_half_the_error_left(standing):
    report = standing(477, 1_000)
    assert judge(report, policy()).verdict == "pass"
    assert judge_live(report, policy()).verdict == decide_live(report, policy()).verdict
    assert judge_live(report, policy()).rules[0].lower_bound == last_look(
        Proportion(num_correct=477, num_total=1_000), 0.95
    )
    assert judge_live(report, policy()).verdict == "inconclusive"
    assert judge_live(standing(490, 1_000), policy()).verdict == "pass"


def test_live_does_not_pass_before_every_class_does(incomplete):
    rules = {
        "worst_case": {"min_accuracy": 0.45},
        "per_class": {"min_worst_case_accuracy": 0.65},
    }
    report = incomplete(70, 100, planned=1_000)
    assert len(looks(report, policy(**rules))) == 5
    assert decide_live(report, policy()).verdict == "pass"
    assert decide_live(report, policy(**rules)).verdict != "pass"


def test_live_waits_for_the_comparison_and_ends_on_a_model_that_is_too_large(incomplete):
    report = incomplete(70, 100, planned=1_000)
    rule = {"worst_case": {"min_accuracy": 0.45}}
    waits = policy(**rule, baseline={"max_drop": 0.01})
    assert decide_live(report, waits, baseline=report).verdict == "undecided"
    too_large = policy(**rule, size={"max_bytes": 1})
    assert decide_live(report, too_large).verdict == "fail"


def test_live_waits_for_an_image_that_the_baseline_has(incomplete, standing):
    """The baseline may be of few of the images that are planned."""
    report, before = incomplete(70, 100, planned=1_000), standing(4, 4)
    elsewhere = before.samples.model_copy(update={"index": (996, 997, 998, 999)})
    before = before.model_copy(update={"samples": elsewhere})
    assert judge_live(report, policy(), baseline=before).verdict == "invalid"
    assert decide_live(report, policy(), baseline=before).verdict == "undecided"


def test_live_with_an_alarm_ends_undecided(incomplete, standing):
    rows = {"validity": (ALARM,), "status": "invalid"}
    report = standing(900, 1_000, **rows)
    assert decide_live(report, policy()).verdict == "inconclusive"
    assert judge_live(report, policy()).verdict == "invalid"


def test_num_planned_of_a_class_leaves_room_for_all_that_are_open(incomplete):
    facts = TestFacts(**incomplete(1, 8, planned=40).data.model_dump())
    assert facts.num_planned == 40
    rule = {"per_class": {"min_clean_accuracy": 0.5}}
    planned = [one.num_planned for one in looks(incomplete(1, 8, planned=40), policy(**rule))]
    assert planned == [34] * 4


def test_a_watched_report_keeps_its_bound_when_it_is_judged_again(standing):
    once, watched = standing(53, 100), standing(53, 100, looks="many")
    assert judge(watched, policy()) == judge_live(once, policy())
    bounds = [judge(report, policy()).rules[0].lower_bound for report in (watched, once)]
    assert bounds[0] < bounds[1]
