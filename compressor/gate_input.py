"""Reports from strangers: read, and refused where they contradict themselves. Needs no torch."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from compressor.errors import RunError
from compressor.gate_policy import GatePolicy
from compressor.report import RobustnessReport, read_report
from compressor.run_directory import RunDirectory

_AGAIN = "write it again with `robust-compress verify RUN`"
_LARGEST_L2 = 1e6  # further apart than any two images


def read_gated_report(path: Path) -> RobustnessReport:
    """The report in a file or in a run folder, from anybody.

    Raises:
        RunError: if there is none, or if it is damaged or contradicts itself.
    """
    if path.is_dir():
        path = RunDirectory(path).report().json
    if not path.exists():
        raise RunError(f"{path} does not exist; make it with `robust-compress verify RUN`")
    try:
        report = read_report(path)
        problem = next(_contradictions(report), None)
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, deep nesting
        raise RunError(f"{path} is not a report: {error}; {_AGAIN}") from None
    if problem is not None:
        raise RunError(f"{path} contradicts itself: {problem}; {_AGAIN}")
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
    names, labels = report.data.class_names, report.samples.label
    num_images, num_planned = report.clean.num_total, report.data.num_planned
    for place in _non_finite(report.model_dump(exclude={"samples"}), "report"):
        yield f"{place} is not a finite number"
    if not 0 < report.epsilon_pixels <= (1 if report.norm == "linf" else _LARGEST_L2):
        yield f"epsilon_pixels is {report.epsilon_pixels:g}"
    if not 0 < num_images <= num_planned:
        yield f"it has {num_images} of {num_planned} planned images"
    if labels and not 0 <= min(labels) <= max(labels) < len(names):
        yield f"a label in samples has no name among {len(names)} classes"
    for kind, some in (("classes", names), ("attacks", [row.name for row in report.attacks])):
        if len(set(some)) != len(some):
            yield f"two {kind} have the same name"
    yield from _contradicting_attacks(report)


def _contradicting_attacks(report: RobustnessReport) -> Iterator[str]:
    """An attack alone leaves no more images than were correct and it did not break first."""
    for row in report.attacks:
        count, most = row.accuracy, report.clean.num_correct - row.num_broken
        if count is None:
            continue
        if count.num_total != report.clean.num_total or not 0 <= count.num_correct <= most:
            yield (
                f"{row.name} leaves {count.num_correct} of {count.num_total} images correct; of "
                f"{report.clean.num_total} there were {report.clean.num_correct} before it broke "
                f"{row.num_broken}"
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
