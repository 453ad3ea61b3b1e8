"""The commit that this package was read from, where it lies in a git checkout."""

import functools
import os
import shutil
import subprocess
from pathlib import Path

_ROOT = Path(__file__).parents[1]
_MOVES_NUMBERS = ("compressor", "exporters")
_TIMEOUT_SECONDS = 10.0


@functools.cache
def commit_of_checkout() -> str | None:
    """The commit in hexadecimal digits, then `+changes` where the packages differ from it.

    Asked for once: what a process has read stays, whatever becomes of the files. None where the
    package is installed, where git is not, or where git does not answer.
    """
    return find_commit(_ROOT)


def find_commit(root: Path) -> str | None:
    """As `commit_of_checkout`, of the packages in `root`; files of no commit are changes."""
    git = shutil.which("git")
    if git is None or not (root / ".git").exists():
        return None
    try:
        # That the file is in the commit says that the checkout is ours, not one around it.
        commit, _ = _ask(git, root, "rev-parse", "HEAD", "HEAD:compressor/commit.py").split()
        packages = [name for name in _MOVES_NUMBERS if (root / name).is_dir()]
        changes = _ask(git, root, "status", "--porcelain", "--", *packages)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return f"{commit}+changes" if changes else commit


def _ask(git: str, root: Path, *arguments: str) -> str:
    """Of this very checkout, also where a hook of another one runs us; without a lock."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    return subprocess.run(
        [git, "--no-optional-locks", "-C", str(root), *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=_TIMEOUT_SECONDS,
        env=environment,
    ).stdout
