"""From `PerformanceSettings` to a device and a number format that exist on this machine.

Nothing here changes what is computed, only how fast and with how many bits while training;
verification is always float32.
"""

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from compressor.allocator import keep_freed_memory
from compressor.errors import DeviceError
from compressor.performance_settings import PerformanceSettings
from compressor.ranks import ALONE, Ranks, num_ranks_here_of_environment


@dataclass(frozen=True, kw_only=True)
class Performance:
    """Where, in which format and with whom a run computes."""

    device: torch.device
    training_dtype: torch.dtype = torch.float32
    ranks: Ranks = ALONE
    """The processes that share the work."""
    compiled_batch_size: int | None = None
    """Images of a batch for which networks are compiled; None: they are not."""

    def autocast(self) -> AbstractContextManager[object]:
        """Mixed precision for the forward passes of training; nothing in float32."""
        if self.training_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.training_dtype)

    @property
    def is_bfloat16_on_cpu(self) -> bool:
        """Whether training multiplies in bfloat16 on a CPU, in whose order of work it matters."""
        return self.device.type == "cpu" and self.training_dtype == torch.bfloat16

    def place_network(self, network: nn.Module) -> nn.Module:
        """The same module on the device, its 4-D weights in the layout convolutions like."""
        return network.to(device=self.device).to(memory_format=torch.channels_last)


def resolve_performance(settings: PerformanceSettings) -> Performance:
    """Choose device and format, and set the number of threads of this process.

    Float32 is made to mean float32 in this process: by default PyTorch convolves in TF32, with 10
    bits instead of 23, on GPUs.

    Raises:
        DeviceError: if the device that was asked for is not there, or float32 is something else.
    """
    _insist_on_float32()
    keep_freed_memory()
    num_ranks_here = num_ranks_here_of_environment()
    if settings.num_threads is not None:
        torch.set_num_threads(settings.num_threads)
    elif num_ranks_here > 1:  # torchrun leaves each of them one thread
        torch.set_num_threads(max(1, num_usable_cores() // num_ranks_here))
    device = _resolve_device(settings.device)
    if settings.training_dtype == "auto":
        fast = multiplies_bfloat16(device)
        return Performance(device=device, training_dtype=torch.bfloat16 if fast else torch.float32)
    return Performance(device=device, training_dtype=getattr(torch, settings.training_dtype))


def num_usable_cores() -> int:
    """Those that this process may use, which in a container are not all there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products are faster than float32 here.

    They are on Ampere and later GPUs, and on CPUs with AMX or with AVX512_BF16, where a pass of a
    network takes half the time (AMD Zen 5).
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    if device.type != "cpu":
        return False
    hidden = _allowed_isa() not in _ISAS_WITH_AMX | _ISAS_WITH_BFLOAT16
    is_there = torch.cpu._is_avx512_bf16_supported()  # noqa: SLF001 (no public name yet)
    return has_matrix_units(device) or (is_there and not hidden)


def has_matrix_units(device: torch.device) -> bool:
    """Whether this is a CPU that multiplies whole tiles of bfloat16 (AMX)."""
    is_there = device.type == "cpu" and torch.cpu._is_amx_tile_supported()  # noqa: SLF001 (as above)
    return is_there and _allowed_isa() in _ISAS_WITH_AMX


_ISAS_WITH_AMX = {"ALL", "DEFAULT", "AVX512_CORE_AMX", "AVX512_CORE_AMX_FP16", "AVX10_1_512_AMX"}
_ISAS_WITH_BFLOAT16 = {"AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX10_1_512"}


def _allowed_isa() -> str:
    """Instructions that `ONEDNN_MAX_CPU_ISA` leaves to oneDNN, in which PyTorch convolves."""
    return os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper()


def _insist_on_float32() -> None:
    backends = torch.backends
    backends.cudnn.allow_tf32 = False  # torch.export refuses the newer name of this one
    for operation in (
        backends.cuda.matmul,
        backends.mkldnn.conv,  # type: ignore[attr-defined]
        backends.mkldnn.matmul,  # type: ignore[attr-defined]
    ):
        operation.fp32_precision = "ieee"
    mode = os.environ.get("ONEDNN_DEFAULT_FPMATH_MODE", "STRICT")
    if mode.upper() != "STRICT":
        raise DeviceError(
            f"ONEDNN_DEFAULT_FPMATH_MODE={mode} makes oneDNN compute float32 in fewer bits, so no "
            "number would be a float32 result; unset it (training uses bfloat16 without it)"
        )


def _resolve_device(name: str) -> torch.device:
    device = _found_device(name)
    if device.type == "cuda":
        _refuse_shared_gpus(name)
        torch.cuda.set_device(device)  # or whoever names none opens the first one too
    return device


def _refuse_shared_gpus(name: str) -> None:
    """The same on all processes of a host, so that none waits for one that could not begin."""
    num_here, num_gpus = num_ranks_here_of_environment(), torch.cuda.device_count()
    if num_here > num_gpus:
        raise DeviceError(
            f"{num_here} processes on a host with {num_gpus} CUDA devices; start at most "
            f"{num_gpus} (--nproc, or torchrun --nproc-per-node), or give --device cpu"
        )
    if num_here > 1 and name not in {"auto", "cuda"}:
        raise DeviceError(
            f"{num_here} processes cannot share device {name!r}; leave --device out, and each "
            "takes one of its own"
        )


def _found_device(name: str) -> torch.device:
    own_gpu = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    if name == "auto":
        return torch.device(own_gpu if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(own_gpu if name == "cuda" else name)
        if device.type not in {"cpu", "cuda"}:
            raise RuntimeError(name)
    except RuntimeError:
        raise DeviceError(f"device {name!r} is not known; use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise DeviceError(
            f"device {name!r} was asked for, but PyTorch {torch.__version__} sees no CUDA device; "
            "use --device cpu, or run `robust-compress doctor`"
        )
    is_own = name in {"auto", "cuda"}
    if device.type == "cuda" and not is_own and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(f"device {name!r} is not there: {torch.cuda.device_count()} CUDA devices")
    return device
