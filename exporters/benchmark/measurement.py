"""Time targets side by side.

They take turns: A, B, C, A, B, C, so that a drift of the machine hits all of them. A turn is one
call that is not timed, as the caches hold what the target before left there, and then calls one
after the other, each timed from images to logits as arrays of the host.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from exporters.benchmark.target import Answer, BenchTarget

_MIN_CALLS, _MAX_CALLS = 3, 10_000  # that are timed in one turn
_WARM_UP_SHARE = 0.1  # of the time of a measurement


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured; `seconds` are for one target at one batch size and thread count."""

    batch_sizes: tuple[int, ...]
    thread_counts: tuple[int, ...]
    num_rounds: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One target at one batch size and thread count."""

    target: BenchTarget
    batch_size: int
    num_threads: int
    why_not: str = ""
    rounds_ns: tuple[tuple[int, ...], ...] = ()
    """Durations of the calls of each round; none if `why_not` says why."""


def measure(
    targets: Sequence[BenchTarget],
    plan: Plan,
    *,
    clock_ns: Callable[[], int] = time.perf_counter_ns,
    observe: Callable[[Measured, int], None] = lambda *_: None,
) -> list[Measured]:
    """Time every target at every batch size and thread count.

    Args:
        targets: in the order in which they take turns.
        plan: how long and how often.
        clock_ns: nanoseconds since some moment.
        observe: told what is measured next, and in which round, from 1.
    """
    found: list[Measured] = []
    torch_threads = torch.get_num_threads()
    try:
        for num_threads in plan.thread_counts:
            answers = [target.open(num_threads) for target in targets]
            for size in plan.batch_sizes:
                contenders = []
                for target, answer in zip(targets, answers, strict=True):
                    cell = Measured(target=target, batch_size=size, num_threads=num_threads)
                    contenders.append(_Contender(cell, answer, clock_ns))
                found += _contest(contenders, plan, observe=observe)
    finally:
        torch.set_num_threads(torch_threads)
    return found


class _Contender:
    """A measurement under way."""

    def __init__(self, cell: Measured, answer: Answer, clock_ns: Callable[[], int]) -> None:
        self.cell, self._answer, self._clock_ns = cell, answer, clock_ns

    def warm_up(self, seconds: float) -> None:
        """Which also tells whether such a batch can be answered at all."""
        target, batch_size = self.cell.target, self.cell.batch_size
        why_not = target.why_not
        if not why_not and target.batch_size not in (None, batch_size):
            why_not = f"it takes batches of {target.batch_size} only"
        if not why_not:
            try:
                self._images = target.images(batch_size)
                self._durations_ns(seconds)
            except Exception as error:  # noqa: BLE001 (a runtime raises whatever it meets)
                said = str(error).partition("\n")[0][:200]
                why_not = f"it failed: {said or type(error).__name__}"
        self.cell = replace(self.cell, why_not=why_not)

    def take_turn(self, seconds: float) -> None:
        """The durations of one round."""
        rounds_ns = (*self.cell.rounds_ns, self._durations_ns(seconds))
        self.cell = replace(self.cell, rounds_ns=rounds_ns)

    def _durations_ns(self, seconds: float) -> tuple[int, ...]:
        self._answer(self._images)
        durations: list[int] = []
        now = self._clock_ns()
        end = now + round(1e9 * seconds)
        while len(durations) < _MIN_CALLS or (now < end and len(durations) < _MAX_CALLS):
            started = self._clock_ns()
            self._answer(self._images)
            now = self._clock_ns()
            durations.append(now - started)
        return tuple(durations)


def _contest(
    contenders: Sequence[_Contender], plan: Plan, *, observe: Callable[[Measured, int], None]
) -> list[Measured]:
    for contender in contenders:
        contender.warm_up(_WARM_UP_SHARE * plan.seconds)
    able = [contender for contender in contenders if not contender.cell.why_not]
    for number in range(1, plan.num_rounds + 1):
        for contender in able:
            observe(contender.cell, number)
            contender.take_turn(plan.seconds / plan.num_rounds)
    return [contender.cell for contender in contenders]
