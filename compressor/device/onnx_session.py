"""Run an ONNX file by ONNX Runtime on numpy arrays, without torch.

Goes into build kits.
N images, C channels, H and W pixels, K classes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from .kit_files import DeviceError, MissingPackageError

Array = np.ndarray[Any, Any]
_NO_FOLDER = "/external-data-is-not-allowed"
_LOG_NOTHING_BUT_FATAL = 4
_CRASHES_ON_FLOAT16 = "MatmulTransposeFusion"
"""An optimisation with which ONNX Runtime 1.31 crashes on vision transformers in float16."""
_CPU = ("CPUExecutionProvider",)
_NUMPY_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(uint8)": np.uint8,
}


class OnnxSession:
    """A classifier in an ONNX file: called with images [N, C, H, W], gives float32 logits [N, K].

    A file with a fixed batch is fed in batches of that size, the last one filled with black images.

    Attributes:
        input_dtype: of the images: float32, float16 or uint8.
        image_shape: (C, H, W) as the file fixes them; None: any.
        batch_size: None: any.
        num_classes: K.
        version: ONNX Runtime and its version.
    """

    def __init__(
        self,
        content: bytes,
        *,
        num_threads: int | None = None,
        providers: Sequence[str] = _CPU,
    ) -> None:
        """Open the content of a file that holds everything; data in further files is refused.

        Args:
            content: of the file.
            num_threads: threads of one answer; None: ONNX Runtime decides.
            providers: of execution, the first that can run a node runs it.

        Raises:
            MissingPackageError: if ONNX Runtime is not installed.
            DeviceError: if it cannot run the file, or the file is no image classifier.
        """
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingPackageError(
                f"ONNX Runtime cannot be imported ({error}): pip install onnxruntime"
            ) from None
        options = session_options(num_threads, may_be_float16=True)
        self.version = f"ONNX Runtime {onnxruntime.__version__}"
        try:
            self._session = onnxruntime.InferenceSession(
                content, options, providers=list(providers)
            )
        except Exception as error:  # noqa: BLE001 (its errors have no class in common)
            raise DeviceError(f"{self.version} refuses the file: {_first_line(error)}") from None
        self._read_tensors()

    def __call__(self, images_NCHW: Array) -> Array:
        """Logits, float32 [N, K].

        Raises:
            DeviceError: if the images have another shape or type.
        """
        size = self.batch_size or max(1, len(images_NCHW))
        starts = range(0, len(images_NCHW), size)
        parts = [self._answer(images_NCHW[k : k + size]) for k in starts]
        return np.concatenate([np.zeros((0, self.num_classes), np.float32), *parts])

    def _read_tensors(self) -> None:
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        tensors = [*inputs, *outputs]
        described = ", ".join(f"{tensor.name} {tensor.type} {tensor.shape}" for tensor in tensors)
        ranks = [len(tensor.shape) for tensor in inputs], [len(tensor.shape) for tensor in outputs]
        if ranks != ([4], [2]) or any(tensor.type not in _NUMPY_TYPES for tensor in tensors):
            raise DeviceError(
                f"the file has the tensors {described}; images [N, C, H, W] and logits [N, K] serve"
            )
        if not isinstance(outputs[0].shape[1], int):
            raise DeviceError(f"the file has the tensors {described}; K must be a number")
        sides = [side if isinstance(side, int) else None for side in inputs[0].shape]
        self._input, self.num_classes = inputs[0].name, outputs[0].shape[1]
        self.input_dtype = np.dtype(_NUMPY_TYPES[inputs[0].type])
        self.batch_size = sides[0]
        self.image_shape = (sides[1], sides[2], sides[3])

    def _answer(self, images_NCHW: Array) -> Array:
        """Logits of a batch that is not too large."""
        num_missing = (self.batch_size or len(images_NCHW)) - len(images_NCHW)
        black = np.zeros((num_missing, *images_NCHW.shape[1:]), images_NCHW.dtype)
        try:
            (logits_NK,) = self._session.run(
                None, {self._input: np.concatenate([images_NCHW, black])}
            )
        except Exception as error:  # noqa: BLE001 (its errors have no class in common)
            raise DeviceError(f"{self.version} cannot answer: {_first_line(error)}") from None
        return np.asarray(logits_NK[: len(images_NCHW)], np.float32)


def session_options(num_threads: int | None, *, may_be_float16: bool) -> Any:  # noqa: ANN401
    """How every file is opened: in silence, from one file, without what crashes.

    Raises:
        ImportError: if ONNX Runtime is not installed.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = _LOG_NOTHING_BUT_FATAL
    if num_threads is not None:
        options.intra_op_num_threads = num_threads
        options.inter_op_num_threads = 1
    # The hash covers one file, so nothing may come from others.
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", _NO_FOLDER
    )
    if may_be_float16:
        options.add_session_config_entry(
            "optimization.disable_specified_optimizers", _CRASHES_ON_FLOAT16
        )
    return options


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
