"""Splits and batches: what is held out, and what a sample looks like wherever it is."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from compressor import image_cache
from compressor.augmentation import Augmentation
from compressor.data import (
    TestSplit,
    TrainingSplit,
    evaluation_batches,
    load_test_split,
    load_training_data,
    training_batches,
)
from compressor.errors import DataError
from compressor.image_decoding import ImageArray
from compressor.image_storage import ResidentImages, StreamedImages
from compressor.performance_settings import PerformanceSettings
from compressor.randomness import Stream, sample_keys, uniform
from compressor.recipe import DataRecipe

CPU = torch.device("cpu")
SETTINGS = PerformanceSettings(num_workers=1)
DIGITS = DataRecipe(source="digits", validation_size=103)
CROP_AND_FLIP = Augmentation(crop_padding_pixels=2, horizontal_flip=True)
NOTHING = Augmentation(crop_padding_pixels=0, horizontal_flip=False)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ROBUST_COMPRESS_CACHE", str(tmp_path / "cache"))


def load(*, seed=0, recipe=DIGITS, settings=SETTINGS):
    return load_training_data(recipe, seed=seed, settings=settings, device=CPU)


def batches(split, *, batch_size=128, seed=0, epoch=0, first_batch=0, augment=CROP_AND_FLIP):
    return list(
        training_batches(
            split,
            batch_size=batch_size,
            seed=seed,
            epoch=epoch,
            first_batch=first_batch,
            augment=augment,
        )
    )


def evaluation_batches_of(split):
    return list(evaluation_batches(split, batch_size=200))


def join(batches, field):
    return torch.cat([getattr(batch, field) for batch in batches])


def by_index(batches):
    """Images in the order of their positions."""
    return join(batches, "x_NCHW")[join(batches, "index_N").argsort()]


def assert_same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        for field in ("x_NCHW", "y_N", "index_N", "keys_N"):
            assert torch.equal(getattr(batch, field), getattr(other, field))


@pytest.fixture(scope="module")
def data():
    return load()


@pytest.fixture(scope="module")
def streamed(data):
    """The training split of `data`, as if it were too large for the memory budget."""
    images_NCHW = data.train.storage.images_NHWC.permute(0, 3, 1, 2).contiguous().numpy()
    images = ImageArray(images_NCHW=images_NCHW)
    return replace(data.train, storage=StreamedImages(images=images, num_workers=2, device=CPU))


@pytest.mark.parametrize("validation_size", [10, 103, 500])
def test_hold_out_is_balanced_and_the_rest_is_training(validation_size):
    data = load(recipe=DIGITS.model_copy(update={"validation_size": validation_size}))
    counts = torch.bincount(data.validation.labels_N, minlength=10)
    assert counts.sum() == validation_size
    assert counts.max() - counts.min() <= 1
    together = torch.cat([data.train.index_N, data.validation.index_N]).sort().values
    assert torch.equal(together, torch.arange(1300))


def test_a_part_of_the_training_images_is_balanced_and_the_hold_out_is_the_same(data):
    part = load(recipe=DIGITS.model_copy(update={"training_size": 203}))
    counts = torch.bincount(part.train.labels_N, minlength=10)
    assert counts.sum() == part.train.num_images == 203
    assert counts.max() - counts.min() <= 1
    assert part.validation.index_sha256 == data.validation.index_sha256
    assert {*part.train.index_N.tolist()} <= {*data.train.index_N.tolist()}


def test_more_training_images_than_there_are(data):
    num_left = data.train.num_images
    everything = load(recipe=DIGITS.model_copy(update={"training_size": num_left}))
    assert everything.train.index_sha256 == data.train.index_sha256
    with pytest.raises(DataError, match=f"{num_left + 1} is more than the {num_left} images"):
        load(recipe=DIGITS.model_copy(update={"training_size": num_left + 1}))


def test_hold_out_follows_the_seed(data):
    again, other = load(), load(seed=1)
    assert again.validation.index_sha256 == data.validation.index_sha256
    assert other.validation.index_sha256 != data.validation.index_sha256
    assert other.train.content_sha256 == data.train.content_sha256


def test_a_split_seed_holds_out_the_same_images_in_runs_of_all_seeds(data):
    """And takes the same part of the others."""
    recipe = DIGITS.model_copy(update={"split_seed": 0, "training_size": 203})
    first, second = load(recipe=recipe, seed=1), load(recipe=recipe, seed=2)
    assert first.validation.index_sha256 == data.validation.index_sha256
    assert first.validation.index_sha256 == second.validation.index_sha256
    assert first.train.index_sha256 == second.train.index_sha256
    other = load(recipe=DIGITS.model_copy(update={"split_seed": 3}))
    assert other.validation.index_sha256 != data.validation.index_sha256


def test_index_hash_can_be_recomputed(data):
    index = sorted(data.train.index_N.tolist())
    expected = hashlib.sha256(np.array(index, dtype="<i8").tobytes()).hexdigest()
    assert data.train.index_sha256 == expected


def test_batch_has_the_promised_types(data):
    batch = batches(data.train, batch_size=7)[0]
    assert batch.x_NCHW.shape == (7, 1, 8, 8)
    assert batch.x_NCHW.dtype == torch.float32
    assert batch.x_NCHW.is_contiguous(memory_format=torch.channels_last)
    assert 0 <= batch.x_NCHW.min() <= batch.x_NCHW.max() <= 1
    assert {batch.y_N.dtype, batch.index_N.dtype, batch.keys_N.dtype} == {torch.int64}
    assert torch.equal(batch.keys_N, sample_keys(batch.index_N, seed=0, epoch=0))


def test_an_epoch_has_every_image_once_and_a_smaller_last_batch(data):
    epoch = batches(data.train, batch_size=500)
    assert [len(batch.y_N) for batch in epoch] == [500, 500, 197]
    assert torch.equal(join(epoch, "index_N").sort().values, data.train.index_N)


def test_order_follows_seed_and_epoch(data):
    def order(**changes):
        return join(batches(data.train, **changes), "index_N")

    assert torch.equal(order(), order())
    assert not torch.equal(order(), order(epoch=1))
    assert not torch.equal(order(), order(seed=1))


def test_labels_and_pixels_belong_together(data):
    ordered = list(evaluation_batches(data.train, batch_size=100))
    assert torch.equal(join(ordered, "index_N"), data.train.index_N)
    shuffled = batches(data.train, augment=NOTHING)
    assert torch.equal(by_index(shuffled), join(ordered, "x_NCHW"))
    rank = join(shuffled, "index_N").argsort()
    assert torch.equal(join(shuffled, "y_N")[rank], data.train.labels_N)


def test_batch_size_changes_no_sample_and_the_epoch_changes_many(data):
    images = by_index(batches(data.train, batch_size=128))
    assert torch.equal(by_index(batches(data.train, batch_size=31)), images)
    other = by_index(batches(data.train, epoch=1))
    assert (images != other).flatten(1).any(dim=1).float().mean() > 0.8


@pytest.mark.parametrize("horizontal_flip", [False, True])
@pytest.mark.parametrize("padding", [0, 3])
def test_crop_and_flip_are_those_of_a_naive_reference(data, padding, horizontal_flip):
    augment = Augmentation(crop_padding_pixels=padding, horizontal_flip=horizontal_flip)
    originals = by_index(evaluation_batches_of(data.train)).numpy()
    epoch = batches(data.train, augment=augment)
    keys_N = join(epoch, "keys_N")[join(epoch, "index_N").argsort()]
    draws = {
        stream: uniform(keys_N, stream=stream).tolist()
        for stream in (Stream.CROP_ROW, Stream.CROP_COLUMN, Stream.FLIP)
    }
    for number, image in enumerate(by_index(epoch).numpy()):
        padded = np.pad(originals[number], ((0, 0), (padding, padding), (padding, padding)))
        top = int(draws[Stream.CROP_ROW][number] * (2 * padding + 1))
        left = int(draws[Stream.CROP_COLUMN][number] * (2 * padding + 1))
        expected = padded[:, top : top + 8, left : left + 8]
        if horizontal_flip and draws[Stream.FLIP][number] < 0.5:
            expected = expected[:, :, ::-1]
        np.testing.assert_array_equal(image, expected)


@pytest.mark.parametrize("first_batch", [0, 1, 2, 3])
def test_starting_later_is_skipping(data, first_batch):
    whole = batches(data.train, batch_size=400)
    assert_same(batches(data.train, batch_size=400, first_batch=first_batch), whole[first_batch:])


@pytest.mark.parametrize("first_batch", [0, 2])
def test_streaming_gives_the_same_batches(data, streamed, first_batch):
    assert isinstance(data.train.storage, ResidentImages)
    settings = {"batch_size": 300, "epoch": 3, "first_batch": first_batch}
    assert_same(batches(streamed, **settings), batches(data.train, **settings))


def test_streaming_leaves_the_global_generator_alone(streamed):
    before = torch.get_rng_state()
    list(evaluation_batches(streamed, batch_size=600))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture
def large_images(tmp_path):
    """Two classes of 16 training images of 128 x 128 pixels: more than one MiB."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 16), ("test", 2)):
        for name in ("cat", "dog"):
            folder = tmp_path / "images" / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (128, 128, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number:02}.png", compress_level=0)
    return DataRecipe(source=f"imagefolder:{tmp_path / 'images'}", validation_size=4)


def test_a_small_memory_budget_streams_files(large_images):
    small = PerformanceSettings(num_workers=1, memory_budget_mib=1)
    streamed, resident = load(recipe=large_images, settings=small), load(recipe=large_images)
    assert isinstance(streamed.train.storage, StreamedImages)
    assert isinstance(resident.train.storage, ResidentImages)
    assert_same(batches(streamed.train, batch_size=9), batches(resident.train, batch_size=9))
    assert_same(
        evaluation_batches_of(streamed.validation), evaluation_batches_of(resident.validation)
    )


def test_streaming_finds_damaged_files_before_the_first_batch(large_images, tmp_path):
    (tmp_path / "images/train/dog/05.png").write_bytes(b"damaged")
    small = PerformanceSettings(num_workers=1, memory_budget_mib=1)
    with pytest.raises(DataError, match=r"train/dog/05\.png"):
        load(recipe=large_images, settings=small)


def test_second_load_comes_from_the_cache_and_is_the_same(large_images, monkeypatch):
    first = load(recipe=large_images)
    assert len(list(image_cache.cache_folder().iterdir())) == 1
    monkeypatch.setattr("compressor.image_decoding._map_pieces", None)  # nothing is decoded
    assert_same(
        batches(load(recipe=large_images).train, batch_size=5), batches(first.train, batch_size=5)
    )


def test_the_cache_can_be_switched_off(large_images):
    load(recipe=large_images, settings=PerformanceSettings(num_workers=1, cache_images=False))
    assert not image_cache.cache_folder().exists()


def test_test_split_is_another_type_and_cannot_be_trained_on():
    test = load_test_split(DIGITS, settings=SETTINGS, device=CPU)
    assert isinstance(test, TestSplit)
    assert not isinstance(test, TrainingSplit)
    assert test.num_images == 497
    with pytest.raises(TypeError, match="not a TestSplit"):
        batches(test)


def test_part_of_the_test_split_has_the_classes_in_proportion_and_follows_its_seed():
    def part(seed):
        return load_test_split(DIGITS, settings=SETTINGS, device=CPU, num_images=95, seed=seed)

    whole = load_test_split(DIGITS, settings=SETTINGS, device=CPU)
    counts, shares = torch.bincount(part(0).labels_N), torch.bincount(whole.labels_N) / 497
    assert counts.sum() == 95
    assert (counts - 95 * shares).abs().max() < 1
    assert (part(0).num_available, whole.num_available) == (497, 497)
    assert part(0).index_sha256 == part(0).index_sha256 != part(1).index_sha256
    images = by_index(evaluation_batches_of(whole))
    assert torch.equal(by_index(evaluation_batches_of(part(0))), images[part(0).index_N])
