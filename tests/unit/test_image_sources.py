"""Sources: what they list, how they decode, and the cache."""

import hashlib
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torchvision.datasets
from PIL import Image

from compressor import image_cache, image_decoding
from compressor.errors import DataError
from compressor.image_cache import cache_folder, cached_images
from compressor.image_sources import open_source
from compressor.recipe import DataRecipe


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ROBUST_COMPRESS_CACHE", str(tmp_path / "cache"))


def recipe_for(source, **changes):
    return DataRecipe(source=str(source), validation_size=4, **changes)


def save_image(path: Path, *, seed=0, shape=(6, 5, 3)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def make_folder(root: Path, *, test="test"):
    """Three training images and one test image of each of two classes."""
    expected = []
    for part, count in (("train", 3), (test, 1)):
        for label, name in enumerate(("cat", "dog")):
            for number in range(count):
                path = root / part / name / f"{number}.png"
                pixels = save_image(path, seed=10 * label + number)
                expected += [pixels.transpose(2, 0, 1)] if part == "train" else []
    return np.stack(expected)


def test_digits_are_all_there_and_their_test_part_is_balanced():
    parts = {part: open_source(recipe_for("digits"), part=part) for part in ("train", "test")}
    counts = np.bincount(parts["test"].labels)
    assert (len(parts["train"].labels), len(parts["test"].labels)) == (1300, 497)
    assert counts.tolist() == [50] * 7 + [49] * 3
    assert parts["train"].image_shape == (1, 8, 8)
    pixels = [part.images.images_NCHW for part in parts.values()]
    assert max(x.max() for x in pixels) == 255
    rows = [image.tobytes() for part in pixels for image in part]
    assert len(set(rows)) == 1797  # no image twice, so the parts share none


@pytest.mark.parametrize("test", ["test", "val"])
def test_image_folder(tmp_path, test):
    expected_NCHW = make_folder(tmp_path, test=test)
    (tmp_path / "train/cat/.hidden").write_text("ignored")
    source = open_source(recipe_for(f"imagefolder:{tmp_path}"), part="train")
    assert source.class_names == ("cat", "dog")
    assert source.labels == (0, 0, 0, 1, 1, 1)
    assert source.num_bytes == expected_NCHW.nbytes
    np.testing.assert_array_equal(source.images.read_all(num_workers=1), expected_NCHW)
    np.testing.assert_array_equal(source.images.read(4), expected_NCHW[4])
    assert len(open_source(recipe_for(f"imagefolder:{tmp_path}"), part="test").labels) == 2


def test_opening_the_training_part_decodes_no_test_image(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "test/cat/0.png").write_bytes(b"damaged")
    source = open_source(recipe_for(f"imagefolder:{tmp_path}"), part="train")
    source.images.check(num_workers=1)


def test_processes_decode_the_same(tmp_path, monkeypatch):
    make_folder(tmp_path)
    images = open_source(recipe_for(f"imagefolder:{tmp_path}"), part="train").images
    alone_NCHW = images.read_all(num_workers=1)
    monkeypatch.setattr(image_decoding, "_MIN_FILES_FOR_PROCESSES", 1)
    monkeypatch.setattr(image_decoding, "_PIECE", 2)
    np.testing.assert_array_equal(images.read_all(num_workers=2), alone_NCHW)
    images.check(num_workers=2)
    (tmp_path / "train/dog/1.png").write_bytes(b"damaged")
    for decode in (images.read_all, images.check):
        with pytest.raises(DataError, match=r"1 file .*\n  train/dog/1\.png"):
            decode(num_workers=2)


def test_resize_crops_the_centre_and_convert_changes_channels(tmp_path):
    for part in ("train", "test"):
        for name in ("a", "b"):
            path = tmp_path / part / name / "0.png"
            path.parent.mkdir(parents=True)
            image = Image.new("RGB", (12, 4), "black")
            image.paste("white", (4, 0, 8, 4))  # the centre square
            image.save(path)
            image.resize((20, 10)).convert("LA").save(path.with_name("1.png"))
    recipe = recipe_for(f"imagefolder:{tmp_path}", image_size=4, num_channels=1)
    images_NCHW = open_source(recipe, part="train").images.read_all(num_workers=1)
    assert images_NCHW.shape == (4, 1, 4, 4)
    assert (images_NCHW[0] == 255).all()


def test_arrays_are_resized_and_converted_too():
    source = open_source(recipe_for("digits", image_size=16, num_channels=3), part="test")
    assert source.image_shape == (3, 16, 16)
    assert source.images.read(0).dtype == np.uint8


def test_content_hash_follows_bytes_labels_and_decoding_but_not_names_or_the_place(tmp_path):
    for root in ("one", "two"):
        make_folder(tmp_path / root)

    def content(root, **changes):
        recipe = recipe_for(f"imagefolder:{tmp_path / root}", **changes)
        return open_source(recipe, part="train").content_sha256

    before = content("one")
    assert content("two") == before
    assert content("one", num_channels=1) != before
    save_image(tmp_path / "two/train/dog/2.png", seed=99)
    assert content("two") != before
    (tmp_path / "one/train/dog/2.png").rename(tmp_path / "one/train/cat/3.png")
    assert content("one") != before


def test_training_images_in_another_folder_are_the_same_images(tmp_path):
    """Or they could be given for test images and not be noticed."""
    make_folder(tmp_path / "data")
    shutil.copytree(tmp_path / "data/train", tmp_path / "seen/train")
    shutil.copytree(tmp_path / "data/train", tmp_path / "seen/test")
    trained = open_source(recipe_for(f"imagefolder:{tmp_path / 'data'}"), part="train")
    tested = open_source(recipe_for(f"imagefolder:{tmp_path / 'seen'}"), part="test")
    assert tested.content_sha256 == trained.content_sha256


def make_tiny_imagenet(root: Path):
    for number, wnid in enumerate(("n01", "n02")):
        for image in range(2):
            path = root / f"train/{wnid}/images/{wnid}_{image}.JPEG"
            save_image(path, seed=10 * number + image, shape=(64, 64, 3))
        (root / f"train/{wnid}/{wnid}_boxes.txt").write_text("not an image")
    lines = []
    for number, wnid in enumerate(("n02", "n01", "n02")):
        save_image(root / f"val/images/val_{number}.JPEG", seed=number, shape=(64, 64, 3))
        lines.append(f"val_{number}.JPEG\t{wnid}\t0\t0\t62\t62")
    (root / "val/val_annotations.txt").write_text("\n".join(lines) + "\n")


def test_tiny_imagenet(tmp_path):
    make_tiny_imagenet(tmp_path)
    train = open_source(recipe_for(f"tiny-imagenet:{tmp_path}"), part="train")
    test = open_source(recipe_for(f"tiny-imagenet:{tmp_path}"), part="test")
    assert train.class_names == test.class_names == ("n01", "n02")
    assert (train.labels, test.labels) == ((0, 0, 1, 1), (0, 1, 1))
    assert test.images.names == tuple(f"val/images/val_{n}.JPEG" for n in (1, 0, 2))
    assert train.image_shape == (3, 64, 64)


def make_cifar10(root: Path, monkeypatch):
    """Files in CIFAR-10's own format, under MD5 sums that are theirs."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / name).read_bytes(), usedforsecurity=False).hexdigest()

    def write_batch(name):
        pixels = rng.integers(0, 256, (20, 3072), dtype=np.uint8)
        return [name, write(name, {"data": pixels, "labels": list(range(10)) * 2})], pixels

    train, pixels = write_batch("data_batch_1")
    test, _ = write_batch("test_batch")
    names = [f"class {number}" for number in range(10)]
    meta = {"filename": "batches.meta", "key": "label_names"}
    meta["md5"] = write("batches.meta", {"label_names": names})
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "train_list", [train])
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "test_list", [test])
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "meta", meta)
    return pixels.reshape(-1, 3, 32, 32)


def test_cifar10(tmp_path, monkeypatch):
    pixels_NCHW = make_cifar10(tmp_path, monkeypatch)
    source = open_source(recipe_for(f"cifar10:{tmp_path}"), part="train")
    assert source.labels == tuple(range(10)) * 2
    assert source.class_names[3] == "class 3"
    np.testing.assert_array_equal(source.images.images_NCHW, pixels_NCHW)


def test_cifar10_that_was_changed_is_refused_before_it_is_unpickled(tmp_path, monkeypatch):
    make_cifar10(tmp_path, monkeypatch)
    (tmp_path / "cifar-10-batches-py/data_batch_1").write_bytes(b"cos\nabort\n(tR.")
    with pytest.raises(DataError, match=r"CIFAR10 in .* corrupted"):
        open_source(recipe_for(f"cifar10:{tmp_path}"), part="train")


def test_fashion_mnist(tmp_path):
    folder = tmp_path / "FashionMNIST/raw"
    folder.mkdir(parents=True)
    pixels_NHW = np.random.default_rng(0).integers(0, 256, (20, 28, 28), dtype=np.uint8)
    header = (0x803).to_bytes(4, "big") + b"".join(n.to_bytes(4, "big") for n in pixels_NHW.shape)
    labels = (0x801).to_bytes(4, "big") + (20).to_bytes(4, "big") + bytes(range(10)) * 2
    for part in ("train", "t10k"):
        (folder / f"{part}-images-idx3-ubyte").write_bytes(header + pixels_NHW.tobytes())
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(labels)
    source = open_source(recipe_for(f"fashion-mnist:{tmp_path}"), part="test")
    assert source.image_shape == (1, 28, 28)
    assert source.labels == tuple(range(10)) * 2
    np.testing.assert_array_equal(source.images.read(7)[0], pixels_NHW[7])


IMAGES_NCHW = np.arange(2 * 3 * 4 * 5, dtype=np.uint8).reshape(2, 3, 4, 5)


def entries():
    return list(cache_folder().iterdir())


def must_not_decode():
    raise AssertionError("the cache was not used")


def test_second_reading_comes_from_the_cache():
    cached_images("key", lambda: IMAGES_NCHW)
    np.testing.assert_array_equal(cached_images("key", must_not_decode), IMAGES_NCHW)
    assert len(entries()) == 1  # nothing unfinished is left


@pytest.mark.parametrize("damage", ["empty", "truncated", "one bit", "other pixels"])
def test_damaged_entry_is_decoded_again_and_replaced(damage, caplog):
    cached_images("key", lambda: IMAGES_NCHW)
    (entry,) = entries()
    content = entry.read_bytes()
    if damage == "other pixels":
        image_cache.save_file({"images_NCHW": IMAGES_NCHW[:1]}, entry, {"sha256": "0" * 64})
    else:
        last = bytes([content[-1] ^ 1])
        changed = {"empty": b"", "truncated": content[:-9], "one bit": content[:-1] + last}
        entry.write_bytes(changed[damage])
    np.testing.assert_array_equal(cached_images("key", lambda: IMAGES_NCHW), IMAGES_NCHW)
    assert "decoding again" in caplog.text
    assert entry.read_bytes() == content


def test_cache_that_cannot_be_written_is_only_logged(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("ROBUST_COMPRESS_CACHE", str(tmp_path / "file/cache"))
    np.testing.assert_array_equal(cached_images("key", lambda: IMAGES_NCHW), IMAGES_NCHW)
    assert "not cached" in caplog.text


def test_cache_folder_follows_the_environment(monkeypatch):
    monkeypatch.delenv("ROBUST_COMPRESS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/robust-compress")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache/robust-compress"
