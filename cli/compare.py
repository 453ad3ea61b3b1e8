"""`robust-compress compare`: methods beside each other, under one protocol."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.options import (
    AcceptOption,
    DeviceOption,
    DownloadOption,
    DtypeOption,
    JsonOption,
    MemoryOption,
    SetOption,
    ThreadsOption,
    WorkersOption,
)
from cli.output import Output
from compressor.errors import ExitCode, InterruptedRunError

if TYPE_CHECKING:
    from compressor.comparison.measuring import ImageCounts
    from compressor.comparison.result import ComparisonResult
    from compressor.comparison_workflow import PreparedComparison


def compare(
    file: Annotated[
        Path,
        typer.Argument(metavar="RECIPE.toml", help="What all share; or a comparison file."),
    ],
    methods: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="Such as bmtard,trades; labels of a comparison file."),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, max=100, help="That of the recipe and those after it [1].")
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="LABEL", help="The others are tested against it [default: the first]."
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=0, help="Test images for PGD and CW [2000].")
    ] = None,
    cascade_samples: Annotated[
        int | None, typer.Option(min=0, help="Test images for the AutoAttack-style cascade [300].")
    ] = None,
    clean_samples: Annotated[
        int | None, typer.Option(min=1, help="Test images without an attack [all].")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Where the images are, if not where the recipe says.")
    ] = None,
    overrides: SetOption = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Of runs and tables [default: runs/compare-NAME]."),
    ] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Try again what failed.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only the plan, and how long it would take.")
    ] = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    threads: ThreadsOption = None,
    memory_mib: MemoryOption = 4096,
    workers: WorkersOption = None,
    download: DownloadOption = False,
    accept_teachers: AcceptOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train students by several methods under one protocol, attack them, and test the differences.

    Same images, teachers, student, training and attacks; what is finished is never done again, so
    the same command goes on after an interruption. For example with a recipe, and with a file:

    `robust-compress compare examples/recipes/cifar10-small.toml --methods bmtard,trades,pgd_at
    --seeds 3 --data imagefolder:DATA --set teachers.0.source=CLEAN --set teachers.1.source=ROBUST`

    `robust-compress compare comparison.toml --dry-run`
    """
    from cli.comparison_display import print_plan
    from cli.training import performance_settings
    from compressor.comparison.folder import ComparisonFolder
    from compressor.comparison.plan import make_plan
    from compressor.comparison.request import Wishes, read_request, with_wishes
    from compressor.comparison.runs import HowToRun
    from compressor.comparison_workflow import prepare_comparison
    from compressor.interruption import stop_wish

    output = Output(as_json=as_json)
    wishes = Wishes(
        seeds=seeds,
        reference=reference,
        clean_samples=clean_samples,
        samples=samples,
        cascade_samples=cascade_samples,
    )
    changes = [*([f"data.source={data}"] if data is not None else []), *(overrides or [])]
    request = with_wishes(read_request(file, names=methods), wishes)
    plan = make_plan(request, overrides=changes)
    how = HowToRun(
        settings=performance_settings(
            device=device,
            dtype=dtype,
            num_threads=threads,
            memory_mib=memory_mib,
            num_workers=workers,
        ),
        command=shlex.join(["robust-compress", *sys.argv[1:]]),
        signals=stop_wish,
        download=download,
        accept_teachers=accept_teachers,
        retry=retry,
    )
    folder = ComparisonFolder(out or Path("runs") / f"compare-{plan.base_name}")
    output.say("... reading data and teachers, building every method once")
    prepared = prepare_comparison(plan, folder, how)
    print_plan(prepared, output)
    if dry_run:
        output.result(_plan_table(prepared))
        output.next_command(how.command.replace(" --dry-run", ""))
        return
    _compare(prepared, output)


def _compare(prepared: "PreparedComparison", output: Output) -> None:
    from cli.comparison_display import comparison_display, print_result, run_line
    from compressor.comparison_workflow import compare as compare_runs
    from compressor.run_directory import RunDirectory

    with comparison_display(output) as observe:
        try:
            result = compare_runs(
                prepared,
                observe=observe,
                on_run=lambda finished: output.say(run_line(finished)),
            )
        except KeyboardInterrupt:
            raise InterruptedRunError(
                "interrupted; what is finished is kept. Continue with\n  " + prepared.how.command
            ) from None
    print_result(result, output)
    folder = prepared.folder
    others = (folder.result, folder.csv, folder.latex, folder.picture)
    names = ", ".join(path.name for path in others if path.is_file())
    output.say(f"\nTables: {folder.markdown}, {names}")
    output.result(result.model_dump(mode="json"))
    _refuse_empty(result, prepared.materials.images, output)
    measured = [
        f"{row.label}-seed{run.seed}"
        for row in sorted(result.methods, key=lambda row: -row.num_measured)
        for run in row.runs
        if run.status == "measured"
    ]
    runs = [RunDirectory(folder.run(name)) for name in measured]
    there = [run.path for run in runs if run.model.is_file()]
    output.next_command(
        f"robust-compress verify {shlex.quote(str(there[0]))}"
        if there
        else f"less {shlex.quote(str(folder.markdown))}"
    )


def _refuse_empty(result: "ComparisonResult", images: "ImageCounts", output: Output) -> None:
    """An exit code of its own where nothing was shown, or nothing of what attacks were to show."""
    from compressor.comparison.result import ROBUST

    metrics = {score.metric for row in result.methods for score in row.scores}
    if metrics & set(ROBUST) or (metrics and not list(images.attacks)):
        return
    what = "an accuracy under attack that may be believed" if metrics else "numbers"
    output.say(f"No run has {what}; the notes say why.")
    raise typer.Exit(int(ExitCode.INVALID))


def _plan_table(prepared: "PreparedComparison") -> dict[str, object]:
    from dataclasses import asdict

    return {
        "name": prepared.plan.base_name,
        "reference": prepared.plan.reference,
        "notes": list(prepared.plan.notes),
        "test_images": asdict(prepared.materials.images),
        "methods": [
            {
                "label": method.label,
                "method": method.recipe.method.model_dump(mode="json"),
                "teachers": method.teachers,
                "origin": method.origin,
                "passes": asdict(prepared.passes[method.label]),
            }
            for method in prepared.plan.methods
        ],
        "runs": [
            {
                "name": work.planned.name,
                "estimated_seconds": dict(work.seconds),
                "failure": work.failure,
            }
            for work in prepared.work
        ],
        "estimated_seconds": prepared.left_seconds,
    }
