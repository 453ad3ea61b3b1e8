"""What was measured on one run, image by image: read from the reports of its verifications.

Needs no torch.
"""

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from compressor.closed_table import ClosedTable, TupleOf
from compressor.comparison.folder import ComparisonFolder
from compressor.comparison.made_on import made_on
from compressor.errors import RunError
from compressor.proportions import Proportion
from compressor.reports.consistency import WRONG_CLEAN
from compressor.reports.files import ReportFiles
from compressor.reports.report import RobustnessReport, Status, read_report
from compressor.run_directory import read_json, write_json_atomically
from compressor.threat import ThreatModel

WHITE_BOX = ("pgd_sat", "pgd_trades", "cw_inf")
CASCADE = ("apgd_ce", "apgd_t", "fab_t", "square")


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Which images stand in one measurement of one run."""

    index: tuple[int, ...]
    """Positions in the test images, rising."""
    stands: tuple[bool, ...]

    @classmethod
    def of(cls, flags: Mapping[int, bool]) -> "Standing":
        """In the order of the images."""
        index = tuple(sorted(flags))
        return cls(index=index, stands=tuple(flags[place] for place in index))

    @property
    def proportion(self) -> Proportion:
        """How many stand, with their n."""
        return Proportion(num_correct=sum(self.stands), num_total=len(self.stands))


class CleanAnswers(ClosedTable):
    """Which test images a model answers correctly; float32, eval mode, nothing augmented."""

    schema_version: int = 1
    model_sha256: str
    content_sha256: str
    """Of the test images."""
    index: TupleOf[int]
    """Positions in the test images."""
    is_correct: TupleOf[bool]

    @property
    def standing(self) -> Standing:
        """In the order of the images."""
        return Standing.of(dict(zip(self.index, self.is_correct, strict=True)))


@dataclass(frozen=True, kw_only=True)
class Attacked:
    """What one verification of one run says."""

    status: Status
    reason: str
    clean: Standing
    by_attack: Mapping[str, Standing]
    """Each attack alone, where it tried every correct image."""
    worst_case: Standing
    measured_on: str
    """See `made_on`."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What a measurement must be of, to be of use."""

    model_sha256: str
    content_sha256: str
    """Of the test images."""


@dataclass(frozen=True, kw_only=True)
class Examination:
    """What a verification must have tried, to be of use."""

    threat: ThreatModel
    attacks: Mapping[str, Mapping[str, Any]]
    """Their parameters by name, in order."""
    num_images: int
    protocol: str
    """What the worst case over the attacks is called, which tells the mode."""

    def is_of(self, report: RobustnessReport) -> bool:
        """Whether a finished report tried exactly this, on images drawn by seed 0."""
        return (
            ThreatModel(norm=report.norm, epsilon_pixels=report.epsilon_pixels) == self.threat
            and [row.name for row in report.attacks] == list(self.attacks)
            and all(row.parameters == self.attacks[row.name] for row in report.attacks)
            and report.clean.num_total == self.num_images
            and report.protocol == self.protocol
            and (report.seed, report.looks, report.is_complete) == (0, "one", True)
        )


def write_clean(path: Path, answers: CleanAnswers) -> None:
    """As a whole or not at all."""
    write_json_atomically(path, answers.model_dump(mode="json"))


def find_clean(path: Path, subject: Subject, *, num_images: int) -> Standing | None:
    """Answers of this very model on so many of these very images, if they are there."""
    try:
        found = CleanAnswers.model_validate(read_json(path))
    except (RunError, ValidationError):
        return None
    known = Subject(model_sha256=found.model_sha256, content_sha256=found.content_sha256)
    if known != subject or {len(found.index), len(found.is_correct)} != {num_images}:
        return None
    return found.standing


def find_attacked(
    folder: ComparisonFolder,
    name: str,
    subject: Subject,
    asked: Examination,
) -> Attacked | None:
    """The verification of this very model that tried what was asked, if it is there."""
    for files in folder.reports(name):
        try:
            report = read_report(files.json)
        except RunError:
            continue
        known = Subject(
            model_sha256=report.target.sha256, content_sha256=report.data.content_sha256
        )
        if known == subject and asked.is_of(report):
            return read_attacked(report, files)
    return None


def read_attacked(report: RobustnessReport, files: ReportFiles) -> Attacked:
    """Image by image.

    Raises:
        RunError: if the table of samples is missing or contradicts the report.
    """
    samples = report.samples
    broken_by = dict(zip(samples.index, samples.broken_by, strict=True))
    clean = {place: broken != WRONG_CLEAN for place, broken in broken_by.items()}
    rows = _rows(files.samples)
    by_attack = {}
    for attack in report.attacks:
        if attack.accuracy is None:
            continue
        words = {place: row.get(attack.name) for place, row in rows.items()}
        stands = {place: words.get(place) == "stands" and clean[place] for place in clean}
        if words.keys() != clean.keys() or sum(stands.values()) != attack.accuracy.num_correct:
            raise RunError(
                f"{files.samples} contradicts {files.json.name} about {attack.name}; remove both, "
                "and the same command makes them again"
            )
        by_attack[attack.name] = Standing.of(stands)
    return Attacked(
        status=report.status,
        reason=report.status_reason,
        clean=Standing.of(clean),
        by_attack=by_attack,
        worst_case=Standing.of({place: broken is None for place, broken in broken_by.items()}),
        measured_on=made_on(report.environment),
    )


def _rows(path: Path) -> dict[int, dict[str, str]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return {int(row["index"]): row for row in csv.DictReader(file)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{path} cannot be read ({error}); remove it and its report, and the same command "
            "makes them again"
        ) from None
