"""RunDirectory: the only file that knows any file name inside a run, and how to write one.

A run on disk::

    recipe.resolved.json  run.json  environment.json  metrics.jsonl  tensorboard/
    checkpoints/step-00000352/{network,momentum,average}.safetensors, train_state.json
    model.safetensors  curves.png  report.json  report.md  report.html  samples.csv
    exports/model.fp32.onnx  exports/model.fp32.onnx.json  fine-tuning-0123abcd/
    bench.json  bench.md  bench.svg
"""

import fcntl
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressor import atomic_folder
from compressor.device import kit_files
from compressor.errors import RunError
from compressor.reports.files import ReportFiles

_CHECKPOINT_PREFIX = "step-"


@dataclass(frozen=True)
class RunDirectory:
    """A folder that holds one run."""

    path: Path

    @classmethod
    def vacant(cls, path: Path) -> "RunDirectory":
        """A run that is yet to be made; `make` makes it.

        Raises:
            RunError: if something is already there, which is never overwritten.
        """
        try:
            is_taken = path.exists() and (not path.is_dir() or _holds_something(path))
        except OSError as error:
            raise RunError(
                f"{path} cannot be a run folder: {error.strerror}; choose another with --out"
            ) from None
        if is_taken:
            raise RunError(
                f"{path} already exists and is not empty; continue it with --resume, "
                "or choose another folder with --out"
            )
        return cls(path)

    def make(self) -> None:
        """Make the folder, where it is not there yet.

        Raises:
            RunError: if it cannot be made.
        """
        make_folder(self.path, called="run folder")

    @classmethod
    def open(cls, path: Path) -> "RunDirectory":
        """A run that exists.

        Raises:
            RunError: if `path` is not a run.
        """
        run = cls(path)
        if not run.resolved_recipe.is_file():
            raise RunError(
                f"{path} is not a run: it has no {run.resolved_recipe.name}. "
                "Make one with `robust-compress distill RECIPE --out RUN`"
            )
        return run

    @property
    def resolved_recipe(self) -> Path:
        """The recipe with every default filled in."""
        return self.path / "recipe.resolved.json"

    @property
    def facts(self) -> Path:
        """Hashes of the data and of the teachers, resolved rates, sizes."""
        return self.path / "run.json"

    @property
    def environment(self) -> Path:
        """Versions, device, performance settings."""
        return self.path / "environment.json"

    @property
    def metrics(self) -> Path:
        """One JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """Event files."""
        return self.path / "tensorboard"

    @property
    def curves(self) -> Path:
        """Picture of losses, accuracies, temperatures and weights."""
        return self.path / "curves.png"

    @property
    def model(self) -> Path:
        """The selected weights, self-describing."""
        return self.path / "model.safetensors"

    def report(self, label: str = "") -> ReportFiles:
        """The files of a verification."""
        return ReportFiles(folder=self.path, label=label)

    @property
    def benchmark(self) -> Path:
        """What the network and its exports cost, for programs."""
        return self.path / "bench.json"

    @property
    def benchmark_markdown(self) -> Path:
        """The same for people."""
        return self.path / "bench.md"

    @property
    def benchmark_picture(self) -> Path:
        """Size against robust accuracy; missing if fewer than two can be compared."""
        return self.path / "bench.svg"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        """The folder of the checkpoint after `step` steps."""
        return self.checkpoints / f"{_CHECKPOINT_PREFIX}{step:08d}"

    def checkpoint_steps(self) -> list[int]:
        """The steps of all complete checkpoints, ascending."""
        if not self.checkpoints.is_dir():
            return []
        names = [folder.name for folder in self.checkpoints.glob(f"{_CHECKPOINT_PREFIX}*")]
        numbers = [name.removeprefix(_CHECKPOINT_PREFIX) for name in names]
        return sorted(int(number) for number in numbers if number.isdigit())

    def engine(self, variant: str) -> Path:
        """The TensorRT engine; what is known about it is beside it, in a file ending in .json."""
        return self.exports / f"model.{variant}.engine"

    @property
    def build_kit(self) -> Path:
        """The folder from which a device builds its own engines."""
        return self.exports / "kit"

    def fine_tuning(self, label: str) -> "RunDirectory":
        """A run that goes on from this one for a while; `label` tells it from others."""
        return RunDirectory(self.path / f"fine-tuning-{label}")

    @property
    def exports(self) -> Path:
        """The folder of what leaves the building."""
        return self.path / "exports"

    def onnx(self, variant: str) -> Path:
        """The exported graph."""
        return self.exports / f"model.{variant}.onnx"

    def unverified_onnx(self, variant: str) -> Path:
        """The exported graph before its answers are compared."""
        return self.exports / f"unverified.{variant}.onnx"

    def onnx_verification(self, variant: str) -> Path:
        """What was shown about the exported graph."""
        return self.exports / f"model.{variant}.onnx.json"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run against a second process; the system lets go when this one ends.

        Raises:
            RunError: if another process writes into this folder.
        """
        with (self.path / ".lock").open("w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                raise RunError(
                    f"another process is training or exporting in {self.path}; wait for it or "
                    "stop it"
                ) from None
            except OSError as error:
                raise RunError(
                    f"the file system of {self.path} keeps no locks ({error.strerror}), so another "
                    "process could write there unseen; choose another place, or have it mounted "
                    "with locks"
                ) from None
            yield


def _holds_something(folder: Path) -> bool:
    """Whether there is more than what a process killed before its first step leaves behind."""
    run = RunDirectory(folder)
    leftovers = {".lock", run.facts.name, run.environment.name}
    return any(path.name not in leftovers for path in folder.iterdir())


def make_folder(path: Path, *, called: str) -> None:
    """Make a folder of results, where it is not there yet.

    Raises:
        RunError: if it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(
            f"the {called} {path} cannot be made: {error.strerror}; choose another with --out"
        ) from None


def write_text_atomically(path: Path, text: str) -> None:
    """Write a text file in UTF-8 that is either there as a whole or not at all."""
    write_bytes_atomically(path, text.encode())


def write_bytes_atomically(path: Path, content: bytes) -> None:
    """Write a file that is either there as a whole or not at all.

    Raises:
        OSError: with the name of the file, if the disk is full or the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder.failures_named(path):
        kit_files.write_atomically(path, content)


def write_json_atomically(path: Path, value: object) -> None:
    """As `write_text_atomically`, for a value of plain JSON types."""
    write_text_atomically(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:  # noqa: ANN401 (parsed JSON)
    """The value in a JSON file of a run.

    Raises:
        RunError: if it is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{path} is missing from the run; copy it back, or train again") from None
    except (OSError, ValueError, RecursionError) as error:  # a number may have 10,000 digits
        raise RunError(f"{path} cannot be read: {error}") from None


_FACTS = {"class_names", "teachers", "training_content_sha256", "num_training"}
_FACTS |= {"num_validation", "validation_index_sha256", "image_shape", "selection_attack"}


def read_facts(run: RunDirectory) -> dict[str, Any]:
    """What training wrote into `run.facts`.

    Raises:
        RunError: if the file is missing, damaged, or lacks a fact.
    """
    facts = read_json(run.facts)
    missing = sorted(_FACTS - facts.keys()) if isinstance(facts, dict) else sorted(_FACTS)
    if missing:
        raise RunError(f"{run.facts} lacks {', '.join(missing)}; copy it from the run again")
    return dict(facts)


def folder_written_atomically(path: Path) -> AbstractContextManager[Path]:
    """A temporary folder that becomes `path` when the block ends well; see `atomic_folder`.

    In the checkpoints of a run, into which one process alone writes, what a killed one left of any
    of them is removed.
    """
    checkpoints = RunDirectory(path.parent.parent).checkpoints
    of_steps = rf"\.incomplete-{_CHECKPOINT_PREFIX}[0-9]+(\.[0-9a-f]{{16}})?"
    leftovers = of_steps if path.parent == checkpoints else None
    return atomic_folder.folder_written_atomically(path, leftovers=leftovers)
