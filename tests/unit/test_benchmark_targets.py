"""What can be benchmarked, and what is said of it before anything is measured."""

import json

import pytest
import torch
from onnx import TensorProto  # noqa: TID253 (makes the files)
from safetensors.torch import save_file

from compressor.errors import (
    ArtefactMismatchError,
    MissingDependencyError,
    RecipeError,
    RobustCompressError,
    UsageError,
    WeightsError,
)
from compressor.weights import sha256_of_file
from exporters.benchmark.targets import find_targets, is_run
from tests.unit.benchmark_models import save_onnx, save_run
from tests.unit.pretended_providers import CUDA, Pretended


@pytest.fixture
def run(tmp_path):
    return save_run(tmp_path / "runs" / "mine")


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


# Runs that were distilled again


def test_a_file_made_from_other_weights_is_left_out(run):
    path = run / "exports/model.int8.onnx"
    save_onnx(path, metadata={"robust_compress.source_sha256": "0" * 64}, quantised=True)
    left_out = []
    targets = find_targets(str(run), leave_out=lambda path, why: left_out.append((path, why)))
    assert [t.name for t in targets] == ["model.safetensors", "model.fp32.onnx"]
    why = f"made from other weights than {run} holds now; export it again"
    assert left_out == [(path, why)]
    (alone,) = find_targets(str(path))
    assert alone.is_stale
    assert not any(target.is_stale for target in targets)


@pytest.mark.parametrize("known", ["no card", "no facts", "elsewhere"])
def test_what_is_not_known_is_not_stale(known, run, tmp_path):
    path = run / "exports/model.int8.onnx"
    card = {} if known == "no card" else {"robust_compress.source_sha256": "0" * 64}
    save_onnx(path, metadata=card, quantised=True)
    if known == "no facts":
        (run / "run.json").unlink()
    if known == "elsewhere":
        path = path.rename(run / "model.int8.onnx")
    (target,) = find_targets(str(path))
    assert not target.is_stale


# Build kits and bundles


def save_kit(folder, **changes):
    """As little of one as `kit.json` may say, with a file in two precisions."""
    files = [
        save_onnx(folder / "model.fp32.onnx"),
        save_onnx(folder / "model.int8.onnx", quantised=True),
    ]
    rows = [
        {
            "file": path.name,
            "sha256": sha256_of_file(path),
            "precision": path.name.split(".")[1],
            "tolerance": 0.1,
            "min_agreement": 0.9,
        }
        for path in files
    ]
    table = {"schema_version": 1, "models": rows, "build": {}, "files": {}}
    (folder / "kit.json").write_text(json.dumps(table | changes))
    return folder


def test_a_build_kit_is_its_files(tmp_path):
    kit = save_kit(tmp_path / "kit")
    save_onnx(kit / "stranger.onnx")
    targets = find_targets(str(kit))
    assert [(t.name, t.kind, t.precision) for t in targets] == [
        ("model.fp32.onnx", "onnx", "fp32"),
        ("model.int8.onnx", "onnx", "int8"),
    ]
    assert {t.folder for t in targets} == {kit}
    for target in targets:
        target.open(1)(target.images(2))
        assert [found.sha256 for found in find_targets(target.source)] == [target.sha256]


def test_a_bundle_is_the_files_of_its_kit(tmp_path):
    save_kit(tmp_path / "bundle" / "kit")
    (tmp_path / "bundle" / "manifest.json").write_text("{}")  # which is not read
    targets = find_targets(str(tmp_path / "bundle"))
    assert [t.name for t in targets] == ["model.fp32.onnx", "model.int8.onnx"]
    assert {t.folder for t in targets} == {tmp_path / "bundle"}


def test_a_file_of_a_kit_that_was_changed_is_named(tmp_path):
    kit = save_kit(tmp_path / "kit")
    save_onnx(kit / "model.int8.onnx", num_classes=5, quantised=True)
    with pytest.raises(ArtefactMismatchError, match=r"model\.int8\.onnx has SHA-256 .* names"):
        find_targets(str(kit))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda kit: (kit / "kit.json").write_text("{"), "kit.json is damaged"),
        (lambda kit: save_kit(kit, schema_version=2), "schema_version 2"),
        (lambda kit: save_kit(kit, models=[]), "names no model"),
        (lambda kit: (kit / "model.fp32.onnx").unlink(), "model.fp32.onnx does not exist"),
    ],
    ids=["damaged", "other schema", "no model", "missing"],
)
def test_a_damaged_kit_is_refused(damage, message, tmp_path):
    kit = save_kit(tmp_path / "kit")
    damage(kit)
    with pytest.raises(RobustCompressError, match=message):
        find_targets(str(kit))


def test_a_manifest_without_a_kit_is_refused(tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(RobustCompressError, match=r"kit is no build kit: it has no kit\.json"):
        find_targets(str(tmp_path))


def test_a_run_is_a_run_whatever_else_lies_in_it(run):
    (run / "manifest.json").write_text("{}")
    (run / "kit.json").write_text("{}")
    assert is_run(run)
    assert not is_run(run / "exports")
    assert len(find_targets(str(run))) == 3


# Providers


def test_a_provider_runs_the_files_of_a_run_and_not_its_network(run, monkeypatch):
    pretended = Pretended(monkeypatch)
    network, *files = find_targets(str(run), provider="cuda")
    assert (network.runs_on, network.is_on_cpu, network.provider) == ("PyTorch, CPU", True, "cpu")
    for target in files:
        assert (target.runs_on, target.is_on_cpu) == ("ONNX Runtime, CUDA, CPU", False)
        assert target.provider == "cuda"
        target.open(2)(target.images(1))
    assert [asked[0][0] for asked in pretended.asked] == [CUDA] * 4  # two of each file


def test_a_provider_that_is_not_here_is_no_cpu(run):
    with pytest.raises(MissingDependencyError, match="pip install onnxruntime-gpu"):
        find_targets(str(run), provider="cuda")
