"""TensorRT engines as targets of a benchmark; one that nobody vouches for is never opened."""

import json
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from compressor.device.kit_files import DeviceError, read_limited, sha256_of
from compressor.engine_model import MAX_SIDECAR_BYTES, EngineModel, load_engine_model, sidecar_of
from compressor.errors import ArtefactMismatchError, RobustCompressError, WeightsError
from compressor.weights import sha256_of_file
from exporters.benchmark.onnx_target import onnx_target
from exporters.benchmark.target import Answer, BenchTarget, Images, ImageShape


def engine_target(
    path: Path,
    *,
    trusted_sha256: Collection[str],
    image_shape: ImageShape | None,
    folder: Path | None = None,
) -> BenchTarget:
    """An engine, deserialised.

    Args:
        path: the engine; its sidecar and the ONNX file that it was built from lie beside it.
        trusted_sha256: of sidecars, from a place that is trusted.
        image_shape: of the images, where the ONNX file does not say it.
        folder: of its run, if it is of one.

    Raises:
        RobustCompressError: as `load_engine_model`.
    """
    sidecar_sha256 = _vouched_for(path, trusted_sha256) or next(iter(trusted_sha256), None)
    model = load_engine_model(path, sidecar_sha256=sidecar_sha256)
    return replace(
        onnx_target(model.onnx, image_shape=image_shape, folder=folder),
        name=path.name,
        kind="engine",
        source=str(path),
        sha256=model.sha256,
        num_bytes=model.num_bytes,
        runs_on=model.runs_on,
        is_on_cpu=model.is_on_cpu,
        sidecar_sha256=sidecar_sha256,
        batch_size=None,  # the engine itself splits and fills
        open=lambda _: _answer_of(model),
    )


def engine_of_run(path: Path, *, like: BenchTarget, trusted_sha256: Collection[str]) -> BenchTarget:
    """An engine that was found and not asked for: where it cannot be run, the reason is kept.

    Args:
        path: the engine.
        like: what it was made from, or at least of the same run.
        trusted_sha256: of sidecars, from a place that is trusted.

    Raises:
        WeightsError: if it is empty.
        ArtefactMismatchError: if it is not what its sidecar names, for which somebody vouches.
    """
    sidecar_sha256 = _vouched_for(path, trusted_sha256)
    if sidecar_sha256 is None:
        sidecar = sidecar_of(path).name
        return _unopened(
            path, like, f"not trusted; give the SHA-256 of {sidecar} as --manifest-sha256"
        )
    try:
        return engine_target(
            path,
            trusted_sha256=trusted_sha256,
            image_shape=like.image_shape,
            folder=like.folder,
        )
    except ArtefactMismatchError:
        raise
    except RobustCompressError as error:
        unopened = _unopened(path, like, _reason(error, path))
        return replace(unopened, sidecar_sha256=sidecar_sha256)


def built_from(path: Path) -> tuple[str, str] | None:
    """Name and SHA-256 of the ONNX file that an engine was built from, as its sidecar says.

    None: nobody says it.
    """
    try:
        facts = json.loads(read_limited(sidecar_of(path), max_bytes=MAX_SIDECAR_BYTES))
        return Path(str(facts["onnx"]["file"])).name, str(facts["onnx"]["sha256"])
    except (DeviceError, KeyError, TypeError, ValueError, RecursionError):
        return None


def _vouched_for(path: Path, trusted_sha256: Collection[str]) -> str | None:
    """The hash of the sidecar, if it is among those that are trusted."""
    try:
        content = read_limited(sidecar_of(path), max_bytes=MAX_SIDECAR_BYTES)
    except DeviceError:
        return None
    return sha256_of(content) if sha256_of(content) in trusted_sha256 else None


def _reason(error: RobustCompressError, path: Path) -> str:
    """In one line, without the name of the file."""
    return str(error).partition("\n")[0].removeprefix(f"{path} ").rstrip(":")


def _unopened(path: Path, like: BenchTarget, why_not: str) -> BenchTarget:
    if not path.stat().st_size:
        raise WeightsError(f"{path} is empty; build it again")

    def refuse(_: Images) -> None:
        raise WeightsError(f"{path}: {why_not}")

    return replace(
        like,
        name=path.name,
        kind="engine",
        source=str(path),
        sha256=sha256_of_file(path),
        source_sha256=None,
        num_bytes=path.stat().st_size,
        runs_on="nothing",
        why_not=why_not,
        open=lambda _: refuse,
    )


def _answer_of(model: EngineModel) -> Answer:
    def answer(images_NCHW: Images) -> None:
        model.engine(images_NCHW)

    return answer
