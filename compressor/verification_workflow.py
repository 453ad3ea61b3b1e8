"""verify_run: from a finished run to its report on test images."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from compressor.attacks.build import evaluation_attacks
from compressor.attacks.protocol import Attack
from compressor.checkpoint import selected_candidate
from compressor.cost import Latency, count_multiply_adds, measure_latencies, on_cpu
from compressor.data import TestSplit, load_test_split
from compressor.environment import describe_environment
from compressor.errors import DataError, RobustCompressError
from compressor.networks import NetworkSpec, count_parameters, load_trained
from compressor.onnx_model import load_onnx_model
from compressor.performance import Performance, resolve_performance
from compressor.performance_settings import PerformanceSettings
from compressor.proportions import Proportion
from compressor.recipe import Recipe, portable_dict
from compressor.recipe_file import load_recipe
from compressor.report import (
    AttackRow,
    CostRow,
    Count,
    DataFacts,
    RobustnessReport,
    SelectionFacts,
    TeacherRow,
    write_report,
)
from compressor.run_directory import RunDirectory, read_facts, read_json
from compressor.teachers import Teacher, load_teacher
from compressor.verification import VerificationProgress, VerificationResult, verify_network
from compressor.weights import sha256_of_file


@dataclass(frozen=True, kw_only=True)
class _Verified:
    """What the rows of a report are made from."""

    recipe: Recipe
    facts: dict[str, Any]
    spec: NetworkSpec
    network: nn.Module
    split: TestSplit
    result: VerificationResult


def verify_run(
    run: RunDirectory,
    *,
    settings: PerformanceSettings,
    num_images: int | None = None,
    data_source: str | None = None,
    observe: Callable[[VerificationProgress], None] = lambda _: None,
) -> RobustnessReport:
    """Attack the selected network of a run on test images and write report.json and report.md.

    Args:
        run: a run whose training has ended.
        settings: the device; the number format is always float32 here.
        num_images: a class-balanced part of the test images, whose report has a name of its own;
            None for all.
        data_source: where the data lies now, if not where it was.
        observe: told after every batch.

    Raises:
        RunError: if training has not ended.
        DataError: if the test images are not usable.
    """
    started_at_seconds = time.perf_counter()
    performance = Performance(device=resolve_performance(settings).device)
    network, spec = load_trained(run)
    recipe, facts = load_recipe(run.resolved_recipe), read_facts(run)
    if data_source is not None:
        data = recipe.data.model_copy(update={"source": data_source})
        recipe = recipe.model_copy(update={"data": data})
    selection = _selection(run, facts)
    split = load_test_split(
        recipe.data, settings=settings, device=performance.device, num_images=num_images
    )
    _refuse_other_images(split, facts)
    attacks = evaluation_attacks(recipe.threat.build())
    result = verify_network(network, attacks, split, performance=performance, observe=observe)
    verified = _Verified(
        recipe=recipe, facts=facts, spec=spec, network=network, split=split, result=result
    )
    report = RobustnessReport(
        name=recipe.name,
        recipe_id=recipe.recipe_id,
        recipe=portable_dict(recipe),
        architecture=f"{spec.architecture}, width {spec.width:g}",
        model_sha256=sha256_of_file(run.model),
        norm=recipe.threat.norm,
        epsilon_pixels=recipe.threat.epsilon_pixels,
        data=_data_facts(verified),
        selection=selection,
        teachers=tuple(TeacherRow.model_validate(row) for row in facts["teachers"]),
        clean=Count.of(result.clean),
        attacks=tuple(_attack_row(name, attack, result) for name, attack in attacks.items()),
        worst_case=Count.of(result.worst_case),
        cost=tuple(_cost_rows(run, verified)),
        environment=describe_environment(performance),
        training_environment=read_json(run.environment),
        duration_seconds=time.perf_counter() - started_at_seconds,
    )
    write_report(
        report, json_path=run.report_json(num_images), markdown_path=run.report_markdown(num_images)
    )
    return report


def _attack_row(name: str, attack: Attack, result: VerificationResult) -> AttackRow:
    found = result.attacks[name]
    parameters = {
        key: value for key, value in vars(attack).items() if isinstance(value, int | float | str)
    }
    return AttackRow(
        name=name,
        parameters=parameters,
        accuracy=Count.of(found.accuracy),
        w_robust_fraction=(result.clean.fraction + found.accuracy.fraction) / 2,
        duration_seconds=found.duration_seconds,
    )


def _selection(run: RunDirectory, facts: dict[str, Any]) -> SelectionFacts:
    best = selected_candidate(run)
    total = best.num_validation
    return SelectionFacts(
        epoch=best.epoch,
        candidate=best.candidate,
        attack=facts["selection_attack"],
        clean=Count.of(Proportion(num_correct=best.clean_correct, num_total=total)),
        robust=Count.of(Proportion(num_correct=best.robust_correct, num_total=total)),
    )


def _data_facts(verified: _Verified) -> DataFacts:
    facts, split = verified.facts, verified.split
    return DataFacts(
        source=portable_dict(verified.recipe)["data"]["source"],
        class_names=split.class_names,
        training_content_sha256=facts["training_content_sha256"],
        num_training=facts["num_training"],
        num_validation=facts["num_validation"],
        validation_index_sha256=facts["validation_index_sha256"],
        test_content_sha256=split.content_sha256,
        num_test=split.num_images,
        test_index_sha256=split.index_sha256,
    )


def _refuse_other_images(split: TestSplit, facts: dict[str, Any]) -> None:
    have = (list(split.class_names), list(split.image_shape))
    want = (facts["class_names"], facts["image_shape"])
    if have != want:
        raise DataError(
            f"the test images have shape {have[1]} and the classes {have[0][:5]}..., the run was "
            f"trained on {want[1]} and {want[0][:5]}...; give the data of the run with --data"
        )


def _cost_rows(run: RunDirectory, verified: _Verified) -> list[CostRow]:
    """Teachers that can still be found, the student, and the exported file if there is one."""
    shape = verified.spec.image_shape
    teachers = list(_found_teachers(verified))
    networks = {_unique(t, teachers): t.network for t in teachers if t.network is not None}
    student = f"student {verified.spec.architecture}"
    networks[student] = verified.network  # type: ignore[assignment]
    num_bytes = {name: _state_bytes(net) for name, net in networks.items() if net is not None}
    num_bytes |= {_unique(t, teachers): t.num_bytes for t in teachers if t.network is None}
    models: dict[str, Callable[[Any], Any]] = {n: on_cpu(net) for n, net in networks.items() if net}
    models |= {_unique(t, teachers): t.answer for t in teachers if t.network is None}
    onnx = run.onnx("fp32")
    if onnx.is_file() and _is_export_of(run, verified.facts["model_sha256"]):
        models[onnx.name] = load_onnx_model(onnx, num_threads=torch.get_num_threads())
        num_bytes[onnx.name] = onnx.stat().st_size
    latencies = measure_latencies(models, shape)
    rows = []
    for name, latency in latencies.items():
        network = networks.get(name)
        rows.append(_cost_row(name, latency, network, shape=shape, num_bytes=num_bytes[name]))
    return rows


def _state_bytes(network: nn.Module) -> int:
    """Of parameters and buffers, whatever else a file of weights may hold."""
    return sum(t.numel() * t.element_size() for t in network.state_dict().values())


def _is_export_of(run: RunDirectory, model_sha256: str) -> bool:
    return bool(read_json(run.onnx_verification("fp32"))["source_sha256"] == model_sha256)


def _cost_row(
    name: str,
    latency: Latency,
    network: nn.Module | None,
    *,
    shape: tuple[int, int, int],
    num_bytes: int,
) -> CostRow:
    return CostRow(
        name=name,
        num_parameters=count_parameters(network) if network is not None else None,
        num_multiply_adds=count_multiply_adds(network, shape) if network is not None else None,
        num_bytes=num_bytes,
        latency_ms=latency.median_ms,
        latency_low_ms=latency.low_ms,
        latency_high_ms=latency.high_ms,
    )


def _found_teachers(verified: _Verified) -> list[Teacher]:
    """A teacher that has moved or changed since training has no row; its accuracy has one."""
    known = {row["sha256"] for row in verified.facts["teachers"]}
    found = []
    for table in verified.recipe.teachers:
        try:
            teacher = load_teacher(
                table,
                class_names=verified.split.class_names,
                image_shape=verified.spec.image_shape,
            )
        except RobustCompressError:
            continue
        if teacher.sha256 in known:
            found.append(teacher)
    return found


def _unique(teacher: Teacher, teachers: Sequence[Teacher]) -> str:
    kind = teacher.spec.architecture if teacher.spec is not None else "onnx"
    name = f"{teacher.role} teacher {kind}"
    is_only_one = sum(t.role == teacher.role for t in teachers) == 1
    return name if is_only_one else f"{name} {teacher.sha256[:6]}"
