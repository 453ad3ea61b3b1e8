"""torch.compile for networks that are called thousands of times in one shape.

What lies between convolutions and products is bound by memory; compiled, it is passed over once.
Compiling takes up to a minute, so that it does not pay in a short run.
"""

import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn

from compressor.errors import DeviceError
from compressor.performance import Performance, has_matrix_units
from compressor.performance_settings import PerformanceSettings

_FEWEST_STEPS = 1000
"""A step of a small ResNet takes 0.1 s less."""

Network = Callable[[Tensor], Tensor]


class CompiledForOneSize:
    """`network`, compiled for batches of so many images; others go through it as it is.

    Thus the last, smaller batch of an epoch and the images of a check compile nothing anew.
    """

    def __init__(self, network: nn.Module, batch_size: int) -> None:
        self._plain, self._batch_size = network, batch_size
        self._compiled = torch.compile(network, dynamic=False)

    def __call__(self, x_NCHW: Tensor) -> Tensor:
        """What the network answers."""
        is_of_size = len(x_NCHW) == self._batch_size
        answer: Tensor = self._compiled(x_NCHW) if is_of_size else self._plain(x_NCHW)
        return answer


def compiled(network: nn.Module, performance: Performance) -> Network:
    """The network, compiled if this run compiles."""
    if performance.compiled_batch_size is None:
        return network
    return CompiledForOneSize(network, performance.compiled_batch_size)


def batch_size_to_compile(
    settings: PerformanceSettings, performance: Performance, *, batch_size: int, num_steps: int
) -> int | None:
    """Images of one batch on one rank if networks are to be compiled, else None.

    By default they are where it was measured to pay: in bfloat16 on CPUs with matrix units, in runs
    of at least 1,000 steps, if there is a compiler. With AVX512_BF16 alone it gains 4 to 10 %.

    Of `batch_size` each rank gets its part. `num_steps` are those of the whole run, so that a
    resumed run decides as it did at first.

    Raises:
        DeviceError: if it was asked for and this machine cannot compile.
    """
    if settings.compile == "off":
        return None
    is_bfloat16 = performance.training_dtype == torch.bfloat16
    pays = is_bfloat16 and has_matrix_units(performance.device) and num_steps >= _FEWEST_STEPS
    if settings.compile == "auto" and not pays:
        return None
    problem = _why_not(performance.device)
    if problem is None:
        return len(range(batch_size)[performance.ranks.part(batch_size)])
    if settings.compile == "on":
        raise DeviceError(
            f"torch.compile does not work here ({problem}); install a C++ compiler and Python's "
            "headers (Debian: g++ python3-dev), or give --compile off"
        )
    return None


def _why_not(device: torch.device) -> str | None:
    """What goes wrong when a small function is compiled; also forgets what was compiled before.

    torch counts how often the same code is compiled, whichever network it serves, and stops.
    """
    torch.compiler.reset()
    # It says that there is no CUDA, which the user knows.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    try:
        torch.compile(_small, dynamic=False)(torch.ones(64, device=device))
    except Exception as error:  # noqa: BLE001 (compilers fail in many ways)
        return str(error).strip().partition("\n")[0] or type(error).__name__
    return None


def _small(x: Tensor) -> Tensor:
    return x.relu() + 1
