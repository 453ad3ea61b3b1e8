"""`robust-compress verify` for every kind of target and every way to end: codes, words, JSON."""

import io
import json
import re
import shlex
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

import cli.main
from cli.output import Output
from cli.verification_display import verification_display
from compressor.performance_settings import PerformanceSettings
from compressor.reports.report import ValidityRow, read_report
from compressor.verification.progress import StageProgress, VerificationProgress
from compressor.verification.request import VerificationRequest
from compressor.verification_workflow import verify
from exporters.request import ExportRequest
from exporters.workflow import export_run
from tests.onnx_files import without_twin

SETTINGS = PerformanceSettings(device="cpu", training_dtype="float32", num_threads=1)
ALARM = ValidityRow(
    name="planted_alarm",
    status="alarm",
    found="9 of 10",
    threshold="alarm above 1 %",
    p_value=None,
    advice="attack again",
)
FILE = "run/exports/model.fp32.onnx"
QUICK = "--samples 30 --threads 1"


@pytest.fixture(scope="module")
def materials(tmp_path_factory, train_on_digits):
    folder = tmp_path_factory.mktemp("materials")
    run = train_on_digits(folder / "run", name="mine", threat={"epsilon_pixels": "48/255"})
    export_run(ExportRequest(run=run, settings=SETTINGS))
    without_twin(run.onnx("fp32"), folder / "opaque.onnx")
    request = VerificationRequest(
        target=str(run.path), settings=SETTINGS, folder=folder / "expected"
    )
    verify(replace(request, attacks=("fgsm", "cw_inf"), num_images=30))
    return folder


@pytest.fixture
def folder(materials, tmp_path, monkeypatch):
    """Where commands run: a run with its export, and what is made of it by itself.

    Neither latencies, nor other radii, nor figures are made.
    """
    shutil.copytree(materials / "run", tmp_path / "run")
    shutil.copy(materials / "run/model.safetensors", tmp_path / "weights.safetensors")
    shutil.copy(materials / "run/exports/model.fp32.onnx", tmp_path / "far.onnx")
    shutil.copy(materials / "opaque.onnx", tmp_path)
    monkeypatch.chdir(tmp_path)
    workflow = "compressor.verification_workflow"
    monkeypatch.setattr(f"{workflow}.cost_rows", lambda *_: ())
    monkeypatch.setattr(f"{workflow}.accuracy_curve", lambda *_, **__: ())
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


def words(text):
    return " ".join(re.sub("[─-╿]", " ", text).split())


# Ways to end


class Clock:
    """Every look at it is a hundredth of a second later."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        self.now += 0.01
        return self.now

    def perf_counter(self):
        return self.now


def nothing(patch):
    pass


def budget(patch):
    patch.setattr("compressor.verification.verification.time", Clock())


def alarm(patch):
    target = "compressor.verification_workflow.check_verification"
    patch.setattr(target, lambda *_, **__: (ALARM,))


def interruption(patch):
    def interrupt(*_, **__):
        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            signal.signal(signal.SIGINT, before)

    patch.setattr("compressor.verification.verification.run_stage", interrupt)


SOME = "--attacks fgsm,pgd_sat"
ENDS = {
    "verified": (
        nothing,
        f"run {SOME}",
        0,
        "VERIFIED, ",
        r"robust-compress gate run/report-30-fgsm-pgd_sat\.json --policy gate\.toml",
    ),
    "incomplete": (
        budget,
        f"run {SOME} --batch-size 5 --max-seconds 1",
        6,
        "INCOMPLETE, ",
        "the same command again",
    ),
    "invalid": (
        alarm,
        f"run {SOME}",
        7,
        "INVALID: validity checks raised an alarm: planted_alarm",
        r"xdg-open run/report-30-fgsm-pgd_sat\.html",
    ),
    "file alone": (
        nothing,
        f"far.onnx --data digits {SOME}",
        0,
        "VERIFIED, ",
        r"robust-compress gate runs/verify-far-\w+/report-30-fgsm-pgd_sat\.json --policy .*",
    ),
    "file alone, without a twin": (
        nothing,
        "opaque.onnx --data digits",
        7,
        "UNVERIFIED: no white-box attack was possible, because it has no differentiable twin",
        r"robust-compress verify opaque\.onnx --source RUN",
    ),
    "black box alone": (
        nothing,
        "run --attacks square --epsilon 120/255",
        7,
        "UNVERIFIED: no white-box attack was run",
        "robust-compress verify run",
    ),
}
"""How it comes about, the arguments, the exit code, the last title, the command to type next."""

ERRORS = {
    "budget too small": (
        budget,
        f"run {SOME} --batch-size 20 --max-seconds 1 --epsilon 1/255 --attacks apgd_ce",
        6,
        "BudgetSpentError",
        "before the first 20 images were done; what is finished is kept: run the same command",
    ),
    "interrupted": (
        interruption,
        f"run {SOME}",
        130,
        "InterruptedRunError",
        "interrupted; what is finished is kept: the same command goes on from there",
    ),
    "nonsense": (nothing, "run --attacks x", 2, "UsageError", "there is no attack x; use papers"),
    "nowhere": (nothing, "nowhere", 4, "RunError", "nowhere is not a run"),
}


@pytest.mark.parametrize("row", ENDS.values(), ids=ENDS)
def test_verdict_is_the_last_word_and_the_exit_code(folder, monkeypatch, capsys, row):
    prepare, arguments, code, verdict, following = row
    prepare(monkeypatch)
    assert call(f"verify {arguments} {QUICK}") == code
    out, err = capsys.readouterr()
    assert err == ""
    assert verdict in out
    assert re.search(f"^Next: {following}$", out, flags=re.MULTILINE), out


@pytest.mark.parametrize("row", ENDS.values(), ids=ENDS)
def test_json_is_the_report_and_nothing_else(folder, monkeypatch, capfd, row):
    prepare, arguments, code, verdict, _ = row
    prepare(monkeypatch)
    assert call(f"verify {arguments} {QUICK} --json") == code
    out, err = capfd.readouterr()
    assert err == ""
    report = json.loads(out)
    assert report["status"].upper() == re.match(r"\w+", verdict)[0]
    written = [path for path in Path().rglob("report*.json")]
    assert len(written) == 1
    assert json.loads(written[0].read_text()) == report


@pytest.mark.parametrize("row", ERRORS.values(), ids=ERRORS)
def test_errors_are_told_once(folder, monkeypatch, capfd, row):
    prepare, arguments, code, kind, message = row
    prepare(monkeypatch)
    assert call(f"verify {arguments} {QUICK}") == code
    out, err = capfd.readouterr()
    assert message in words(err)
    assert "Traceback" not in out + err
    assert not list(Path().rglob("report*"))

    prepare(monkeypatch)
    assert call(f"verify {arguments} {QUICK} --json") == code
    out, err = capfd.readouterr()
    assert err == ""
    error = json.loads(out)
    assert (error["error"], error["exit_code"]) == (kind, code)
    assert message in error["message"]


def test_the_same_command_goes_on_after_an_interruption(folder, capsys):
    line = f"verify run {SOME} {QUICK} --batch-size 10"
    assert call(f"{line} --out whole") == 0
    with pytest.MonkeyPatch.context() as patch:
        interruption(patch)
        assert call(f"{line} --out parts") == 130
    assert len(list(Path("parts").iterdir())) == 1  # the journal
    assert call(f"{line} --out parts") == 0
    names = [path.name for path in Path("parts").iterdir()]
    assert sorted(names) == sorted(path.name for path in Path("whole").iterdir())
    (table,) = Path("whole").glob("samples*")
    assert Path("parts", table.name).read_bytes() == table.read_bytes()


# What is shown


def test_a_file_without_a_gradient_shows_no_worst_case_anywhere(folder, capsys):
    assert call(f"verify opaque.onnx --data digits {QUICK} --out alone") == 7
    out = capsys.readouterr().out
    texts = {path.name: path.read_text() for path in Path("alone").iterdir()}
    reports = {f"report-30-clean.{extension}" for extension in ("json", "md", "html")}
    assert texts.keys() == reports | {"samples-30-clean.csv"}
    assert json.loads(texts.pop("report-30-clean.json"))["worst_case"] is None
    for text in (out.partition("Worst case: no attack.")[2], *texts.values()):
        assert "worst case" not in text.lower()
    assert "images stand" not in out
    assert "unverified" in texts["report-30-clean.md"].lower()


def test_an_invalid_report_shows_no_worst_case(folder, monkeypatch, capsys):
    alarm(monkeypatch)
    assert call(f"verify run {SOME} {QUICK}") == 7
    out = capsys.readouterr().out
    assert "worst case  " not in out
    assert "images stand" not in out
    assert "fgsm" in out
    assert len(re.findall(r"\d\.\d\d %", out)) == 1  # clean; none under attack, no W-Robust
    assert "ALARM planted_alarm: 9 of 10; alarm above 1 %. attack again" in out


def test_numbers_come_with_their_n_and_interval(folder, capsys):
    assert call(f"verify run {SOME} {QUICK}") == 0
    out = words(capsys.readouterr().out)
    report = read_report(Path("run/report-30-fgsm-pgd_sat.json"))
    assert "mine: linf 48/255, n = 30 test images" in out
    worst = report.worst_case
    share = f"{100 * worst.num_correct / 30:.2f} %"
    interval = f"{100 * worst.low_95:.1f} to {100 * worst.high_95:.1f}"
    assert f"worst case {share} {interval}" in out
    assert f"VERIFIED, {share} of 30 images stand: all 30 images" in out
    assert "Worst case: worst of fgsm, pgd_sat. Accuracy under attack is an upper bound" in out
    assert re.search(r"Not run: noise, [a-z_, ]*: the attacks that were run do not include", out)


# Targets

TARGETS = {
    "weights": ("weights.safetensors --data digits", "runs/verify-weights-*", "weights"),
    "architecture and weights": (
        "tiny:weights.safetensors --data digits",
        "runs/verify-weights-*",
        "weights",
    ),
    "file with its run": (f"{FILE} --source run", "runs/verify-model.fp32-*", "onnx"),
    "file in its run": (FILE, "runs/verify-model.fp32-*", "onnx"),
    "file alone": ("far.onnx --data digits", "runs/verify-far-*", "onnx"),
    "file with weights": (
        f"{FILE} --source weights.safetensors --data digits",
        "runs/verify-model.fp32-*",
        "onnx",
    ),
}


@pytest.mark.parametrize(("arguments", "out", "kind"), TARGETS.values(), ids=TARGETS)
def test_every_kind_of_target(materials, folder, capsys, arguments, out, kind):
    """All are the same function as the run, so they answer and fall alike."""
    assert call(f"verify {arguments} {QUICK} --attacks fgsm,cw_inf --epsilon 48/255") == 0
    of_run = read_report(materials / "expected/report-30-fgsm-cw_inf.json")
    (path,) = Path().glob(f"{out}/report*.json")
    report = read_report(path)
    assert path.parent.name.endswith(report.target.sha256[:8])
    assert report.target.kind == kind
    assert report.samples == of_run.samples
    hashes = {of_run.target.sha256}
    if kind == "onnx":
        is_alone = arguments.startswith("far")
        assert {report.target.source_sha256} == ({None} if is_alone else hashes)
        assert report.target.sha256 not in hashes
    else:
        assert {report.target.sha256} == hashes


# Live display

EVENT = VerificationProgress(
    num_images=100,
    num_begun=50,
    num_standing=30,
    current="fgsm",
    num_current=40,
    current_fraction=0.625,
    stages=(
        StageProgress(name="clean", num_tried=50, num_fooled=10, duration_seconds=1.0),
        StageProgress(name="fgsm", num_tried=40, num_fooled=10, duration_seconds=61.0),
        StageProgress(name="square"),
    ),
    elapsed_seconds=62.0,
    left_seconds=3600.0,
)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_display_says_how_many_stand_and_how_long_it_takes(is_terminal, monkeypatch):
    output, text = Output(as_json=False), io.StringIO()
    output.console = Console(file=text, force_terminal=is_terminal, width=120, highlight=False)
    monkeypatch.setattr("cli.verification_display._PLAIN_LINE_EVERY_SECONDS", -1.0)
    with verification_display(output) as observe:
        observe(EVENT)
    shown = words(text.getvalue())
    assert "50 of 100 images begun, 30 stand: at most 60.0 % (95 % interval 45.2 to 73.6)" in shown
    assert "0:01:02, about 1:00:00 left" in shown
    assert ("fgsm 40 10 0:01:01 trying 40" in shown) == is_terminal


def test_display_is_silent_with_json(capsys, monkeypatch):
    monkeypatch.setattr("cli.verification_display._PLAIN_LINE_EVERY_SECONDS", -1.0)
    with verification_display(Output(as_json=True)) as observe:
        observe(EVENT)
    assert capsys.readouterr().out == ""
