"""SIGINT and SIGTERM as a wish that the trainer grants after the step it is in."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass
class StopWish:
    """The signal that arrived, if any."""

    signal_number: int | None = None


@contextmanager
def stop_wish(*, is_patient: bool = False) -> Iterator[StopWish]:
    """Collect the first SIGINT or SIGTERM; a second one acts at once, as without us.

    Args:
        is_patient: let no number of them act at once: a launcher passes on the signal that the
            process got itself, and kills it if it takes too long.
    """
    wish = StopWish()

    def note(number: int, _frame: FrameType | None) -> None:
        wish.signal_number = number
        if is_patient:
            return
        for one, handler in before.items():
            signal.signal(one, handler)

    before = {one: signal.signal(one, note) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield wish
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
