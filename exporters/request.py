"""ExportRequest: what is asked of an export; Prepared: the run, its network and its images."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from compressor.checkpoint import selected_candidate
from compressor.data import TrainingData, load_training_data
from compressor.data_identity import refuse_other_data
from compressor.errors import CheckpointError, RunError
from compressor.networks import Classifier, NetworkSpec, load_trained
from compressor.onnx_model import OnnxModel, load_onnx_model
from compressor.onnx_twin import OnnxTwin
from compressor.performance_settings import PerformanceSettings
from compressor.proportions import Proportion
from compressor.recipe import Recipe
from compressor.recipe_file import load_recipe
from compressor.run_directory import RunDirectory, read_facts
from compressor.threat import ThreatModel
from compressor.verification.artefact import checked_twin
from compressor.weights import sha256_of_file
from exporters.budget import DEFAULT_BUDGET, Budget
from exporters.exported_model import Precision
from exporters.held_out import HeldOut, choosing_places, held_out_images, judging_places
from exporters.int8.calibration import DEFAULT_NUM_IMAGES, CalibrationKind
from exporters.int8.to_int8 import CalibrationMethod
from exporters.to_onnx import OPSET, OnnxForm

DEFAULT_HELD_OUT_IMAGES = 500


@dataclass(frozen=True, kw_only=True)
class Int8Request:
    """How the ranges of 8 bits are found."""

    method: CalibrationMethod = "minmax"
    kind: CalibrationKind | None = None
    """Of the calibration images; None: whichever is best on held-out images."""
    num_images: int = DEFAULT_NUM_IMAGES
    min_kept: int = 0
    """Layers to keep in float even where all bear 8 bits, the most sensitive ones."""


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """What is asked for."""

    run: RunDirectory
    settings: PerformanceSettings
    data_source: str | None = None
    """Where the data lies now, if not where it was."""
    precisions: Sequence[Precision] = ("fp32",)
    takes_bytes: bool = False
    static_batch: int | None = None
    opset: int = OPSET
    int8: Int8Request = field(default_factory=Int8Request)
    budget: Budget = DEFAULT_BUDGET
    num_images: int = DEFAULT_HELD_OUT_IMAGES
    """Held-out images on which files are compared with their source, and as many others on which
    candidates are chosen; half and half, if there are fewer."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Prepared:
    """Everything that the formats share."""

    request: ExportRequest
    network: Classifier
    spec: NetworkSpec
    recipe: Recipe
    class_names: tuple[str, ...]
    source_sha256: str
    threat: ThreatModel
    form: OnnxForm
    data: TrainingData
    held_out: HeldOut
    """Those that judge."""

    def opened(self, path: Path) -> OnnxModel:
        """A file of this export, run by as many threads as were asked for."""
        return load_onnx_model(path, self.request.settings.num_threads)

    def choosing(self) -> HeldOut:
        """Other held-out images, on which candidates are chosen; attacked when asked for."""
        places_N = choosing_places(self.data.validation, num_images=self.request.num_images)
        return held_out_images(
            self.network,
            self.data.validation,
            places_N,
            threat=self.threat,
            takes_bytes=self.form.takes_bytes,
        )

    def metadata(self) -> dict[str, str]:
        """The model card: what the file says about itself, the same whenever it is written."""
        card = {
            "class_names": json.dumps(self.class_names),
            "input_contract": self.form.input_contract,
            "recipe_id": self.recipe.recipe_id,
            "source_sha256": self.source_sha256,
            "threat": str(self.threat),
            "validation": self._results(),
        }
        return {f"robust_compress.{name}": text for name, text in card.items()}

    def _results(self) -> str:
        """What the student scored on held-out images when it was selected."""
        try:
            best = selected_candidate(self.request.run)
        except (CheckpointError, RunError):
            return "unknown: the checkpoints of the run are gone"
        clean, robust = (
            Proportion(num_correct=num, num_total=best.num_validation)
            for num in (best.clean_correct, best.robust_correct)
        )
        return f"student, held-out images: clean {clean}, selection attack {robust}"


def prepare(request: ExportRequest) -> Prepared:
    """Load a finished run, and attack its network on held-out images.

    Raises:
        RunError: if training has not ended.
        DataError: if the images cannot be read, or are not those of the run.
    """
    network, spec = load_trained(request.run)
    recipe, facts = load_recipe(request.run.resolved_recipe), read_facts(request.run)
    source = request.data_source or recipe.data.source
    data = load_training_data(
        recipe.data.model_copy(update={"source": source}),
        seed=recipe.seed,
        settings=request.settings,
        device=torch.device("cpu"),
    )
    refuse_other_data(data, request.run)
    threat = recipe.threat.build()
    return Prepared(
        request=request,
        network=network,
        spec=spec,
        recipe=recipe,
        class_names=tuple(facts["class_names"]),
        source_sha256=sha256_of_file(request.run.model),
        threat=threat,
        form=OnnxForm(
            image_shape=spec.image_shape,
            takes_bytes=request.takes_bytes,
            static_batch=request.static_batch,
            opset=request.opset,
        ),
        data=data,
        held_out=held_out_images(
            network,
            data.validation,
            judging_places(data.validation, num_images=request.num_images),
            threat=threat,
            takes_bytes=request.takes_bytes,
        ),
    )


def twin_of(model: OnnxModel, held_out: HeldOut) -> OnnxTwin | None:
    """A differentiable form of a file, where there is one that answers as the file does."""
    return checked_twin(model, held_out.batches(), threat=held_out.threat).module
