"""Devices that exist, formats that pay, and float32 that is float32."""

import pytest
import torch

from compressor.errors import DeviceError
from compressor.performance import (
    Performance,
    has_matrix_units,
    multiplies_bfloat16,
    resolve_performance,
)
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


@pytest.mark.parametrize(
    ("isa", "has_tiles", "has_products", "units", "is_fast"),
    [
        (None, True, True, True, True),
        (None, False, True, False, True),
        (None, False, False, False, False),
        ("avx512_core_amx", True, True, True, True),
        ("AVX512_CORE_BF16", True, True, False, True),
        ("AVX512_CORE_BF16", True, False, False, False),
        ("AVX512_CORE", True, True, False, False),
    ],
)
def test_products_that_are_hidden_or_missing_are_not_used(
    monkeypatch, isa, has_tiles, has_products, units, is_fast
):
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    if isa:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", isa)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_tiles)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_products)
    assert has_matrix_units(torch.device("cpu")) == units
    expected = torch.bfloat16 if is_fast else torch.float32
    assert resolve(device="cpu").training_dtype == expected


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


@pytest.mark.parametrize("local_rank", ["0", "7"])
@pytest.mark.parametrize(
    ("num_gpus", "device", "message"),
    [
        (4, "auto", "8 processes on a host with 4 CUDA devices; start at most 4"),
        (4, "cuda", "8 processes on a host with 4 CUDA devices"),
        (8, "cuda:1", "8 processes cannot share device 'cuda:1'; leave --device out"),
    ],
)
def test_every_process_refuses_gpus_that_do_not_suffice(
    monkeypatch, local_rank, num_gpus, device, message
):
    """All of them, as one that went on would wait for those that could not."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    with pytest.raises(DeviceError, match=message):
        resolve(device=device, num_threads=torch.get_num_threads())
