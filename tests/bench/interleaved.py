"""Timing of several functions in turn, so that a drift of the machine hits all of them."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

_LONG_SECONDS = 0.1


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Of numbers measured again and again."""

    median: float
    low: float
    high: float
    num_rounds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(
            median=statistics.median(values),
            low=min(values),
            high=max(values),
            num_rounds=len(values),
        )

    def __str__(self) -> str:
        return f"{_short(self.median)} ({_short(self.low)} to {_short(self.high)})"


def seconds_in_turn(
    functions: Mapping[str, Callable[[], object]],
    *,
    num_rounds: int,
    device: torch.device | None = None,
    num_warm_ups: int = 1,
    clock: Callable[[Callable[[], object]], float] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each function in each round; each begins a round as often as the others.

    Warm-ups go first, all of one function before the next, since what they compile takes long.
    `clock` tells the seconds of one function; by default those that calling it takes here.
    """
    for function in functions.values():
        for _ in range(num_warm_ups):
            function()
    names = list(functions)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(num_rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            function = functions[name]
            seconds[name].append(clock(function) if clock else _seconds(function, device))
    return seconds


def seconds_per_call(function: Callable[[], object], device: torch.device) -> float:
    """In a loop that lasts long against a clock, a message and the launch of a kernel."""
    num_calls = 1
    while True:
        seconds = _seconds(lambda: [function() for _ in range(num_calls)], device)  # noqa: B023
        if seconds >= _LONG_SECONDS:
            return seconds / num_calls
        num_calls *= 2


def ratio(slow: Sequence[float], fast: Sequence[float]) -> Spread:
    """How many times as fast, round by round."""
    return Spread.of([a / b for a, b in zip(slow, fast, strict=True)])


def per_second(amount: float, seconds: Sequence[float]) -> Spread:
    """Amounts of each round in a second."""
    return Spread.of([amount / s for s in seconds])


def _seconds(function: Callable[[], object], device: torch.device | None) -> float:
    _wait(device)
    started_at_seconds = time.perf_counter()
    function()
    _wait(device)
    return time.perf_counter() - started_at_seconds


def _wait(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def _short(value: float) -> str:
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f}"
