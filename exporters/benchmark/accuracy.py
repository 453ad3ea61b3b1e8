"""What verifications found about the targets of a benchmark."""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from compressor.errors import RunError, UsageError
from compressor.reports.benchmark import Accuracy, printable
from compressor.reports.report import RobustnessReport, read_report
from compressor.reports.sections import threat_text
from exporters.benchmark.target import BenchTarget


def find_accuracies(
    targets: Sequence[BenchTarget], report_paths: Sequence[Path] = ()
) -> dict[str, Accuracy]:
    """What verifications found, by the SHA-256 of the target; nothing else connects the two.

    Of several, those given come first, then those that are verified, then those of more images,
    then the lower accuracy.

    Raises:
        UsageError: if a report that was given is of none of the targets.
        RunError: if it cannot be read.
    """
    hashes = {target.sha256 for target in targets}
    found: dict[str, list[tuple[tuple[bool, bool, int, float], Accuracy]]] = {}
    for path in report_paths:
        if not path.is_file():
            raise UsageError(f"--report {path} does not exist; check the path")
        report = read_report(path)
        if report.target.sha256 not in hashes:
            raise UsageError(
                f"--report {path} is of a file with SHA-256 {report.target.sha256}, which none of "
                "the targets has; verify the target itself"
            )
    for path in dict.fromkeys([*report_paths, *_reports_near(targets)]):
        try:
            report = read_report(path)
        except RunError:  # of an older version, or under way
            continue
        if report.target.sha256 not in hashes:
            continue
        accuracy = _accuracy(report, path)
        worst = accuracy.worst_case
        rank = (path in report_paths, worst is not None, report.clean.num_total)
        lower = -worst.fraction if worst else 0.0
        found.setdefault(report.target.sha256, []).append(((*rank, lower), accuracy))
    return {key: max(ranked, key=lambda pair: pair[0])[1] for key, ranked in found.items()}


def _reports_near(targets: Sequence[BenchTarget]) -> list[Path]:
    folders = {target.folder for target in targets}
    besides = {folder.parent for folder in folders} | {Path("runs")}
    folders |= set(chain.from_iterable(folder.glob("verify-*") for folder in besides))
    return sorted(chain.from_iterable(folder.glob("report*.json") for folder in folders))


def _accuracy(report: RobustnessReport, path: Path) -> Accuracy:
    status = "sequential" if report.looks == "many" else report.status
    is_shown = status == "verified"
    return Accuracy(
        status=status,
        report=printable("/".join(path.absolute().parts[-2:])),
        threat=threat_text(report),
        protocol=printable(report.protocol),
        images_sha256=printable(report.data.content_sha256),
        gradients_are_masked=report.artefact is not None and report.artefact.gradients_are_masked,
        clean=report.clean if is_shown else None,
        worst_case=report.worst_case if is_shown else None,
    )
