"""One B-MTARD step: the authors' manner against ours, each in a process of its own, in turn.

Random weights and images of 3 x 32 x 32: what is computed does not depend on them. The authors'
manner is float32, contiguous, one pass at a time, with gradients of the attack through the module
in eval mode. The attack is also timed alone. Arithmetic is compared with the fastest product of two
matrices in the same number format, of several sizes, timed in the same run.

    python tests/bench/bench_step.py --write docs/results/bench-step.md
"""

import argparse
import dataclasses
import json
import math
import multiprocessing
import os
import resource
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import DeviceType

from compressor.attacks.build import build_inner_attack
from compressor.compilation import batch_size_to_compile
from compressor.cost import count_multiply_adds
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
from compressor.reports.markdown import markdown_table
from compressor.run_directory import write_json_atomically, write_text_atomically
from compressor.student import Student
from compressor.teacher import Teacher
from compressor.threat import ThreatModel
from tests.bench.command import typed_command
from tests.bench.interleaved import Spread, per_second, ratio, seconds_in_turn, seconds_per_call

BATCH_SIZE = 128
EPSILON_PIXELS, STEP_PIXELS, NUM_STEPS = 8 / 255, 2 / 255, 10
NUM_STEPS_OF_A_LONG_RUN = 1_000_000
PRODUCTS = ((1024, 1024, 1024), (4096, 4096, 4096), (8192, 1024, 1024), (8192, 256, 2304))
"""Rows, columns and length of the sums."""


def spec(architecture: str, width: float, side_pixels: int = 32) -> NetworkSpec:
    return NetworkSpec(
        architecture=architecture,
        width=width,
        num_classes=10,
        image_shape=(3, side_pixels, side_pixels),
    )


@dataclass(frozen=True, kw_only=True)
class Case:
    student: NetworkSpec
    teacher: NetworkSpec
    """Of both."""
    batch_size: int = BATCH_SIZE
    num_attack_steps: int = NUM_STEPS

    @property
    def num_operations(self) -> float:
        """Multiplications and additions of a step.

        Attack steps go forwards and back to the images; two passes that train also back to the
        weights; two passes of a teacher forwards.
        """
        student, teacher = (
            2 * count_multiply_adds(build_classifier(s, seed=0), s.image_shape) * self.batch_size
            for s in (self.student, self.teacher)
        )
        return student * (2 * self.num_attack_steps + 2 * 3) + 2 * teacher


CASES: Mapping[str, Case] = {
    "ResNet-18, width 1": Case(student=spec("resnet18", 1.0), teacher=spec("resnet18", 1.0)),
    "ResNet-18, width 0.25": Case(student=spec("resnet18", 0.25), teacher=spec("resnet18", 0.5)),
    "MobileNet-V2, width 1": Case(student=spec("mobilenet_v2", 1.0), teacher=spec("resnet18", 1.0)),
    "MobileNet-V2, width 0.25": Case(
        student=spec("mobilenet_v2", 0.25), teacher=spec("resnet18", 0.5)
    ),
}


@dataclass(frozen=True)
class Manner:
    """One way to compute a step, and its attack alone."""

    attack: Callable[[], object]
    step: Callable[[], object]


def authors_manner(case: Case, x: Tensor, y: Tensor) -> Manner:
    """The released script's step, written down plainly."""
    student = build_classifier(case.student, seed=0).to(x.device)
    clean, robust = (build_classifier(case.teacher, seed=s).to(x.device).eval() for s in (1, 2))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9, weight_decay=2e-4)

    def attack() -> Tensor:
        student.eval()
        x_adv = x + 0.001 * torch.randn_like(x)
        for _ in range(case.num_attack_steps):
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

    return Manner(attack, step)


def our_manner(case: Case, x: Tensor, y: Tensor, performance: Performance) -> Manner:
    """`BMTARD.step` and the optimiser, as the trainer calls them."""
    student = Student(build_classifier(case.student, seed=0), performance)
    threat = ThreatModel(epsilon_pixels=EPSILON_PIXELS)
    method = BMTARD(
        teachers=TeacherSet.of(
            [
                _teacher(case, "clean", seed=1, performance=performance),
                _teacher(case, "robust", seed=2, performance=performance),
            ]
        ),
        attack=build_inner_attack(
            InnerAttackRecipe(num_steps=case.num_attack_steps),
            threat=threat,
            objective=cross_entropy,
        ),
        loss_scale=0.1,
        temperature_rate=0.001,
        temperature_bounds=(1.0, 10.0),
        weight_rate=0.025,
    )
    optimizer = torch.optim.SGD(
        student.network.parameters(), lr=0.1, momentum=0.9, weight_decay=2e-4
    )
    index_N = torch.arange(len(x), device=x.device)
    batch = Batch(
        x_NCHW=x.contiguous(memory_format=torch.channels_last),
        y_N=y,
        index_N=index_N,
        keys_N=sample_keys(index_N, seed=0),
    )
    state = method.initial_state()

    def attack() -> Tensor:
        return method.attack(
            student.evaluation_view(), batch.x_NCHW, batch.y_N, keys_N=batch.keys_N
        )

    def step() -> None:
        nonlocal state
        optimizer.zero_grad(set_to_none=True)
        result, state = method.step(student, batch, state, Moment())
        result.loss.backward()
        optimizer.step()

    return Manner(attack, step)


def _teacher(case: Case, role: Any, *, seed: int, performance: Performance) -> Teacher:
    network = performance.place_network(build_classifier(case.teacher, seed=seed)).eval()
    assert isinstance(network, nn.Module)
    return Teacher(
        name=role,
        role=role,
        answer=EvaluationView(network, performance),
        network=network,
        spec=case.teacher,
        num_parameters=0,
        sha256="",
        num_bytes=0,
        num_classes=10,
    )


class Worker:
    """A process that computes in one manner when told to, so that no other has part in it.

    The authors' must not profit from what ours tells the C library about memory.
    """

    def __init__(self, case: Case, way: str, device: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._line, end = context.Pipe()
        self._process = context.Process(target=_serve, args=(end, case, way, device), daemon=True)
        self._process.start()

    def do(self, what: str) -> Any:
        """`attack`, `step`, `product FORMAT SIZES`, or one that answers: `memory`, `facts`.

        With `seconds ` before it, the seconds that a call takes there.
        """
        self._line.send(what)
        return self._line.recv()

    def end(self) -> None:
        self._line.close()
        self._process.join()


def _serve(line: Connection, case: Case, way: str, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(case.batch_size, *case.student.image_shape, generator=generator).to(device)
    y = torch.randint(0, 10, (case.batch_size,), generator=generator).to(device)
    performance = None if way == "authors" else _performance(device, is_compiled=way == "ours")
    manner = (
        authors_manner(case, x, y) if performance is None else our_manner(case, x, y, performance)
    )
    functions: dict[str, Callable[[], Any]] = {
        "attack": manner.attack,
        "step": manner.step,
        "memory": partial(_memory_mib, manner.step, x.device),
        "facts": lambda: describe_environment(performance) if performance else None,
        "profile": lambda: _profile(manner.step, device),
    }
    for dtype in (torch.float32, torch.bfloat16):
        for sizes in PRODUCTS:
            functions[f"product {dtype} {sizes}"] = _product(sizes, dtype, x.device)
    while True:
        try:
            what = line.recv()
        except EOFError:
            return
        is_timed = what.startswith("seconds ")
        function = functions[what.removeprefix("seconds ")]
        answer = seconds_per_call(function, x.device) if is_timed else function()
        if x.device.type == "cuda":
            torch.cuda.synchronize(x.device)
        line.send(None if isinstance(answer, Tensor) else answer)


def _memory_mib(step: Callable[[], object], device: torch.device) -> float:
    """Highest of the process; on a GPU what a step takes there beside the matrices of products."""
    if device.type != "cuda":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - _product_bytes()) / 2**20


def _product_bytes() -> int:
    """Of the matrices that every worker holds."""
    numbers = sum(m * k + k * n + m * n for m, n, k in PRODUCTS)
    return numbers * (torch.float32.itemsize + torch.bfloat16.itemsize)


def _performance(device: str, *, is_compiled: bool) -> Performance:
    """Compiling where a long run on this machine would."""
    settings = PerformanceSettings(device=device, compile="auto" if is_compiled else "off")
    performance = resolve_performance(settings)
    size = batch_size_to_compile(
        settings, performance, batch_size=BATCH_SIZE, num_steps=NUM_STEPS_OF_A_LONG_RUN
    )
    return dataclasses.replace(performance, compiled_batch_size=size)


def measure(name: str, *, num_rounds: int, device: str) -> dict[str, Any]:
    """One case: steps and attacks in three manners, and products of matrices, in turn."""
    case = CASES[name]
    workers = {way: Worker(case, way, device) for way in ("authors", "not compiled", "ours")}
    is_gpu = torch.device(device).type == "cuda"
    timed = "seconds " if is_gpu else ""  # a product takes no longer there than the message
    functions = {
        f"{way} {what}": partial(worker.do, timed + what)
        for way, worker in workers.items()
        for what in ("attack", "step")
    }
    facts = workers["ours"].do("facts")
    formats = {"float32", facts["number_format"]}
    functions |= {
        (what := f"product torch.{dtype} {sizes}"): partial(workers["ours"].do, timed + what)
        for dtype in formats
        for sizes in PRODUCTS
    }
    seconds = seconds_in_turn(
        functions, num_rounds=num_rounds, num_warm_ups=2, clock=_told if is_gpu else None
    )
    memory_mib = {way: workers[way].do("memory") for way in ("authors", "ours")}
    kinds = workers["ours"].do("profile")
    for worker in workers.values():
        worker.end()
    peaks = {dtype: _fastest(seconds, dtype) for dtype in formats}
    tera = case.num_operations / 1e12
    own = peaks[facts["number_format"]]
    ours, authors = seconds["ours step"], seconds["authors step"]
    spreads = {
        "step_ratio": ratio(authors, ours),
        "attack_ratio": ratio(seconds["authors attack"], seconds["ours attack"]),
        "authors_images_per_second": per_second(BATCH_SIZE, authors),
        "ours_images_per_second": per_second(BATCH_SIZE, ours),
        "ours_tera_operations_per_second": per_second(tera, ours),
        "peak_tera_operations_per_second": own,
        "share_of_peak": per_second(tera / own.median, ours),
        "authors_share_of_peak": per_second(tera / peaks["float32"].median, authors),
    }
    if facts["is_compiled"]:  # else it is the same twice
        spreads["compiling_ratio"] = ratio(seconds["not compiled step"], ours)
    return {
        "case": name,
        **{key: asdict(value) for key, value in spreads.items()},
        "memory_mib": memory_mib,
        "kinds": kinds,
        "environment": facts,
    }


def _product(
    sizes: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> Callable[[], object]:
    rows, columns, length = sizes
    a, b = (torch.randn(*s, device=device).to(dtype) for s in ((rows, length), (length, columns)))
    out = torch.empty(rows, columns, dtype=dtype, device=device)
    return lambda: torch.mm(a, b, out=out)


def _told(function: Callable[[], Any]) -> float:
    """Seconds by the clock of the worker."""
    return float(function())


def _fastest(seconds: Mapping[str, list[float]], dtype: str) -> Spread:
    """Of all sizes the one with the highest median, in 1e12 operations per second."""
    found = [
        per_second(2e-12 * math.prod(sizes), seconds[f"product torch.{dtype} {sizes}"])
        for sizes in PRODUCTS
    ]
    return max(found, key=lambda spread: spread.median)


def _profile(step: Callable[[], object], device: str) -> dict[str, float]:
    """Share of the time of one step by kind of work."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    is_gpu = torch.device(device).type == "cuda"
    if is_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        step()
    return shares(profiler.key_averages(), is_gpu=is_gpu)


def shares(events: Iterable[Any], *, is_gpu: bool) -> dict[str, float]:
    """Share of each kind in the time of all, by the names of torch's operations.

    On a GPU the whole is the time of its kernels, as in torch's own table. Each appears a second
    time at the operation that began it, whose name tells what it is for; what none began is rest.
    """
    totals, whole = dict.fromkeys((*KINDS, "rest"), 0.0), 0.0
    for event in events:
        kind = next((k for k, words in KINDS.items() if any(w in event.key for w in words)), "rest")
        if not is_gpu:
            totals[kind] += event.self_cpu_time_total
        elif event.device_type == DeviceType.CPU:
            totals[kind] += event.self_device_time_total
        elif not event.is_user_annotation:
            whole += event.self_device_time_total
    if is_gpu:
        totals["rest"] = whole - sum(totals[kind] for kind in KINDS)
    return {kind: time / sum(totals.values()) for kind, time in totals.items()}


KINDS = {
    "convolutions back": ("convolution_backward",),
    "convolutions forwards": ("convolution", "conv2d"),
    "compiled passes over memory": ("CompiledFxGraph", "cpp_fused", "triton"),
    "BatchNorm": ("batch_norm",),
    "activations and sums": ("relu", "threshold", "clamp", "aten::add", "hardtanh"),
    "copies and conversions": ("copy_", "_to_copy", "contiguous", "cat", "pad"),
    "products": ("mm", "linear"),
    "optimiser": ("_foreach", "Optimizer"),
}
"""Kind -> parts of the names of torch's operations, the first that fits."""


def _spread(values: Mapping[str, Any], *, percent: bool = False) -> str:
    spread = Spread(**values)
    if not percent:
        return str(spread)
    return f"{spread.median:.0%} ({spread.low:.0%} to {spread.high:.0%})"


def _markdown(results: list[dict], without: list[dict], *, command_line: str) -> str:
    rows = [*results, *without]
    columns = {
        "step": "step_ratio",
        "attack alone": "attack_ratio",
        "compiling": "compiling_ratio",
        "authors, images/s": "authors_images_per_second",
        "ours, images/s": "ours_images_per_second",
    }
    columns = {name: key for name, key in columns.items() if any(key in r for r in rows)}
    speed = markdown_table(
        ("student", *columns),
        [
            (r["case"], *(_spread(r[key]) if key in r else "-" for key in columns.values()))
            for r in rows
        ],
    )
    arithmetic = markdown_table(
        ("student", "ours, 1e12/s", "fastest product, 1e12/s", "share", "authors' share (float32)"),
        [
            (
                r["case"],
                _spread(r["ours_tera_operations_per_second"]),
                _spread(r["peak_tera_operations_per_second"]),
                _spread(r["share_of_peak"], percent=True),
                _spread(r["authors_share_of_peak"], percent=True),
            )
            for r in results
        ],
    )
    memory = markdown_table(
        ("student", "authors, MiB", "ours, MiB"),
        [
            (r["case"], *(f"{r['memory_mib'][whose]:,.0f}" for whose in ("authors", "ours")))
            for r in results
        ],
    )
    shares = markdown_table(
        ("student", *KINDS, "rest"),
        [(r["case"], *(f"{r['kinds'][k]:.0%}" for k in (*KINDS, "rest"))) for r in results],
    )
    first = results[0]
    is_gpu = first["environment"]["device"] != "cpu"
    differences = [
        f"Ours is {first['environment']['number_format']}, the authors' float32"
        + (" as PyTorch has it by default (convolutions in TF32)." if is_gpu else ".")
    ]
    if without:
        differences.append(
            "In the last row the matrix units are hidden (`ONEDNN_MAX_CPU_ISA=AVX512_CORE`) and "
            "both are float32."
        )
    if "compiling" in columns:
        differences.append("Compiling: ours against ours without `torch.compile`.")
    lines = [
        "# One B-MTARD step: the authors' manner against ours",
        "",
        f"Batch {BATCH_SIZE} of 3 x 32 x 32, {NUM_STEPS} attack steps, two ResNet-18 teachers "
        "(of width 1, or 0.5 for students of width 0.25). Each manner in a process of its own, one "
        f"step of each in turn. Median (lowest to highest) of {first['step_ratio']['num_rounds']} "
        f"rounds; a ratio above 1 means ours is faster. {' '.join(differences)}",
        "",
        speed,
        "",
        "Arithmetic: multiplications and additions of convolutions and products, beside the "
        "fastest of several products of two matrices in the same format.",
        "",
        arithmetic,
        "",
        "Highest memory of tensors on the GPU in a step:"
        if is_gpu
        else "Highest memory of each process, PyTorch included (ours also holds the matrices of "
        "the products):",
        "",
        memory,
        "",
        "Where the time of one step of ours goes (torch.profiler):",
        "",
        shares,
        "",
        f"Command: `{command_line}`.",
        "",
        *(f"- {name}: {value}" for name, value in first["environment"].items()),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--case", choices=CASES, default=next(iter(CASES)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--write", type=Path, help="all cases, as a page and as JSON")
    options = parser.parse_args()
    if not options.write:
        result = measure(options.case, num_rounds=options.rounds, device=options.device)
        sys.stdout.write(json.dumps(result, indent=2) + "\n")
        return
    results = [measure(n, num_rounds=options.rounds, device=options.device) for n in CASES]
    without = []
    if torch.device(options.device).type == "cpu":
        os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE"  # the workers look for it when they begin
        found = measure(next(iter(CASES)), num_rounds=options.rounds, device=options.device)
        without = [found | {"case": f"{found['case']}, without matrix units"}]
    command_line = typed_command("tests.bench.bench_step", options, left_out=["case"])
    write_json_atomically(
        options.write.with_suffix(".json"),
        {"cases": results, "without": without[0] if without else None, "command": command_line},
    )
    text = _markdown(results, without, command_line=command_line)
    write_text_atomically(options.write, text)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
