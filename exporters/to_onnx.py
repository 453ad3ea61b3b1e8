"""A classifier as one ONNX file: float32, dynamic batch, preprocessing inside, no local paths."""

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from compressor.errors import RobustCompressError
from compressor.run_directory import write_bytes_atomically

if TYPE_CHECKING:
    from onnx import ModelProto

OPSET = 20
INPUT_NAME = "images"
OUTPUT_NAME = "logits"
INPUT_CONTRACT = "float32 [batch, C, H, W], pixels in [0, 1], RGB or grey; normalisation is inside"


class ExportError(RobustCompressError):
    """A network cannot be written in the format that was asked for."""


def write_onnx(
    network: nn.Module,
    path: Path,
    *,
    image_shape: tuple[int, int, int],
    metadata: Mapping[str, str],
) -> None:
    """Write `network` in eval mode to `path`, checked by onnx, as a whole or not at all.

    Raises:
        ExportError: if PyTorch cannot express the network in ONNX, or the checker refuses it.
    """
    network = network.cpu().eval()
    example = torch.zeros(2, *image_shape)
    try:
        with _quiet_exporter():
            program = torch.onnx.export(
                network,
                (example,),
                dynamo=True,
                verbose=False,
                external_data=False,
                opset_version=OPSET,
                input_names=[INPUT_NAME],
                output_names=[OUTPUT_NAME],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
            )
    except Exception as error:  # noqa: BLE001 (the exporter raises whatever it meets)
        raise ExportError(
            f"this network cannot be written as ONNX: {str(error).splitlines()[0]}"
        ) from error
    if program is None:
        raise ExportError("torch.onnx.export returned nothing")
    _save_checked(program.model_proto, path, metadata)


def _save_checked(model: "ModelProto", path: Path, metadata: Mapping[str, str]) -> None:
    import onnx  # heavy; only needed here

    _strip(model)
    onnx.helper.set_model_props(model, dict(sorted(metadata.items())))
    try:
        onnx.checker.check_model(model, full_check=True)
    except onnx.checker.ValidationError as error:
        raise ExportError(f"onnx.checker refuses the exported graph: {error}") from error
    write_bytes_atomically(path, model.SerializeToString(deterministic=True))


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
