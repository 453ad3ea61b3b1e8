"""The app as a list of commands, the only try/except, and the entry point."""

import errno
import sys
import traceback
from typing import Annotated, cast

import typer

from cli.bench import bench
from cli.compare import compare
from cli.distill import distill
from cli.doctor import doctor
from cli.export import export
from cli.gate import gate
from cli.installation import refuse_overwritten_installation
from cli.output import print_bug, print_error
from cli.plan import plan
from cli.recipe import check
from cli.teacher import train_teacher
from cli.teacher_rank import rank_teachers
from cli.verify import verify
from compressor.errors import ExitCode, RobustCompressError, RunError, UsageError
from compressor.out_of_memory import device_error, is_out_of_memory

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Distil a compact student that keeps clean and robust accuracy, prove it, ship it.",
    epilog="Start with `robust-compress doctor`, then `robust-compress distill --help`.",
)
teacher_app = typer.Typer(no_args_is_help=True, help="Train teachers, and choose among them.")
recipe_app = typer.Typer(no_args_is_help=True, help="Look at recipes.")

app.command()(plan)
app.command()(distill)
app.command()(verify)
app.command()(gate)
app.command()(export)
app.command()(bench)
app.command()(compare)
app.command()(doctor)
app.add_typer(teacher_app, name="teacher")
app.add_typer(recipe_app, name="recipe")
teacher_app.command("train")(train_teacher)
teacher_app.command("rank")(rank_teachers)
recipe_app.command("check")(check)


@teacher_app.callback()
def _teacher() -> None:
    """A group with one command stays a group."""


@recipe_app.callback()
def _recipe() -> None:
    """A group with one command stays a group."""


def _show_version(wanted: bool) -> None:
    if wanted:
        from compressor import __version__  # here, as another package may have overwritten it

        typer.echo(f"robust-compress {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="And exit.")
    ] = False,
) -> None:
    """Distil a compact student that keeps clean and robust accuracy, prove it, ship it."""


_NotUnderstood = cast("type[typer.BadParameter]", typer.BadParameter.__base__)
"""The `UsageError` of click, wherever typer keeps it."""


def _run_app() -> None:
    """Usage errors are typer's to print, but with --json they are ours."""
    if "--json" not in sys.argv:
        app()  # never returns
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except _NotUnderstood as error:
        raise UsageError(f"{error.format_message()} See --help") from None


_NO_ROOM = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}
"""Full, or a limit on files or on their owner."""


def main() -> None:
    """Run the app; known errors end with their exit code, anything else is a bug of ours."""
    try:
        refuse_overwritten_installation()
        _run_app()
    except RobustCompressError as error:
        print_error(error, as_json="--json" in sys.argv)
        sys.exit(int(error.exit_code))
    except OSError as error:  # a full disk, a folder that may not be written
        place = f"{error.filename}: " if error.filename else ""
        advice = "; make room, or choose another folder" if error.errno in _NO_ROOM else ""
        text = f"{place}{error.strerror or error}{advice}"
        print_error(RunError(text), as_json="--json" in sys.argv)
        sys.exit(int(ExitCode.KNOWN_ERROR))
    except KeyboardInterrupt:
        sys.exit(int(ExitCode.INTERRUPTED))
    except Exception as error:  # noqa: BLE001 (the one place where everything ends)
        if is_out_of_memory(error):
            print_error(device_error(error), as_json="--json" in sys.argv)
            sys.exit(int(ExitCode.KNOWN_ERROR))
        if "--json" in sys.argv:
            print_bug(error)
        traceback.print_exc()
        sys.stderr.write("\nThis is a bug in robust-compress; please report the lines above.\n")
        sys.exit(int(ExitCode.BUG))


if __name__ == "__main__":
    main()
