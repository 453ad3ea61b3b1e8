"""Engines in a benchmark: never opened unless trusted, and a row with the reason where not."""

import json

import numpy as np
import pytest

import compressor.engine_model
from compressor.device.cuda import Cuda
from compressor.device.engine import Engine
from compressor.errors import ArtefactMismatchError, MissingDependencyError, WeightsError
from compressor.weights import sha256_of_file
from exporters.benchmark.measurement import Plan, measure
from exporters.benchmark.report import run_benchmark
from exporters.benchmark.targets import find_targets
from exporters.benchmark.verdicts import notes
from tests.unit.benchmark_models import save_onnx, save_run
from tests.unit.pretended_gpu import Cudart, Gpu

PLAN = Plan(batch_sizes=(1, 4), thread_counts=(1,), num_rounds=2, seconds=0.001)


def save_engine(path, *, onnx, **changes):
    """An engine of which only its sidecar is real; the hash of that."""
    path.write_bytes(b"plan of " + path.name.encode())
    table = {
        "engine": {"sha256": sha256_of_file(path)},
        "onnx": {"file": onnx.name, "sha256": sha256_of_file(onnx)},
        "tensorrt": {"flavour": "tensorrt"},
    }
    sidecar = path.with_name(f"{path.name}.json")
    sidecar.write_text(json.dumps(table | changes))
    return sha256_of_file(sidecar)


@pytest.fixture
def gpu(monkeypatch):
    """Pretends that there is one; the sizes of the batches that reach it."""
    sizes = []

    def answer(images_NCHW):
        sizes.append(len(images_NCHW))
        return np.zeros((len(images_NCHW), 4), np.float32)

    pretended = Gpu(cudart=Cudart(), answer=answer)

    def engine(plan, *, tensorrt):
        return Engine(plan, tensorrt=tensorrt, cuda=Cuda(pretended.cudart))

    monkeypatch.setattr(compressor.engine_model, "Engine", engine)
    monkeypatch.setattr(compressor.engine_model, "import_tensorrt", lambda _: pretended.tensorrt())
    return sizes


@pytest.fixture
def no_gpu(monkeypatch):
    def import_tensorrt(flavour):
        raise compressor.engine_model.MissingPackageError("tensorrt is not installed:\n  pip it")

    monkeypatch.setattr(compressor.engine_model, "import_tensorrt", import_tensorrt)


@pytest.fixture
def never(monkeypatch):
    """Fails if anything is deserialised."""

    def engine(plan, *, tensorrt):
        pytest.fail("an engine was opened")

    monkeypatch.setattr(compressor.engine_model, "Engine", engine)


@pytest.fixture
def engine(tmp_path):
    """An engine, and the hash of its sidecar."""
    path = tmp_path / "model.int8.engine"
    onnx = save_onnx(tmp_path / "model.int8.onnx", quantised=True, metadata=SOURCE)
    return path, save_engine(path, onnx=onnx)


SOURCE = {"robust_compress.source_sha256": "s" * 64}


def test_a_trusted_engine_is_run(engine, gpu):
    path, sha256 = engine
    (target,) = find_targets(str(path), trusted_sha256=["0" * 64, sha256])
    assert (target.name, target.kind, target.precision) == (path.name, "engine", "int8")
    assert (target.sha256, target.num_bytes) == (sha256_of_file(path), path.stat().st_size)
    assert (target.source_sha256, target.sidecar_sha256) == ("s" * 64, sha256)
    assert target.runs_on == "TensorRT 10.3.0, batches of 1 to 8"
    assert not target.is_on_cpu
    target.open(2)(target.images(3))
    assert gpu == [3]


@pytest.mark.parametrize("hashes", [[], ["0" * 64]])
def test_an_engine_that_nobody_vouches_for_is_not_opened(hashes, engine, never):
    path, sha256 = engine
    kind = ArtefactMismatchError if hashes else WeightsError
    said = f"has SHA-256 {sha256}, not 000" if hashes else "give the SHA-256 of .*--manifest-sha256"
    with pytest.raises(kind, match=said):
        find_targets(str(path), trusted_sha256=hashes)


def test_a_changed_engine_is_not_opened(engine, never):
    path, sha256 = engine
    path.write_bytes(b"something else")
    with pytest.raises(ArtefactMismatchError, match="its sidecar names"):
        find_targets(str(path), trusted_sha256=[sha256])


def test_an_engine_alone_needs_a_gpu(engine, no_gpu):
    path, sha256 = engine
    with pytest.raises(MissingDependencyError, match=r"int8\.engine cannot be run here: tensorrt"):
        find_targets(str(path), trusted_sha256=[sha256])


@pytest.mark.parametrize("content", ["{", "[]", "[" * 100_000, '{"engine": 1}'])
def test_a_damaged_sidecar_is_explained(content, engine, never):
    path, _ = engine
    sidecar = path.with_name(f"{path.name}.json")
    sidecar.write_text(content)
    with pytest.raises(WeightsError, match=r"engine\.json is damaged"):
        find_targets(str(path), trusted_sha256=[sha256_of_file(sidecar)])


# Engines of a run


@pytest.fixture
def run(tmp_path):
    """A run with two engines, and the hashes of their sidecars."""
    folder = save_run(tmp_path / "mine")
    exports = folder / "exports"
    hashes = [
        save_engine(exports / f"model.{name}.engine", onnx=exports / f"model.{name}.onnx")
        for name in ("fp32", "int8")
    ]
    return folder, hashes


def test_engines_of_a_run_are_rows_with_the_reason(run, never):
    folder, _ = run
    *_, first, second = find_targets(str(folder))
    assert [t.name for t in (first, second)] == ["model.fp32.engine", "model.int8.engine"]
    assert [t.precision for t in (first, second)] == ["fp32", "int8"]
    assert second.sha256 == sha256_of_file(folder / "exports/model.int8.engine")
    assert first.source_sha256 is None
    assert first.why_not == (
        "not trusted; give the SHA-256 of model.fp32.engine.json as --manifest-sha256"
    )
    cells = measure([first], PLAN)
    assert {cell.why_not for cell in cells} == {first.why_not}


def test_trust_is_for_one_engine(run, gpu):
    folder, hashes = run
    *_, first, second = find_targets(str(folder), trusted_sha256=hashes[1:])
    assert first.why_not.startswith("not trusted")
    assert (second.why_not, second.folder) == ("", folder)
    assert [cell.why_not for cell in measure([second], PLAN)] == ["", ""]
    assert set(gpu) == {1, 4}


def test_a_trusted_engine_without_a_gpu_is_a_row_too(run, no_gpu):
    folder, hashes = run
    *_, first, second = find_targets(str(folder), trusted_sha256=hashes)
    assert first.why_not == "cannot be run here: tensorrt is not installed"
    assert first.sidecar_sha256 == hashes[0]


@pytest.mark.parametrize("missing", ["sidecar", "file"])
def test_what_is_missing_beside_an_engine_is_no_crash(missing, run, gpu):
    folder, hashes = run
    ending = {"sidecar": "engine.json", "file": "onnx"}[missing]
    (folder / f"exports/model.int8.{ending}").unlink()
    *_, target = find_targets(str(folder), trusted_sha256=hashes)
    assert target.name == "model.int8.engine"
    said = {"sidecar": "not trusted", "file": r"model.int8.onnx does not exist"}[missing]
    assert said in target.why_not


def test_a_trusted_sidecar_of_another_engine_ends_it(run, never):
    folder, hashes = run
    (folder / "exports/model.int8.engine").write_bytes(b"something else")
    with pytest.raises(ArtefactMismatchError, match="its sidecar names"):
        find_targets(str(folder), trusted_sha256=hashes)


def test_an_empty_engine_is_explained(run):
    folder, _ = run
    (folder / "exports/model.int8.engine").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"model\.int8\.engine is empty; build it again"):
        find_targets(str(folder))


def test_a_benchmark_with_engines(run, gpu, monkeypatch):
    folder, hashes = run
    monkeypatch.setattr("exporters.benchmark.peak_memory._peak_kib", lambda *_, **__: 1024)
    monkeypatch.setattr("exporters.benchmark.report.gpu_name", lambda: "RTX 9000")
    targets = find_targets(str(folder), trusted_sha256=hashes[:1])
    benchmark = run_benchmark(targets, PLAN, {})
    *_, first, second = benchmark.targets
    assert [timing.batch_size for timing in first.timings] == [1, 4]
    assert (second.timings, second.not_measured) == ((), (targets[-1].why_not,))
    assert benchmark.mode["device"] == "cpu, RTX 9000"
    said = "\n".join(notes(benchmark))
    assert "Not measured: model.int8.engine, not trusted; give the SHA-256 of" in said
    assert "TensorRT 10.3.0, batches of 1 to 8: model.fp32.engine.\n" in said
    assert "Peak memory is that of the host alone; times include copies to the GPU." in said
