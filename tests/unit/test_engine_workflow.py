"""Real students in all three precisions become engines, and an export leaves a kit and engines."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from compressor.device.build_options import BuildOptions
from compressor.device.kit_files import DeviceError
from compressor.errors import ArtefactMismatchError, MissingDependencyError
from compressor.networks import NetworkSpec, build_classifier
from compressor.onnx_model import load_onnx_model
from compressor.performance_settings import PerformanceSettings
from exporters.engine.to_tensorrt import build_engine, import_tensorrt
from exporters.engine.workflow import export_engine, export_kit
from exporters.int8.to_int8 import calibrate, write_int8
from exporters.request import ExportRequest, Int8Request
from exporters.to_float16 import write_float16
from exporters.to_onnx import ExportError, OnnxForm, write_onnx
from exporters.workflow import export_run

SETTINGS = PerformanceSettings(device="cpu", training_dtype="float32", num_threads=1)


@pytest.fixture(scope="module")
def tensorrt():
    try:
        return import_tensorrt()
    except MissingDependencyError as error:
        pytest.skip(f"no TensorRT here: {error}")


@pytest.fixture(scope="module", params=[("resnet18", 0.125), ("mobilenet_v2", 0.25)])
def student_files(request, tmp_path_factory):
    """One network as fp32, fp16 and int8."""
    architecture, width = request.param
    folder = tmp_path_factory.mktemp(architecture)
    spec = NetworkSpec(
        architecture=architecture, width=width, num_classes=10, image_shape=(3, 32, 32)
    )
    files = {
        precision: folder / f"model.{precision}.onnx" for precision in ("fp32", "fp16", "int8")
    }
    form = OnnxForm(image_shape=spec.image_shape)
    write_onnx(build_classifier(spec, seed=0), files["fp32"], form=form, metadata={})
    write_float16(files["fp32"], files["fp16"], metadata={})
    images = np.random.default_rng(0).random((8, 3, 32, 32), dtype=np.float32)
    ranges = calibrate(files["fp32"], [images], method="minmax")
    write_int8(files["fp32"], files["int8"], ranges, metadata={})
    return files


@pytest.mark.tensorrt
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_engines_are_built_of_real_students(student_files, precision, tensorrt, tmp_path):
    path = tmp_path / "model.engine"
    new = build_engine(
        student_files[precision],
        path,
        precision=precision,
        options=BuildOptions(optimization_level=0),
        tensorrt=tensorrt,
    )
    assert not path.exists()
    new.write()
    facts = new.facts
    assert path.stat().st_size == facts.num_bytes > 10_000
    sidecar = json.loads(facts.sidecar.read_text())
    assert sidecar["profile"] == {"min": 1, "opt": 8, "max": 32}
    assert (sidecar["precision"], sidecar["status"]) == (precision, "unverified")


@pytest.fixture(scope="module")
def exported(tmp_path_factory, train_on_digits):
    run = train_on_digits(tmp_path_factory.mktemp("runs") / "engines", epochs=1)
    request = ExportRequest(
        run=run,
        settings=SETTINGS,
        precisions=("fp32", "fp16"),
        int8=Int8Request(kind="clean", num_images=64),
        num_images=40,
    )
    return export_run(request)


def test_the_kit_holds_what_was_exported(exported):
    prepared, made = exported
    kit = export_kit(prepared, made, options=BuildOptions(batch=(1, 2, 4)))
    assert kit == prepared.request.run.build_kit
    table = json.loads((kit / "kit.json").read_text())
    assert [model["precision"] for model in table["models"]] == ["fp32", "fp16"]
    assert table["build"]["batch"] == [1, 2, 4]
    assert table["threat"] == str(prepared.threat)


@pytest.mark.tensorrt
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU it is verified")
def test_without_a_gpu_an_engine_is_built_and_unverified(exported, tensorrt):
    prepared, made = exported
    built = export_engine(
        prepared, made[1], options=BuildOptions(optimization_level=0), tensorrt=tensorrt
    )
    assert (built.status, built.verification) == ("unverified", None)
    assert "could not be run here" in built.reason
    assert prepared.request.run.engine("fp16").is_file()


@pytest.fixture
def pretended(exported, monkeypatch):
    """Engines are built in no time, and answer as the ONNX file does, but for what is planted."""
    prepared, made = exported
    path = prepared.request.run.engine("fp16")
    onnx = load_onnx_model(made[1].path)

    class Pretended:
        change = staticmethod(lambda logits_NK: logits_NK)

        def __init__(self, plan, *, tensorrt):
            self.plan = plan

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def __call__(self, images):
            return self.change(onnx(torch.from_numpy(images))).numpy()

        def layer_information(self):
            return {}

    def write(*, shown):
        path.write_bytes(b"new plan")
        path.with_name(f"{path.name}.json").write_text(json.dumps(shown))

    new = SimpleNamespace(
        built=SimpleNamespace(plan=b"new plan"), facts=SimpleNamespace(path=path), write=write
    )
    monkeypatch.setattr("exporters.engine.workflow.build_engine", lambda *_, **__: new)
    monkeypatch.setattr("exporters.engine.workflow.Engine", Pretended)
    monkeypatch.setattr("exporters.engine.workflow.audit_layers", lambda _: {"fp16": 3})
    monkeypatch.setattr("exporters.engine.workflow.wrong_precision", lambda *_, **__: "")
    path.write_bytes(b"old plan")
    return SimpleNamespace(
        engine=Pretended,
        path=path,
        export=lambda **options: export_engine(
            prepared, made[1], options=BuildOptions(**options), tensorrt=None
        ),
    )


def test_an_engine_that_answers_as_its_file_is_verified(pretended):
    built = pretended.export()
    assert built.status == "verified"
    assert pretended.path.read_bytes() == b"new plan"
    record = json.loads(pretended.path.with_name(f"{pretended.path.name}.json").read_text())
    assert record["status"] == record["verification"]["status"] == "verified"


def test_an_engine_that_loses_something_does_not_replace_another(pretended):
    pretended.engine.change = staticmethod(lambda logits_NK: logits_NK.flip(1))
    with pytest.raises(ArtefactMismatchError, match="hop fp16 -> engine is the first that loses"):
        pretended.export()
    assert pretended.path.read_bytes() == b"old plan"


def test_an_engine_that_cannot_be_audited_is_unverified(pretended, monkeypatch):
    monkeypatch.setattr("exporters.engine.workflow.audit_layers", lambda _: {})
    built = pretended.export()
    assert (built.status, built.verification.status) == ("unverified", "unverified")
    assert "its precision is not known" in built.reason


def test_an_engine_for_another_gpu_is_unverified_and_kept(pretended, monkeypatch):
    def refuse(self, plan, *, tensorrt):
        raise DeviceError("TensorRT-RTX refuses this engine")

    monkeypatch.setattr(pretended.engine, "__init__", refuse)
    with pytest.raises(ExportError, match="refuses this engine"):
        pretended.export()
    built = pretended.export(compute_capabilities=("SM120",))
    assert (built.status, built.verification) == ("unverified", None)
    assert "could not be run here: TensorRT-RTX refuses" in built.reason
    assert pretended.path.read_bytes() == b"new plan"


def test_an_engine_that_was_not_attacked_is_unverified_and_loses_nothing(pretended, monkeypatch):
    monkeypatch.setattr("exporters.engine.workflow.twin_of", lambda *_: None)
    built = pretended.export()
    assert (built.status, built.verification.status) == ("unverified", "unverified")
    assert "no differentiable twin" in built.reason
    assert pretended.path.read_bytes() == b"new plan"
