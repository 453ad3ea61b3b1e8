"""Progress of a build comes one call at a time, and is a tree that fits into 80 columns."""

import io
import threading
import time

from rich.console import Console

from cli.build_display import PhaseTree, build_display
from cli.output import Output
from compressor.device.build_progress import BuildWatch, PhaseEvent


def event(kind, phase, parent=None, num_done=0, num_steps=3):
    return PhaseEvent(kind=kind, phase=phase, parent=parent, num_done=num_done, num_steps=num_steps)


def test_calls_from_many_threads_come_one_at_a_time():
    inside, most = [], []

    def observe(one):
        inside.append(one)
        most.append(len(inside))
        time.sleep(0.001)
        inside.remove(one)

    watch = BuildWatch(observe, threading.Event())

    def work(number):
        watch.start(f"phase {number}", None, 5)
        for step in range(5):
            watch.step(f"phase {number}", step + 1)
        watch.end(f"phase {number}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 28


def rows_of(tree, *, width=80):
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(tree.picture())
    return console.file.getvalue().splitlines()


def test_phases_stand_below_what_they_are_a_part_of():
    seconds = iter(range(100))
    tree = PhaseTree(clock=lambda: next(seconds))
    tree.add(event("started", "all"))
    tree.add(event("started", "first", "all"))
    tree.add(event("started", "second", "all"))
    tree.add(event("started", "part of first", "first", num_done=2))
    rows = rows_of(tree)
    assert [row.split()[0] for row in rows[:2]] == ["all", "first"]
    assert rows[2].startswith("    part of first")
    assert "2/3" in rows[2]
    assert rows[3].startswith("  second")
    tree.add(event("ended", "part of first", "first", num_done=3))
    tree.add(event("ended", "first", "all", num_done=3))
    assert [row.split()[0] for row in rows_of(tree)] == ["all", "first", "second"]


def test_a_long_name_fits_into_80_columns():
    tree = PhaseTree()
    tree.add(event("started", "a phase with a name " * 5, num_steps=123456))
    (row,) = rows_of(tree)
    assert len(row) <= 80
    assert "…" in row
    assert "0/123456" in row


def test_plain_lines_name_the_outer_phases(capsys):
    with build_display(Output(as_json=False)) as show:
        show(event("started", "all"))
        show(event("started", "[bold]first", "all"))
        show(event("started", "part of first", "[bold]first"))
        show(event("ended", "all"))
    assert capsys.readouterr().out == "all\n  [bold]first\n"


def test_nothing_is_shown_beside_json(capsys):
    with build_display(Output(as_json=True)) as show:
        show(event("started", "all"))
    assert capsys.readouterr().out == ""
