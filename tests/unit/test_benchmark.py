"""Measuring side by side: turns, percentiles, what is left out; from there to files."""

import itertools

import pytest
import torch

import exporters.benchmark.peak_memory
import exporters.benchmark.report
from compressor.errors import UsageError
from compressor.reports.benchmark import read_benchmark
from exporters.benchmark.measurement import Measured, Plan, measure
from exporters.benchmark.report import percentile, run_benchmark, to_markdown, write_benchmark
from tests.unit.benchmark_models import MS, PLAN, World
from tests.unit.benchmark_rows import a_benchmark, a_row, accuracy


@pytest.fixture
def world():
    return World()


@pytest.fixture
def no_processes(monkeypatch):
    """Peak memory is measured by processes of their own, which takes seconds."""
    monkeypatch.setattr(
        exporters.benchmark.peak_memory,
        "_peak_kib",
        lambda source, *_, **__: 3072 if source else 1024,
    )


def benchmark_of(targets, plan=PLAN, accuracies=None, **changes):
    return run_benchmark(targets, plan, accuracies or {}).model_copy(update=changes)


# Turns


def test_targets_take_turns(world, tmp_path):
    targets = [world.target(name, tmp_path, 4) for name in "ABC"]
    told = []
    measure(
        targets,
        PLAN,
        clock_ns=world.clock_ns,
        observe=lambda cell, number: told.append((number, cell.target.name)),
    )
    names = [call[0] for call in world.calls if not isinstance(call, str)]
    turns = [(name, len(list(calls))) for name, calls in itertools.groupby(names)]
    assert [name for name, _ in turns] == [*"ABC", *"ABC", *"ABC"]
    assert [num for _, num in turns] == [4] * 9  # one that is not timed, and three
    assert told == [(number, name) for number in (1, 2) for name in "ABC"]


def test_every_batch_size_with_every_number_of_threads(world, tmp_path):
    plan = Plan(batch_sizes=(1, 8), thread_counts=(1, 2), num_rounds=2, seconds=0.001)
    cells = measure([world.target("A", tmp_path, 4)], plan, clock_ns=world.clock_ns)
    settings = [(cell.num_threads, cell.batch_size) for cell in cells]
    assert settings == [(1, 1), (1, 8), (2, 1), (2, 8)]
    assert world.calls.count("open A") == 2
    assert {call[1] for call in world.calls if call != "open A"} == {(1, 3, 4, 5), (8, 3, 4, 5)}


def test_only_answers_are_timed(world, tmp_path):
    (cell,) = measure([world.target("A", tmp_path, 4, 9)], PLAN, clock_ns=world.clock_ns)
    assert [len(durations) for durations in cell.rounds_ns] == [3, 3]
    assert set(itertools.chain(*cell.rounds_ns)) == {4 * MS, 9 * MS}


def test_a_turn_lasts_its_share_of_the_seconds(world, tmp_path):
    plan = Plan(batch_sizes=(1,), thread_counts=(1,), num_rounds=4, seconds=0.4)
    (cell,) = measure([world.target("A", tmp_path, 5)], plan, clock_ns=world.clock_ns)
    assert [len(durations) for durations in cell.rounds_ns] == [20] * 4


def test_threads_of_the_process_are_put_back(world, tmp_path):
    plan = Plan(batch_sizes=(1,), thread_counts=(2,), num_rounds=2, seconds=0.001)
    before = torch.get_num_threads()
    measure([world.target("A", tmp_path, 1)], plan, clock_ns=world.clock_ns)
    assert torch.get_num_threads() == before

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure([world.target("A", tmp_path, 1)], plan, clock_ns=world.clock_ns, observe=stop)
    assert torch.get_num_threads() == before


def test_images_are_of_the_type_that_is_taken(world, tmp_path):
    floats = world.target("A", tmp_path, 1).images(2)
    levels = world.target("A", tmp_path, 1, takes_bytes=True).images(2)
    assert (floats.dtype, levels.dtype) == ("float32", "uint8")
    assert 0 <= floats.min() < 0.2 < 0.8 < floats.max() <= 1
    assert levels.min() < 50
    assert levels.max() > 200


def test_what_cannot_answer_is_left_out_with_the_reason(world, tmp_path):
    def broken(_):
        def answer(images_NCHW):
            raise RuntimeError("shapes differ\nat node 7")

        return answer

    targets = [
        world.target("A", tmp_path, 4, batch_size=8),
        world.target("B", tmp_path, 4, open=broken),
        world.target("C", tmp_path, 4),
    ]
    fixed, failed, fine = measure(targets, PLAN, clock_ns=world.clock_ns)
    assert fixed.why_not == "it takes batches of 8 only"
    assert failed.why_not == "it failed: shapes differ"
    assert fixed.rounds_ns == failed.rounds_ns == ()
    assert fine.why_not == ""
    assert len(fine.rounds_ns) == 2


# Numbers


@pytest.mark.parametrize(
    ("num", "percent", "expected"),
    [(100, 50, 50), (100, 90, 90), (100, 99, 99), (101, 50, 51), (101, 99, 100), (1, 99, 1)]
    + [(10, 90, 9), (11, 90, 10), (2, 50, 1), (1000, 99, 990), (300, 99, 297)],
)
def test_percentiles_are_values_that_were_measured(num, percent, expected):
    assert percentile(range(1, num + 1), percent) == expected


def row_of(rounds_ms, tmp_path, *, batch_size=1):
    target = World().target("A", tmp_path, 1)
    rounds_ns = tuple(tuple(round(MS * ms) for ms in durations) for durations in rounds_ms)
    cell = Measured(target=target, batch_size=batch_size, num_threads=1, rounds_ns=rounds_ns)
    return exporters.benchmark.report._timing(cell)


def test_numbers_of_known_durations(tmp_path):
    timing = row_of([range(1, 51), range(51, 101)], tmp_path, batch_size=2)
    assert (timing.p50_ms, timing.p90_ms, timing.p99_ms) == (50, 90, 99)
    assert (timing.lowest_p50_ms, timing.highest_p50_ms) == (25, 75)
    assert (timing.num_rounds, timing.num_calls) == (2, 100)
    assert timing.images_per_second == pytest.approx(2 * 100 / 5.050)


@pytest.mark.parametrize(
    ("num_calls", "has_p90", "has_p99"), [(9, False, False), (10, True, False), (99, True, False)]
)
def test_percentiles_of_few_calls_are_not_said(num_calls, has_p90, has_p99, tmp_path):
    timing = row_of([range(1, num_calls + 1)], tmp_path)
    assert (timing.p90_ms is not None, timing.p99_ms is not None) == (has_p90, has_p99)


# From targets to files


def test_a_benchmark_is_complete(world, tmp_path, no_processes):
    (tmp_path / "one").mkdir()
    targets = [world.target("A", tmp_path, 1), world.target("B", tmp_path, 1, batch_size=8)]
    plan = Plan(batch_sizes=(1, 4), thread_counts=(1,), num_rounds=2, seconds=0.001)
    benchmark = benchmark_of(targets, plan, {"A" * 64: accuracy(40)})
    first, second = benchmark.targets
    assert first.accuracy == accuracy(40)
    assert [t.batch_size for t in first.timings] == [1, 4]
    assert first.peak_memory_mib == 2
    assert second.timings == ()
    assert second.not_measured == ("it takes batches of 8 only",)
    assert second.peak_memory_mib is second.accuracy is None
    assert {"device", "processor", "clock frequency", "torch"} <= benchmark.mode.keys()


def test_a_benchmark_of_nothing_is_refused(world, tmp_path):
    with pytest.raises(UsageError, match=r"A: it takes batches of 8 only; choose other --batch-si"):
        run_benchmark([world.target("A", tmp_path, 1, batch_size=8)], PLAN, {})


def test_names_are_told_apart(world, tmp_path, no_processes):
    places = [tmp_path / "one", tmp_path / "two", tmp_path / "x" / "two", tmp_path]
    names = ["m.onnx", "m.onnx", "m.onnx", "odd\x1b[31m\nname"]
    targets = [
        world.target(name, folder, 1, source=str(number), sha256=f"{number}" * 64)
        for number, (name, folder) in enumerate(zip(names, places, strict=True))
    ]
    shown = [row.name for row in benchmark_of(targets).targets]
    assert shown == ["one/m.onnx", "two/m.onnx 11111111", "two/m.onnx 22222222", "odd?[31m?name"]


def test_files(tmp_path):
    rows = [a_row(name, accuracy=accuracy(40)) for name in ("a|b", "<img src=x>")]
    paths = write_benchmark(a_benchmark(*rows), tmp_path)
    assert [path.name for path in paths] == ["bench.json", "bench.md", "bench.svg"]
    assert read_benchmark(paths[0]) == a_benchmark(*rows)
    text = paths[1].read_text()
    assert text == to_markdown(a_benchmark(*rows))
    assert "| a\\|b | 1,000,000 | 12 MiB | 0.500 (0.400 to 0.600) | 1.25 | 12.5 |" in text
    assert "<img" not in text.replace("\\<img", "")
    assert "](bench.svg)" in text
    paths = write_benchmark(a_benchmark(rows[0]), tmp_path)
    assert [path.name for path in paths] == ["bench.json", "bench.md"]
    assert not (tmp_path / "bench.svg").exists()
    assert "](bench.svg)" not in paths[1].read_text()
