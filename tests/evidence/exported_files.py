"""How robust is each exported file of a run, attacked itself, beside the network it came from?

Each file and the network are verified on many test images: by APGD-CE and APGD-T with 100 steps
through the file's differentiable twin, and by what fools the network tried on the file. On some of
them Square asks the file itself, alone: in a verification it would only meet what transferred
images left standing. What is finished is kept and not repeated: a part of a file in the folder
`--work`, a whole file in the folder `--rows`, image by image, so that the reports may go. Remove
both where an attack has changed under one version.

    python tests/evidence/exported_files.py --run RUN --data imagefolder:FOLDER --work FOLDER \
        --rows docs/results/export-cifar10-small --write docs/results/export-cifar10-small.md
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter

from compressor import __version__
from compressor.errors import RunError
from compressor.image_sources import open_source
from compressor.metrics import read_metrics
from compressor.paired_difference import PairedDrop
from compressor.performance_settings import PerformanceSettings
from compressor.proportions import Proportion
from compressor.recipe_file import load_recipe
from compressor.reports.benchmark import Benchmark, BenchmarkRow, Timing
from compressor.reports.markdown import markdown_table
from compressor.reports.report import RobustnessReport, read_report
from compressor.run_directory import (
    RunDirectory,
    read_json,
    write_json_atomically,
    write_text_atomically,
)
from compressor.verification.request import VerificationRequest, prepare
from compressor.verification.verification import attack_chunks
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
    environment: Mapping[str, object]
    """Where it was verified."""
    status: str
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
    parser.add_argument("--rows", type=Path, required=True, help="for files that are finished")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--square-images", type=int, default=300)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="*", help="variants; cannot be written as a table")
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    if options.only and options.write:
        parser.error("--write needs all variants; leave --only out")
    run = RunDirectory.open(options.run)
    targets = {NETWORK: run.path} | {
        variant: run.onnx(variant) for variant in PRECISION_OF if run.onnx(variant).is_file()
    }
    rows = []
    for name, path in targets.items():
        if options.only and name not in options.only and name != NETWORK:
            continue
        rows.append(_kept_row(name, path, run, options))
        print(f"{name}: done", flush=True)  # noqa: T201
    if options.write:
        benchmark = _benchmark(run)
        write_text_atomically(options.write, _markdown(run, rows, benchmark, options))
        cost = benchmark.model_dump(mode="json")
        write_json_atomically(options.rows / "cost.json", cost)


def _kept_row(name: str, path: Path, run: RunDirectory, options: argparse.Namespace) -> Row:
    """Of this very file on these very images by this version, or anew."""
    shipped = run.model if path == run.path else path
    sha256 = sha256_of_file(shipped)
    data = load_recipe(run.resolved_recipe).data.model_copy(update={"source": options.data})
    facts = {
        "sha256": sha256,
        "content_sha256": open_source(data, part="test", download=False).content_sha256,
        "num_images": [options.images, options.square_images],
        "version": __version__,
    }
    kept = options.rows / f"{'network' if path == run.path else path.stem}.json"
    table = read_json(kept) if kept.is_file() else {}
    if table.get("facts") != facts:
        row = _row(name, path, shipped, sha256, options)
        write_json_atomically(kept, {"facts": facts, "row": asdict(row)})
        table = read_json(kept)
    return TypeAdapter(Row).validate_python(table["row"])


def _row(name: str, path: Path, shipped: Path, sha256: str, options: argparse.Namespace) -> Row:

    def asked(attacks: Sequence[str], num_images: int) -> VerificationRequest:
        return VerificationRequest(
            target=str(path),
            settings=PerformanceSettings(device="cpu", num_threads=options.threads),
            data_source=options.data,
            attacks=attacks,
            num_images=num_images,
            folder=options.work / f"{path.stem}-{sha256[:8]}-{'-'.join(attacks)}-{num_images}",
        )

    report = _verified(name, asked(GRADIENTS, options.images))
    by_name = {attack.name: attack for attack in report.attacks}
    adaptive, transfer = by_name["apgd_t"].standing, by_name.get("transfer")
    return Row(
        name=name,
        sha256=sha256,
        num_bytes=shipped.stat().st_size,
        broken=dict(zip(report.samples.index, report.samples.broken_by, strict=True)),
        adaptive=Proportion(num_correct=adaptive.num_correct, num_total=adaptive.num_total),
        transfer=None
        if transfer is None or transfer.accuracy is None
        else Proportion(
            num_correct=transfer.accuracy.num_correct, num_total=transfer.accuracy.num_total
        ),
        square=_square(name, asked(("square",), options.square_images)),
        environment=report.environment,
        status=report.status,
        masking="" if report.artefact is None else report.artefact.masking,
    )


def _verified(name: str, request: VerificationRequest) -> RobustnessReport:
    prepared = prepare(request)
    found = sorted(prepared.files.folder.glob("report*.json"))
    if found:
        try:
            report = read_report(found[0])
        except RunError:
            print(f"{name}: {found[0]} is damaged; again", flush=True)  # noqa: T201
        else:
            is_of_these = report.data.content_sha256 == prepared.split.content_sha256
            if is_of_these and report.environment["robust-compress"] == __version__:
                return report
    tell = lambda text: print(f"{name}: {text}", flush=True)  # noqa: E731, T201
    return verify(request, tell=tell)[0]


def _square(name: str, request: VerificationRequest) -> dict[int, bool]:
    """Test image -> whether it is right and withstands Square alone."""
    prepared = prepare(request)
    stages = tuple(stage for stage in prepared.stages if stage.name == "square")
    prepared = replace(prepared, stages=stages, plan=replace(prepared.plan, stages=stages))
    kept = prepared.files.folder / "square.json"
    facts = {"content_sha256": prepared.split.content_sha256, "version": __version__}
    table = read_json(kept) if kept.is_file() else {}
    if table.get("facts") != facts:
        journal = prepared.journal()
        with prepared.subject() as subject:
            *_, found = attack_chunks(subject, prepared.split, prepared.plan, journal=journal)
        stands = {str(sample.index): sample.broken_by is None for sample in found.samples}
        table = {"facts": facts, "stands": stands}
        write_json_atomically(kept, table)
        journal.remove()
        print(f"{name}: Square is done", flush=True)  # noqa: T201
    return {int(index): bool(stands) for index, stands in table["stands"].items()}


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
    student, num_square = recipe.student, len(network.square)
    facts = [
        f"run: {recipe.name}, recipe {recipe.recipe_id[:8]}, seed {recipe.seed}",
        f"network: {student.architecture} of width {student.width:g}",
        f"its weights: {network.sha256}",
        f"processes that wanted to run while latencies were taken: {benchmark.load_before} before, "
        f"{benchmark.load_after} after, on {benchmark.num_cores} cores; one thread",
        *(f"{name}: {value}" for name, value in network.environment.items()),
    ]
    blocks = [
        f"# Exported files of {recipe.name}, each attacked itself",
        f"Accuracies in %, n = {num_images} test images, {recipe.threat.build()}. Transfer: images "
        "that APGD-DLR made on the network, tried on the file. Adaptive: APGD-CE, then APGD-T, "
        "100 steps each, through the differentiable twin of the file. Square: 5,000 queries of "
        f"the file itself on {num_square} of the images, and nothing else. Worst case: image by "
        "image over all of these. Drops in points against the network, with 95 % intervals, image "
        "by image.",
        markdown_table(header, cells),
        "\n".join(
            f"- {row.name}: {row.status}{row.masking and f'; {row.masking}'}" for row in rows
        ),
        *_fine_tunings(run),
        "Square keeps what raises the margin, and a file that rounds its logits shows small rises "
        "as none: where Square alone leaves more standing than of the network, the file hides from "
        "the search and is not more robust. The worst case is what counts.",
        "`python tests/evidence/exported_files.py --run RUN --data imagefolder:DATA "
        f"--work FOLDER --rows FOLDER --images {options.images} "
        f"--square-images {options.square_images}`",
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


def _fine_tunings(run: RunDirectory) -> Iterator[str]:
    """What each fine-tuning of the rounded network was worth on held-out images."""
    for folder in sorted(run.path.glob("fine-tuning-*")):
        found = [r for r in read_metrics(RunDirectory(folder)) if r["kind"] == "validation"]
        tried = "; ".join(
            f"after {row['epoch']} epochs {_percent(row['clean_correct'], row['num_validation'])} "
            f"clean and {_percent(row['robust_correct'], row['num_validation'])} under PGD"
            for row in found
        )
        best = max((row["epoch"] for row in found if row["is_best"]), default=0)
        kept = f"epoch {best} is in int8-qat" if best else "none was better, so int8 stays as it is"
        yield (
            f"Fine-tuning the rounded network, on {found[0]['num_validation']} held-out images: "
            f"{tried}; {kept}."
        )


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


if __name__ == "__main__":
    main()
