"""Output: for people or as JSON; the only writer to stdout."""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cli.processes import has_to_speak, is_first, rank
from compressor.errors import ExitCode, RobustCompressError


class Output:
    """Says what a command has to say, in one of two languages."""

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json and is_first()
        is_quiet = as_json or not is_first()
        self.console = Console(quiet=is_quiet, highlight=False, soft_wrap=not sys.stdout.isatty())

    def say(self, text: str) -> None:
        """A line for people."""
        self.console.print(text, markup=False)

    def title(self, text: str) -> None:
        """A line that stands out."""
        self.console.print(f"\n{text}", style="bold", markup=False)

    def not_run(self, checks: Sequence[tuple[str, str]]) -> None:
        """(check, why it was not run): one line per reason, as many share one."""
        for reason in dict.fromkeys(reason for _, reason in checks):
            names = ", ".join(name for name, its_reason in checks if its_reason == reason)
            self.say(f"Not run: {names}: {reason}.")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table for people; the first column is text, the others are numbers."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        for place, name in enumerate(header):
            table.add_column(name, justify="left" if place == 0 else "right", overflow="fold")
        for row in rows:
            table.add_row(*row)
        self.console.print(table)

    def next_command(self, command: str) -> None:
        """What is useful to type now."""
        self.console.print(f"\nNext: [bold]{escape(command)}[/bold]", soft_wrap=True)

    def result(self, value: Mapping[str, Any]) -> None:
        """The one JSON object of the command."""
        if self.as_json:
            sys.stdout.write(json.dumps(value, indent=2, default=str) + "\n")


def print_error(error: RobustCompressError, *, as_json: bool) -> None:
    """The message of a known error, on stderr for people, on stdout as JSON.

    Of several processes the first one says what all have found; what another alone has met it says
    itself, on stderr.
    """
    if not has_to_speak(error):
        return
    if as_json and is_first():
        _write_error(type(error).__name__, str(error), error.exit_code)
        return
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    place = "" if is_first() else f" in process {rank()}"
    console.print(f"[bold red]Error{place}:[/bold red] ", end="")
    console.print(str(error), markup=False)


def print_bug(error: Exception) -> None:
    """An error of ours as JSON on stdout; the traceback goes to stderr."""
    _write_error("Bug", f"{type(error).__name__}: {error}; please report it", ExitCode.BUG)


def _write_error(kind: str, message: str, code: ExitCode) -> None:
    table = {"error": kind, "message": message, "exit_code": int(code)}
    sys.stdout.write(json.dumps(table, indent=2) + "\n")
