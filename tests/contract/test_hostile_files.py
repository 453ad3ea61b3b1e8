"""No ONNX file makes a command crash, hang, eat memory, print a traceback, or write anything."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import cli.main
from tests.contract.hostile import HOSTILE, INVALID, USAGE, build

MAX_PEAK_MIB = 1200
"""PyTorch and ONNX Runtime alone need half of it."""


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """How the commands ended for every file, from a process that tries them in turn."""
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "files").mkdir()
    (folder / "work").mkdir()
    build(folder / "files")
    process = subprocess.run(
        [sys.executable, "-m", "tests.contract.hostile", str(folder)],
        cwd=Path(cli.main.__file__).parents[1],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    lines = map(json.loads, (folder / "ends.jsonl").read_text().splitlines())
    return {line["key"]: line for line in lines}


def one_line(text):
    return " ".join(text.split())


def check(end, hostile, code):
    assert end["code"] == code, end["err"] or end["out"]
    assert "Traceback" not in end["out"] + end["err"]
    assert end["peak_mib"] < MAX_PEAK_MIB
    assert end["seconds"] < 30
    if code == INVALID:
        assert hostile.says in end["out"]
        return
    if code != USAGE:  # the command has words of its own for what failed while it was measured
        assert one_line(hostile.says) in one_line(end["err"])
    assert len(re.findall("^Error: ", end["err"], flags=re.MULTILINE)) == 1
    assert end["err"].startswith("Error: ")
    assert end["written"] == []


@pytest.mark.parametrize("name", HOSTILE)
def test_verify_refuses(ends, name):
    check(ends[f"verify {name}"], HOSTILE[name], HOSTILE[name].code)


@pytest.mark.parametrize("name", [n for n, h in HOSTILE.items() if h.bench_code is not None])
def test_bench_refuses(ends, name):
    check(ends[f"bench {name}"], HOSTILE[name], HOSTILE[name].bench_code)


@pytest.mark.parametrize("name", [n for n, h in HOSTILE.items() if h.code == INVALID])
def test_of_what_is_no_number_no_robustness_is_said(ends, name):
    end = ends[f"verify {name}"]
    assert "images stand" not in end["out"]
    assert "worst case" not in end["out"].lower()
    assert any(path.endswith("report-10-clean.json") for path in end["written"])
