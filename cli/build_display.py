"""Live display of an engine's build: a tree of its phases in a terminal, plain lines elsewhere."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from cli.output import Output

if TYPE_CHECKING:
    from compressor.device.build_progress import PhaseEvent

_DEEPEST_KEPT = 1
"""Phases as deep as this stay when they ended; those below make room for the next."""
_BAR_WIDTH = 16
_NAME_WIDTH = 40
"""With bar, counts and time within 80 columns."""


@contextmanager
def build_display(output: Output) -> Iterator["Callable[[PhaseEvent], None]"]:
    """Each phase below the one that it is a part of, with its steps; any thread may call it."""
    if output.as_json:
        yield lambda _: None
    elif output.console.is_terminal:
        tree = PhaseTree()
        with Live(
            console=output.console,
            refresh_per_second=5,
            transient=True,
            get_renderable=tree.picture,  # so that the clock goes on between two events
        ):
            yield tree.add
    else:
        yield _PlainPhases(output)


@dataclass(kw_only=True)
class _Phase:
    name: str
    parent: str | None
    depth: int
    began_seconds: float
    num_done: int = 0
    num_steps: int = 0
    ended_seconds: float | None = None


class PhaseTree:
    """The phases that are under way, and the outer ones that ended."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._phases: list[_Phase] = []

    def add(self, event: "PhaseEvent") -> None:
        """Take in what a build tells."""
        with self._lock:
            now_seconds = self._clock()
            phase = self._under_way(event.phase)
            if event.kind == "started" or phase is None:
                phase = self._insert(event.phase, event.parent, now_seconds)
            phase.num_done, phase.num_steps = event.num_done, event.num_steps
            if event.kind == "ended":
                phase.ended_seconds = now_seconds
                if phase.depth > _DEEPEST_KEPT:
                    self._phases.remove(phase)

    def picture(self) -> Table:
        """One row a phase: name, bar, steps, time."""
        table = Table.grid(padding=(0, 1))
        table.add_column(width=_NAME_WIDTH, no_wrap=True, overflow="ellipsis")
        table.add_column(width=_BAR_WIDTH)
        table.add_column(justify="right", no_wrap=True)
        table.add_column(justify="right", no_wrap=True)
        with self._lock:
            for phase in self._phases:
                until_seconds = phase.ended_seconds or self._clock()
                total = max(1, phase.num_steps)
                table.add_row(
                    f"{'  ' * phase.depth}{phase.name}",
                    ProgressBar(total=total, completed=phase.num_done, width=_BAR_WIDTH),
                    f"{phase.num_done}/{phase.num_steps}",
                    str(timedelta(seconds=round(until_seconds - phase.began_seconds))),
                    style="dim" if phase.ended_seconds is not None else "",
                )
        return table

    def _under_way(self, name: str | None) -> _Phase | None:
        """TensorRT gives no two phases the same name at the same time."""
        phases = [p for p in self._phases if p.name == name and p.ended_seconds is None]
        return phases[-1] if phases else None

    def _insert(self, name: str, parent_name: str | None, now_seconds: float) -> _Phase:
        """Behind all that is already below its parent."""
        parent = self._under_way(parent_name)
        self._phases = [p for p in self._phases if p.name != name or p.ended_seconds is None]
        place = len(self._phases)
        if parent is not None:
            below = self._phases.index(parent) + 1
            rest = self._phases[below:]
            place = below + next(
                (n for n, other in enumerate(rest) if other.depth <= parent.depth), len(rest)
            )
        phase = _Phase(
            name=name,
            parent=parent_name,
            depth=parent.depth + 1 if parent else 0,
            began_seconds=now_seconds,
        )
        self._phases.insert(place, phase)
        return phase


class _PlainPhases:
    """The two outermost levels, one line each."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._outermost: str | None = None

    def __call__(self, event: "PhaseEvent") -> None:
        if event.kind != "started":
            return
        if event.parent is None:
            self._outermost = event.phase
        if event.parent in (None, self._outermost):
            self._output.say(f"{'' if event.parent is None else '  '}{event.phase}")
            sys.stdout.flush()
