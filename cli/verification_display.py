"""Live display of verification: a Rich table in a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cli.output import Output

if TYPE_CHECKING:
    from compressor.verification.progress import StageProgress, VerificationProgress

_PLAIN_LINE_EVERY_SECONDS = 30.0


@contextmanager
def verification_display(output: Output) -> Iterator["Callable[[VerificationProgress], None]"]:
    """Each attack: tried, fooled, seconds; how many images stand, and how long it will take."""
    if output.as_json:
        yield lambda _: None
    elif output.console.is_terminal:
        with Live(console=output.console, refresh_per_second=5, transient=True) as live:
            yield lambda event: live.update(_picture(event))
    else:
        yield _PlainLines(output)


def _picture(event: "VerificationProgress") -> Group:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("attack")
    for name in ("tried", "fooled", "time"):
        table.add_column(name, justify="right")
    table.add_column("")
    for row in event.stages:
        is_now = row.name == event.current
        now = _trying(event) if is_now and event.num_current else ""
        table.add_row(*_cells(row), now, style="" if row.num_tried or is_now else "dim")
    return Group(table, Text(_summary(event)))


def _cells(row: "StageProgress") -> tuple[str, str, str, str]:
    if not row.num_tried:
        return row.name, "", "", ""
    return row.name, str(row.num_tried), str(row.num_fooled), _clock(row.duration_seconds)


def _trying(event: "VerificationProgress") -> str:
    return f"trying {event.num_current}, {100 * event.current_fraction:.0f} %"


def _summary(event: "VerificationProgress") -> str:
    """What stands can only fall while an attack is under way."""
    from compressor.proportions import Proportion

    left = "" if event.left_seconds is None else f", about {_clock(event.left_seconds)} left"
    if not event.num_begun:
        return f"{event.num_images} images"
    standing = Proportion(num_correct=event.num_standing, num_total=event.num_begun)
    low, high = standing.interval()
    return (
        f"{event.num_begun} of {event.num_images} images begun, {event.num_standing} stand: "
        f"at most {100 * standing.fraction:.1f} % (95 % interval {100 * low:.1f} to "
        f"{100 * high:.1f}); {_clock(event.elapsed_seconds)}{left}"
    )


class _PlainLines:
    def __init__(self, output: Output) -> None:
        self._output = output
        self._told_at_seconds = time.monotonic()

    def __call__(self, event: "VerificationProgress") -> None:
        now = time.monotonic()
        if now - self._told_at_seconds > _PLAIN_LINE_EVERY_SECONDS:
            self._told_at_seconds = now
            self._output.say(f"{event.current}, {_trying(event)}; {_summary(event)}")
            sys.stdout.flush()


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
