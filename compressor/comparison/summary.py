"""From finished runs to a result: means, spreads, paired tests, costs."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from compressor.comparison.made_on import differences
from compressor.comparison.measuring import ImageCounts
from compressor.comparison.passes import Passes
from compressor.comparison.plan import ComparisonPlan
from compressor.comparison.planned import PlannedMethod
from compressor.comparison.result import (
    METRICS,
    SIGNIFICANCE,
    ComparisonResult,
    MethodRow,
    Metric,
    Paired,
    PassRow,
    PassSecondsRow,
    RunRow,
    Verdict,
)
from compressor.comparison.runs import FinishedRun
from compressor.comparison.scores import points_of, scores_of
from compressor.comparison.statistics import PairedTest, paired_test
from compressor.errors import RunError
from compressor.gate.paired import holm
from compressor.recipe import portable_dict

_OF_ONE_METHOD = ("name", "seed", "method", "teachers", "training")


def summarise(
    plan: ComparisonPlan,
    finished: Sequence[FinishedRun],
    *,
    passes: Mapping[str, Passes],
    pass_seconds: Mapping[str, PassSecondsRow],
    images: ImageCounts,
    environment: Mapping[str, Any],
    also_measured: Sequence[str] = (),
) -> ComparisonResult:
    """What the runs show that are finished so far.

    Args:
        plan: of the comparison.
        finished: in any order.
        passes: by label.
        pass_seconds: by label too.
        images: how many test images each part was to have.
        environment: of the measurements.
        also_measured: names of runs in the same folder; those of this plan are not counted.

    Raises:
        RunError: if two runs were measured on different images.
    """
    by_label = {
        method.label: [run for run in finished if run.planned.label == method.label]
        for method in plan.methods
    }
    tests = _tests(plan, by_label)
    corrected = holm([test.p_value for _, _, _, test in tests])
    paired: dict[str, list[Paired]] = {method.label: [] for method in plan.methods}
    for (label, metric, seeds, test), p_value_holm in zip(tests, corrected, strict=True):
        paired[label].append(_paired_row(metric, seeds, test, p_value_holm))
    shared = portable_dict(plan.methods[0].recipe)
    rows = tuple(
        _method_row(
            method,
            by_label[method.label],
            paired[method.label],
            passes=passes[method.label],
            pass_seconds=pass_seconds[method.label],
        )
        for method in plan.methods
    )
    return ComparisonResult(
        name=plan.base_name,
        reference=plan.reference,
        protocol={key: value for key, value in shared.items() if key not in _OF_ONE_METHOD}
        | {"test_images": asdict(images)},
        methods=rows,
        notes=(*plan.notes, *_left_out(plan, also_measured), *_notes(rows)),
        environment=json.loads(json.dumps(dict(environment))),
    )


def verdict_of(test: PairedTest, p_value_holm: float) -> Verdict:
    """What may be said of the weights, and whether of the method too; see `Verdict`."""
    if p_value_holm > SIGNIFICANCE:
        return "not shown"
    low, high = test.over_seeds_95() or (-1.0, 1.0)
    if low > 0 or high < 0:
        return "better" if test.mean > 0 else "worse"
    return "better weights" if test.mean > 0 else "worse weights"


_Test = tuple[str, Metric, tuple[int, ...], PairedTest]


def _tests(plan: ComparisonPlan, by_label: Mapping[str, Sequence[FinishedRun]]) -> list[_Test]:
    found: list[_Test] = []
    theirs = {run.planned.recipe.seed: run for run in by_label[plan.reference]}
    for method in plan.methods:
        if method.label == plan.reference:
            continue
        ours = {run.planned.recipe.seed: run for run in by_label[method.label]}
        for metric in METRICS:
            both = {
                seed: (points_of(ours[seed], metric), points_of(theirs[seed], metric))
                for seed in sorted(ours.keys() & theirs.keys())
            }
            known = {s: (a, b) for s, (a, b) in both.items() if a is not None and b is not None}
            if known:
                _refuse_other_images(method.label, plan.reference, list(known.values()))
                test = paired_test(
                    [tuple(a.values()) for a, _ in known.values()],
                    [tuple(b.values()) for _, b in known.values()],
                    points_per_unit=2 if metric == "w_robust" else 1,
                )
                found.append((method.label, metric, tuple(known), test))
    return found


def _refuse_other_images(
    label: str, reference: str, pairs: Sequence[tuple[Mapping[int, int], Mapping[int, int]]]
) -> None:
    """Points are in the order of the images."""
    if any(list(points) != list(pairs[0][0]) for pair in pairs for points in pair):
        raise RunError(
            f"{label} and {reference} were measured on different test images; compare them in a "
            "new folder with --out"
        )


def _paired_row(
    metric: Metric, seeds: tuple[int, ...], test: PairedTest, p_value_holm: float
) -> Paired:
    low, high = test.over_seeds_95() or (None, None)
    return Paired(
        metric=metric,
        num_images=test.num_images,
        seeds=seeds,
        differences=test.differences,
        mean=test.mean,
        over_seeds_low_95=low,
        over_seeds_high_95=high,
        over_images_low_95=test.over_images_95[0],
        over_images_high_95=test.over_images_95[1],
        p_value=test.p_value,
        p_value_holm=p_value_holm,
        verdict=verdict_of(test, p_value_holm),
    )


def _method_row(
    method: PlannedMethod,
    runs: Sequence[FinishedRun],
    paired: Sequence[Paired],
    *,
    passes: Passes,
    pass_seconds: PassSecondsRow,
) -> MethodRow:
    known = {run.planned.recipe.seed: run for run in runs}
    return MethodRow(
        label=method.label,
        name=method.recipe.method.name,
        settings=portable_dict(method.recipe)["method"],
        training=portable_dict(method.recipe)["training"],
        origin=method.origin,
        teachers=method.teachers,
        passes=PassRow(**asdict(passes)),
        runs=tuple(_run_row(r.seed, r.recipe_id, known.get(r.seed)) for r in method.recipes),
        scores=scores_of(runs),
        paired=tuple(paired),
        pass_seconds=pass_seconds,
    )


def _run_row(seed: int, recipe_id: str, finished: FinishedRun | None) -> RunRow:
    record = finished.record if finished else None
    if finished is None or record is None:
        return RunRow(
            seed=seed,
            recipe_id=recipe_id,
            status="not yet" if finished is None else "failed",
            reason=(finished.failure or "") if finished else "",
            model_sha256=None,
            selected_epoch=None,
            training_seconds=None,
            trained_on="",
            measured_on=(),
        )
    parts = {"attacks": finished.measured.white_box, "cascade": finished.measured.cascade}
    doubts = [
        f"{name} {part.status}: {part.reason}"
        for name, part in parts.items()
        if part is not None and part.status != "verified"
    ]
    return RunRow(
        seed=seed,
        recipe_id=recipe_id,
        status="measured",
        reason="; ".join(doubts),
        model_sha256=record.model_sha256,
        selected_epoch=record.selected_epoch,
        training_seconds=record.training_seconds,
        trained_on=record.trained_on,
        measured_on=tuple(sorted({part.measured_on for part in parts.values() if part})),
        validation=record.validation,
    )


def _left_out(plan: ComparisonPlan, measured: Sequence[str]) -> list[str]:
    """Who is chosen among many is to be corrected for all of them."""
    shown = {run.name for run in plan.runs}
    seeds: dict[str, list[str]] = {}
    for name in measured:
        if name not in shown:
            label, _, seed = name.rpartition("-seed")
            seeds.setdefault(label, []).append(seed)
    if not seeds:
        return []
    said = ", ".join(f"{label} seed {' and '.join(some)}" for label, some in seeds.items())
    num_methods = len(seeds.keys() - {method.label for method in plan.methods})
    return [
        f"Measured in this folder and not shown: {said} (runs: {sum(map(len, seeds.values()))}, "
        f"methods of which none is shown: {num_methods}). Holm's correction does not count them."
    ]


def _notes(rows: Sequence[MethodRow]) -> list[str]:
    notes = []
    runs = [run for row in rows for run in row.runs]
    places = {
        "Trained": {run.trained_on for run in runs if run.trained_on},
        "Attacked": {place for run in runs for place in run.measured_on},
    }
    for what, some in places.items():
        if found := differences(some):
            notes.append(f"{what} on different devices or by other software: {'; '.join(found)}.")
    for row in rows:
        for run in row.runs:
            if run.status == "failed":
                notes.append(f"{row.label}, seed {run.seed}: failed: {run.reason}")
            elif run.reason:
                notes.append(f"{row.label}, seed {run.seed}: no number, {run.reason}")
            elif run.status == "not yet":
                notes.append(f"{row.label}, seed {run.seed}: not run yet.")
    return notes
