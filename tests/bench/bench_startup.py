"""How long every command takes to show its help, beside Python alone and beside `import torch`.

python -m tests.bench.bench_startup --write docs/results/bench-startup.md
"""

import argparse
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import click
import typer

from cli.main import app
from compressor.environment import describe_environment
from compressor.performance import resolve_performance
from compressor.performance_settings import PerformanceSettings
from compressor.reports.markdown import markdown_table
from compressor.run_directory import write_json_atomically, write_text_atomically
from tests.bench.command import typed_command
from tests.bench.interleaved import Spread, seconds_in_turn


def commands(group: click.Command, *words: str) -> Iterator[tuple[str, ...]]:
    """Every command as it is typed, groups included."""
    yield words
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, *words, name)


def run(*words: str) -> None:
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    functions = {
        "Python alone": partial(run, "-c", "pass"),
        "`import typer, rich`": partial(run, "-c", "import typer, rich.console"),
        "`import torch`": partial(run, "-c", "import torch"),
        "`robust-compress --version`": partial(run, "-m", "cli.main", "--version"),
    }
    for words in commands(typer.main.get_command(app)):
        name = " ".join(("robust-compress", *words, "--help"))
        functions[f"`{name}`"] = partial(run, "-m", "cli.main", *words, "--help")
    seconds = seconds_in_turn(functions, num_rounds=options.rounds)
    spreads = {name: Spread.of(values) for name, values in seconds.items()}
    environment = describe_environment(resolve_performance(PerformanceSettings()))
    command_line = typed_command("tests.bench.bench_startup", options)
    lines = [
        "# Start-up of every command",
        "",
        f"Seconds of a new process, each in turn; median (lowest to highest) of {options.rounds} "
        "rounds.",
        "",
        markdown_table(("command", "seconds"), [(n, str(s)) for n, s in spreads.items()]),
        "",
        f"Command: `{command_line}`.",
        "",
        *(f"- {name}: {value}" for name, value in environment.items()),
    ]
    text = "\n".join(lines) + "\n"
    sys.stdout.write(text)
    if options.write:
        found = {name: vars(spread) for name, spread in spreads.items()}
        table = {"seconds": found, "environment": environment, "command": command_line}
        write_json_atomically(options.write.with_suffix(".json"), table)
        write_text_atomically(options.write, text)


if __name__ == "__main__":
    main()
