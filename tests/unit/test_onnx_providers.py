"""What runs an ONNX file: the one that was asked for, or an error; never the CPU in its place."""

import onnx  # noqa: TID253 (makes a file)
import pytest
import torch

from compressor.errors import MissingDependencyError, UsageError, WeightsError
from compressor.file_model import load_file_model
from compressor.onnx_model import load_onnx_model
from compressor.onnx_providers import PROVIDERS
from tests.unit.benchmark_models import save_onnx
from tests.unit.pretended_providers import CPU, CUDA, TENSORRT, Pretended

EXACT = {"use_tf32": "0"}


@pytest.fixture
def path(tmp_path):
    return save_onnx(tmp_path / "m.onnx")


def test_providers_are_known():
    assert PROVIDERS == ("cpu", "cuda", "tensorrt")


@pytest.mark.parametrize(
    ("provider", "order", "runs_on"),
    [
        ("cpu", [(CPU, {})], "ONNX Runtime, CPU"),
        ("cuda", [(CUDA, EXACT), (CPU, {})], "ONNX Runtime, CUDA, CPU"),
        (
            "tensorrt",
            [(TENSORRT, {}), (CUDA, EXACT), (CPU, {})],
            "ONNX Runtime, Tensorrt, CUDA, CPU, TF32 allowed",
        ),
    ],
)
def test_the_provider_comes_first_and_others_behind_it(provider, order, runs_on, path, monkeypatch):
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    pretended = Pretended(monkeypatch)
    model = load_onnx_model(path, num_threads=1, provider=provider)
    assert pretended.asked == [order]
    assert (model.provider, model.runs_on) == (provider, runs_on)
    assert model.is_on_cpu == (provider == "cpu")
    assert model(torch.zeros(2, 3, 8, 8)).shape == (2, 4)


def test_float32_is_exact_where_the_environment_says_so(path, monkeypatch):
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    Pretended(monkeypatch)
    model = load_onnx_model(path, provider="tensorrt")
    assert model.runs_on == "ONNX Runtime, Tensorrt, CUDA, CPU"


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_what_this_onnx_runtime_lacks_is_named_with_the_package_to_install(provider, path):
    """As it is here: without a GPU."""
    with pytest.raises(MissingDependencyError) as caught:
        load_onnx_model(path, provider=provider)
    said = str(caught.value)
    assert f"--provider {provider}: ONNX Runtime" in said
    assert f"has no {CUDA if provider == 'cuda' else TENSORRT}, only " in said
    assert "pip install onnxruntime-gpu, which replaces it" in said


def test_what_is_not_there_does_not_stand_behind(path, monkeypatch):
    pretended = Pretended(monkeypatch, available=(TENSORRT, CPU))
    load_onnx_model(path, provider="tensorrt")
    assert pretended.asked == [[(TENSORRT, {}), (CPU, {})]]


@pytest.mark.parametrize(
    ("provider", "runs_on", "libraries"),
    [
        ("cuda", [CPU], "CUDA and cuDNN"),
        ("tensorrt", [CUDA, CPU], "CUDA, cuDNN and TensorRT"),
        ("tensorrt", [CPU], "CUDA, cuDNN and TensorRT"),
    ],
)
def test_a_session_that_fell_back_is_refused(provider, runs_on, libraries, path, monkeypatch):
    Pretended(monkeypatch, runs_on=runs_on)
    with pytest.raises(MissingDependencyError, match=f"would run on {runs_on[0]}") as caught:
        load_onnx_model(path, provider=provider)
    assert f"versions of {libraries} that it was made for" in str(caught.value)
    assert "pip install onnxruntime-gpu, which replaces onnxruntime" in str(caught.value)


def test_a_session_that_cannot_be_made_says_why(path, monkeypatch):
    error = RuntimeError("/src/state.cc:729 void a::Make(B&, const C&) libnvinfer is missing.\nX")
    Pretended(monkeypatch, fails=error)
    with pytest.raises(MissingDependencyError, match=r"cannot start it here \(libnvinfer is miss"):
        load_onnx_model(path, provider="tensorrt")


def test_a_file_that_nothing_can_run_is_not_blamed_on_the_provider(path, monkeypatch):
    Pretended(monkeypatch, fails=RuntimeError("no"))
    model = onnx.load(path)
    model.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(model, path)
    with pytest.raises(WeightsError, match=r"m\.onnx is damaged, or not .*NoSuchOperator"):
        load_onnx_model(path, provider="cuda")


def test_a_provider_is_passed_on_for_onnx_files_only(path, tmp_path, monkeypatch):
    Pretended(monkeypatch)
    assert load_file_model(path, num_threads=1, provider="cuda").provider == "cuda"
    with pytest.raises(UsageError, match=r"x\.engine is run by TensorRT itself"):
        load_file_model(tmp_path / "x.engine", num_threads=1, provider="cuda")
