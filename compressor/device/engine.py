"""Run a TensorRT engine on numpy arrays, and see in which precision its layers run.

Goes into build kits.
N images, C channels, H and W pixels, K classes.

An engine is a program: give only plans to `Engine` whose hash somebody trusted has vouched for.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import numpy as np

from .cuda import Cuda
from .kit_files import DeviceError
from .tensorrt_runtime import TensorRT, errors_of, logger_of

Array = np.ndarray[Any, Any]


class Engine:
    """A classifier in an engine: called with images [N, C, H, W], it gives float32 logits [N, K].

    Batches above the largest of the profile are split, smaller ones than its smallest are filled
    with black images whose answers are dropped. Not for several threads at a time.

    Attributes:
        input_dtype: of the images: float32, float16 or uint8.
        image_shape: (C, H, W).
        min_batch: the smallest batch of the profile.
        max_batch: the largest batch of the profile.
        num_classes: K.
    """

    def __init__(self, plan: bytes, *, tensorrt: TensorRT, cuda: Cuda | None = None) -> None:
        """Deserialise `plan`, which runs code in it, and take memory for the largest batch.

        Raises:
            MissingPackageError: if there is no usable GPU.
            DeviceError: if TensorRT refuses the plan, or it is no image classifier.
        """
        trt = tensorrt.module
        self._trt, self._cuda = trt, cuda or Cuda()
        logger, self._log = logger_of(trt)
        with self._log.recording() as messages:
            self._runtime = _present(trt.Runtime(logger), "a runtime", messages)
            # engine_host_code_allowed stays False: no host code out of a file.
            engine = self._runtime.deserialize_cuda_engine(plan)
            if engine is None:
                raise DeviceError(
                    f"{tensorrt} refuses this engine: {errors_of(messages)}. Engines fit one "
                    "version and one kind of GPU: build it here with build_engine.py"
                )
            self._engine = engine
            self._context = _present(engine.create_execution_context(), "a context", messages)
        self._read_tensors()
        self._stream = self._cuda.create_stream()
        self._addresses = {
            self._input: self._cuda.allocate(self._new_images(self.max_batch).nbytes),
            self._output: self._cuda.allocate(self._new_logits(self.max_batch).nbytes),
        }
        for name, address in self._addresses.items():
            if not self._context.set_tensor_address(name, address):
                raise DeviceError(f"TensorRT refuses the memory for {name}")

    def __call__(self, images_NCHW: Array) -> Array:
        """Logits, float32 [N, K].

        Raises:
            DeviceError: if the images have another shape or type, or the GPU fails.
        """
        if images_NCHW.shape[1:] != self.image_shape or images_NCHW.dtype != self.input_dtype:
            raise DeviceError(
                f"the engine takes {self.input_dtype} images of {self.image_shape}, and these are "
                f"{images_NCHW.dtype} {images_NCHW.shape[1:]}"
            )
        starts = range(0, len(images_NCHW), self.max_batch)
        parts = [self._answer(images_NCHW[k : k + self.max_batch]) for k in starts]
        return np.concatenate([np.zeros((0, self.num_classes), np.float32), *parts])

    def layer_information(self) -> str:
        """What the inspector says about the layers, as JSON."""
        engine = self._engine
        inspector = engine.create_engine_inspector()
        inspector.execution_context = self._context
        return str(inspector.get_engine_information(self._trt.LayerInformationFormat.JSON))

    def close(self) -> None:
        """Give back the memory of the GPU; the engine cannot be called again."""
        for address in self._addresses.values():
            self._cuda.free(address)
        self._addresses = {}
        self._cuda.destroy_stream(self._stream)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(
        self,
        kind: "type[BaseException] | None",
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _read_tensors(self) -> None:
        """The names, types and shapes of the one input and the one output."""
        trt, engine = self._trt, self._engine
        names = [engine.get_tensor_name(place) for place in range(engine.num_io_tensors)]
        modes = [engine.get_tensor_mode(name) for name in names]
        shapes = {name: tuple(engine.get_tensor_shape(name)) for name in names}
        if len(names) != 2 or modes.count(trt.TensorIOMode.INPUT) != 1:
            raise DeviceError(f"the engine has the tensors {names}; one input and one output serve")
        self._input = names[modes.index(trt.TensorIOMode.INPUT)]
        self._output = names[modes.index(trt.TensorIOMode.OUTPUT)]
        batch, *image_shape = shapes[self._input]
        if len(image_shape) != 3 or len(shapes[self._output]) != 2:
            raise DeviceError(f"the engine has tensors of {shapes}; it is no image classifier")
        self.image_shape = tuple(image_shape)
        self.num_classes = shapes[self._output][1]
        self.min_batch = self.max_batch = batch
        if batch < 0:
            low, _, high = engine.get_tensor_profile_shape(self._input, 0)
            self.min_batch, self.max_batch = low[0], high[0]
        self.input_dtype = self._dtype(self._input)
        self._output_dtype = self._dtype(self._output)

    def _dtype(self, name: str) -> "np.dtype[Any]":
        trt, engine = self._trt, self._engine
        known = (
            (trt.DataType.FLOAT, np.float32),
            (trt.DataType.HALF, np.float16),
            (trt.DataType.UINT8, np.uint8),
        )
        found = engine.get_tensor_dtype(name)
        for dtype, numpy_type in known:
            if found == dtype:
                return np.dtype(numpy_type)
        raise DeviceError(f"{name} is of type {found}; float32, float16 and uint8 serve")

    def _new_images(self, num_images: int) -> Array:
        return np.zeros((num_images, *self.image_shape), self.input_dtype)

    def _new_logits(self, num_images: int) -> Array:
        return np.zeros((num_images, self.num_classes), self._output_dtype)

    def _answer(self, images_NCHW: Array) -> Array:
        """Logits of a batch that is not too large."""
        filled_NCHW = self._new_images(max(len(images_NCHW), self.min_batch))
        filled_NCHW[: len(images_NCHW)] = images_NCHW
        logits_NK = self._new_logits(len(filled_NCHW))
        context, stream = self._context, self._stream
        with self._log.recording() as messages:
            is_set = context.set_input_shape(self._input, filled_NCHW.shape)
            if not is_set or context.infer_shapes():
                raise DeviceError(
                    f"a batch of {len(filled_NCHW)} is refused: {errors_of(messages)}"
                )
            self._cuda.copy_in(self._addresses[self._input], filled_NCHW, stream)
            if not context.execute_async_v3(stream):
                raise DeviceError(f"the engine cannot be run: {errors_of(messages)}")
            self._cuda.copy_out(logits_NK, self._addresses[self._output], stream)
            self._cuda.wait(stream)
        return logits_NK[: len(images_NCHW)].astype(np.float32)


def _present(made: Any, what: str, messages: list[tuple[str, str]]) -> Any:  # noqa: ANN401
    if made is None:
        raise DeviceError(f"TensorRT cannot make {what}: {errors_of(messages)}")
    return made


_MOVES = re.compile(r"reformat|noop|constant|shuffle|cast|quantize|shape|copy|signal|wait", re.I)
_MULTIPLIES = re.compile(
    r"conv(?!ert)|gemm|matmul|matrixmultiply|fullyconnected|dense|correlation", re.I
)
_NARROW_FIRST = {
    "int4": r"\bint4\b",
    "fp8": r"\bfp8|e4m3|e5m2",
    "int8": r"\bint8\b|i8i8|i8f32|imma",
    "bf16": r"bf16|bfloat16",
    "fp16": r"(?<!b)fp16|\bhalf\b|(?<!b)f16f16|h884|h1688|h16816",
    "tf32": r"tf32",
    "fp32": r"fp32|\bfloat\b|\bf32",
}


def audit_layers(inspected: str) -> dict[str, int]:
    """How many layers run in each type, from the inspector's JSON of TensorRT 10 or 11.

    The type of a layer is the narrowest among its inputs, its weights and its kernel's name. Where
    layers that multiply can be told apart, only these count, since a lone conversion from int8
    computes nothing in int8; layers that only move or convert values never count.

    Returns:
        From fp32, tf32, fp16, bf16, int8, fp8, int4 and "unknown" to a count; empty where the
        engine holds no details of its layers.
    """
    try:
        layers = list(json.loads(inspected)["Layers"])
    except (ValueError, KeyError, TypeError):
        return {}
    rows = [layer for layer in layers if isinstance(layer, dict)]
    if len(rows) < len(layers):
        return {}
    computing = [row for row in rows if not _MOVES.search(str(row.get("LayerType", "")))]
    multiplying = [row for row in computing if _MULTIPLIES.search(_kind(row))]
    return dict(Counter(_type_of(row) for row in multiplying or computing))


def wrong_precision(layers: Mapping[str, int], precision: str, *, tf32: bool) -> str | None:
    """Why the types found are not those of `precision`; None if they are.

    Args:
        layers: of `audit_layers`.
        precision: fp32, fp16 or int8, or one of these with a suffix after a hyphen.
        tf32: whether tf32 was asked for, which passes as fp32 then.
    """
    asked, found = precision.partition("-")[0], _listed(layers)
    allowed = {"fp32", "tf32"} if asked == "fp32" and tf32 else {asked}
    if not allowed & set(layers):
        return f"{asked} was asked for, and no layer runs in it: {found}"
    num_known = sum(layers.values()) - layers.get("unknown", 0)
    keeps_float = precision.endswith("-mixed")  # as many as its robustness needed
    if not keeps_float and 2 * sum(layers.get(name, 0) for name in allowed) < num_known:
        return f"{asked} was asked for, and most layers do not run in it: {found}"
    if asked == "fp32" and not set(layers) <= allowed | {"unknown"}:
        return f"fp32 was asked for, and there are layers in other types: {found}"
    return None


def _listed(layers: Mapping[str, int]) -> str:
    return ", ".join(f"{count} in {name}" for name, count in sorted(layers.items())) or "no layers"


def _kind(row: Mapping[str, Any]) -> str:
    return " ".join(str(row.get(key, "")) for key in ("LayerType", "ParameterType", "TacticName"))


def _type_of(row: Mapping[str, Any]) -> str:
    """TensorRT 10 has `Format/Datatype`, 11 splits it; fused kernels tell it in their names."""
    tensors = [tensor for tensor in row.get("Inputs") or [] if isinstance(tensor, dict)]
    weights = row.get("Weights")
    texts = [str(tensor.get(key, "")) for tensor in tensors for key in tensor if "ype" in key]
    texts += [str(tensor.get("Format", "")) for tensor in tensors]
    texts += [str(weights.get("Type", ""))] if isinstance(weights, dict) else []
    texts += [str(row.get("TacticName", ""))]
    for name, pattern in _NARROW_FIRST.items():
        if any(re.search(pattern, text, re.I) for text in texts):
            return name
    return "unknown"
