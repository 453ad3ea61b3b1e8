"""Records of benchmarks, with one thing or another changed."""

from compressor.proportions import Proportion
from compressor.reports.benchmark import Accuracy, Benchmark, BenchmarkRow, Timing
from compressor.reports.report import Count

POISON = '"><script>hacked=1</script>'


def accuracy(num_correct, num_total=100, **changes):
    clean, worst = (
        Count.of(Proportion(num_correct=num, num_total=num_total))
        for num in (num_total, num_correct)
    )
    values = {
        "status": "verified",
        "report": "mine/report.json",
        "threat": "Linf, epsilon = 8/255",
        "protocol": "AutoAttack",
        "images_sha256": "e" * 64,
        "gradients_are_masked": False,
        "clean": clean,
        "worst_case": worst,
    }
    return Accuracy(**(values | changes))


def timing(**changes):
    values = {
        "batch_size": 1,
        "num_threads": 1,
        "num_rounds": 5,
        "num_calls": 200,
        "p50_ms": 0.5,
        "lowest_p50_ms": 0.4,
        "highest_p50_ms": 0.6,
        "p90_ms": 1.25,
        "p99_ms": 12.5,
        "images_per_second": 2000.0,
    }
    return Timing(**(values | changes))


def a_row(name, num_correct=None, **changes):
    values = {
        "name": name,
        "kind": "onnx",
        "precision": "fp32",
        "sha256": f"{name}-sha256",
        "source_sha256": None,
        "num_bytes": 1_000_000,
        "image_shape": (3, 8, 8),
        "takes_bytes": False,
        "runs_on": "nothing",
        "peak_memory_mib": 12.4,
        "timings": (timing(), timing(batch_size=8, p90_ms=None, p99_ms=None, num_calls=9)),
        "not_measured": (),
        "accuracy": None if num_correct is None else accuracy(num_correct),
    }
    return BenchmarkRow(**(values | changes))


def a_benchmark(*rows, **changes):
    values = {
        "targets": rows,
        "batch_sizes": (1, 8),
        "thread_counts": (1,),
        "num_cores": 2,
        "num_usable_cores": 2,
        "load_before": None,
        "load_after": 0.5,
        "mode": {"device": "cpu"},
    }
    return Benchmark(**(values | changes))
