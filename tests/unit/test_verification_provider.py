"""A file verified on another provider of ONNX Runtime: recorded, and never mixed with the CPU."""

import pytest

from compressor.errors import MissingDependencyError, UsageError
from compressor.networks import NetworkSpec, build_classifier, save_classifier
from compressor.performance_settings import PerformanceSettings
from compressor.verification.request import VerificationRequest, prepare
from compressor.verification.target import open_target
from tests.unit.benchmark_models import save_onnx
from tests.unit.pretended_providers import CPU, Pretended

SETTINGS = PerformanceSettings(device="cpu", training_dtype="float32", num_threads=1)


@pytest.fixture
def file(tmp_path):
    return save_onnx(tmp_path / "m.onnx", size=(1, 8, 8), num_classes=10)


@pytest.fixture
def weights(tmp_path):
    spec = NetworkSpec(architecture="tiny", width=0.5, num_classes=10, image_shape=(1, 8, 8))
    path = tmp_path / "model.safetensors"
    save_classifier(path, build_classifier(spec, seed=0), spec, {})
    return path


@pytest.fixture
def request_of(file, tmp_path):
    def request_of(**changes):
        values = {"target": str(file), "data_source": "digits", "num_images": 10}
        values |= {"settings": SETTINGS, "folder": tmp_path, "epsilon_pixels": 8 / 255}
        return VerificationRequest(**(values | changes))

    return request_of


def test_the_environment_says_what_ran_the_file(weights, request_of, monkeypatch):
    assert prepare(request_of()).environment()["file_runs_on"] == "ONNX Runtime, CPU"
    of_weights = prepare(request_of(target=str(weights))).environment()
    assert "file_runs_on" not in of_weights
    assert of_weights["device"] == "cpu"
    Pretended(monkeypatch)
    prepared = prepare(request_of(provider="cuda"))
    assert prepared.environment()["file_runs_on"] == "ONNX Runtime, CUDA, CPU"


def test_a_report_of_another_provider_replaces_none_of_the_cpu(request_of, monkeypatch):
    Pretended(monkeypatch)
    names = [
        prepare(request_of(provider=provider)).files.json.name
        for provider in ("cpu", "cuda", "tensorrt")
    ]
    assert names == ["report-10.json", "report-10-cuda.json", "report-10-tensorrt.json"]


def test_what_was_begun_on_one_provider_goes_on_with_no_other(request_of, monkeypatch, tmp_path):
    Pretended(monkeypatch)
    for provider in ("cpu", "cuda", "tensorrt", "cpu"):
        prepare(request_of(provider=provider)).journal()
    assert len(list(tmp_path.glob(".verification-*"))) == 3


def test_the_file_is_opened_on_the_provider(file, monkeypatch):
    Pretended(monkeypatch)
    target = open_target(str(file), source=None, provider="tensorrt")
    assert target.file.provider == "tensorrt"


def test_a_provider_that_is_not_here_is_no_cpu(request_of, monkeypatch):
    with pytest.raises(MissingDependencyError, match="has no CUDAExecutionProvider"):
        prepare(request_of(provider="cuda"))
    Pretended(monkeypatch, runs_on=[CPU])
    with pytest.raises(MissingDependencyError, match="would run on CPUExecutionProvider"):
        prepare(request_of(provider="cuda"))


def test_a_provider_is_for_files_only(weights, tmp_path):
    for path in (weights, tmp_path):
        with pytest.raises(UsageError, match=f"--provider is for exported files; {path} is not"):
            open_target(str(path), source=None, provider="cuda")
