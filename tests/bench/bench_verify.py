"""AutoAttack four ways, interleaved in one run: ours fast, ours compat, pyautoattack, torchattacks.

Every engine gets the same images in the same chunks, one chunk of each in turn, the order of the
engines rotating, so that a drift of the machine hits all. torchattacks is given the number of
steps that AutoAttack has (its own default is a tenth of it) and the unrescaled Square; it is
installed apart, because it brings a package `robustbench` that is not RobustBench.
"""

import argparse
import copy
import importlib.metadata
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from compressor.attacks.stages import AUTOATTACK, Mode, build_stages
from compressor.data import Batch, TestSplit, evaluation_batches, load_test_split
from compressor.environment import describe_environment
from compressor.networks import evaluation_mode
from compressor.performance import Performance, resolve_performance
from compressor.performance_settings import PerformanceSettings
from compressor.recipe import DataRecipe, TeacherRecipe
from compressor.reports.markdown import markdown_table
from compressor.run_directory import write_json_atomically, write_text_atomically
from compressor.teachers import load_model
from compressor.threat import ThreatModel
from compressor.verification.cascade import Subject
from compressor.verification.journal import Journal
from compressor.verification.verification import (
    VerificationPlan,
    attack_chunks,
    network_subject,
    verification_order,
)

THREAT = ThreatModel(epsilon_pixels=8 / 255)
SEED = 0


class Counter(nn.Module):
    """Counts images that go through a model, and those that a gradient is taken back to."""

    def __init__(self, model: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._model, self.num_forwards, self.num_backwards = model, 0, 0

    def forward(self, x_NCHW: Tensor) -> Tensor:
        self.num_forwards += len(x_NCHW)
        if x_NCHW.requires_grad:
            self.num_backwards += len(x_NCHW)
        logits_NK: Tensor = self._model(x_NCHW)
        return logits_NK


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One engine on one chunk."""

    stands: list[bool]
    num_forwards: int
    num_backwards: int
    seconds: float
    stage_seconds: Mapping[str, float] = field(default_factory=dict)
    """Of our engines: where the time goes."""


Engine = Callable[[Batch, TestSplit, Tensor], Measured]


def ours(network: nn.Module, performance: Performance, mode: Mode) -> Engine:
    def run(batch: Batch, split: TestSplit, places: Tensor) -> Measured:
        with evaluation_mode(network):
            subject = network_subject(network, performance)
            if mode == "compat":
                plain = Counter(lambda x: network(x.contiguous()))
                subject = Subject(answer=plain, float32=plain, search_dtype=plain)
            else:
                subject = Subject(
                    answer=Counter(subject.answer),
                    float32=Counter(subject.float32),
                    search_dtype=Counter(subject.search_dtype),
                )
            stages = build_stages(AUTOATTACK, threat=THREAT, mode=mode, batch_size=len(places))
            plan = VerificationPlan(stages=stages, seed=SEED, batch_size=len(places))
            started = time.perf_counter()
            found = next(
                attack_chunks(subject, _part(split, places), plan, journal=Journal.in_memory())
            )
            seconds = time.perf_counter() - started
        counters = {id(c): c for c in vars(subject).values()}.values()
        by_index = {s.index: s.broken_by is None for s in found.samples}
        return Measured(
            stands=[by_index[index] for index in batch.index_N.tolist()],
            num_forwards=sum(c.num_forwards for c in counters),
            num_backwards=sum(c.num_backwards for c in counters),
            seconds=seconds,
            stage_seconds={o.stage: o.duration_seconds for o in found.outcomes},
        )

    return run


def pyautoattack(network: nn.Module) -> Engine:
    from pyautoattack import AutoAttack

    def run(batch: Batch, split: TestSplit, places: Tensor) -> Measured:
        counter = Counter(network)
        with evaluation_mode(network), torch.random.fork_rng(devices=[]):
            attack = AutoAttack(
                counter,
                norm="Linf",
                eps=THREAT.epsilon_pixels,
                seed=SEED,
                device="cpu",
            )
            started = time.perf_counter()
            x = batch.x_NCHW.contiguous()
            _, answer_N = attack.run_standard_evaluation(x, batch.y_N, batch_size=len(x))
            seconds = time.perf_counter() - started
        return Measured(
            stands=(answer_N == batch.y_N).tolist(),
            num_forwards=counter.num_forwards,
            num_backwards=counter.num_backwards,
            seconds=seconds,
        )

    return run


def torchattacks(network: nn.Module, *, num_classes: int) -> Engine:
    from torchattacks import APGD, APGDT, FAB, MultiAttack, Square

    def run(batch: Batch, split: TestSplit, places: Tensor) -> Measured:
        counter = Counter(network).eval()  # or it "restores" training mode after each attack
        # It looks for a parameter to find the device.
        counter.register_parameter("device", nn.Parameter(torch.zeros(1)))
        eps = THREAT.epsilon_pixels
        with evaluation_mode(network), torch.random.fork_rng(devices=[]):
            attacks = [
                APGD(counter, eps=eps, steps=100, seed=SEED, loss="ce"),
                APGDT(counter, eps=eps, steps=100, seed=SEED, n_classes=num_classes),
                FAB(
                    counter,
                    eps=eps,
                    steps=100,
                    seed=SEED,
                    multi_targeted=True,
                    n_classes=num_classes,
                ),
                Square(counter, eps=eps, n_queries=5000, seed=SEED, resc_schedule=False),
            ]
            started = time.perf_counter()
            x_adv = MultiAttack(attacks)(batch.x_NCHW.contiguous(), batch.y_N)
            seconds = time.perf_counter() - started
            with torch.no_grad():
                stands_N = network(x_adv).argmax(dim=1) == batch.y_N
        return Measured(
            stands=stands_N.tolist(),
            num_forwards=counter.num_forwards,
            num_backwards=counter.num_backwards,
            seconds=seconds,
        )

    return run


def main() -> None:
    """Measure the engines on the chunks, print and write."""
    options = _options()
    performance = resolve_performance(PerformanceSettings(num_threads=options.threads))
    data = DataRecipe(source=options.data, validation_size=1)
    split = load_test_split(
        data, settings=PerformanceSettings(), device=performance.device, num_images=options.images
    )
    recipe = TeacherRecipe(role="robust", source=options.model)
    model = load_model(recipe, class_names=split.class_names, image_shape=split.image_shape)
    assert model.network is not None

    def network() -> nn.Module:
        """Its own for each engine, so that none can change that of another."""
        return copy.deepcopy(model.network).eval()

    engines = {
        "ours, fast": ours(network(), performance, "fast"),
        "pyautoattack": pyautoattack(network()),
        "ours, compat": ours(network(), performance, "compat"),
    }
    if options.torchattacks is not None:
        sys.path.insert(0, str(options.torchattacks))
        engines["torchattacks"] = torchattacks(network(), num_classes=len(split.class_names))
    wanted = {
        name: engines[name] for name in engines if name in options.engines or not options.engines
    }
    order_N = verification_order(split, seed=SEED)
    batches = list(evaluation_batches(split, batch_size=options.chunk, seed=SEED, order_N=order_N))
    measured: dict[str, list[Measured]] = {name: [] for name in wanted}
    for number, batch in enumerate(batches):
        places = order_N[number * options.chunk : (number + 1) * options.chunk]
        names = list(wanted)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            one = wanted[name](batch, split, places)
            measured[name].append(one)
            stages = ", ".join(f"{k} {v:.0f} s" for k, v in one.stage_seconds.items())
            sys.stderr.write(
                f"chunk {number}, {name}: {sum(one.stands)} stand, {one.seconds:.0f} s {stages}\n"
            )
    table = _summary(measured)
    sys.stdout.write(markdown_table(*table) + "\n")
    if options.write:
        _write(options, measured, table, model.sha256, describe_environment(performance))


def _part(split: TestSplit, places: Tensor) -> TestSplit:
    """Only the images of a chunk; the keys of an image do not depend on the others."""
    rising = places.sort().values
    values = vars(split) | {
        "index_N": split.index_N[rising],
        "labels_N": split.labels_N[rising],
    }
    return TestSplit(**values)


def _summary(measured: Mapping[str, Sequence[Measured]]) -> tuple[list[str], list[list[str]]]:
    reference = measured["pyautoattack"]
    header = ["engine", "stand", "robust accuracy", "flags that differ", "forwards", "backwards"]
    header += ["seconds", "of pyautoattack's (lowest to highest chunk)"]
    rows = []
    flags = [flag for one in reference for flag in one.stands]
    for name, ones in measured.items():
        own = [flag for one in ones for flag in one.stands]
        up = sum(a and not b for a, b in zip(own, flags, strict=True))
        down = sum(b and not a for a, b in zip(own, flags, strict=True))
        seconds = sum(one.seconds for one in ones)
        ratios = sorted(o.seconds / r.seconds for o, r in zip(ones, reference, strict=True))
        ratio = seconds / sum(one.seconds for one in reference)
        rows.append(
            [
                name,
                f"{sum(own)} of {len(own)}",
                f"{100 * sum(own) / len(own):.2f} %",
                f"{up} stand only here, {down} only there",
                f"{sum(one.num_forwards for one in ones):,}",
                f"{sum(one.num_backwards for one in ones):,}",
                f"{seconds:.0f}",
                f"{ratio:.2f}x ({ratios[0]:.2f} to {ratios[-1]:.2f})",
            ]
        )
    return header, rows


def _stages(measured: Mapping[str, Sequence[Measured]]) -> tuple[list[str], list[list[str]]]:
    """Where our engines spend their time."""
    own = {name: ones for name, ones in measured.items() if ones[0].stage_seconds}
    names = list(next(iter(own.values()))[0].stage_seconds)
    rows = [
        [name, *(f"{sum(one.stage_seconds[stage] for one in ones):.0f}" for stage in names)]
        for name, ones in own.items()
    ]
    return ["engine", *names], rows


def _write(
    options: argparse.Namespace,
    measured: Mapping[str, Sequence[Measured]],
    table: tuple[list[str], list[list[str]]],
    sha256: str,
    environment: Mapping[str, object],
) -> None:
    environment = dict(environment) | {
        name: importlib.metadata.version(name) for name in ("pyautoattack",)
    }
    kind = options.data.partition(":")[0]
    facts = {
        "command": f"bench_verify.py --model {options.name} --data {kind} --images "
        f"{options.images} --chunk {options.chunk}",
        "model": options.name,
        "model sha256": sha256,
        "threat": str(THREAT),
        "seed": SEED,
        "python": platform.python_version(),
        **environment,
    }
    text = "\n\n".join(
        [
            f"# AutoAttack on {options.name}",
            (__doc__ or "").strip(),
            markdown_table(*table),
            "Seconds of each stage, over all chunks:",
            markdown_table(*_stages(measured)),
            "\n".join(f"- {name}: {value}" for name, value in facts.items()),
        ]
    )
    write_text_atomically(options.write, text + "\n")
    chunks = {name: [vars(one) for one in ones] for name, ones in measured.items()}
    write_json_atomically(options.write.with_suffix(".json"), {"facts": facts, "chunks": chunks})


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="ARCH:WEIGHTS or self-describing weights")
    parser.add_argument("--name", required=True, help="of the model, for the table")
    parser.add_argument("--data", required=True, help="imagefolder:PATH")
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--chunk", type=int, default=100)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--engines", nargs="*", default=[], help="names; all if none is given")
    parser.add_argument("--torchattacks", type=Path, default=None, help="folder it is installed in")
    parser.add_argument("--write", type=Path, default=None)
    return parser.parse_args()


if __name__ == "__main__":
    main()
