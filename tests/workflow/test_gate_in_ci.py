"""What the CI examples run is run here, step by step, on reports of every verdict."""

import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml  # comes with pre-commit

import cli.main
from compressor.gate.policy import load_policy
from compressor.reports.report import ValidityRow, write_report

CHECKOUT = Path(cli.main.__file__).parents[1]
FOLDER = CHECKOUT / "examples" / "gate_in_ci"
CODES = {"pass": 0, "fail": 3, "inconclusive": 6, "invalid": 7}
ALARM = ValidityRow(
    name="zero_gradient", status="alarm", found="", threshold="", p_value=None, advice=""
)


def read(name):
    return yaml.safe_load((FOLDER / name).read_text())


@pytest.fixture
def workplace(make_report, tmp_path):
    """A repository with a run whose report is yet to be chosen, and our command on the path."""
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "robust-compress"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m cli.main "$@"\n')
    command.chmod(0o755)
    text = "schema = 1\n[worst_case]\nmin_accuracy = 0.45\n"
    text += '[threat]\nnorm = "linf"\nepsilon = "8/255"\n'
    (tmp_path / "gate.toml").write_text(text)
    for name, num_standing in (("pass", 400), ("fail", 150), ("inconclusive", 230)):
        kinds = (None,) * num_standing + ("pgd_sat",) * (500 - num_standing)
        write_report(make_report(kinds), tmp_path / "runs" / name / "report.json")
    alarm = {"status": "invalid", "status_reason": "an alarm", "validity": (ALARM,)}
    write_report(make_report(**alarm), tmp_path / "runs" / "invalid" / "report.json")
    return tmp_path


def run(script, workplace, **variables):
    """As a runner would: bash that ends at the first error, with nothing else in its environment.

    The job page and the outputs are files, which the runner has made before.
    """
    environment = {
        "PATH": f"{workplace / 'bin'}:{os.defpath}",
        "PYTHONPATH": str(CHECKOUT),
        "GITHUB_STEP_SUMMARY": str(workplace / "page.md"),
        "GITHUB_OUTPUT": str(workplace / "outputs"),
    }
    (workplace / "page.md").write_text("before\n")
    (workplace / "outputs").touch()
    return subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script],
        cwd=workplace,
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=60,
    )


def action_step(**inputs):
    """The script of the action and its environment, with the inputs and defaults filled in."""
    action = read("action.yml")
    (step,) = action["runs"]["steps"]
    values = {name: one.get("default") for name, one in action["inputs"].items()} | inputs
    filled = {
        key: re.sub(r"\$\{\{ inputs\.([\w-]+) \}\}", lambda found: values[found[1]], text)
        for key, text in step["env"].items()
    }
    assert not any("${{" in text for text in (*filled.values(), step["run"]))
    return step["run"], filled


def gitlab_step(**variables):
    pipeline = read("gitlab-ci.yml")
    return "\n".join(pipeline["robustness-gate"]["script"]), pipeline["variables"] | variables


@pytest.mark.parametrize(("name", "code"), CODES.items())
def test_action_ends_with_the_verdict_and_shows_it(workplace, name, code):
    script, variables = action_step(report=f"runs/{name}")
    done = run(script, workplace, **variables)
    assert done.returncode == code, done.stderr
    page = (workplace / "page.md").read_text()
    assert page.startswith(f"before\n## Robustness gate: {name.upper()}\n")
    assert (workplace / "outputs").read_text() == f"exit-code={code}\n"
    found = {path.name for path in (workplace / "gate").iterdir()}
    assert found == {"gate.json", "gate.xml", "gate.sarif", "gate.md"}


@pytest.mark.parametrize(("setting", "code"), [("fail", 3), ("warn", 0)])
def test_action_can_be_strict_or_lenient_where_nothing_is_decided(workplace, setting, code):
    script, variables = action_step(report="runs/inconclusive", inconclusive=setting)
    assert run(script, workplace, **variables).returncode == code


def test_an_undecided_gate_is_worth_what_the_policy_says_unless_told_otherwise(workplace):
    """The files must not soften a policy that forbids it."""
    policy = workplace / "gate.toml"
    policy.write_text('inconclusive = "fail"\n' + policy.read_text())
    script, variables = action_step(report="runs/inconclusive")
    assert run(script, workplace, **variables).returncode == 3
    script, variables = gitlab_step(RUN="runs/inconclusive")
    assert run(script, workplace, **variables).returncode == 3


def test_action_compares_with_a_baseline_whose_name_has_blanks(workplace):
    (workplace / "runs" / "pass").rename(workplace / "what ships now")
    script, variables = action_step(report="runs/fail", baseline="what ships now")
    assert run(script, workplace, **variables).returncode == 3
    assert "250 newly broken" in (workplace / "page.md").read_text()


def test_action_does_not_run_what_an_input_holds(workplace):
    script, variables = action_step(report="$(touch owned)`touch owned`; touch owned")
    assert run(script, workplace, **variables).returncode == 4
    assert not (workplace / "owned").exists()


def test_action_with_a_missing_report_says_so_and_still_sets_its_output(workplace):
    script, variables = action_step(report="runs/none")
    done = run(script, workplace, **variables)
    assert done.returncode == 4
    assert "runs/none does not exist" in done.stderr
    assert (workplace / "outputs").read_text() == "exit-code=4\n"
    assert (workplace / "page.md").read_text() == "before\n"


@pytest.mark.parametrize(("name", "code"), CODES.items())
def test_gitlab_job_ends_with_the_verdict_and_leaves_test_cases(workplace, name, code):
    script, variables = gitlab_step(RUN=f"runs/{name}")
    done = run(script, workplace, **variables)
    assert done.returncode == code, done.stderr
    job = read("gitlab-ci.yml")["robustness-gate"]
    suite = ElementTree.parse(workplace / job["artifacts"]["reports"]["junit"]).find("testsuite")
    assert int(suite.get("tests")) == 5
    assert (int(suite.get("failures")), int(suite.get("errors"))) == {
        "pass": (0, 0),
        "fail": (1, 0),
        "inconclusive": (0, 0),
        "invalid": (0, 2),
    }[name]
    assert job["allow_failure"] == {"exit_codes": [CODES["inconclusive"]]}


def test_gitlab_job_compares_with_a_baseline(workplace):
    script, variables = gitlab_step(RUN="runs/fail", BASELINE="runs/pass/report.json")
    assert run(script, workplace, **variables).returncode == 3
    assert "250 newly broken" in (workplace / "gate" / "gate.md").read_text()


def test_workflow_verifies_gates_and_keeps_what_the_gate_writes():
    steps = read("github-workflow.yml")["jobs"]["gate"]["steps"]
    by_name = {step.get("name"): step for step in steps}
    names = [step["name"] for step in steps if "name" in step]
    assert names == ["Install", "Verify", "Gate", "Keep the report", "Show alerts"]
    inputs = read("action.yml")["inputs"]
    given = by_name["Gate"]["with"]
    assert given.keys() <= inputs.keys()
    assert {name for name, one in inputs.items() if one.get("required")} <= given.keys()
    folder = inputs["folder"]["default"]
    assert folder in by_name["Keep the report"]["with"]["path"].split()
    assert by_name["Show alerts"]["with"]["sarif_file"] == f"{folder}/gate.sarif"


def commands():
    """Every command line of the examples but for the installation, which needs a network."""
    scripts = [
        step["run"]
        for step in read("github-workflow.yml")["jobs"]["gate"]["steps"]
        if "run" in step
    ]
    pipeline = read("gitlab-ci.yml")
    for job in ("robustness-verify", "robustness-gate"):
        scripts += [*pipeline[job].get("before_script", []), *pipeline[job]["script"]]
    scripts += re.findall("^robust-compress .*", (FOLDER / "README.md").read_text(), re.MULTILINE)
    return sorted({script.strip() for script in scripts if not script.startswith("pip install")})


@pytest.mark.parametrize("script", commands())
def test_every_other_command_parses(workplace, script):
    """With --help added, which ends before anything is done."""
    variables = {"RUN": "r", "POLICY": "p", "BASELINE": "b", "INCONCLUSIVE": "warn"}
    done = run(f"{script} --help", workplace, **variables)
    assert done.returncode == 0, done.stderr
    assert "Usage:" in done.stdout


def test_table_of_the_readme_has_the_exit_codes():
    rows = re.findall(r"^\| (\d) \| (\w+)", (FOLDER / "README.md").read_text(), re.MULTILINE)
    assert {name: int(code) for code, name in rows} == CODES | {"error": 4}


def test_linked_files_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", (FOLDER / "README.md").read_text()):
        assert (FOLDER / target).exists(), target
    load_policy(FOLDER / "../gate.toml")
