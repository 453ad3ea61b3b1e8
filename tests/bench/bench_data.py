"""The data pipeline alone: memory over epochs of a large data set, and images per second.

Makes JPEGs of 224 x 224 pixels in a folder of its own, streams them as a run does whose data set is
too large for memory, and compares with torchvision's ImageFolder in a DataLoader with as many
worker processes, the same crop of a padded image and the same flip. The two take turns.

    python -m tests.bench.bench_data --write docs/results/bench-data.md
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from compressor.augmentation import Augmentation
from compressor.data import TrainingData, load_training_data, training_batches
from compressor.environment import describe_environment
from compressor.performance import resolve_performance
from compressor.performance_settings import PerformanceSettings
from compressor.recipe import DataRecipe
from compressor.reports.markdown import markdown_table
from compressor.run_directory import write_json_atomically, write_text_atomically
from tests.bench.command import typed_command
from tests.bench.interleaved import Spread, per_second, ratio, seconds_in_turn

NUM_CLASSES, BATCH_SIZE, SIDE_PIXELS, PADDING_PIXELS = 10, 128, 224, 4
NUM_BATCHES_IN_TURN = 8
_FEWEST_EPOCHS = 5
MEMORY_MIB = 1
"""Of the data set in memory: less than it takes, so that it is streamed."""


def make_images(folder: Path, num_images: int) -> None:
    """JPEGs of smooth noise, whose size in bytes is that of photographs."""
    generator = np.random.default_rng(0)
    for part, number in (("train", num_images), ("test", NUM_CLASSES)):
        for place in range(number):
            path = folder / part / f"class{place % NUM_CLASSES}" / f"{place:06}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            coarse = generator.integers(0, 256, (28, 28, 3), dtype=np.uint8)
            image = Image.fromarray(coarse).resize(
                (SIDE_PIXELS, SIDE_PIXELS), Image.Resampling.BICUBIC
            )
            image.save(path, quality=90)


def ours(data: TrainingData, epoch: int) -> Iterator[Tensor]:
    """Float images as a step of training gets them."""
    augment = Augmentation(crop_padding_pixels=PADDING_PIXELS, horizontal_flip=True)
    for batch in training_batches(
        data.train, batch_size=BATCH_SIZE, seed=0, epoch=epoch, augment=augment
    ):
        yield batch.x_NCHW


def theirs(folder: Path, num_workers: int) -> Iterator[Tensor]:
    """torchvision as its documentation shows it."""
    transform = v2.Compose(
        [
            v2.PILToTensor(),
            v2.RandomCrop(SIDE_PIXELS, padding=PADDING_PIXELS),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
        ]
    )
    loader = torch.utils.data.DataLoader(
        ImageFolder(folder / "train", transform),
        batch_size=BATCH_SIZE,
        shuffle=True,
        num_workers=num_workers,
    )
    for x_NCHW, _ in loader:
        yield x_NCHW


def take(batches: Iterator[Tensor], number: int) -> int:
    """Images of so many batches; the sum makes sure that they are there."""
    return sum(len(x_NCHW) for x_NCHW in islice(batches, number) if x_NCHW.sum() >= 0)


def memory_mib() -> float:
    """Of this process and its children, what they share counted once."""
    children = Path("/proc/self/task").glob("*/children")
    own = [pid for path in children for pid in path.read_text().split()]
    total_kib = 0
    for pid in ("self", *own):
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended since
        total_kib += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total_kib / 1024


def memory_over_epochs(
    data: TrainingData, *, num_epochs: int, every: int
) -> list[dict[str, float]]:
    """MiB and images per second after every so many batches."""
    found = []
    for epoch in range(num_epochs):
        started_at_seconds, num_images = time.perf_counter(), 0
        for number, x_NCHW in enumerate(ours(data, epoch), start=1):
            num_images += len(x_NCHW)
            if number % every == 0:
                seconds = time.perf_counter() - started_at_seconds
                found.append(
                    {
                        "epoch": epoch + 1,
                        "num_images": num_images,
                        "mib": memory_mib(),
                        "images_per_second": num_images / seconds,
                    }
                )
    return found


def growth_per_epoch(memory: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Least squares through the mean of each epoch but the first, in MiB per epoch.

    The means, as readings of one epoch hang together; and each epoch was read at the same places.
    The standard error is that of the slope of a line with independent errors.
    """
    epochs = sorted({m["epoch"] for m in memory})[1:]
    means = [statistics.fmean(m["mib"] for m in memory if m["epoch"] == e) for e in epochs]
    fit = statistics.linear_regression(epochs, means)
    left = [y - fit.slope * x - fit.intercept for x, y in zip(epochs, means, strict=True)]
    variance = sum(r**2 for r in left) / (len(epochs) - 2)
    squares = sum((x - statistics.fmean(epochs)) ** 2 for x in epochs)
    return {
        "mib": fit.slope,
        "standard_error": (variance / squares) ** 0.5,
        "num_epochs": len(epochs),
    }


def measure(folder: Path, *, num_images: int, num_epochs: int, num_rounds: int) -> dict[str, Any]:
    settings = PerformanceSettings(memory_budget_mib=MEMORY_MIB, cache_images=False)
    performance = resolve_performance(settings)
    recipe = DataRecipe(source=f"imagefolder:{folder}", validation_size=NUM_CLASSES)
    data = load_training_data(recipe, seed=0, settings=settings, device=performance.device)
    num_workers = data.train.storage.num_workers
    before_mib = memory_mib()
    num_batches = num_images // BATCH_SIZE
    every = max(1, num_batches // 4)
    memory = memory_over_epochs(data, num_epochs=num_epochs, every=every)
    passes = {
        "ours": lambda: take(ours(data, 0), NUM_BATCHES_IN_TURN),
        "torchvision": lambda: take(theirs(folder, num_workers), NUM_BATCHES_IN_TURN),
    }
    seconds = seconds_in_turn(passes, num_rounds=num_rounds)
    amount = NUM_BATCHES_IN_TURN * BATCH_SIZE
    return {
        "num_images": num_images,
        "num_workers": num_workers,
        "before_mib": before_mib,
        "memory": memory,
        "growth_per_epoch": growth_per_epoch(memory),
        "ratio": vars(ratio(seconds["torchvision"], seconds["ours"])),
        "ours_images_per_second": vars(per_second(amount, seconds["ours"])),
        "torchvision_images_per_second": vars(per_second(amount, seconds["torchvision"])),
        "environment": describe_environment(performance),
    }


def _markdown(found: dict[str, Any]) -> str:
    memory = markdown_table(
        ("epoch", "images", "MiB", "images/s"),
        [
            (
                f"{m['epoch']}",
                f"{m['num_images']:,}",
                f"{m['mib']:,.0f}",
                f"{m['images_per_second']:,.0f}",
            )
            for m in found["memory"]
        ],
    )
    speeds = {
        name: Spread(**found[name])
        for name in ("ratio", "ours_images_per_second", "torchvision_images_per_second")
    }
    growth = found["growth_per_epoch"]
    lines = [
        "# The data pipeline alone",
        "",
        f"{found['num_images']:,} JPEGs of {SIDE_PIXELS} x {SIDE_PIXELS} pixels, streamed by "
        f"{found['num_workers']} processes in batches of {BATCH_SIZE}, cropped and flipped. Memory "
        "of all processes, what they share counted once (Pss); before the first epoch "
        f"{found['before_mib']:,.0f} MiB.",
        "",
        memory,
        "",
        f"From epoch to epoch it grows by {growth['mib']:.2f} MiB (standard error "
        f"{growth['standard_error']:.2f}): least squares through the means of "
        f"{growth['num_epochs']} epochs, without the first. Freed memory stays with the process, "
        "so that readings go up and down.",
        "",
        "Beside torchvision's `ImageFolder` in a `DataLoader` with as many processes, in turn, "
        f"{NUM_BATCHES_IN_TURN} batches each, starting the processes included. Median (lowest to "
        f"highest) of {speeds['ratio'].num_rounds} rounds:",
        "",
        f"- ours: {speeds['ours_images_per_second']} images/s",
        f"- torchvision: {speeds['torchvision_images_per_second']} images/s",
        f"- ratio: {speeds['ratio']}",
        "",
        f"Command: `{found['command']}`.",
        "",
        *(f"- {name}: {value}" for name, value in found["environment"].items()),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    if options.epochs < _FEWEST_EPOCHS:
        parser.error(f"--epochs {options.epochs}: give {_FEWEST_EPOCHS} or more to fit a line")
    with tempfile.TemporaryDirectory() as name:
        make_images(Path(name), options.images)
        found = measure(
            Path(name),
            num_images=options.images,
            num_epochs=options.epochs,
            num_rounds=options.rounds,
        )
    found["command"] = typed_command("tests.bench.bench_data", options)
    text = _markdown(found)
    sys.stdout.write(text)
    if options.write:
        write_json_atomically(options.write.with_suffix(".json"), found)
        write_text_atomically(options.write, text)


if __name__ == "__main__":
    main()
