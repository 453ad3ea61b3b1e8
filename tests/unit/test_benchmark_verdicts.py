"""What a benchmark says: what pays, whom nobody beats, and how far to trust it."""

import re

import pytest

from exporters.benchmark.verdicts import fronts, notes, verdicts
from tests.unit import benchmark_rows
from tests.unit.benchmark_rows import accuracy


def timing(p50_ms, spread_ms=0.01, **changes):
    batch_size, num_calls = changes.get("batch_size", 1), changes.get("num_calls", 200)
    values = {
        "p50_ms": p50_ms,
        "lowest_p50_ms": p50_ms - spread_ms,
        "highest_p50_ms": p50_ms + spread_ms,
        "p90_ms": p50_ms + 1,
        "p99_ms": p50_ms + 2 if num_calls >= 100 else None,
        "images_per_second": 1000 * batch_size / p50_ms,
    }
    return benchmark_rows.timing(**(values | changes))


def a_row(name, *timings, **changes):
    values = {"timings": timings or (timing(1.0),), "source_sha256": "s", "num_bytes": 1000}
    return benchmark_rows.a_row(name, **(values | changes))


def a_benchmark(*rows, **changes):
    values = {"batch_sizes": (1, 32), "num_cores": 4, "num_usable_cores": 4}
    values |= {"load_before": 0.1, "load_after": 1.2}
    return benchmark_rows.a_benchmark(*rows, **(values | changes))


INT8 = {"precision": "int8", "num_bytes": 270}


def test_int8_that_is_slower_is_not_worth_it():
    benchmark = a_benchmark(a_row("a", timing(0.59)), a_row("b", timing(0.88), **INT8))
    assert verdicts(benchmark) == [
        "int8 (b) is not worth it here: 1.5 times the latency of a (p50 at batch 1, 1 thread: "
        "0.880 ms against 0.590 ms), with 27 % of the bytes."
    ]


def test_int8_that_is_faster_for_large_batches_only():
    whole = a_row("a", timing(0.59), timing(30, batch_size=32))
    small = a_row("b", timing(0.88), timing(20, batch_size=32), **INT8)
    (line,) = verdicts(a_benchmark(whole, small))
    assert line.endswith(
        "; but it is faster at p50 at batch 32, 1 thread: 20.0 ms against 30.0 ms."
    )


def test_int8_that_is_faster():
    benchmark = a_benchmark(a_row("a", timing(0.59)), a_row("b", timing(0.3), **INT8))
    (line,) = verdicts(benchmark)
    assert line.startswith("int8 (b) is faster here: 0.51 times the latency of a (p50")


def test_ranges_that_overlap_decide_nothing():
    benchmark = a_benchmark(a_row("a", timing(0.59, 0.2)), a_row("b", timing(0.88, 0.2), **INT8))
    (line,) = verdicts(benchmark)
    assert "cannot be told" in line
    assert "worth" not in line


@pytest.mark.parametrize(
    "changes",
    [{"source_sha256": "other"}, {"source_sha256": None}, {"kind": "pytorch"}],
)
def test_only_what_has_one_source_and_runtime_is_judged(changes):
    whole = a_row("a", **({"source_sha256": None} if changes == {"source_sha256": None} else {}))
    assert verdicts(a_benchmark(whole, a_row("b", timing(9), **(INT8 | changes)))) == []


def test_who_is_not_dominated():
    rows = [
        a_row("fast", timing(1), num_bytes=900, accuracy=accuracy(40)),
        a_row("robust", timing(2), num_bytes=800, accuracy=accuracy(50)),
        a_row("neither", timing(3), num_bytes=850, accuracy=accuracy(45)),
        a_row("unknown", timing(0.1), num_bytes=1),
    ]
    assert fronts(a_benchmark(*rows)) == [
        "Not dominated in latency and worst case: fast, robust.",
        "Not dominated in size and worst case: robust.",
    ]


def test_what_cannot_be_compared_is_named():
    other = accuracy(99, threat="L2, epsilon = 0.5")
    failed = accuracy(1, status="invalid", clean=None, worst_case=None)
    rows = [a_row("a", accuracy=accuracy(40)), a_row("b", accuracy=accuracy(41, protocol="PGD"))]
    rows += [a_row("c", accuracy=other), a_row("d", accuracy=failed), a_row("e")]
    lines = fronts(a_benchmark(*rows))
    assert lines[1].endswith(": b.")
    assert lines[2] == "Not compared, as not verified under that threat on those images: c, d."
    assert lines[3] == "Worst cases of different attacks: AutoAttack; PGD."
    assert fronts(a_benchmark(rows[0], rows[2]))[0].startswith("There is no picture: fewer than")
    shown = {"status": "invalid", "clean": None, "worst_case": None}
    masked = a_row("a", accuracy=accuracy(40, gradients_are_masked=True, **shown))
    assert (
        fronts(a_benchmark(masked))[-1]
        == "Gradients are masked, so the attacks on it showed nothing: a."
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "The machine had little else to do: load 0.10 before and 1.20 after, on 4 cores."),
        ({"load_before": 1.5}, "The machine was BUSY with other work.*load 1.50 before"),
        ({"load_after": 2.5}, "The machine was BUSY"),
        ({"load_before": None}, "Whether the machine did anything else is not known"),
        ({"num_usable_cores": 1, "thread_counts": (1, 2)}, r"More threads \(2\) than usable cores"),
    ],
)
def test_what_else_the_machine_did_is_said(changes, said):
    assert re.search(said, "\n".join(notes(a_benchmark(a_row("a"), **changes))))


def test_what_was_not_measured_is_said():
    rows = [a_row("a", timing(1, num_calls=50), not_measured=("batch 8, threads 1: no",))]
    rows.append(a_row("b", timing(1, num_calls=2000), image_shape=(3, 9, 9)))
    text = "\n".join(notes(a_benchmark(*rows)))
    assert "50 to 2,000 calls of each in 5 rounds" in text
    assert "p99 needs 100" in text
    assert "Not measured: a, batch 8, threads 1: no." in text
    assert "images of different sizes" in text
