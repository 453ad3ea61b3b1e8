"""ONNX files as targets of a benchmark."""

from pathlib import Path

from compressor.errors import ArtefactMismatchError, UsageError
from compressor.onnx_model import OnnxModel, load_onnx_model
from compressor.verification.claimed_threat import THREAT_KEY
from exporters.benchmark.target import Answer, BenchTarget, Images, ImageShape


def onnx_target(
    model: OnnxModel, *, image_shape: ImageShape | None, folder: Path | None = None
) -> BenchTarget:
    """An ONNX file that was opened with one thread.

    Args:
        model: the file.
        image_shape: of the images, where the file does not say it.
        folder: of its run, if it is of one.

    Raises:
        UsageError: if nobody says which images it takes.
    """
    sides = zip(model.image_shape, image_shape or (None,) * 3, strict=True)
    channels, height, width = (own or given or 0 for own, given in sides)
    if not (channels and height and width):
        raise UsageError(
            f"{model.path} takes images of any size; give one, as --image-shape 3x32x32"
        )
    return BenchTarget(
        name=model.path.name,
        kind="onnx",
        source=str(model.path),
        folder=folder or model.path.parent,
        precision=_precision(model.content),
        sha256=model.sha256,
        source_sha256=model.metadata.get("robust_compress.source_sha256"),
        threat=model.metadata.get(THREAT_KEY),
        num_bytes=model.num_bytes,
        image_shape=(channels, height, width),
        takes_bytes=model.takes_bytes,
        runs_on=model.runs_on,
        is_on_cpu=model.is_on_cpu,
        provider=model.provider,
        batch_size=model.batch_size,
        open=lambda num_threads: _answer_of(model, num_threads),
    )


def _precision(content: bytes) -> str:
    """By what is in the graph: `int8` if anything is quantised, else by its constants."""
    import onnx  # heavy; only needed here

    graph = onnx.ModelProto.FromString(content).graph
    if any(node.op_type == "DequantizeLinear" for node in graph.node):
        return "int8"
    halves = onnx.TensorProto.FLOAT16
    return "fp16" if any(tensor.data_type == halves for tensor in graph.initializer) else "fp32"


def _answer_of(model: OnnxModel, num_threads: int) -> Answer:
    """The session of `model` has one thread, and is used again for that."""
    opened = model
    if num_threads != 1:
        opened = load_onnx_model(model.path, num_threads=num_threads, provider=model.provider)
    if opened.sha256 != model.sha256:
        raise ArtefactMismatchError(f"{model.path} was changed meanwhile; measure it again")
    session, input_name = opened.session, opened.input_name

    def answer(images_NCHW: Images) -> None:
        session.run(None, {input_name: images_NCHW})

    return answer
