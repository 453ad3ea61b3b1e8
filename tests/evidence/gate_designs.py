"""What other sequential gates would cost: images for the same power, by exact sums.

Every design keeps the chance of a wrong pass at 5 %. They differ in the evidence that they
collect and in how much of that 5 % they keep for one ordinary test at the planned number. None
ends without a pass before that, so that they differ in nothing else.

    python tests/evidence/gate_designs.py --write docs/results/gate-designs.md
"""

import argparse
import math
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from compressor import __version__
from compressor.gate.plan import (
    POWER,
    Boundary,
    average_images,
    chance_to_pass,
    first_true,
    images_for_power,
)
from compressor.gate.sequential import log_e_value
from compressor.proportions import Proportion
from compressor.reports.markdown import markdown_table
from compressor.run_directory import write_text_atomically

ERROR = 0.05
CHUNK_SIZE = 25
CASES = ((0.45, 0.50), (0.45, 0.55), (0.25, 0.35), (0.05, 0.15), (0.70, 0.80))
"""(limit, true accuracy)."""

Evidence = Callable[[Proportion, float, int], float]
"""(count, limit, planned images) -> log of the evidence against "at most the limit"."""


def five_shifts(count: Proportion, limit: float, _: int) -> float:
    """Ours."""
    return log_e_value(count, limit=limit)


def one_shift(count: Proportion, limit: float, planned: int) -> float:
    """The one shift that is best for accuracies that the planned number can just show."""
    shift = math.sqrt(-2 * math.log(ERROR) / (planned * limit * (1 - limit)))
    return shift * count.num_correct - count.num_total * math.log1p(limit * math.expm1(shift))


def uniform(count: Proportion, limit: float, _: int) -> float:
    """The uniform mixture over all accuracies above the limit, on a grid of 200."""
    failed = count.num_total - count.num_correct
    grid = [limit + (1 - limit) * (i + 0.5) / 200 for i in range(200)]
    logs = [
        count.num_correct * math.log(p / limit) + failed * math.log((1 - p) / (1 - limit))
        for p in grid
    ]
    largest = max(logs)
    return largest + math.log(math.fsum(math.exp(x - largest) for x in logs) / len(logs))


@dataclass(frozen=True, kw_only=True)
class Design:
    """A sequential gate."""

    name: str
    evidence: Evidence
    last_share: float
    """Of the permitted error, kept for the test at the planned number."""

    def ends(self, *, limit: float, planned: int) -> list[Boundary]:
        """When it passes; it ends without a pass at the planned number only."""
        enough = -math.log(ERROR * (1 - self.last_share))
        found: list[Boundary] = []
        for n in range(CHUNK_SIZE, planned + 1, CHUNK_SIZE):

            def passes(k: int, n: int = n) -> bool:
                if k > n:
                    return True
                count = Proportion(num_correct=k, num_total=n)
                last_look = count.lower_bound(1 - ERROR * self.last_share) if n == planned else 0.0
                return last_look >= limit or self.evidence(count, limit, planned) >= enough

            pass_from = first_true(passes, start=0)
            stop_up_to = pass_from - 1 if n == planned else -1
            found.append(Boundary(num_images=n, pass_from=pass_from, stop_up_to=stop_up_to))
        return found


DESIGNS = (
    Design(name="five shifts, half for the last look", evidence=five_shifts, last_share=0.5),
    Design(name="five shifts, a fifth for the last look", evidence=five_shifts, last_share=0.2),
    Design(name="five shifts alone", evidence=five_shifts, last_share=0.0),
    Design(name="one shift made for the plan, alone", evidence=one_shift, last_share=0.0),
    Design(name="uniform mixture, half for the last look", evidence=uniform, last_share=0.5),
)


def row(design: Design, *, limit: float, accuracy: float) -> list[str]:
    """Images planned for the power, and attacked on average."""
    one_look = images_for_power(limit=limit, accuracy=accuracy, confidence=1 - ERROR)
    assert one_look is not None
    planned = math.ceil(one_look / CHUNK_SIZE) * CHUNK_SIZE
    while chance_to_pass(ends := design.ends(limit=limit, planned=planned), accuracy=accuracy) < (
        POWER
    ):
        planned += CHUNK_SIZE
    clear = 2 * accuracy - limit
    return [
        design.name,
        f"{limit:.0%}",
        f"{accuracy:.0%}",
        f"{one_look:,}",
        f"{planned:,}",
        f"{average_images(ends, accuracy=accuracy):,.0f}",
        f"{average_images(ends, accuracy=clear):,.0f}",
        f"{chance_to_pass(ends, accuracy=limit):.2%}",
    ]


def to_markdown(rows: Sequence[Sequence[str]]) -> str:
    """The page of results."""
    header = ["design", "limit", "accuracy", "one look", "planned", "average", "if clear"]
    versions = [f"robust-compress: {__version__}", f"python: {platform.python_version()}"]
    blocks = [
        "# Designs of the sequential gate",
        f"Images for a power of {POWER:.0%} with a wrong pass in at most {ERROR:.0%}, looking "
        f"every {CHUNK_SIZE} images: for one look, planned, attacked on average if the accuracy "
        "is the true one, and if it is twice as far above the limit; and the chance of a pass at "
        "the limit. Exact sums.",
        markdown_table([*header, "pass at limit"], rows, align="lrrrrrrr"),
        "Ours is the first. Evidence alone plans more images. The shift made for the plan attacks "
        "fewer on average where the accuracy is the assumed one, but plans more, and mostly "
        "attacks more where it is clear, which is the usual case in CI.",
        "Command: `python tests/evidence/gate_designs.py --write docs/results/gate-designs.md`.",
        "\n".join(f"- {version}" for version in versions),
    ]
    return "\n\n".join(blocks) + "\n"


def main() -> None:
    """Compare, and print or write the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", type=Path)
    path = parser.parse_args().write
    rows = [row(d, limit=limit, accuracy=p) for limit, p in CASES for d in DESIGNS]
    if path is None:
        sys.stdout.write(to_markdown(rows))
    else:
        write_text_atomically(path, to_markdown(rows))


if __name__ == "__main__":
    main()
