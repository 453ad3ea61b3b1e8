"""Two methods with two seeds: killed, interrupted, gone on with, and never done twice."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from compressor import comparison_workflow, curves, verification_workflow
from compressor.comparison import progress
from compressor.comparison.folder import ComparisonFolder
from compressor.comparison.measuring import ImageCounts, find_measured
from compressor.comparison.passes import count_passes
from compressor.comparison.plan import make_plan
from compressor.comparison.request import Wishes, read_request, with_wishes
from compressor.comparison.result import METRICS, read_result
from compressor.comparison.runs import HowToRun
from compressor.comparison.training_record import TrainingRecord
from compressor.comparison_workflow import compare, prepare_comparison
from compressor.errors import CheckpointError, InterruptedRunError, RecipeError
from compressor.gate.paired import holm
from compressor.interruption import StopWish
from compressor.networks import NetworkSpec, build_classifier, save_classifier
from compressor.performance_settings import PerformanceSettings
from compressor.reports.report import read_report, write_report
from compressor.run_directory import RunDirectory, read_json
from compressor.threat import ThreatModel

BASE = """
name = "tiny"
[threat]
epsilon_pixels = "32/255"
[data]
source = "digits"
validation_size = 50
training_size = 400
crop_padding_pixels = 0
horizontal_flip = false
[student]
architecture = "tiny"
width = 0.5
[method]
name = "bmtard"
[method.attack]
num_steps = 1
step_size_pixels = "32/255"
[[teachers]]
role = "clean"
source = "{folder}/teacher.safetensors"
[[teachers]]
role = "robust"
source = "{folder}/teacher.safetensors"
[training]
epochs = 2
batch_size = 50
learning_rate = 0.05
[selection]
num_steps = 1
"""
FILE = """
seeds = 2
[base]
recipe = "base.toml"
[verification]
clean_samples = 40
samples = 12
cascade_samples = 3
[[methods]]
name = "bmtard"
[[methods]]
name = "trades"
"""
SETTINGS = PerformanceSettings(
    device="cpu", training_dtype="float32", num_threads=1, log_every_steps=1
)
ROOT = Path(__file__).parents[2]
PARTS = ("training", "clean", "white_box", "cascade")
RUNS = ("bmtard-seed0", "trades-seed0", "bmtard-seed1", "trades-seed1")
EVERYTHING = [(run, part) for run in RUNS for part in PARTS]


@contextmanager
def no_signals():
    yield StopWish()


def be_quick(patch):
    """Draw no pictures: they take longer than the rest, and other tests look at them."""
    patch.setattr(verification_workflow, "write_html", lambda *_, **__: None)
    patch.setattr(curves, "write_curves", lambda *_, **__: None)
    few = functools.partial(count_passes, num_moments=1)
    patch.setattr(comparison_workflow, "count_passes", few)
    # Told of every step, however fast they are, so that a test can stop between two.
    patch.setattr(progress, "_OBSERVE_EVERY_SECONDS", -1.0)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    be_quick(monkeypatch)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, one_thread):
    return make_inputs(tmp_path_factory.mktemp("compared"))


def make_inputs(folder):
    """Recipe, comparison file and an untrained teacher."""
    spec = NetworkSpec(architecture="tiny", num_classes=10, image_shape=(1, 8, 8))
    save_classifier(folder / "teacher.safetensors", build_classifier(spec, seed=1), spec, {})
    (folder / "base.toml").write_text(BASE.format(folder=folder))
    (folder / "file.toml").write_text(FILE)
    return folder


def prepared(
    folder,
    *,
    signals=no_signals,
    overrides=(),
    retry=False,
    accept=True,
    out="out",
    names=None,
    seeds=None,
):
    request = with_wishes(read_request(folder / "file.toml", names=names), Wishes(seeds=seeds))
    plan = make_plan(request, overrides=overrides)
    how = HowToRun(
        settings=SETTINGS, command="again", signals=signals, accept_teachers=accept, retry=retry
    )
    return prepare_comparison(plan, ComparisonFolder(folder / out), how)


def left(comparison):
    """(run, part) of everything that is not finished."""
    return [
        (work.planned.name, part)
        for work in comparison.work
        for part in sorted(work.seconds, key=PARTS.index)
    ]


def run(comparison, *, at=lambda event: None):
    """The result, and the parts that were begun for it."""
    seen = []

    def observe(event):
        if event.part and (event.run, event.part) not in seen:
            seen.append((event.run, event.part))
        at(event)

    return compare(comparison, observe=observe), seen


def compare_and_die(folder, *at):
    """In a process of its own: compare, and `kill -9` at the beginning of one part of one run."""

    def kill(event):
        if (event.run, event.part) == at:
            os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    be_quick(pytest.MonkeyPatch())
    run(prepared(Path(folder)), at=kill)


def in_a_process_that_is_killed(folder, *at):
    """A new one, never a fork: the test runner has threads, and would go on in the child."""
    call = f"from {__name__} import compare_and_die; compare_and_die{(str(folder), *at)}"
    done = subprocess.run([sys.executable, "-c", call], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


def files_of(folder, *, kinds=("model.safetensors", "report*.json", "clean.json")):
    out = folder / "out"
    return {p: p.stat().st_mtime_ns for kind in kinds for p in out.rglob(kind)}


@pytest.mark.workflow
def test_killed_interrupted_and_gone_on_with(folder):
    assert left(prepared(folder)) == EVERYTHING
    in_a_process_that_is_killed(folder, "trades-seed0", "cascade")
    after_kill = files_of(folder)

    wish = StopWish()

    @contextmanager
    def stopping():
        yield wish

    def stop(event):
        if event.part_fraction > 0.5 and (event.run, event.part) == ("bmtard-seed1", "training"):
            wish.signal_number = signal.SIGINT

    comparison = prepared(folder, signals=stopping)
    assert left(comparison) == EVERYTHING[EVERYTHING.index(("trades-seed0", "cascade")) :]
    with pytest.raises(InterruptedRunError, match=r"^bmtard-seed1: stopped after .*\n?.*again"):
        run(comparison, at=stop)
    partial = read_result(comparison.folder.result)
    assert [row.num_measured for row in partial.methods] == [1, 1]
    assert any("bmtard, seed 1: not run yet" in note for note in partial.notes)

    result, seen = run(prepared(folder))
    assert seen == EVERYTHING[EVERYTHING.index(("bmtard-seed1", "training")) :]
    now = files_of(folder)
    assert {path: now[path] for path in after_kill} == after_kill
    assert result == read_result(comparison.folder.result)
    again, seen = run(prepared(folder))
    assert (again, seen) == (result, [])
    assert files_of(folder) == now
    check_result(result)
    check_w_robust(result, folder)
    check_other_reports_are_not_taken(folder)
    check_weights_may_go(result, folder)
    check_what_was_kept_stays_better(result, folder)


def found_of(place, name, images):
    return find_measured(
        name,
        place,
        TrainingRecord.of(RunDirectory(place.run(name))),
        threat=ThreatModel(norm="linf", epsilon_pixels=32 / 255),
        images=images,
        test_sha256=read_json(place.clean(name))["content_sha256"],
    )


def check_w_robust(result, folder):
    """On the images of the cascade; the score takes its clean part from all clean images."""
    images = ImageCounts(clean=40, white_box=12, cascade=3)
    place = ComparisonFolder(folder / "out")

    def both(name):
        found = found_of(place, name, images)
        robust = found.cascade.worst_case.proportion.fraction
        on_cascade = found.cascade.clean.proportion.fraction
        return (on_cascade + robust) / 2, (found.clean.proportion.fraction + robust) / 2

    ours, theirs = both("trades-seed0"), both("bmtard-seed0")
    assert result.methods[1].pair("w_robust").differences[0] == pytest.approx(ours[0] - theirs[0])
    assert result.methods[1].score("w_robust").values[0] == pytest.approx(ours[1])


def check_other_reports_are_not_taken(folder):
    """Of a smaller radius, above all: its accuracy would flatter one method."""
    place = ComparisonFolder(folder / "out")
    images = ImageCounts(clean=40, white_box=12, cascade=3)
    for files in place.reports("trades-seed0"):
        sound = files.json.read_text()
        weaker = list(read_report(files.json).attacks)
        weaker[0] = weaker[0].model_copy(update={"parameters": {"num_steps": 1}})
        for change in (
            {"epsilon_pixels": 0.001},
            {"seed": 1},
            {"looks": "many"},
            {"attacks": tuple(weaker)},
        ):
            report = read_report(files.json).model_copy(update=change)
            write_report(report, files.json)
            found = found_of(place, "trades-seed0", images)
            assert None in [found.white_box, found.cascade], change
            files.json.write_text(sound)
    found = found_of(place, "trades-seed0", images)
    assert None not in [found.white_box, found.cascade]


def check_weights_may_go(result, folder):
    """What was measured is kept beside the weights, and is of this recipe and these files only."""
    shutil.copytree(folder / "out", folder / "kept", ignore=shutil.ignore_patterns("runs"))
    place, name = ComparisonFolder(folder / "kept"), "trades-seed0"
    again, seen = run(prepared(folder, out="kept"))
    assert (again, seen) == (result, [])
    anew = [(name, part) for part in PARTS]
    place.clean(name).unlink()
    assert left(prepared(folder, out="kept")) == [anew[0], anew[1]]
    shutil.copy(ComparisonFolder(folder / "out").clean(name), place.clean(name))
    record = read_json(place.training(name))
    others = record["made_from"] | {"training_content_sha256": "0" * 64}
    place.training(name).write_text(json.dumps(record | {"model_sha256": "0" * 64}))
    assert left(prepared(folder, out="kept")) == anew
    for change, said in (
        ({"recipe_id": "0"}, r"training\.json is of another recipe; choose another"),
        ({"made_from": others}, r"training\.json is of other training images or teachers"),
    ):
        place.training(name).write_text(json.dumps(record | change))
        with pytest.raises(CheckpointError, match=said):
            prepared(folder, out="kept")


def check_what_was_kept_stays_better(result, folder):
    """Without its checkpoints a run knows no longer which epoch was chosen, and why.

    What an earlier version did not keep comes from them, while they are there.
    """
    place, name = ComparisonFolder(folder / "out"), "trades-seed0"
    checkpoints, kept = RunDirectory(place.run(name)).checkpoints, place.training(name)
    shutil.move(checkpoints, folder / "checkpoints")
    again, _ = run(prepared(folder))
    assert again == result
    earlier = read_json(kept) | {"trained_on": "cpu, float32"}
    assert earlier.pop("validation")["num_images"] == 50
    kept.write_text(json.dumps(earlier))
    again, _ = run(prepared(folder))
    assert again.methods[1].runs[0].validation is None
    assert again.methods[1].runs[0].selected_epoch == result.methods[1].runs[0].selected_epoch
    assert not any("other software" in note for note in again.notes)
    shutil.move(folder / "checkpoints", checkpoints)
    again, seen = run(prepared(folder))
    assert (again, seen) == (result, [])


def check_result(result):
    bmtard, trades = result.methods
    assert [row.num_measured for row in result.methods] == [2, 2]
    assert {score.metric for score in bmtard.scores} == set(METRICS)
    assert [bmtard.score(m).num_images for m in METRICS] == [40, 12, 12, 12, 3, 3]
    assert [pair.metric for pair in trades.paired] == list(METRICS)
    assert not bmtard.paired
    corrected = holm([pair.p_value for pair in trades.paired])
    assert [pair.p_value_holm for pair in trades.paired] == pytest.approx(corrected)
    clean = [trades.score("clean").mean, bmtard.score("clean").mean]
    assert trades.pair("clean").mean == pytest.approx(clean[0] - clean[1])
    assert bmtard.passes.teacher_forwards == 2
    assert all(row.training_seconds > 0 for row in result.methods)
    assert {v.num_images for row in result.methods for v in row.validations} == {50}
    assert [len(row.validations) for row in result.methods] == [2, 2]
    assert str(result.protocol).count("/") == 0


@pytest.mark.workflow
def test_other_recipes_and_other_teachers_are_refused(folder):
    """Where there are runs."""
    run(prepared(folder))
    with pytest.raises(
        CheckpointError, match="of another recipe; choose another folder with --out"
    ):
        prepared(folder, overrides=["training.epochs=1"])
    content = (folder / "teacher.safetensors").read_bytes()
    spec = NetworkSpec(architecture="tiny", num_classes=10, image_shape=(1, 8, 8))
    save_classifier(folder / "teacher.safetensors", build_classifier(spec, seed=2), spec, {})
    try:
        with pytest.raises(CheckpointError, match=r"its teachers were .*another folder with --out"):
            prepared(folder)
    finally:
        (folder / "teacher.safetensors").write_bytes(content)
    assert left(prepared(folder)) == []


@pytest.mark.workflow
def test_a_narrower_call_says_what_it_leaves_out(folder):
    """Two seeds of two methods are measured, one of one is asked for."""
    run(prepared(folder))
    narrow, seen = run(prepared(folder, names="trades", seeds=1))
    (note,) = [note for note in narrow.notes if "not shown" in note]
    assert "not shown: bmtard seed 0 and 1, trades seed 1 (runs: 3, methods of which" in note
    page = ComparisonFolder(folder / "out").markdown
    assert "Measured in this folder and not shown" in page.read_text()
    whole, again = run(prepared(folder))
    assert (seen, again) == ([], [])
    assert not any("not shown" in note for note in whole.notes)
    assert "Measured in this folder and not shown" not in page.read_text()


@pytest.mark.workflow
@pytest.mark.parametrize(
    ("key", "other"), [("torch", "0.1"), ("processor", "another one"), ("commit", "f" * 12)]
)
def test_other_software_is_named(folder, key, other):
    """One report says that something else made it."""
    assert not any("other software" in note for note in run(prepared(folder))[0].notes)
    files = ComparisonFolder(folder / "out").reports("trades-seed0")[0]
    sound, report = files.json.read_text(), read_report(files.json)
    if key not in report.environment:
        pytest.skip(f"here a report has no {key}")
    environment = report.environment | {key: other}
    write_report(report.model_copy(update={"environment": environment}), files.json)
    try:
        (note,) = (note for note in run(prepared(folder))[0].notes if "other software" in note)
        assert note.startswith("Attacked on")
        assert f"{key} {other}" in note
        assert f"{key} {report.environment[key][:12]}" in note
    finally:
        files.json.write_text(sound)


@pytest.mark.workflow
def test_unfit_teachers_are_refused_before_anything_runs(folder):
    """All of them, by role and name; where nothing is left to train, nobody asks them."""
    with pytest.raises(RecipeError, match="nothing was run") as caught:
        prepared(folder, accept=False, out="unfit")
    for role in ("clean", "robust"):
        assert f"the {role} teacher" in str(caught.value)
    assert str(caught.value).count("--accept-teachers goes on") == 2
    assert not (folder / "unfit").exists()
    assert left(prepared(folder, accept=False)) == []
