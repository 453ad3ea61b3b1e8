"""Measure one finished run: clean, under the attacks of the papers, and by the cascade."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from compressor.attacks.stages import protocol_of
from compressor.comparison.folder import ComparisonFolder
from compressor.comparison.measurements import (
    CASCADE,
    WHITE_BOX,
    Attacked,
    CleanAnswers,
    Examination,
    Standing,
    Subject,
    find_attacked,
    find_clean,
    read_attacked,
    write_clean,
)
from compressor.data import evaluation_batches, load_test_split
from compressor.networks import evaluation_mode, load_trained
from compressor.performance import resolve_performance
from compressor.performance_settings import PerformanceSettings
from compressor.recipe_file import load_recipe
from compressor.run_directory import RunDirectory, read_facts
from compressor.verification.cascade import answer_clean
from compressor.verification.progress import VerificationProgress
from compressor.verification.request import VerificationRequest
from compressor.verification.verification import network_subject
from compressor.verification_workflow import verify

_BATCH_SIZE = 250


@dataclass(frozen=True, kw_only=True)
class ImageCounts:
    """On how many test images each part measures; 0: not at all."""

    clean: int
    white_box: int
    cascade: int

    @property
    def attacks(self) -> Iterator[tuple[str, Sequence[str], int]]:
        """(part, its attacks, its images) of the parts that attack."""
        for part, attacks in (("white_box", WHITE_BOX), ("cascade", CASCADE)):
            if num_images := getattr(self, part):
                yield part, attacks, num_images


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What is known about the weights of one run; None: not measured."""

    clean: Standing | None = None
    white_box: Attacked | None = None
    cascade: Attacked | None = None

    def lacks(self, images: ImageCounts) -> list[str]:
        """Parts that are asked for and not there yet, in their order."""
        parts = ["clean", *(part for part, _, _ in images.attacks)]
        return [part for part in parts if getattr(self, part) is None]


@dataclass(frozen=True, kw_only=True)
class MeasuringWatchers:
    """Told before each part, and while it attacks."""

    part: Callable[[str], None] = lambda _: None
    verification: Callable[[VerificationProgress], None] = lambda _: None


def find_measured(
    run: RunDirectory, folder: ComparisonFolder, *, images: ImageCounts, test_sha256: str
) -> Measured:
    """What earlier calls have measured on the weights of a finished run.

    Args:
        run: its folder's name is that of its measurements.
        folder: of the comparison.
        images: how many test images each part is to have.
        test_sha256: of the content of the test images.
    """
    model_sha256 = read_facts(run)["model_sha256"]
    subject = Subject(model_sha256=model_sha256, content_sha256=test_sha256)
    name = run.path.name
    threat = load_recipe(run.resolved_recipe).threat.build()
    attacked = {
        part: find_attacked(
            folder,
            name,
            subject,
            Examination(
                threat=threat,
                attacks=tuple(attacks),
                num_images=num_images,
                protocol=protocol_of(attacks, "fast"),
            ),
        )
        for part, attacks, num_images in images.attacks
    }
    clean = find_clean(folder.clean(name), subject, num_images=images.clean)
    return Measured(clean=clean, **attacked)


def measure(
    run: RunDirectory,
    folder: ComparisonFolder,
    found: Measured,
    *,
    images: ImageCounts,
    settings: PerformanceSettings,
    watchers: MeasuringWatchers,
) -> Measured:
    """Measure what `found` lacks; each part is on disk before the next begins.

    Raises:
        InvalidEvaluationError: if an attack left its threat model.
        RobustCompressError: if the data cannot be used.
    """
    missing = found.lacks(images)
    if "clean" in missing:
        watchers.part("clean")
        path = folder.clean(run.path.name)
        clean = _answer(run, path, num_images=images.clean, settings=settings)
        found = replace(found, clean=clean)
    for part, attacks, num_images in images.attacks:
        if part not in missing:
            continue
        watchers.part(part)
        request = VerificationRequest(
            target=str(run.path),
            settings=settings,
            attacks=attacks,
            num_images=num_images,
            folder=folder.verification(run.path.name),
        )
        attacked = read_attacked(*verify(request, observe=watchers.verification))
        if part == "white_box":
            found = replace(found, white_box=attacked)
        else:
            found = replace(found, cascade=attacked)
    return found


def _answer(
    run: RunDirectory, path: Path, *, num_images: int, settings: PerformanceSettings
) -> Standing:
    """Answers on clean test images, as a verification gives them."""
    performance = resolve_performance(settings)
    network, _ = load_trained(run)
    data = load_recipe(run.resolved_recipe).data
    split = load_test_split(
        data, settings=settings, device=performance.device, num_images=num_images
    )
    subject = network_subject(network, performance)
    flags: dict[int, bool] = {}
    with evaluation_mode(network):
        for batch in evaluation_batches(split, batch_size=_BATCH_SIZE):
            found = answer_clean(subject, batch, torch.arange(len(batch.y_N)))
            is_correct = [not row.is_fooled for row in found]
            flags |= zip(batch.index_N.tolist(), is_correct, strict=True)
    standing = Standing.of(flags)
    answers = CleanAnswers(
        model_sha256=read_facts(run)["model_sha256"],
        content_sha256=split.content_sha256,
        index=standing.index,
        is_correct=standing.stands,
    )
    write_clean(path, answers)
    return standing
