"""ONNX files as functions from images to logits, run by ONNX Runtime.

The one place of the core that knows an inference runtime, imported when a file is opened.
N images, C channels, H and W pixels, K classes.
"""

import hashlib
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from compressor.device.onnx_session import session_options
from compressor.errors import MissingDependencyError, WeightsError
from compressor.onnx_graph import parse
from compressor.onnx_limits import MAX_FILE_BYTES, holds_float16, refuse_unreasonable
from compressor.onnx_providers import (
    Provider,
    described,
    not_started,
    providers_for,
    refuse_other_provider,
)

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, NodeArg, SessionOptions

_FLOATS, _BYTES = "tensor(float)", "tensor(uint8)"


@dataclass(frozen=True, kw_only=True)
class OnnxModel:
    """A loaded file; called as a function from images to logits, without gradient."""

    path: Path
    sha256: str
    num_bytes: int
    num_classes: int
    input_name: str
    takes_bytes: bool
    """Pixels are uint8 from 0 to 255 instead of float32 from 0 to 1."""
    batch_size: int | None
    """None: any."""
    image_shape: tuple[int | None, int | None, int | None]
    """(C, H, W) as the file fixes them; None: any."""
    metadata: dict[str, str] = field(repr=False)
    content: bytes = field(repr=False, compare=False)
    """The file, as hashed."""
    provider: Provider = "cpu"
    session: "InferenceSession" = field(repr=False, compare=False)

    @property
    def runs_on(self) -> str:
        """The runtime and its providers, the first of which runs every node that it can."""
        return f"ONNX Runtime, {described(self.session.get_providers())}"

    @property
    def is_on_cpu(self) -> bool:
        """Whether no GPU has a part in the answers."""
        return self.provider == "cpu"

    def __call__(self, x_NCHW: Tensor) -> Tensor:
        """Logits, float32 [N, K] on the device of the images, which may be of any float type.

        A file with a fixed batch size is fed in batches of that size, the last one padded. One that
        takes bytes gets the nearest ones.

        Raises:
            WeightsError: if the file is made for images of another shape, or does not give the
                logits that it declares.
        """
        self.check_image_shape(tuple(x_NCHW.shape[1:]))
        images_NCHW = x_NCHW.detach().to("cpu", torch.float32)
        if self.takes_bytes:
            images_NCHW = as_bytes(images_NCHW)
        if len(images_NCHW) == 0:
            return torch.zeros(0, self.num_classes, device=x_NCHW.device)
        batches = torch.split(images_NCHW, self.batch_size or len(images_NCHW))
        logits_NK = torch.cat([self._answer(batch_NCHW) for batch_NCHW in batches])
        return logits_NK.to(x_NCHW.device)

    def check_image_shape(self, image_shape: tuple[int, ...]) -> None:
        """Refuse images that the file cannot take.

        Raises:
            WeightsError: if `image_shape` (C, H, W) is not what the file fixes.
        """
        pairs = zip(self.image_shape, image_shape, strict=False)
        if len(image_shape) != 3 or any(want not in (None, have) for want, have in pairs):
            wanted = "x".join("any" if side is None else str(side) for side in self.image_shape)
            raise WeightsError(
                f"{self.path} takes images of {wanted} (channels, height, width), not "
                f"{'x'.join(map(str, image_shape))}; resize them, or export it for this size"
            )

    def _answer(self, x_NCHW: Tensor) -> Tensor:
        num_images = len(x_NCHW)
        if self.batch_size is not None:
            x_NCHW = F.pad(x_NCHW, (0, 0, 0, 0, 0, 0, 0, self.batch_size - num_images))
        try:
            (logits_NK,) = self.session.run(None, {self.input_name: x_NCHW.numpy()})
        except Exception as error:  # ONNX Runtime's errors have no class in common
            raise WeightsError(
                f"{self.path} cannot be run on {len(x_NCHW)} images of "
                f"{'x'.join(map(str, x_NCHW.shape[1:]))} ({_first_line(error)}); "
                "export it again"
            ) from None
        if logits_NK.shape != (len(x_NCHW), self.num_classes):
            raise WeightsError(
                f"{self.path} declares one row of {self.num_classes} logits per image, and answers "
                f"{len(x_NCHW)} images by an array of {'x'.join(map(str, logits_NK.shape))}; "
                "export it again"
            )
        return torch.from_numpy(logits_NK)[:num_images]


def as_bytes(x_NCHW: Tensor) -> Tensor:
    """Images in [0, 1] as the nearest uint8 from 0 to 255."""
    return (x_NCHW * 255).round().clamp(0, 255).to(torch.uint8)


def load_onnx_model(
    path: Path, num_threads: int | None = None, provider: Provider = "cpu"
) -> OnnxModel:
    """Open an ONNX file.

    Args:
        path: one file that holds everything; data in further files is refused.
        num_threads: threads of one answer; None: ONNX Runtime decides.
        provider: what runs it; nothing takes its place, but for nodes that it has no code for.

    Raises:
        WeightsError: if the file is missing, damaged, keeps data elsewhere, asks for what no
            classifier needs, or is not a map from float32 or uint8 [N, C, H, W] to float32 [N, K].
        MissingDependencyError: if ONNX Runtime or the provider is not here.
    """
    content = _read(path)
    model = parse(content, path)
    refuse_unreasonable(model, path)
    options = _session_options(path, num_threads, is_float16=holds_float16(model))
    session = _open_session(path, content, options, provider)
    inputs, outputs = session.get_inputs(), session.get_outputs()
    _check_input(path, inputs)
    _check_output(path, outputs)
    batch, *image_shape = (side if isinstance(side, int) else None for side in inputs[0].shape)
    return OnnxModel(
        path=path,
        sha256=hashlib.sha256(content).hexdigest(),
        num_bytes=len(content),
        num_classes=outputs[0].shape[1],
        input_name=inputs[0].name,
        takes_bytes=inputs[0].type == _BYTES,
        batch_size=batch,
        image_shape=(image_shape[0], image_shape[1], image_shape[2]),
        metadata=dict(session.get_modelmeta().custom_metadata_map),
        content=content,
        provider=provider,
        session=session,
    )


def _read(path: Path) -> bytes:
    try:
        facts = path.stat()
        if not stat.S_ISDIR(facts.st_mode) and not stat.S_ISREG(facts.st_mode):
            raise WeightsError(f"{path} cannot be read: it is no file but a device or a pipe")
        if facts.st_size > MAX_FILE_BYTES:
            raise WeightsError(
                f"{path} has {facts.st_size:,} bytes, and an ONNX file ends at "
                f"{MAX_FILE_BYTES:,}; give an ONNX file"
            )
        content = path.read_bytes()
    except FileNotFoundError:
        raise WeightsError(f"{path} does not exist; check the path") from None
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}") from None
    if not content:
        raise WeightsError(f"{path} is empty; copy or export it again")
    return content


def _open_session(
    path: Path, content: bytes, options: "SessionOptions", provider: Provider
) -> "InferenceSession":
    import onnxruntime

    runtime = f"ONNX Runtime {onnxruntime.__version__}"
    order = providers_for(provider, onnxruntime.get_available_providers(), runtime=runtime)
    try:
        session = onnxruntime.InferenceSession(
            content,
            options,
            providers=order,
            enable_fallback=0,  # or it prints, and goes on with the CPU, even between two answers
        )
    except Exception as error:  # ONNX Runtime's errors have no class in common
        text = _first_line(error)
        if provider != "cpu":
            _open_session(path, content, options, "cpu")  # which blames the file, if it must
            raise not_started(provider, text, runtime=runtime) from None
        if "external data" in text.lower():
            raise WeightsError(
                f"{path} keeps its weights in another file; export it as one file: "
                "torch.onnx.export(..., external_data=False)"
            ) from None
        raise WeightsError(
            f"{path} is damaged, or not an ONNX file that {runtime} can run ({text}); copy or "
            "export it again"
        ) from None
    refuse_other_provider(provider, session.get_providers(), runtime=runtime)
    return session


def _session_options(path: Path, num_threads: int | None, *, is_float16: bool) -> "SessionOptions":
    try:
        return session_options(num_threads, may_be_float16=is_float16)
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"reading {path} needs ONNX Runtime: pip install onnxruntime"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _check_input(path: Path, inputs: "list[NodeArg]") -> None:
    described = ", ".join(f"{arg.name} {arg.type} {arg.shape}" for arg in inputs) or "none"
    is_known = len(inputs) == 1 and inputs[0].type in {_FLOATS, _BYTES}
    is_known = is_known and 0 not in inputs[0].shape
    if not is_known or len(inputs[0].shape) != 4:
        raise WeightsError(
            f"{path} must have one input of float32 or uint8 [N, C, H, W], and has: {described}; "
            "export it again with images as its only input"
        )


def _check_output(path: Path, outputs: "list[NodeArg]") -> None:
    described = ", ".join(f"{arg.name} {arg.type} {arg.shape}" for arg in outputs)
    is_one = len(outputs) == 1 and outputs[0].type == _FLOATS
    shape = outputs[0].shape if is_one else []
    if len(shape) != 2 or not isinstance(shape[1], int) or shape[1] < 1:
        raise WeightsError(
            f"{path} must have one output of float32 [N, K] with a fixed number of classes K, and "
            f"has: {described}; export it again with logits as its only output"
        )
