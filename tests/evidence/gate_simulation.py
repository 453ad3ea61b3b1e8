"""How often the gate passes what it must not, and how many images it needs; by simulation.

Populations of known accuracy are drawn many times, chunk by chunk, and judged by the very code of
the gate: `judge_look` for one look, `decide` for the sequential gate (its boundaries are computed
once for each number of images, as counts are all that it sees). Beside them stands what the gate
does not do: repeating the one-look test after every chunk.

    python tests/evidence/gate_simulation.py --write docs/results/gate-simulation.md
"""

import argparse
import math
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from compressor import __version__
from compressor.gate.plan import (
    Boundary,
    average_images,
    boundaries,
    chance_to_pass,
    first_true,
    images_for_power,
)
from compressor.gate.sequential import Look, LowerBound, early_look, judge_look
from compressor.proportions import Proportion
from compressor.reports.markdown import markdown_table
from compressor.run_directory import write_json_atomically, write_text_atomically

CONFIDENCE = 0.95
CHUNK_SIZE = 50
SIZES = (50, 100, 200, 500, 1_000, 2_000)
LIMIT = 0.45


@dataclass(frozen=True, kw_only=True)
class Population:
    """Accuracies of equally large classes; every chunk has the same number of each."""

    name: str
    class_accuracies: tuple[float, ...]

    def draw(self, *, num_draws: int, num_images: int, seed: int) -> np.ndarray:
        """Correct images after each chunk, int [num_draws, num_chunks]."""
        generator = np.random.default_rng([seed, num_images])
        per_class = CHUNK_SIZE // len(self.class_accuracies)
        shape = (num_draws, num_images // CHUNK_SIZE)
        chunks = sum(generator.binomial(per_class, p, size=shape) for p in self.class_accuracies)
        return np.cumsum(chunks, axis=1)


POPULATIONS = (
    Population(name="at the limit", class_accuracies=(LIMIT,)),
    Population(name="1 point below", class_accuracies=(LIMIT - 0.01,)),
    Population(
        name="at the limit, classes from 5 to 85 %",
        class_accuracies=(0.05, 0.15, 0.30, 0.40, 0.45, 0.45, 0.50, 0.60, 0.75, 0.85),
    ),
)


@dataclass(frozen=True, kw_only=True)
class FalsePasses:
    """Fractions of draws that passed although the population is not above the limit."""

    population: str
    num_images: int
    one_look: float
    sequential: float
    repeated_one_look: float
    """Of a gate that we do not have."""
    average_images: float
    """That the sequential gate attacked."""


def smallest_pass(num_images: int, *, limit: float, lower_bound: LowerBound) -> int:
    """The count from which on `judge_look` passes; more than `num_images` if none does."""

    def passes(num_correct: int) -> bool:
        if num_correct > num_images:
            return True
        count = Proportion(num_correct=num_correct, num_total=num_images)
        look = Look(rule="", limit=limit, count=count, num_planned=num_images)
        judged = judge_look(look, confidence=CONFIDENCE, lower_bound=lower_bound)
        return judged.verdict == "pass"

    return first_true(passes, start=0)


def play(correct: np.ndarray, ends: Sequence[Boundary]) -> tuple[np.ndarray, np.ndarray]:
    """Whether each draw passes sequentially, bool [num_draws], and after how many images."""
    sizes = np.array([end.num_images for end in ends])
    passes = correct >= np.array([end.pass_from for end in ends])
    stops = passes | (correct <= np.array([end.stop_up_to for end in ends]))
    first = stops.argmax(axis=1)  # all stop at the last look
    return passes[np.arange(len(correct)), first], sizes[first]


def false_passes(
    population: Population, *, num_images: int, num_draws: int, seed: int
) -> FalsePasses:
    """The gates on one population."""
    correct = population.draw(num_draws=num_draws, num_images=num_images, seed=seed)
    ends = boundaries(
        limit=LIMIT, confidence=CONFIDENCE, num_planned=num_images, chunk_size=CHUNK_SIZE
    )
    passed, stopped_after = play(correct, ends)
    one_look = np.array(
        [
            smallest_pass(end.num_images, limit=LIMIT, lower_bound=Proportion.lower_bound)
            for end in ends
        ]
    )
    return FalsePasses(
        population=population.name,
        num_images=num_images,
        one_look=float((correct[:, -1] >= one_look[-1]).mean()),
        sequential=float(passed.mean()),
        repeated_one_look=float((correct >= one_look).any(axis=1).mean()),
        average_images=float(stopped_after.mean()),
    )


@dataclass(frozen=True, kw_only=True)
class Clock:
    """An incomplete evaluation at the limit, ended by a clock or by whoever likes what he sees."""

    ended_by: str
    early_look: float
    one_look: float


def ended_early(*, num_draws: int, seed: int, num_images: int = 2_000) -> list[Clock]:
    """False passes of incomplete reports; a standing image costs the time of 20 broken ones."""
    population = POPULATIONS[0]
    correct = population.draw(num_draws=num_draws, num_images=num_images, seed=seed)
    sizes = np.arange(1, correct.shape[1] + 1) * CHUNK_SIZE
    seconds = 20 * correct + (sizes - correct)
    last = (seconds <= seconds.mean(axis=0)[len(sizes) // 2]).sum(axis=1) - 1
    by_clock = (np.arange(len(correct)), last)
    rows = {}
    for name, bound in (("early", early_look), ("one", Proportion.lower_bound)):
        needed = np.array([smallest_pass(n, limit=LIMIT, lower_bound=bound) for n in sizes])
        rows[name] = correct >= needed
    return [
        Clock(
            ended_by="a clock",
            early_look=float(rows["early"][by_clock].mean()),
            one_look=float(rows["one"][by_clock].mean()),
        ),
        Clock(
            ended_by="the first moment at which it would pass",
            early_look=float(rows["early"].any(axis=1).mean()),
            one_look=float(rows["one"].any(axis=1).mean()),
        ),
    ]


@dataclass(frozen=True, kw_only=True)
class Need:
    """Images for a power of 90 %, by exact sums, and what the simulation found."""

    limit: float
    accuracy: float
    fixed: int
    planned: int
    power: float
    simulated_power: float
    average_if_assumed: float
    simulated_average: float
    average_at_limit: float
    average_if_clear: float


def need(limit: float, accuracy: float, *, num_draws: int, seed: int) -> Need:
    """For one limit and one true accuracy above it."""
    fixed = images_for_power(limit=limit, accuracy=accuracy, confidence=CONFIDENCE)
    planned = images_for_power(limit=limit, accuracy=accuracy, confidence=(1 + CONFIDENCE) / 2)
    assert fixed is not None
    assert planned is not None
    planned = math.ceil(planned / CHUNK_SIZE) * CHUNK_SIZE
    ends = boundaries(
        limit=limit, confidence=CONFIDENCE, num_planned=planned, chunk_size=CHUNK_SIZE
    )
    population = Population(name="", class_accuracies=(accuracy,))
    correct = population.draw(num_draws=num_draws, num_images=planned, seed=seed)
    passed, stopped_after = play(correct, ends)
    return Need(
        limit=limit,
        accuracy=accuracy,
        fixed=fixed,
        planned=planned,
        power=chance_to_pass(ends, accuracy=accuracy),
        simulated_power=float(passed.mean()),
        average_if_assumed=average_images(ends, accuracy=accuracy),
        simulated_average=float(stopped_after.mean()),
        average_at_limit=average_images(ends, accuracy=limit),
        average_if_clear=average_images(ends, accuracy=2 * accuracy - limit),
    )


NEEDS = ((0.45, 0.50), (0.45, 0.55), (0.25, 0.35), (0.70, 0.80))


def main() -> None:
    """Simulate, and print or write the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--draws", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    drawn = {"num_draws": options.draws, "seed": options.seed}
    passes = [false_passes(p, num_images=n, **drawn) for p in POPULATIONS for n in SIZES]
    clocks = ended_early(**drawn)
    needs = [need(limit, accuracy, **drawn) for limit, accuracy in NEEDS]
    text = to_markdown(passes, clocks, needs, options)
    if options.write is None:
        sys.stdout.write(text)
        return
    write_text_atomically(options.write, text)
    tables = {"false_passes": passes, "ended_early": clocks, "needs": needs}
    rows = {name: [asdict(row) for row in some] for name, some in tables.items()}
    settings = drawn | {"limit": LIMIT, "confidence": CONFIDENCE, "versions": versions()}
    write_json_atomically(options.write.with_suffix(".json"), settings | rows)


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    return {
        "robust-compress": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
    }


def to_markdown(
    passes: Sequence[FalsePasses],
    clocks: Sequence[Clock],
    needs: Sequence[Need],
    options: argparse.Namespace,
) -> str:
    """The page of results."""
    largest = max(max(row.one_look, row.sequential) for row in passes)
    naive = max(row.repeated_one_look for row in passes)
    blocks = [
        "# How often the gate passes what it must not",
        f"Limit {LIMIT:.0%}, confidence {CONFIDENCE:.0%}, {options.draws:,} draws in every row, "
        f"chunks of {CHUNK_SIZE} images. A wrong pass may happen in 5 % of the draws; the standard "
        f"error of a measured 5 % is {math.sqrt(0.05 * 0.95 / options.draws):.2%}. Largest rate "
        f"of our gates in any row: {largest:.2%}. Repeating the one-look test after every chunk, "
        f"which we do not do, would reach {naive:.2%}.",
        markdown_table(
            ["population", "images", "one look", "sequential", "repeated", "average images"],
            [
                [
                    row.population,
                    f"{row.num_images:,}",
                    *(f"{x:.2%}" for x in (row.one_look, row.sequential, row.repeated_one_look)),
                    f"{row.average_images:,.0f}",
                ]
                for row in passes
            ],
        ),
        "## Incomplete evaluations of a population at the limit",
        "2,000 images planned; a standing image takes the time of 20 broken ones. `early look` is "
        "how the gate judges an incomplete report.",
        markdown_table(
            ["ended by", "early look", "one look"],
            [[row.ended_by, f"{row.early_look:.2%}", f"{row.one_look:.2%}"] for row in clocks],
        ),
        "## Images for a power of 90 %",
        "`fixed` for one look; `planned` for the sequential gate, whose averages are beside it: if "
        "the accuracy is the true one, just the limit, or twice as far above it. Exact sums; in "
        "brackets what the simulation found.",
        markdown_table(
            ["limit", "accuracy", "fixed", "planned", "power", "average", "at limit", "if clear"],
            [
                [
                    f"{row.limit:.0%}",
                    f"{row.accuracy:.0%}",
                    f"{row.fixed:,}",
                    f"{row.planned:,}",
                    f"{row.power:.2%} ({row.simulated_power:.2%})",
                    f"{row.average_if_assumed:,.0f} ({row.simulated_average:,.0f})",
                    f"{row.average_at_limit:,.0f}",
                    f"{row.average_if_clear:,.0f}",
                ]
                for row in needs
            ],
        ),
        f"Command: `python tests/evidence/gate_simulation.py --draws {options.draws} --seed "
        f"{options.seed} --write docs/results/gate-simulation.md`; numbers for programs are in "
        "`gate-simulation.json`.",
        "\n".join(f"- {name}: {version}" for name, version in versions().items()),
    ]
    return "\n\n".join(blocks) + "\n"


if __name__ == "__main__":
    main()
