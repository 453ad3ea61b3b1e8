"""A pretended CUDA runtime and TensorRT, to run `Engine` without a GPU.

Memory of the GPU is memory of the host that nobody else knows of. Copies and runs are done when the
stream is waited for, not before, so that a forgotten wait shows.
"""
# ruff: noqa: N802 (the names of the CUDA runtime)

import ctypes
import json
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from compressor.device.tensorrt_runtime import TensorRT

FLOAT, HALF, UINT8, BF16 = "FLOAT", "HALF", "UINT8", "BF16"
NUMPY_TYPES = {FLOAT: np.float32, HALF: np.float16, UINT8: np.uint8}
VERSION = "10.3.0"
IMAGE_SHAPE, NUM_CLASSES = (3, 8, 8), 4


class Cudart:
    """`library` of `compressor.device.cuda.Cuda`; `codes` are what named calls return."""

    def __init__(self, *, count=1, **codes):
        self.count, self.codes = count, codes
        self.memory, self.queue, self.streams = {}, [], set()

    def cudaGetDeviceCount(self, count):
        count._obj.value = self.count
        return self.codes.get("cudaGetDeviceCount", 0)

    def cudaGetErrorString(self, code):
        return b"something is wrong"

    def cudaMalloc(self, address, num_bytes):
        block = (ctypes.c_char * num_bytes)()
        address._obj.value = ctypes.addressof(block)
        self.memory[ctypes.addressof(block)] = block
        return self.codes.get("cudaMalloc", 0)

    def cudaFree(self, address):
        return 0 if self.memory.pop(address, None) is not None else 17

    def cudaStreamCreateWithFlags(self, stream, flags):
        assert flags == 1  # it does not wait for the default stream
        stream._obj.value = 7000 + len(self.streams)
        self.streams.add(stream._obj.value)
        return 0

    def cudaStreamDestroy(self, stream):
        self.streams.remove(stream)
        return 0

    def cudaMemcpyAsync(self, to, source, num_bytes, kind, stream):
        on_gpu = {1: to, 2: source}[kind]
        assert num_bytes <= len(self.memory[on_gpu])
        self.queue.append((stream, lambda: ctypes.memmove(to, source, num_bytes)))
        return 0

    def cudaStreamSynchronize(self, stream):
        for queued_on, work in self.queue:
            assert queued_on == stream
            work()
        self.queue.clear()
        return self.codes.get("cudaStreamSynchronize", 0)

    def array(self, address, shape, dtype):
        block = self.memory[address]
        return np.frombuffer(block, dtype=dtype, count=int(np.prod(shape))).reshape(shape)


@dataclass(frozen=True, kw_only=True, eq=False)
class Gpu:
    """What an engine runs on and how it answers."""

    cudart: Cudart
    answer: Any
    """From the images of a batch, as they reach the GPU, to logits."""
    profile: tuple[int, int, int] = (1, 4, 8)
    static: int | None = None
    dtype: str = FLOAT
    refuses: tuple[str, ...] = ()
    """Calls that fail."""
    layers: str = "{}"
    """What the inspector says."""

    def tensorrt(self):
        """A `TensorRT` whose every plan is an engine that answers so, but for one."""
        module = ModuleType("pretended")
        module.ILogger = Logger
        module.Runtime = lambda logger: Runtime(self, logger)
        module.TensorIOMode = SimpleNamespace(INPUT="INPUT", OUTPUT="OUTPUT")
        module.DataType = SimpleNamespace(FLOAT=FLOAT, HALF=HALF, UINT8=UINT8)
        module.LayerInformationFormat = SimpleNamespace(JSON="JSON")
        return TensorRT(module=module, flavour="tensorrt", version=VERSION)


class Logger:
    pass


class Runtime:
    engine_host_code_allowed = False

    def __init__(self, gpu, logger):
        self.gpu, self.logger = gpu, logger

    def deserialize_cuda_engine(self, plan):
        assert not self.engine_host_code_allowed
        if plan == b"of another version":
            self.logger.log(SimpleNamespace(name="ERROR"), "the version does not match")
            return None
        return DeviceEngine(self.gpu)


class DeviceEngine:
    num_io_tensors = 2

    def __init__(self, gpu):
        self.gpu = gpu

    def get_tensor_name(self, place):
        return ["logits", "images"][place]

    def get_tensor_mode(self, name):
        return {"images": "INPUT", "logits": "OUTPUT"}[name]

    def get_tensor_shape(self, name):
        return (self.gpu.static or -1, *(IMAGE_SHAPE if name == "images" else (NUM_CLASSES,)))

    def get_tensor_dtype(self, name):
        return self.gpu.dtype if name == "images" else FLOAT

    def get_tensor_profile_shape(self, name, place):
        return [(size, *IMAGE_SHAPE) for size in self.gpu.profile]

    def create_execution_context(self):
        return None if "create_execution_context" in self.gpu.refuses else Context(self.gpu)

    def create_engine_inspector(self):
        return Inspector(self.gpu)


class Context:
    def __init__(self, gpu):
        self.gpu, self.addresses, self.shape = gpu, {}, None

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return "set_tensor_address" not in self.gpu.refuses

    def set_input_shape(self, name, shape):
        self.shape = tuple(shape)
        low, high = self.gpu.profile[0], self.gpu.profile[2]
        if self.gpu.static:
            low = high = self.gpu.static
        return low <= shape[0] <= high and "set_input_shape" not in self.gpu.refuses

    def infer_shapes(self):
        return []

    def execute_async_v3(self, stream):
        gpu, shape = self.gpu, self.shape
        images = gpu.cudart.array(self.addresses["images"], shape, NUMPY_TYPES[gpu.dtype])
        logits = gpu.cudart.array(self.addresses["logits"], (shape[0], NUM_CLASSES), np.float32)

        def work():
            logits[:] = gpu.answer(images)

        gpu.cudart.queue.append((stream, work))
        return "execute_async_v3" not in gpu.refuses


class Inspector:
    execution_context = None

    def __init__(self, gpu):
        self.gpu = gpu

    def get_engine_information(self, form):
        assert form == "JSON"
        assert isinstance(self.execution_context, Context)
        return self.gpu.layers


def layers_json(*kinds):
    """What an inspector says of convolutions in these types."""
    return json.dumps(
        {
            "Layers": [
                {
                    "Name": f"conv{place}",
                    "LayerType": "CaskConvolution",
                    "Inputs": [{"Name": "x", "Format/Datatype": f"Row major linear {kind} format"}],
                    "Outputs": [],
                }
                for place, kind in enumerate(kinds)
            ],
            "Bindings": ["images", "logits"],
        }
    )
