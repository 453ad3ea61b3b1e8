"""What an exported file answers, whichever runtime runs it."""

from pathlib import Path

from compressor.engine_model import EngineModel, load_engine_model
from compressor.errors import UsageError
from compressor.onnx_model import OnnxModel, load_onnx_model
from compressor.onnx_providers import Provider

FileModel = OnnxModel | EngineModel
"""Called with images in [0, 1], [N, C, H, W], it gives logits [N, K], without gradient."""

_ONNX, _ENGINE = ".onnx", ".engine"


def is_exported_file(path: str) -> bool:
    """Whether the name is that of an ONNX file or of an engine."""
    return Path(path).suffix in {_ONNX, _ENGINE} and not Path(path).is_dir()


def load_file_model(
    path: Path,
    *,
    num_threads: int,
    sidecar_sha256: str | None = None,
    provider: Provider = "cpu",
) -> FileModel:
    """Open an ONNX file or an engine.

    Args:
        path: of the file.
        num_threads: of one answer on the CPU.
        sidecar_sha256: of the sidecar of an engine, which is not run without it.
        provider: what runs an ONNX file within ONNX Runtime.

    Raises:
        UsageError: if a provider is asked for an engine, which has its own runtime.
        RobustCompressError: as `load_onnx_model` and `load_engine_model`.
    """
    if path.suffix != _ENGINE:
        return load_onnx_model(path, num_threads=num_threads, provider=provider)
    if provider != "cpu":
        raise UsageError(f"--provider is for ONNX files; {path} is run by TensorRT itself")
    return load_engine_model(path, sidecar_sha256=sidecar_sha256)
