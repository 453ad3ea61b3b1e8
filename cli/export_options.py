"""From the words of `robust-compress export` to values."""

from typing import TYPE_CHECKING

from compressor.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from compressor.device.build_options import BuildOptions
    from exporters.exported_model import Precision
    from exporters.request import ExportRequest, Int8Request

_FORMATS = {"onnx": "onnx", "engine": "engine", "trt": "engine", "tensorrt": "engine"}


def parse_precisions(names: list[str] | None, *, half: bool, int8: bool) -> "tuple[Precision, ...]":
    """Those named, once each, the highest first; fp32 if none is.

    Raises:
        UsageError: for one that does not exist.
    """
    from exporters.exported_model import PRECISIONS

    wanted = [*(names or []), *(["fp16"] if half else []), *(["int8"] if int8 else [])]
    unknown = [name for name in wanted if name not in PRECISIONS]
    if unknown:
        raise UsageError(f"--precision {unknown[0]!r} is not known; use {', '.join(PRECISIONS)}")
    return tuple(p for p in PRECISIONS if p in wanted or not wanted and p == "fp32")


def parse_formats(names: list[str]) -> list[str]:
    """`onnx` always, `engine` if it was asked for.

    Raises:
        UsageError: for one that does not exist.
    """
    unknown = [name for name in names if name not in _FORMATS]
    if unknown:
        raise UsageError(f"--format {unknown[0]!r} is not known; use onnx or engine")
    return sorted({_FORMATS[name] for name in names} | {"onnx"}, reverse=True)


def parse_sizes(text: str | None, static: int | None) -> tuple[int, int, int] | None:
    """Smallest, usual and largest batch of an engine; None: as the file allows.

    Raises:
        UsageError: if both options are given.
        BuildError: if it is no range.
    """
    from compressor.device.build_options import parse_batch

    if text is not None and static is not None:
        raise UsageError("--batch and --static contradict each other; give one of them")
    if static is not None:
        return static, static, static
    return None if text is None else parse_batch(text)


def check_timing_cache(path: "Path | None") -> None:
    """It may be missing, but not a folder; found out before an hour of work.

    Raises:
        UsageError: if it cannot be written.
    """
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        what = "a folder" if path.is_dir() else f"in {path.parent}, which is no folder"
        raise UsageError(f"--timing-cache {path} is {what}; give a file")


def parse_opset(value: int | None) -> int:
    """The version of ONNX.

    Raises:
        UsageError: if the exporter does not write it.
    """
    from exporters.to_onnx import OPSET, OPSETS

    if value is not None and value not in OPSETS:
        raise UsageError(
            f"--opset {value} is outside {OPSETS.start} to {OPSETS.stop - 1}, which the exporter "
            "writes; leave it out"
        )
    return value or OPSET


def parse_int8(method: str, kind: str, *, num_images: int, min_kept: int) -> "Int8Request":
    """How int8 is calibrated, and how many layers are left out whatever happens.

    Raises:
        UsageError: for a method or kind that is refused or does not exist.
    """
    from exporters.int8.calibration import CALIBRATION_KINDS
    from exporters.int8.to_int8 import calibration_method
    from exporters.request import Int8Request

    if kind not in {"auto", *CALIBRATION_KINDS}:
        raise UsageError(
            f"--calibration-images {kind!r} is not known; use auto, {', '.join(CALIBRATION_KINDS)}"
        )
    return Int8Request(
        method=calibration_method(method),
        kind=next((known for known in CALIBRATION_KINDS if known == kind), None),
        num_images=num_images,
        min_kept=min_kept,
    )


def refuse_idle_engine_options(
    options: "BuildOptions", *, timing_cache: "Path | None", builds: bool, bundles: bool
) -> None:
    """Options of engines that would do nothing.

    Raises:
        UsageError: naming the first of them.
    """
    given, usual = options.to_table(), type(options)().to_table()
    idle = [_ENGINE_OPTIONS[name] for name, value in given.items() if value != usual[name]]
    if idle and not builds and not bundles:
        raise UsageError(
            f"{idle[0]} would have no effect without --trt or --bundle; add one, or leave it out"
        )
    if timing_cache is not None and not builds:
        raise UsageError("--timing-cache would have no effect without --trt; leave it out")


_ENGINE_OPTIONS = {
    "batch": "--batch",
    "workspace_mib": "--workspace-mib",
    "optimization_level": "--optimization-level",
    "tf32": "--tf32",
    "version_compatible": "--version-compatible",
    "hardware_compatible": "--hardware-compatible",
    "compute_capabilities": "--compute-capability",
}


def refuse_idle_int8(request: "ExportRequest", *, fine_tunes: bool) -> None:
    """Options of int8 that would do nothing.

    Raises:
        UsageError: naming the first of them.
    """
    from exporters.request import Int8Request

    asked, usual = request.int8, Int8Request()
    options = {
        "--keep-float": asked.min_kept != usual.min_kept,
        "--calibration-method": asked.method != usual.method,
        "--calibration-images": asked.kind != usual.kind,
        "--calibration-samples": asked.num_images != usual.num_images,
    }
    idle = [option for option, is_given in options.items() if is_given]
    if idle and "int8" not in request.precisions:
        raise UsageError(f"{idle[0]} would have no effect without --int8; add it, or leave it out")
    if fine_tunes and asked.min_kept:
        raise UsageError(
            "--keep-float would have no effect with --qat, which trains every layer in 8 bits; "
            "give one of them"
        )
