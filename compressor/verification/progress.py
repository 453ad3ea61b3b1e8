"""How far a verification has come, and how long the rest will take."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from compressor.attacks.stages import Stage
from compressor.reports.consistency import WRONG_CLEAN
from compressor.verification.cascade import Outcome

_OBSERVE_EVERY_SECONDS = 0.2


@dataclass(frozen=True, kw_only=True)
class StageProgress:
    """One attack until now."""

    name: str
    num_tried: int = 0
    num_fooled: int = 0
    """Of those tried; a later attack that tries all may fool what an earlier one had broken."""
    duration_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class VerificationProgress:
    """All attacks until now."""

    num_images: int
    num_begun: int
    """Images that have been answered clean."""
    num_standing: int
    """Of those begun: neither wrong nor broken yet; it can only fall until the chunk is done."""
    current: str
    num_current: int
    """Images that the current attack is trying."""
    current_fraction: float
    """Of its passes that are done; it may end earlier, when images fall."""
    stages: tuple[StageProgress, ...]
    elapsed_seconds: float
    left_seconds: float | None
    """None while nothing is known about speed."""


class Meter:
    """Adds up outcomes and tells `observe`, at most five times a second between stages."""

    def __init__(
        self,
        stages: Sequence[Stage],
        *,
        num_images: int,
        observe: Callable[[VerificationProgress], None],
    ) -> None:
        self._forwards = {WRONG_CLEAN: 1} | {s.name: s.max_forwards for s in stages}
        self._passes = {WRONG_CLEAN: 1} | {s.name: s.max_forwards + s.max_backwards for s in stages}
        self._rows = {name: StageProgress(name=name) for name in self._passes}
        self._num_images, self._observe = num_images, observe
        self._broken: set[int] = set()
        self._current, self._num_current, self._num_forwards = "", 0, 0
        self._is_trying = False
        self._began_at = self._told_at = self._stage_began_at = time.monotonic()

    def tick(self, num_images: int) -> None:
        """A pass of so many images through the model is about to begin."""
        self._num_forwards += num_images
        now = time.monotonic()
        if now - self._told_at > _OBSERVE_EVERY_SECONDS:
            self._tell(now)

    @contextmanager
    def stage(self, name: str, *, num_tried: int) -> Iterator[None]:
        """While this stage runs."""
        self._current, self._num_current, self._num_forwards = name, num_tried, 0
        self._is_trying = num_tried > 0
        self._stage_began_at = time.monotonic()
        self._tell(self._stage_began_at)
        yield
        self._is_trying = False

    def done(self, outcome: Outcome) -> None:
        """A stage of a chunk is finished, now or by an earlier process."""
        row = self._rows[outcome.stage]
        fooled = {found.place for found in outcome.found if found.is_fooled}
        self._rows[outcome.stage] = replace(
            row,
            num_tried=row.num_tried + len(outcome.found),
            num_fooled=row.num_fooled + len(fooled),
            duration_seconds=row.duration_seconds + outcome.duration_seconds,
        )
        self._broken |= fooled
        self._current, self._num_current = "", 0
        self._tell(time.monotonic())

    def _tell(self, now: float) -> None:
        self._told_at = now
        num_begun = self._rows[WRONG_CLEAN].num_tried
        self._observe(
            VerificationProgress(
                num_images=self._num_images,
                num_begun=num_begun,
                num_standing=num_begun - len(self._broken),
                current=self._current,
                num_current=self._num_current,
                current_fraction=self._current_fraction(),
                stages=tuple(self._rows.values()),
                elapsed_seconds=now - self._began_at,
                left_seconds=self._left_seconds(now),
            )
        )

    def _current_fraction(self) -> float:
        if not self._is_trying:
            return 0.0
        return min(self._num_forwards / (self._num_current * self._forwards[self._current]), 1.0)

    def _left_seconds(self, now: float) -> float | None:
        """Images to come, times the share that each stage tries, times what a try costs.

        Stages that have not run yet are taken to try what stands now, at the speed of the others.
        """
        rows, left = dict(self._rows), 0.0
        if self._is_trying:
            spent = now - self._stage_began_at
            left = self._left_of_try(spent)
            if spent or left:
                row = rows[self._current]  # as it will be after this try
                rows[row.name] = replace(
                    row,
                    num_tried=row.num_tried + self._num_current,
                    duration_seconds=row.duration_seconds + spent + left,
                )
        tried = [row for row in rows.values() if row.num_tried and row.name != WRONG_CLEAN]
        passes = sum(row.num_tried * self._passes[row.name] for row in tried)
        num_begun = rows[WRONG_CLEAN].num_tried
        if not passes or not num_begun:
            return None
        seconds_per_pass = sum(row.duration_seconds for row in tried) / passes
        standing_share = 1 - len(self._broken) / num_begun
        for row in rows.values():
            share = row.num_tried / num_begun if row.num_tried else standing_share
            seconds = (
                row.duration_seconds / row.num_tried
                if row.num_tried
                else seconds_per_pass * self._passes[row.name]
            )
            num_to_try = share * self._num_images - row.num_tried
            left += max(num_to_try, 0) * seconds
        return left

    def _left_of_try(self, spent: float) -> float:
        """Of the stage under way: as in earlier chunks, or at the speed that it has now."""
        row, fraction = self._rows[self._current], self._current_fraction()
        if row.num_tried:
            seconds = row.duration_seconds / row.num_tried * self._num_current
            return max(seconds - spent, 0.0)
        return spent * (1 - fraction) / fraction if fraction else 0.0
