"""Training, validation and test images as batches of tensors.

What a sample looks like is a function of (seed, epoch, position in the training images), never
of the batch it is in, of the device or of where the images are stored. Test images have a type
of their own, so that they cannot be trained on by accident.

N images, C channels, H rows, W columns.
"""

import dataclasses
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from compressor.augmentation import Augmentation
from compressor.data_sizes import check_training_size, check_validation_size
from compressor.errors import DataError
from compressor.image_decoding import ImageShape
from compressor.image_sources import ImageSource, open_source
from compressor.image_storage import ImageStorage, store_images
from compressor.performance_settings import PerformanceSettings
from compressor.randomness import Stream, permutation, sample_keys, uniform
from compressor.ranks import ALONE, Ranks
from compressor.recipe import DataRecipe
from compressor.sample_order import balanced_order, proportional_order


@dataclass(frozen=True, kw_only=True, eq=False)
class Shard:
    """What a rank knows of the whole batch of which it has a part."""

    ranks: Ranks
    num_images: int
    key: Tensor
    """Of the first image of the batch, int64 [1]."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Some images; all tensors are on the device of the run."""

    x_NCHW: Tensor
    """float32 in [0, 1], channels last in memory."""
    y_N: Tensor
    """int64 labels."""
    index_N: Tensor
    """int64 positions in the source's part, the same in every run."""
    keys_N: Tensor
    """int64 keys of the samples' random numbers in this epoch; see `compressor.randomness`."""
    shard: Shard | None = None
    """None where these are all images of the step."""

    @property
    def ranks(self) -> Ranks:
        """Those that share the step."""
        return ALONE if self.shard is None else self.shard.ranks

    @property
    def num_images(self) -> int:
        """Of the whole step, on all ranks."""
        return len(self.y_N) if self.shard is None else self.shard.num_images

    @property
    def key(self) -> Tensor:
        """For what is drawn once a step, int64 [1]: the key of its first image."""
        return self.keys_N[:1] if self.shard is None else self.shard.key

    def mean(self, values_N: Tensor) -> Tensor:
        """Mean over all images of the step of one value for each, a scalar; see `Ranks.total`."""
        if self.shard is None:
            return values_N.mean()
        return self.ranks.total(values_N.sum()) / self.num_images


@dataclass(frozen=True, kw_only=True, eq=False)
class _Split:
    name: str
    class_names: tuple[str, ...]
    image_shape: ImageShape
    """Channels, rows, columns."""
    index_N: Tensor
    """int64 positions in the source's part, rising, on the device."""
    labels_N: Tensor
    """int64, on the device, in the order of `index_N`."""
    index_sha256: str
    """Hash of `index_N` as little-endian int64."""
    num_available: int
    """Images of the source's part, of which these are all or some."""
    content_sha256: str
    """Hash of all images and labels of the source's part."""
    storage: ImageStorage

    @property
    def num_images(self) -> int:
        """How many images the split has."""
        return len(self.index_N)


class TrainingSplit(_Split):
    """Images for training, or held out of them for validation."""

    def without(self, places_N: Tensor) -> "TrainingSplit":
        """The split but for some places, int64; images and hash follow."""
        is_left_N = torch.ones_like(self.index_N, dtype=torch.bool)
        is_left_N[places_N.to(self.index_N.device)] = False
        index_N = self.index_N[is_left_N]
        return dataclasses.replace(
            self,
            index_N=index_N,
            labels_N=self.labels_N[is_left_N],
            index_sha256=_hash_of_places(index_N.cpu()),
        )


class TestSplit(_Split):
    """Images for the final report."""

    __test__ = False  # or pytest takes the class for a test case


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingData:
    """The two parts of the training images; they share their storage."""

    train: TrainingSplit
    validation: TrainingSplit


def load_training_data(
    recipe: DataRecipe,
    *,
    seed: int,
    settings: PerformanceSettings,
    device: torch.device,
    download: bool = False,
    ranks: Ranks = ALONE,
) -> TrainingData:
    """The training images, with a class-balanced part of them held out for validation.

    Args:
        recipe: Names the source and the size of the validation part.
        seed: Of the run; decides which images are held out where the recipe has no `split_seed`.
        settings: Whether images are cached, and how much memory they may take.
        device: Where batches will be.
        download: Let torchvision fetch a data set that is not there.
        ranks: Those that load the same at the same time, and share the work.

    Raises:
        DataError: if the source is not usable, or `validation_size` does not fit it.
    """
    source = open_source(recipe, part="train", download=download)
    labels_N = torch.tensor(source.labels)
    check_validation_size(source, labels_N, recipe.validation_size)
    keys_N = sample_keys(torch.arange(len(labels_N)), seed=recipe.split_seed_in_run(seed))
    order_N = balanced_order(labels_N, uniform(keys_N, stream=Stream.HOLD_OUT))
    held_out, rest = order_N.tensor_split([recipe.validation_size])
    check_training_size(recipe, num_left=len(rest))
    if recipe.training_size is not None:  # any beginning of such an order is balanced
        draws_N = uniform(keys_N[rest], stream=Stream.HOLD_OUT)
        rest = rest[balanced_order(labels_N[rest], draws_N)][: recipe.training_size]
    storage = store_images(source, settings=settings, device=device, ranks=ranks)

    def split(name: str, index_N: Tensor) -> TrainingSplit:
        return _split(TrainingSplit, source, storage, name=name, index_N=index_N, device=device)

    return TrainingData(train=split("train", rest), validation=split("validation", held_out))


def load_test_split(
    recipe: DataRecipe,
    *,
    settings: PerformanceSettings,
    device: torch.device,
    num_images: int | None = None,
    seed: int = 0,
) -> TestSplit:
    """The test images, or a random part of them with the classes in proportion.

    So an accuracy of the part estimates that of all, whatever the shares of the classes.

    Args:
        recipe: Names the source.
        settings: Whether images are cached, and how much memory they may take.
        device: Where batches will be.
        num_images: Size of the part; None for all.
        seed: Decides which images are in the part.

    Raises:
        DataError: if the source is not usable, or has fewer than `num_images` images.
    """
    source = open_source(recipe, part="test")
    labels_N = torch.tensor(source.labels)
    if num_images is not None and not 1 <= num_images <= len(labels_N):
        raise DataError(
            f"{num_images} images were asked for, {source.name} has {len(labels_N)}; "
            f"ask for 1 to {len(labels_N)}"
        )
    keys_N = sample_keys(torch.arange(len(labels_N)), seed=seed)
    draws_N2 = uniform(keys_N, stream=Stream.SUBSET, shape=(2,))
    chosen = proportional_order(labels_N, draws_N2)[:num_images]
    storage = store_images(source, settings=settings, device=device)
    return _split(TestSplit, source, storage, name="test", index_N=chosen, device=device)


def training_batches(
    split: TrainingSplit,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    first_batch: int = 0,
    augment: Augmentation,
    ranks: Ranks = ALONE,
) -> Iterator[Batch]:
    """One epoch in random order, augmented; the last batch may be smaller.

    Args:
        split: What to train on.
        batch_size: Images in each batch but the last.
        seed: With `epoch` it decides the order, the crops and the flips.
        epoch: Counts from 0.
        first_batch: Skip this many batches without reading their images.
        augment: What to do to each image.
        ranks: Each gets its part of every batch.

    Raises:
        DataError: if the split has fewer images than one batch.
        TypeError: if the split is not one for training.
    """
    if not isinstance(split, TrainingSplit):
        raise TypeError(f"training takes a TrainingSplit, not a {type(split).__name__}")
    if batch_size > split.num_images:
        raise DataError(
            f"the {split.name} split has {split.num_images} images, fewer than one batch; "
            f"set training.batch_size to at most {split.num_images} (it is {batch_size})"
        )
    keys_N = sample_keys(split.index_N, seed=seed, epoch=epoch)
    order_N = permutation(keys_N)[first_batch * batch_size :]
    return _batches(split, order_N, keys_N, batch_size=batch_size, augment=augment, ranks=ranks)


def evaluation_batches(
    split: TrainingSplit | TestSplit,
    *,
    batch_size: int,
    seed: int = 0,
    order_N: Tensor | None = None,
) -> Iterator[Batch]:
    """Images as they are; the last batch may be smaller.

    Args:
        split: What to measure on.
        batch_size: Images in each batch but the last.
        seed: Decides the keys of the batches, from which attacks draw.
        order_N: Which places of the split, in this order, int64; None for all as they lie.
    """
    if order_N is None:
        order_N = torch.arange(split.num_images, device=split.index_N.device)
    keys_N = sample_keys(split.index_N, seed=seed)
    return _batches(split, order_N, keys_N, batch_size=batch_size, augment=None)


def _batches(
    split: _Split,
    order_N: Tensor,
    keys_N: Tensor,
    *,
    batch_size: int,
    augment: Augmentation | None,
    ranks: Ranks = ALONE,
) -> Iterator[Batch]:
    """`order_N` holds places in the split; `keys_N` has the order of the split."""
    whole = torch.split(order_N, batch_size) if len(order_N) else ()
    places = [places_B[ranks.part(len(places_B))] for places_B in whole]
    images = split.storage.batches([split.index_N[places_B] for places_B in places])
    for all_B, places_B, images_BCHW in zip(whole, places, images, strict=True):
        keys_B = keys_N[places_B]
        shard = Shard(ranks=ranks, num_images=len(all_B), key=keys_N[all_B[:1]])
        if augment is not None:
            images_BCHW = augment.apply(images_BCHW, keys_B)
        yield Batch(
            x_NCHW=images_BCHW.contiguous(memory_format=torch.channels_last).float().div_(255),
            y_N=split.labels_N[places_B],
            index_N=split.index_N[places_B],
            keys_N=keys_B,
            shard=shard if ranks.num_ranks > 1 else None,
        )


_SplitType = TypeVar("_SplitType", bound=_Split)


def _split(
    split_type: type[_SplitType],
    source: ImageSource,
    storage: ImageStorage,
    *,
    name: str,
    index_N: Tensor,
    device: torch.device,
) -> _SplitType:
    rising_N = index_N.sort().values
    return split_type(
        name=name,
        class_names=source.class_names,
        image_shape=source.image_shape,
        index_N=rising_N.to(device),
        labels_N=torch.tensor(source.labels)[rising_N].to(device),
        index_sha256=_hash_of_places(rising_N),
        num_available=len(source.labels),
        content_sha256=source.content_sha256,
        storage=storage,
    )


def _hash_of_places(index_N: Tensor) -> str:
    return hashlib.sha256(index_N.numpy().astype("<i8").tobytes()).hexdigest()
