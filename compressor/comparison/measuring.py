"""Measure one finished run: clean, under the attacks of the papers, and by the cascade."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from compressor.attacks.stages import build_stages, protocol_of
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
from compressor.comparison.training_record import TrainingRecord
from compressor.data import evaluation_batches, load_test_split
from compressor.errors import DataError
from compressor.networks import evaluation_mode, load_trained
from compressor.performance import resolve_performance
from compressor.performance_settings import PerformanceSettings
from compressor.recipe import DataRecipe
from compressor.run_directory import RunDirectory, read_facts
from compressor.threat import ThreatModel
from compressor.verification.cascade import answer_clean
from compressor.verification.progress import VerificationProgress
from compressor.verification.request import VerificationRequest, fitting_batch_size
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
    name: str,
    folder: ComparisonFolder,
    record: TrainingRecord,
    *,
    threat: ThreatModel,
    images: ImageCounts,
    test_sha256: str,
) -> Measured:
    """What earlier calls have measured on the weights of a finished run.

    Args:
        name: of the run.
        folder: of the comparison.
        record: of its training; the weights themselves may be gone.
        threat: of the comparison.
        images: how many test images each part is to have.
        test_sha256: of the content of the test images.
    """
    subject = Subject(model_sha256=record.model_sha256, content_sha256=test_sha256)
    attacked = {
        part: find_attacked(
            folder,
            name,
            subject,
            Examination(
                threat=threat,
                attacks=_parameters(attacks, threat, record.image_shape),
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
    data: DataRecipe,
    test_sha256: str,
    settings: PerformanceSettings,
    watchers: MeasuringWatchers,
) -> Measured:
    """Measure what `found` lacks; each part is on disk before the next begins.

    Args:
        run: its folder's name is that of its measurements.
        folder: of the comparison.
        found: what is known already.
        images: how many test images each part is to have.
        data: where these are now; the run may have been trained when they lay elsewhere.
        test_sha256: of the content of the test images.
        settings: how fast.
        watchers: told before each part, and while it attacks.

    Raises:
        InvalidEvaluationError: if an attack left its threat model.
        DataError: if the images are not those that were meant.
        RobustCompressError: if the data cannot be used.
    """
    missing, name = found.lacks(images), run.path.name
    if "clean" in missing:
        watchers.part("clean")
        answers = _answer(run, data, num_images=images.clean, settings=settings)
        _refuse_other_images(answers.content_sha256, test_sha256)
        write_clean(folder.clean(name), answers)
        found = replace(found, clean=answers.standing)
    for part, attacks, num_images in images.attacks:
        if part not in missing:
            continue
        watchers.part(part)
        request = VerificationRequest(
            target=str(run.path),
            settings=settings,
            data_source=data.source,
            attacks=attacks,
            num_images=num_images,
            folder=folder.verification(name),
        )
        report, files = verify(request, observe=watchers.verification)
        _refuse_other_images(report.data.content_sha256, test_sha256)
        attacked = read_attacked(report, files)
        if part == "white_box":
            found = replace(found, white_box=attacked)
        else:
            found = replace(found, cascade=attacked)
    return found


def _parameters(
    attacks: Sequence[str], threat: ThreatModel, image_shape: Sequence[int]
) -> dict[str, dict[str, Any]]:
    """Of the attacks, as a verification of today has them."""
    channels, height, width = image_shape
    batch_size = fitting_batch_size((channels, height, width))
    stages = build_stages(attacks, threat=threat, mode="fast", batch_size=batch_size)
    return {stage.name: dict(stage.parameters) for stage in stages}


def _refuse_other_images(content_sha256: str, expected: str) -> None:
    if content_sha256 != expected:
        raise DataError(
            f"the test images changed while they were measured on (content hash now "
            f"{content_sha256[:12]}, {expected[:12]} at the beginning); put them back, or run the "
            "same command again with those that are to count"
        )


def _answer(
    run: RunDirectory, data: DataRecipe, *, num_images: int, settings: PerformanceSettings
) -> CleanAnswers:
    """Answers on clean test images, as a verification gives them."""
    performance = resolve_performance(settings)
    network, _ = load_trained(run)
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
    return CleanAnswers(
        model_sha256=read_facts(run)["model_sha256"],
        content_sha256=split.content_sha256,
        index=tuple(flags),
        is_correct=tuple(flags.values()),
    )
