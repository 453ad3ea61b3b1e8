"""Devices that exist, formats that pay, and float32 that is float32."""

import pytest
import torch

from compressor.errors import DeviceError
from compressor.performance import Performance, multiplies_bfloat16, resolve_performance
from compressor.performance_settings import PerformanceSettings


def resolve(**settings):
    return resolve_performance(PerformanceSettings(**settings))


def test_cpu_and_formats_as_asked():
    found = resolve(device="cpu", training_dtype="float32")
    assert found == Performance(device=torch.device("cpu"), training_dtype=torch.float32)
    assert resolve(device="cpu", training_dtype="bfloat16").training_dtype == torch.bfloat16


def test_auto_takes_bfloat16_where_it_pays():
    found = resolve(device="cpu")
    pays = multiplies_bfloat16(torch.device("cpu"))
    assert found.training_dtype == (torch.bfloat16 if pays else torch.float32)


def test_hidden_matrix_units_are_not_used(monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")
    assert resolve(device="cpu").training_dtype == torch.float32


@pytest.mark.parametrize(
    ("device", "said"), [("cuda", "sees no CUDA device"), ("gpu", "use auto, cpu, cuda or cuda:N")]
)
def test_absent_device_is_refused(device, said, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match=said) as caught:
        resolve(device=device)
    assert repr(device) in str(caught.value)


def test_float32_is_not_tf32():
    torch.backends.cudnn.allow_tf32 = True  # as PyTorch has it by default
    resolve(device="cpu")
    assert not torch.backends.cudnn.allow_tf32
    for operation in (torch.backends.cuda.matmul, torch.backends.mkldnn.conv):
        assert operation.fp32_precision == "ieee"


def test_short_float32_from_the_environment_is_refused(monkeypatch):
    monkeypatch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", "BF16")
    with pytest.raises(DeviceError, match="unset it"):
        resolve(device="cpu")


def test_number_of_threads_is_obeyed():
    before = torch.get_num_threads()
    try:
        resolve(device="cpu", num_threads=2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_autocast_only_in_bfloat16():
    x = torch.ones(2, 2)
    for dtype in (torch.float32, torch.bfloat16):
        with Performance(device=torch.device("cpu"), training_dtype=dtype).autocast():
            assert (x @ x).dtype == dtype
