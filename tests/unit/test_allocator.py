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


def page_faults(**environment):
    """Of ten arrays of 64 MiB, one after the other."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=kept | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


def test_freed_memory_is_used_again():
    assert page_faults() < 100


@pytest.mark.parametrize(
    "chosen", [{"MALLOC_MMAP_THRESHOLD_": "65536"}, {"GLIBC_TUNABLES": "glibc.malloc.perturb=0"}]
)
def test_what_the_user_chose_stays(chosen):
    assert page_faults(**chosen) > 200
