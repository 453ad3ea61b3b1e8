"""export_run: from a finished run to a file that is shown to be the same model."""

import dataclasses
import json

import torch

from compressor.data import load_training_data
from compressor.errors import ArtefactMismatchError
from compressor.networks import load_trained
from compressor.onnx_model import load_onnx_model
from compressor.performance_settings import PerformanceSettings
from compressor.recipe_file import load_recipe
from compressor.run_directory import RunDirectory, read_facts, write_json_atomically
from compressor.weights import sha256_of_file
from exporters.exported_model import ExportedModel
from exporters.to_onnx import INPUT_CONTRACT, INPUT_NAME, OPSET, write_onnx
from exporters.verify import verify_export


def export_run(
    run: RunDirectory, *, settings: PerformanceSettings, data_source: str | None = None
) -> ExportedModel:
    """Write the selected network of a run as fp32 ONNX and compare the file's answers with it.

    Args:
        run: a run whose training has ended.
        settings: how images are decoded and cached.
        data_source: where the data lies now, if not where it was.

    Raises:
        RunError: if training has not ended.
        ArtefactMismatchError: if the file answers differently; its verification says how.
    """
    network, spec = load_trained(run)
    recipe, facts = load_recipe(run.resolved_recipe), read_facts(run)
    images = recipe.data.model_copy(update={"source": data_source or recipe.data.source})
    source_sha256 = sha256_of_file(run.model)
    path, unverified = run.onnx("fp32"), run.unverified_onnx("fp32")
    metadata = {
        "robust_compress.class_names": json.dumps(facts["class_names"]),
        "robust_compress.input_contract": INPUT_CONTRACT,
        "robust_compress.recipe_id": recipe.recipe_id,
        "robust_compress.source_sha256": source_sha256,
        "robust_compress.threat": str(recipe.threat.build()),
    }
    write_onnx(network, unverified, image_shape=spec.image_shape, metadata=metadata)
    data = load_training_data(
        images, seed=recipe.seed, settings=settings, device=torch.device("cpu")
    )
    verification = verify_export(
        network, load_onnx_model(unverified), data.validation, threat=recipe.threat.build()
    )
    exported = ExportedModel(
        path=path,
        format="onnx",
        precision="fp32",
        opset=OPSET,
        input_name=INPUT_NAME,
        input_contract=INPUT_CONTRACT,
        sha256=sha256_of_file(unverified),
        source_sha256=source_sha256,
        num_bytes=unverified.stat().st_size,
        verification=verification,
    )
    if verification.status != "verified":
        raise ArtefactMismatchError(
            f"{unverified} does not answer as its source: {verification.reason}. Do not deploy "
            "it; an earlier export, if there was one, is untouched"
        )
    unverified.replace(path)
    table = dataclasses.asdict(exported) | {"path": path.name}
    write_json_atomically(run.onnx_verification("fp32"), table)
    return exported
