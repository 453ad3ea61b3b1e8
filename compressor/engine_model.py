"""TensorRT engines as functions from images to logits.

An engine is a program: it is run only if whoever asks names the hash of its sidecar, which names
that of the engine. The ONNX file that it was built from lies beside it and says what it takes.
N images, C channels, H and W pixels, K classes.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from compressor.device.engine import Engine
from compressor.device.kit_files import (
    MAX_MODEL_BYTES,
    DeviceError,
    MissingPackageError,
    read_limited,
    sha256_of,
)
from compressor.device.tensorrt_runtime import import_tensorrt
from compressor.errors import ArtefactMismatchError, MissingDependencyError, WeightsError
from compressor.onnx_model import OnnxModel, as_bytes, load_onnx_model

MAX_SIDECAR_BYTES = 1 << 20
"""More than any of ours, and less than the memory."""


@dataclass(frozen=True, kw_only=True)
class EngineModel:
    """A deserialised engine; called as a function from images to logits, without gradient."""

    path: Path
    sha256: str
    num_bytes: int
    onnx: OnnxModel
    """What it was built from: its shapes, its model card, its differentiable form."""
    tensorrt: str
    """Which runs it, with its version."""
    engine: Engine = field(repr=False, compare=False)

    @property
    def runs_on(self) -> str:
        """The runtime, and the batches that it takes at once."""
        return f"{self.tensorrt}, batches of {self.engine.min_batch} to {self.engine.max_batch}"

    @property
    def is_on_cpu(self) -> bool:
        """No: there are no engines for the CPU."""
        return False

    @property
    def num_classes(self) -> int:
        """K."""
        return self.onnx.num_classes

    @property
    def takes_bytes(self) -> bool:
        """Pixels are uint8 from 0 to 255 instead of float32 from 0 to 1."""
        return self.onnx.takes_bytes

    @property
    def metadata(self) -> dict[str, str]:
        """The model card of the ONNX file."""
        return self.onnx.metadata

    @property
    def content(self) -> bytes:
        """The ONNX file, from which a differentiable form is made."""
        return self.onnx.content

    def __call__(self, x_NCHW: Tensor) -> Tensor:
        """Logits, float32 [N, K] on the device of the images, which may be of any float type.

        Raises:
            WeightsError: if the images have another shape, or the GPU fails.
        """
        self.check_image_shape(tuple(x_NCHW.shape[1:]))
        images_NCHW = x_NCHW.detach().to("cpu", torch.float32)
        if self.takes_bytes:
            images_NCHW = as_bytes(images_NCHW)
        with _explained(self.path):
            logits_NK = self.engine(images_NCHW.contiguous().numpy())
        return torch.from_numpy(logits_NK).to(x_NCHW.device)

    def check_image_shape(self, image_shape: tuple[int, ...]) -> None:
        """Refuse images that the engine cannot take.

        Raises:
            WeightsError: if `image_shape` (C, H, W) is not what the file fixes.
        """
        self.onnx.check_image_shape(image_shape)


def sidecar_of(path: Path) -> Path:
    """The file beside an engine that says what it is."""
    return path.with_name(f"{path.name}.json")


def load_engine_model(path: Path, *, sidecar_sha256: str | None) -> EngineModel:
    """Open an engine.

    Args:
        path: the engine; its sidecar, PATH.json, and the ONNX file that it names lie beside it.
        sidecar_sha256: of the sidecar, from a place that is trusted.

    Raises:
        WeightsError: if no hash is given, a file is missing or damaged, or TensorRT refuses it.
        ArtefactMismatchError: if a file is not the one that was meant.
        MissingDependencyError: if TensorRT or a GPU is not here.
    """
    if sidecar_sha256 is None:
        raise WeightsError(
            f"{path} is a program, and a hash beside it is no reason to trust it; give the SHA-256 "
            f"of {sidecar_of(path).name} with --manifest-sha256, from where it was built, or build "
            "it again: robust-compress export RUN --trt"
        )
    with _explained(path):
        named = _read_sidecar(sidecar_of(path), sha256=sidecar_sha256)
        plan = read_limited(path, max_bytes=MAX_MODEL_BYTES)
        if sha256_of(plan) != named.engine_sha256:
            raise ArtefactMismatchError(
                f"{path} has SHA-256 {sha256_of(plan)}, its sidecar names {named.engine_sha256}; "
                "build it again"
            )
        onnx = load_onnx_model(path.parent / Path(named.onnx_file).name)
        if onnx.sha256 != named.onnx_sha256:
            raise ArtefactMismatchError(
                f"{onnx.path} is not the file that {path} was built from; build it again"
            )
        tensorrt = import_tensorrt(named.flavour)
        engine = Engine(plan, tensorrt=tensorrt)
    return EngineModel(
        path=path,
        sha256=named.engine_sha256,
        num_bytes=len(plan),
        onnx=onnx,
        tensorrt=str(tensorrt),
        engine=engine,
    )


@dataclass(frozen=True, kw_only=True)
class _Sidecar:
    """What it says of the engine, of the file that this was built from, and of TensorRT."""

    engine_sha256: str
    onnx_file: str
    onnx_sha256: str
    flavour: str


def _read_sidecar(path: Path, *, sha256: str) -> _Sidecar:
    content = read_limited(path, max_bytes=MAX_SIDECAR_BYTES)
    if sha256_of(content) != sha256.lower():
        raise ArtefactMismatchError(f"{path} has SHA-256 {sha256_of(content)}, not {sha256}")
    try:
        facts = json.loads(content)  # what was hashed, whatever lies there now
        return _Sidecar(
            engine_sha256=str(facts["engine"]["sha256"]),
            onnx_file=str(facts["onnx"]["file"]),
            onnx_sha256=str(facts["onnx"]["sha256"]),
            flavour=str(facts["tensorrt"]["flavour"]),
        )
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is damaged ({error}); build it again") from None


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Errors of `compressor.device`, which stands alone, as the errors of this package."""
    try:
        yield
    except MissingPackageError as error:
        raise MissingDependencyError(f"{path} cannot be run here: {error}") from None
    except DeviceError as error:
        raise WeightsError(str(error)) from None
