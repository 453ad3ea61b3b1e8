"""Run folders: what is refused, and that nothing is ever half-written."""

import pytest

from compressor.errors import RunError
from compressor.run_directory import (
    RunDirectory,
    folder_written_atomically,
    read_json,
    write_bytes_atomically,
    write_json_atomically,
    write_text_atomically,
)


def test_vacant_writes_nothing_and_make_makes_it(tmp_path):
    run = RunDirectory.vacant(tmp_path / "a" / "run")
    assert not run.path.exists()
    run.make()
    run.make()
    assert run.path.is_dir()


def test_vacant_accepts_an_empty_folder(tmp_path):
    assert RunDirectory.vacant(tmp_path).path == tmp_path


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_vacant_refuses_what_is_there(tmp_path, kind):
    path = tmp_path / "run"
    if kind == "folder":
        path.mkdir()
    (path if kind == "file" else path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="already exists and is not empty"):
        RunDirectory.vacant(path)


def test_make_explains_what_is_in_the_way(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be made"):
        RunDirectory(tmp_path / "file" / "run").make()


def test_open_needs_a_resolved_recipe(tmp_path):
    with pytest.raises(RunError, match="is not a run"):
        RunDirectory.open(tmp_path)
    write_json_atomically(RunDirectory(tmp_path).resolved_recipe, {})
    assert RunDirectory.open(tmp_path).path == tmp_path


def test_checkpoint_steps_are_the_complete_ones_in_order(tmp_path):
    run = RunDirectory(tmp_path)
    assert run.checkpoint_steps() == []
    for step in (352, 20, 100_000_001):
        run.checkpoint(step).mkdir(parents=True)
    (run.checkpoints / ".incomplete-step-00000400").mkdir()
    (run.checkpoints / "step-old").mkdir()
    assert run.checkpoint_steps() == [20, 352, 100_000_001]
    assert run.checkpoint(352).name == "step-00000352"


def test_every_name_lies_inside_the_run(tmp_path):
    run = RunDirectory(tmp_path)
    names = [name for name, value in vars(RunDirectory).items() if isinstance(value, property)]
    paths = [getattr(run, name) for name in names] + [run.onnx("fp32"), run.onnx_verification("x")]
    for files in (run.report(), run.report("100"), run.report("papers")):
        paths += [files.json, files.markdown, files.html, files.samples, files.journal(files.label)]
    assert len(set(paths)) == len(paths) > 10
    assert all(path.is_relative_to(tmp_path) for path in paths)


def test_report_files_carry_the_label(tmp_path):
    """And the verification that a release is decided on has none."""
    files = RunDirectory(tmp_path).report("100-seed1")
    paths = [files.json, files.markdown, files.html, files.samples]
    names = [path.name for path in paths]
    assert names == [f"report-100-seed1.{kind}" for kind in ("json", "md", "html")] + [
        "samples-100-seed1.csv"
    ]
    assert RunDirectory(tmp_path).report().json == tmp_path / "report.json"
    assert RunDirectory(tmp_path).report().samples == tmp_path / "samples.csv"


def test_lock_refuses_a_second_holder_and_ends(tmp_path):
    run = RunDirectory(tmp_path)
    with (
        run.locked(),
        pytest.raises(RunError, match="another process is training"),
        RunDirectory(tmp_path).locked(),
    ):
        pass
    with run.locked():
        pass


def test_files_are_replaced_as_a_whole(tmp_path):
    path = tmp_path / "deep" / "file"
    write_text_atomically(path, "é")
    assert path.read_bytes() == b"\xc3\xa9"
    write_bytes_atomically(path, b"second")
    assert path.read_bytes() == b"second"
    assert path.stat().st_mode & 0o777 == 0o644
    assert list(path.parent.iterdir()) == [path]


def test_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_text_atomically(path, "old")

    def fail(_):
        raise OSError("disk full")

    monkeypatch.setattr("compressor.device.kit_files.os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_text_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_json_round_trip_and_refusals(tmp_path):
    path = tmp_path / "value.json"
    write_json_atomically(path, {"a": [1, 0.1, None]})
    assert read_json(path) == {"a": [1, 0.1, None]}
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json_atomically(path, float("nan"))
    assert read_json(path) == {"a": [1, 0.1, None]}
    with pytest.raises(RunError, match="is missing from the run"):
        read_json(tmp_path / "other.json")
    path.write_text("{")
    with pytest.raises(RunError, match="cannot be read"):
        read_json(path)


def test_folder_appears_only_when_complete(tmp_path):
    target = tmp_path / "step-1"
    with folder_written_atomically(target) as folder:
        (folder / "a").write_text("1")
        assert not target.exists()
    assert (target / "a").read_text() == "1"


def interrupted_write(target):
    with folder_written_atomically(target) as folder:
        (folder / "a").write_text("new")
        raise KeyboardInterrupt


def test_interrupted_folder_leaves_the_old_one_and_is_cleared(tmp_path):
    target = tmp_path / "step-1"
    with folder_written_atomically(target) as folder:
        (folder / "a").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        interrupted_write(target)
    assert (target / "a").read_text() == "old"
    with folder_written_atomically(tmp_path / "step-2"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1", "step-2"]


def test_leftovers_of_a_run_that_never_began_are_no_run(tmp_path):
    """Killed between its first files and its recipe, a run can be started again."""
    run = RunDirectory(tmp_path)
    write_json_atomically(run.environment, {})
    write_json_atomically(run.facts, {})
    assert RunDirectory.vacant(tmp_path) == run
    write_json_atomically(run.resolved_recipe, {})
    with pytest.raises(RunError, match="not empty"):
        RunDirectory.vacant(tmp_path)
