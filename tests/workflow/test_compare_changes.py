"""A comparison whose training fails, and one whose test images are others the next time."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from compressor.comparison import measuring, runs
from compressor.comparison.measurements import CleanAnswers
from compressor.comparison.runs import find_failure
from compressor.errors import DataError
from compressor.reports.report import read_report
from tests.workflow.test_compare_workflow import (
    BASE,
    FILE,
    be_quick,
    left,
    make_inputs,
    prepared,
    run,
)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    be_quick(monkeypatch)


@pytest.mark.workflow
def test_a_last_batch_of_one_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(DataError, match="leave a last batch of 1, which BatchNorm"):
        prepared(make_inputs(tmp_path), overrides=["training.batch_size=57"])


def check_failure_ends_with_its_cause(comparison):
    """Teachers, training images, test images, version."""
    planned, materials = comparison.work[0].planned, comparison.materials
    place = comparison.folder
    assert find_failure(planned, place, materials) is not None
    others = dict.fromkeys(materials.teacher_sha256, "0" * 64)
    for change in ({"teacher_sha256": others}, {"training_sha256": "0"}, {"test_sha256": "0"}):
        assert find_failure(planned, place, dataclasses.replace(materials, **change)) is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "__version__", "0")
        assert find_failure(planned, place, materials) is None


@pytest.mark.workflow
def test_one_failure_does_not_stop_the_others(tmp_path):
    """With such a rate the loss of TRADES is soon no number, and that is its result."""
    make_inputs(tmp_path)
    few = FILE.replace("seeds = 2", "seeds = 1").replace("samples = 3", "samples = 0")
    (tmp_path / "file.toml").write_text(few)
    changes = {"overrides": ["training.learning_rate=1e30"]}
    result, seen = run(prepared(tmp_path, **changes))
    assert {row.runs[0].status for row in result.methods} == {"failed"}
    assert "not finite" in result.methods[1].runs[0].reason
    assert sum("failed" in note for note in result.notes) == 2
    assert [part for _, part in seen] == ["training"] * 2
    again = prepared(tmp_path, **changes)
    assert left(again) == []
    assert all("not finite" in work.failure for work in again.work)
    check_failure_ends_with_its_cause(again)
    assert ("trades-seed0", "training") in left(prepared(tmp_path, retry=True, **changes))


def write_images(folder, *, test_seed):
    """Two classes; the same training images whatever the seed of the test images is."""
    for part, seed, num in (("train", 0, 20), ("test", test_seed, 6)):
        draws = np.random.default_rng(seed)
        for name in ("dark", "light"):
            place = folder / part / name
            place.mkdir(parents=True)
            for number in range(num):
                lowest = 90 if name == "light" else 0
                pixels = draws.integers(lowest, lowest + 160, size=(8, 8), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{number}.png")


IMAGES = """
[base]
recipe = "base.toml"
set = ["teachers=[]", "data.validation_size=8", "data.training_size=32", "training.batch_size=8"]
[verification]
cascade_samples = 0
[[methods]]
name = "cross_entropy"
[[methods]]
name = "trades"
settings = { attack = { num_steps = 1, step_size_pixels = "32/255" } }
"""


@pytest.mark.workflow
def test_other_test_images_are_measured_anew_and_never_again(tmp_path):
    """Training images are the same, so weights stay; the results of other images do not count."""
    (tmp_path / "base.toml").write_text(BASE.format(folder=tmp_path))
    (tmp_path / "file.toml").write_text(IMAGES)
    for name, seed in (("first", 1), ("second", 2)):
        write_images(tmp_path / name, test_seed=seed)

    def on(name):
        return prepared(tmp_path, overrides=[f"data.source=imagefolder:{tmp_path / name}"])

    result, seen = run(on("first"))
    assert {part for _, part in seen} == {"training", "clean", "white_box"}
    second = on("second")
    assert {part for _, part in left(second)} == {"clean", "white_box"}
    other, _ = run(second)
    for name in ("cross_entropy-seed0", "trades-seed0"):
        reports = [read_report(files.json) for files in second.folder.reports(name)]
        assert second.materials.test_sha256 in {report.data.content_sha256 for report in reports}
    assert left(on("second")) == []
    assert [row.runs for row in other.methods] == [row.runs for row in result.methods]
    (tmp_path / "second").rename(tmp_path / "moved")
    second.folder.clean("trades-seed0").unlink()
    again, seen = run(on("moved"))
    assert seen == [("trades-seed0", "clean")]
    assert again == other
    check_images_that_change_meanwhile_are_refused(on("moved"))


def check_images_that_change_meanwhile_are_refused(comparison):
    """At the first part, and at the second where the first was done before they changed."""
    meant = dataclasses.replace(comparison.materials, test_sha256="0" * 64)
    changed, parts = dataclasses.replace(comparison, materials=meant), []
    with pytest.raises(DataError, match="the test images changed while they were measured on"):
        run(changed, at=lambda event: parts.append(event.part))
    assert set(parts) == {"clean"}
    before = CleanAnswers(model_sha256="1", content_sha256="0" * 64, index=(0,), is_correct=(True,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "_answer", lambda *_, **__: before)
        with pytest.raises(DataError, match="the test images changed"):
            run(changed)
