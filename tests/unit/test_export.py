"""The exported file is the same model, says what it is, and betrays no path."""

import dataclasses
import json
import shutil

import pytest
import torch

from compressor.errors import ArtefactMismatchError, RunError
from compressor.networks import NetworkSpec, build_classifier
from compressor.onnx_model import load_onnx_model
from compressor.performance_settings import PerformanceSettings
from compressor.recipe_file import parse_recipe
from compressor.run_directory import RunDirectory
from compressor.training_workflow import TrainingRequest, train
from exporters.to_onnx import ExportError, write_onnx
from exporters.workflow import export_run

SETTINGS = PerformanceSettings(device="cpu", training_dtype="float32")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> RunDirectory:
    table = {
        "name": "exported",
        "data": {"source": "digits", "validation_size": 100},
        "student": {"architecture": "tiny", "mean": [0.3], "std": [0.4]},
        "method": {"name": "cross_entropy"},
        "training": {"epochs": 1, "batch_size": 300},
        "selection": {"num_steps": 1},
    }
    out = tmp_path_factory.mktemp("runs") / "exported"
    return train(parse_recipe(table, origin="test"), TrainingRequest(out=out, settings=SETTINGS))


def test_export_is_verified_and_described(run):
    exported = export_run(run, settings=SETTINGS)
    shown = exported.verification
    assert shown.status == "verified"
    assert shown.clean_agreement.num_correct == shown.clean_agreement.num_total == 100
    assert shown.adversarial_agreement.num_correct == 100
    import onnx

    model = onnx.load(exported.path)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(metadata["robust_compress.class_names"]) == [str(d) for d in range(10)]
    assert metadata["robust_compress.source_sha256"] == exported.source_sha256
    assert "linf 8/255" in metadata["robust_compress.threat"]
    table = json.loads(run.onnx_verification("fp32").read_text())
    assert table["verification"]["status"] == "verified"
    assert "/" not in table["path"]


def test_export_holds_no_local_path(run):
    content = export_run(run, settings=SETTINGS).path.read_bytes()
    for trace in (b"/home", b"/usr", b"site-packages", b".py", b'File "', str(run.path).encode()):
        assert trace not in content


def test_export_takes_any_batch_size(run):
    model = load_onnx_model(export_run(run, settings=SETTINGS).path)
    x_NCHW = torch.rand(7, 1, 8, 8)
    singles = torch.cat([model(x[None]) for x in x_NCHW])
    assert torch.allclose(model(x_NCHW), singles, atol=1e-5)


def test_export_twice_gives_the_same_bytes(run):
    first = export_run(run, settings=SETTINGS).path.read_bytes()
    assert export_run(run, settings=SETTINGS).path.read_bytes() == first


def test_a_file_that_answers_otherwise_is_set_aside(run, monkeypatch):
    """Planted defect: the normalisation is lost on the way; the earlier file stays."""
    verified = export_run(run, settings=SETTINGS)
    good = verified.path.read_bytes()

    def forget_normalisation(network, path, *, image_shape, metadata):
        spec = NetworkSpec(architecture="tiny", num_classes=10, image_shape=image_shape)
        other = build_classifier(spec, seed=0)
        other.backbone.load_state_dict(network.backbone.state_dict())
        write_onnx(other, path, image_shape=image_shape, metadata=metadata)

    monkeypatch.setattr("exporters.workflow.write_onnx", forget_normalisation)
    with pytest.raises(ArtefactMismatchError, match="does not answer as its source") as caught:
        export_run(run, settings=SETTINGS)
    assert caught.value.exit_code == 5
    assert run.onnx("fp32").read_bytes() == good
    assert json.loads(run.onnx_verification("fp32").read_text())["sha256"] == verified.sha256


def test_nan_answers_fail():
    from exporters.verify import _compare

    source = torch.randn(2, 4, 3)
    shown = _compare(source, torch.full_like(source, torch.nan))
    assert shown.status == "failed"


def test_a_network_that_onnx_cannot_express_is_refused(tmp_path):
    class Odd(torch.nn.Module):
        def forward(self, x_NCHW):
            return x_NCHW if float(x_NCHW.sum()) > 3 else -x_NCHW

    with pytest.raises(ExportError, match="cannot be written as ONNX"):
        write_onnx(Odd(), tmp_path / "odd.onnx", image_shape=(1, 8, 8), metadata={})
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_run_is_refused(run, tmp_path):
    folder = RunDirectory(shutil.copytree(run.path, tmp_path / "copy"))
    folder.model.unlink()
    with pytest.raises(RunError, match="has not ended"):
        export_run(folder, settings=SETTINGS)


def test_verification_record_is_plain(run):
    exported = export_run(run, settings=SETTINGS)
    assert dataclasses.asdict(exported)["verification"]["tolerance"] > 0
