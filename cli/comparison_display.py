"""A comparison in the terminal: its plan, all runs while they run, and the tables."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.live import Live
from rich.markup import escape
from rich.text import Text

from cli.output import Output

if TYPE_CHECKING:
    from compressor.comparison.progress import ComparisonProgress
    from compressor.comparison.result import ComparisonResult
    from compressor.comparison.runs import FinishedRun
    from compressor.comparison_workflow import PreparedComparison, Work

_PLAIN_LINE_EVERY_SECONDS = 30.0
_NARROW_COLUMNS, _WIDE_COLUMNS = 100, 140
_IN_ONE_PIECE = (tuple(place for place in range(12) if place != 9),)
_IN_TWO_PIECES = ((0, 1, 2, 5, 6, 7), (0, 3, 4, 8, 10, 11))
_IN_THREE_PIECES = ((0, 1, 2, 5, 6, 7), (0, 3, 4), (0, 8, 10, 11))
"""Columns of the main table; how long training took by the clock is on the page."""
_INTERVALS_IN_TWO_PIECES = ((0, 1, 4, 5), (0, 2, 3))
_BAR_LETTERS = 24
_PARTS = {
    "training": "training",
    "clean": "clean images",
    "white_box": "PGD and CW",
    "cascade": "AutoAttack-style",
}


def print_plan(prepared: "PreparedComparison", output: Output) -> None:
    """Methods, teachers, passes and time, in at most 80 columns."""
    from compressor.comparison.cells import seconds_text

    plan, images = prepared.plan, prepared.materials.images
    output.title(f"{plan.base_name}: {len(plan.runs)} runs, reference {plan.reference}")
    rows = []
    for method in plan.methods:
        passes = prepared.passes[method.label]
        work = [work for work in prepared.work if work.planned.label == method.label]
        rows.append(
            (
                method.label,
                str(len(method.recipes)),
                f"{passes.student_forwards:.3g} + {passes.student_backwards:.3g}",
                f"{passes.teacher_forwards:.3g} + {passes.teacher_backwards:.3g}",
                _left(work),
            )
        )
    _table(("method", "seeds", "student passes", "teacher passes", "left to do"), rows, output)
    output.say("Passes: images forwards + backwards per training image.")
    for method in plan.methods:
        output.say(f"{method.label}: teachers {method.teachers}; settings: {method.origin}")
    output.say(
        f"Test images: {images.clean:,} clean, {images.white_box:,} for PGD_sat, PGD_trades and "
        f"CW_inf, {images.cascade:,} for the AutoAttack-style cascade"
    )
    for note in plan.notes:
        output.say(f"Note: {note}")
    if prepared.left_seconds == 0:
        output.say("Left to do: nothing; the tables are made again")
        return
    output.say(
        f"Left to do: about {seconds_text(prepared.left_seconds)} if the machine stays as fast as "
        "in a short test just now"
    )


def _in_two_lines(title: str) -> str:
    """What it is, and its n."""
    title = title.replace(" (n = ", "\n(n = ").replace("AutoAttack-", "AutoAttack-\n")
    return title.replace(" and ", "\nand ").replace(", predicted", ",\npredicted")


def _left(work: "Sequence[Work]") -> str:
    """Of one method; what failed is not tried again."""
    from compressor.comparison.cells import seconds_text

    num_failed = sum(one.failure is not None for one in work)
    seconds = sum(sum(one.seconds.values()) for one in work)
    failed = [f"{num_failed} failed"] if num_failed else []
    left = [f"about {seconds_text(seconds)}"] if seconds else []
    return ", ".join([*failed, *left]) or "finished"


@contextmanager
def comparison_display(output: Output) -> Iterator["Callable[[ComparisonProgress], None]"]:
    """All runs in one line: a bar, what runs now, how long the rest will take."""
    if output.as_json:
        yield lambda _: None
    elif output.console.is_terminal:
        with Live(console=output.console, refresh_per_second=5, transient=True) as live:
            yield lambda event: live.update(Text(f"{_bar(event)} {_line(event)}"))
    else:
        yield _PlainLines(output)


def run_line(finished: "FinishedRun") -> str:
    """What one run came to."""
    name, measured = finished.planned.name, finished.measured
    if finished.failure is not None:
        return f"{name}: FAILED: {finished.failure}"
    parts = [f"clean {measured.clean.proportion}"] if measured.clean else []
    for title, part in (("CW_inf", measured.white_box), ("AutoAttack-style", measured.cascade)):
        if part is None:
            continue
        standing = part.by_attack.get("cw_inf", part.worst_case)
        is_believed = part.status == "verified"
        parts.append(f"{title} {standing.proportion if is_believed else part.status.upper()}")
    return f"{name}: {', '.join(parts)}"


def print_result(result: "ComparisonResult", output: Output) -> None:
    """The main table in one piece where the terminal is wide, else in two; then the tests."""
    from compressor.comparison.cells import (
        interval_cells,
        main_cells,
        paired_cells,
        setting_text,
        validation_cells,
    )
    from compressor.comparison.tables import W_ROBUST_NOTE

    header, rows = main_cells(result)
    header = tuple(_in_two_lines(name) for name in header)
    rows = [tuple(cell.replace(" [", "\n[") for cell in row) for row in rows]
    output.title(f"{result.name}: {setting_text(result)}")
    output.say("percent, mean ± standard deviation over seeds")
    width = output.console.width
    pieces = _IN_TWO_PIECES if width < _WIDE_COLUMNS else _IN_ONE_PIECE
    for columns in _IN_THREE_PIECES if width < _NARROW_COLUMNS else pieces:
        _table([header[i] for i in columns], [[row[i] for i in columns] for row in rows], output)
        output.say("")
    output.say("training: its passes times what a pass took in a short test on this machine")
    intervals, reaches = interval_cells(result)
    output.title("95 % intervals, the images as the sample")
    whole = (tuple(range(len(intervals))),)
    for columns in _INTERVALS_IN_TWO_PIECES if width < _NARROW_COLUMNS else whole:
        titles = [_in_two_lines(intervals[i]) for i in columns]
        _table(titles, [[row[i] for i in columns] for row in reaches], output)
        output.say("")
    if any(row.validations for row in result.methods):
        output.title("On held-out training images, which chose the epoch")
        _table(*validation_cells(result), output)
    tests, lines = paired_cells(result)
    if lines:
        output.title(f"Against {result.reference}, on the same images")
        kept = (0, 1, 2, 3, 4, 8, 9) if width < _NARROW_COLUMNS else (0, 1, 2, 3, 4, 5, 8, 9)
        short = [[line[i].replace("AutoAttack-style", "AA-style") for i in kept] for line in lines]
        _table([tests[i] for i in kept], short, output)
        output.say(
            f"Exact paired tests of the images, Holm's correction for all {result.num_tests}. "
            "`weights`: these differ; whether the method does, the seeds do not show."
        )
        if any(row.pair("w_robust") for row in result.methods):
            output.say(W_ROBUST_NOTE)
    for note in result.notes:
        output.say(f"Note: {note}")
    if any(run.status == "failed" for row in result.methods for run in row.runs):
        output.say("Note: --retry tries again what failed.")


class _PlainLines:
    def __init__(self, output: Output) -> None:
        self._output = output
        self._told_at_seconds = time.monotonic()
        self._said = ("", "")

    def __call__(self, event: "ComparisonProgress") -> None:
        now, here = time.monotonic(), (event.run, event.part)
        is_new = bool(event.part) and here != self._said
        if is_new or now - self._told_at_seconds > _PLAIN_LINE_EVERY_SECONDS:
            self._told_at_seconds, self._said = now, here
            self._output.say(_line(event))
            sys.stdout.flush()


def _bar(event: "ComparisonProgress") -> str:
    filled = round(_BAR_LETTERS * event.fraction)
    return "━" * filled + "╌" * (_BAR_LETTERS - filled)


def _line(event: "ComparisonProgress") -> str:
    from compressor.comparison.cells import seconds_text

    part = _PARTS.get(event.part, event.part)
    here = f"{part} {100 * event.part_fraction:.0f} %" if part else "finished"
    note = f" ({event.note})" if event.note else ""
    return (
        f"{event.num_done} of {event.num_runs} runs done, {100 * event.fraction:.0f} %, about "
        f"{seconds_text(event.left_seconds)} left; {event.run}: {here}{note}"
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], output: Output) -> None:
    """Names are of strangers, and the terminal library has a markup in brackets."""
    output.table(header, [[escape(cell) for cell in row] for row in rows])
