"""Memory of an NVIDIA GPU for numpy arrays, through ctypes: no torch, no pycuda, no cuda-python.

Goes into build kits.
"""

import ctypes
import sys
from pathlib import Path
from typing import Any

import numpy as np

from .kit_files import DeviceError, MissingPackageError


class Cuda:
    """The few calls of the CUDA runtime that an engine needs.

    Raises:
        MissingPackageError: if the library or a usable GPU is not here.
    """

    def __init__(self, library: Any = None) -> None:  # noqa: ANN401 (a ctypes library)
        self._library = library or _load_cudart()
        count = ctypes.c_int()
        code = self._library.cudaGetDeviceCount(ctypes.byref(count))
        if code or not count.value:
            raise MissingPackageError(
                f"there is no usable NVIDIA GPU: {self._text(code) if code else 'none was found'}"
            )

    def allocate(self, num_bytes: int) -> int:
        """The address of new memory on the GPU."""
        address = ctypes.c_void_p()
        self._check("cudaMalloc", self._library.cudaMalloc(ctypes.byref(address), num_bytes))
        return int(address.value or 0)

    def free(self, address: int) -> None:
        """Give memory back."""
        self._check("cudaFree", self._library.cudaFree(address))

    def create_stream(self) -> int:
        """The handle of a stream that does not wait for the default one."""
        stream = ctypes.c_void_p()
        non_blocking = 1
        code = self._library.cudaStreamCreateWithFlags(ctypes.byref(stream), non_blocking)
        self._check("cudaStreamCreateWithFlags", code)
        return int(stream.value or 0)

    def destroy_stream(self, stream: int) -> None:
        """Give a stream back."""
        self._check("cudaStreamDestroy", self._library.cudaStreamDestroy(stream))

    def copy_in(self, address: int, array: "np.ndarray[Any, Any]", stream: int) -> None:
        """Copy a contiguous array to the GPU; it must live until `wait`."""
        self._copy(address, array.ctypes.data, array.nbytes, kind=1, stream=stream)

    def copy_out(self, array: "np.ndarray[Any, Any]", address: int, stream: int) -> None:
        """Fill a contiguous array from the GPU; it holds the values after `wait`."""
        self._copy(array.ctypes.data, address, array.nbytes, kind=2, stream=stream)

    def wait(self, stream: int) -> None:
        """Until all is done that was asked of the stream."""
        self._check("cudaStreamSynchronize", self._library.cudaStreamSynchronize(stream))

    def _copy(self, to: int, source: int, num_bytes: int, *, kind: int, stream: int) -> None:
        code = self._library.cudaMemcpyAsync(to, source, num_bytes, kind, stream)
        self._check("cudaMemcpyAsync", code)

    def _check(self, call: str, code: int) -> None:
        if code:
            raise DeviceError(f"{call} failed: {self._text(code)}")

    def _text(self, code: int) -> str:
        text = self._library.cudaGetErrorString(code)
        return f"{text.decode() if text else 'unknown error'} (CUDA error {code})"


def _load_cudart() -> Any:  # noqa: ANN401 (a ctypes library)
    """By name, as TensorRT may have loaded it, or from the package nvidia-cuda-runtime."""
    names = ["libcudart.so.13", "libcudart.so.12", "libcudart.so"]
    names += ["/usr/local/cuda/lib64/libcudart.so"]
    folders = [Path(entry) / "nvidia" for entry in sys.path if entry]
    packaged = [str(path) for folder in folders for path in folder.glob("*/lib/libcudart.so.*")]
    for name in [*names, *packaged]:
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        library.cudaGetErrorString.argtypes = [number]
        library.cudaGetErrorString.restype = ctypes.c_char_p
        library.cudaMalloc.argtypes = [pointer, size]
        library.cudaFree.argtypes = [pointer]
        library.cudaMemcpyAsync.argtypes = [pointer, pointer, size, number, pointer]
        library.cudaStreamCreateWithFlags.argtypes = [pointer, ctypes.c_uint]
        library.cudaStreamSynchronize.argtypes = [pointer]
        library.cudaStreamDestroy.argtypes = [pointer]
        return library
    raise MissingPackageError(
        "the CUDA runtime (libcudart) is not here: it comes with JetPack and with the CUDA "
        "toolkit; otherwise: pip install nvidia-cuda-runtime"
    )


def gpu_name() -> str | None:
    """The name of the first GPU as the driver tells it; None where there is none."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, name = ctypes.c_int(), ctypes.create_string_buffer(256)
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        return None
    if driver.cuDeviceGetName(name, len(name), device):
        return None
    return name.value.decode(errors="replace")
