"""The check for people with a GPU, rehearsed with other commands on the CPU."""

import subprocess
import sys

import pytest

from tests.device import gpu_check
from tests.device.gpu_check import Part, report, run_part


def ended(code, *, may_lack=False, text="something"):
    command = [sys.executable, "-c", f"import sys; print({text!r}); sys.exit({code})"]
    return run_part(Part(name="part", command=command, may_lack=may_lack))


@pytest.mark.parametrize(
    ("code", "may_lack", "verdict"),
    [(0, False, "passed"), (4, True, "not installed"), (4, False, "FAILED"), (1, True, "FAILED")],
)
def test_verdict(code, may_lack, verdict):
    assert ended(code, may_lack=may_lack).verdict == verdict


def test_report_has_the_end_of_each_part_and_no_path():
    text = "\n".join(f"line {n}" for n in range(100)) + f"\n{gpu_check.ROOT}/x and /home/me/y"
    found = report([ended(0, text=text), ended(1)], device="cpu", home="/home/me")
    assert "line 99" in found
    assert "line 10\n" not in found
    assert "./x and ~/y" in found
    assert str(gpu_check.ROOT) not in found
    assert "| part | FAILED |" in found
    assert "- device: cpu" in found


def test_every_command_is_one_that_there_is(tmp_path):
    """Its options, too: all but --help is left to machines with a GPU."""
    for part in gpu_check.parts(tmp_path, device="cpu"):
        words = list(part.command)
        if "-m" not in words or "cli.main" not in words:
            continue
        options = [word for word in words if word.startswith("--")]
        command = words[: words.index("cli.main") + 2]
        done = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
        assert all(option in done.stdout for option in options), (command, options)


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(gpu_check.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    with pytest.raises(SystemExit) as end:
        gpu_check.main()
    assert end.value.code == 4
    assert "no CUDA device" in capsys.readouterr().err
