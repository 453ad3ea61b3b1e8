"""Memory that was freed is used again without asking the kernel, unless the user wants else."""

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="only glibc can be told to keep memory"
)
SCRIPT = """
import resource
import numpy as np
from compressor.allocator import keep_freed_memory

def faults_of_ten():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        np.ones(2**26, dtype=np.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_freed_memory()
np.ones(2**26, dtype=np.uint8)
print(faults_of_ten())
"""

AFTER_GIVING_BACK = """
from pathlib import Path
import numpy as np
from compressor.allocator import give_freed_memory_back, keep_freed_memory

def resident_mib():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4 // 1024

keep_freed_memory()
before = resident_mib()
np.ones(2**28, dtype=np.uint8)
kept = resident_mib() - before
give_freed_memory_back()
print(kept, resident_mib() - before)
"""


def page_faults(**environment):
    """Of ten arrays of 64 MiB, one after the other."""
    return int(printed(SCRIPT, **environment))


def printed(script, **environment):
    """By a process of its own, since the C library is told for good."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=kept | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_freed_memory_is_used_again():
    assert page_faults() < 100


@pytest.mark.parametrize(
    "chosen", [{"MALLOC_MMAP_THRESHOLD_": "65536"}, {"GLIBC_TUNABLES": "glibc.malloc.perturb=0"}]
)
def test_what_the_user_chose_stays(chosen):
    assert page_faults(**chosen) > 200


def test_freed_memory_is_given_back_before_a_process_is_forked():
    """MiB of 256 that the process still has, before and after."""
    kept, left = map(int, printed(AFTER_GIVING_BACK).split())
    assert kept > 200
    assert left < 50
