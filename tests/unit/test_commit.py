"""The commit of a checkout: only its own, and whether the packages differ from it."""

import shutil
import subprocess

import pytest

from compressor.commit import find_commit

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
WHO = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")


def git(root, *arguments):
    command = ["git", "-C", str(root), *WHO, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path):
    (tmp_path / "compressor").mkdir()
    (tmp_path / "compressor" / "commit.py").write_text("first")
    (tmp_path / "notes.md").write_text("first")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    return tmp_path


def test_the_commit_and_whether_there_are_changes(checkout):
    commit = git(checkout, "rev-parse", "HEAD")
    assert find_commit(checkout) == commit
    (checkout / "notes.md").write_text("moves no number")
    assert find_commit(checkout) == commit
    for name in ("commit.py", "new.py"):
        (checkout / "compressor" / name).write_text("second")
        assert find_commit(checkout) == f"{commit}+changes"
        git(checkout, "stash", "-qu")


def test_where_a_hook_runs_us_the_commit_is_still_our_own(checkout, monkeypatch):
    commit = git(checkout, "rev-parse", "HEAD")
    monkeypatch.setenv("GIT_DIR", str(checkout / "elsewhere"))
    assert find_commit(checkout) == commit


def test_no_commit_where_it_is_not_known(checkout, monkeypatch):
    """Installed; beside a checkout of something else; before the first commit; without git."""
    assert find_commit(checkout / "compressor") is None
    git(checkout, "rm", "-q", "--cached", "compressor/commit.py")
    git(checkout, "commit", "-qm", "of something else")
    assert find_commit(checkout) is None
    (checkout / "empty").mkdir()
    git(checkout / "empty", "init", "-q")
    assert find_commit(checkout / "empty") is None
    git(checkout, "reset", "-q", "HEAD~")
    assert find_commit(checkout) is not None
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("something was run"))
    assert find_commit(checkout) is None
