"""ONNX files as functions from images to logits, run by ONNX Runtime.

The one place of the core that knows an inference runtime, imported when a file is opened.
N images, C channels, H and W pixels, K classes.
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from compressor.errors import MissingDependencyError, WeightsError

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, NodeArg

_NO_FOLDER = "/external-data-is-not-allowed"
_LOG_NOTHING_BUT_FATAL = 4


@dataclass(frozen=True, kw_only=True)
class OnnxModel:
    """A loaded file; called as a function from images to logits, without gradient."""

    path: Path
    sha256: str
    num_bytes: int
    num_classes: int
    input_name: str
    batch_size: int | None
    """None: any."""
    image_shape: tuple[int | None, int | None, int | None]
    """(C, H, W) as the file fixes them; None: any."""
    metadata: dict[str, str] = field(repr=False)
    session: "InferenceSession" = field(repr=False, compare=False)

    def __call__(self, x_NCHW: Tensor) -> Tensor:
        """Logits, float32 [N, K] on the device of the images, which may be of any float type.

        A file with a fixed batch size is fed in batches of that size, the last one padded.

        Raises:
            WeightsError: if the file is made for images of another shape.
        """
        self.check_image_shape(tuple(x_NCHW.shape[1:]))
        images_NCHW = x_NCHW.detach().to("cpu", torch.float32)
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
        (logits_NK,) = self.session.run(None, {self.input_name: x_NCHW.numpy()})
        return torch.from_numpy(logits_NK)[:num_images]


def load_onnx_model(path: Path, num_threads: int | None = None) -> OnnxModel:
    """Open an ONNX file on the CPU.

    Args:
        path: one file that holds everything; data in further files is refused.
        num_threads: threads of one answer; None: ONNX Runtime decides.

    Raises:
        WeightsError: if the file is missing, damaged, keeps data elsewhere, or is not a map
            from float32 [N, C, H, W] to float32 [N, K].
        MissingDependencyError: if ONNX Runtime is not installed.
    """
    content = _read(path)
    session = _open_session(path, content, num_threads)
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
        batch_size=batch,
        image_shape=(image_shape[0], image_shape[1], image_shape[2]),
        metadata=dict(session.get_modelmeta().custom_metadata_map),
        session=session,
    )


def _read(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise WeightsError(f"{path} does not exist; check the path") from None
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}") from None
    if not content:
        raise WeightsError(f"{path} is empty; copy or export it again")
    return content


def _open_session(path: Path, content: bytes, num_threads: int | None) -> "InferenceSession":
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"reading {path} needs ONNX Runtime: pip install onnxruntime"
        ) from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _LOG_NOTHING_BUT_FATAL
    if num_threads is not None:
        options.intra_op_num_threads = num_threads
        options.inter_op_num_threads = 1
    # The hash covers one file, so nothing may come from others.
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", _NO_FOLDER
    )
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's errors have no class in common
        text = str(error).partition("\n")[0]
        if "external data" in text.lower():
            raise WeightsError(
                f"{path} keeps its weights in another file; export it as one file: "
                "torch.onnx.export(..., external_data=False)"
            ) from None
        raise WeightsError(
            f"{path} is damaged, or not an ONNX file that ONNX Runtime "
            f"{onnxruntime.__version__} can run ({text}); copy or export it again"
        ) from None


def _check_input(path: Path, inputs: "list[NodeArg]") -> None:
    described = ", ".join(f"{arg.name} {arg.type} {arg.shape}" for arg in inputs) or "none"
    if len(inputs) != 1 or inputs[0].type != "tensor(float)" or len(inputs[0].shape) != 4:
        raise WeightsError(
            f"{path} must have one input of float32 [N, C, H, W], and has: {described}; export it "
            "again with images as its only input"
        )


def _check_output(path: Path, outputs: "list[NodeArg]") -> None:
    described = ", ".join(f"{arg.name} {arg.type} {arg.shape}" for arg in outputs)
    is_one = len(outputs) == 1 and outputs[0].type == "tensor(float)"
    if not is_one or len(outputs[0].shape) != 2 or not isinstance(outputs[0].shape[1], int):
        raise WeightsError(
            f"{path} must have one output of float32 [N, K] with a fixed number of classes K, and "
            f"has: {described}; export it again with logits as its only output"
        )
