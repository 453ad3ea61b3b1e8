"""What `distill` and `teacher train` share: settings, the live display, signals, the run."""

import math
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cli.output import Output
from cli.processes import is_one_of_several, num_restarts_until_now, option_in_use
from compressor.errors import UsageError

if TYPE_CHECKING:
    from compressor.performance_settings import PerformanceSettings
    from compressor.recipe import Recipe
    from compressor.run_directory import RunDirectory
    from compressor.teacher_check import TeacherCheck


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """The options of a training command, apart from the recipe."""

    out: Path | None
    resume: bool
    settings: "PerformanceSettings"
    download: bool
    accept_teachers: bool
    command: str
    """`distill` or `teacher train`, for the line that resumes."""


def performance_settings(
    *,
    device: str,
    dtype: str,
    num_threads: int | None,
    compile_networks: str = "auto",
    checkpoint_minutes: float = 10.0,
    keep_every: int | None = None,
    memory_mib: int = 4096,
    num_workers: int | None = None,
) -> "PerformanceSettings":
    """Settings from options.

    Raises:
        UsageError: if the format, or whether to compile, is not one of three words.
    """
    from compressor.performance_settings import PerformanceSettings

    if not math.isfinite(checkpoint_minutes):
        raise UsageError(f"--checkpoint-minutes {checkpoint_minutes} is not a number of minutes")
    if dtype not in {"auto", "float32", "bfloat16"}:
        raise UsageError(f"--dtype {dtype!r} is not one of auto, float32, bfloat16")
    if compile_networks not in {"auto", "on", "off"}:
        raise UsageError(f"--compile {compile_networks!r} is not one of auto, on, off")
    return PerformanceSettings(
        device=device,
        compile=compile_networks,  # type: ignore[arg-type]
        training_dtype=dtype,  # type: ignore[arg-type]
        num_threads=num_threads,
        checkpoint_every_minutes=checkpoint_minutes,
        keep_every_epochs=keep_every,
        memory_budget_mib=memory_mib,
        num_workers=num_workers,
    )


def run_training(recipe: "Recipe", options: TrainingOptions, output: Output) -> "RunDirectory":
    """Train with a live display, and stop well on SIGINT and SIGTERM."""
    from cli.progress import training_display
    from compressor.interruption import stop_wish
    from compressor.training_workflow import TrainingRequest, train

    out = options.out or Path("runs") / f"{recipe.name}-{recipe.recipe_id[:8]}"
    restart = num_restarts_until_now()
    if restart:
        output.say(f"A process was killed; all go on from the last checkpoint (restart {restart})")
    request = TrainingRequest(
        out=out,
        settings=options.settings,
        resume=options.resume,
        resume_command=_resume_command(out, options),
        download=options.download,
        accept_teachers=options.accept_teachers,
    )
    with (
        stop_wish(is_patient=is_one_of_several()) as stop,
        training_display(output) as observe,
    ):
        run = train(recipe, request, observe=observe, on_teacher=_teller(output), stop=stop)
    output.say(f"Trained: {run.model}; curves in {run.curves.name}")
    return run


def _resume_command(out: Path, options: TrainingOptions) -> str:
    """With every option that the run needs to go on as it began."""
    given = {"--nproc": option_in_use(), "--keep-every": options.settings.keep_every_epochs}
    words = [w for name, value in given.items() if value for w in (name, str(value))]
    words += performance_words(options.settings)
    flags = {"--download": options.download, "--accept-teachers": options.accept_teachers}
    words += [name for name, is_given in flags.items() if is_given]
    command = ["robust-compress", *options.command.split(), str(out), "--resume", *words]
    return shlex.join(command)


def performance_words(settings: "PerformanceSettings") -> list[str]:
    """The options of `performance_settings` that were given, to be typed again."""
    given = {
        "--device": settings.device if settings.device != "auto" else None,
        "--dtype": settings.training_dtype if settings.training_dtype != "auto" else None,
        "--compile": settings.compile if settings.compile != "auto" else None,
        "--threads": settings.num_threads,
        "--memory-mib": settings.memory_budget_mib if settings.memory_budget_mib != 4096 else None,
        "--workers": settings.num_workers,
    }
    return [word for name, value in given.items() if value for word in (name, str(value))]


def _teller(output: Output) -> "Callable[[TeacherCheck], None]":
    def tell(check: "TeacherCheck") -> None:
        robust = f", short PGD {check.robust}" if check.robust else ", no gradient to attack"
        name, n = check.teacher.name, check.clean.num_total
        output.say(
            f"{check.teacher.role} teacher {name}: clean {100 * check.clean.fraction:.1f} % "
            f"of {n} held-out images{robust}"
        )

    return tell
