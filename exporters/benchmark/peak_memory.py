"""How much memory a target needs, measured in a process of its own.

Peak memory is the high-water mark of the resident set of a fresh process that opens one target and
answers its largest batch on one thread, minus that of one that makes the same imports and images.
On Linux it is VmHWM of /proc, as `ru_maxrss` of a child begins at what its parent had. The memory
of a GPU is not in it.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from exporters.benchmark.measurement import Measured
from exporters.benchmark.target import BenchTarget

_CHILD_SECONDS = 300
_CHILD = """
import json, resource, sys
import numpy, onnx, onnxruntime
from exporters.benchmark.targets import find_targets
source, shape, takes_bytes, options = json.loads(sys.argv[1])
images = numpy.ones(shape, numpy.uint8 if takes_bytes else numpy.float32)
if source:
    (target,) = find_targets(source, image_shape=tuple(shape[1:]), **options)
    target.open(1)(images)
try:
    lines = open("/proc/self/status").read().splitlines()
    print(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")))
except OSError:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)  # a Mac counts bytes
"""


def peak_memories_mib(cells: Sequence[Measured]) -> dict[str, float | None]:
    """By the source of the target, for its largest batch; None where a process failed."""
    answered = sorted((c for c in cells if not c.why_not), key=lambda c: c.batch_size)
    largest = {cell.target.source: cell for cell in answered}
    empties: dict[str, int | None] = {}
    found: dict[str, float | None] = {}
    for source, cell in largest.items():
        key = str((cell.batch_size, cell.target.image_shape, cell.target.takes_bytes))
        if key not in empties:
            empties[key] = _peak_kib("", cell.target, batch_size=cell.batch_size)
        full, empty = _peak_kib(source, cell.target, batch_size=cell.batch_size), empties[key]
        found[source] = None if full is None or empty is None else max(0, full - empty) / 1024
    return found


def _peak_kib(source: str, target: BenchTarget, *, batch_size: int) -> int | None:
    """Of a process that opens `source`, or nothing, with a batch of images as `target` takes it."""
    trusted = [target.sidecar_sha256] if target.sidecar_sha256 else []
    options = {"provider": target.provider, "trusted_sha256": trusted}
    asked = [source, [batch_size, *target.image_shape], target.takes_bytes, options]
    root = str(Path(__file__).parents[2])
    paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", _CHILD, json.dumps(asked)],
            capture_output=True,
            text=True,
            check=True,
            timeout=_CHILD_SECONDS,
            env=os.environ | {"PYTHONPATH": paths},
        )
        return int(done.stdout.split()[-1])
    except (OSError, ValueError, IndexError, subprocess.SubprocessError):
        return None
