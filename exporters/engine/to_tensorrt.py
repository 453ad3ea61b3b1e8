"""From an ONNX file to a TensorRT engine and its sidecar; unverified until somebody runs it."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.device import tensorrt_runtime
from compressor.device.build_engine import sidecar_of, write_engine_files
from compressor.device.build_options import BuildOptions
from compressor.device.build_progress import PhaseEvent
from compressor.device.builder import BuiltEngine, build
from compressor.device.kit_files import (
    MAX_MODEL_BYTES,
    DeviceError,
    MismatchError,
    MissingPackageError,
    read_limited,
    sha256_of,
    write_atomically,
)
from compressor.device.tensorrt_runtime import TensorRT
from compressor.errors import ArtefactMismatchError, MissingDependencyError
from exporters.to_onnx import ExportError

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, TensorProto

_EXTRA = "  or, as a part of robust-compress: pip install 'robust-compress[tensorrt-rtx]'"


@dataclass(frozen=True, kw_only=True)
class EngineFacts:
    """An engine that was built."""

    path: Path
    sidecar: Path
    sha256: str
    onnx_sha256: str
    num_bytes: int
    precision: str
    flavour: str
    """tensorrt or tensorrt-rtx."""
    version: str
    batch: tuple[int, int, int]
    """Smallest, usual and largest."""
    gpu: str | None
    """None: built without one."""
    build_seconds: float
    warnings: tuple[str, ...]


def import_tensorrt(flavour: str | None = None) -> TensorRT:
    """TensorRT, or TensorRT-RTX where that is the one here: the module, its flavour and version.

    Args:
        flavour: tensorrt or tensorrt-rtx; None: the first that can be imported.

    Raises:
        MissingDependencyError: if none can; it says what to install, or which library is missing.
    """
    with device_errors_explained():
        return tensorrt_runtime.import_tensorrt(flavour)


@contextmanager
def device_errors_explained() -> Iterator[None]:
    """Errors of `compressor.device`, which stands alone, as the errors of this package."""
    try:
        yield
    except MissingPackageError as error:
        extra = f"\n{_EXTRA}" if "tensorrt-rtx" in str(error) else ""
        raise MissingDependencyError(f"{error}{extra}") from None
    except MismatchError as error:
        raise ArtefactMismatchError(str(error)) from None
    except DeviceError as error:
        raise ExportError(str(error)) from None


@dataclass(frozen=True, kw_only=True, eq=False)
class NewEngine:
    """An engine in memory, so that it can be tried before it replaces another."""

    facts: EngineFacts
    built: BuiltEngine
    sidecar: Mapping[str, Any]

    def write(self, *, shown: Mapping[str, Any] | None = None) -> None:
        """Write it to `facts.path` and its sidecar beside it, each as a whole or not at all.

        Args:
            shown: further entries of the sidecar.
        """
        self.facts.path.parent.mkdir(parents=True, exist_ok=True)
        write_engine_files(self.facts.path, self.built, {**self.sidecar, **(shown or {})})


def build_engine(
    onnx_path: Path,
    path: Path,
    *,
    precision: str,
    options: BuildOptions,
    tensorrt: TensorRT | None = None,
    timing_cache: Path | None = None,
    observe: Callable[[PhaseEvent], None] | None = None,
    cancel: threading.Event | None = None,
) -> NewEngine:
    """Build the engine of an ONNX file.

    Args:
        onnx_path: one file that holds everything; its graph decides on the precision.
        path: where it will be written.
        precision: what the graph is, for the record.
        options: how it is built.
        tensorrt: of `import_tensorrt`; None: the first that can be imported.
        timing_cache: a file that is read if it is there, and written after; RTX uses none.
        observe: hears how far it is, one call at a time, from other threads.
        cancel: when it is set, the build ends at its next step.

    Raises:
        MissingDependencyError: if TensorRT is not here.
        ExportError: if the file, the options or the machine do not allow it.
    """
    onnx_bytes, _ = read_checked_onnx(onnx_path)
    with device_errors_explained():
        built = build(
            onnx_bytes,
            options,
            tensorrt=tensorrt,
            timing_cache=_read_cache(timing_cache),
            observe=observe,
            cancel=cancel,
        )
    if timing_cache is not None and built.timing_cache is not None:
        write_atomically(timing_cache, built.timing_cache)
    onnx_sha256 = sha256_of(onnx_bytes)
    return NewEngine(
        facts=_facts_of(built, path=path, onnx_sha256=onnx_sha256, precision=precision),
        built=built,
        sidecar=sidecar_of(
            built,
            engine_file=path.name,
            onnx_file=onnx_path.name,
            onnx_sha256=onnx_sha256,
            precision=precision,
        ),
    )


def _read_cache(path: Path | None) -> bytes:
    if path is None or not path.exists():
        return b""
    return read_limited(path, max_bytes=MAX_MODEL_BYTES)


def _facts_of(built: BuiltEngine, *, path: Path, onnx_sha256: str, precision: str) -> EngineFacts:
    return EngineFacts(
        path=path,
        sidecar=path.with_name(f"{path.name}.json"),
        sha256=sha256_of(built.plan),
        onnx_sha256=onnx_sha256,
        num_bytes=len(built.plan),
        precision=precision,
        flavour=built.tensorrt.flavour,
        version=built.tensorrt.version,
        batch=built.batch,
        gpu=built.gpu,
        build_seconds=built.build_seconds,
        warnings=built.warnings,
    )


def read_checked_onnx(path: Path) -> "tuple[bytes, ModelProto]":
    """An ONNX file that onnx.checker accepts, holds everything, and whose weights are numbers.

    Raises:
        ExportError: if it is missing, too large, damaged, of a later opset, keeps data in further
            files, or holds NaN.
    """
    import onnx  # heavy; only needed here

    with device_errors_explained():
        content = read_limited(path, max_bytes=MAX_MODEL_BYTES)
    try:
        model = onnx.load_model_from_string(content)
    except Exception as error:  # protobuf's errors have no class in common
        raise ExportError(
            f"{path} is damaged, or no ONNX file ({error}); export it again"
        ) from None
    tensors = list(_tensors(model.graph))
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in tensors):
        raise ExportError(
            f"{path} keeps its weights in another file; export it as one file: "
            "torch.onnx.export(..., external_data=False)"
        )
    newest = onnx.defs.onnx_opset_version()
    if any(
        entry.version > newest for entry in model.opset_import if entry.domain in ("", "ai.onnx")
    ):
        raise ExportError(
            f"{path} is of a later opset than {newest}, the newest known to onnx here"
        )
    try:
        onnx.checker.check_model(model, full_check=True)
        broken = [tensor.name for tensor in tensors if _holds_nan(tensor)]
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError) as error:
        text = str(error).strip().partition("\n")[0]
        raise ExportError(f"{path} is refused by onnx.checker: {text}; export it again") from None
    if broken:
        raise ExportError(f"{path} holds weights that are not numbers: {', '.join(broken[:3])}")
    return content, model


def _tensors(graph: "GraphProto") -> "Iterator[TensorProto]":
    """All constants, also those of attributes and of graphs within the graph."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for attribute in node.attribute:
            yield from ([attribute.t] if attribute.HasField("t") else [])
            yield from attribute.tensors
            for inner in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
                yield from _tensors(inner)


def _holds_nan(tensor: "TensorProto") -> bool:
    import onnx

    if tensor.data_type not in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16):
        return False
    values = onnx.numpy_helper.to_array(tensor)
    return bool((values != values).any())
