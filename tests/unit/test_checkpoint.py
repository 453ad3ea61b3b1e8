"""Checkpoints: bit-identical, pruned, checked, and never half-written or sick."""

import copy
import json
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F

from compressor.checkpoint import (
    Best,
    TrainedTensors,
    TrainState,
    load_candidate,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
    selected_candidate,
)
from compressor.errors import CheckpointError, NonFiniteLossError
from compressor.run_directory import RunDirectory

RECIPE_ID = "a" * 64


@dataclass(frozen=True)
class Counter:
    value: float


BEST = Best(
    step=3,
    epoch=1,
    candidate="weights",
    score=0.1 + 0.2,
    clean_correct=9,
    robust_correct=5,
    num_validation=10,
)
STATE = TrainState(step=3, epoch=1, batch_in_epoch=2, method_state=Counter(1 / 3), best=BEST)


@pytest.fixture
def run(tmp_path):
    return RunDirectory(tmp_path)


@pytest.fixture
def make_tensors(make_tiny):
    def make(seed, *, has_average=True):
        network = make_tiny(seed=seed).to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
        average = {k: v.clone() + 1 for k, v in network.state_dict().items()}
        return TrainedTensors(
            network=network, optimizer=optimizer, average=average if has_average else None
        )

    return make


def take_step(tensors, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(8, 3, 8, 8, generator=generator)
    tensors.optimizer.zero_grad()
    F.cross_entropy(tensors.network.train()(x), torch.arange(8) % 4).backward()
    tensors.optimizer.step()


def everything(tensors):
    momentum = {
        f"momentum.{name}": tensors.optimizer.state[p]["momentum_buffer"]
        for name, p in tensors.network.named_parameters()
        if p in tensors.optimizer.state
    }
    average = {f"average.{name}": t for name, t in (tensors.average or {}).items()}
    every = {**tensors.network.state_dict(), **momentum, **average}
    return {name: tensor.clone() for name, tensor in every.items()}


def assert_identical(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def load(run, tensors, *, step=None, recipe_id=RECIPE_ID):
    return load_checkpoint(
        run,
        tensors,
        recipe_id=recipe_id,
        restore_method_state=lambda values: Counter(**values),
        step=step,
    )


@pytest.mark.parametrize("has_average", [True, False])
def test_round_trip_is_bit_identical_and_goes_on_the_same(run, make_tensors, has_average):
    tensors = make_tensors(0, has_average=has_average)
    take_step(tensors, 1)
    take_step(tensors, 2)
    save_checkpoint(run, STATE, tensors, recipe_id=RECIPE_ID)
    other = make_tensors(5, has_average=has_average)
    assert load(run, other) == STATE
    assert_identical(everything(other), everything(tensors))
    take_step(tensors, 3)
    take_step(other, 3)
    assert_identical(everything(other), everything(tensors))


def test_round_trip_before_the_first_step(run, make_tensors):
    state = TrainState(step=0, epoch=0, batch_in_epoch=0, method_state=Counter(0.0))
    save_checkpoint(run, state, make_tensors(0), recipe_id=RECIPE_ID)
    other = make_tensors(5)
    assert load(run, other) == state
    assert_identical(everything(other), everything(make_tensors(0)))


def test_load_takes_the_newest_or_the_named_one(run, make_tensors):
    for step in (3, 12, 7):
        save_checkpoint(run, replace(STATE, step=step), make_tensors(step), recipe_id=RECIPE_ID)
    tensors = make_tensors(0)
    assert load(run, tensors).step == 12
    assert load(run, tensors, step=7).step == 7
    assert_identical(everything(tensors), everything(make_tensors(7)))
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 8 \(there are: 3, 7, 12\)"):
        load(run, tensors, step=8)


def test_load_without_any(run, make_tensors):
    with pytest.raises(CheckpointError, match="there are: none"):
        load(run, make_tensors(0))


@pytest.mark.parametrize(
    ("best_step", "kept", "left"),
    [(2, set(), [2, 5, 6]), (6, set(), [5, 6]), (1, {3, 4}, [1, 3, 4, 5, 6]), (None, {9}, [5, 6])],
)
def test_prune_keeps_best_last_two_and_kept(run, best_step, kept, left):
    for step in range(7):
        run.checkpoint(step).mkdir(parents=True)
    best = replace(BEST, step=best_step) if best_step is not None else None
    prune_checkpoints(run, replace(STATE, best=best), kept_steps=kept)
    assert run.checkpoint_steps() == left
    assert len(list(run.checkpoints.iterdir())) == len(left)


FILES = ["network.safetensors", "momentum.safetensors", "average.safetensors"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_damaged_file_is_named(run, make_tensors, name, harm):
    tensors = make_tensors(0)
    take_step(tensors, 1)
    file = save_checkpoint(run, STATE, tensors, recipe_id=RECIPE_ID) / name
    content = file.read_bytes()
    if harm == "remove":
        file.unlink()
    else:
        flipped = content[:-1] + bytes([content[-1] ^ 1])
        file.write_bytes(flipped if harm == "flip" else content[:-8])
    before = everything(tensors)
    with pytest.raises(CheckpointError, match=f"is damaged: {name}"):
        load(run, tensors)
    assert_identical(everything(tensors), before)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null"])
def test_damaged_state_is_named(run, make_tensors, text):
    path = save_checkpoint(run, STATE, make_tensors(0), recipe_id=RECIPE_ID)
    (path / "train_state.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"is damaged: train_state\.json"):
        load(run, make_tensors(0))


def test_other_recipe_and_other_format_are_refused(run, make_tensors):
    path = save_checkpoint(run, STATE, make_tensors(0), recipe_id=RECIPE_ID)
    with pytest.raises(CheckpointError, match="belongs to another recipe"):
        load(run, make_tensors(0), recipe_id="b" * 64)
    table = json.loads((path / "train_state.json").read_text())
    (path / "train_state.json").write_text(json.dumps(table | {"format_version": 2}))
    with pytest.raises(CheckpointError, match="has format version 2"):
        load(run, make_tensors(0))


def test_half_written_folder_is_ignored(run, make_tensors):
    save_checkpoint(run, STATE, make_tensors(0), recipe_id=RECIPE_ID)
    hidden = run.checkpoints / ".incomplete-step-00000009"
    hidden.mkdir()
    (hidden / "network.safetensors").write_bytes(b"half")
    assert load(run, make_tensors(0)).step == 3
    save_checkpoint(run, replace(STATE, step=10), make_tensors(0), recipe_id=RECIPE_ID)
    assert not hidden.exists()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["conv2.weight", "bn1.running_var"])
def test_non_finite_weights_are_never_saved(run, make_tensors, name, value):
    tensors = make_tensors(0)
    tensors.network.state_dict()[name][0] = value
    with pytest.raises(NonFiniteLossError, match=name):
        save_checkpoint(run, STATE, tensors, recipe_id=RECIPE_ID)
    assert run.checkpoint_steps() == []


@pytest.mark.parametrize("candidate", ["weights", "average"])
def test_selected_candidate_and_its_tensors(run, make_tensors, candidate):
    best = replace(BEST, candidate=candidate)
    tensors = make_tensors(0)
    save_checkpoint(run, replace(STATE, best=best), tensors, recipe_id=RECIPE_ID)
    save_checkpoint(run, replace(STATE, step=9, best=best), make_tensors(1), recipe_id=RECIPE_ID)
    assert selected_candidate(run) == best
    expected = tensors.network.state_dict() if candidate == "weights" else tensors.average
    assert_identical(load_candidate(run, best), copy.copy(dict(expected)))


def test_selected_candidate_needs_a_validation(run, make_tensors):
    save_checkpoint(run, replace(STATE, best=None), make_tensors(0), recipe_id=RECIPE_ID)
    with pytest.raises(CheckpointError, match="nothing was validated yet"):
        selected_candidate(run)


@pytest.mark.parametrize("num_bytes", [0, 200, 3000])
def test_full_disk_is_an_error_of_the_system_that_names_the_checkpoint(
    run, make_tensors, limited_files, num_bytes
):
    save_checkpoint(run, STATE, make_tensors(0), recipe_id=RECIPE_ID)
    with limited_files(num_bytes), pytest.raises(OSError, match="step-00000004") as caught:
        save_checkpoint(run, replace(STATE, step=4), make_tensors(0), recipe_id=RECIPE_ID)
    assert caught.value.strerror == "File too large"
    assert run.checkpoint_steps() == [3]
    assert load(run, make_tensors(5)) == STATE
