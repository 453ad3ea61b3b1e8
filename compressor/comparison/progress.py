"""How far a comparison has come, and how long the rest will take."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from compressor.metrics import CandidateValidated, Event, StepDone, TrainingStarted
from compressor.verification.progress import VerificationProgress

_OBSERVE_EVERY_SECONDS = 0.2
_TRUST_AFTER_SHARE = 0.02
"""Of the estimated work; before that, the estimate made at the start is shown."""


@dataclass(frozen=True, kw_only=True)
class ComparisonProgress:
    """All runs until now."""

    run: str
    part: str
    """training, clean, white_box or cascade."""
    part_fraction: float
    note: str
    """The last validation, or how many images stand."""
    num_done: int
    """Runs."""
    num_runs: int
    fraction: float
    """Of the estimated work of this call."""
    elapsed_seconds: float
    left_seconds: float


class Clock:
    """Adds up estimated work as it is done; the speed of what is done corrects the rest."""

    def __init__(
        self,
        work: Sequence[Mapping[str, float]],
        *,
        observe: Callable[[ComparisonProgress], None],
    ) -> None:
        self._work, self._observe = list(work), observe
        self._total = sum(sum(parts.values()) for parts in self._work)
        self._place, self._done_before = -1, 0.0
        self._run, self._part, self._note = "", "", ""
        self._part_fraction, self._done_parts = 0.0, 0.0
        self._began_at = self._told_at = time.monotonic()

    def begin_run(self, name: str) -> "RunWatch":
        """The next run; hands out what watches it."""
        self._place += 1
        self._run, self._part, self._note = name, "", ""
        self._part_fraction = self._done_parts = 0.0
        return RunWatch(self)

    def end_run(self) -> None:
        """All of it is done, or will never be."""
        self._done_before += sum(self._work[self._place].values())
        self._done_parts, self._part, self._part_fraction = 0.0, "", 0.0
        self._tell(self._place + 1)

    def begin_part(self, part: str) -> None:
        """Another part of this run; the one before it is done."""
        self._done_parts += self._work[self._place].get(self._part, 0.0)
        self._part, self._part_fraction, self._note = part, 0.0, ""
        self._tell(self._place)

    def advance(self, fraction: float, note: str | None = None) -> None:
        """So much of this part is done."""
        self._part_fraction = min(max(fraction, 0.0), 1.0)
        self._note = self._note if note is None else note
        if time.monotonic() - self._told_at > _OBSERVE_EVERY_SECONDS:
            self._tell(self._place)

    def _tell(self, num_done: int) -> None:
        now = self._told_at = time.monotonic()
        elapsed = now - self._began_at
        part = self._work[self._place].get(self._part, 0.0)
        done = self._done_before + self._done_parts + part * self._part_fraction
        share = min(done / self._total, 1.0) if self._total else 1.0
        is_known = share > _TRUST_AFTER_SHARE
        left = elapsed * (1 - share) / share if is_known else self._total - done
        self._observe(
            ComparisonProgress(
                run=self._run,
                part=self._part,
                part_fraction=self._part_fraction,
                note=self._note,
                num_done=num_done,
                num_runs=len(self._work),
                fraction=share,
                elapsed_seconds=elapsed,
                left_seconds=max(left, 0.0),
            )
        )


class RunWatch:
    """What training and verification of one run tell."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self._num_steps = clock, 1

    def part(self, name: str) -> None:
        """A part begins."""
        self._clock.begin_part(name)

    def training(self, event: Event) -> None:
        """Steps and validations."""
        if isinstance(event, TrainingStarted):
            self._num_steps = event.num_steps
            self._clock.advance(event.step / event.num_steps)
        elif isinstance(event, StepDone):
            self._clock.advance(event.step / self._num_steps)
        elif isinstance(event, CandidateValidated):
            clean, robust = 100 * event.clean.fraction, 100 * event.robust.fraction
            note = f"validation {clean:.1f} % clean, {robust:.1f} % robust"
            self._clock.advance(event.step / self._num_steps, note)

    def verification(self, event: VerificationProgress) -> None:
        """Attacks."""
        if event.left_seconds is not None:
            total = event.elapsed_seconds + event.left_seconds
            note = f"{event.num_standing} of {event.num_begun} images stand"
            self._clock.advance(event.elapsed_seconds / total if total else 1.0, note)
