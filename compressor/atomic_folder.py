"""folder_written_atomically: a folder that is there as a whole or not at all, whatever is killed.

While NAME is written, hidden folders lie beside it, each of one process alone::

    .incomplete-NAME.0123456789abcdef   what will be NAME
    .replaced-NAME.0123456789abcdef     what was NAME, between two renames and until it is removed

Whoever writes holds a lock on them, and the system lets go when that process ends, in whatever way.
So a folder of such a name that can be locked is of a process that is gone. Where a file system
knows no locks, nothing is ever taken for left behind.
"""

import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from compressor.errors import RunError


@contextmanager
def folder_written_atomically(path: Path, *, leftovers: str | None = None) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends well, and is removed otherwise.

    A process killed at any moment leaves the old folder or the new one, if perhaps under a hidden
    name, and the next call for the same path puts this right.

    Args:
        path: is made, or replaced.
        leftovers: a regular expression for the hidden folders of dead processes to remove besides
            those of `path`.

    Raises:
        RunError: if another process wrote `path` at the very same moment.
        OSError: that of the file that could not be written, as its place is in `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _put_right(path, leftovers)
    with failures_named(path):
        folder, lock = _new_folder(path)
    try:
        with failures_named(path, instead_of=folder):
            yield folder
            for inside in folder.rglob("*"):
                _sync(inside)
            _sync(folder)
            _swap(folder, path)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        os.close(lock)


@contextmanager
def failures_named(path: Path, *, instead_of: Path | None = None) -> Iterator[None]:
    """An error of the system names `path`: a full disk names nothing, other errors hidden files.

    Args:
        path: what the block writes.
        instead_of: the folder in which it does so; errors in other places stay as they are.
    """
    try:
        yield
    except OSError as error:
        place = _place(error, path, instead_of)
        if error.errno is None or place is None:
            raise
        raise OSError(error.errno, error.strerror, str(place)) from None


def _place(error: OSError, path: Path, instead_of: Path | None) -> Path | None:
    """None: elsewhere."""
    if instead_of is None or not isinstance(error.filename, str | os.PathLike):
        return path
    named = Path(error.filename)
    return path / named.relative_to(instead_of) if named.is_relative_to(instead_of) else None


def _hidden(path: Path, kind: str) -> Path:
    return path.parent / f".{kind}-{path.name}.{secrets.token_hex(8)}"


def _new_folder(path: Path) -> tuple[Path, int]:
    """An empty folder and the handle that locks it.

    Between its making and its lock another process may take it for left behind; then it is gone.
    """
    while True:
        folder = _hidden(path, "incomplete")
        folder.mkdir()
        with suppress(FileNotFoundError):
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            if _try_lock(handle) is not False and folder.exists():
                return folder, handle
            os.close(handle)


def _try_lock(handle: int) -> bool | None:
    """Whether it is ours now; None: the file system knows no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _locked(folder: Path) -> int | None:
    """The handle of a folder that no other process holds; None: it is held, or is no folder."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None
    if _try_lock(handle):
        return handle
    os.close(handle)
    return None


def _put_right(path: Path, leftovers: str | None) -> None:
    """Put back what a killed process had set aside, and remove what it left behind."""
    own = re.compile(rf"\.(incomplete|replaced)-{re.escape(path.name)}\.[0-9a-f]{{16}}")
    for hidden in sorted(path.parent.iterdir()):
        match = own.fullmatch(hidden.name)
        if not match and not (leftovers and re.fullmatch(leftovers, hidden.name)):
            continue
        handle = _locked(hidden)
        if handle is None:
            continue
        if match and match[1] == "replaced" and not os.path.lexists(path):
            hidden.rename(path)
        else:
            shutil.rmtree(hidden, ignore_errors=True)
        os.close(handle)


def _swap(folder: Path, path: Path) -> None:
    before, handle = _hidden(path, "replaced"), _locked(path)
    try:
        with suppress(FileNotFoundError):
            path.rename(before)
        folder.rename(path)
        _sync(path.parent)
        _remove(before)
    except BaseException as error:
        if os.path.lexists(before) and not os.path.lexists(path):
            before.rename(path)
        if isinstance(error, OSError) and error.errno in {errno.ENOTEMPTY, errno.EEXIST}:
            raise RunError(f"another process has just written {path}; run it again") from None
        raise
    finally:
        if handle is not None:
            os.close(handle)


def _remove(path: Path) -> None:
    """What is no longer needed; where it cannot be removed, nothing is lost."""
    shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):  # it was a file or a link, or there was nothing
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
