"""Measuring side by side: turns, percentiles, what is left out, accuracies, what is said."""

import itertools
import json
import re

import onnx  # noqa: TID253 (makes the files)
import pytest
import torch
from onnx import TensorProto, helper  # noqa: TID253
from safetensors.torch import save_file

import exporters.benchmark_report
from compressor.errors import RecipeError, RunError, UsageError, WeightsError
from compressor.networks import NetworkSpec, build_classifier, save_classifier
from compressor.proportions import Proportion
from compressor.reports.pareto import Accuracy, Benchmark, BenchmarkRow, Timing, read_benchmark
from compressor.reports.report import ArtefactFacts, Count, TargetFacts, write_report
from compressor.weights import sha256_of_file
from exporters.benchmark import BenchTarget, Measured, Plan, find_targets, measure
from exporters.benchmark_report import (
    find_accuracies,
    fronts,
    notes,
    percentile,
    run_benchmark,
    to_markdown,
    verdicts,
    write_benchmark,
)

MS = 1_000_000
PLAN = Plan(batch_sizes=(1,), thread_counts=(1,), num_rounds=2, seconds=0.02)


class World:
    """A clock that only answers of targets move, and a record of these."""

    def __init__(self):
        self.now_ns, self.calls = 0, []

    def clock_ns(self):
        return self.now_ns

    def target(self, name, folder, *durations_ms, **changes):
        durations_ns = itertools.cycle(round(MS * ms) for ms in durations_ms)

        def open_on(num_threads):
            self.calls.append(f"open {name}")
            torch.set_num_threads(num_threads)

            def answer(images_NCHW):
                self.calls.append((name, images_NCHW.shape, str(images_NCHW.dtype)))
                self.now_ns += next(durations_ns)

            return answer

        values = {
            "name": name,
            "kind": "onnx",
            "source": name,
            "folder": folder,
            "precision": "fp32",
            "sha256": name * 64,
            "source_sha256": None,
            "num_bytes": 100,
            "image_shape": (3, 4, 5),
            "runs_on": "nothing",
            "open": open_on,
        }
        return BenchTarget(**(values | changes))


@pytest.fixture
def world():
    return World()


@pytest.fixture
def no_processes(monkeypatch):
    """Peak memory is measured by processes of their own, which takes seconds."""
    monkeypatch.setattr(
        exporters.benchmark_report, "_peak_kib", lambda source, *_: 3072 if source else 1024
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
    return exporters.benchmark_report._timing(cell)


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


# Finding targets


def save_onnx(path, *, batch="batch", size=(3, 8, 8), num_classes=4, **options):
    """Flatten, cast where the pixels are bytes, and a linear map; `metadata` goes into it."""
    kind = options.get("kind", TensorProto.FLOAT)
    inputs = [helper.make_tensor_value_info("pixels", kind, [batch, *size])]
    num_pixels = size[0] * 64
    half = options.get("half", False)
    dtype = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    weight = helper.make_tensor(
        "w", dtype, [num_pixels, num_classes], [0.5] * num_pixels * num_classes
    )
    nodes = [
        helper.make_node("Flatten", ["pixels"], ["flat"]),
        helper.make_node("Cast", ["flat"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["w"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node(
            "MatMul", ["float", "wide"], ["logits" if not options.get("quantised") else "raw"]
        ),
    ]
    constants = [weight]
    if options.get("quantised"):
        constants.append(helper.make_tensor("scale", TensorProto.FLOAT, [], [0.5]))
        constants.append(helper.make_tensor("zero", TensorProto.INT8, [], [0]))
        nodes.append(helper.make_node("QuantizeLinear", ["raw", "scale", "zero"], ["q"]))
        nodes.append(helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["logits"]))
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, num_classes])]
    graph = helper.make_graph(nodes, "linear", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    helper.set_model_props(model, options.get("metadata", {}))
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
    return path


def save_network(path):
    spec = NetworkSpec(architecture="tiny", width=0.5, num_classes=4, image_shape=(3, 8, 8))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_classifier(path, build_classifier(spec, seed=0), spec, {})
    return path


@pytest.fixture
def run(tmp_path):
    """A finished run with three exports, one of which failed its check."""
    folder = tmp_path / "runs" / "mine"
    sha256 = sha256_of_file(save_network(folder / "model.safetensors"))
    (folder / "recipe.resolved.json").write_text("{}")
    facts = """class_names teachers training_content_sha256 num_training num_validation
        validation_index_sha256 image_shape selection_attack"""
    (folder / "run.json").write_text(
        json.dumps(dict.fromkeys(facts.split(), 0) | {"model_sha256": sha256})
    )
    metadata = {"robust_compress.source_sha256": sha256}
    exports = folder / "exports"
    save_onnx(exports / "model.fp32.onnx", metadata=metadata)
    save_onnx(exports / "model.int8.onnx", metadata=metadata, quantised=True, half=True)
    save_onnx(exports / "unverified.fp16.onnx", metadata=metadata)
    return folder


def test_a_run_is_its_network_and_its_exports(run):
    network, whole, small = find_targets(str(run))
    assert [t.name for t in (network, whole, small)] == [
        "model.safetensors",
        "model.fp32.onnx",
        "model.int8.onnx",
    ]
    assert [t.kind for t in (network, whole, small)] == ["pytorch", "onnx", "onnx"]
    assert [t.precision for t in (network, whole, small)] == ["fp32", "fp32", "int8"]
    assert {t.source_sha256 for t in (network, whole, small)} == {network.sha256}
    assert {t.folder for t in (network, whole, small)} == {run}
    assert small.sha256 == sha256_of_file(run / "exports/model.int8.onnx")
    assert small.num_bytes == (run / "exports/model.int8.onnx").stat().st_size


@pytest.mark.parametrize("num_threads", [1, 2])
def test_targets_answer_with_as_many_threads_as_asked(run, num_threads):
    before = torch.get_num_threads()
    for target in find_targets(str(run)):
        answer = target.open(num_threads)
        answer(target.images(3))
        if target.kind == "pytorch":
            assert torch.get_num_threads() == num_threads
        (again,) = find_targets(target.source)
        assert (again.sha256, again.image_shape) == (target.sha256, target.image_shape)
    torch.set_num_threads(before)


def test_precision_is_read_from_the_graph(tmp_path):
    options = {"fp32": {}, "fp16": {"half": True}, "int8": {"quantised": True}}
    for precision, changes in options.items():
        (target,) = find_targets(str(save_onnx(tmp_path / "any.onnx", **changes)))
        assert target.precision == precision


def test_files_that_take_bytes_are_fed_with_bytes(tmp_path):
    (target,) = find_targets(str(save_onnx(tmp_path / "m.onnx", kind=TensorProto.UINT8)))
    assert target.takes_bytes
    target.open(1)(target.images(2))


def test_sizes_that_a_file_leaves_open_are_asked_for(tmp_path):
    path = str(save_onnx(tmp_path / "m.onnx", size=(3, "height", "width")))
    with pytest.raises(UsageError, match=r"images of any size.*--image-shape 3x32x32"):
        find_targets(path)
    (target,) = find_targets(path, image_shape=(3, 8, 8))
    assert target.image_shape == (3, 8, 8)
    target.open(1)(target.images(2))


def test_weights_with_an_architecture_before_them(tmp_path, make_tiny):
    path = tmp_path / "w.safetensors"
    save_file(make_tiny(num_classes=7).state_dict(), path)
    with pytest.raises(UsageError, match=r"does not say for which images; give --image-shape"):
        find_targets(f"tiny:{path}")
    (target,) = find_targets(f"tiny:{path}", image_shape=(3, 8, 8))
    assert target.sha256 == sha256_of_file(path)
    target.open(torch.get_num_threads())(target.images(2))
    with pytest.raises(RecipeError, match="architecture 'tinny' is not known; did you mean tiny"):
        find_targets(f"tinny:{path}", image_shape=(3, 8, 8))
    with pytest.raises(WeightsError, match="does not say which network"):
        find_targets(str(path))


def test_a_file_that_changes_meanwhile_is_refused(tmp_path):
    path = save_onnx(tmp_path / "m.onnx")
    (target,) = find_targets(str(path))
    save_onnx(path, half=True)
    target.open(1)  # the session that was opened first
    with pytest.raises(Exception, match=r"m\.onnx was changed meanwhile"):
        target.open(2)


# Accuracies


def report_of(make_report, sha256, num_standing=5, num_total=10, **changes):
    broken_by = (None,) * num_standing + ("pgd_sat",) * (num_total - num_standing)
    target = TargetFacts(kind="onnx", architecture="x", sha256=sha256, source_sha256=None)
    return make_report(broken_by, target=target, **changes)


@pytest.fixture
def beside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [tmp_path / name for name in ("runs/mine", "runs/verify-x", "elsewhere")]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    return folders


def test_accuracies_are_found_by_hash_alone(world, beside, make_report):
    run, near, far = beside
    targets = [world.target(name, run, 1) for name in "ABCD"]
    write_report(report_of(make_report, "A" * 64, 5), run / "report-papers.json")
    write_report(report_of(make_report, "B" * 64, 6), near / "report.json")
    write_report(report_of(make_report, "C" * 64, 7), far / "report.json")
    write_report(report_of(make_report, "E" * 64, 8, name="D"), run / "report.json")
    (near / "report-old.json").write_text("{}")
    found = find_accuracies(targets)
    assert {key[0]: value.worst_case.num_correct for key, value in found.items()} == {
        "A": 5,
        "B": 6,
    }
    assert found["A" * 64].report == "mine/report-papers.json"
    assert (found["B" * 64].threat, found["B" * 64].clean.num_total) == (
        "Linf, epsilon = 8/255",
        10,
    )
    found = find_accuracies(targets, [far / "report.json"])
    assert found["C" * 64].worst_case.num_correct == 7


def test_of_several_reports_the_one_of_more_images_counts(world, beside, make_report):
    run, near, far = beside
    targets = [world.target("A", run, 1)]
    write_report(report_of(make_report, "A" * 64, 5, 10), run / "report-1.json")
    write_report(report_of(make_report, "A" * 64, 30, 40), run / "report-2.json")
    write_report(report_of(make_report, "A" * 64, 20, 40), near / "report.json")
    alarm = report_of(make_report, "A" * 64, 99, 100, status="incomplete", status_reason="time")
    write_report(alarm.model_copy(update={"looks": "many"}), run / "report-3.json")
    write_report(report_of(make_report, "A" * 64, 1, 2), far / "report.json")
    assert find_accuracies(targets)["A" * 64].worst_case.num_correct == 20
    given = find_accuracies(targets, [far / "report.json"])
    assert given["A" * 64].worst_case.num_correct == 1


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"status": "unverified", "worst_case": None}, "unverified"),
        ({"looks": "many"}, "sequential"),
    ],
)
def test_only_verified_numbers_are_taken(changes, status, world, beside, make_report):
    report = report_of(make_report, "A" * 64, **changes)
    write_report(report, beside[0] / "report.json")
    accuracy = find_accuracies([world.target("A", beside[0], 1)])["A" * 64]
    assert (accuracy.status, accuracy.clean, accuracy.worst_case) == (status, None, None)


def test_reports_that_were_given_must_fit(world, beside, make_report):
    run, _, far = beside
    targets = [world.target("A", run, 1)]
    write_report(report_of(make_report, "B" * 64), far / "report.json")
    with pytest.raises(UsageError, match=f"SHA-256 {'B' * 64}, which none of the targets has"):
        find_accuracies(targets, [far / "report.json"])
    with pytest.raises(UsageError, match="nowhere.json does not exist"):
        find_accuracies(targets, [far / "nowhere.json"])
    (far / "report.json").write_text("{}")
    with pytest.raises(RunError, match="is not a report of schema"):
        find_accuracies(targets, [far / "report.json"])


def test_masked_gradients_are_said(world, beside, make_report):
    facts = ArtefactFacts(
        attacked_through="twin",
        twin="",
        transfer=None,
        source=None,
        gradients_are_masked=True,
        masking="",
    )
    report = report_of(make_report, "A" * 64, artefact=facts)
    write_report(report, beside[0] / "report.json")
    assert find_accuracies([world.target("A", beside[0], 1)])["A" * 64].gradients_are_masked


# What is said


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


def timing(p50_ms, spread_ms=0.01, *, batch_size=1, num_threads=1, num_calls=200):
    return Timing(
        batch_size=batch_size,
        num_threads=num_threads,
        num_rounds=5,
        num_calls=num_calls,
        p50_ms=p50_ms,
        lowest_p50_ms=p50_ms - spread_ms,
        highest_p50_ms=p50_ms + spread_ms,
        p90_ms=p50_ms + 1,
        p99_ms=p50_ms + 2 if num_calls >= 100 else None,
        images_per_second=1000 * batch_size / p50_ms,
    )


def a_row(name, *timings, **changes):
    values = {
        "name": name,
        "kind": "onnx",
        "precision": "fp32",
        "sha256": name,
        "source_sha256": "s",
        "num_bytes": 1000,
        "image_shape": (3, 8, 8),
        "takes_bytes": False,
        "runs_on": "nothing",
        "peak_memory_mib": 12.5,
        "timings": timings or (timing(1.0),),
        "not_measured": (),
        "accuracy": None,
    }
    return BenchmarkRow(**(values | changes))


def a_benchmark(*rows, **changes):
    values = {
        "targets": rows,
        "batch_sizes": (1, 32),
        "thread_counts": (1,),
        "num_cores": 4,
        "num_usable_cores": 4,
        "load_before": 0.1,
        "load_after": 1.2,
        "mode": {"device": "cpu"},
    }
    return Benchmark(**(values | changes))


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
    masked = a_row("a", accuracy=accuracy(40, gradients_are_masked=True))
    assert (
        fronts(a_benchmark(masked))[-1] == "Gradients are masked, so robust accuracy flatters: a."
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


# From targets to files


def test_a_benchmark_is_complete(world, tmp_path, no_processes):
    (tmp_path / "one").mkdir()
    targets = [world.target("A", tmp_path, 1), world.target("B", tmp_path, 1, batch_size=8)]
    plan = Plan(batch_sizes=(1, 4), thread_counts=(1,), num_rounds=2, seconds=0.001)
    benchmark = benchmark_of(targets[:1] * 1 + targets[1:], plan, {"A" * 64: accuracy(40)})
    first, second = benchmark.targets
    assert first.accuracy == accuracy(40)
    assert [t.batch_size for t in first.timings] == [1, 4]
    assert first.peak_memory_mib == 2
    assert second.timings == ()
    assert second.not_measured[0] == "batch 1, threads 1: it takes batches of 8 only"
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
    assert "| a\\|b | 1,000 | 12 MiB | 1.00 (0.990 to 1.01) | 2.00 | 3.00 |" in text
    assert "<img" not in text.replace("\\<img", "")
    assert "](bench.svg)" in text
    paths = write_benchmark(a_benchmark(rows[0]), tmp_path)
    assert [path.name for path in paths] == ["bench.json", "bench.md"]
    assert not (tmp_path / "bench.svg").exists()
    assert "](bench.svg)" not in paths[1].read_text()


def test_peak_memory_is_that_of_the_target(tmp_path):
    """Not of this process, which is larger: a child begins with the `ru_maxrss` of its parent."""
    path = save_onnx(tmp_path / "large.onnx", num_classes=40_000)
    (target,) = find_targets(str(path))
    cell = Measured(target=target, batch_size=2, num_threads=1)
    found = exporters.benchmark_report._peak_memories_mib([cell])
    weights_mib = path.stat().st_size / 2**20
    assert weights_mib < found[str(path)] < 10 * weights_mib


def test_memory_that_cannot_be_measured_is_not_guessed(world, tmp_path, monkeypatch):
    monkeypatch.setattr(exporters.benchmark_report.sys, "executable", "/bin/false")
    target = world.target("A", tmp_path, 1)
    cells = [Measured(target=target, batch_size=size, num_threads=1) for size in (8, 1)]
    assert exporters.benchmark_report._peak_memories_mib(cells) == {"A": None}
