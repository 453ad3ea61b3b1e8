"""VerificationRequest: what is asked of a verification; prepare: what will be done for it."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from math import prod, sqrt
from pathlib import Path
from typing import Any

import torch

from compressor import __version__
from compressor.attacks.stages import (
    AUTOATTACK,
    PAPER_ATTACKS,
    Mode,
    Stage,
    build_stages,
    expand_names,
    with_transfer_late,
)
from compressor.data import TestSplit, load_test_split
from compressor.environment import describe_environment
from compressor.errors import UsageError
from compressor.image_decoding import ImageShape
from compressor.networks import evaluation_mode
from compressor.onnx_providers import Provider
from compressor.performance import Performance, resolve_performance
from compressor.performance_settings import PerformanceSettings
from compressor.ranks import ALONE, Ranks
from compressor.reports.files import ReportFiles
from compressor.teacher import Teacher
from compressor.threat import DEFAULT_THREAT, Norm, ThreatModel, format_pixels
from compressor.verification.cascade import Subject
from compressor.verification.claimed_threat import claimed_threat
from compressor.verification.journal import Journal, plan_id
from compressor.verification.rows import found_teachers, training_facts
from compressor.verification.target import Model, Target, load_target, open_target
from compressor.verification.verification import VerificationPlan, network_subject

DEFAULT_ATTACKS = (*PAPER_ATTACKS, *AUTOATTACK)
_MAX_ROW_NUMBERS = 250 * 3 * 64 * 64
"""Above it a chunk of 250 images would not fit into memory; it is then smaller."""
_MIN_ROWS = 8
"""The checks see so many images together whatever `--batch-size` says, or one image at a time could
hide that answers depend on the batch."""


@dataclass(frozen=True, kw_only=True)
class VerificationRequest:
    """What is asked for; None: as the run has it, or all."""

    target: str
    settings: PerformanceSettings
    source: str | None = None
    sidecar_sha256: str | None = None
    """Of an engine, from a place that is trusted."""
    provider: Provider = "cpu"
    """Of ONNX Runtime, for an ONNX file."""
    data_source: str | None = None
    attacks: Sequence[str] = DEFAULT_ATTACKS
    mode: Mode = "fast"
    norm: Norm | None = None
    epsilon_pixels: float | None = None
    num_images: int | None = None
    batch_size: int | None = None
    max_seconds: float | None = None
    seed: int = 0
    folder: Path | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Prepared:
    """A verification that is ready to begin."""

    request: VerificationRequest
    target: Target
    model: Model
    split: TestSplit
    threat: ThreatModel
    teachers: Sequence[Teacher]
    """Those of the run that can still be found, on the device."""
    stages: Sequence[Stage]
    plan: VerificationPlan
    performance: Performance
    files: ReportFiles
    started_at_seconds: float

    @property
    def max_rows(self) -> int:
        """Images that the checks may take at once."""
        return max(self.plan.batch_size, _MIN_ROWS)

    @property
    def data_kind(self) -> str:
        """`imagefolder`, `cifar10` ...: the source without its folder."""
        return self.target.data_recipe(self.request.data_source).source.partition(":")[0]

    def journal(self, ranks: Ranks = ALONE) -> Journal:
        """What earlier processes have finished of exactly this verification."""
        described = {
            "version": __version__,
            "target": self.model.facts.model_dump(),
            "threat": asdict(self.threat),
            "attacks": {stage.name: dict(stage.parameters) for stage in self.stages},
            "mode": self.request.mode,
            "seed": self.plan.seed,
            "batch_size": self.plan.batch_size,
            "content_sha256": self.split.content_sha256,
            "index_sha256": self.split.index_sha256,
            "number_format": str(self.performance.training_dtype),
            "device": self.performance.device.type,
            "teachers": [teacher.sha256 for teacher in self.teachers],
        }
        if self.request.provider != "cpu":
            described["provider"] = self.request.provider
        return Journal.shared(self.files.journal(plan_id(described)), described, ranks)

    def environment(self) -> dict[str, Any]:
        """Versions and devices, for the report; also what runs a file."""
        known, file = describe_environment(self.performance), self.model.file
        return known if file is None else known | {"file_runs_on": file.runs_on}

    @contextmanager
    def subject(self) -> Iterator[Subject]:
        """The model as the attacks see it, in eval mode meanwhile."""
        followed, file = self.model.differentiable, self.model.file
        if followed is None:
            assert file is not None  # noqa: S101
            yield Subject(answer=file, float32=file, search_dtype=file)
            return
        with evaluation_mode(followed):
            if self.request.mode == "compat":
                subject = _as_released(followed, self.performance)
            else:
                subject = network_subject(followed, self.performance)
            yield subject if file is None else replace(subject, answer=file)


def prepare(request: VerificationRequest) -> Prepared:
    """Read the target and the data, and decide what will be done.

    Raises:
        UsageError: if the request contradicts itself.
        RobustCompressError: if the target or the data cannot be used.
    """
    started_at_seconds = time.perf_counter()
    performance = resolve_performance(request.settings)
    names = expand_names(request.attacks)
    target = open_target(
        request.target,
        source=request.source,
        sidecar_sha256=request.sidecar_sha256,
        provider=request.provider,
    )
    split = load_test_split(
        target.data_recipe(request.data_source),
        settings=request.settings,
        device=performance.device,
        num_images=request.num_images,
    )
    threat = _threat(request, target)
    model = load_target(target, split, threat=threat)
    _refuse_threat(threat, request, target, split)
    training_facts(target)  # or what is missing would be found after hours of attacks
    batch_size = request.batch_size or fitting_batch_size(split.image_shape)
    teachers = _teachers(target, split, performance)
    stages = build_stages(
        with_transfer_late(names) if model.rounds else names,
        threat=threat,
        mode=request.mode,
        batch_size=batch_size,
        sources=_sources(model, teachers, performance),
    )
    if model.differentiable is None:
        stages = ()
    elif model.file is not None:
        stages = tuple(_on_the_file(stage) for stage in stages)
    return Prepared(
        request=request,
        target=target,
        model=model,
        split=split,
        threat=threat,
        teachers=teachers,
        stages=stages,
        plan=VerificationPlan(
            stages=stages,
            seed=request.seed,
            batch_size=batch_size,
            max_seconds=request.max_seconds,
        ),
        performance=performance,
        files=ReportFiles(
            folder=request.folder or target.folder(sha256=model.facts.sha256),
            label=_label(request, target, names if stages else (), threat),
        ),
        started_at_seconds=started_at_seconds,
    )


def _teachers(target: Target, split: TestSplit, performance: Performance) -> list[Teacher]:
    if target.recipe is None or target.facts is None:
        return []
    teachers = found_teachers(target.recipe, target.facts, class_names=split.class_names)
    for teacher in teachers:
        if teacher.network is not None:
            performance.place_network(teacher.network)
    return teachers


def _sources(
    model: Model, teachers: Sequence[Teacher], performance: Performance
) -> list[torch.nn.Module]:
    """What `transfer` takes its images from: the source of a file, and the teachers."""
    sources = [teacher.network for teacher in teachers if teacher.network is not None]
    if model.file is None or model.network is None:
        return list(sources)
    return [performance.place_network(model.network).eval(), *sources]


def _threat(request: VerificationRequest, target: Target) -> ThreatModel:
    own = claimed_threat(target).threat or DEFAULT_THREAT
    epsilon = request.epsilon_pixels
    return ThreatModel(
        norm=request.norm or own.norm,
        epsilon_pixels=own.epsilon_pixels if epsilon is None else epsilon,
    )


def _refuse_threat(
    threat: ThreatModel, request: VerificationRequest, target: Target, split: TestSplit
) -> None:
    """Where nobody said it, or it cannot be meant."""
    claimed, norm = claimed_threat(target), threat.norm
    if request.epsilon_pixels is None and claimed.threat is None:
        raise UsageError(f"{claimed.problem}; give the radius with --epsilon, such as 8/255")
    if request.epsilon_pixels is None and claimed.threat and norm != claimed.threat.norm:
        raise UsageError(f"--norm {norm} needs a radius of its own; give --epsilon, such as 0.5")
    largest = 1.0 if norm == "linf" else sqrt(prod(split.image_shape))
    if not 0 < threat.epsilon_pixels <= largest:
        raise UsageError(
            f"--epsilon {threat.epsilon_pixels:g} is outside (0, {largest:g}]. Images are scaled "
            'to [0, 1]: write eight grey levels as "8/255"'
        )


def fitting_batch_size(image_shape: ImageShape) -> int:
    """Images that may be in memory at once: 250, or fewer if they are large."""
    channels, height, width = image_shape
    return max(min(250, _MAX_ROW_NUMBERS // (channels * height * width)), _MIN_ROWS)


def _on_the_file(stage: Stage) -> Stage:
    """White-box on its differentiable form, all else on the file itself."""
    if stage.kind != "white-box":
        return replace(stage, runs_on="answer", tries_all=stage.kind == "transfer")
    return stage if stage.runs_on != "answer" else replace(stage, runs_on="float32")


def _as_released(network: torch.nn.Module, performance: Performance) -> Subject:
    """One function in float32, in the memory layout that the released code has."""
    network = network.to(performance.device)

    def answer(x_NCHW: torch.Tensor) -> torch.Tensor:
        return network(x_NCHW.contiguous())  # type: ignore[no-any-return]

    return Subject(answer=answer, float32=answer, search_dtype=answer)


def _label(
    request: VerificationRequest, target: Target, names: Sequence[str], threat: ThreatModel
) -> str:
    """What is different from the verification that a release is decided on."""
    parts = []
    if request.num_images is not None:
        parts.append(str(request.num_images))
    if threat != (claimed_threat(target).threat or DEFAULT_THREAT):
        radius = (
            format_pixels(threat.epsilon_pixels)
            if threat.norm == "linf"
            else f"{threat.epsilon_pixels:g}"
        )
        parts.append(f"{threat.norm}-{radius.replace('/', '_')}")
    if request.mode != "fast":
        parts.append(request.mode)
    if tuple(names) != DEFAULT_ATTACKS:
        is_papers = tuple(names) == PAPER_ATTACKS
        parts.append("papers" if is_papers else "-".join(names) or "clean")
    if request.provider != "cpu":
        parts.append(request.provider)
    if request.seed != 0:
        parts.append(f"seed{request.seed}")
    return "-".join(parts)
