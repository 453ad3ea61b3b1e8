"""`robust-compress teacher rank`: which robust teachers to learn from together."""

import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.options import DeviceOption, DownloadOption, JsonOption, ThreadsOption
from cli.output import Output
from compressor.errors import InterruptedRunError, UsageError

if TYPE_CHECKING:
    from compressor.recipe import TeacherRecipe
    from compressor.reports.sections import Table
    from compressor.reports.teacher_ranking import TeacherRanking
    from compressor.teacher_ranking import RankingProgress
    from compressor.threat import ThreatModel

_PLAIN_LINE_EVERY_SECONDS = 30.0
_NO_RECIPE = "RECIPE.toml"
_MAX_COLUMNS = 6
"""Teachers in the matrices on the screen; the files have them all."""


def rank_teachers(
    teachers: Annotated[
        list[str],
        typer.Argument(
            metavar="TEACHER...",
            help="ARCH:WEIGHTS, WEIGHTS, FILE.onnx, runs; or RECIPE.toml for all of its teachers.",
        ),
    ],
    data: Annotated[
        str | None, typer.Option(help="Where the images are [default: of the recipe].")
    ] = None,
    samples: Annotated[
        int, typer.Option(min=2, help="Images that runs hold out of training, classes balanced.")
    ] = 500,
    choose: Annotated[
        int, typer.Option(metavar="K", min=1, max=30, help="Robust teachers to recommend.")
    ] = 3,
    transfer_weight: Annotated[
        float, typer.Option(help="Points of robust accuracy that a point of transfer is worth.")
    ] = 0.5,
    epsilon: Annotated[
        str | None, typer.Option(help="Radius [default: of the recipe, or 8/255].")
    ] = None,
    norm: Annotated[
        str | None, typer.Option(help="linf or l2, with --epsilon [default: linf].")
    ] = None,
    steps: Annotated[int, typer.Option(min=40, max=10_000, help="Of APGD.")] = 40,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Write teachers.json, .md and .svg here.")
    ] = None,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    download: DownloadOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure teachers clean and under attack, and how far what fools one fools the others.

    The images are those that runs hold out of training, never test images; a teacher that was
    trained elsewhere may have seen them. Recommended are robust teachers with low mutual
    transferability. A recipe gives its teachers with their mean, std and resize_to, its
    data and its threat. For example files and runs, the teachers of a recipe, or both:

    `robust-compress teacher rank resnet18:a.safetensors runs/b c.safetensors --data cifar10:DATA`

    `robust-compress teacher rank recipe.toml runs/another --choose 2 --out runs/teachers`
    """
    output = Output(as_json=as_json)
    if not 0 <= transfer_weight <= 100:
        raise UsageError(f"--transfer-weight {transfer_weight:g} is not between 0 and 100")
    threat = _threat(epsilon, norm)
    if out is not None:
        _refuse_unwritable(out)
    from cli.training import performance_settings
    from compressor.reports.teacher_pages import write_ranking
    from compressor.teacher_ranking_workflow import RankingRequest, is_recipe, rank_teachers

    request = RankingRequest(
        sources=teachers,
        data_source=data,
        num_images=samples,
        threat=threat,
        num_steps=steps,
        num_wanted=choose,
        transfer_weight=transfer_weight,
        settings=performance_settings(device=device, dtype="float32", num_threads=threads),
        download=download,
    )
    try:
        with _display(output) as observe:
            ranking, tables = rank_teachers(request, observe=observe)
    except KeyboardInterrupt:
        raise InterruptedRunError("interrupted; nothing is kept") from None
    paths = write_ranking(ranking, out) if out is not None else []
    output.result(ranking.model_dump(mode="json") | {"files": [str(path) for path in paths]})
    _print(ranking, output)
    if paths:
        output.say(f"\nWritten: {paths[0]}, {', '.join(path.name for path in paths[1:])}")
    _say_next(ranking, tables, output, recipe=next(filter(is_recipe, teachers), _NO_RECIPE))


def _threat(epsilon: str | None, norm: str | None) -> "ThreatModel | None":
    from compressor.threat import ThreatModel, parse_fraction

    if norm not in (None, "linf", "l2"):
        raise UsageError(f"--norm {norm!r} is not one of linf, l2")
    if epsilon is None:
        if norm is not None:
            raise UsageError(f"--norm {norm} needs a radius of its own; add --epsilon")
        return None
    try:
        radius = parse_fraction(epsilon)
    except ValueError as error:
        raise UsageError(f"--epsilon: {error}") from None
    if not 0 < radius <= (1 if norm != "l2" else 1000):  # also refuses what is no number
        raise UsageError(
            f"--epsilon {epsilon} is not a radius; pixels are in [0, 1], so write eight grey "
            'levels as "8/255"'
        )
    return ThreatModel(norm="l2" if norm == "l2" else "linf", epsilon_pixels=radius)


def _refuse_unwritable(folder: Path) -> None:
    """Before anything is measured; the folder itself is made when there is something to write."""
    import os

    from compressor.errors import RunError

    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise RunError(f"{there} cannot be written to; choose another folder with --out")


@contextmanager
def _display(output: Output) -> Iterator["Callable[[RankingProgress], None]"]:
    """What is being done, how far it has come and how long the rest will take."""
    if output.as_json:
        yield lambda _: None
    elif output.console.is_terminal:
        with output.console.status("Opening the teachers") as status:
            yield lambda event: status.update(_progress_line(event))
    else:
        yield _PlainLines(output)


class _PlainLines:
    def __init__(self, output: Output) -> None:
        self._output = output
        self._told_at_seconds = time.monotonic()

    def __call__(self, event: "RankingProgress") -> None:
        now = time.monotonic()
        if now - self._told_at_seconds > _PLAIN_LINE_EVERY_SECONDS:
            self._told_at_seconds = now
            self._output.say(_progress_line(event))
            sys.stdout.flush()


def _progress_line(event: "RankingProgress") -> str:
    from rich.markup import escape

    left = ""
    if event.left_seconds is not None:
        left = f", about {timedelta(seconds=round(event.left_seconds))} left"
    return escape(f"{100 * event.done_fraction:.0f} %, {event.doing}{left}")


def _print(ranking: "TeacherRanking", output: Output) -> None:
    from compressor.reports import teacher_pages as pages

    num = len(ranking.teachers)
    output.title(f"{num} teacher{'s' if num > 1 else ''}; {ranking.protocol}")
    _table(pages.accuracy_table(ranking), output)
    output.say(
        f"Each of {ranking.num_images} images; worst: right also on the images made on all others."
    )
    output.say(pages.seen_line(ranking))
    output.title("Size, speed and mean entropy")
    _table(pages.nature_table(ranking), output)
    if 1 < len(ranking.teachers) <= _MAX_COLUMNS:
        output.title("Accuracy on images made on another teacher (%)")
        _table(pages.transfer_accuracy_table(ranking), output)
        output.say(pages.ACCURACY_NOTE)
        output.title("Transferability (%)")
        _table(pages.transferability_table(ranking), output)
        output.say(pages.TRANSFER_NOTE)
    elif len(ranking.teachers) > _MAX_COLUMNS:
        output.say("The matrices of so many teachers are in the files that --out writes.")
    output.title(pages.choice_text(ranking))
    for line in [*pages.choice_lines(ranking), *ranking.notes]:
        output.say(line)


def _table(table: "Table", output: Output) -> None:
    output.table(table.header, table.rows)


def _say_next(
    ranking: "TeacherRanking", tables: "Sequence[TeacherRecipe]", output: Output, *, recipe: str
) -> None:
    """Distilling from the recommended ones and from the best of the others on clean images.

    Where there is a recipe, as many as its method takes.
    """
    if ranking.chosen is None:
        output.next_command("robust-compress teacher train RECIPE.toml --role robust")
        return
    num_clean, num_robust = _most_teachers(recipe)
    if num_robust == 0:  # another kind of method
        recipe, num_clean, num_robust = _NO_RECIPE, 1, len(tables)
    robust = [number - 1 for number in ranking.chosen.numbers][:num_robust]
    others = [place for place in range(len(tables)) if place not in robust]
    rows = [("robust", tables[place]) for place in robust]
    if num_clean:
        best = max(others or robust, key=lambda place: ranking.teachers[place].clean.fraction)
        rows.insert(0, ("clean", tables[best]))
        if not others:
            name = ranking.teachers[best].name
            output.say(f"No teacher is left over, so {name} serves as clean and as robust teacher.")
    value = ", ".join(_inline_table(role, table) for role, table in rows)
    output.next_command(
        shlex.join(["robust-compress", "distill", recipe, "--set", f"teachers=[{value}]"])
    )


def _most_teachers(recipe: str) -> tuple[int, int]:
    """Clean and robust teachers that the method of a recipe takes."""
    from compressor.recipe_file import load_recipe

    if recipe == _NO_RECIPE:
        return 1, 128
    need = load_recipe(Path(recipe)).method.teachers
    num_clean = min(1, need.clean[-1])
    return num_clean, min(need.robust[-1], need.together[-1] - num_clean)


def _inline_table(role: str, table: "TeacherRecipe") -> str:
    """As TOML, whose strings, numbers and lists are written as in JSON."""
    given: dict[str, Any] = table.model_dump(mode="json", exclude_none=True) | {"role": role}
    return "{" + ", ".join(f"{name}={json.dumps(value)}" for name, value in given.items()) + "}"
