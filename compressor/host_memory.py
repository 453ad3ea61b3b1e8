"""Main memory that this process has or may still take.

Slurm and Kubernetes limit a job by control groups, of which /proc/meminfo knows nothing.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path("/")


@dataclass(frozen=True, kw_only=True)
class _Files:
    """Where one version of control groups keeps what."""

    mount: str
    limit: str
    used: str
    cache: str
    """In `memory.stat`: pages of files that are given back before the limit is felt."""


_VERSION_1 = _Files(
    mount="sys/fs/cgroup/memory",
    limit="memory.limit_in_bytes",
    used="memory.usage_in_bytes",
    cache="total_inactive_file",
)
_VERSION_2 = _Files(
    mount="sys/fs/cgroup", limit="memory.max", used="memory.current", cache="inactive_file"
)


def reachable_bytes(root: Path = _ROOT) -> int:
    """What this process has and what is free besides; elsewhere than on Linux all that there is.

    Args:
        root: where `proc` and `sys` lie.
    """
    try:
        lines = (root / "proc/meminfo").read_text(encoding="utf-8").splitlines()
        free = next(int(line.split()[1]) for line in lines if "MemAvailable" in line) * 1024
        pages = int((root / "proc/self/statm").read_text(encoding="utf-8").split()[1])
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([free, *_left_of_limits(root)]) + pages * os.sysconf("SC_PAGE_SIZE")


def _left_of_limits(root: Path) -> Iterator[int]:
    """Of each control group that this process is in; those around a group limit it, too."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", maxsplit=2)
        if controllers and "memory" not in controllers.split(","):
            continue
        files = _VERSION_1 if controllers else _VERSION_2
        mount = root / files.mount
        own = mount / path.lstrip("/")  # not there where a container sees its own part only
        for group in (own, *own.parents):
            if group.is_relative_to(mount) and (left := _left(group, files)) is not None:
                yield left


def _left(group: Path, files: _Files) -> int | None:
    """Bytes; None where there is no limit."""
    try:
        limit = int((group / files.limit).read_text(encoding="utf-8"))  # or the word max
        used = int((group / files.used).read_text(encoding="utf-8"))
        stat = (group / "memory.stat").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return None
    cache = next((int(line.split()[1]) for line in stat if line.startswith(f"{files.cache} ")), 0)
    return max(0, limit - used + cache)
