"""Do the validity checks leave healthy models alone? Every alarm here is a false one.

APGD-CE and APGD-T attack some test images of each model, as in a verification; then all checks of
`compressor.validity` doubt the result. Adversarial images transfer from the other models of the
same images. No model here hides its gradients, and no attack is broken.

    python tests/evidence/healthy_models.py --cifar10 FOLDER --teachers FOLDER --digits RUN RUN \
        --write docs/results/healthy-models.md
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from compressor.attacks.protocol import Model
from compressor.attacks.search import by_logits
from compressor.attacks.stages import Stage, build_stages
from compressor.data import Batch, TestSplit, evaluation_batches, load_test_split
from compressor.environment import describe_environment
from compressor.folding import EvaluationView
from compressor.performance import Performance, resolve_performance
from compressor.performance_settings import PerformanceSettings
from compressor.recipe import DataRecipe, TeacherRecipe
from compressor.reports.markdown import markdown_table
from compressor.reports.report import ValidityRow
from compressor.run_directory import write_text_atomically
from compressor.teachers import load_model
from compressor.threat import ThreatModel
from compressor.validity.active_test import penultimate_features
from compressor.validity.claim import Claim
from compressor.validity.validity import check_validity

ATTACKS = ("apgd_ce", "apgd_t")
STRONGEST = "apgd_t"
STUDENT = Path("docs/results/cifar10-small/model.safetensors")
TEACHERS = ("clean_resnet18_w0.5.safetensors", "robust_resnet18_w0.5.safetensors")


@dataclass(frozen=True, kw_only=True)
class Group:
    """Models that are attacked on the same images."""

    data_source: str
    threat: ThreatModel
    sources: Mapping[str, str]
    """Name -> what `load_model` takes."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One model, one seed."""

    model: str
    threat: ThreatModel
    seed: int
    num_images: int
    num_correct: int
    num_standing: int
    rows: Sequence[ValidityRow]
    duration_seconds: float


def main() -> None:
    """Check every model for every seed and write the page."""
    options = _options()
    device = resolve_performance(PerformanceSettings(device=options.device)).device
    performance = Performance(device=device)  # in float32
    results = []
    for group in _groups(options):
        for result in check_group(group, options, performance):
            results.append(result)
            alarms = [row.name for row in result.rows if row.status == "alarm"]
            sys.stderr.write(
                f"{result.model}, seed {result.seed}: {result.num_standing} of "
                f"{result.num_images} stand, alarms: {', '.join(alarms) or 'none'}, "
                f"{result.duration_seconds:.0f} s\n"
            )
            text = to_markdown(results, options, describe_environment(performance))
            if options.write:
                write_text_atomically(options.write, text)  # a long run keeps what it has
    sys.stdout.write(text)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cifar10", type=Path, help="folder of CIFAR-10 as JPEG files")
    parser.add_argument("--teachers", type=Path, help="folder of the two CIFAR-10 teachers")
    parser.add_argument("--digits", type=Path, nargs="+", default=[], help="runs of digits")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--square", action="store_true", help="also run the Square attack")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    if options.cifar10 is None and not options.digits:
        parser.error("give --cifar10 with or without --teachers, or --digits, or all")
    return options


def _groups(options: argparse.Namespace) -> Iterator[Group]:
    if options.cifar10 is not None:
        sources = {"cifar10-small student": str(STUDENT)}
        if options.teachers is not None:
            for name in TEACHERS:
                sources[Path(name).stem] = f"resnet18:{options.teachers / name}"
        yield Group(
            data_source=f"imagefolder:{options.cifar10}",
            threat=ThreatModel(epsilon_pixels=8 / 255),
            sources=sources,
        )
    if options.digits:
        yield Group(
            data_source="digits",
            threat=ThreatModel(epsilon_pixels=32 / 255),
            sources={f"digits {run.parent.name} {run.name}": str(run) for run in options.digits},
        )


def check_group(
    group: Group, options: argparse.Namespace, performance: Performance
) -> Iterator[Result]:
    """Every model of the group, for every seed."""
    recipe = DataRecipe(source=group.data_source, validation_size=100)
    for seed in options.seeds:
        split = load_test_split(
            recipe,
            settings=PerformanceSettings(),
            device=performance.device,
            num_images=options.images,
            seed=seed,
        )
        batch = next(iter(evaluation_batches(split, batch_size=options.images, seed=seed)))
        models = {
            name: performance.place_network(_load(source, split))
            for name, source in group.sources.items()
        }
        views = {name: EvaluationView(network, performance) for name, network in models.items()}
        stages = build_stages(_attacks(options), threat=group.threat, mode="fast", batch_size=250)
        for name, network in models.items():
            features = penultimate_features(network, batch.x_NCHW)
            yield check_model(name, views, features, batch, stages, seed=seed)


def _attacks(options: argparse.Namespace) -> tuple[str, ...]:
    return (*ATTACKS, "square") if options.square else ATTACKS


def _load(source: str, split: TestSplit) -> torch.nn.Module:
    model = load_model(
        TeacherRecipe(role="robust", source=source),
        class_names=split.class_names,
        image_shape=split.image_shape,
    )
    return model.network.eval()


def check_model(
    name: str,
    models: Mapping[str, Model],
    features: Model | None,
    batch: Batch,
    stages: Sequence[Stage],
    *,
    seed: int,
) -> Result:
    """Attack one of the models and doubt the result."""
    started_at_seconds = time.perf_counter()
    model = models[name]
    broken = {stage.name: torch.zeros_like(batch.y_N, dtype=torch.bool) for stage in stages}
    with torch.no_grad():
        logits_NK = model(batch.x_NCHW)
    is_correct_N = ~by_logits(batch.x_NCHW, logits_NK, batch.y_N)
    stands_N = is_correct_N.clone()
    for stage in stages:
        index_M = stands_N.nonzero()[:, 0]
        broken[stage.name][index_M] = _attack(stage, model, batch, index_M, seed=seed)
        stands_N &= ~broken[stage.name]
    (strongest,) = (stage for stage in stages if stage.name == STRONGEST)
    claim = Claim(
        model=model,
        x_NCHW=batch.x_NCHW,
        y_N=batch.y_N,
        keys_N=batch.keys_N,
        threat=stages[0].search.threat,
        attack=strongest.search,
        num_steps=int(strongest.parameters["num_steps"]),
        broken_by_white_box_N=broken["apgd_ce"] | broken["apgd_t"],
        broken_by_square_N=broken.get("square"),
        teachers={other: answer for other, answer in models.items() if other != name},
        features=features,
    )
    rows = check_validity(claim, num_images=len(batch.y_N))
    return Result(
        model=name,
        threat=claim.threat,
        seed=seed,
        num_images=len(batch.y_N),
        num_correct=int(is_correct_N.sum()),
        num_standing=int(stands_N.sum()),
        rows=rows,
        duration_seconds=time.perf_counter() - started_at_seconds,
    )


def _attack(
    stage: Stage, model: Model, batch: Batch, index_M: torch.Tensor, *, seed: int
) -> torch.Tensor:
    """Which of these images the attack breaks, bool [M]."""
    x, y = batch.x_NCHW[index_M], batch.y_N[index_M]
    if not len(y):
        return torch.zeros_like(y, dtype=torch.bool)
    draws = stage.draws(x, keys_N=batch.keys_N[index_M], seed=seed)
    found = stage.search.search(model, x, y, draws=draws, judge=by_logits).x_adv_NCHW
    with torch.no_grad():
        return by_logits(found, model(found), y)


def to_markdown(
    results: Sequence[Result], options: argparse.Namespace, environment: Mapping[str, object]
) -> str:
    """The page of results."""
    statuses = Counter(row.status for result in results for row in result.rows)
    attacks = "APGD-CE and APGD-T" + (" and Square" if options.square else "")
    blocks = [
        "# Validity checks on healthy models",
        f"**{statuses['alarm']} alarms** in {statuses['alarm'] + statuses['passed']} checks that "
        f"were run on {len(results)} evaluations (model x seed); {statuses['not_run']} could not "
        f"be run. Every alarm would be a false one. The evaluations are {attacks} on "
        f"{options.images} test images; the seed decides which images, and all random numbers.",
        markdown_table(
            ["model", "threat", "seed", "correct", "standing", "alarms", "not run", "seconds"],
            [_summary(result) for result in results],
        ),
    ]
    for model in dict.fromkeys(result.model for result in results):
        of_model = [result for result in results if result.model == model]
        blocks += [f"## {model}", _details(of_model)]
    blocks.append(f"Command: `{_command(options)}`.")
    blocks.append("\n".join(f"- {name}: {value}" for name, value in environment.items()))
    return "\n\n".join(blocks) + "\n"


def _summary(result: Result) -> list[str]:
    names = {status: [r.name for r in result.rows if r.status == status] for status in _STATUSES}
    return [
        result.model,
        str(result.threat),
        str(result.seed),
        f"{result.num_correct} of {result.num_images}",
        f"{result.num_standing} of {result.num_images}",
        ", ".join(names["alarm"]) or "none",
        ", ".join(names["not_run"]) or "none",
        f"{result.duration_seconds:.0f}",
    ]


_STATUSES = ("passed", "alarm", "not_run")


def _details(results: Sequence[Result]) -> str:
    header = ["check", *(f"seed {result.seed}" for result in results), "threshold"]
    lines = []
    for rows in zip(*(result.rows for result in results), strict=True):
        lines.append([rows[0].name, *(_cell(row) for row in rows), rows[0].threshold])
    return markdown_table(header, lines)


def _cell(row: ValidityRow) -> str:
    if row.status == "not_run":
        return f"not run: {row.advice}"
    p_value = "" if row.p_value is None else f", p = {row.p_value:.2g}"
    alarm = "**alarm**: " if row.status == "alarm" else ""
    return f"{alarm}{row.found}{p_value}"


def _command(options: argparse.Namespace) -> str:
    """As typed, without the folders of this machine."""
    words = ["python tests/evidence/healthy_models.py"]
    words += ["--cifar10 DATA"] if options.cifar10 else []
    words += ["--teachers TEACHERS"] if options.teachers else []
    if options.digits:
        words += ["--digits", *(f"{run.parent.name}/{run.name}" for run in options.digits)]
    words += ["--seeds", *map(str, options.seeds), f"--images {options.images}"]
    words += ["--square"] if options.square else []
    return " ".join([*words, "--write docs/results/healthy-models.md"])


if __name__ == "__main__":
    main()
