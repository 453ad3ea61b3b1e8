"""From what a verification found to a report."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from compressor.attacks.stages import Stage
from compressor.checkpoint import selected_candidate
from compressor.cost import Latency, count_multiply_adds, measure_latencies, on_cpu
from compressor.errors import RobustCompressError, RunError, WeightsError
from compressor.networks import count_parameters
from compressor.onnx_model import OnnxModel, load_onnx_model
from compressor.proportions import Proportion
from compressor.recipe import Recipe, portable_dict
from compressor.reports.consistency import WRONG_CLEAN
from compressor.reports.report import (
    AttackRow,
    CostRow,
    Count,
    EightBitFacts,
    SelectionFacts,
    TeacherRow,
    TrainingFacts,
)
from compressor.run_directory import RunDirectory, read_json
from compressor.teacher import Teacher
from compressor.teachers import load_teacher
from compressor.verification.samples import Sample
from compressor.verification.target import Model, Target
from compressor.verification.verification import Verification


def count_standing(samples: Sequence[Sample], *, after: Sequence[str]) -> Count:
    """Images that are correct clean and that none of these attacks broke first."""
    gone = {WRONG_CLEAN, *after}
    num_gone = sum(sample.broken_by in gone for sample in samples)
    return _count(len(samples) - num_gone, len(samples))


def attack_rows(found: Verification, stages: Sequence[Stage]) -> tuple[AttackRow, ...]:
    """One row per attack, in order."""
    rows, before = [], []
    for stage in stages:
        before.append(stage.name)
        tried = [s for s in found.samples if stage.name in s.fooled_by]
        outcomes = [o for o in found.outcomes if o.stage == stage.name]
        passes = [row for outcome in outcomes for row in outcome.found]
        alone = sum(not s.fooled_by[stage.name] for s in tried)
        rows.append(
            AttackRow(
                name=stage.name,
                kind=stage.kind,
                parameters=dict(stage.parameters),
                num_tried=len(tried),
                num_broken=sum(s.broken_by == stage.name for s in found.samples),
                standing=count_standing(found.samples, after=before),
                accuracy=_count(alone, len(found.samples)) if stage.tries_all else None,
                num_forwards=sum(row.num_forwards for row in passes),
                num_backwards=sum(row.num_backwards for row in passes),
                duration_seconds=sum(o.duration_seconds for o in outcomes),
            )
        )
    return tuple(rows)


def eight_bit_facts(samples: Sequence[Sample]) -> EightBitFacts:
    """Over the images that an attack broke."""
    broken = [s for s in samples if s.broken_by not in (None, WRONG_CLEAN)]
    return EightBitFacts(
        num_found=len(broken), num_still_fooling=sum(s.fools_in_8_bits for s in broken)
    )


def training_facts(target: Target) -> TrainingFacts | None:
    """Of the run that trained the target or its source."""
    if target.run is None or target.recipe is None or target.facts is None:
        return None
    facts = target.facts
    return TrainingFacts(
        recipe_id=target.recipe.recipe_id,
        recipe=portable_dict(target.recipe),
        content_sha256=facts["training_content_sha256"],
        num_training=facts["num_training"],
        num_validation=facts["num_validation"],
        validation_index_sha256=facts["validation_index_sha256"],
        selection=_selection(target.run, facts),
        teachers=tuple(TeacherRow.model_validate(row) for row in facts["teachers"]),
        environment=read_json(target.run.environment),
    )


def found_teachers(
    recipe: Recipe, facts: Mapping[str, Any], *, class_names: Sequence[str]
) -> list[Teacher]:
    """A teacher that has moved or changed since training is left out."""
    known = {row["sha256"] for row in facts["teachers"]}
    channels, height, width = facts["image_shape"]
    found = []
    for table in recipe.teachers:
        try:
            teacher = load_teacher(
                table, class_names=class_names, image_shape=(channels, height, width)
            )
        except RobustCompressError:
            continue
        if teacher.sha256 in known:
            found.append(teacher)
    return found


def cost_rows(target: Target, model: Model, teachers: Sequence[Teacher]) -> tuple[CostRow, ...]:
    """Teachers that can still be found, the network, and the file if one is verified or exported.

    Latencies are of float32 at batch 1 on the CPU, all in one interleaved run.
    """
    candidates = [_teacher_candidate(t, teachers) for t in teachers]
    if model.network is not None and model.spec is not None:
        name = f"student {model.spec.architecture}" if target.run else model.spec.architecture
        candidates.append(_network_candidate(name, model.network))
    file = model.file or _own_export(target)
    if file is not None and file.is_on_cpu:
        candidates.append(_Candidate(file.path.name, None, file, file.num_bytes))
    if model.spec is None:
        return ()
    shape = model.spec.image_shape
    latencies = measure_latencies({c.name: c.answer for c in candidates}, shape)
    return tuple(_cost_row(c, latencies[c.name], shape=shape) for c in candidates)


@dataclass(frozen=True)
class _Candidate:
    name: str
    network: nn.Module | None
    answer: Callable[[Any], Any]
    num_bytes: int


def _teacher_candidate(teacher: Teacher, teachers: Sequence[Teacher]) -> _Candidate:
    kind = teacher.spec.architecture if teacher.spec is not None else "onnx"
    name = f"{teacher.role} teacher {kind}"
    if sum(t.role == teacher.role for t in teachers) > 1:
        name = f"{name} {teacher.sha256[:6]}"
    if teacher.network is not None:
        return _network_candidate(name, teacher.network)
    return _Candidate(name, None, teacher.answer, teacher.num_bytes)


def _network_candidate(name: str, network: nn.Module) -> _Candidate:
    """Its bytes are those of parameters and buffers, whatever else a file of weights may hold."""
    num_bytes = sum(t.numel() * t.element_size() for t in network.state_dict().values())
    return _Candidate(name, network, on_cpu(network), num_bytes)


def _own_export(target: Target) -> OnnxModel | None:
    """The fp32 file of a run, if what is beside it names it and the present weights.

    It costs a row, and must not cost the hours of attacks before it: a damaged one is none.
    """
    if target.run is None or target.facts is None:
        return None
    try:
        table = read_json(target.run.onnx_verification("fp32"))
        named = table if isinstance(table, dict) else {}
        if named.get("source_sha256") != target.facts["model_sha256"]:
            return None
        file = load_onnx_model(target.run.onnx("fp32"), num_threads=torch.get_num_threads())
        return file if file.sha256 == named.get("sha256") else None
    except (RunError, WeightsError):
        return None


def _cost_row(candidate: _Candidate, latency: Latency, *, shape: tuple[int, int, int]) -> CostRow:
    network = candidate.network
    return CostRow(
        name=candidate.name,
        num_parameters=count_parameters(network) if network is not None else None,
        num_multiply_adds=count_multiply_adds(network, shape) if network is not None else None,
        num_bytes=candidate.num_bytes,
        latency_ms=latency.median_ms,
        latency_low_ms=latency.low_ms,
        latency_high_ms=latency.high_ms,
    )


def _selection(run: RunDirectory, facts: Mapping[str, Any]) -> SelectionFacts | None:
    if not run.checkpoint_steps():  # removed after training, to save disk
        return None
    best = selected_candidate(run)
    return SelectionFacts(
        epoch=best.epoch,
        candidate=best.candidate,
        attack=facts["selection_attack"],
        clean=_count(best.clean_correct, best.num_validation),
        robust=_count(best.robust_correct, best.num_validation),
    )


def _count(num_correct: int, num_total: int) -> Count:
    return Count.of(Proportion(num_correct=num_correct, num_total=num_total))
