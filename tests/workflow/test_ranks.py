"""The number of processes is a matter of speed: the same losses, weights and counts on one and two.

This file is also the script of the processes.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file

from cli.output import print_error
from compressor.architectures.shared_batch_norm import share_batch_norm
from compressor.architectures.teacher_map import add_teacher_map
from compressor.checkpoint import TrainState
from compressor.data import Batch, Shard
from compressor.errors import (
    CheckpointError,
    DataError,
    InterruptedRunError,
    LostProcessError,
    RecipeError,
    RunError,
)
from compressor.methods.build import build_method
from compressor.methods.protocol import Moment
from compressor.networks import NetworkSpec, build_classifier
from compressor.performance import Performance
from compressor.performance_settings import PerformanceSettings
from compressor.ranks import Ranks, joined_ranks
from compressor.ranks_limits import refuse_on_ranks
from compressor.recipe_file import load_recipe, parse_recipe
from compressor.run_directory import RunDirectory, read_facts
from compressor.run_facts import refuse_changed_facts
from compressor.student import Student
from compressor.teacher import Teacher
from compressor.training_workflow import TrainingRequest, refuse_unlike_beginnings, train
from compressor.verification.journal import Journal
from compressor.verification.request import VerificationRequest, prepare
from compressor.verification.samples import write_csv
from compressor.verification.verification import attack_chunks
from compressor.verification_workflow import verify

ROOT = Path(__file__).parents[2]
SPEC = NetworkSpec(architecture="tiny", num_classes=10, image_shape=(1, 8, 8), width=0.5)
NUMS_IMAGES = (7, 7, 1)
"""Of the batches: one that does not divide, and one of which the first of two has nothing."""
BOTH = ("clean", "robust")
METHODS = {
    "adaad": ("robust",),
    "ard": ("robust",),
    "bmtard": (*BOTH, "robust"),
    "ciard": BOTH,
    "cross_entropy": (),
    "darht": BOTH,
    "distillation": ("clean",),
    "iad": ("robust",),
    "mtard": BOTH,
    "pgd_at": (),
    "rc": BOTH,
    "rslad": ("robust",),
    "trades": (),
}
WITHOUT_ATTACK = ("cross_entropy", "distillation")
AT_ONCE = {
    "ciard": {"teacher_from_fraction": 0.0, "teacher_learning_rate": 0.05},
    "darht": {"adversarial_share": 0.7, "distil_from": 0.0, "labels_until": 0.0},
    "iad": {"begin_fraction": 0.0},
}


# The part of the script ------------------------------------------------------------------------


def recipe_of(name):
    attack = (
        {} if name in WITHOUT_ATTACK else {"attack": {"num_steps": 2, "step_size_pixels": "8/255"}}
    )
    return parse_recipe(
        {
            "name": name,
            "threat": {"epsilon_pixels": "16/255"},
            "data": {"source": "digits", "validation_size": 100},
            "student": {"architecture": "tiny"},
            "teachers": [{"role": role, "source": role} for role in METHODS[name]],
            "method": {"name": name, **attack, **AT_ONCE.get(name, {})},
        },
        origin="the test",
    )


def make_teacher(role, seed):
    network = build_classifier(SPEC, seed=seed).double()
    with torch.no_grad():
        network.backbone.fc.weight.mul_(10 * seed)  # surer than a network at random
    facts = {"spec": SPEC, "num_parameters": 1, "num_classes": 10, "sha256": "", "num_bytes": 0}
    return Teacher(name=role, role=role, answer=network, network=network, **facts)


def batch_of(step, ranks):
    """This rank's part of a batch."""
    num_images = NUMS_IMAGES[step]
    images = torch.rand(
        num_images, 1, 8, 8, generator=torch.Generator().manual_seed(step), dtype=torch.float64
    )
    ids = torch.arange(num_images)
    keys = 1000 * ids + 77 * step + 5
    own = ranks.part(num_images)
    shard = Shard(ranks=ranks, num_images=num_images, key=keys[:1])
    return Batch(
        x_NCHW=images[own],
        y_N=(3 * ids + step)[own] % 10,
        index_N=ids[own],
        keys_N=keys[own],
        shard=shard if ranks.num_ranks > 1 else None,
    )


def take_steps(name, ranks):
    """What was logged in some steps of SGD, and the weights, statistics and copies after them."""
    recipe, threat = recipe_of(name), recipe_of(name).threat.build()
    teachers = [make_teacher(role, seed) for seed, role in enumerate(METHODS[name], 1)]
    method = build_method(recipe.method, threat=threat, teachers=teachers, num_steps=100)
    network = build_classifier(SPEC, seed=9)
    if recipe.method.has_teacher_map:
        add_teacher_map(network, num_classes=10, num_teachers=len(teachers), seed=0)
    if ranks.num_ranks > 1:
        share_batch_norm(network, ranks)
    student = Student(network.double(), Performance(device=torch.device("cpu"), ranks=ranks))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    state, rows = method.initial_state(), []
    for step in range(len(NUMS_IMAGES)):
        moment = Moment(fraction=0.2 + 0.1 * step)
        result, state = method.step(student, batch_of(step, ranks), state, moment)
        optimizer.zero_grad(set_to_none=True)
        result.loss.backward()
        ranks.sum_gradients(network.parameters())
        optimizer.step()
        rows.append(dict(result.logged))
    kept = {**network.state_dict(), **method.tensors()}
    sums = {n: [float(t.double().sum()), float(t.double().norm())] for n, t in kept.items()}
    return {"rows": rows, "sums": sums}


def main():
    torch.set_num_threads(1)
    with joined_ranks(torch.device("cpu"), purpose="test") as ranks:
        found = {name: take_steps(name, ranks) for name in METHODS}
        agreed = [ranks.largest(ranks.rank), ranks.sum_in_place(torch.ones(2)).tolist()]
        group = weakref.ref(torch.distributed.group.WORLD)
    told = json.dumps([found, agreed, group() is None])
    Path(sys.argv[1]).joinpath(f"{ranks.rank}.json").write_text(told)


# The part of the tests -------------------------------------------------------------------------


def environment(rank=None, *, num_ranks=2, port=0):
    own = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if rank is None:
        return own
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": 2}
    own |= {name: str(value) for name, value in place.items()}
    return own | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def made_once(tmp_path_factory, name, make):
    """A folder that `make` fills for all workers of the tests."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with FileLock(f"{folder}.lock"):
        if not (folder / "made").exists():
            folder.mkdir()
            make(folder)
            (folder / "made").touch()
    return folder


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    """What each of two processes found."""
    folder = made_once(tmp_path_factory, "ranks-found", find_with_two)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def find_with_two(folder):
    port = free_port()
    processes = [
        subprocess.Popen([sys.executable, __file__, folder], env=environment(rank, port=port))
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]


@pytest.mark.workflow
@pytest.mark.parametrize("name", METHODS)
def test_two_processes_learn_what_one_learns(name, of_two):
    """In float64, so that nothing but the arithmetic is left."""
    first, second = (found[name] for found, *_ in of_two)
    assert first == second  # to the last bit
    alone = json.loads(json.dumps(take_steps(name, Ranks())))
    for ours, theirs in zip(first["rows"], alone["rows"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-12)
    for tensor, sums in alone["sums"].items():
        assert first["sums"][tensor] == pytest.approx(sums, rel=1e-8, abs=1e-10), tensor


@pytest.mark.workflow
def test_ranks_agree(of_two):
    assert [agreed for _, agreed, _ in of_two] == [[1, [2.0, 2.0]]] * 2


@pytest.mark.workflow
def test_no_thread_of_the_group_is_left(of_two):
    """One that ends its work while the interpreter ends aborts a process that is done."""
    assert [is_freed for _, _, is_freed in of_two] == [True, True]


@pytest.mark.parametrize(("num_items", "num_ranks"), [(0, 3), (1, 3), (7, 2), (128, 3)])
def test_parts_are_all_and_even(num_items, num_ranks):
    parts = [
        list(range(num_items))[Ranks(rank=rank, num_ranks=num_ranks).part(num_items)]
        for rank in range(num_ranks)
    ]
    assert sum(parts, []) == list(range(num_items))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("ciard", {"teacher_statistics": "batch"}, "teacher_statistics"),
        ("darht", {"teacher_mode": "dropout"}, "teacher_mode"),
    ],
)
def test_what_takes_whole_batches_is_refused(name, settings, message):
    recipe = recipe_of(name)
    method = recipe.method.model_copy(update=settings)
    recipe = recipe.model_copy(update={"method": method})
    refuse_on_ranks(recipe, num_ranks=1)
    with pytest.raises(RecipeError, match=message):
        refuse_on_ranks(recipe, num_ranks=2)


RECIPE = """
name = "ranks"
[threat]
epsilon_pixels = "16/255"
[data]
source = "digits"
validation_size = 101
[student]
architecture = "tiny"
[method]
name = "pgd_at"
[method.attack]
num_steps = 1
step_size_pixels = "16/255"
[training]
epochs = 4
batch_size = 101
learning_rate = 0.05
[selection]
num_steps = 1
"""
COMMAND = (sys.executable, "-m", "cli.main", "distill")
OPTIONS = ("--dtype", "float32", "--no-verify", "--no-export", "--checkpoint-minutes", "0.01")


def start(folder, *options, command=COMMAND):
    """In a group of its own, as a shell starts it, so that Ctrl-C reaches all processes."""
    return subprocess.Popen(
        [*command, "recipe.toml", *OPTIONS, *options],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def ended(process):
    out, _ = process.communicate(timeout=180)
    return process.returncode, out


def children_of(pid):
    listed = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(pid)], stdout=subprocess.PIPE, text=True
    )
    return [int(word) for word in listed.stdout.split()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With a run that nothing disturbed; trained once, and copied for each worker of the tests."""
    shared = made_once(tmp_path_factory, "ranks-trained", train_with_two)
    return shutil.copytree(shared, tmp_path_factory.mktemp("runs") / "copy")


def train_with_two(folder):
    (folder / "recipe.toml").write_text(RECIPE)
    assert ended(start(folder, "--out", "undisturbed", "--nproc", "2"))[0] == 0


def wait_for(condition, process):
    until = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, ended(process)
        assert time.monotonic() < until
        time.sleep(0.01)


def checkpoints_of(run):
    return sorted(path.name for path in (run / "checkpoints").glob("step-*"))


@pytest.mark.workflow
def test_a_killed_process_brings_the_run_back_from_its_checkpoint(folder):
    run = folder / "killed"
    process = start(folder, "--out", "killed", "--nproc", "2")
    wait_for(lambda: len(checkpoints_of(run)) > 1, process)
    (loader,) = [pid for pid in children_of(process.pid) if "forkserver" in command_of(pid)]
    os.kill(children_of(loader)[-1], signal.SIGKILL)
    code, out = ended(process)
    assert code == 0, out
    last = Path("checkpoints", checkpoints_of(run)[-1])
    for name in ("model.safetensors", last / "network.safetensors", last / "momentum.safetensors"):
        undisturbed = (folder / "undisturbed" / name).read_bytes()
        assert (run / name).read_bytes() == undisturbed, name


@pytest.mark.workflow
def test_torchrun_goes_on_with_what_it_began(folder):
    run = folder / "launched"
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2")
    command = (*torchrun, "--max-restarts=1", *COMMAND[1:])
    process = start(folder, "--out", "launched", command=command)
    wait_for(lambda: len(checkpoints_of(run)) > 1, process)
    os.kill(children_of(process.pid)[-1], signal.SIGKILL)
    code, out = ended(process)
    assert code == 0, out
    undisturbed = (folder / "undisturbed" / "model.safetensors").read_bytes()
    assert (run / "model.safetensors").read_bytes() == undisturbed


@pytest.mark.workflow
def test_an_error_of_one_process_ends_all_and_is_told(folder):
    """Here the first one's; the other waits for it in vain."""
    run = folder / "held"
    run.mkdir()
    with RunDirectory(run).locked():
        code, out = ended(start(folder, "--out", "held", "--nproc", "2"))
    assert code == 4, out
    assert out.count("another process is training or exporting in held") == 1


def test_the_others_speak_after_the_first(monkeypatch, capsys):
    """Who has said it ends the rest meanwhile."""
    waited = []
    monkeypatch.setattr("time.sleep", waited.append)
    monkeypatch.setenv("RANK", "1")
    print_error(DataError("image 17 is damaged"), as_json=False)
    assert capsys.readouterr().err == "Error in process 1: image 17 is damaged\n"
    print_error(InterruptedRunError("all agreed"), as_json=False)
    assert capsys.readouterr().err == ""
    assert len(waited) == 1
    monkeypatch.setenv("RANK", "0")
    print_error(DataError("image 3 is damaged"), as_json=False)
    assert len(waited) == 1
    print_error(LostProcessError("it has ended"), as_json=False)
    assert waited[1] > waited[0]


def test_unlike_beginnings_are_refused(tmp_path):
    """The second process saw an older checkpoint."""

    def gather(own):
        return [(own[0] + 10, "other weights"), own]

    ranks = SimpleNamespace(num_ranks=2, gather=gather)
    network = build_classifier(SPEC, seed=0)
    training = SimpleNamespace(ranks=ranks, student=SimpleNamespace(network=network))
    state = TrainState(step=20, epoch=1, batch_in_epoch=0, method_state=None)
    with pytest.raises(RunError, match=r"process 1 .* \(step 20\) than the first one \(step 30\)"):
        refuse_unlike_beginnings(training, state)


ALIKE = """
name = "alike"
[data]
source = "digits"
validation_size = 101
[student]
architecture = "tiny"
[method]
name = "cross_entropy"
[training]
epochs = 1
batch_size = 101
learning_rate = 0.05
gradient_clip_norm = 0.5
[selection]
num_steps = 1
"""


def train_alone(run, *, resume=False):
    """In this process, which has loaded everything: it stands for one that was started anew."""
    recipe = run.parent / "recipe.toml"
    settings = PerformanceSettings(device="cpu", training_dtype="float32", num_threads=1)
    train(load_recipe(recipe), TrainingRequest(out=run, settings=settings, resume=resume))


def last_of(run):
    """Weights after the last step, and what was counted on held-out images."""
    newest = run / "checkpoints" / checkpoints_of(run)[-1]
    best = json.loads((newest / "train_state.json").read_text())["best"]
    return load_file(newest / "network.safetensors"), best


LOADING = """
import importlib, torch
from unittest.mock import patch
from cli.processes import LOADED_ONCE

ways = "torch._C._cuda_getDeviceCount", "torch.cuda._device_count_nvml", "torch.cuda._lazy_init"
asked = [patch(way).start() for way in ways]
for name in LOADED_ONCE:
    importlib.import_module(name)
assert not any(way.called for way in asked), asked
"""


def test_what_is_loaded_once_asks_for_no_gpu():
    """A fork of a process that has asked for one can use none; also where there is none."""
    subprocess.run([sys.executable, "-c", LOADING], env=environment(), check=True)


@pytest.mark.workflow
def test_the_trainer_learns_on_two_what_it_learns_on_one(tmp_path):
    """Without an attack, so that rounding in float32 turns no sign."""
    (tmp_path / "recipe.toml").write_text(ALIKE)
    train_alone(tmp_path / "one")
    code, out = ended(start(tmp_path, "--out", "two", "--nproc", "2"))
    assert code == 0, out
    (one, best_of_one), (two, best_of_two) = (last_of(tmp_path / n) for n in ("one", "two"))
    for name, expected in one.items():
        torch.testing.assert_close(two[name], expected, rtol=1e-3, atol=1e-4, msg=name)
    assert abs(best_of_two["clean_correct"] - best_of_one["clean_correct"]) <= 1


def command_of(pid):
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()


@pytest.mark.workflow
def test_an_interruption_is_one_for_all_and_another_number_goes_on(folder):
    run = folder / "stopped"
    process = start(folder, "--out", "stopped", "--nproc", "2")
    wait_for(lambda: len(checkpoints_of(run)) > 1, process)
    os.killpg(process.pid, signal.SIGINT)
    code, out = ended(process)
    assert code == 130, out
    assert out.count("everything is saved") == 1
    assert "robust-compress distill stopped --resume" in out
    assert "--nproc 2" in out
    train_alone(run, resume=True)
    first, last = (json.loads(line) for line in metrics_of(run, [0, -1]))
    assert (first["step"], last["epoch"]) == (1, 4)


def metrics_of(run, places):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [lines[place] for place in places]


def test_own_images_want_the_same_number_of_processes(folder):
    """Else their number is a matter of speed, and not even noted."""
    run = RunDirectory(folder / "undisturbed")
    facts = read_facts(run)
    assert "num_processes" not in facts
    refuse_changed_facts(run, facts)
    with pytest.raises(CheckpointError, match="with 2 processes: .* began with None; .* --nproc"):
        refuse_changed_facts(run, facts | {"num_processes": 2})


def request_of(run, *attacks, batch_size):
    """The same as of the command line, but for the number of processes."""
    return VerificationRequest(
        target=str(run),
        settings=PerformanceSettings(device="cpu", num_threads=1),
        attacks=attacks,
        num_images=50,
        batch_size=batch_size,
    )


@pytest.mark.workflow
def test_verification_finds_the_same_of_every_image(folder):
    """Three and two chunks; the second process has fewer of them."""
    options = ["--attacks", "pgd_sat,apgd_ce", "--samples", "50", "--batch-size", "10"]
    command = [*COMMAND[:-1], "verify", "undisturbed", *options, "--nproc", "2"]
    done = subprocess.run(
        command, cwd=folder, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("VERIFIED") == 1
    prepared = prepare(request_of(folder / "undisturbed", "pgd_sat", "apgd_ce", batch_size=10))
    journal = Journal.in_memory()
    with prepared.subject() as subject:
        *_, found = attack_chunks(subject, prepared.split, prepared.plan, journal=journal)
    alone = folder / "alone.csv"
    write_csv(alone, found.samples, [stage.name for stage in prepared.stages])
    assert alone.read_text() == prepared.files.samples.read_text()


@pytest.mark.workflow
def test_no_process_loses_what_it_has_finished(folder):
    """Each has one chunk; in the middle of it they lose who launched them, and end too."""
    options = ["--attacks", "apgd_ce,square", "--samples", "50", "--batch-size", "25"]
    command = [*COMMAND[:-1], "verify", "undisturbed", *options, "--nproc", "2"]
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )

    def journals():
        return sorted((folder / "undisturbed").glob(".verification-*.jsonl"))

    wait_for(lambda: len(journals()) == 2 and all(map(has_outcomes, journals())), process)
    os.kill(process.pid, signal.SIGKILL)
    _, out = ended(process)  # as soon as no one can print any more
    assert "interrupted; what is finished is kept" in out
    kept = {outcome for path in journals() for outcome in outcomes_of(path)}
    assert {chunk for chunk, _ in kept} == {0, 1}
    report, _ = verify(request_of(folder / "undisturbed", "apgd_ce", "square", batch_size=25))
    assert report.status == "verified"
    assert journals() == []


def has_outcomes(path):
    return len(outcomes_of(path)) > 0


def outcomes_of(path):
    lines = path.read_text().splitlines()[1:]
    complete = [json.loads(line) for line in lines if line.endswith("}")]
    return [(row["chunk"], row["stage"]) for row in complete]


if __name__ == "__main__":
    main()
