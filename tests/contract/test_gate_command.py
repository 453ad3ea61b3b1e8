"""`robust-compress gate`: its exit codes, its files, its speed, and that it needs no torch."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import pytest

import cli.main
from compressor.errors import ExitCode
from compressor.reports.report import ValidityRow, write_report

THREAT = '[threat]\nnorm = "linf"\nepsilon = "8/255"\n'
POLICY = f"""
schema = 1
[clean]
min_accuracy = 0.7
[worst_case]
min_accuracy = 0.45
protocol = "AutoAttack"
{THREAT}
[size]
max_bytes = 30_000
"""
HEAVY = """torch torchvision numpy onnx onnxruntime onnxscript matplotlib jinja2 safetensors PIL
    tensorboard scipy""".split()
ALARM = ValidityRow(
    name="zero_gradient",
    status="alarm",
    found="9 of 10 images have a zero gradient",
    threshold="alarm above 1 %",
    p_value=None,
    advice="attack with a margin loss",
)


@pytest.fixture
def folder(make_report, tmp_path, monkeypatch):
    """A policy and reports of each verdict."""
    monkeypatch.chdir(tmp_path)
    Path("gate.toml").write_text(POLICY)

    def kinds(num_standing):
        return (None,) * num_standing + ("pgd_sat",) * (500 - num_standing)

    alarm = {"status": "invalid", "status_reason": "an alarm", "validity": (ALARM,)}
    nothing = {"status": "unverified", "status_reason": "no attack", "worst_case": None}
    for name, num_standing, changes in (
        ("pass", 400, {}),
        ("fail", 150, {}),
        ("inconclusive", 230, {}),
        ("invalid", 400, alarm),
        ("unverified", 400, nothing),
        ("other", 400, {"epsilon_pixels": 4 / 255}),
        ("before", 405, {}),
    ):
        write_report(make_report(kinds(num_standing), **changes), Path(f"{name}.json"))
    return tmp_path


def call(line):
    """The exit code of a command line that runs in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["robust-compress", *shlex.split(line)])
        try:
            cli.main.main()
        except SystemExit as end:
            return end.code or 0
    return 0


def python(script, *arguments):
    """A process of its own that imports this very project."""
    environment = {"PYTHONPATH": str(Path(cli.main.__file__).parents[1]), "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    return done.returncode, done.stdout, done.stderr


def words(text):
    return " ".join(re.sub("[─-╿]", " ", text).split())


CODES = {"pass": 0, "fail": 3, "inconclusive": 6, "invalid": 7, "unverified": 7, "other": 7}
FILES = "--out g.json --junit g.xml --sarif g.sarif --summary g.md"


@pytest.mark.parametrize(("name", "code"), CODES.items())
def test_verdict_comes_first_and_is_the_exit_code(folder, capsys, name, code):
    assert call(f"gate {name}.json --policy gate.toml") == code
    out, err = capsys.readouterr()
    first = "invalid" if name == "other" else name
    assert out.startswith(f"{first.upper()}  tiny, n = 500 images of digits\n")
    assert err == ""
    assert re.search("^Next: robust-compress ", out, flags=re.MULTILINE)
    assert "upper bound of the true robust accuracy" in out


@pytest.mark.parametrize("name", ["invalid", "unverified", "other"])
def test_what_cannot_be_believed_shows_no_number(folder, capsys, name):
    call(f"gate {name}.json --policy gate.toml")
    out = capsys.readouterr().out
    assert "80.00 %" not in out
    assert "NOT JUDGED" in out


@pytest.mark.parametrize(("name", "code"), CODES.items())
def test_files_say_what_the_exit_code_says(folder, capsys, name, code):
    assert call(f"gate {name}.json --policy gate.toml {FILES}") == code
    verdict = json.loads(Path("g.json").read_text())["verdict"]
    assert Path("g.md").read_text().startswith(f"## Robustness gate: {verdict.upper()}\n")
    suite = ElementTree.parse("g.xml").find("testsuite")
    counts = {key: int(suite.get(key)) for key in ("failures", "errors")}
    assert (counts["failures"] > 0) == (code == ExitCode.GATE_FAILED)
    assert (counts["errors"] > 0) == (code == ExitCode.INVALID)
    log = json.loads(Path("g.sarif").read_text())
    results = log["runs"][0]["results"]
    assert (results == []) == (code == 0)
    uris = {
        place["physicalLocation"]["artifactLocation"]["uri"]
        for result in results
        for place in result["locations"]
    }
    assert uris <= {"gate.toml"}


def test_json_is_one_object_and_the_file(folder, capfd):
    assert call("gate fail.json --policy gate.toml --json --out g.json") == ExitCode.GATE_FAILED
    out, err = capfd.readouterr()
    assert err == ""
    result = json.loads(out)
    assert result == json.loads(Path("g.json").read_text())
    assert result["exit_code"] == ExitCode.GATE_FAILED
    worst = next(rule for rule in result["rules"] if rule["rule"] == "worst_case.min_accuracy")
    assert (worst["num_correct"], worst["num_total"], worst["verdict"]) == (150, 500, "fail")


def test_no_file_holds_a_path_of_this_machine(folder, capsys):
    call(f"gate pass.json --policy {folder}/gate.toml --baseline {folder}/before.json {FILES}")
    for path in Path().glob("g.*"):
        assert str(folder) not in path.read_text()


@pytest.mark.parametrize(("setting", "code"), [("fail", 3), ("inconclusive", 6), ("warn", 0)])
def test_inconclusive_is_worth_what_is_asked_for(folder, capsys, setting, code):
    assert call(f"gate inconclusive.json --policy gate.toml --inconclusive {setting}") == code
    out = capsys.readouterr().out
    assert out.startswith("INCONCLUSIVE")
    assert ("WARNING: nothing was decided" in out) == (setting == "warn")


def test_baseline_lists_what_broke(folder, capsys):
    assert call("gate pass.json --policy gate.toml --baseline before.json") == 0
    out = words(capsys.readouterr().out)
    assert "5 newly broken and 0 newly fixed of 500 images" in out
    assert "404 zero pgd_sat" in out
    assert "and " not in out.partition("404 zero pgd_sat")[2].partition("Bounds")[0]


def test_long_lists_are_cut_but_counted(folder, capsys):
    call("gate fail.json --policy gate.toml --baseline before.json --out g.json")
    assert "and 245 more; --out FILE has all of them" in words(capsys.readouterr().out)
    comparison = json.loads(Path("g.json").read_text())["comparison"]
    assert len(comparison["newly_broken"]) == 255


def test_baseline_of_the_policy_is_relative_to_it(folder, capsys):
    Path("ci/kept").mkdir(parents=True)
    Path("before.json").rename("ci/kept/report.json")
    rule = '[baseline]\nreport="kept"\nmax_drop=0.05\n'
    Path("ci/gate.toml").write_text("schema=1\n" + rule + THREAT)
    assert call("gate pass.json --policy ci/gate.toml") == 0
    assert "baseline drop" in capsys.readouterr().out


def test_headline_has_the_planned_images_too(folder, capsys, make_report):
    facts = make_report().data.model_copy(update={"num_planned": 700, "source": "imagefolder"})
    changes = {"status": "incomplete", "status_reason": "the budget ended"}
    write_report(make_report((None,) * 500, data=facts, **changes), Path("some.json"))
    call("gate some.json --policy gate.toml")
    expected = "PASS  tiny, n = 500 of 700 planned images of imagefolder\n"
    assert capsys.readouterr().out.startswith(expected)


def test_run_folder_means_its_report(folder, capsys):
    Path("runs").mkdir()
    Path("pass.json").rename("runs/report.json")
    assert call("gate runs --policy gate.toml") == 0
    assert "Next: robust-compress export runs --format onnx" in capsys.readouterr().out


def test_checks_that_were_not_run_share_a_line_by_reason(folder, capsys, make_report):
    rows = [
        ALARM.model_copy(update={"name": name, "status": "not_run", "found": "", "advice": reason})
        for name, reason in (("noise", "too few"), ("transfer", "no teacher"), ("other", "too few"))
    ]
    write_report(make_report((None,) * 500, validity=tuple(rows)), Path("sparse.json"))
    assert call("gate sparse.json --policy gate.toml") == ExitCode.DONE
    out = capsys.readouterr().out
    assert "Not run: noise, other: too few.\nNot run: transfer: no teacher.\n" in out
    assert ALARM.threshold not in out


def test_names_are_not_markup(folder, capsys, make_report):
    report = make_report((None,) * 100, name="[red]x[/red]")
    write_report(report, Path("[bold].json"))
    rule = '[attacks."[red]a"]\nmin_accuracy=0.5\n'
    Path("gate.toml").write_text("schema=1\n" + rule + THREAT)
    assert call("gate '[bold].json' --policy gate.toml") == ExitCode.INVALID
    out = words(capsys.readouterr().out)
    assert "[red]x[/red], n = 100" in out
    assert "attacks.[red]a nothing - >= 50 % UNVERIFIED" in out


# The plan


def test_plan_without_a_report(folder, capsys):
    assert call("gate --policy gate.toml --plan --assume 0.8") == 0
    out = words(capsys.readouterr().out)
    assert re.search(r"clean 70 % 80\.00 % 176 \d+ ", out)
    assert "forward" in out


def test_plan_with_a_report_as_json(folder, capsys):
    assert call("gate pass.json --policy gate.toml --plan --json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert [rule["assumed_accuracy"] for rule in plan["rules"]] == [1.0, 0.8]
    assert plan["cost_per_image"]["source"] == "as measured by the report"


@pytest.mark.parametrize("name", ["invalid", "unverified"])
def test_plan_takes_no_accuracy_from_a_report_that_is_not_believed(folder, capsys, name):
    assert call(f"gate {name}.json --policy gate.toml --plan --json") == ExitCode.DONE
    plan = json.loads(capsys.readouterr().out)
    assert [rule["assumed_accuracy"] for rule in plan["rules"]] == pytest.approx([0.75, 0.5])
    assert call(f"gate {name}.json --policy gate.toml --plan") == ExitCode.DONE
    assert f"The report is {name}, so its accuracies are not taken" in capsys.readouterr().out


def test_plan_says_what_it_leaves_out(folder, capsys):
    Path("gate.toml").write_text("schema=1\n[per_class]\nmin_clean_accuracy=0.5\n")
    assert call("gate --policy gate.toml --plan") == 0
    assert "per_class is not planned: a report is needed" in words(capsys.readouterr().out)
    call("gate pass.json --policy gate.toml --plan")
    assert "not planned" not in capsys.readouterr().out


def test_plan_says_that_no_number_helps(folder, capsys):
    assert call("gate --policy gate.toml --plan --assume 0.3") == 0
    assert "No number of images is likely to show all rules" in words(capsys.readouterr().out)


# An environment with three packages, and speed

ISOLATED = f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {set(HEAVY)!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
from cli.main import main
main()
"""


@pytest.mark.parametrize("name", ["pass", "fail", "inconclusive", "invalid"])
def test_gate_needs_no_torch_or_numpy(folder, name):
    options = ("--policy", "gate.toml", "--baseline", "before.json", *FILES.split())
    code, out, err = python(ISOLATED, "gate", f"{name}.json", *options)
    assert (code, err) == (CODES[name], "")
    assert out.startswith(name.upper())
    assert {path.name for path in Path().glob("g.*")} == {"g.json", "g.xml", "g.sarif", "g.md"}


def test_plan_needs_no_torch_or_numpy(folder):
    code, out, err = python(ISOLATED, "gate", "--policy", "gate.toml", "--plan")
    assert (code, err) == (0, "")
    assert "Images for a decision" in out


def test_isolation_works(folder):
    code, _, err = python(ISOLATED.replace("from cli.main import main\nmain()", "import torch"))
    assert code == 1
    assert "No module named 'torch'" in err


def test_gate_is_fast(folder):
    """In seconds of the processor, beside what every command needs: neither a loaded machine nor
    a slow one changes their ratio much (seconds of the clock: tests/bench/bench_startup.py)."""
    measure = (
        "import resource, subprocess, sys\n"
        "subprocess.run([sys.executable, *sys.argv[1:]], check=True, stdout=subprocess.DEVNULL)\n"
        "used = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        "print(used.ru_utime + used.ru_stime)"
    )

    def seconds(*arguments):
        code, out, err = python(measure, *arguments)
        assert code == 0, err
        return float(out)

    needed, used = [], []
    while len(used) < 5 and not (used and min(used) < 4 * min(needed)):
        needed.append(seconds("-c", "import typer, rich.console, rich.table"))
        used.append(seconds("-m", "cli.main", "gate", "pass.json", "--policy", "gate.toml"))
    assert min(used) < 4 * min(needed), (needed, used)


# What is refused


class Bad(NamedTuple):
    """What is spoilt, the command, its exit code, and what it says."""

    spoil: object
    command: str
    code: int
    says: str


def nothing():
    pass


def table(path, *place, value):
    """Sets one value deep in a JSON file."""

    def change():
        whole = inner = json.loads(Path(path).read_text())
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = value
        Path(path).write_text(json.dumps(whole))

    return change


def text(path, content):
    return lambda: Path(path).write_text(content)


def truncated(path):
    return lambda: Path(path).write_text(Path(path).read_text()[:500])


GATE = "gate pass.json --policy gate.toml"
RULES = "schema=1\n[clean]\nmin_accuracy=0.4\n"
OF_LIVE = {
    "--samples": "5",
    "--max-seconds": "5",
    "--data": "digits",
    "--device": "cpu",
    "--threads": "1",
}
OF_FILES = {f"--{name}": f"g.{name}" for name in ("out", "junit", "sarif", "summary")}
OF_VERDICT = {"--baseline": "before.json", "--inconclusive": "fail"}
BAD = {
    "no policy": Bad(nothing, "gate pass.json", 2, "start from examples/gate.toml"),
    "no report": Bad(nothing, "gate --policy gate.toml", 2, "which REPORT, RUN or FILE?"),
    "setting": Bad(nothing, f"{GATE} --inconclusive ok", 2, "'ok' is not one of fail, inconc"),
    **{
        f"without live: {name}": Bad(
            nothing,
            f"{GATE} {name} {value}",
            2,
            f"{name} would have no effect on a report, which is judged as it is; add --live",
        )
        for name, value in OF_LIVE.items()
    },
    **{
        f"with a plan: {name}": Bad(
            nothing,
            f"{GATE} --plan {name} {value}",
            2,
            f"{name} would have no effect on --plan, which attacks nothing and writes no file",
        )
        for name, value in {**OF_LIVE, **OF_FILES, **OF_VERDICT, "--live": ""}.items()
    },
    "two idle options": Bad(
        nothing, f"{GATE} --samples 5 --threads 1", 2, "--samples, --threads would have no effect"
    ),
    "assumption": Bad(
        nothing, f"{GATE} --assume 0", 2, "--assume would have no effect on a verdict; add --plan"
    ),
    "assumption of an attack": Bad(nothing, f"{GATE} --live --assume 0.5", 2, "--assume would"),
    "unknown option": Bad(nothing, f"{GATE} --fast", 2, "--fast"),
    "missing report": Bad(nothing, "gate no.json --policy gate.toml", 4, "no.json does not exist"),
    "folder without one": Bad(
        lambda: Path("empty").mkdir(), "gate empty --policy gate.toml", 4, "does not exist"
    ),
    "missing policy": Bad(nothing, "gate pass.json --policy no.toml", 4, "no.toml does not exist"),
    "truncated": Bad(truncated("pass.json"), GATE, 4, "pass.json cannot be read"),
    "other schema": Bad(table("pass.json", "schema_version", value=9), GATE, 4, "of schema 2"),
    "contradiction": Bad(
        table("pass.json", "worst_case", "num_correct", value=499), GATE, 4, "499 of 500"
    ),
    "an attack that flatters": Bad(
        table("pass.json", "attacks", 0, "accuracy", "num_correct", value=500), GATE, 4, "accuracy"
    ),
    "a class that hides": Bad(
        table("pass.json", "samples", "label", 499, value=-1), GATE, 4, "a label in samples"
    ),
    "not a number": Bad(
        table("pass.json", "epsilon_pixels", value=float("nan")), GATE, 4, "epsilon_pixels"
    ),
    "huge number": Bad(
        table("pass.json", "clean", "num_total", value=10**400), GATE, 4, "is not a report"
    ),
    "hidden alarm": Bad(
        table("invalid.json", "status", value="verified"),
        "gate invalid.json --policy gate.toml",
        4,
        "does not go with the validity checks",
    ),
    "unknown key": Bad(text("gate.toml", RULES + "mad=1"), GATE, 4, "clean.mad: unknown key"),
    "limit": Bad(text("gate.toml", RULES.replace("0.4", "40")), GATE, 4, "less than 1 (got 40)"),
    "no rule": Bad(text("gate.toml", "schema=1"), GATE, 4, "everything would pass"),
    "no threat": Bad(
        text("gate.toml", "schema=1\n[worst_case]\nmin_accuracy=0.4"), GATE, 4, "add [threat] with"
    ),
    "nothing about classes": Bad(
        text("gate.toml", RULES + "[per_class]"), GATE, 4, "[per_class] is empty, so it limits"
    ),
    "no toml": Bad(text("gate.toml", "= 1"), GATE, 4, "is not valid TOML"),
    "no baseline": Bad(
        text("gate.toml", RULES + '[baseline]\nreport="gone.json"'),
        GATE,
        4,
        "gone.json does not exist",
    ),
    "drop without a baseline": Bad(
        text("gate.toml", f"schema=1\n{THREAT}[baseline]\nmax_drop=0.1"),
        GATE,
        4,
        "give --baseline REPORT",
    ),
    "damaged baseline": Bad(
        truncated("before.json"), f"{GATE} --baseline before.json", 4, "before.json cannot be read"
    ),
    "folder as a file": Bad(lambda: Path("g.xml").mkdir(), f"{GATE} --junit g.xml", 4, "g.xml"),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_bad_input(folder, capsys, bad):
    bad.spoil()
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    assert call(bad.command) == bad.code
    out, err = capsys.readouterr()
    message = words(err)
    assert bad.says in message
    assert "Traceback" not in out + err
    assert len(re.findall("Error:|Usage:", message)) == 1
    assert "PASS" not in out or "g.xml" in bad.command
    after = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    assert after == before


@pytest.mark.parametrize("name", ["missing report", "no rule", "no policy"])
def test_bad_input_as_json(folder, capsys, name):
    bad = BAD[name]
    bad.spoil()
    assert call(f"{bad.command} --json") == bad.code
    out, err = capsys.readouterr()
    error = json.loads(out)
    assert (error["exit_code"], err) == (bad.code, "")
    assert bad.says in words(error["message"])
