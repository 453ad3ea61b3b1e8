"""Networks to learn from: found, read, and checked against the data.

N images, C channels, H and W pixels, K classes.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from compressor.architectures.build import (
    ARCHITECTURES,
    TORCHVISION_PREFIX,
    build_backbone,
    find_architecture,
    infer_width,
)
from compressor.errors import ArtefactMismatchError, TeacherError, WeightsError
from compressor.networks import (
    NetworkSpec,
    Preprocessing,
    classifier_with_weights,
    count_parameters,
)
from compressor.onnx_model import load_onnx_model
from compressor.recipe import TeacherRecipe
from compressor.teacher import Teacher
from compressor.weights import (
    StateDict,
    count_classes,
    normalisation_in,
    read_state_dict,
    sha256_of_file,
)

CLASS_NAMES_KEY = "robust_compress.class_names"
"""Key of the class names, a JSON list, in the metadata of a file."""

_Normalisation = tuple[tuple[float, ...] | None, tuple[float, ...] | None]
"""Mean and std."""
_CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
_CIFAR10_STD = (0.2471, 0.2435, 0.2616)
_AUTHORS_NORMALISATION: Mapping[str, _Normalisation] = {
    "wide_resnet_22_6": (_CIFAR10_MEAN, _CIFAR10_STD),
    "wide_resnet_70_16": (_CIFAR10_MEAN, _CIFAR10_STD),
}


class _Source(NamedTuple):
    """`ARCH:FILE` taken apart; no architecture where the file itself says it."""

    architecture: str | None
    path: Path


class _Target(NamedTuple):
    """What the data asks of a teacher."""

    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]


def load_teacher(
    recipe: TeacherRecipe, *, class_names: Sequence[str], image_shape: tuple[int, int, int]
) -> Teacher:
    """The teacher of a recipe, checked against the data, on the CPU.

    The width of `ARCH:FILE` is read from the file. Mean and std are those of the recipe; or
    else those saved in the file; or else, for the Swish networks `wide_resnet_70_16` and
    `wide_resnet_22_6`, those of CIFAR-10, which the authors of B-MTARD pass even to their
    CIFAR-100 teachers; or else none.

    Args:
        recipe: `source` is `ARCH:FILE`, `torchvision:NAME:FILE`, `FILE.onnx`, a `FILE` that
            describes itself, or the folder of a run.
        class_names: of the data, in the order of its labels.
        image_shape: (C, H, W) of the data.

    Raises:
        RecipeError: if the architecture is not known, or cannot be for these images.
        WeightsError: if the file cannot be read safely, or does not fit the architecture.
        TeacherError: if classes, their order, or the size of the images do not fit the data.
        ArtefactMismatchError: if the file is not the one that the recipe names by its hash.
    """
    try:
        return load_model(recipe, class_names=class_names, image_shape=image_shape)
    except (WeightsError, TeacherError) as error:
        raise type(error)(f"{recipe.role} teacher: {error}") from None


def load_model(
    recipe: TeacherRecipe, *, class_names: Sequence[str], image_shape: tuple[int, int, int]
) -> Teacher:
    """As `load_teacher`, for a model that is no teacher; the role does not matter."""
    source = _parse_source(recipe.source)
    _check_hash(source.path, recipe.sha256)
    target = _Target(tuple(class_names), image_shape)
    try:
        if source.path.suffix == ".onnx" and source.architecture is None:
            return _load_onnx(recipe, source.path, target)
        return _load_network(recipe, source, target)
    except (WeightsError, TeacherError) as error:
        named = str(error) if str(source.path) in str(error) else f"{source.path}: {error}"
        raise type(error)(named) from None


def _parse_source(source: str) -> _Source:
    try:
        is_run = Path(source).is_dir()
    except (OSError, ValueError) as error:
        raise TeacherError(
            f"the teacher {source!r} cannot be read ({error}); check the path"
        ) from None
    if is_run:
        return _Source(None, Path(source) / "model.safetensors")
    start = len(TORCHVISION_PREFIX) if source.startswith(TORCHVISION_PREFIX) else 0
    end = source.find(":", start)
    name = source[:end]
    if end < 0 or (name not in ARCHITECTURES and start == 0 and Path(source).exists()):
        return _Source(None, Path(source))
    find_architecture(name)
    return _Source(name, Path(source[end + 1 :]))


def _check_hash(path: Path, expected: str | None) -> None:
    if expected is None:
        return
    found = sha256_of_file(path)
    if found != expected.lower():
        raise ArtefactMismatchError(
            f"{path} has SHA-256 {found}, the recipe wants {expected}; give the file that the "
            "recipe was made with, or change teachers.sha256"
        )


def _load_network(recipe: TeacherRecipe, source: _Source, target: _Target) -> Teacher:
    content = read_state_dict(source.path)
    _check_class_names(content.metadata, target)
    if source.architecture is None:
        spec = _spec_of_file(recipe, content, target)
    else:
        spec = _spec_of_architecture(recipe, source.architecture, content, target)
    network = classifier_with_weights(spec, content)
    return Teacher(
        name=_name(source.path),
        role=recipe.role,
        answer=network,
        network=network,
        spec=spec,
        num_parameters=count_parameters(network),
        num_classes=spec.num_classes,
        sha256=content.sha256,
        num_bytes=source.path.stat().st_size,
    )


def _load_onnx(recipe: TeacherRecipe, path: Path, target: _Target) -> Teacher:
    model = load_onnx_model(path)
    _check_num_classes(model.num_classes, target)
    _check_class_names(model.metadata, target)
    spec = NetworkSpec(  # of the preprocessing alone; checks mean and std
        architecture="onnx",
        num_classes=model.num_classes,
        image_shape=target.image_shape,
        mean=recipe.mean,
        std=recipe.std,
        resize_to=recipe.resize_to,
    )
    try:
        model.check_image_shape(spec.backbone_shape)
    except WeightsError as error:
        raise TeacherError(f"{error}; resize_to = SIDE in the recipe resizes to a square") from None
    preprocessing = Preprocessing(spec)
    return Teacher(
        name=_name(path),
        role=recipe.role,
        answer=lambda x_NCHW: model(preprocessing(x_NCHW.cpu())).to(x_NCHW.device),
        network=None,
        spec=None,
        num_parameters=None,
        num_classes=model.num_classes,
        sha256=model.sha256,
        num_bytes=model.num_bytes,
        onnx_input=spec,
    )


def _spec_of_file(recipe: TeacherRecipe, content: StateDict, target: _Target) -> NetworkSpec:
    """The network that the file describes, for the images of the data."""
    spec = NetworkSpec.from_metadata(content.metadata)
    _check_num_classes(spec.num_classes, target)
    have, want = target.image_shape, spec.image_shape
    resize_to = recipe.resize_to or spec.resize_to
    if have[0] != want[0] or (have != want and resize_to is None):
        raise TeacherError(
            f"it was made for images of {_times(want)} (channels, height, width), the data has "
            f"{_times(have)}; set data.num_channels, or resize_to = {want[1]} of the teacher"
        )
    mean, std = _normalisation(recipe, (spec.mean, spec.std))
    return dataclasses.replace(spec, image_shape=have, resize_to=resize_to, mean=mean, std=std)


def _spec_of_architecture(
    recipe: TeacherRecipe, architecture: str, content: StateDict, target: _Target
) -> NetworkSpec:
    own = normalisation_in(content.tensors, num_channels=target.image_shape[0])
    mean, std = _normalisation(recipe, own or _AUTHORS_NORMALISATION.get(architecture))
    spec = NetworkSpec(
        architecture=architecture,
        width=infer_width(architecture, content.tensors),
        num_classes=len(target.class_names),
        image_shape=target.image_shape,
        mean=mean,
        std=std,
        resize_to=recipe.resize_to,
    )
    with torch.device("meta"):  # names and shapes, without weights
        shadow = build_backbone(
            architecture,
            num_classes=spec.num_classes,
            image_shape=spec.backbone_shape,
            width=spec.width,
        )
    _check_num_classes(count_classes(content.tensors, shadow), target)
    return spec


def _normalisation(recipe: TeacherRecipe, own: _Normalisation | None) -> _Normalisation:
    """Mean and std of the recipe if it gives either, else the teacher's own."""
    if recipe.mean is None and recipe.std is None:
        return own or (None, None)
    return recipe.mean, recipe.std


def _check_num_classes(found: int | None, target: _Target) -> None:
    wanted = len(target.class_names)
    if found not in (None, wanted):
        raise TeacherError(
            f"it has {found} classes, the data has {wanted}; use a teacher trained on the same "
            "classes"
        )


def _check_class_names(metadata: Mapping[str, str], target: _Target) -> None:
    """Files that do not name their classes are taken to have those of the data, in order."""
    if CLASS_NAMES_KEY not in metadata:
        return
    try:
        found = tuple(json.loads(metadata[CLASS_NAMES_KEY]))
    except (ValueError, TypeError):
        raise WeightsError(f"its {CLASS_NAMES_KEY} is not a JSON list; export it again") from None
    _check_num_classes(len(found), target)
    pairs = enumerate(zip(found, target.class_names, strict=True))
    wrong = next(((label, *names) for label, names in pairs if names[0] != names[1]), None)
    if wrong is not None:
        kind = "in another order" if set(found) == set(target.class_names) else "with other names"
        raise TeacherError(
            f"it has the classes {kind}: label {wrong[0]} is {wrong[1]!r} there and {wrong[2]!r} "
            "in the data; rename the class folders, or use a teacher trained on this data"
        )


def _name(path: Path) -> str:
    """The file, or the run that it lies in."""
    is_of_run = path.name == "model.safetensors"
    return (path.parent.name if is_of_run else "") or path.name


def _times(image_shape: tuple[int, int, int]) -> str:
    return "x".join(map(str, image_shape))
