"""`robust-compress compare`: bad input in a row each, its plan, its exit codes."""

import contextlib
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

import cli.main
import compressor.training_workflow
from cli.comparison_display import print_result
from cli.output import Output
from compressor.comparison.result import METRICS
from compressor.errors import NonFiniteLossError, TeacherError
from tests.unit import test_comparison_tables as tables

RECIPE = """
name = "plain"
[data]
source = "digits"
validation_size = 50
training_size = 100
crop_padding_pixels = 0
horizontal_flip = false
[student]
architecture = "tiny"
width = 0.5
[method]
name = "cross_entropy"
[training]
epochs = 1
batch_size = 50
[selection]
num_steps = 1
"""
FILE = """
[base]
recipe = "recipe.toml"
[[methods]]
name = "cross_entropy"
label = "plain"
[[methods]]
name = "pgd_at"
settings = { attack = { num_steps = 1, step_size_pixels = "8/255" } }
"""
USAGE, KNOWN_ERROR, INVALID = 2, 4, 7

DRY = "compare recipe.toml --methods cross_entropy --dry-run"
ROWS = {
    "nothing": ("compare", USAGE, "Missing argument 'RECIPE.toml'"),
    "no file": ("compare nowhere.toml", KNOWN_ERROR, "nowhere.toml does not exist"),
    "a folder": ("compare . --methods trades", KNOWN_ERROR, ". is a folder, not a recipe"),
    "not TOML": ("compare notes.txt --methods trades", KNOWN_ERROR, "is not valid TXT"),
    "a recipe alone": ("compare recipe.toml", USAGE, "say which methods to compare"),
    "no names": ("compare recipe.toml --methods ,", USAGE, "--methods names no method"),
    "unknown method": (
        "compare recipe.toml --methods trades,nonsense",
        KNOWN_ERROR,
        "nonsense: there is no method 'nonsense'; use adaad",
    ),
    "a method twice": (
        "compare recipe.toml --methods trades,trades",
        KNOWN_ERROR,
        "two methods are called trades",
    ),
    "no such teacher": (
        "compare recipe.toml --methods cross_entropy,bmtard",
        KNOWN_ERROR,
        "not comparable, so nothing was run: bmtard: ",
    ),
    "unknown label": ("compare file.toml --methods trades", USAGE, "it has plain, pgd_at"),
    "unknown reference": (f"{DRY} --reference trades", USAGE, "no method 'trades' to refer to"),
    "no seed": (f"{DRY} --seeds 0", USAGE, "'--seeds'"),
    "seeds in words": (f"{DRY} --seeds three", USAGE, "'--seeds'"),
    "too many seeds": (f"{DRY} --seeds 101", USAGE, "'--seeds'"),
    "fewer than no images": (f"{DRY} --samples=-1", USAGE, "'--samples'"),
    "cascade in words": (f"{DRY} --cascade-samples all", USAGE, "'--cascade-samples'"),
    "no clean image": (f"{DRY} --clean-samples 0", USAGE, "'--clean-samples'"),
    "unknown data": (f"{DRY} --data nowhere", KNOWN_ERROR, "'nowhere' is not known; use one"),
    "no data": (f"{DRY} --data imagefolder:nowhere", KNOWN_ERROR, "no folder nowhere"),
    "set nothing": (f"{DRY} --set training.epochs", USAGE, "is not KEY=VALUE"),
    "set nonsense": (f"{DRY} --set training.epoch=3", KNOWN_ERROR, "did you mean epochs?"),
    "format": (f"{DRY} --dtype float16", USAGE, "--dtype 'float16' is not one of"),
    "device": (f"{DRY} --device tpu", KNOWN_ERROR, "device 'tpu' is not known"),
    "out is a file": (
        "compare recipe.toml --methods cross_entropy --threads 1 --out notes.txt",
        KNOWN_ERROR,
        "the folder notes.txt cannot be made",
    ),
}


def call(*arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["robust-compress", *arguments])
        try:
            cli.main.main()
        except SystemExit as end:
            return end.code or 0
    return 0


def one_line(text):
    return " ".join(re.sub("[─-╿]", " ", text).split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory, one_thread, session_cache):
    folder = tmp_path_factory.mktemp("compare")
    (folder / "recipe.toml").write_text(RECIPE)
    (folder / "file.toml").write_text(FILE)
    (folder / "notes.txt").write_text("not a recipe")
    with contextlib.chdir(folder):
        yield folder


@pytest.mark.parametrize("case", ROWS)
def test_bad_input_gets_one_message(case, folder, capsys):
    line, code, expected = ROWS[case]
    assert call(*shlex.split(line)) == code
    captured = capsys.readouterr()
    assert expected in one_line(captured.err), captured.err
    assert "Traceback" not in captured.err
    assert not (folder / "runs").exists()


def test_the_plan_writes_nothing(folder, capsys):
    words = ("compare", "file.toml", "--dry-run", "--seeds", "2", "--threads", "1")
    assert call(*words, "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    names = ["plain-seed0", "pgd_at-seed0", "plain-seed1", "pgd_at-seed1"]
    assert [run["name"] for run in plan["runs"]] == names
    parts = {"training", "clean", "white_box", "cascade"}
    assert all(run["estimated_seconds"].keys() == parts for run in plan["runs"])
    assert plan["estimated_seconds"] > 0
    assert plan["test_images"] == {"clean": 497, "white_box": 497, "cascade": 300}
    assert plan["methods"][1]["passes"]["student_forwards"] == 2
    assert call(*words) == 0
    text = one_line(capsys.readouterr().out)
    assert "digits" not in text
    assert "plain: 4 runs, reference plain" in text
    assert "Next: robust-compress compare file.toml --seeds 2 --threads 1" in text
    assert not (folder / "runs").exists()


def test_a_comparison_from_end_to_end(folder, capsys):
    words = ("compare", "file.toml", "--threads", "1", "--out", "done", "--clean-samples", "30")
    few = ("--samples", "0", "--cascade-samples", "0")
    assert call(*words, *few) == 0
    out = capsys.readouterr().out
    assert "plain-seed0: clean" in out
    assert "One seed: no spread is known" in one_line(out)
    tables = out.partition("percent, mean")[2].partition("Exact")[0].splitlines()
    assert max(map(len, tables)) <= 80
    made = {path.name for path in Path("done").iterdir() if path.is_file()}
    assert made >= {"comparison.md", "comparison.csv", "comparison.tex", "comparison.json"}
    assert "comparison.svg" not in {*made, *out.split()}  # no robust accuracy to show
    assert call(*words, *few, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["label"] for row in result["methods"]] == ["plain", "pgd_at"]
    assert [score["metric"] for score in result["methods"][0]["scores"]] == ["clean"]


NO_ATTACKS = ("--samples", "0", "--cascade-samples", "0", "--clean-samples", "30")


def failing(error):
    """Training that fails for seed 0."""

    def train(recipe, request, **watchers):
        if recipe.seed == 0:
            raise error
        return compressor.training_workflow.train(recipe, request, **watchers)

    return train


TROUBLE = {
    "loss": NonFiniteLossError("the loss of step 2 is not finite ({}); images 1. Kept: /a/b"),
    "teacher": TeacherError(
        "the loss of step 2 is not finite: the teacher x has none. Last good checkpoint: /a/b"
    ),
}


@pytest.mark.parametrize("kind", TROUBLE)
def test_a_failed_seed_is_planned_noted_and_not_recommended(kind, folder, capsys, monkeypatch):
    monkeypatch.setattr("compressor.comparison.runs.train", failing(TROUBLE[kind]))
    words = ("compare", "recipe.toml", "--methods", "cross_entropy", "--seeds", "2", *NO_ATTACKS)
    words += ("--threads", "1", "--out", f"seed0-{kind}")
    assert call(*words) == 0
    out = one_line(capsys.readouterr().out)
    assert "cross_entropy-seed0: FAILED: the loss of step 2 is not finite" in out
    assert "/a/b" not in out
    assert "Note: --retry tries again what failed." in out
    assert f"Next: robust-compress verify seed0-{kind}/runs/cross_entropy-seed1" in out
    assert call(*words, "--dry-run") == 0
    assert "cross_entropy 2 1 + 1 0 + 0 1 failed" in one_line(capsys.readouterr().out)
    assert call(*words, "--dry-run", "--json") == 0
    runs = json.loads(capsys.readouterr().out)["runs"]
    assert [bool(run["failure"]) for run in runs] == [True, False]
    assert call(*words, "--dry-run", "--retry") == 0
    assert "0 + 0 about" in one_line(capsys.readouterr().out)


def test_attacks_that_show_nothing_are_no_success(folder, capsys, monkeypatch):
    """As if a check had raised an alarm over every evaluation."""
    monkeypatch.setattr("compressor.comparison.scores._believed", lambda attacked: None)
    words = ("compare", "recipe.toml", "--methods", "cross_entropy", "--threads", "1")
    few = ("--samples", "5", "--cascade-samples", "0", "--clean-samples", "30")
    assert call(*words, *few, "--out", "alarmed") == INVALID
    out = capsys.readouterr().out
    assert "No run has an accuracy under attack that may be believed" in one_line(out)
    assert "Next:" not in out


def test_words_are_not_broken_at_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    scores = [tables.score(metric, (0.4, 0.42)) for metric in METRICS]
    pairs = [tables.pair(metric) for metric in METRICS]
    rows = [tables.method(name, scores, pairs) for name in ("base", "other-method")]
    print_result(tables.result_of(*rows), Output(as_json=False))
    out = capsys.readouterr().out
    assert max(map(len, out.partition("Exact")[0].splitlines())) <= 80
    assert "test: cifar10, linf 8/255, seeds 0, 1" in out
    assert "AA-style" in out
    assert re.search(r"AutoAttack- *$", out, re.M)
    assert "AutoAttack-s" not in out
    assert "W-Robust is tested on the images of the cascade alone" in one_line(out)


def test_the_help_says_who_is_tested_against_whom(capsys):
    assert call("compare", "--help") == 0
    assert "The others are tested against it" in one_line(capsys.readouterr().out)


def test_nothing_measured_is_no_success(folder, capsys):
    words = ("compare", "recipe.toml", "--methods", "cross_entropy", "--threads", "1")
    code = call(*words, "--set", "training.learning_rate=1e30", "--out", "failed")
    assert code == INVALID
    assert "cross_entropy-seed0: FAILED: the loss of step" in one_line(capsys.readouterr().out)
