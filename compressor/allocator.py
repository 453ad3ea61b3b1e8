"""Freed memory stays with the process, since the next batch asks for the same sizes again.

By default glibc gives every large tensor back to the kernel when it is freed, and each new one
arrives as untouched pages that fault one by one: a quarter of the time of a small network's
attack on a CPU. The price is that the process keeps its highest use until it ends.
"""

import ctypes
import os
from typing import Any

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""As in glibc's malloc.h."""
_NEVER = -1


def keep_freed_memory() -> None:
    """Tell the C library; nothing where it is not glibc, or where the user chose already."""
    is_chosen = any(name.startswith("MALLOC_") for name in os.environ)
    if is_chosen or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    mallopt = _of_the_c_library("mallopt")
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, _NEVER)
        mallopt(_M_MMAP_MAX, 0)


def give_freed_memory_back() -> None:
    """To the kernel, now: a process that is forked afterwards would hold a copy of it for good."""
    trim = _of_the_c_library("malloc_trim")
    if trim is not None:
        trim(ctypes.c_size_t(0))


def _of_the_c_library(name: str) -> Any:  # noqa: ANN401 (a function of C)
    """None where the library is not glibc."""
    return getattr(ctypes.CDLL(None), name, None) if os.name == "posix" else None
