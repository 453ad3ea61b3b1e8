"""The exported file is the same model, says what it is, and betrays no path."""

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
from compressor.threat import ThreatModel
from compressor.training_workflow import TrainingRequest, train
from exporters.held_out import HeldOut
from exporters.hops import prove_hop
from exporters.request import ExportRequest
from exporters.to_onnx import ExportError, OnnxForm, write_onnx
from exporters.workflow import as_table, export_run

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


def exported(run):
    """The float32 file."""
    return export_run(ExportRequest(run=run, settings=SETTINGS))[1][0]


def test_export_is_verified_and_described(run):
    made = exported(run)
    shown = made.verification
    assert shown.status == "verified"
    assert shown.clean_agreement.num_correct == shown.clean_agreement.num_total == 50
    assert shown.adversarial_agreement.num_correct == 50
    import onnx

    model = onnx.load(made.path)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(metadata["robust_compress.class_names"]) == [str(d) for d in range(10)]
    assert metadata["robust_compress.source_sha256"] == made.source_sha256
    assert "linf 8/255" in metadata["robust_compress.threat"]
    table = json.loads(run.onnx_verification("fp32").read_text())
    assert table["verification"]["status"] == "verified"
    assert "/" not in table["path"]


def test_export_holds_no_local_path(run):
    content = exported(run).path.read_bytes()
    for trace in (b"/home", b"/usr", b"site-packages", b".py", b'File "', str(run.path).encode()):
        assert trace not in content


def test_export_takes_any_batch_size(run):
    model = load_onnx_model(exported(run).path)
    x_NCHW = torch.rand(7, 1, 8, 8)
    singles = torch.cat([model(x[None]) for x in x_NCHW])
    assert torch.allclose(model(x_NCHW), singles, atol=1e-5)


def test_export_twice_gives_the_same_bytes(run):
    first = exported(run).path.read_bytes()
    assert exported(run).path.read_bytes() == first


def test_a_file_that_answers_otherwise_is_set_aside(run, monkeypatch):
    """Planted defect: the normalisation is lost on the way; the earlier file stays."""
    verified = exported(run)
    good = verified.path.read_bytes()

    def forget_normalisation(network, path, *, form, metadata):
        spec = NetworkSpec(architecture="tiny", num_classes=10, image_shape=form.image_shape)
        other = build_classifier(spec, seed=0)
        other.backbone.load_state_dict(network.backbone.state_dict())
        write_onnx(other, path, form=form, metadata=metadata)

    monkeypatch.setattr("exporters.workflow.write_onnx", forget_normalisation)
    with pytest.raises(ArtefactMismatchError, match="does not answer as its source") as caught:
        exported(run)
    assert caught.value.exit_code == 5
    assert run.onnx("fp32").read_bytes() == good
    assert json.loads(run.onnx_verification("fp32").read_text())["sha256"] == verified.sha256


def test_nan_answers_fail():
    held_out = make_held_out(num_images=4)
    shown = prove_hop(
        lambda x: torch.full((len(x), 3), torch.nan), held_out, variant="fp32", twin=None
    )
    assert shown.status == "failed"


def make_held_out(num_images):
    """Random images and answers of a source that needs no network."""
    generator = torch.Generator().manual_seed(0)
    x_NCHW = torch.rand(num_images, 1, 4, 4, generator=generator)

    def source(x):
        return x.flatten(1)[:, :3] * 4

    return HeldOut(
        x_NCHW=x_NCHW,
        x_adv_NCHW=x_NCHW,
        y_N=source(x_NCHW).argmax(1),
        keys_N=torch.arange(num_images),
        threat=ThreatModel(epsilon_pixels=8 / 255),
        source=source,
        clean_NK=source(x_NCHW),
        adversarial_NK=source(x_NCHW),
    )


def test_a_network_that_onnx_cannot_express_is_refused(tmp_path):
    class Odd(torch.nn.Module):
        def forward(self, x_NCHW):
            return x_NCHW if float(x_NCHW.sum()) > 3 else -x_NCHW

    form = OnnxForm(image_shape=(1, 8, 8))
    with pytest.raises(ExportError, match="cannot be written as ONNX"):
        write_onnx(Odd(), tmp_path / "odd.onnx", form=form, metadata={})
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_run_is_refused(run, tmp_path):
    folder = RunDirectory(shutil.copytree(run.path, tmp_path / "copy"))
    folder.model.unlink()
    with pytest.raises(RunError, match="has not ended"):
        exported(folder)


def test_verification_record_is_plain(run):
    table = as_table(exported(run))
    assert table["verification"]["tolerance"] > 0
    assert json.loads(json.dumps(table, allow_nan=False)) == table
