"""One row for each way in which data can be wrong: what is done to a good folder, what is said."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from compressor.augmentation import Augmentation
from compressor.data import load_test_split, load_training_data, training_batches
from compressor.errors import DataError
from compressor.performance_settings import PerformanceSettings
from compressor.recipe import DataRecipe

SETTINGS = PerformanceSettings(num_workers=1)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ROBUST_COMPRESS_CACHE", str(tmp_path / "cache"))


def save(path, *, size=(8, 8), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size).save(path)


@pytest.fixture
def folder(tmp_path):
    """A good image folder: two classes, eight training images and one test image of each."""
    for name in ("cat", "dog"):
        for number in range(8):
            save(tmp_path / f"train/{name}/{number}.png")
        save(tmp_path / f"test/{name}/0.png")
    return tmp_path


@pytest.fixture
def tiny_imagenet(tmp_path):
    """Two classes with four training images each, and two test images."""
    for wnid in ("n01", "n02"):
        for number in range(4):
            save(tmp_path / f"train/{wnid}/images/{wnid}_{number}.JPEG")
    for number in range(2):
        save(tmp_path / f"val/images/val_{number}.JPEG")
    annotations = "val_0.JPEG\tn01\t0\t0\t9\t9\nval_1.JPEG\tn02\t0\t0\t9\t9\n"
    (tmp_path / "val/val_annotations.txt").write_text(annotations)
    return tmp_path


def remove(path):
    """A file, or a folder with what is in it."""
    for inner in path.iterdir() if path.is_dir() else ():
        remove(inner)
    path.rmdir() if path.is_dir() else path.unlink()


def truncate(path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    path.write_bytes(path.read_bytes()[:100])


def spoil_all(root):
    for path in (root / "train/cat").iterdir():
        path.write_bytes(b"damaged")


BAD_FOLDERS = {
    "not an image": (
        lambda root: (root / "train/cat/3.png").write_bytes(b"damaged"),
        "1 file in {root} cannot be used; repair or remove them\n  train/cat/3.png: is not an",
    ),
    "first one is not an image": (
        lambda root: (root / "train/cat/0.png").write_bytes(b""),
        "train/cat/0.png: is not an image",
    ),
    "truncated": (lambda root: truncate(root / "train/dog/1.png"), "train/dog/1.png: is damaged"),
    "many bad files": (spoil_all, "8 files in {root} cannot"),
    "five are named": (
        spoil_all,
        "train/cat/4.png: is not an image that can be read\n  and 3 more",
    ),
    "text among images": (
        lambda root: (root / "train/dog/notes.txt").write_text("notes"),
        "train/dog/notes.txt: is not an image",
    ),
    "folder among images": (
        lambda root: (root / "train/dog/more").mkdir(),
        "train/dog has folders among its images: more",
    ),
    "other size": (
        lambda root: save(root / "train/dog/2.png", size=(9, 7)),
        "train/dog/2.png: 9x7 pixels where the first image has 8x8; set data.image_size",
    ),
    "other channels": (
        lambda root: save(root / "train/dog/2.png", mode="L"),
        "train/dog/2.png: 1 channels where the first image has 3; set data.num_channels",
    ),
    "palette": (
        lambda root: save(root / "train/dog/2.png", mode="P"),
        "train/dog/2.png: has pixels of mode P; set data.num_channels",
    ),
    "sixteen bits": (
        lambda root: save(root / "train/dog/2.png", mode="I;16"),
        "train/dog/2.png: has pixels of mode I;16; store it with 8 bits",
    ),
    "empty class": (
        lambda root: (root / "train/emu").mkdir(),
        "train has class folders without images: emu",
    ),
    "empty class in test": (
        lambda root: remove(root / "test/dog/0.png"),
        "test has class folders without images: dog",
    ),
    "class only in train": (
        lambda root: save(root / "train/emu/0.png"),
        "train and test do not have the same class folders; only in train: emu",
    ),
    "class only in test": (
        lambda root: save(root / "test/emu/0.png"),
        "only in test: emu",
    ),
    "no train": (lambda root: remove(root / "train"), "{root} has no folder train"),
    "no test": (lambda root: remove(root / "test"), "{root} has no folder test or val"),
    "no classes": (
        lambda root: (remove(root / "train/cat"), remove(root / "train/dog")),
        "train has no class folders",
    ),
    "one class": (
        lambda root: (remove(root / "train/dog"), remove(root / "test/dog")),
        "imagefolder train has only one class, 'cat'",
    ),
    "class too small for validation": (
        lambda root: [remove(root / f"train/dog/{number}.png") for number in range(6)],
        "has only 2 of class 'dog'; set it to 2 or less",
    ),
    "one image of a class": (
        lambda root: [remove(root / f"train/dog/{number}.png") for number in range(7)],
        "has only 1 of class 'dog'; add images of that class",
    ),
    "missing": (remove, "there is no folder {root}"),
}


def load(source, *, validation_size=4):
    recipe = DataRecipe(source=source, validation_size=validation_size)
    return load_training_data(recipe, seed=0, settings=SETTINGS, device=CPU)


def says(text):
    return pytest.raises(DataError, match=re.escape(text))


@pytest.mark.parametrize(("spoil", "message"), BAD_FOLDERS.values(), ids=BAD_FOLDERS)
def test_bad_image_folder(folder, spoil, message):
    load(f"imagefolder:{folder}")  # good before
    spoil(folder)
    with says(message.format(root=folder)):
        load(f"imagefolder:{folder}")


def test_bad_test_image_is_named_when_the_test_split_is_loaded(folder):
    (folder / "test/dog/0.png").write_bytes(b"damaged")
    load(f"imagefolder:{folder}")
    recipe = DataRecipe(source=f"imagefolder:{folder}", validation_size=4)
    with says("test/dog/0.png: is not an image"):
        load_test_split(recipe, settings=SETTINGS, device=CPU)


BAD_ANNOTATIONS = {
    "missing": (remove, "val_annotations.txt cannot be read"),
    "no tab": (lambda path: path.write_text("val_0.JPEG n01\n"), "line 1: 'val_0.JPEG n01' is not"),
    "unknown class": (lambda path: path.write_text("val_0.JPEG\tn99\n"), "line 1: 'val_0.JPEG"),
    "image without a class": (
        lambda path: path.write_text("val_0.JPEG\tn01\n"),
        "do not agree about val/images/val_1.JPEG",
    ),
    "class without an image": (
        lambda path: path.write_text("val_0.JPEG\tn01\nval_1.JPEG\tn01\n"),
        "has no image of class n02",
    ),
    "image named twice": (
        lambda path: path.write_text("val_0.JPEG\tn01\nval_1.JPEG\tn02\nval_1.JPEG\tn01\n"),
        "names some images twice",
    ),
    "not a text": (lambda path: path.write_bytes(b"\xff\xfe\xff"), "cannot be read"),
}


@pytest.mark.parametrize(("spoil", "message"), BAD_ANNOTATIONS.values(), ids=BAD_ANNOTATIONS)
def test_bad_annotations(tiny_imagenet, spoil, message):
    load(f"tiny-imagenet:{tiny_imagenet}", validation_size=2)  # good before
    spoil(tiny_imagenet / "val/val_annotations.txt")
    with says(message):
        load(f"tiny-imagenet:{tiny_imagenet}", validation_size=2)


BAD_SOURCES = {
    "mnist": "data.source = 'mnist' is not known; use one of digits, imagefolder:FOLDER, cifar10:",
    "digits:there": "must be written 'digits'",
    "cifar10": "must be written 'cifar10:FOLDER'",
    "cifar10:": "must be written 'cifar10:FOLDER'",
    "cifar100:no/such/folder": "there is no folder no/such/folder",
}


@pytest.mark.parametrize(("source", "message"), BAD_SOURCES.items(), ids=BAD_SOURCES)
def test_bad_source(source, message):
    with says(message):
        load(source)


@pytest.mark.parametrize("kind", ["cifar10", "cifar100", "fashion-mnist"])
def test_data_set_that_is_not_there(kind, tmp_path):
    with says("Dataset not found"):
        load(f"{kind}:{tmp_path}")


BAD_VALIDATION_SIZES = {
    9: "is less than one image for each of the 10 classes",
    1_300: "takes 130 images of a class, and digits train has only",
    100_000: "takes 10000 images of a class",
}


@pytest.mark.parametrize(("size", "message"), BAD_VALIDATION_SIZES.items())
def test_bad_validation_size(size, message):
    with says(message):
        load("digits", validation_size=size)


@pytest.mark.parametrize("num_images", [0, 498])
def test_bad_number_of_test_images(num_images):
    recipe = DataRecipe(source="digits", validation_size=10)
    with says("ask for 1 to 497"):
        load_test_split(recipe, settings=SETTINGS, device=CPU, num_images=num_images)


def test_batch_larger_than_the_split(folder):
    augment = Augmentation(crop_padding_pixels=0, horizontal_flip=False)
    train = load(f"imagefolder:{folder}").train
    with says("has 12 images, fewer than one batch; set training.batch_size to at most 12"):
        training_batches(train, batch_size=13, seed=0, epoch=0, augment=augment)
