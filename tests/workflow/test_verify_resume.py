"""A verification that is killed at any moment and run again ends as one that was left alone.

This file is also the script that starts and kills, in a process that has imported everything
before: each verification is a process of its own, forked from there, as ten starts from nothing
would take longer than all attacks.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

NUM_KILLS = 10
NUM_CHUNKS, STAGES = 15, ("clean", "fgsm", "pgd_sat", "apgd_ce")
NUM_LINES = 1 + NUM_CHUNKS * len(STAGES)
OPTIONS = ("--samples", str(6 * NUM_CHUNKS), "--batch-size", "6", "--epsilon", "32/255")
COMMAND = ("verify", "run", *OPTIONS, "--attacks", ",".join(STAGES[1:]), "--threads", "1")


# The part of the tests -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory, train_on_digits):
    """Where a run lies, verified undisturbed, killed and interrupted."""
    folder = tmp_path_factory.mktemp("verified")
    student = {"architecture": "tiny", "width": 0.5}
    train_on_digits(folder / "run", name="killed", student=student)
    checkout = str(Path(__file__).parents[2])
    result = subprocess.run(
        [sys.executable, __file__],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": checkout, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return folder


def files_of(folder):
    """The only samples.csv and report.json there; no journal is left beside them."""
    assert not list(folder.glob(".*"))
    (table,), (report,) = folder.glob("samples*.csv"), folder.glob("report*.json")
    return table.read_bytes(), without_clock(json.loads(report.read_text()))


def without_clock(report):
    """The report, but for what another hour or another machine changes."""
    del report["environment"], report["duration_seconds"]
    for row in report["attacks"]:
        del row["duration_seconds"]
    for row in report["cost"]:
        del row["latency_ms"], row["latency_low_ms"], row["latency_high_ms"]
    return report


@pytest.mark.workflow
def test_ten_kills_leave_no_trace(folder):
    table, report = files_of(folder / "undisturbed")
    assert len(table.splitlines()) == 1 + 6 * NUM_CHUNKS
    kinds = {line.split(b",")[2] for line in table.splitlines()[1:]}
    assert len(kinds) >= 4  # images that stand, and some broken by each of several attacks
    assert files_of(folder / "killed") == (table, report)


@pytest.mark.workflow
def test_kills_hit_every_part_of_the_work(folder):
    """Between the first stage and the last, and while the report was being made."""
    before = json.loads((folder / "lines.json").read_text())
    assert len(before) == NUM_KILLS
    assert before == sorted(before)
    assert len(set(before)) > NUM_KILLS / 2
    assert before.count(NUM_LINES) == 2
    assert before[0] < NUM_LINES / 3


@pytest.mark.workflow
def test_an_interruption_says_that_the_same_command_goes_on(folder):
    said = (folder / "interrupted.txt").read_text()
    assert (
        said.split()
        == (
            "Error: interrupted; what is finished is kept: the same command goes on from there"
        ).split()
    )
    assert files_of(folder / "interrupted") == files_of(folder / "undisturbed")


# The part of the script ------------------------------------------------------------------------


def start(out, messages=os.devnull):
    """The process id of `robust-compress verify`, under way."""
    process = os.fork()
    if process:
        return process
    sys.argv = ["robust-compress", *COMMAND, "--out", out]
    for number, path in ((1, os.devnull), (2, messages)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    code = 99
    try:
        main()
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        os._exit(code)


def exit_code(process):
    """Of a process that has ended, or minus the number of the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def num_lines(out):
    """Complete lines of the journal."""
    return sum(path.read_bytes().count(b"\n") for path in Path(out).glob(".verification-*"))


def wait_for_lines(out, wanted):
    until = time.monotonic() + 60
    while num_lines(out) < wanted:
        assert time.monotonic() < until, f"{num_lines(out)} of {wanted} lines"
        time.sleep(0.001)


def kill_again_and_again(out):
    """How many lines there were at each kill; the last two come when all attacks are done."""
    moments, lines = random.Random(0), []
    for number in range(NUM_KILLS):
        is_late = number >= NUM_KILLS - 2
        process = start(out)
        wait_for_lines(out, NUM_LINES if is_late else num_lines(out) + moments.randrange(1, 8))
        time.sleep(moments.uniform(0, 0.3 if is_late else 0.05))  # within a stage, or a write
        os.kill(process, signal.SIGKILL)
        assert exit_code(process) == -signal.SIGKILL, "it ended before it could be killed"
        lines.append(num_lines(out))
    return lines


def script():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which shells ignore in background
    assert exit_code(start("undisturbed")) == 0
    lines = kill_again_and_again("killed")
    assert exit_code(start("killed")) == 0
    Path("lines.json").write_text(json.dumps(lines))

    process = start("interrupted", "interrupted.txt")
    wait_for_lines("interrupted", NUM_LINES // 3)
    os.kill(process, signal.SIGINT)
    assert exit_code(process) == 130
    assert num_lines("interrupted") < NUM_LINES
    assert exit_code(start("interrupted")) == 0


if __name__ == "__main__":
    import compressor.verification_workflow  # noqa: F401 (so that no fork has to)
    from cli.main import main

    script()
