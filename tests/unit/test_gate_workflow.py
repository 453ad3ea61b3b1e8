"""gate_live: attacks as long as the policy is undecided, and no image more than a chunk."""

import shutil
from dataclasses import replace

import pytest

import compressor.gate_workflow
from compressor.attacks.apgd import APGD
from compressor.errors import BudgetSpentError, RunError, UsageError
from compressor.gate.gate import judge_live
from compressor.gate.policy import GatePolicy, PolicyError, with_baseline
from compressor.gate_workflow import CHUNK_SIZE, gate_live
from compressor.performance_settings import PerformanceSettings
from compressor.reports.report import ValidityRow, read_report
from compressor.run_directory import RunDirectory
from compressor.verification.request import build_stages

SETTINGS = PerformanceSettings(device="cpu", training_dtype="float32", num_threads=1)
NUM_TEST_IMAGES = 497
CHECK = ValidityRow(
    name="planted_check",
    status="alarm",
    found="9 of 10",
    threshold="alarm above 1 %",
    p_value=None,
    advice="attack again",
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, train_on_digits):
    """Knows digits, and falls to any attack, so that the whole cascade is quick."""
    out = tmp_path_factory.mktemp("runs") / "gated"
    return train_on_digits(out, epochs=3, threat={"epsilon_pixels": "64/255"})


@pytest.fixture
def run(trained, tmp_path, monkeypatch):
    """A run of one's own; neither latencies, nor other radii, nor figures."""
    workflow = "compressor.verification_workflow"
    for module in (workflow, "compressor.gate_workflow"):
        monkeypatch.setattr(f"{module}.cost_rows", lambda *_: ())
    monkeypatch.setattr(f"{workflow}.accuracy_curve", lambda *_, **__: ())
    monkeypatch.setattr(f"{workflow}.write_html", lambda path, *_, **__: path.touch())
    return RunDirectory(shutil.copytree(trained.path, tmp_path / "run"))


def policy(**tables):
    """For the radius of the run, unless the tables have another."""
    threat = {"norm": "linf", "epsilon": "64/255"}
    return GatePolicy.model_validate({"schema": 1, "threat": threat} | tables)


def limit(min_accuracy):
    return {"min_accuracy": min_accuracy}


def live(run, rules, **changes):
    return gate_live(run, rules, settings=SETTINGS, **changes)


def journals(run):
    return list(run.path.glob(".verification-*"))


def test_a_generous_policy_passes_early(run):
    result = live(run, policy(clean=limit(0.6)))
    assert (result.verdict, result.exit_code) == ("pass", 0)
    assert result.num_images == CHUNK_SIZE < NUM_TEST_IMAGES == result.num_planned
    report = read_report(run.report("live").json)
    assert report.status == "incomplete"
    assert report.status_reason == (
        "the gate was decided after 50 of 497 images, a random part of them"
    )
    assert report.protocol == "AutoAttack-style"
    assert judge_live(report, policy(clean=limit(0.6))) == result


@pytest.mark.parametrize(("asked", "planned"), [(60, 60), (5_000, NUM_TEST_IMAGES)])
def test_at_most_so_many_images_are_planned(run, asked, planned):
    result = live(run, policy(clean=limit(0.6)), num_images=asked)
    assert (result.verdict, result.num_planned) == ("pass", planned)


def test_a_pass_takes_as_many_chunks_as_it_needs(run):
    """Nearer to the limit more images are needed, but not all."""
    result = live(run, policy(clean=limit(0.85)))
    assert result.verdict == "pass"
    assert CHUNK_SIZE < result.num_images < NUM_TEST_IMAGES
    assert result.num_images % CHUNK_SIZE == 0
    assert result.rules[0].lower_bound >= 0.85


def test_an_impossible_limit_fails_early(run):
    result = live(run, policy(clean=limit(0.6), worst_case=limit(0.9)))
    assert (result.verdict, result.exit_code) == ("fail", 3)
    assert result.num_images == CHUNK_SIZE
    assert {rule.rule: rule.verdict for rule in result.rules} == {
        "clean.min_accuracy": "pass",
        "worst_case.min_accuracy": "fail",
    }


def test_what_cannot_pass_any_more_ends_early(run, monkeypatch):
    """No number of the images that are planned shows such an accuracy, and they are not refuted."""
    monkeypatch.setattr(compressor.gate_workflow, "CHUNK_SIZE", 10)
    result = live(run, policy(clean=limit(0.97)), num_images=60)
    assert (result.verdict, result.exit_code) == ("inconclusive", 6)
    assert result.num_images < 60


def test_worst_case_is_judged_live_too(run, monkeypatch):
    """At a radius where images stand; all attacks are cut short, as each costs 7,000 passes."""

    def build(*arguments, **options):
        return tuple(
            replace(stage, search=APGD(threat=stage.search.threat, num_steps=3))
            for stage in build_stages(*arguments, **options)
        )

    monkeypatch.setattr("compressor.verification.request.build_stages", build)
    check = CHECK.model_copy(update={"status": "passed"})
    workflow = "compressor.verification_workflow"
    monkeypatch.setattr(f"{workflow}.check_verification", lambda *_, **__: (check,))
    monkeypatch.setattr(compressor.gate_workflow, "CHUNK_SIZE", 20)
    threat = {"norm": "linf", "epsilon": "2/255"}
    rules = policy(worst_case=limit(0.5) | {"protocol": "AutoAttack"}, threat=threat)
    result = live(run, rules)
    assert (result.verdict, result.num_images) == ("pass", 20)
    report = read_report(run.report("live").json)
    assert report.epsilon_pixels == pytest.approx(2 / 255)
    assert report.worst_case.num_correct > 15


def test_attacks_of_the_policy_are_run_beside_the_cascade(run):
    rules = policy(attacks={"fgsm": limit(0.9), "pgd_sat": limit(0.9)})
    result = live(run, rules)
    assert result.verdict == "fail"
    names = [row.name for row in read_report(run.report("live").json).attacks]
    assert names == ["fgsm", "pgd_sat", "apgd_ce", "apgd_t", "fab_t", "square"]


def test_only_the_files_of_the_live_report_are_written(run):
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    live(run, policy(clean=limit(0.6)))
    after = {path.name for path in run.path.rglob("*") if path.is_file() and path not in before}
    assert after == {f"report-live.{kind}" for kind in ("json", "md", "html")} | {
        "samples-live.csv"
    }
    assert all(path.read_bytes() == content for path, content in before.items())


def test_an_alarm_after_the_decision_is_no_pass(run, monkeypatch):
    monkeypatch.setattr(
        "compressor.verification_workflow.check_verification", lambda *_, **__: (CHECK,)
    )
    result = live(run, policy(clean=limit(0.6)))
    assert (result.verdict, result.exit_code) == ("invalid", 7)
    assert {rule.verdict for rule in result.rules} == {"not judged"}


# Budget


class Clock:
    """Every look at it is a hundredth of a second later."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        self.now += 0.01
        return self.now

    def perf_counter(self):
        return self.now


def test_a_budget_that_ends_before_the_first_chunk_decides_nothing(run, monkeypatch):
    monkeypatch.setattr("compressor.verification.verification.time", Clock())
    with pytest.raises(BudgetSpentError, match=r"the budget of 0\.1 seconds is spent"):
        live(run, policy(clean=limit(0.6)), max_seconds=0.1)
    assert not run.report("live").json.exists()
    assert len(journals(run)) == 1


def test_a_budget_that_ends_before_the_decision_is_inconclusive_and_goes_on(run, monkeypatch):
    undecided = policy(clean=limit(0.93))
    monkeypatch.setattr("compressor.verification.verification.time", Clock())
    first = live(run, undecided, max_seconds=1)
    assert (first.verdict, first.exit_code) == ("inconclusive", 6)
    assert CHUNK_SIZE <= first.num_images < NUM_TEST_IMAGES
    reason = read_report(run.report("live").json).status_reason
    assert reason.startswith(f"the budget ended after {first.num_images} of 497 images")
    assert len(journals(run)) == 1

    first_table = run.report("live").samples.read_text()
    monkeypatch.setattr("compressor.verification.verification.time", Clock())
    second = live(run, undecided, max_seconds=1)
    assert second.num_images > first.num_images
    assert run.report("live").samples.read_text().startswith(first_table)


def test_a_decision_leaves_no_journal(run):
    live(run, policy(clean=limit(0.6)))
    assert journals(run) == []


# What is refused before anything is attacked


def fail(*_, **__):
    raise AssertionError("an attack was begun")


@pytest.fixture
def no_attack(monkeypatch):
    monkeypatch.setattr("compressor.gate_workflow.attack_chunks", fail)


def test_a_missing_baseline_is_missed_first(run, no_attack, tmp_path):
    rules = with_baseline(policy(clean=limit(0.6)), tmp_path / "before.json")
    with pytest.raises(RunError, match=r"before\.json does not exist"):
        live(run, rules)


def test_an_attack_that_does_not_exist_is_missed_first(run, no_attack):
    with pytest.raises(UsageError, match="there is no attack pgd_20"):
        live(run, policy(attacks={"pgd_20": limit(0.5)}))


@pytest.mark.parametrize("name", ["apgd_t", "square", "papers", "autoattack"])
def test_an_attack_without_an_accuracy_of_its_own_is_missed_first(run, no_attack, name):
    """The live gate runs the whole cascade, in which it tries what others have left."""
    says = f"attacks.{name}: gate --live cannot show .* only fgsm, pgd_sat, pgd_trades, cw_inf try"
    with pytest.raises(PolicyError, match=says):
        live(run, policy(attacks={"fgsm": limit(0.5), name: limit(0.5)}))


def test_other_images_than_the_policy_names_are_missed_first(run, no_attack):
    with pytest.raises(PolicyError, match=f"data: .* the policy asks for {'0' * 64}"):
        live(run, policy(clean=limit(0.5), data={"content_sha256": "0" * 64}))


def test_a_protocol_that_is_not_run_live_is_missed_first(run, no_attack):
    rules = policy(worst_case=limit(0.5) | {"protocol": "AutoAttack (compat)"})
    with pytest.raises(PolicyError, match="protocol: the protocol is 'AutoAttack-style', the pol"):
        live(run, rules)


def in_data(**changes):
    return lambda report: {"data": report.data.model_copy(update=changes)}


def in_samples(**changes):
    return lambda report: {"samples": report.samples.model_copy(update=changes)}


OTHER_BASELINES = {
    "images": in_data(content_sha256="0" * 64),
    "classes": in_data(class_names=tuple("abcdefghij")),
    "epsilon_pixels": lambda _: {"epsilon_pixels": 1 / 255},
    "protocol": lambda _: {"protocol": "AutoAttack (compat)"},
    "no image in common": in_samples(index=tuple(range(1_000, 1_050))),
    "other labels": in_samples(label=(0,) * 50),
}


@pytest.mark.parametrize("says", OTHER_BASELINES)
def test_a_baseline_of_another_question_is_missed_first(run, monkeypatch, says):
    rules = policy(clean=limit(0.6))
    live(run, rules)
    report = read_report(run.report("live").json)
    other = report.model_copy(update=OTHER_BASELINES[says](report))
    monkeypatch.setattr(compressor.gate_workflow, "read_baseline", lambda _: other)
    monkeypatch.setattr(compressor.gate_workflow, "attack_chunks", fail)
    with pytest.raises(PolicyError, match=f"nothing was attacked.* baseline: .*{says}"):
        live(run, rules)
