"""How robust is each exported file of a run, attacked itself, beside the network it came from?

Each file and the network are verified twice: APGD-CE and APGD-T with 100 steps through the file's
differentiable twin, and what fools the network tried on the file, on many test images; Square on
the file itself, on some of them. Finished verifications are kept and not repeated.

    python tests/evidence/exported_files.py --run RUN --data imagefolder:FOLDER --work FOLDER \
        --write docs/results/export-cifar10-small.md
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from compressor.environment import describe_environment
from compressor.errors import RunError
from compressor.paired_difference import PairedDrop
from compressor.performance import Performance
from compressor.performance_settings import PerformanceSettings
from compressor.proportions import Proportion
from compressor.recipe_file import load_recipe
from compressor.reports.benchmark import Benchmark, BenchmarkRow, Timing
from compressor.reports.markdown import markdown_table
from compressor.reports.report import RobustnessReport, read_report
from compressor.run_directory import RunDirectory, write_json_atomically, write_text_atomically
from compressor.verification.request import VerificationRequest
from compressor.verification_workflow import verify
from compressor.weights import sha256_of_file
from exporters.benchmark.measurement import Plan
from exporters.benchmark.report import run_benchmark
from exporters.benchmark.targets import find_targets
from exporters.exported_model import PRECISION_OF

GRADIENTS = ("apgd_ce", "apgd_t")
CLEAN = "clean"
NETWORK = "network (PyTorch)"
BATCH_SIZES = (1, 32)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One file or the network, as plain values that can be kept."""

    name: str
    sha256: str
    num_bytes: int
    broken: Mapping[int, str | None]
    """Test image -> what broke it with gradients or by transfer; `clean`; None: it stands."""
    adaptive: Proportion
    """Of attacks with gradients alone."""
    transfer: Proportion | None
    square: Mapping[int, bool]
    """Test image -> whether it is right and withstands Square."""
    statuses: tuple[str, str]
    masking: str

    @property
    def stands(self) -> dict[int, bool]:
        """Worst case over all that was tried on each image."""
        return {i: by is None and self.square.get(i, True) for i, by in self.broken.items()}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--work", type=Path, required=True, help="for reports that are finished")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--square-images", type=int, default=300)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="*", help="variants; the table needs all")
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    run = RunDirectory.open(options.run)
    targets = {NETWORK: run.path} | {
        variant: run.onnx(variant) for variant in PRECISION_OF if run.onnx(variant).is_file()
    }
    rows = []
    for name, path in targets.items():
        if options.only and name not in options.only and name != NETWORK:
            continue
        rows.append(_row(name, path, run, options))
        print(f"{name}: done", flush=True)  # noqa: T201
    if options.write:
        benchmark = _benchmark(run)
        write_text_atomically(options.write, _markdown(run, rows, benchmark, options))
        table = {"rows": [asdict(row) for row in rows], "cost": benchmark.model_dump(mode="json")}
        write_json_atomically(options.write.with_suffix(".json"), table)


def _row(name: str, path: Path, run: RunDirectory, options: argparse.Namespace) -> Row:
    many = _verified(name, path, run, options, attacks=GRADIENTS, num_images=options.images)
    some = _verified(
        name, path, run, options, attacks=("square",), num_images=options.square_images
    )
    by_name = {attack.name: attack for attack in many.attacks}
    adaptive, transfer = by_name["apgd_t"].standing, by_name.get("transfer")
    return Row(
        name=name,
        sha256=sha256_of_file(run.model if path == run.path else path),
        num_bytes=(run.model if path == run.path else path).stat().st_size,
        broken=dict(zip(many.samples.index, many.samples.broken_by, strict=True)),
        adaptive=Proportion(num_correct=adaptive.num_correct, num_total=adaptive.num_total),
        transfer=None
        if transfer is None or transfer.accuracy is None
        else Proportion(
            num_correct=transfer.accuracy.num_correct, num_total=transfer.accuracy.num_total
        ),
        square={
            index: by is None
            for index, by in zip(some.samples.index, some.samples.broken_by, strict=True)
        },
        statuses=(many.status, some.status),
        masking="" if many.artefact is None else many.artefact.masking,
    )


def _verified(
    name: str,
    path: Path,
    run: RunDirectory,
    options: argparse.Namespace,
    *,
    attacks: Sequence[str],
    num_images: int,
) -> RobustnessReport:
    sha256 = sha256_of_file(run.model if path == run.path else path)
    kept = options.work / f"{path.stem}-{sha256[:8]}-{'-'.join(attacks)}-{num_images}"
    found = sorted(kept.glob("report*.json"))
    if found:
        try:
            return read_report(found[0])
        except RunError:
            print(f"{name}: {found[0]} is damaged; again", flush=True)  # noqa: T201
    request = VerificationRequest(
        target=str(path),
        settings=PerformanceSettings(device="cpu", num_threads=options.threads),
        data_source=options.data,
        attacks=attacks,
        num_images=num_images,
        folder=kept,
    )
    return verify(request, tell=lambda text: print(f"{name}: {text}", flush=True))[0]  # noqa: T201


def _benchmark(run: RunDirectory) -> Benchmark:
    """Latencies on one thread, the network and its files in turn."""
    plan = Plan(batch_sizes=BATCH_SIZES, thread_counts=(1,), num_rounds=5, seconds=10.0)
    return run_benchmark(find_targets(str(run.path)), plan, {})


def _markdown(
    run: RunDirectory, rows: Sequence[Row], benchmark: Benchmark, options: argparse.Namespace
) -> str:
    network, num_images = rows[0], len(rows[0].broken)
    header = (
        *("", "bytes", "of fp32", "clean", "transfer", "adaptive", "Square", "worst case"),
        *("clean drop", "robust drop", *(f"p50 at batch {size}, ms" for size in BATCH_SIZES)),
    )
    by_sha256 = {target.sha256: target for target in benchmark.targets}
    cells = [_cells(row, rows, by_sha256[row.sha256]) for row in rows]
    recipe = load_recipe(run.resolved_recipe)
    environment = describe_environment(Performance(device=torch.device("cpu")))
    student, num_square = recipe.student, len(network.square)
    facts = [
        f"run: {recipe.name}, recipe {recipe.recipe_id[:8]}, seed {recipe.seed}",
        f"network: {student.architecture} of width {student.width:g}",
        f"its weights: {network.sha256}",
        f"processes that wanted to run while latencies were taken: {benchmark.load_before} before, "
        f"{benchmark.load_after} after, on {benchmark.num_cores} cores; one thread",
        *(f"{name}: {value}" for name, value in environment.items()),
    ]
    blocks = [
        f"# Exported files of {recipe.name}, each attacked itself",
        f"Accuracies in %, n = {num_images} test images, {recipe.threat.build()}. Transfer: images "
        "that APGD-DLR made on the network, tried on the file. Adaptive: APGD-CE, then APGD-T, "
        "100 steps each, through the differentiable twin of the file. Square: 5,000 queries of "
        f"the file itself on {num_square} of the images. Worst case: image by image over all of "
        "these. Drops in points against the network, with 95 % intervals, image by image.",
        markdown_table(header, cells),
        "\n".join(f"- {row.name}: {_statuses(row)}" for row in rows),
        "`python tests/evidence/exported_files.py --run RUN --data imagefolder:DATA "
        f"--work FOLDER --images {options.images} --square-images {options.square_images}`",
        "\n".join(f"- {fact}" for fact in facts),
    ]
    return "\n\n".join(blocks) + "\n"


def _cells(row: Row, rows: Sequence[Row], costs: BenchmarkRow) -> list[str]:
    network, float32 = rows[0], rows[1]
    right = {index: by != CLEAN for index, by in row.broken.items()}
    right_before = {index: by != CLEAN for index, by in network.broken.items()}
    timings = [costs.timing(size, 1) for size in BATCH_SIZES]
    is_network = row is network
    return [
        row.name,
        f"{row.num_bytes:,}",
        f"{100 * row.num_bytes / float32.num_bytes:.0f} %",
        _percent(sum(right.values()), len(right)),
        "-" if row.transfer is None else f"{100 * row.transfer.fraction:.2f}",
        f"{100 * row.adaptive.fraction:.2f}",
        _percent(sum(row.square.values()), len(row.square)),
        _percent(sum(row.stands.values()), len(row.stands)),
        "" if is_network else _points(_drop(right_before, right)),
        "" if is_network else _points(_drop(network.stands, row.stands)),
        *(_ms(timing) for timing in timings),
    ]


def _drop(before: Mapping[int, bool], after: Mapping[int, bool]) -> PairedDrop:
    return PairedDrop(
        num_newly_broken=sum(before[i] and not after[i] for i in after),
        num_newly_fixed=sum(after[i] and not before[i] for i in after),
        num_total=len(after),
    )


def _points(drop: PairedDrop) -> str:
    low, high = drop.interval_95()
    return f"{100 * drop.fraction:.2f} ({100 * low:.2f} to {100 * high:.2f})"


def _ms(timing: Timing | None) -> str:
    if timing is None:
        return "-"
    return f"{timing.p50_ms:.2f} ({timing.lowest_p50_ms:.2f} to {timing.highest_p50_ms:.2f})"


def _percent(num: int, total: int) -> str:
    return f"{100 * num / total:.2f}"


def _statuses(row: Row) -> str:
    gradients, square = row.statuses
    masking = f"{row.masking}; " if row.masking else ""
    return f"{masking}attacks with gradients {gradients}, Square alone {square}"


if __name__ == "__main__":
    main()
