"""The table of samples: what each attack did to each image, in the order of the verification."""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from compressor.reports.consistency import WRONG_CLEAN
from compressor.reports.report import SampleTable
from compressor.run_directory import write_text_atomically
from compressor.verification.cascade import Found, Outcome

CLEAN_STAGE = WRONG_CLEAN

COLUMNS = (
    "index",
    "label",
    "broken_by",
    "prediction",
    "margin",
    "distance_pixels",
    "fools_in_8_bits",
    "num_forwards",
    "num_backwards",
)


@dataclass(kw_only=True)
class Sample:
    """One image."""

    index: int
    label: int
    broken_by: str | None = None
    prediction: int | None = None
    clean_margin: float = -float("inf")
    """On the clean image; below 0 where it is answered correctly."""
    margin: float = -float("inf")
    """The largest that any attack reached; where broken, at the point that broke it."""
    distance_pixels: float | None = None
    """Where broken by an attack."""
    fools_in_8_bits: bool = False
    num_forwards: int = 0
    num_backwards: int = 0
    fooled_by: dict[str, bool] = field(default_factory=dict)
    """Every attack that tried it, and whether it fooled."""

    def is_near(self, share: float) -> bool:
        """Whether an attack has left less than this share of the clean margin."""
        return self.margin > share * self.clean_margin

    def take(self, stage: str, found: Found) -> None:
        """What one stage did."""
        self.num_forwards += found.num_forwards
        self.num_backwards += found.num_backwards
        self.fooled_by[stage] = found.is_fooled
        if stage == CLEAN_STAGE:
            self.clean_margin = found.margin
        if self.broken_by is not None:
            return
        self.margin = max(self.margin, found.margin)
        if found.is_fooled:
            self.broken_by, self.prediction = stage, found.prediction
            self.margin = found.margin
            self.fools_in_8_bits = found.fools_in_8_bits
            self.distance_pixels = None if stage == CLEAN_STAGE else found.distance_pixels


def take_outcomes(samples: Sequence[Sample], outcomes: Iterable[Outcome]) -> None:
    """Enter finished stages, in their order."""
    for outcome in outcomes:
        for found in outcome.found:
            samples[found.place].take(outcome.stage, found)


def to_table(samples: Sequence[Sample]) -> SampleTable:
    """What a report keeps of them."""
    return SampleTable(
        index=tuple(s.index for s in samples),
        label=tuple(s.label for s in samples),
        broken_by=tuple(s.broken_by for s in samples),
        prediction=tuple(s.prediction for s in samples),
    )


def write_csv(path: Path, samples: Sequence[Sample], attacks: Sequence[str]) -> None:
    """One line per image; a column per attack: `fooled`, `stands` or empty where it did not try."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*COLUMNS, *attacks])
    for sample in samples:
        values = [_cell(getattr(sample, name)) for name in COLUMNS]
        words = {True: "fooled", False: "stands", None: ""}
        writer.writerow([*values, *(words[sample.fooled_by.get(name)] for name in attacks)])
    write_text_atomically(path, text.getvalue())


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.7g}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else str(value)
