"""The journal of a verification: every finished stage of every chunk, so that none is lost.

A line is complete or it is not there: a process killed at any moment loses at most the stage it
was in. What follows a damaged line is attacked again. The first line says what is verified and how;
another verification does not continue it.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import ValidationError

from compressor.ranks import Ranks
from compressor.run_directory import write_text_atomically
from compressor.verification.cascade import Outcome


class Journal:
    """Outcomes by (chunk, stage); reads what is there and appends."""

    def __init__(self, path: Path | None, outcomes: dict[tuple[int, str], Outcome]) -> None:
        self._path, self._outcomes = path, outcomes

    @classmethod
    def open(cls, path: Path, plan: Mapping[str, Any]) -> Self:
        """The journal of this plan at `path`; begun anew if there is none, or another's."""
        lines = _complete_lines(path)
        if not lines or lines[0] != dict(plan):
            write_text_atomically(path, json.dumps(dict(plan)) + "\n")
            return cls(path, {})
        outcomes = list(_outcomes(lines[1:]))
        text = "".join(json.dumps(line) + "\n" for line in lines[: 1 + len(outcomes)])
        write_text_atomically(path, text)  # without a line that was cut off, and what follows it
        return cls(path, {(o.chunk, o.stage): o for o in outcomes})

    @classmethod
    def shared(cls, path: Path, plan: Mapping[str, Any], ranks: Ranks) -> Self:
        """One of this rank, that knows what all have finished and those that there are no more.

        Each rank writes its own, so that none loses what it has finished when all are killed; the
        first one's is at `path`.
        """
        own = cls.open(path if ranks.is_first else _of_rank(path, str(ranks.rank)), plan)
        here = {_of_rank(path, str(rank)) for rank in range(ranks.num_ranks)}
        gone = set(path.parent.glob(_of_rank(path, "*").name)) - here if ranks.is_first else set()
        for other in gone:
            journal = cls.open(other, plan)
            own.absorb(journal.outcomes)
            journal.remove()
        for outcomes in ranks.gather(own.outcomes):
            own.absorb(outcomes)
        return own

    def absorb(self, outcomes: Iterable[Outcome]) -> None:
        """Keep what others have finished, where it is not known yet."""
        for outcome in outcomes:
            if self.get(outcome.chunk, outcome.stage) is None:
                self.add(outcome)

    @classmethod
    def in_memory(cls) -> Self:
        """One that is lost with the process."""
        return cls(None, {})

    @property
    def outcomes(self) -> tuple[Outcome, ...]:
        """All that is known."""
        return tuple(self._outcomes.values())

    def get(self, chunk: int, stage: str) -> Outcome | None:
        """What is known of this stage of this chunk."""
        return self._outcomes.get((chunk, stage))

    def add(self, outcome: Outcome) -> None:
        """Keep it, on disk before this returns."""
        self._outcomes[outcome.chunk, outcome.stage] = outcome
        if self._path is None:
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(outcome.to_json()) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        """After the report is written."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def _of_rank(path: Path, rank: str) -> Path:
    return path.with_name(f"{path.stem}.rank{rank}{path.suffix}")


def plan_id(plan: Mapping[str, Any]) -> str:
    """Short name of a plan, for the journal's file."""
    return hashlib.sha256(json.dumps(dict(plan), sort_keys=True).encode()).hexdigest()[:12]


def _outcomes(lines: Sequence[object]) -> Iterator[Outcome]:
    """Up to the first line that is none."""
    for line in lines:
        try:
            yield Outcome.from_json(line)
        except ValidationError:
            return


def _complete_lines(path: Path) -> list[object]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return []
    lines = []
    for line in text.split("\n")[:-1]:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines
