"""What benchmarks count, on a pretended GPU: kernels once, calls in loops, columns that tell."""

import argparse
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from tests.bench import bench_step, interleaved
from tests.bench.bench_data import growth_per_epoch
from tests.bench.bench_step import KINDS, shares
from tests.bench.command import typed_command
from tests.bench.interleaved import seconds_in_turn, seconds_per_call

CPU = torch.device("cpu")
RESULTS = Path(__file__).parents[2] / "docs/results"


def event(key, *, cpu=0.0, gpu=0.0, kernel=False, annotation=False):
    return SimpleNamespace(
        key=key,
        self_cpu_time_total=cpu,
        self_device_time_total=gpu,
        device_type=DeviceType.CUDA if kernel else DeviceType.CPU,
        is_user_annotation=annotation,
    )


def test_kernels_are_counted_once_and_by_what_began_them():
    events = [
        event("aten::cudnn_convolution", cpu=90, gpu=30),
        event("sm90_xmma_fprop_implicit_gemm", gpu=30, kernel=True),
        event("aten::mm", cpu=90, gpu=10),
        event("gemm", gpu=10, kernel=True),
        event("ncclKernel", gpu=60, kernel=True),
        event("Optimizer.step", gpu=500, kernel=True, annotation=True),
    ]
    found = shares(events, is_gpu=True)
    assert found["convolutions forwards"] == pytest.approx(0.3)
    assert found["products"] == pytest.approx(0.1)
    assert found["rest"] == pytest.approx(0.6)
    assert sum(found.values()) == pytest.approx(1)


def test_shares_of_a_cpu_are_those_of_its_operations():
    found = shares([event("aten::mm", cpu=3), event("aten::what", cpu=1)], is_gpu=False)
    assert (found["products"], found["rest"]) == (0.75, 0.25)
    assert found.keys() == {*KINDS, "rest"}


def test_calls_shorter_than_a_clock_are_repeated(monkeypatch):
    now, called = [0.0], []

    def function():
        called.append(1)
        now[0] += 0.0004

    monkeypatch.setattr(interleaved.time, "perf_counter", lambda: now[0])
    assert seconds_per_call(function, CPU) == pytest.approx(0.0004)
    assert len(called) == 2 * 256 - 1  # 1, 2, 4 to 256


def test_a_clock_elsewhere_is_asked_in_the_same_turns():
    names = []

    def clock(function):
        names.append(function())
        return 7.0

    functions = {"a": lambda: "a", "b": lambda: "b"}
    found = seconds_in_turn(functions, num_rounds=2, clock=clock)
    assert found == {"a": [7.0, 7.0], "b": [7.0, 7.0]}
    assert names == ["a", "b", "b", "a"]


def test_compiling_has_a_column_only_where_it_compiled():
    table = json.loads((RESULTS / "bench-step.json").read_text())
    rows = [*table["cases"], table["without"]]

    def page(rows, without):
        return bench_step._markdown(rows, without, command_line="python -m it --rounds 3")

    compiled = page(rows[:-1], rows[-1:])
    assert "| compiling |" in compiled
    assert "In the last row" in compiled
    assert "`python -m it --rounds 3`" in compiled
    on_gpu = [
        {key: value for key, value in row.items() if key != "compiling_ratio"}
        | {"environment": row["environment"] | {"device": "cuda"}}
        for row in rows[:-1]
    ]
    text = page(on_gpu, [])
    assert "ompiling" not in text.replace("is_compiled", "")
    assert "In the last row" not in text
    assert "on the GPU" in text


def test_the_command_has_its_rounds_and_no_option_without_a_part():
    options = argparse.Namespace(rounds=3, case="x", device=None, write=Path("a page.md"))
    found = typed_command("tests.bench.bench_step", options, left_out=["case"])
    assert found == "python -m tests.bench.bench_step --rounds 3 --write 'a page.md'"


def readings(*means):
    return [
        {"epoch": epoch, "mib": mean + around}
        for epoch, mean in enumerate(means, 1)
        for around in (-30, 0, 30)
    ]


def test_growth_is_fitted_without_the_first_epoch():
    found = growth_per_epoch(readings(500, 802, 804, 806, 808))
    assert found["mib"] == pytest.approx(2)
    assert found["standard_error"] == pytest.approx(0, abs=1e-9)
    assert found["num_epochs"] == 4


def test_its_spread_is_that_of_a_slope():
    """Means 0, 1, 1, 0 about a level line: residuals of 1/2, two degrees of freedom."""
    found = growth_per_epoch(readings(7, 800, 801, 801, 800))
    assert found["mib"] == pytest.approx(0)
    assert found["standard_error"] == pytest.approx((4 * 0.25 / 2 / 5) ** 0.5)
