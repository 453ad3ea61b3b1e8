"""Where images come from: one opener for each kind of data set.

Opening reads names and labels and decodes at most one image; the training part never looks
at an image of the test part.

N images, C channels, H rows, W columns.
"""

import hashlib
import importlib.resources
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from compressor.errors import DataError
from compressor.image_decoding import Decoding, ImageArray, ImageFiles, ImageShape, image_files
from compressor.recipe import DataRecipe

Part = Literal["train", "test"]

_NUM_DIGITS_TEST = 497
_Listing = Mapping[str, Sequence[str]]  # class name -> files, relative to the root


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageSource:
    """One part of a data set, not decoded yet."""

    name: str
    """For messages: the kind of source and the part."""
    class_names: tuple[str, ...]
    labels: tuple[int, ...]
    """Position of each image's class in `class_names`."""
    images: ImageFiles | ImageArray

    @property
    def image_shape(self) -> ImageShape:
        """Channels, rows, columns of every image."""
        return self.images.image_shape

    @property
    def num_bytes(self) -> int:
        """Size of all images as uint8."""
        channels, rows, columns = self.image_shape
        return len(self.labels) * channels * rows * columns

    @cached_property
    def content_sha256(self) -> str:
        """Hash of the images, as stored, of their labels and of how they are decoded."""
        parts = (self.class_names, self.labels, self.images.content_sha256())
        return hashlib.sha256(repr(parts).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class _Request:
    """What an opener is asked for."""

    part: Part
    root: Path
    decoding: Decoding
    download: bool


def open_source(recipe: DataRecipe, *, part: Part, download: bool = False) -> ImageSource:
    """One part of the data set that a recipe names.

    Args:
        recipe: Names the source, and how images are resized and converted.
        part: `train`, or `test` for the images that are kept for the final report.
        download: Let torchvision fetch a data set that is not there.

    Raises:
        DataError: if the source is unknown or missing, or its layout, its classes or its
            labels are not as they must be.
    """
    kind, _, location = recipe.source.partition(":")
    if kind not in SOURCES:
        valid = ", ".join(name if name in _ROOTLESS else f"{name}:FOLDER" for name in SOURCES)
        raise DataError(f"data.source = {recipe.source!r} is not known; use one of {valid}")
    if (kind in _ROOTLESS) == bool(location):
        right = kind if location else f"{kind}:FOLDER"
        raise DataError(f"data.source = {recipe.source!r} must be written {right!r}")
    try:
        root = Path(location).expanduser()
    except RuntimeError:
        raise DataError(f"data.source = {recipe.source!r}: there is no such user") from None
    if location and not download and not root.is_dir():
        raise DataError(f"data.source = {recipe.source!r}: there is no folder {root}")
    decoding = Decoding(image_size=recipe.image_size, num_channels=recipe.num_channels)
    source = SOURCES[kind](_Request(part=part, root=root, decoding=decoding, download=download))
    if len(source.class_names) < 2:
        raise DataError(
            f"{source.name} has only one class, {source.class_names[0]!r}; "
            "a classifier needs two or more"
        )
    return source


def _open_digits(request: _Request) -> ImageSource:
    """The digits that come with the package.

    Test images are 50 of each of the digits 0 to 6 and 49 of each of 7 to 9, spread evenly over
    the file: of the n images of a digit, in file order, those at i * n // 50 (or 49). The rest
    is for training.
    """
    data = importlib.resources.files("compressor").joinpath("digits.npz")
    with data.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        images_NCHW, labels_N = arrays["images"], arrays["labels"]
    is_test_N = np.zeros(len(labels_N), dtype=bool)
    for digit in range(10):
        num_test = _NUM_DIGITS_TEST // 10 + (digit < _NUM_DIGITS_TEST % 10)
        of_digit = np.flatnonzero(labels_N == digit)
        is_test_N[of_digit[np.arange(num_test) * len(of_digit) // num_test]] = True
    chosen_N = is_test_N if request.part == "test" else ~is_test_N
    return ImageSource(
        name=f"digits {request.part}",
        class_names=tuple(str(digit) for digit in range(10)),
        labels=tuple(labels_N[chosen_N].tolist()),
        images=_decoded_array(images_NCHW[chosen_N].squeeze(1), request.decoding),
    )


def _open_image_folder(request: _Request) -> ImageSource:
    """`train/<class>/*` and `test/<class>/*`, or `val` where there is no `test`.

    The names of both parts are compared whichever is asked for, so that a mistake in the test
    part shows before training and not after.
    """
    root = request.root
    test = "test" if (root / "test").is_dir() else "val"
    if not (root / test).is_dir():
        raise DataError(
            f"{root} has no folder test or val; the report needs images that training never "
            "sees, in test/<class>/"
        )
    listings = {"train": _list_classes(root, "train"), "test": _list_classes(root, test)}
    _check_same_classes(listings["train"], listings["test"], test=test)
    return _from_listing(listings[request.part], request, kind="imagefolder")


def _open_tiny_imagenet(request: _Request) -> ImageSource:
    """The published layout; its `val` is the test part, as the labels of its `test` are secret."""
    train = _list_classes(request.root, "train", inside="images")
    test = _read_val_annotations(request.root, class_names=tuple(train))
    listing = train if request.part == "train" else test
    return _from_listing(listing, request, kind="tiny-imagenet")


def _open_torchvision(request: _Request, *, class_name: str) -> ImageSource:
    """A data set that torchvision reads; it checks the files of CIFAR against their MD5 first."""
    import torchvision.datasets  # here, as it takes a second and most sources do not need it

    try:
        dataset = getattr(torchvision.datasets, class_name)(
            request.root, train=request.part == "train", download=request.download
        )
    except (RuntimeError, OSError, ValueError, EOFError, pickle.UnpicklingError) as error:
        hint = (
            "check the connection" if request.download else "let --download fetch it, or repair it"
        )
        raise DataError(f"{class_name} in {request.root}: {error}; {hint}") from None
    return ImageSource(
        name=f"{class_name} {request.part}",
        class_names=tuple(dataset.classes),
        labels=tuple(int(label) for label in dataset.targets),
        images=_decoded_array(np.asarray(dataset.data), request.decoding),
    )


_ROOTLESS = {"digits"}

SOURCES: Mapping[str, Callable[[_Request], ImageSource]] = MappingProxyType(
    {
        "digits": _open_digits,
        "imagefolder": _open_image_folder,
        "cifar10": partial(_open_torchvision, class_name="CIFAR10"),
        "cifar100": partial(_open_torchvision, class_name="CIFAR100"),
        "fashion-mnist": partial(_open_torchvision, class_name="FashionMNIST"),
        "tiny-imagenet": _open_tiny_imagenet,
    }
)


def _decoded_array(images: NDArray[np.uint8], decoding: Decoding) -> ImageArray:
    """From [N, H, W] or [N, H, W, C]."""
    if decoding == Decoding():
        images_NHWC = images if images.ndim == 4 else images[..., None]
        return ImageArray(images_NCHW=np.ascontiguousarray(images_NHWC.transpose(0, 3, 1, 2)))
    converted = [decoding.apply(Image.fromarray(image)) for image in images]
    return ImageArray(images_NCHW=np.stack(converted))


def _from_listing(listing: _Listing, request: _Request, *, kind: str) -> ImageSource:
    names = [name for files in listing.values() for name in files]
    return ImageSource(
        name=f"{kind} {request.part}",
        class_names=tuple(listing),
        labels=tuple(label for label, files in enumerate(listing.values()) for _ in files),
        images=image_files(request.root, names, request.decoding),
    )


def _list_classes(root: Path, part: str, *, inside: str = "") -> _Listing:
    """Files of each class folder of `root/part`, classes and files in the order of their names."""
    folder = root / part
    if not folder.is_dir():
        raise DataError(f"{root} has no folder {part}; images belong in {part}/<class>/")
    classes = sorted(path.name for path in _visible(folder) if path.is_dir())
    if not classes:
        raise DataError(f"{folder} has no class folders; images belong in {part}/<class>/")
    listing = {name: _list_files(root, folder / name / inside) for name in classes}
    if empty := [name for name, files in listing.items() if not files]:
        raise DataError(
            f"{folder} has class folders without images: {_some(empty)}; "
            "add images or remove the folders from every part"
        )
    return listing


def _list_files(root: Path, folder: Path) -> list[str]:
    paths = sorted(_visible(folder)) if folder.is_dir() else []
    if folders := [path.name for path in paths if path.is_dir()]:
        raise DataError(f"{folder} has folders among its images: {_some(folders)}; move them away")
    return [path.relative_to(root).as_posix() for path in paths]


def _visible(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if not path.name.startswith(".")]


def _check_same_classes(train: _Listing, test_listing: _Listing, *, test: str) -> None:
    problems = [
        f"only in {part}: {_some(sorted(only))}"
        for part, only in (
            ("train", train.keys() - test_listing.keys()),
            (test, test_listing.keys() - train.keys()),
        )
        if only
    ]
    if problems:
        raise DataError(
            f"train and {test} do not have the same class folders; {'; '.join(problems)}"
        )


def _read_val_annotations(root: Path, *, class_names: Sequence[str]) -> _Listing:
    """Files of each class according to `val/val_annotations.txt`, which must name all of them."""
    path = root / "val" / "val_annotations.txt"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} cannot be read ({error}); it names the class of each test image"
        ) from None
    listing: dict[str, list[str]] = {name: [] for name in class_names}
    for number, line in enumerate(lines, start=1):
        file_name, tab, rest = line.partition("\t")
        class_name = rest.partition("\t")[0]
        if not tab or class_name not in listing:
            raise DataError(
                f"{path}, line {number}: {line!r} is not an image and a class of train, "
                "separated by tabs"
            )
        listing[class_name].append(f"val/images/{file_name}")
    _check_annotated(root, path, listing)
    return listing


def _check_annotated(root: Path, path: Path, listing: _Listing) -> None:
    annotated = [name for files in listing.values() for name in files]
    present = set(_list_files(root, root / "val" / "images"))
    if different := sorted(present.symmetric_difference(annotated)):
        raise DataError(
            f"{path} and the files in val/images do not agree about {_some(different)}; "
            "unpack the data set again"
        )
    if len(annotated) > len(present):
        raise DataError(f"{path} names some images twice; unpack the data set again")
    if empty := [name for name, files in listing.items() if not files]:
        raise DataError(f"{path} has no image of class {_some(empty)}; unpack the data set again")


def _some(names: Sequence[str]) -> str:
    """The first five names and how many there are."""
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
