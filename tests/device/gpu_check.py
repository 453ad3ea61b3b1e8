"""For people with a GPU: what runs on it, how fast, and a report to attach to an issue.

    make gpu-check                      the whole, some 15 minutes
    python tests/device/gpu_check.py --device cpu --write FILE.md      a rehearsal without a GPU

No number of a GPU has been measured by us, so every line of such a report is new.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from compressor.environment import describe_environment
from compressor.errors import ExitCode
from compressor.performance import resolve_performance
from compressor.performance_settings import PerformanceSettings
from compressor.reports.markdown import markdown_table
from compressor.run_directory import write_text_atomically

ROOT = Path(__file__).parents[2]
NUM_LINES = 40
SKIPPED = frozenset({int(ExitCode.KNOWN_ERROR)})
"""What a part ends with that wants something that is not here, as an engine wants TensorRT."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One command, and what it is to show."""

    name: str
    command: Sequence[str]
    may_lack: bool = False
    """Whether exit code 4, something is not installed, is no failure."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a part went."""

    part: Part
    code: int
    seconds: float
    text: str

    @property
    def verdict(self) -> str:
        """In a word or two."""
        if self.code == 0:
            return "passed"
        return "not installed" if self.part.may_lack and self.code in SKIPPED else "FAILED"


def parts(folder: Path, *, device: str) -> list[Part]:
    """In the order in which they run; later ones take the run of the short distillation."""
    python = sys.executable
    run = str(folder / "run")
    tool = [python, "-m", "cli.main"]
    return [
        Part(name="what is here", command=[*tool, "doctor"]),
        Part(
            name="tests that need a GPU",
            command=[python, "-m", "pytest", "-q", "-rs", "-m", "gpu", "tests"],
        ),
        Part(
            name="tests that need TensorRT",
            command=[python, "-m", "pytest", "-q", "-rs", "-m", "tensorrt", "tests"],
        ),
        Part(
            name="a short distillation, verified",
            command=[*tool, "distill", _recipe(folder), "--out", run, "--device", device]
            + ["--accept-teachers"],
        ),
        Part(
            name="an engine of it",
            command=[*tool, "export", run, "--trt", "--half"],
            may_lack=True,
        ),
        Part(
            name="latency of network, files and engine",
            command=[*tool, "bench", run],
        ),
        Part(
            name="a B-MTARD step against the authors' manner",
            command=[python, "-m", "tests.bench.bench_step", "--rounds", "5", "--device", device],
        ),
    ]


def run_part(part: Part) -> Ended:
    """Run it and keep what it says."""
    began_at_seconds = time.perf_counter()
    done = subprocess.run(
        part.command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    seconds = time.perf_counter() - began_at_seconds
    return Ended(part=part, code=done.returncode, seconds=seconds, text=done.stdout)


def report(ended: Sequence[Ended], *, device: str, home: str) -> str:
    """Markdown without paths of the machine."""
    environment = describe_environment(resolve_performance(PerformanceSettings(device=device)))
    rows = [[one.part.name, one.verdict, f"{one.seconds:.0f} s"] for one in ended]
    blocks = [
        "# GPU check",
        markdown_table(("part", "", "took"), rows),
        "\n".join(f"- {name}: {value}" for name, value in environment.items()),
    ]
    for one in ended:
        lines = one.text.replace(str(ROOT), ".").replace(home, "~").splitlines()[-NUM_LINES:]
        blocks.append(f"## {one.part.name}\n\n```\n" + "\n".join(lines) + "\n```")
    return "\n\n".join(blocks) + "\n"


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--write", type=Path, default=Path("gpu-check.md"))
    options = parser.parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        sys.stderr.write(
            f"PyTorch {torch.__version__} sees no CUDA device. This check is for machines with "
            "one; `robust-compress doctor` says what is here, --device cpu rehearses\n"
        )
        sys.exit(int(ExitCode.KNOWN_ERROR))
    ended = []
    with tempfile.TemporaryDirectory() as folder:
        for part in parts(Path(folder), device=options.device):
            print(f"... {part.name}", flush=True)  # noqa: T201
            ended.append(run_part(part))
            print(f"    {ended[-1].verdict}, {ended[-1].seconds:.0f} s", flush=True)  # noqa: T201
    text = report(ended, device=options.device, home=str(Path.home()))
    write_text_atomically(options.write, text)
    print(f"Report: {options.write}; please attach it to an issue")  # noqa: T201
    sys.exit(int(any(one.verdict == "FAILED" for one in ended)))


def _recipe(folder: Path) -> str:
    """Digits, and PGD-AT, which needs no teacher."""
    table = {
        "name": f"gpu-check-{platform.machine()}",
        "threat": {"epsilon_pixels": "32/255"},
        "data": {"source": "digits", "validation_size": 200, "num_channels": 3},
        "student": {"architecture": "resnet18", "width": 0.25},
        "method": {"name": "pgd_at"},
        "training": {"epochs": 10, "learning_rate": 0.05, "schedule": {"kind": "one_cycle"}},
    }
    path = folder / "recipe.json"
    path.write_text(json.dumps(table))
    return str(path)


if __name__ == "__main__":
    main()
