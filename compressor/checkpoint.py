"""TrainState <-> disk: atomic, versioned, checksummed, without pickle.

A checkpoint holds everything that decides the next step. Randomness is a function of (seed,
epoch, sample), so there is no generator to save.
"""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from compressor.errors import CheckpointError, NonFiniteLossError
from compressor.not_finite import not_finite_names
from compressor.recipe import canonical_json
from compressor.run_directory import RunDirectory, folder_written_atomically
from compressor.weights import sha256_of_file

FORMAT_VERSION = 1

Candidate = Literal["weights", "average"]
"""The network as trained, or the moving average of its weights."""


@dataclass(frozen=True, kw_only=True)
class Best:
    """The best candidate on validation images so far, and the checkpoint that holds it."""

    step: int
    epoch: int
    candidate: Candidate
    score: float
    clean_correct: int
    robust_correct: int
    num_validation: int


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """Everything that influences the next step; the network and its momentum are in place."""

    step: int
    """Steps done."""
    epoch: int
    """Epochs done."""
    batch_in_epoch: int
    """Batches of the next epoch that are already done."""
    method_state: object
    best: Best | None = None


@dataclass(frozen=True, kw_only=True)
class TrainedTensors:
    """The tensors that a step changes."""

    network: nn.Module
    optimizer: torch.optim.SGD
    average: Mapping[str, Tensor] | None
    """Moving average of the network's state, by name."""
    of_method: Mapping[str, Tensor] = field(default_factory=dict)
    """What the method changes besides, by name."""


def save_checkpoint(
    run: RunDirectory, state: TrainState, tensors: TrainedTensors, *, recipe_id: str
) -> Path:
    """Write the checkpoint of `state.step`; nothing is there before everything is.

    Raises:
        NonFiniteLossError: if a weight is not a finite number; such a state is never saved.
        OSError: with the name of the checkpoint, if the disk is full.
    """
    groups = {"network": dict(tensors.network.state_dict()), "momentum": _momentum(tensors)}
    if tensors.average is not None:
        groups["average"] = dict(tensors.average)
    if tensors.of_method:
        groups["method"] = dict(tensors.of_method)
    _refuse_non_finite(groups, run=run, step=state.step)
    path = run.checkpoint(state.step)
    with folder_written_atomically(path) as folder:
        for group, values in groups.items():
            # Contiguous in the logical order of each tensor, wherever it lies and however.
            plain = {name: value.detach().cpu().contiguous() for name, value in values.items()}
            # As bytes: what safetensors raises where a disk is full is no error of the system.
            (folder / f"{group}.safetensors").write_bytes(safetensors.torch.save(plain))
        table = {
            "format_version": FORMAT_VERSION,
            "recipe_id": recipe_id,
            **dataclasses.asdict(state),
            "sha256": {file.name: sha256_of_file(file) for file in sorted(folder.iterdir())},
        }
        table["state_sha256"] = _hash_of_table(table)
        (folder / "train_state.json").write_text(json.dumps(table, indent=2), encoding="utf-8")
    return path


def prune_checkpoints(run: RunDirectory, state: TrainState, *, kept_steps: set[int]) -> None:
    """Remove all checkpoints but the best, the last two and `kept_steps`."""
    steps = run.checkpoint_steps()
    keep = {*steps[-2:], *kept_steps} | ({state.best.step} if state.best else set())
    for step in set(steps) - keep:
        doomed = run.checkpoint(step)
        hidden = doomed.with_name(f".incomplete-{doomed.name}")
        doomed.replace(hidden)  # so that a kill leaves no half-removed checkpoint
        shutil.rmtree(hidden)


def load_checkpoint(
    run: RunDirectory,
    tensors: TrainedTensors,
    *,
    recipe_id: str,
    restore_method_state: Callable[[Mapping[str, object]], object],
    step: int | None = None,
) -> TrainState:
    """Put a checkpoint (by default the newest) into `tensors`, in place, and return its state.

    Raises:
        CheckpointError: if it is missing, damaged, of another format or of another recipe.
    """
    path = _choose(run, step)
    table = _read_state(path)
    if table["recipe_id"] != recipe_id:
        raise CheckpointError(
            f"{path} belongs to another recipe (id {table['recipe_id'][:8]}, now "
            f"{recipe_id[:8]}); resume with the run's own recipe, {run.resolved_recipe}"
        )
    _check_hashes(path, table["sha256"])
    _restore_tensors(path, tensors)
    best = Best(**table["best"]) if table["best"] else None
    return TrainState(
        step=table["step"],
        epoch=table["epoch"],
        batch_in_epoch=table["batch_in_epoch"],
        method_state=_restored(restore_method_state, table, path),
        best=best,
    )


def selected_candidate(run: RunDirectory) -> Best:
    """The best candidate of a run, as its last checkpoint says.

    Raises:
        CheckpointError: if there is none yet.
    """
    table = _read_state(_choose(run, None))
    if not table["best"]:
        raise CheckpointError(f"{run.path}: nothing was validated yet; continue with --resume")
    return Best(**table["best"])


def last_method_state(
    run: RunDirectory,
    restore: Callable[[Mapping[str, object]], object],
    of_method: Mapping[str, Tensor],
) -> object:
    """What the method carried when the run last saved.

    Args:
        run: with a checkpoint.
        restore: from plain values to a state.
        of_method: what the method changes besides the student, which gets its values of then.

    Raises:
        CheckpointError: if there is no checkpoint, or it is damaged.
    """
    path = _choose(run, None)
    table = _read_state(path)
    _check_hashes(path, table["sha256"])
    if of_method:
        _copy_into(of_method, load_file(path / "method.safetensors"))
    return _restored(restore, table, path)


def _restored(
    restore: Callable[[Mapping[str, object]], object], table: Mapping[str, Any], path: Path
) -> object:
    try:
        return restore(table["method_state"])
    except (KeyError, TypeError, ValueError, AttributeError):
        raise CheckpointError(
            f"{path} was written by another version, whose state of the method is not known here; "
            "go on with the version that wrote it, or train again"
        ) from None


@torch.no_grad()
def _copy_into(targets: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, target in targets.items():
        target.copy_(values[name])


def load_candidate(run: RunDirectory, best: Best) -> dict[str, Tensor]:
    """The tensors of the best candidate, by name.

    Raises:
        CheckpointError: if its checkpoint is missing or damaged.
    """
    path = _choose(run, best.step)
    _check_hashes(path, _read_state(path)["sha256"])
    group = "network" if best.candidate == "weights" else "average"
    return load_file(path / f"{group}.safetensors")


def _choose(run: RunDirectory, step: int | None) -> Path:
    steps = run.checkpoint_steps()
    if step is None and steps:
        step = steps[-1]
    if step is None or step not in steps:
        have = ", ".join(map(str, steps)) or "none"
        wanted = "checkpoint" if step is None else f"checkpoint of step {step}"
        raise CheckpointError(
            f"{run.path} has no {wanted} (there are: {have}); copy it back, or train again into "
            "another folder"
        )
    return run.checkpoint(step)


def _read_state(path: Path) -> dict[str, Any]:
    try:
        table = json.loads((path / "train_state.json").read_text(encoding="utf-8"))
        if table["format_version"] != FORMAT_VERSION:
            raise CheckpointError(
                f"{path} has format version {table['format_version']}, this robust-compress reads "
                f"{FORMAT_VERSION}; resume with the version that wrote it"
            )
        needed = {"recipe_id", "sha256", "step", "epoch", "batch_in_epoch", "method_state", "best"}
        if missing := needed - set(table):
            raise KeyError(f"no {sorted(missing)}")
        if table.pop("state_sha256") != _hash_of_table(table):
            raise ValueError("its SHA-256 is another than when it was written")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, f"train_state.json cannot be read ({error})") from None
    return dict(table)


def _hash_of_table(table: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json(table).encode()).hexdigest()


def _check_hashes(path: Path, hashes: Mapping[str, str]) -> None:
    for name, expected in hashes.items():
        file = path / Path(name).name
        if not file.is_file():
            raise _damaged(path, f"{name} is missing")
        if sha256_of_file(file) != expected:
            raise _damaged(path, f"{name} has another SHA-256 than when it was written")


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint {path} is damaged: {why}. Remove that folder to go on from the one "
        "before it"
    )


def _restore_tensors(path: Path, tensors: TrainedTensors) -> None:
    try:
        tensors.network.load_state_dict(load_file(path / "network.safetensors"))
        momentum = load_file(path / "momentum.safetensors")
        average = load_file(path / "average.safetensors") if tensors.average is not None else {}
        method = load_file(path / "method.safetensors") if tensors.of_method else {}
    except (SafetensorError, RuntimeError, OSError) as error:
        raise _damaged(path, str(error).splitlines()[0]) from None
    for name, parameter in tensors.network.named_parameters():
        if name in momentum:
            buffer = torch.empty_like(parameter).copy_(momentum[name])
            tensors.optimizer.state[parameter]["momentum_buffer"] = buffer
    _copy_into(tensors.average or {}, average)
    _copy_into(tensors.of_method, method)


def _momentum(tensors: TrainedTensors) -> dict[str, Tensor]:
    state = tensors.optimizer.state
    buffers = {
        name: state[parameter].get("momentum_buffer")
        for name, parameter in tensors.network.named_parameters()
        if parameter in state
    }
    return {name: buffer for name, buffer in buffers.items() if buffer is not None}


def _refuse_non_finite(
    groups: Mapping[str, Mapping[str, Tensor]], *, run: RunDirectory, step: int
) -> None:
    keys = {"network": "training.learning_rate", "method": "method.teacher_learning_rate"}
    for group, key in keys.items():
        bad = not_finite_names(groups.get(group, {}))
        if bad:
            raise NonFiniteLossError(
                f"after step {step} the weights {', '.join(bad[:3])} are not finite; nothing was "
                f"saved. Last good checkpoint: {last_good(run)}. Try a smaller {key}"
            )


def last_good(run: RunDirectory) -> str:
    """The newest checkpoint, for messages."""
    steps = run.checkpoint_steps()
    return str(run.checkpoint(steps[-1])) if steps else "none yet"
