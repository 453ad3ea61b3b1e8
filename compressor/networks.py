"""A network together with its preprocessing, described by a value that travels in its file.

Every classifier here takes images in [0, 1], so epsilon means pixels for all of them.

N images, C channels, H and W pixels, K classes.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressor.architectures.build import build_backbone
from compressor.errors import ArtefactMismatchError, RecipeError, RunError, WeightsError
from compressor.run_directory import RunDirectory, read_facts
from compressor.weights import (
    StateDict,
    fit_to_layout,
    read_state_dict,
    sha256_of_file,
    write_safetensors,
)

NETWORK_KEY = "robust_compress.network"
"""Key of the network's description in the metadata of a file."""


@dataclass(frozen=True, kw_only=True)
class NetworkSpec:
    """Everything needed to build a classifier, but for its weights.

    Raises:
        RecipeError: on construction, if mean and std do not fit each other or the channels.
    """

    architecture: str
    width: float = 1.0
    num_classes: int
    image_shape: tuple[int, int, int]
    """(C, H, W) of the images that the classifier takes, before `resize_to`."""
    mean: tuple[float, ...] | None = None
    """Per channel, in units of [0, 1]; None: no normalisation."""
    std: tuple[float, ...] | None = None
    resize_to: int | None = None
    """Height and width in pixels to which images are resized first."""

    def __post_init__(self) -> None:
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) != self.image_shape[0]:
                raise RecipeError(
                    f"{name} has {len(values)} values for images of {self.image_shape[0]} channels"
                )
        if (self.mean is None) != (self.std is None):
            raise RecipeError(f"give mean and std together, not mean={self.mean} std={self.std}")
        if self.std is not None and min(self.std) <= 0:
            raise RecipeError(f"std must be above 0 in every channel, not {self.std}")

    @property
    def backbone_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what the backbone sees."""
        if self.resize_to is None:
            return self.image_shape
        return self.image_shape[0], self.resize_to, self.resize_to

    def to_metadata(self) -> dict[str, str]:
        """The entry that describes this network in a file of weights."""
        return {NETWORK_KEY: json.dumps(asdict(self), sort_keys=True)}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> "NetworkSpec":
        """The network that the metadata of a file describes.

        Raises:
            WeightsError: if they describe none, or not in this form.
        """
        if NETWORK_KEY not in metadata:
            raise WeightsError(
                "the file does not say which network it holds; write ARCHITECTURE:FILE, "
                "for example resnet18:weights.safetensors"
            )
        try:
            table = json.loads(metadata[NETWORK_KEY])
            channels, height, width = table.pop("image_shape")
            for name in ("mean", "std"):
                table[name] = None if table[name] is None else tuple(table[name])
            return cls(image_shape=(channels, height, width), **table)
        except (ValueError, TypeError, KeyError, AttributeError, RecipeError) as error:
            raise WeightsError(
                f"the file's description of its network cannot be understood ({error}): "
                f"{metadata[NETWORK_KEY][:200]}; it may come from another version"
            ) from None


class Preprocessing(nn.Module):
    """Resize, then subtract the mean and divide by the std; each only where it is given.

    The resizing is bilinear without antialiasing, which ONNX and TensorRT do alike.
    """

    mean_C11: Tensor | None
    std_C11: Tensor | None

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        # Not persistent: they are in the spec, and the file holds only the backbone's tensors.
        self.register_buffer("mean_C11", _per_channel(spec.mean), persistent=False)
        self.register_buffer("std_C11", _per_channel(spec.std), persistent=False)
        is_same_size = spec.backbone_shape == spec.image_shape
        self.resize_to = None if is_same_size else spec.resize_to

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Images [N, C, resize_to, resize_to], or [N, C, H, W] where there is no resizing."""
        if self.resize_to is not None:
            size = (self.resize_to, self.resize_to)
            x_NCHW = F.interpolate(x_NCHW, size=size, mode="bilinear", align_corners=False)
        if self.mean_C11 is not None and self.std_C11 is not None:
            x_NCHW = (x_NCHW - self.mean_C11) / self.std_C11
        return x_NCHW


class Classifier(nn.Module):
    """Preprocessing and backbone: images in [0, 1] to logits."""

    def __init__(self, preprocessing: Preprocessing, backbone: nn.Module) -> None:
        super().__init__()
        self.preprocessing = preprocessing
        self.backbone = backbone

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Logits [N, K] of images [N, C, H, W] in [0, 1]."""
        return self.backbone(self.preprocessing(x_NCHW))  # type: ignore[no-any-return]


def build_classifier(spec: NetworkSpec, *, seed: int) -> Classifier:
    """A classifier whose initial weights are a function of `seed`; global randomness stays.

    On the CPU, in training mode.

    Raises:
        RecipeError: if there is no such network.
    """
    with torch.random.fork_rng(devices=[]):
        # `torch.manual_seed` would also seed the accelerators, whose states are not put back.
        torch.default_generator.manual_seed(seed)
        backbone = build_backbone(
            spec.architecture,
            num_classes=spec.num_classes,
            image_shape=spec.backbone_shape,
            width=spec.width,
        )
    return Classifier(Preprocessing(spec), backbone)


def save_classifier(
    path: Path, classifier: Classifier, spec: NetworkSpec, metadata: Mapping[str, object]
) -> None:
    """Write the backbone's tensors under their own names, with what is known about them.

    Args:
        path: a `.safetensors` file.
        classifier: what to save.
        spec: how to build it again.
        metadata: facts by name, such as `class_names`. Each goes to `robust_compress.NAME` in
            the file: texts as they are, other values as JSON.

    Raises:
        WeightsError: if the file cannot be written.
    """
    facts = {
        f"robust_compress.{name}": value if isinstance(value, str) else json.dumps(value)
        for name, value in metadata.items()
    }
    write_safetensors(path, classifier.backbone.state_dict(), facts | spec.to_metadata())


def load_classifier(path: Path) -> tuple[Classifier, NetworkSpec]:
    """What `save_classifier` wrote; on the CPU, in evaluation mode.

    Raises:
        WeightsError: if the file cannot be read, does not describe its network, or its
            tensors do not fit the description.
    """
    content = read_state_dict(path)
    try:
        spec = NetworkSpec.from_metadata(content.metadata)
        return classifier_with_weights(spec, content), spec
    except (WeightsError, RecipeError) as error:
        raise WeightsError(f"{path}: {error}") from None


def load_trained(run: RunDirectory) -> tuple[Classifier, NetworkSpec]:
    """The selected network of a run whose training has ended.

    Raises:
        RunError: if training has not ended.
        ArtefactMismatchError: if the file is not the one that training wrote.
    """
    expected = read_facts(run).get("model_sha256")
    if expected is None or not run.model.is_file():
        raise RunError(
            f"{run.path} has no finished {run.model.name}: its training has not ended; continue "
            "it with --resume"
        )
    found = sha256_of_file(run.model)
    if found != expected:
        raise ArtefactMismatchError(
            f"{run.model} has SHA-256 {found}, training wrote {expected}; --resume writes it again"
        )
    return load_classifier(run.model)


def classifier_with_weights(spec: NetworkSpec, content: StateDict) -> Classifier:
    """A classifier with the tensors of a file, in evaluation mode.

    Raises:
        RecipeError: if there is no such network.
        WeightsError: if the tensors do not fit it.
    """
    classifier = build_classifier(spec, seed=0)
    classifier.backbone.load_state_dict(fit_to_layout(content.tensors, classifier.backbone))
    return classifier.eval()


@contextmanager
def evaluation_mode(network: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every layer is in the mode that it had before."""
    was_training = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, flag in was_training.items():
            module.training = flag


def count_parameters(network: nn.Module) -> int:
    """Number of trainable and frozen parameters; buffers do not count."""
    return sum(parameter.numel() for parameter in network.parameters())


def _per_channel(values: tuple[float, ...] | None) -> Tensor | None:
    return None if values is None else torch.tensor(values, dtype=torch.float32).view(-1, 1, 1)
