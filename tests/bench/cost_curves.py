"""How the cost of a B-MTARD step grows with batch, width, attack steps, image side and ranks.

One thing changes at a time, from ResNet-18 of width 0.25, batch 128 of 3 x 32 x 32, 10 attack steps
and two ResNet-18 teachers of width 0.5; not compiled, since every point would be compiled anew.
Images of more than 64 pixels are left out, since they would meet another stem. Each point is a
process of its own, and the points of a curve take turns. The exponent is the slope of a straight
line through the logarithms.

    python -m tests.bench.cost_curves --write docs/results/cost-curves.md
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np

from compressor.environment import describe_environment
from compressor.networks import build_classifier, save_classifier
from compressor.performance import resolve_performance
from compressor.performance_settings import PerformanceSettings
from compressor.reports.markdown import markdown_table
from compressor.run_directory import write_json_atomically, write_text_atomically
from tests.bench.bench_step import Case, Worker, spec
from tests.bench.command import typed_command
from tests.bench.interleaved import Spread, per_second, seconds_in_turn

BASE = Case(student=spec("resnet18", 0.25), teacher=spec("resnet18", 0.5))


def with_side(side_pixels: int) -> Case:
    return Case(
        student=spec("resnet18", 0.25, side_pixels), teacher=spec("resnet18", 0.5, side_pixels)
    )


CURVES: Mapping[str, Mapping[float, Case]] = {
    "images of a batch": {n: replace(BASE, batch_size=n) for n in (16, 32, 64, 128, 256, 512)},
    "width of the student": {
        w: replace(BASE, student=spec("resnet18", w)) for w in (0.125, 0.25, 0.5, 1.0)
    },
    "attack steps": {n: replace(BASE, num_attack_steps=n) for n in (5, 10, 20, 40)},
    "side of the images, pixels": {s: with_side(s) for s in (16, 32, 64)},
}
RANKS = {"1 process, 1 thread": (1, 1), "1 process, 2 threads": (1, 2), "2 processes": (2, 1)}
"""Processes, and threads of each."""
# Seven steps an epoch, so that every tenth, which is logged, is not always the last of its epoch.
RECIPE = """
name = "ranks"
[data]
source = "digits"
validation_size = 100
training_size = 896
image_size = 32
num_channels = 3
[student]
architecture = "resnet18"
width = 0.25
[[teachers]]
role = "clean"
source = "clean.safetensors"
[[teachers]]
role = "robust"
source = "robust.safetensors"
[threat]
epsilon_pixels = 0.0313725490196
[method]
name = "bmtard"
[training]
epochs = 6
batch_size = 128
learning_rate = 0.01
[selection]
num_steps = 1
"""


def points(cases: Mapping[float, Case], *, num_rounds: int, device: str) -> list[dict[str, Any]]:
    """Seconds of a step, images per second and memory at every value of a curve."""
    workers = {value: Worker(case, "not compiled", device) for value, case in cases.items()}
    seconds = seconds_in_turn(
        {str(value): partial(worker.do, "step") for value, worker in workers.items()},
        num_rounds=num_rounds,
        num_warm_ups=2,
    )
    found = []
    for value, worker in workers.items():
        found.append(
            {
                "value": value,
                "seconds": vars(Spread.of(seconds[str(value)])),
                "images_per_second": vars(per_second(cases[value].batch_size, seconds[str(value)])),
                "memory_mib": worker.do("memory"),
            }
        )
        worker.end()
    return found


def ranks(*, num_rounds: int) -> list[dict[str, Any]]:
    """Images per second that `distill` itself logs, of whole runs in turn."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "ranks.toml").write_text(RECIPE, encoding="utf-8")
        for seed, role in enumerate(("clean", "robust")):
            network = build_classifier(BASE.teacher, seed=seed)
            save_classifier(folder / f"{role}.safetensors", network, BASE.teacher, {})
        speeds: dict[str, list[float]] = {label: [] for label in RANKS}
        for number in range(num_rounds):
            for label, (num_processes, num_threads) in RANKS.items():
                out = folder / f"{number}-{num_processes}-{num_threads}"
                _distil(folder, out, num_processes, num_threads)
                lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
                steps = [e for e in map(json.loads, lines) if e["kind"] == "step" and e["step"] > 5]
                speeds[label].append(
                    float(np.median([e["speed_images_per_second"] for e in steps]))
                )
    return [
        {"value": label, "images_per_second": vars(Spread.of(s))} for label, s in speeds.items()
    ]


def _distil(folder: Path, out: Path, num_processes: int, num_threads: int) -> None:
    command = [sys.executable, "-m", "cli.main", "distill", "ranks.toml", "--out", str(out)]
    command += ["--accept-teachers", "--no-verify", "--no-export", "--compile", "off"]
    command += ["--nproc", str(num_processes), "--threads", str(num_threads)]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)


def exponent(found: Sequence[Mapping[str, Any]]) -> float:
    """Of the seconds of a step; 1 where they double with the value."""
    logs = np.log([[p["value"], p["seconds"]["median"]] for p in found])
    return float(np.polyfit(logs[:, 0], logs[:, 1], 1)[0])


def picture(curves: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    mpl.use("Agg")
    figure, axes = plt.subplots(2, 2, figsize=(9, 6.5), layout="constrained")
    for axis, (name, found) in zip(axes.flat, curves.items(), strict=True):
        values = [p["value"] for p in found]
        speeds = [p["images_per_second"]["median"] for p in found]
        low = [p["images_per_second"]["low"] for p in found]
        high = [p["images_per_second"]["high"] for p in found]
        axis.fill_between(values, low, high, alpha=0.25, color="tab:blue")
        axis.loglog(values, speeds, marker="o", color="tab:blue")
        axis.set_xlabel(name)
        axis.set_ylabel("images/s", color="tab:blue")
        axis.set_xticks(values, [f"{v:g}" for v in values])
        shown = [v for v, after in pairwise([*speeds, 0.0]) if abs(after / v - 1) > 0.1]
        axis.set_yticks(shown, [f"{v:.0f}" for v in shown])
        axis.minorticks_off()
        axis.set_title(f"seconds of a step grow with exponent {exponent(found):.2f}", fontsize=10)
        right = axis.twinx()
        right.plot(
            values, [p["memory_mib"] for p in found], marker="s", ls="--", color="tab:orange"
        )
        right.set_ylabel("memory, MiB", color="tab:orange")
        right.set_ylim(0, 1.1 * max(p["memory_mib"] for p in found))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _markdown(found: Mapping[str, Any], picture_name: str) -> str:
    lines = ["# How the cost of a step grows", "", f"![Curves]({picture_name})", ""]
    lines += [" ".join((__doc__ or "").split("\n\n")[1].split()), ""]
    for name, curve in found["curves"].items():
        rows = [
            (
                f"{p['value']:g}",
                str(Spread(**p["images_per_second"])),
                str(Spread(**p["seconds"])),
                f"{p['memory_mib']:,.0f}",
            )
            for p in curve
        ]
        lines += [
            f"Exponent of the seconds: {exponent(curve):.2f}.",
            "",
            markdown_table((name, "images/s", "seconds of a step", "memory, MiB"), rows),
            "",
        ]
    rows = [(p["value"], str(Spread(**p["images_per_second"]))) for p in found["ranks"]]
    lines += [
        "Ranks: `distill --nproc`, the same batch of 128 shared by processes, whole runs in turn.",
        "",
        markdown_table(("ranks", "images/s"), rows),
        "",
        f"Command: `{found['command']}`.",
        "",
        *(f"- {name}: {value}" for name, value in found["environment"].items()),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--write", type=Path, required=True)
    options = parser.parse_args()
    curves = {
        name: points(cases, num_rounds=options.rounds, device=options.device)
        for name, cases in CURVES.items()
    }
    found = {
        "curves": curves,
        "exponents": {name: exponent(curve) for name, curve in curves.items()},
        "ranks": ranks(num_rounds=options.rounds),
        "environment": describe_environment(resolve_performance(PerformanceSettings())),
        "command": typed_command("tests.bench.cost_curves", options),
    }
    assert all(math.isfinite(e) for e in found["exponents"].values())
    image = options.write.with_suffix(".png")
    picture(curves, image)
    write_json_atomically(options.write.with_suffix(".json"), found)
    text = _markdown(found, image.name)
    write_text_atomically(options.write, text)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
