"""Reports from strangers: read, and refused where they contradict themselves. Needs no torch."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from compressor.errors import RunError
from compressor.gate_policy import GatePolicy
from compressor.report import RobustnessReport, read_report
from compressor.run_directory import RunDirectory


def read_gated_report(path: Path) -> RobustnessReport:
    """The report in a file or in a run folder, from anybody.

    Raises:
        RunError: if there is none, or if it is damaged or contradicts itself.
    """
    if path.is_dir():
        path = RunDirectory(path).report_json()
    if not path.exists():
        raise RunError(f"{path} does not exist; make it with `robust-compress verify RUN`")
    try:
        report = read_report(path)
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, deep nesting
        raise RunError(f"{path} is not a report: {error}") from None
    for problem in _contradictions(report):
        raise RunError(
            f"{path} contradicts itself: {problem}; write it again with `robust-compress verify RUN`"
        )
    return report


def read_baseline(policy: GatePolicy) -> RobustnessReport | None:
    """The report that the policy names, if it names one.

    Raises:
        RunError: as `read_gated_report`.
    """
    path = policy.baseline.report
    return None if path is None else read_gated_report(Path(path))


def _contradictions(report: RobustnessReport) -> Iterator[str]:
    """What the gate relies on and the report's own validation leaves open."""
    for place in _non_finite(report.model_dump(exclude={"samples"}), "report"):
        yield f"{place} is not a finite number"
    if not all(0 <= y < len(report.data.class_names) for y in report.samples.label):
        yield "a label in samples has no class name"
    if len(set(report.data.class_names)) != len(report.data.class_names):
        yield "two classes have the same name"
    if len({row.name for row in report.attacks}) != len(report.attacks):
        yield "two attacks have the same name"
    num_clean, num_images = report.clean.num_correct, report.clean.num_total
    if num_images == 0 or num_images > report.data.num_planned:
        yield f"{num_images} images of {report.data.num_planned} planned"
    if report.epsilon_pixels <= 0:
        yield f"epsilon_pixels is {report.epsilon_pixels}"
    for row in report.attacks:
        count, most = row.accuracy, num_clean - row.num_broken
        if count and not (count.num_total == num_images and 0 <= count.num_correct <= most):
            yield (
                f"{row.name} leaves {count.num_correct} of {count.num_total} correct, but "
                f"{num_clean} of {num_images} were and it broke {row.num_broken}"
            )


def _non_finite(value: object, place: str) -> Iterator[str]:
    if isinstance(value, float) and not math.isfinite(value):
        yield place
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _non_finite(inner, f"{place}.{key}")
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from _non_finite(inner, f"{place}.{number}")
