"""Half an hour of disturbances: is every resumed run, to the last bit, the one left alone?

One run of a tiny student is left alone and watched: its memory and its open files. The same run is
then begun again and disturbed at random moments, with a checkpoint every 5 seconds: SIGTERM,
SIGKILL, or a disk that is full (from a moment on no file may grow beyond some bytes). It is resumed
until it ends. All checkpoints of whole epochs, the selected weights and the log are compared.

    python tests/evidence/soak.py --minutes 30 --write docs/results/soak.md
"""

import argparse
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from compressor.environment import describe_environment
from compressor.networks import NetworkSpec, build_classifier, save_classifier
from compressor.performance import resolve_performance
from compressor.performance_settings import PerformanceSettings
from compressor.reports.markdown import markdown_table
from compressor.run_directory import write_json_atomically, write_text_atomically

CHECKPOINT_EVERY_SECONDS = 5.0
STEPS_PER_SECOND = 60
"""Roughly, on one core; only for how long the runs are."""
STEPS_PER_EPOCH = 15
SECONDS_TO_FIRST_STEP = 8.0
DISTURBANCES = ("SIGTERM", "SIGKILL", "full disk")
RECIPE = """
name = "soak"
[threat]
epsilon_pixels = "16/255"
[data]
source = "digits"
validation_size = 100
[student]
architecture = "tiny"
width = 2.0
[[teachers]]
role = "clean"
source = "clean.safetensors"
[[teachers]]
role = "robust"
source = "robust.safetensors"
[method]
name = "bmtard"
attack.num_steps = 4
attack.step_size_pixels = "8/255"
[training]
epochs = {epochs}
batch_size = 100
ema_decay = 0.99
schedule.kind = "cosine"
[selection]
num_steps = 2
every_epochs = 5
"""


@dataclass(frozen=True, kw_only=True)
class Watched:
    """A process, looked at now and then."""

    seconds: list[float] = field(default_factory=list)
    memory_mib: list[float] = field(default_factory=list)
    open_files: list[int] = field(default_factory=list)

    def look(self, pid: int, since_seconds: float) -> None:
        try:
            pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="utf-8").split()[1])
            number = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        except (FileNotFoundError, ProcessLookupError, IndexError):
            return  # it has ended
        self.seconds.append(time.monotonic() - since_seconds)
        self.memory_mib.append(pages * resource.getpagesize() / 2**20)
        self.open_files.append(number)

    def growth_mib_per_hour(self) -> float:
        """Slope of memory over the second half, when everything has been met once."""
        half = len(self.seconds) // 2
        slope = np.polyfit(self.seconds[half:], self.memory_mib[half:], 1)[0]
        return float(slope * 3600)


def start(folder: Path, out: Path) -> subprocess.Popen[str]:
    """The command as a user types it; resumed if the run has begun."""
    command = [sys.executable, "-m", "cli.main", "distill"]
    has_begun = (out / "recipe.resolved.json").exists()
    command += [str(out), "--resume"] if has_begun else ["soak.toml", "--out", str(out)]
    command += ["--accept-teachers", "--no-verify", "--no-export", "--threads", "1"]
    command += ["--keep-every", "1", "--checkpoint-minutes", str(CHECKPOINT_EVERY_SECONDS / 60)]
    return subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def undisturbed(folder: Path, out: Path) -> Watched:
    """From beginning to end, looked at every 2 seconds."""
    watched, began_at_seconds = Watched(), time.monotonic()
    process = start(folder, out)
    while process.poll() is None:
        watched.look(process.pid, began_at_seconds)
        time.sleep(2)
    if process.returncode != 0:
        raise RuntimeError(f"the undisturbed run failed: {process.communicate()[0]}")
    return watched


def disturbed(folder: Path, out: Path, draws: random.Random) -> tuple[Counter[str], list[str]]:
    """Until it ends; how often it was disturbed by what, and what was wrong with how it ended."""
    done, wrong = Counter[str](), []
    while True:
        process, kind = start(folder, out), draws.choice(DISTURBANCES)
        try:
            output, _ = process.communicate(timeout=SECONDS_TO_FIRST_STEP + draws.uniform(0, 30))
        except subprocess.TimeoutExpired:
            output = _disturb(process, kind, draws)
            if process.returncode != 0:  # or the disk was not full enough
                done[kind] += 1
            wrong += _what_is_wrong(kind, process.returncode, output)
            if process.returncode != 0:
                continue
        if process.returncode != 0:
            wrong.append(f"left alone it ended with {process.returncode}: {output[-300:]}")
        return done, wrong


def _disturb(process: subprocess.Popen[str], kind: str, draws: random.Random) -> str:
    if kind == "full disk":
        num_bytes = draws.choice([0, 500, 5_000, 50_000])
        with suppress(ProcessLookupError):  # it has just ended
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (num_bytes, num_bytes))
    else:
        process.send_signal(getattr(signal, kind))
    output, _ = process.communicate(timeout=300)
    return output


def _what_is_wrong(kind: str, code: int, output: str) -> list[str]:
    """A run that was near its end may end well in spite of it.

    After its last line it is only Python that a SIGTERM ends; to a shell that is 143 as well.
    """
    expected = {"SIGTERM": 143, "SIGKILL": -signal.SIGKILL, "full disk": 4}[kind]
    has_ended = "\nNext: " in output
    problems = (
        []
        if code in {expected, 0} or (has_ended and code == -signal.SIGTERM)
        else [f"{kind}: exit code {code}, not {expected}: {output[-300:]}"]
    )
    if "Traceback" in output:
        problems.append(f"{kind}: a traceback: {output[-600:]}")
    return problems


def differences(one: Path, other: Path) -> list[str]:
    """Files of two runs that should be the same and are not."""
    found = [f"{p.name}: only in one" for p in _only_in_one(one, other)]
    names = [Path("model.safetensors")]
    names += [p.relative_to(one) for p in sorted((one / "checkpoints").rglob("*")) if p.is_file()]
    for name in names:
        if (other / name).is_file() and (one / name).read_bytes() != (other / name).read_bytes():
            found.append(f"{name} differs")
    if _without_speed(one) != _without_speed(other):
        found.append("metrics.jsonl differs")
    return found


def _only_in_one(one: Path, other: Path) -> list[Path]:
    """Checkpoints of whole epochs, and anything else but what belongs to single processes."""
    sets = [{p.relative_to(run) for p in run.rglob("*") if p.is_file()} for run in (one, other)]
    return [p for p in sorted(sets[0] ^ sets[1]) if "tensorboard" not in p.parts]


def _without_speed(run: Path) -> list[str]:
    """The log, but for the one number that depends on the clock."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line.partition(', "speed_images_per_second"')[0] for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    began_at_seconds = time.monotonic()
    draws, done, wrong, num_runs = random.Random(options.seed), Counter[str](), [], 0
    epochs = max(2, round(options.minutes * 60 / 4 * STEPS_PER_SECOND / STEPS_PER_EPOCH))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "soak.toml").write_text(RECIPE.format(epochs=epochs), encoding="utf-8")
        spec = NetworkSpec(architecture="tiny", num_classes=10, image_shape=(1, 8, 8))
        for seed, role in enumerate(("clean", "robust")):
            network = build_classifier(spec, seed=seed)
            save_classifier(folder / f"{role}.safetensors", network, spec, {})
        alone = folder / "alone"
        watched = undisturbed(folder, alone)
        while time.monotonic() - began_at_seconds < options.minutes * 60 or num_runs == 0:
            out = folder / f"disturbed-{num_runs}"
            more, problems = disturbed(folder, out, draws)
            done, num_runs = done + more, num_runs + 1
            wrong += problems + differences(alone, out)
            num_checkpoints = len(list((alone / "checkpoints").iterdir()))
    minutes = (time.monotonic() - began_at_seconds) / 60
    found = {
        "minutes": minutes,
        "asked_minutes": options.minutes,
        "seed": options.seed,
        "epochs": epochs,
        "num_checkpoints": num_checkpoints,
        "num_runs": num_runs,
        "disturbances": dict(done),
        "wrong": wrong,
        "watched": vars(watched),
        "growth_mib_per_hour": watched.growth_mib_per_hour(),
        "environment": describe_environment(resolve_performance(PerformanceSettings())),
    }
    text = _markdown(found, watched)
    sys.stdout.write(text)
    if options.write:
        write_json_atomically(options.write.with_suffix(".json"), found)
        write_text_atomically(options.write, text)
    sys.exit(1 if wrong else 0)


def _markdown(found: dict, watched: Watched) -> str:
    half = len(watched.seconds) // 2
    rows = [
        (
            f"{watched.seconds[place]:,.0f}",
            f"{watched.memory_mib[place]:,.0f}",
            f"{watched.open_files[place]}",
        )
        for place in np.linspace(0, len(watched.seconds) - 1, 9).astype(int)
    ]
    disturbances = ", ".join(f"{n} x {kind}" for kind, n in sorted(found["disturbances"].items()))
    lines = [
        "# Disturbed runs",
        "",
        " ".join((__doc__ or "").split("\n\n")[1].split()),
        "",
        f"- {found['minutes']:.0f} minutes, {found['epochs']} epochs of {STEPS_PER_EPOCH} steps, a "
        f"checkpoint every {CHECKPOINT_EVERY_SECONDS:g} s",
        f"- {found['num_runs']} disturbed runs to their end: {disturbances}",
        f"- compared to the last bit: {found['num_checkpoints']} checkpoints of each run, the "
        "selected weights, the log",
        f"- differences, wrong exit codes and tracebacks: {len(found['wrong'])}",
        *(f"  - {problem}" for problem in found["wrong"]),
        f"- memory of the undisturbed run: {found['growth_mib_per_hour']:+.1f} MiB an hour over "
        f"its second half; open files {min(watched.open_files[half:])} to "
        f"{max(watched.open_files[half:])} there",
        "",
        markdown_table(("seconds", "memory, MiB", "open files"), rows),
        "",
        f"Command: `python tests/evidence/soak.py --minutes "
        f"{found['asked_minutes']:g} --seed {found['seed']} --write docs/results/soak.md`.",
        "",
        *(f"- {name}: {value}" for name, value in found["environment"].items()),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
