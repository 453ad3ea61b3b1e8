"""What verifications found about the targets of a benchmark."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from compressor.attacks.stages import is_autoattack
from compressor.errors import RunError, UsageError
from compressor.reports.benchmark import Accuracy, printable
from compressor.reports.report import RobustnessReport, read_report
from compressor.reports.sections import threat_text
from compressor.threat import ThreatModel
from exporters.benchmark.target import BenchTarget


def find_accuracies(
    targets: Sequence[BenchTarget], report_paths: Sequence[Path] = ()
) -> dict[str, Accuracy]:
    """What verifications found, by the SHA-256 of the target; nothing else connects the two.

    Of several, those given come first, then those under the threat that the target claims, then
    those of AutoAttack, then those that are verified, then those of more images, then the lower
    accuracy. An invalid one of the same images, threat and kind of protocol outdoes them all.

    Raises:
        UsageError: if a report that was given is of none of the targets.
        RunError: if it cannot be read.
    """
    hashes = {target.sha256 for target in targets}
    found: dict[str, list[_Candidate]] = {}
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
        candidate = _Candidate(report=report, path=path, is_given=path in report_paths)
        found.setdefault(report.target.sha256, []).append(candidate)
    claims = {target.sha256: target.threat for target in targets}
    return {key: _best(candidates, claims[key]).accuracy() for key, candidates in found.items()}


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    """A report of a target."""

    report: RobustnessReport
    path: Path
    is_given: bool

    @property
    def threat(self) -> ThreatModel:
        return ThreatModel(norm=self.report.norm, epsilon_pixels=self.report.epsilon_pixels)

    @property
    def is_autoattack(self) -> bool:
        return is_autoattack([attack.name for attack in self.report.attacks])

    def rank(self, claim: str | None) -> tuple[object, ...]:
        """The higher, the more it says; without a claim, the wider attacker."""
        worst = self.accuracy().worst_case
        return (
            self.is_given,
            str(self.threat) == claim,
            (self.threat.norm == "linf", self.threat.epsilon_pixels),
            self.is_autoattack,
            worst is not None,
            self.report.clean.num_total,
            -worst.fraction if worst else 0.0,
        )

    def outdoes(self, best: "_Candidate") -> bool:
        """Whether this one found that the other is not to be believed."""
        return (
            self.report.status == "invalid"
            and not best.is_given
            and self.threat == best.threat
            and self.report.data.content_sha256 == best.report.data.content_sha256
            and self.is_autoattack >= best.is_autoattack
        )

    def accuracy(self) -> Accuracy:
        return _accuracy(self.report, self.path)


def _best(candidates: Sequence[_Candidate], claim: str | None) -> _Candidate:
    best = max(candidates, key=lambda candidate: candidate.rank(claim))
    return next((other for other in candidates if other.outdoes(best)), best)


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
