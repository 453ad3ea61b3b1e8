"""Folders are there as a whole or not at all: killed anywhere, written at once, on a full disk."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from compressor import atomic_folder, run_directory
from compressor.device import kit_files
from compressor.errors import RunError
from compressor.run_directory import folder_written_atomically

TOKEN = "0123456789abcdef"


def write(target, text):
    with folder_written_atomically(target) as folder:
        (folder / "a").write_text(text)
        (folder / "b").mkdir()
        (folder / "b/c").write_text(text)


def contents(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# Processes that are killed

KILLED = """
import json, os, sys
from pathlib import Path
from compressor.atomic_folder import folder_written_atomically

def write(text):
    with folder_written_atomically(target) as folder:
        for name in "abc":
            (folder / name).write_text(text)

def die_at(number):
    passed = 0
    def hook(event, _):
        nonlocal passed
        if event.split(".")[0] in ("os", "open", "shutil", "fcntl", "tempfile"):
            passed += 1
            if passed == number:
                os.kill(os.getpid(), 9)
    sys.addaudithook(hook)

def state():
    texts = [path.read_text() for path in target.iterdir()]
    return "".join(sorted(set(texts))), len(texts)

found = []
for number in range(1, 500):
    target = Path(sys.argv[1]) / str(number) / "target"
    write("1")
    child = os.fork()
    if not child:
        die_at(number)
        write("2")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    at_death = state() if target.is_dir() else None
    try:
        with folder_written_atomically(target):
            later = state()
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    found.append((os.WIFSIGNALED(status), at_death, later, os.listdir(target.parent)))
    if not os.WIFSIGNALED(status):
        break
print(json.dumps(found))
"""


def test_a_process_killed_at_any_moment_loses_nothing(tmp_path):
    """Before each call that changes or reads a folder: the old one or the new one is there, and
    after the next call under its own name and alone."""
    root = str(Path(atomic_folder.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": root},
    )
    assert done.returncode == 0, done.stderr
    *killed, last = json.loads(done.stdout)
    assert last == [False, ["2", 3], ["2", 3], ["target"]]
    assert len(killed) > 15
    assert all(was_killed for was_killed, *_ in killed)
    assert {str(at_death) for _, at_death, *_ in killed} == {"['1', 3]", "['2', 3]", "None"}
    assert {tuple(later) for _, _, later, _ in killed} == {("1", 3), ("2", 3)}
    assert {tuple(beside) for *_, beside in killed} == {("target",)}


# Several at once


def test_what_another_process_is_writing_is_left_alone(tmp_path):
    """Two locks of one process exclude each other as those of two do."""
    with folder_written_atomically(tmp_path / "one") as one:
        (one / "a").write_text("one")
        write(tmp_path / "other", "other")
        write(tmp_path / "one", "earlier")
        assert (one / "a").read_text() == "one"
    assert names(tmp_path) == ["one", "other"]
    assert contents(tmp_path / "one") == {"a"}


def test_what_is_nested_is_written_first(tmp_path):
    with folder_written_atomically(tmp_path / "outer") as outer:
        write(outer / "inner", "x")
    assert contents(tmp_path / "outer") == {"inner/a", "inner/b/c"}


def test_a_folder_taken_for_left_behind_before_its_lock_is_made_anew(tmp_path, monkeypatch):
    real, made = os.open, []

    def cleared(path, flags):
        made.append(Path(path))
        if len(made) == 1:
            made[0].rmdir()
        handle = real(path, flags)
        if len(made) == 2:
            made[1].rmdir()
        return handle

    monkeypatch.setattr(atomic_folder.os, "open", cleared)
    folder, handle = atomic_folder._new_folder(tmp_path / "target")
    os.close(handle)
    assert folder.is_dir()
    assert len(set(made)) == 3


def test_the_loser_of_two_at_the_same_moment_is_told(tmp_path, monkeypatch):
    write(tmp_path / "target", "1")
    real = Path.rename

    def rename(self, target):
        if self.name.startswith(".incomplete"):
            real(self.with_name("of another process"), target)
        return real(self, target)

    write(tmp_path / "of another process", "2")
    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(RunError, match="another process has just written .*target; run it again"):
        write(tmp_path / "target", "3")
    monkeypatch.undo()
    assert (tmp_path / "target/a").read_text() == "2"
    write(tmp_path / "target", "4")
    assert names(tmp_path) == ["target"]


# What is left behind, and what is not


@pytest.mark.parametrize(
    "name",
    [
        ".incomplete-notes",
        ".incomplete-target",
        f".incomplete-other.{TOKEN}",
        f".incomplete-target.{TOKEN}0",
        f".incomplete-my-target.{TOKEN}",
        f".replaced-other.{TOKEN}",
    ],
)
def test_folders_of_others_are_never_touched(name, tmp_path):
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine").write_text("mine")
    write(tmp_path / "target", "1")
    assert (tmp_path / name / "mine").read_text() == "mine"


def test_what_a_dead_process_left_of_this_folder_is_removed(tmp_path):
    for kind in ("incomplete", "replaced"):
        (tmp_path / f".{kind}-target.{TOKEN}").mkdir()
    (tmp_path / "target").mkdir()
    write(tmp_path / "target", "1")
    assert names(tmp_path) == ["target"]


def test_without_locks_nothing_is_taken_for_left_behind(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(atomic_folder.fcntl, "flock", flock)
    (tmp_path / f".incomplete-target.{TOKEN}").mkdir()
    write(tmp_path / "target", "1")
    write(tmp_path / "target", "2")
    assert (tmp_path / "target/a").read_text() == "2"
    assert names(tmp_path) == [f".incomplete-target.{TOKEN}", "target"]


def test_a_link_is_replaced_and_not_followed(tmp_path):
    write(tmp_path / "there", "1")
    (tmp_path / "target").symlink_to("there")
    write(tmp_path / "target", "2")
    assert (tmp_path / "there/a").read_text() == "1"
    assert not (tmp_path / "target").is_symlink()
    assert names(tmp_path) == ["target", "there"]


# Errors of the system


def test_the_old_folder_is_put_back_where_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    write(tmp_path / "target", "1")
    real = Path.rename

    def rename(self, target):
        if self.name.startswith(".incomplete"):
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(PermissionError, match="Permission denied") as caught:
        write(tmp_path / "target", "2")
    assert caught.value.filename == str(tmp_path / "target")
    assert (tmp_path / "target/a").read_text() == "1"
    assert names(tmp_path) == ["target"]


def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def failing(target, error):
    with folder_written_atomically(target) as folder:
        if isinstance(error.filename, str):
            error.filename = error.filename.format(folder=folder)
        raise error


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "target"),
        (OSError(errno.EROFS, "Read-only file system", "{folder}/b/c"), "target/b/c"),
        (OSError(errno.EMFILE, "Too many open files", 7), "target"),
        (PermissionError(errno.EACCES, "Permission denied", "elsewhere"), None),
    ],
    ids=["nothing", "a hidden file", "a handle", "another file"],
)
def test_errors_name_what_the_user_knows(error, named, tmp_path):
    with pytest.raises(type(error), match=error.strerror) as caught:
        failing(tmp_path / "target", error)
    assert caught.value.errno == error.errno
    assert caught.value.filename == (str(tmp_path / named) if named else "elsewhere")
    assert names(tmp_path) == []


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(kit_files.os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left on device") as caught:
        run_directory.write_json_atomically(tmp_path / "bench.json", {})
    assert caught.value.filename == str(tmp_path / "bench.json")
    assert names(tmp_path) == []
