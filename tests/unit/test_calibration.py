"""Calibration sees training images only, the kind that was asked for, a batch at a time."""

import hashlib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from compressor.data import evaluation_batches, load_test_split, load_training_data
from compressor.performance_settings import PerformanceSettings
from compressor.recipe import DataRecipe
from compressor.threat import ThreatModel
from exporters.held_out import choosing_places, held_out_images, judging_places
from exporters.int8 import calibration
from exporters.int8.calibration import CALIBRATION_KINDS, CalibrationImages, as_input

SETTINGS = PerformanceSettings(device="cpu", training_dtype="float32", num_threads=1)
RECIPE = DataRecipe(source="digits", validation_size=100)
THREAT = ThreatModel(epsilon_pixels=8 / 255)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data():
    return load_training_data(RECIPE, seed=0, settings=SETTINGS, device=CPU)


@pytest.fixture
def network(make_tiny):
    return make_tiny(num_classes=10, num_channels=1).eval()


@pytest.fixture
def images(network, data):
    return CalibrationImages(
        network=network, split=data.train, threat=THREAT, num_images=150, kind="clean"
    )


def pixels(images):
    return np.concatenate(list(images.batches()))


def everything(split):
    """All images of a split in one batch."""
    return next(evaluation_batches(split, batch_size=split.num_images))


def rows(x_NCHW):
    """Images as values that can be in a set."""
    return {image.tobytes() for image in np.asarray(x_NCHW)}


def test_only_training_images_are_seen(images, data, network):
    """Neither those on which the result is judged nor those of the final report."""
    every = replace(images, num_images=10**6)
    seen = rows(pixels(every))
    places_N = judging_places(data.validation, num_images=100)
    held_out = held_out_images(network, data.validation, places_N, threat=THREAT)
    test = load_test_split(RECIPE, settings=SETTINGS, device=CPU)
    of_test = rows(everything(test).x_NCHW)
    assert len(of_test) > 400
    assert not seen & rows(held_out.x_NCHW)
    assert not seen & of_test
    assert seen <= rows(everything(data.train).x_NCHW)


def test_their_positions_are_not_those_of_held_out_images(images, data):
    every = replace(images, num_images=10**6)
    assert len(pixels(every)) == data.train.num_images
    assert not {*data.train.index_N.tolist()} & {*data.validation.index_N.tolist()}


def test_hash_is_that_of_the_images_that_are_seen(images, data):
    x_NCHW = pixels(images)
    every = everything(data.train)
    place_of = {image.tobytes(): n for n, image in enumerate(every.x_NCHW.numpy())}
    index_N = every.index_N[[place_of[image.tobytes()] for image in x_NCHW]]
    expected = hashlib.sha256(index_N.numpy().astype("<i8").tobytes()).hexdigest()
    assert images.index_sha256 == expected
    assert replace(images, num_images=149).index_sha256 != expected
    assert replace(images, kind="adversarial").index_sha256 == expected


@pytest.mark.parametrize(
    ("num_images", "sizes"),
    [(1, [1]), (2, [1, 1]), (64, [32, 32]), (128, [64, 64]), (150, [50, 50, 50])],
)
def test_number_of_images_and_batches(images, num_images, sizes):
    batches = list(replace(images, num_images=num_images).batches())
    assert [len(batch) for batch in batches] == sizes
    assert batches[0].dtype == np.float32
    assert batches[0].flags.c_contiguous
    assert len(rows(np.concatenate(batches))) == num_images


@pytest.mark.parametrize("labels", ["one class after the other", "classes take turns"])
def test_every_batch_is_like_the_whole_split(images, data, labels):
    """Every n-th image would be of one class where classes take turns."""
    num_images = data.train.num_images
    labels_N = torch.arange(num_images) % 10
    if labels == "one class after the other":
        labels_N = labels_N.sort().values
    split = replace(data.train, labels_N=labels_N)
    batches = list(replace(images, split=split).batches())
    places_N = replace(images, split=split)._places()
    assert len(set(places_N.tolist())) == 150
    for part in torch.split(places_N, len(batches[0])):
        counts = torch.bincount(labels_N[part], minlength=10)
        assert counts.min() >= 3, counts
        assert counts.max() <= 7, counts


def test_images_that_choose_judge_nothing(data):
    split = data.validation
    judging = set(judging_places(split, num_images=40).tolist())
    choosing = set(choosing_places(split, num_images=40).tolist())
    assert (len(judging), len(choosing)) == (40, 40)
    assert not judging & choosing
    every = [
        *judging_places(split, num_images=10**6).tolist(),
        *choosing_places(split, num_images=10**6).tolist(),
    ]
    assert sorted(every) == list(range(split.num_images))


def test_a_split_without_some_places(data):
    """As if they had never been there."""
    places_N = judging_places(data.validation, num_images=40)
    rest = data.validation.without(places_N)
    assert rest.num_images == data.validation.num_images - 40
    left_out = {*data.validation.index_N[places_N].tolist()}
    assert {*rest.index_N.tolist()} == {*data.validation.index_N.tolist()} - left_out
    batch = everything(rest)
    whole = everything(data.validation)
    assert rows(batch.x_NCHW) | rows(whole.x_NCHW[places_N]) == rows(whole.x_NCHW)
    assert batch.y_N.equal(whole.y_N[torch.isin(whole.index_N, rest.index_N)])
    assert rest.index_sha256 != data.validation.index_sha256


def test_batches_are_made_when_they_are_asked_for(images, monkeypatch):
    """One at a time, so that memory does not grow with their number."""
    made = []
    original = calibration.evaluation_batches

    def counted(*arguments, **options):
        for batch in original(*arguments, **options):
            made.append(len(batch.y_N))
            yield batch

    monkeypatch.setattr(calibration, "evaluation_batches", counted)
    batches = images.batches()
    assert made == []
    next(batches)
    assert made == [50]


def test_kinds(images):
    """Clean ones are the images; adversarial ones are near them; mixed are both by turns."""
    clean, adversarial, mixed = (
        list(replace(images, kind=kind).batches()) for kind in CALIBRATION_KINDS
    )
    for place, (one, other) in enumerate(zip(clean, adversarial, strict=True)):
        moved = np.abs(one - other).max(axis=(1, 2, 3))
        assert moved.max() <= THREAT.epsilon_pixels + 1e-6
        assert (moved > 0.5 * THREAT.epsilon_pixels).mean() > 0.9
        expected = other if place % 2 else one
        assert np.array_equal(mixed[place], expected)


@pytest.mark.parametrize("num_images", [2, 20, 64, 100])
def test_mixed_are_half_attacked_however_few(images, num_images):
    few = replace(images, num_images=num_images)
    clean, mixed = pixels(few), pixels(replace(few, kind="mixed"))
    assert (clean != mixed).any(axis=(1, 2, 3)).mean() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("kind", CALIBRATION_KINDS)
def test_the_same_images_every_time(images, kind):
    images = replace(images, kind=kind, num_images=70)
    assert np.array_equal(pixels(images), pixels(images))


def test_adversarial_images_fool_the_network_more(make_trained):
    network, x_NCHW, y_N = make_trained(64)
    batch = SimpleNamespace(x_NCHW=x_NCHW, y_N=y_N, keys_N=torch.arange(64))
    x_adv_NCHW = calibration.attacked(network, batch, threat=ThreatModel(epsilon_pixels=16 / 255))
    with torch.no_grad():
        right = [(network(x).argmax(dim=1) == y_N).sum() for x in (x_NCHW, x_adv_NCHW)]
    assert right[1] < right[0]


def test_bytes_are_the_nearest():
    x_NCHW = torch.tensor([0.0, 0.2 / 255, 0.6 / 255, 128 / 255, 1.0]).reshape(1, 1, 1, 5)
    found = as_input(x_NCHW, takes_bytes=True)
    assert found.dtype == np.uint8
    assert found.flatten().tolist() == [0, 0, 1, 128, 255]
    assert as_input(x_NCHW, takes_bytes=False).dtype == np.float32


def test_images_of_a_file_that_takes_bytes_are_bytes(images):
    whole = replace(images, takes_bytes=True)
    assert np.array_equal(pixels(whole), (pixels(images) * 255).round().astype(np.uint8))
