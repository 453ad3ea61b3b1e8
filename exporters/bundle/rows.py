"""Rows of a manifest: what is said about the files and engines that go into a bundle."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from compressor.device.kit_files import MAX_MODEL_BYTES, DeviceError, read_limited, sha256_of
from compressor.errors import ArtefactMismatchError
from compressor.run_directory import read_json
from compressor.weights import sha256_of_file
from exporters.bundle.manifest import (
    ENGINE_FOLDER,
    KIT_FOLDER,
    MAX_MANIFEST_BYTES,
    BundledEngine,
    BundledModel,
    BundleError,
    HopFacts,
)
from exporters.exported_model import ExportedModel, verification_table
from exporters.request import Prepared


def refuse_stale(prepared: Prepared, made: Sequence[ExportedModel]) -> None:
    """What a bundle says of a file must be true of its bytes and of the run as they are now.

    Raises:
        ArtefactMismatchError: if a file was made of other weights, or was written again since.
    """
    run = prepared.request.run
    weights = {prepared.source_sha256, sha256_of_file(run.model)}
    for exported in made:
        if weights != {exported.source_sha256}:
            raise ArtefactMismatchError(
                f"{exported.path} was made of other weights than those in {run.path}, so it does "
                "not go into a bundle; export it again"
            )
        if sha256_of_file(exported.path) != exported.sha256:
            raise ArtefactMismatchError(
                f"{exported.path} is not the file that was verified, so it does not go into a "
                "bundle; export it again"
            )


def refuse_unproven(made: Sequence[ExportedModel]) -> None:
    """A bundle says that its ONNX files are as robust as their network.

    Raises:
        BundleError: naming a file of which that was not shown.
    """
    for exported in made:
        if exported.verification.status != "verified":
            raise BundleError(
                f"{exported.path} is {exported.verification.status}: "
                f"{exported.verification.reason}, so it does not go into a bundle; bundle other "
                "precisions"
            )


def model_row(exported: ExportedModel) -> BundledModel:
    """What was shown about an ONNX file of the kit."""
    return BundledModel(
        file=f"{KIT_FOLDER}/{exported.path.name}",
        sha256=exported.sha256,
        variant=exported.variant,
        opset=exported.opset,
        input_name=exported.input_name,
        input_contract=exported.input_contract,
        calibration_index_sha256=exported.details.get("calibration_index_sha256"),
        hop=HopFacts.of(verification_table(exported.verification)),
        details=exported.details,
    )


def engine_rows(
    paths: Sequence[Path], models: Sequence[BundledModel]
) -> tuple[tuple[BundledEngine, ...], dict[str, bytes]]:
    """The engines with what their sidecars say, and the content of all these files.

    Args:
        paths: of the engines, each with its sidecar beside it.
        models: the ONNX files of the bundle.

    Raises:
        BundleError: if one was not built of a file of the bundle, or is damaged.
    """
    rows: list[BundledEngine] = []
    contents: dict[str, bytes] = {}
    for path in paths:
        sidecar = path.with_name(f"{path.name}.json")
        try:
            plan = read_limited(path, max_bytes=MAX_MODEL_BYTES)
            described = read_limited(sidecar, max_bytes=MAX_MANIFEST_BYTES)
            row = _engine(path, read_json(sidecar), models)
        except DeviceError as error:
            raise BundleError(str(error)) from None
        except (KeyError, TypeError, ValidationError) as error:
            raise BundleError(f"{sidecar} is damaged ({error}); build the engine again") from None
        if row.sha256 != sha256_of(plan):
            raise BundleError(f"{path} is not the file that {sidecar.name} names; build it again")
        rows.append(row)
        contents |= {row.file: plan, row.sidecar: described}
    return tuple(rows), contents


def _engine(
    path: Path, sidecar: Mapping[str, Any], models: Sequence[BundledModel]
) -> BundledEngine:
    made_of = [model for model in models if model.sha256 == sidecar["onnx"]["sha256"]]
    if not made_of:
        raise BundleError(f"{path} was not made of a file of this bundle; build it again")
    hop = sidecar.get("verification")
    return BundledEngine(
        file=f"{ENGINE_FOLDER}/{path.name}",
        sha256=sidecar["engine"]["sha256"],
        sidecar=f"{ENGINE_FOLDER}/{path.name}.json",
        onnx_file=made_of[0].file,
        flavour=sidecar["tensorrt"]["flavour"],
        version=sidecar["tensorrt"]["version"],
        gpu=sidecar["machine"]["gpu"],
        status=sidecar["status"],
        hop=None if hop is None else HopFacts.of(hop),
    )
