"""One B-MTARD step: the authors' manner against ours, interleaved in one process.

ResNet-18 of width 1, batch 128 of 3x32x32, two ResNet-18 teachers, random weights and images:
what is computed does not depend on them. The authors' manner is float32, contiguous, one pass
at a time, gradients of the attack through the module in eval mode. With `--write` the same is
measured twice, with the matrix units of the CPU and, in a second process, without them.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from compressor.attacks.build import build_inner_attack
from compressor.data import Batch
from compressor.environment import describe_environment
from compressor.folding import EvaluationView
from compressor.losses import cross_entropy
from compressor.method_table import InnerAttackRecipe
from compressor.methods.bmtard import BMTARD
from compressor.methods.protocol import Moment
from compressor.methods.teacher_set import TeacherSet
from compressor.networks import NetworkSpec, build_classifier
from compressor.performance import Performance, resolve_performance
from compressor.performance_settings import PerformanceSettings
from compressor.randomness import sample_keys
from compressor.run_directory import write_text_atomically
from compressor.student import Student
from compressor.teacher import Teacher
from compressor.threat import ThreatModel

BATCH_SIZE = 128
EPSILON_PIXELS, STEP_PIXELS, NUM_STEPS = 8 / 255, 2 / 255, 10
SPEC = NetworkSpec(architecture="resnet18", width=1.0, num_classes=10, image_shape=(3, 32, 32))


def authors_step(x: Tensor, y: Tensor) -> Callable[[], None]:
    """The released script's step, written down plainly."""
    student, clean, robust = (build_classifier(SPEC, seed=s).to(x.device) for s in range(3))
    clean.eval(), robust.eval()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9, weight_decay=2e-4)

    def attack() -> Tensor:
        student.eval()
        x_adv = x + 0.001 * torch.randn_like(x)
        for _ in range(NUM_STEPS):
            x_adv.requires_grad_()
            loss = F.cross_entropy(student(x_adv), y)
            gradient = torch.autograd.grad(loss, [x_adv])[0]
            x_adv = x_adv.detach() + STEP_PIXELS * gradient.sign()
            x_adv = torch.min(torch.max(x_adv, x - EPSILON_PIXELS), x + EPSILON_PIXELS)
            x_adv = x_adv.clamp(0, 1)
        student.train()
        return x_adv

    def distance(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        p = F.softmax(teacher_logits, dim=1)
        return (p * (torch.log(p + 1e-5) - F.log_softmax(student_logits, dim=1))).mean()

    def step() -> None:
        optimizer.zero_grad()
        x_adv = attack()
        adv_logits = student(x_adv)
        with torch.no_grad():
            robust_logits = robust(x_adv)
        clean_logits = student(x)
        with torch.no_grad():
            clean_teacher_logits = clean(x)
        robust_loss = distance(adv_logits, robust_logits)
        clean_loss = distance(clean_logits, clean_teacher_logits)
        robust_loss.item(), clean_loss.item()
        (0.5 * robust_loss + 0.5 * clean_loss).backward()
        optimizer.step()

    return step


def our_step(x: Tensor, y: Tensor, performance: Performance) -> Callable[[], None]:
    """`BMTARD.step` and the optimiser, as the trainer calls them."""
    student = Student(build_classifier(SPEC, seed=0), performance)
    threat = ThreatModel(epsilon_pixels=EPSILON_PIXELS)
    method = BMTARD(
        teachers=TeacherSet.of(
            [_teacher("clean", 1, performance), _teacher("robust", 2, performance)]
        ),
        attack=build_inner_attack(InnerAttackRecipe(), threat=threat, objective=cross_entropy),
        loss_scale=0.1,
        temperature_rate=0.001,
        temperature_bounds=(1.0, 10.0),
        weight_rate=0.025,
    )
    optimizer = torch.optim.SGD(
        student.network.parameters(), lr=0.1, momentum=0.9, weight_decay=2e-4
    )
    index_N = torch.arange(BATCH_SIZE, device=x.device)
    batch = Batch(
        x_NCHW=x.contiguous(memory_format=torch.channels_last),
        y_N=y,
        index_N=index_N,
        keys_N=sample_keys(index_N, seed=0),
    )
    state = method.initial_state()

    def step() -> None:
        nonlocal state
        optimizer.zero_grad(set_to_none=True)
        result, state = method.step(student, batch, state, Moment())
        result.loss.backward()
        optimizer.step()

    return step


def _teacher(role: str, seed: int, performance: Performance) -> Teacher:
    network = performance.place_network(build_classifier(SPEC, seed=seed)).eval()
    view = EvaluationView(network, performance)
    return Teacher(
        name=role,
        role=role,
        answer=view,
        network=network,
        spec=SPEC,
        num_parameters=0,
        sha256="",
        num_bytes=0,
        num_classes=10,
    )


def measure(num_rounds: int, *, device: str) -> dict[str, object]:
    """Seconds of both steps, one of each in turn, after one warm-up of each."""
    generator = torch.Generator().manual_seed(0)
    performance = resolve_performance(PerformanceSettings(device=device))
    x = torch.rand(BATCH_SIZE, 3, 32, 32, generator=generator).to(performance.device)
    y = torch.randint(0, 10, (BATCH_SIZE,), generator=generator).to(performance.device)
    steps = {"authors": authors_step(x, y), "ours": our_step(x, y, performance)}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(num_rounds + 1):
        for name, step in steps.items():
            started_at_seconds = time.perf_counter()
            step()
            if performance.device.type == "cuda":
                torch.cuda.synchronize(performance.device)
            if number:
                seconds[name].append(time.perf_counter() - started_at_seconds)
    ratios = [a / b for a, b in zip(seconds["authors"], seconds["ours"], strict=True)]
    return {
        "ratio": _summary(ratios),
        "authors_images_per_second": _summary([BATCH_SIZE / s for s in seconds["authors"]]),
        "ours_images_per_second": _summary([BATCH_SIZE / s for s in seconds["ours"]]),
        "num_rounds": num_rounds,
        "environment": describe_environment(performance),
    }


def _summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def _without_matrix_units(num_rounds: int) -> dict[str, object]:
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}
    command = [sys.executable, __file__, "--rounds", str(num_rounds), "--json"]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def _row(name: str, result: dict) -> str:
    cells = [
        f"{result[key]['median']:.2f} ({result[key]['low']:.2f} to {result[key]['high']:.2f})"
        for key in ("ratio", "authors_images_per_second", "ours_images_per_second")
    ]
    dtype = result["environment"]["number_format"]
    return f"| {name} | {dtype} | " + " | ".join(cells) + f" | {result['num_rounds']} |"


def _markdown(with_units: dict, without: dict) -> str:
    lines = [
        "# One B-MTARD step: the authors' manner against ours",
        "",
        "ResNet-18 of width 1, batch 128 of 3x32x32, two ResNet-18 teachers; one step of each in "
        "turn in one process. Median (lowest to highest); a ratio above 1 means ours is faster.",
        "",
        "| CPU | our format | ratio | authors, images/s | ours, images/s | rounds |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
        _row("with bfloat16 matrix units", with_units),
        _row("without (`ONEDNN_MAX_CPU_ISA=AVX512_CORE`)", without),
        "",
        "Command: `make bench`.",
        "",
        *(f"- {name}: {value}" for name, value in with_units["environment"].items()),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    result = measure(options.rounds, device=options.device)
    if options.json:
        sys.stdout.write(json.dumps(result))
        return
    text = _markdown(result, _without_matrix_units(options.rounds))
    sys.stdout.write(text)
    if options.write:
        write_text_atomically(options.write, text)


if __name__ == "__main__":
    main()
