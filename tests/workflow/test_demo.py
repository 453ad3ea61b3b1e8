"""The demo runs, prints one table, and its judgement can be negative."""

import importlib.util
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
    assert "ONNX against the student: same label on 200 of 200 clean" in " ".join(printed.split())
    assert str(tmp_path) not in written.read_text()


def test_demo_ends_with_3_where_the_method_loses(demo, monkeypatch):
    from rich.console import Console

    better, worse = [90.0] * 7, [80.0] * 7
    monkeypatch.setattr(demo, "_accuracies", lambda report: report)
    seeds = [{"student, B-MTARD": worse, "student, PGD-AT": better}] * 2
    with pytest.raises(SystemExit) as ended:
        demo._judge(seeds, Console(quiet=True))
    assert ended.value.code == 3
