"""Memory that ended: how it shows, and which setting to change."""

import sys

from compressor.errors import DeviceError

LESS_FOR_TRAINING = (
    "lower training.batch_size (and raise training.accumulate_batches), or --memory-mib so that "
    "images are streamed"
)
_NUM_SENTENCES = 3
"""Of what torch says: what was asked for, and what there is. Then it explains its allocator."""
_WORDS = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
"""Of a RuntimeError; torch has no class for these."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory of a GPU or main memory ended; imports no torch."""
    if isinstance(error, MemoryError):
        return True
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)


def what_was_said(error: Exception) -> str:
    """The beginning of the message, in one line."""
    first = str(error).strip().partition("\n")[0] or type(error).__name__
    return ". ".join(first.split(". ")[:_NUM_SENTENCES]).rstrip(".")


def device_error(error: Exception) -> DeviceError:
    """The same for the user of any command."""
    return DeviceError(
        f"memory ended ({what_was_said(error)}); in training {LESS_FOR_TRAINING}; `verify` takes "
        "less with a smaller --batch-size, `bench` with smaller --batch-sizes. `robust-compress "
        "plan` says before a run what it needs"
    )
