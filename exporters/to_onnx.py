"""A classifier as one ONNX file: float32, preprocessing inside, no local paths."""

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from compressor.errors import RobustCompressError
from compressor.run_directory import write_bytes_atomically

if TYPE_CHECKING:
    from onnx import ModelProto

OPSET = 20
OPSETS = range(18, 24)
"""What the exporter writes, and TensorRT 10.3 reads."""
INPUT_NAME = "images"
OUTPUT_NAME = "logits"


class ExportError(RobustCompressError):
    """A network cannot be written in the format that was asked for."""


@dataclass(frozen=True, kw_only=True)
class OnnxForm:
    """What the file takes, and in which version of ONNX it is written."""

    image_shape: tuple[int, int, int]
    """Channels, rows, columns."""
    takes_bytes: bool = False
    """Pixels are uint8 from 0 to 255 instead of float32 from 0 to 1."""
    static_batch: int | None = None
    """The only batch size; None: any."""
    opset: int = OPSET

    @property
    def input_contract(self) -> str:
        """For people."""
        kind = "uint8" if self.takes_bytes else "float32"
        pixels = "0 to 255" if self.takes_bytes else "in [0, 1]"
        batch = self.static_batch or "batch"
        sides = ", ".join(map(str, self.image_shape))
        return f"{kind} [{batch}, {sides}], pixels {pixels}, RGB or grey; normalisation is inside"


class _OnBytes(nn.Module):
    """A classifier that takes the pixels as a decoder gives them."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, bytes_NCHW: Tensor) -> Tensor:
        """Logits [N, K] of images uint8 [N, C, H, W]."""
        return self.classifier(bytes_NCHW.to(torch.float32) / 255)  # type: ignore[no-any-return]


def write_onnx(
    network: nn.Module, path: Path, *, form: OnnxForm, metadata: Mapping[str, str]
) -> None:
    """Write `network` in eval mode to `path`, checked by onnx, as a whole or not at all.

    Raises:
        ExportError: if PyTorch cannot express the network in ONNX, or the checker refuses it.
    """
    network = network.cpu().eval()
    example = torch.zeros(form.static_batch or 2, *form.image_shape)
    if form.takes_bytes:
        network, example = _OnBytes(network).eval(), example.to(torch.uint8)
    dynamic = None if form.static_batch else ({0: torch.export.Dim("batch")},)
    try:
        with _quiet_exporter():
            program = torch.onnx.export(
                network,
                (example,),
                dynamo=True,
                verbose=False,
                external_data=False,
                opset_version=form.opset,
                input_names=[INPUT_NAME],
                output_names=[OUTPUT_NAME],
                dynamic_shapes=dynamic,
            )
    except Exception as error:  # noqa: BLE001 (the exporter raises whatever it meets)
        raise ExportError(
            f"this network cannot be written as ONNX: {_first_line(error)}"
        ) from error
    if program is None:
        raise ExportError("torch.onnx.export returned nothing")
    model = program.model_proto  # a new one at every access
    _name_layers(model)
    save_checked(model, path, metadata)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def model_of(path: Path) -> "ModelProto":
    """The parsed file; one of ours, already checked."""
    import onnx

    model: ModelProto = onnx.ModelProto.FromString(path.read_bytes())
    return model


def save_checked(model: "ModelProto", path: Path, metadata: Mapping[str, str]) -> None:
    """Write a graph without traces of this machine, and with what it says about itself.

    Raises:
        ExportError: if the checker refuses it.
    """
    import onnx  # heavy; only needed here

    _strip(model)
    onnx.helper.set_model_props(model, dict(sorted(metadata.items())))
    try:
        onnx.checker.check_model(model, full_check=True)
    except onnx.checker.ValidationError as error:
        raise ExportError(f"onnx.checker refuses the exported graph: {error}") from error
    write_bytes_atomically(path, model.SerializeToString(deterministic=True))


def _name_layers(model: "ModelProto") -> None:
    """Call layers as the network does, so that people know them in tables, logs and engines."""
    constants = {tensor.name for tensor in model.graph.initializer}
    taken = {node.name for node in model.graph.node}
    for node in model.graph.node:
        weight = node.input[1] if len(node.input) > 1 else ""
        name = weight.removesuffix(".weight")
        if weight.endswith(".weight") and weight in constants and name not in taken:
            node.name = name
            taken.add(name)


def _strip(model: "ModelProto") -> None:
    """The exporter writes source paths and stack traces of this machine into the graph."""
    model.doc_string = ""
    del model.metadata_props[:]
    del model.graph.metadata_props[:]
    graph_parts = [*model.graph.node, *model.graph.input, *model.graph.output]
    for part in [*graph_parts, *model.graph.value_info, *model.graph.initializer]:
        part.doc_string = ""
        del part.metadata_props[:]
    for function in model.functions:
        function.doc_string = ""
        del function.metadata_props[:]
        for node in function.node:
            node.doc_string = ""
            del node.metadata_props[:]


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """The exporter logs and warns about its own internals."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
