"""Names under which training logs what each of its teachers has: written and read in one place."""

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, order=True)
class TeacherSeries:
    """One number of one teacher in every step."""

    role: str
    position: int
    """Among the teachers of its role, from 1; 0 where it is the only one."""
    name: str

    @property
    def label(self) -> str:
        """For a legend: `robust`, or `robust 2`."""
        return f"{self.role} {self.position}" if self.position else self.role

    @property
    def line_style(self) -> str:
        """Teachers of one role have one colour, and differ by it; it repeats after four."""
        return ("-", "--", ":", "-.")[max(0, self.position - 1) % 4]


def logged_name(role: str, quantity: str, *, position: int = 0) -> str:
    """`robust_loss_nats` of `loss_nats`; with a position `robust_loss_2_nats`."""
    stem, _, unit = quantity.rpartition("_")
    place = f"_{position}" if position else ""
    return f"{role}_{stem}{place}_{unit}"


def series_of_teachers(names: Iterable[str], quantity: str) -> list[TeacherSeries]:
    """Those of `names` that are a quantity of a teacher; clean ones first, then by position."""
    stem, _, unit = quantity.rpartition("_")
    form = re.compile(rf"(clean|robust)_{stem}(?:_([0-9]+))?_{unit}")
    matches = [found for name in set(names) if (found := form.fullmatch(name))]
    return sorted(
        TeacherSeries(role=found[1], position=int(found[2] or 0), name=found[0])
        for found in matches
    )
