"""What is verified: a run, weights with an architecture, or an ONNX file with its source."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.data import TestSplit, evaluation_batches
from compressor.errors import ArtefactMismatchError, DataError, UsageError
from compressor.networks import Classifier, NetworkSpec, load_trained
from compressor.onnx_model import OnnxModel, load_onnx_model
from compressor.proportions import Proportion
from compressor.recipe import DataRecipe, Recipe, TeacherRecipe
from compressor.recipe_file import load_recipe
from compressor.reports.report import TargetFacts
from compressor.run_directory import RunDirectory, read_facts
from compressor.teachers import load_model
from compressor.weights import sha256_of_file

NUM_COMPARED_IMAGES = 250
_NUM_AT_ONCE = 50
"""More large images would not fit into memory."""
MIN_AGREEMENT = 0.9
"""Share of clean images on which a file must answer as its source; 8 bits cost a point or two."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A model to verify, before any data is read."""

    path: str
    """As given; a run folder, a file of weights or an ONNX file."""
    run: RunDirectory | None
    """The run that trained it or its source."""
    recipe: Recipe | None
    facts: dict[str, Any] | None
    onnx: OnnxModel | None
    source: str | None
    """Of an ONNX file: the run or the weights whose gradients stand in for its own."""

    @property
    def name(self) -> str:
        """For titles."""
        if self.onnx is not None or self.recipe is None:
            return self._stem
        return self.recipe.name

    @property
    def _stem(self) -> str:
        """Of the file, without its architecture."""
        return Path(self.path.rpartition(":")[2]).stem

    def folder(self, *, sha256: str) -> Path:
        """Where its reports go, unless the user says otherwise; `sha256` is that of the file."""
        if self.run is not None and self.onnx is None:
            return self.run.path
        return Path("runs") / f"verify-{self._stem}-{sha256[:8]}"

    def data_recipe(self, data_source: str | None) -> DataRecipe:
        """Which images to attack.

        Raises:
            UsageError: if nobody says where they are.
        """
        if self.recipe is not None:
            data = self.recipe.data
            return data if data_source is None else data.model_copy(update={"source": data_source})
        if data_source is None:
            raise UsageError(
                f"{self.path} does not say on which images it is to be verified; give them with "
                "--data, for example --data imagefolder:PATH"
            )
        return DataRecipe(source=data_source, validation_size=1)


@dataclass(frozen=True, kw_only=True)
class Model:
    """A target, loaded for the classes and the shape of the data."""

    facts: TargetFacts
    network: Classifier | None = field(repr=False)
    """What is differentiated: the target or its source; None if there is neither."""
    spec: NetworkSpec | None
    onnx: OnnxModel | None = field(repr=False)
    """What answers, if it is not the network."""
    num_bytes: int


def open_target(path: str, *, source: str | None) -> Target:
    """Say what `path` is, and find the run that belongs to it.

    Raises:
        UsageError: if `source` is given where it means nothing.
        RunError: if a folder is not a run.
        WeightsError: if an ONNX file cannot be run.
    """
    is_onnx = path.endswith(".onnx") and not Path(path).is_dir()
    if source is not None and not is_onnx:
        raise UsageError(f"--source is for ONNX files, which have no gradient; {path} is not one")
    weights = source if is_onnx else path
    run = None
    if weights is not None and Path(weights).is_dir():
        run = RunDirectory.open(Path(weights))
    elif weights is not None and weights == path and not _may_be_weights(path):
        run = RunDirectory.open(Path(path))  # which says what is missing
    return Target(
        path=path,
        run=run,
        recipe=load_recipe(run.resolved_recipe) if run else None,
        facts=read_facts(run) if run else None,
        onnx=load_onnx_model(Path(path), num_threads=torch.get_num_threads()) if is_onnx else None,
        source=source,
    )


def load_target(target: Target, split: TestSplit) -> Model:
    """The model, checked against the test images.

    Raises:
        RunError: if training has not ended.
        WeightsError: if the file cannot be read, or does not fit its architecture.
        TeacherError: if its classes or sizes are not those of the data.
        DataError: if the images are not those of the run, or were trained on.
        ArtefactMismatchError: if a file does not come from its source.
    """
    if target.facts is not None:
        refuse_other_images(split, target.facts)
    network, spec, weights_sha256, num_bytes = _load_weights(target, split)
    if target.onnx is None:
        assert spec is not None and weights_sha256 is not None  # noqa: S101, PT018
        kind = "run" if target.run is not None else "weights"
        facts = TargetFacts(
            kind=kind,  # type: ignore[arg-type]
            architecture=f"{spec.architecture}, width {spec.width:g}",
            sha256=weights_sha256,
            source_sha256=None,
        )
        return Model(facts=facts, network=network, spec=spec, onnx=None, num_bytes=num_bytes)
    _check_onnx(target.onnx, split)
    if network is not None and weights_sha256 is not None:
        refuse_other_source(target.onnx, network, split, source_sha256=weights_sha256)
    facts = TargetFacts(
        kind="onnx",
        architecture=f"ONNX, {target.onnx.num_classes} classes",
        sha256=target.onnx.sha256,
        source_sha256=weights_sha256,
    )
    return Model(
        facts=facts, network=network, spec=spec, onnx=target.onnx, num_bytes=target.onnx.num_bytes
    )


def refuse_other_images(split: TestSplit, facts: dict[str, Any]) -> None:
    """The test images of a run have its classes and shape, and are not those it trained on.

    Raises:
        DataError: if not.
    """
    have = (list(split.class_names), list(split.image_shape))
    want = (facts["class_names"], facts["image_shape"])
    if have != want:
        raise DataError(
            f"the test images have shape {have[1]} and the classes {have[0][:5]}..., the run was "
            f"trained on {want[1]} and {want[0][:5]}...; give the data of the run with --data"
        )
    if split.content_sha256 == facts["training_content_sha256"]:
        raise DataError(
            "the test images are the training images of this run (same content hash "
            f"{split.content_sha256[:12]}); accuracy on them says nothing. Give others with --data"
        )


def refuse_other_source(
    onnx: OnnxModel, network: Classifier, split: TestSplit, *, source_sha256: str
) -> None:
    """A file is attacked through its source, so it must be the same function, or nearly so.

    Otherwise the images found say nothing about the file, and it would look robust.

    Raises:
        ArtefactMismatchError: if the file names another source, or answers otherwise.
    """
    named = onnx.metadata.get("robust_compress.source_sha256")
    if named is not None and named != source_sha256:
        raise ArtefactMismatchError(
            f"{onnx.path} was exported from weights with SHA-256 {named}, the source has "
            f"{source_sha256}; give the run it was exported from with --source"
        )
    # Spread over the split, as folders have one class after the other.
    num_compared = min(NUM_COMPARED_IMAGES, split.num_images)
    places_N = torch.arange(num_compared, device=split.index_N.device)
    order_N = places_N * split.num_images // num_compared
    batches = evaluation_batches(split, batch_size=_NUM_AT_ONCE, order_N=order_N)
    is_same_N = torch.cat([_same_answers(onnx, network, batch.x_NCHW.cpu()) for batch in batches])
    same = Proportion(num_correct=int(is_same_N.sum()), num_total=len(is_same_N))
    if same.fraction < MIN_AGREEMENT:
        raise ArtefactMismatchError(
            f"{onnx.path} gives the answer of its source on {same} test images, fewer than "
            f"{100 * MIN_AGREEMENT:g} %, so what fools the source says nothing about the file; "
            "give the run it was exported from with --source, or export it again"
        )


@torch.no_grad()
def _same_answers(onnx: OnnxModel, network: Classifier, x_NCHW: Tensor) -> Tensor:
    """Whether both give the same class, bool [N]."""
    return torch.eq(onnx(x_NCHW).argmax(dim=1), network(x_NCHW).argmax(dim=1))


def _load_weights(
    target: Target, split: TestSplit
) -> tuple[Classifier | None, NetworkSpec | None, str | None, int]:
    if target.run is not None:
        network, spec = load_trained(target.run)
        path = target.run.model
        return network, spec, sha256_of_file(path), path.stat().st_size
    weights = target.path if target.onnx is None else target.source
    if weights is None:
        return None, None, None, 0
    recipe = TeacherRecipe(role="robust", source=weights)
    model = load_model(recipe, class_names=split.class_names, image_shape=split.image_shape)
    if model.network is None:
        raise UsageError(f"--source {weights} has no gradient either; give the run it came from")
    return model.network, model.spec, model.sha256, model.num_bytes


def _check_onnx(onnx: OnnxModel, split: TestSplit) -> None:
    onnx.check_image_shape(split.image_shape)
    if onnx.num_classes != len(split.class_names):
        raise DataError(
            f"{onnx.path} has {onnx.num_classes} classes, the test images have "
            f"{len(split.class_names)}; give the images it was made for with --data"
        )


def _may_be_weights(path: str) -> bool:
    return ":" in path or Path(path).is_file()
