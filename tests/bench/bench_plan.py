"""What `plan` predicts of a run against what the same run then takes: time, memory, disk.

python -m tests.bench.bench_plan --data imagefolder:DATA --teachers DIR --write docs/results/plan.md
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from compressor.environment import describe_environment
from compressor.performance import resolve_performance
from compressor.performance_settings import PerformanceSettings
from compressor.reports.markdown import markdown_table
from compressor.run_directory import write_json_atomically, write_text_atomically
from tests.bench.command import typed_command

_FEW = ("data.training_size=10000", "data.validation_size=2000")
RUNS = {
    "cifar10-small": (*_FEW, "training.epochs=5"),
    "cifar10-fast": (*_FEW,),
    "cifar10-mobilenet": (*_FEW, "training.epochs=2"),
}
"""Recipe, and what is changed so that the three take some twenty minutes together."""
HEADER = ("recipe", "changed", "what", "predicted", "taken", "taken / predicted")
MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Taken:
    """By a whole run."""

    seconds: float
    """From the recipe, which is written before the first step, to the weights."""
    memory_bytes: int
    disk_bytes: int
    """The most that its checkpoints had, looked at every half second."""


def predict(words: list[str]) -> dict[str, float]:
    command = [sys.executable, "-m", "cli.main", "plan", *words, "--json"]
    said = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(said.stdout)
    return found


def take(words: list[str], run: Path) -> Taken:
    command = [sys.executable, "-m", "cli.main", "distill", *words, "--out", str(run)]
    process = subprocess.Popen([*command, "--no-verify", "--no-export"], stdout=subprocess.DEVNULL)
    ended_pid, disk_bytes = 0, 0
    while not ended_pid:
        time.sleep(0.5)
        disk_bytes = max(disk_bytes, size_of(run / "checkpoints"))
        ended_pid, status, usage = os.wait4(process.pid, os.WNOHANG)
    if status:
        raise SystemExit(f"{command} ended with status {status}")
    began, ended = (run / name for name in ("recipe.resolved.json", "model.safetensors"))
    return Taken(
        seconds=ended.stat().st_mtime - began.stat().st_mtime,
        memory_bytes=usage.ru_maxrss * 1024,
        disk_bytes=disk_bytes,
    )


def size_of(folder: Path) -> int:
    """Bytes; what is removed meanwhile counts nothing."""
    sizes = []
    for file in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            sizes.append(file.stat().st_size if file.is_file() else 0)
    return sum(sizes)


Pairs = dict[str, tuple[float, float]]
"""Predicted and taken, by what it is and its unit."""


def pairs_of(predicted: dict[str, float], taken: Taken) -> Pairs:
    return {
        "time, s": (predicted["total_seconds"], taken.seconds),
        "memory, MiB": (predicted["peak_memory_bytes"] / MIB, taken.memory_bytes / MIB),
        "disk, MiB": (predicted["disk_bytes"] / MIB, taken.disk_bytes / MIB),
    }


def rows(recipe: str, pairs: Pairs) -> list[tuple[str, ...]]:
    changed = ", ".join(RUNS[recipe])
    return [
        (recipe, changed, what, f"{a:,.1f}", f"{b:,.1f}", f"{b / a:.2f}")
        for what, (a, b) in pairs.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--teachers", type=Path, required=True)
    parser.add_argument("--recipes", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    found: dict[str, Pairs] = {}
    for recipe in options.recipes:
        words = [f"examples/recipes/{recipe}.toml", "--data", options.data]
        for role in ("clean", "robust"):
            place = options.teachers / f"{role}_resnet18_w0.5.safetensors"
            words += [f"--{role}-teacher", f"resnet18:{place}"]
        for change in RUNS[recipe]:
            words += ["--set", change]
        with tempfile.TemporaryDirectory() as folder:
            predicted = predict(words)
            found[recipe] = pairs_of(predicted, take(words, Path(folder) / "run"))
    lines = [line for recipe, pairs in found.items() for line in rows(recipe, pairs)]
    environment = describe_environment(resolve_performance(PerformanceSettings()))
    command_line = typed_command(
        "tests.bench.bench_plan", options, left_out=("data", "teachers", "recipes")
    )
    text = "\n".join(
        [
            "# What `plan` predicts, and what a run takes",
            "",
            "`robust-compress plan`, then `distill` of the same recipe, with nothing else on the "
            "machine. Time is from the first step to the weights, validation included; memory is "
            "the most that the process ever held; disk the most that its checkpoints had.",
            "",
            markdown_table(HEADER, lines),
            "",
            f"Command: `{command_line}`, with images and teachers.",
            "",
            *(f"- {name}: {value}" for name, value in environment.items()),
        ]
    )
    sys.stdout.write(text + "\n")
    if options.write:
        table = {"runs": found, "environment": environment, "command": command_line}
        write_json_atomically(options.write.with_suffix(".json"), table)
        write_text_atomically(options.write, text + "\n")


if __name__ == "__main__":
    main()
