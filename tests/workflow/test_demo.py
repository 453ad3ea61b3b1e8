"""The demo runs, prints one table, and its judgement can be negative."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[2] / "examples" / "digits_demo.py"


@pytest.fixture
def demo(monkeypatch):
    spec = importlib.util.spec_from_file_location("digits_demo", DEMO)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tiny = {"architecture": "tiny"}
    quick = {name: (tiny, 1, method) for name, (_, _, method) in module.MODELS.items()}
    monkeypatch.setattr(module, "MODELS", quick)
    monkeypatch.setattr(module, "NUM_GATE_IMAGES", 10)
    monkeypatch.setattr(module, "ACCEPT_TEACHERS", True)  # one epoch makes no teacher
    return module


@pytest.mark.workflow
def test_demo_prints_and_writes_its_tables(demo, tmp_path, monkeypatch, capsys):
    written = tmp_path / "demo.md"
    arguments = ["--seeds", "0", "--out", str(tmp_path / "runs"), "--write", str(written)]
    monkeypatch.setattr(sys, "argv", ["digits_demo.py", *arguments])
    demo.main()
    printed = capsys.readouterr().out
    for name in demo.MODELS:
        assert f"| {name} |" in written.read_text()
    assert "n = 497" in printed
    assert "AutoAttack-style" in printed
    assert re.search(r"^(PASS|FAIL|INCONCLUSIVE|INVALID) ", printed, flags=re.MULTILINE)
    assert "same label clean:       100.00 % (100 of 100)" in printed
    assert str(tmp_path) not in written.read_text()


@pytest.mark.parametrize(
    ("clean", "w_robust", "is_kept"), [(91, 90, True), (90, 95, False), (95, 89, False)]
)
def test_demo_judges_both_promises(clean, w_robust, is_kept, demo, monkeypatch):
    monkeypatch.setattr(demo, "_accuracies", lambda report: report)
    ours = [clean, *[90.0] * 5, w_robust]
    seeds = [{"student, B-MTARD": ours, "student, PGD-AT": [90.0] * 7}] * 2
    assert demo._judge(seeds, demo.Output(as_json=True)) is is_kept
