"""What is verified: a run, weights with an architecture, or an exported file."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from compressor.data import Batch, TestSplit
from compressor.engine_model import EngineModel
from compressor.errors import ArtefactMismatchError, DataError, RunError, UsageError
from compressor.file_model import FileModel, is_exported_file, load_file_model
from compressor.networks import Classifier, NetworkSpec, load_trained
from compressor.onnx_model import OnnxModel
from compressor.onnx_providers import Provider
from compressor.proportions import Proportion
from compressor.recipe import DataRecipe, Recipe, TeacherRecipe
from compressor.recipe_file import load_recipe
from compressor.reports.files import report_of_file
from compressor.reports.report import TargetFacts
from compressor.run_directory import RunDirectory, read_facts
from compressor.teachers import load_model
from compressor.threat import DEFAULT_THREAT, ThreatModel
from compressor.verification.artefact import Twin, checked_twin, compared_images, rounds
from compressor.weights import sha256_of_file

_FORMATS = MappingProxyType({OnnxModel: "ONNX", EngineModel: "TensorRT engine"})
MIN_AGREEMENT = 0.9
"""Share of clean images on which a file must answer as its source; 8 bits cost a point or two."""
MIN_AGREEMENT_BESIDE_TWIN = 0.5
"""Where a file is attacked through its own twin, its source only adds images that may transfer, and
fine-tuning after rounding may have moved some answers."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A model to verify, before any data is read."""

    path: str
    """As given; a run folder, a file of weights, an ONNX file or an engine."""
    run: RunDirectory | None
    """The run that trained it or its source."""
    recipe: Recipe | None
    facts: dict[str, Any] | None
    file: FileModel | None
    """What an ONNX file or an engine answers."""
    source: str | None
    """Of an exported file: the run or the weights that it was made from."""

    @property
    def name(self) -> str:
        """For titles."""
        if self.file is not None or self.recipe is None:
            return self._file_path.stem
        return self.recipe.name

    @property
    def _file_path(self) -> Path:
        """Without the architecture."""
        return Path(self.path.rpartition(":")[2])

    def folder(self, *, sha256: str) -> Path:
        """Where its reports go, unless the user says otherwise; `sha256` is that of the file."""
        if self.run is not None and self.file is None:
            return self.run.path
        return report_of_file(self._file_path, sha256=sha256).folder

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
    """The target or its source; None for a file without one."""
    spec: NetworkSpec | None
    file: FileModel | None = field(repr=False)
    """What answers, if it is not the network."""
    twin: Twin | None = None
    """Of a file."""
    rounds: bool = False
    """Whether a file is more than its source written down."""
    num_bytes: int

    @property
    def differentiable(self) -> nn.Module | None:
        """What attacks follow: the twin of a file, or the network."""
        if self.twin is not None and self.twin.module is not None:
            return self.twin.module
        return self.network


def open_target(
    path: str, *, source: str | None, sidecar_sha256: str | None = None, provider: Provider = "cpu"
) -> Target:
    """Say what `path` is, and find the run that belongs to it.

    Raises:
        UsageError: if `source` or `provider` is given where it means nothing.
        RunError: if a folder is not a run.
        WeightsError: if a file cannot be run.
        MissingDependencyError: if what is to run a file is not here.
    """
    is_file, file = is_exported_file(path), None
    if is_file:
        file = load_file_model(
            Path(path),
            num_threads=torch.get_num_threads(),
            sidecar_sha256=sidecar_sha256,
            provider=provider,
        )
        source = source or _run_around(file)
        if sidecar_sha256 is not None and isinstance(file, OnnxModel):
            raise UsageError(f"--manifest-sha256 is for bundles and engines; {path} is neither")
    elif source is not None or provider != "cpu":
        option = "--provider" if source is None else "--source"
        raise UsageError(f"{option} is for exported files; {path} is not one")
    weights = source if is_file else path
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
        file=file,
        source=source,
    )


def _run_around(file: FileModel) -> str | None:
    """The run in whose folder of exports a file lies, if it was exported from its weights."""
    run = RunDirectory(file.path.resolve().parent.parent)
    if run.exports != file.path.resolve().parent:
        return None
    try:
        made_from = read_facts(run).get("model_sha256")
    except RunError:
        return None
    named = file.metadata.get("robust_compress.source_sha256")
    return str(run.path) if named is not None and named == made_from else None


def load_target(target: Target, split: TestSplit, *, threat: ThreatModel = DEFAULT_THREAT) -> Model:
    """The model, checked against the test images; a twin of a file also around them.

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
    if target.file is None:
        assert spec is not None and weights_sha256 is not None  # noqa: S101, PT018
        kind = "run" if target.run is not None else "weights"
        facts = TargetFacts(
            kind=kind,  # type: ignore[arg-type]
            architecture=f"{spec.architecture}, width {spec.width:g}",
            sha256=weights_sha256,
            source_sha256=None,
        )
        return Model(facts=facts, network=network, spec=spec, file=None, num_bytes=num_bytes)
    _check_file(target.file, split)
    images = compared_images(split)
    twin = checked_twin(target.file, images, threat=threat)
    if network is not None and weights_sha256 is not None:
        refuse_other_source(
            target.file,
            network,
            images,
            source_sha256=weights_sha256,
            min_agreement=MIN_AGREEMENT if twin.module is None else MIN_AGREEMENT_BESIDE_TWIN,
        )
    facts = TargetFacts(
        kind="onnx" if isinstance(target.file, OnnxModel) else "engine",
        architecture=f"{_FORMATS[type(target.file)]}, {target.file.num_classes} classes",
        sha256=target.file.sha256,
        source_sha256=weights_sha256,
    )
    return Model(
        facts=facts,
        network=network,
        spec=spec,
        file=target.file,
        twin=twin,
        rounds=network is not None and rounds(target.file, network, images),
        num_bytes=target.file.num_bytes,
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
    file: FileModel,
    network: Classifier,
    images: Sequence[Batch],
    *,
    source_sha256: str,
    min_agreement: float = MIN_AGREEMENT,
) -> None:
    """Images that fool its source are tried on a file, so both must be nearly the same function.

    Otherwise the images found say nothing about the file, and it would look robust.

    Raises:
        ArtefactMismatchError: if the file names another source, or answers otherwise.
    """
    named = file.metadata.get("robust_compress.source_sha256")
    if named is not None and named != source_sha256:
        raise ArtefactMismatchError(
            f"{file.path} was exported from weights with SHA-256 {named}, the source has "
            f"{source_sha256}; give the run it was exported from with --source"
        )
    is_same_N = torch.cat([_same_answers(file, network, batch.x_NCHW.cpu()) for batch in images])
    same = Proportion(num_correct=int(is_same_N.sum()), num_total=len(is_same_N))
    if same.fraction < min_agreement:
        raise ArtefactMismatchError(
            f"{file.path} gives the answer of its source on {same} test images, fewer than "
            f"{100 * min_agreement:g} %, so what fools the source says nothing about the file; "
            "give the run it was exported from with --source, or export it again"
        )


@torch.no_grad()
def _same_answers(file: FileModel, network: Classifier, x_NCHW: Tensor) -> Tensor:
    """Whether both give the same class, bool [N]."""
    return torch.eq(file(x_NCHW).argmax(dim=1), network(x_NCHW).argmax(dim=1))


def _load_weights(
    target: Target, split: TestSplit
) -> tuple[Classifier | None, NetworkSpec | None, str | None, int]:
    if target.run is not None:
        network, spec = load_trained(target.run)
        path = target.run.model
        return network, spec, sha256_of_file(path), path.stat().st_size
    weights = target.path if target.file is None else target.source
    if weights is None:
        return None, None, None, 0
    recipe = TeacherRecipe(role="robust", source=weights)
    model = load_model(recipe, class_names=split.class_names, image_shape=split.image_shape)
    if model.network is None:
        raise UsageError(f"--source {weights} has no gradient either; give the run it came from")
    return model.network, model.spec, model.sha256, model.num_bytes


def _check_file(file: FileModel, split: TestSplit) -> None:
    file.check_image_shape(split.image_shape)
    if file.num_classes != len(split.class_names):
        raise DataError(
            f"{file.path} has {file.num_classes} classes, the test images have "
            f"{len(split.class_names)}; give the images it was made for with --data"
        )


def _may_be_weights(path: str) -> bool:
    return ":" in path or Path(path).is_file()
