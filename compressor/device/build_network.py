"""From the bytes of an ONNX file to a network of TensorRT that is surely an image classifier.

Goes into build kits. N images, C channels, H and W pixels, K classes.
"""

from dataclasses import dataclass
from types import ModuleType
from typing import Any

from .build_options import DEFAULT_BATCH, BuildError
from .tensorrt_runtime import TensorRT

_NO_FOLDER = "/external-data-is-not-allowed/model.onnx"
"""Without a path, TensorRT reads weights that lie in further files from the current folder."""


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """The input or the output of a network."""

    name: str
    dtype: str
    """float32, float16 or uint8."""
    shape: tuple[int, ...]
    """[N, C, H, W] or [N, K]; N is -1 if any batch within the profile is taken."""


def parse_onnx(onnx_bytes: bytes, network: Any, *, tensorrt: TensorRT, logger: Any) -> None:  # noqa: ANN401 (classes of TensorRT)
    """Fill `network` with an ONNX file that holds everything.

    Raises:
        BuildError: if TensorRT cannot read it; it names the nodes.
    """
    trt = tensorrt.module
    parser = trt.OnnxParser(network, logger)
    if parser.parse(onnx_bytes, _NO_FOLDER) and network.num_layers:
        return
    errors = [parser.get_error(place) for place in range(parser.num_errors)]
    said = [f"{_node(error)}{' '.join(error.desc().split())}" for error in errors]
    text = "; ".join(dict.fromkeys(said)) or "it holds no graph"
    if "convertOnnxWeights" in text:
        text += " (weights in further files are not read: export it as one file)"
    raise BuildError(f"{tensorrt} cannot read this ONNX file: {text}")


def _node(error: Any) -> str:  # noqa: ANN401 (a class of TensorRT)
    operator = error.node_operator()
    return f"node {error.node_name() or 'without a name'} ({operator}): " if operator else ""


def images_and_logits(trt: ModuleType, network: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    """The one input and the one output.

    Raises:
        BuildError: if there are others, or they are not images [N, C, H, W] of one size and logits
            [N, K].
    """
    inputs = [_tensor(trt, network.get_input(place)) for place in range(network.num_inputs)]
    outputs = [_tensor(trt, network.get_output(place)) for place in range(network.num_outputs)]
    tensors = [*inputs, *outputs]
    described = ", ".join(f"{one.name} {one.dtype} {list(one.shape)}" for one in tensors)
    ranks = [len(one.shape) for one in inputs], [len(one.shape) for one in outputs]
    if ranks != ([4], [2]):
        raise BuildError(
            f"the ONNX file has the inputs and outputs {described}; images [N, C, H, W] as the "
            "only input and logits [N, K] as the only output can be built"
        )
    if any(side < 0 for one in tensors for side in one.shape[1:]):
        raise BuildError(f"{described}: only the batch may be open; export it for one image size")
    allowed = {"float32", "float16", "uint8"}
    if inputs[0].dtype not in allowed or outputs[0].dtype not in allowed - {"uint8"}:
        raise BuildError(
            f"{described}: images must be float32, float16 or uint8, and logits of a float type"
        )
    return inputs[0], outputs[0]


def _tensor(trt: ModuleType, tensor: Any) -> Tensor:  # noqa: ANN401 (a class of TensorRT)
    names = {
        trt.DataType.FLOAT: "float32",
        trt.DataType.HALF: "float16",
        trt.DataType.UINT8: "uint8",
    }
    dtype = names.get(tensor.dtype, str(tensor.dtype))
    return Tensor(name=tensor.name, dtype=dtype, shape=tuple(tensor.shape))


def batch_of(images: Tensor, wanted: tuple[int, int, int] | None) -> tuple[int, int, int]:
    """Smallest, usual and largest batch of a profile.

    Raises:
        BuildError: if the file fixes another batch than the one that is wanted.
    """
    fixed = images.shape[0]
    if fixed < 0:
        return wanted or DEFAULT_BATCH
    if wanted not in (None, (fixed, fixed, fixed)):
        asked = ":".join(map(str, wanted or ()))
        raise BuildError(
            f"the ONNX file takes batches of exactly {fixed}, so {asked} cannot be built; leave "
            "the batch out, or export the file with an open batch"
        )
    return fixed, fixed, fixed


def add_profile(
    builder: Any,  # noqa: ANN401 (classes of TensorRT)
    config: Any,  # noqa: ANN401
    images: Tensor,
    batch: tuple[int, int, int],
) -> None:
    """Say which batches the engine will meet, unless the file fixes them.

    Raises:
        BuildError: if TensorRT refuses the profile.
    """
    if images.shape[0] >= 0:
        return
    profile = builder.create_optimization_profile()
    profile.set_shape(images.name, *((size, *images.shape[1:]) for size in batch))
    if config.add_optimization_profile(profile) < 0:
        raise BuildError(f"TensorRT refuses batches of {':'.join(map(str, batch))}")
