"""Memory of a target, measured in a process of its own."""

import exporters.benchmark.peak_memory
from exporters.benchmark.measurement import Measured
from exporters.benchmark.peak_memory import peak_memories_mib
from exporters.benchmark.targets import find_targets
from tests.unit.benchmark_models import World, save_onnx


def test_peak_memory_is_that_of_the_target(tmp_path):
    """Not of this process, which is larger: a child begins with the `ru_maxrss` of its parent."""
    path = save_onnx(tmp_path / "large.onnx", num_classes=40_000)
    (target,) = find_targets(str(path))
    cell = Measured(target=target, batch_size=2, num_threads=1)
    found = peak_memories_mib([cell])
    weights_mib = path.stat().st_size / 2**20
    assert weights_mib < found[str(path)] < 10 * weights_mib


def test_memory_that_cannot_be_measured_is_not_guessed(tmp_path, monkeypatch):
    monkeypatch.setattr(exporters.benchmark.peak_memory.sys, "executable", "/bin/false")
    target = World().target("A", tmp_path, 1)
    cells = [Measured(target=target, batch_size=size, num_threads=1) for size in (8, 1)]
    assert peak_memories_mib(cells) == {"A": None}
