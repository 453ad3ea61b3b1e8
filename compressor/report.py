"""RobustnessReport: what was measured, on what, with which n; as JSON and as Markdown.

Closed and strict, because a gate may read it from strangers. Needs no torch.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from compressor.errors import RunError
from compressor.proportions import Proportion
from compressor.run_directory import read_json, write_json_atomically, write_text_atomically
from compressor.threat import format_pixels

SCHEMA_VERSION = 1

CAVEAT = (
    "These attacks are white-box first-order searches in float32. What survives them is an upper "
    "bound of the true robust accuracy; AutoAttack is stronger and was not run."
)


_TRAINING_FACTS = ("device", "number_format", "num_threads", "torch")


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Count(_Table):
    """A proportion with its exact 95 % interval (Clopper and Pearson, two-sided)."""

    num_correct: int
    num_total: int
    low_95: float
    high_95: float

    @classmethod
    def of(cls, proportion: Proportion) -> "Count":
        """With the bounds filled in."""
        low, high = proportion.interval(0.95)
        return cls(
            num_correct=proportion.num_correct,
            num_total=proportion.num_total,
            low_95=low,
            high_95=high,
        )

    @property
    def fraction(self) -> float:
        """The point estimate."""
        return self.num_correct / self.num_total


class AttackRow(_Table):
    """Accuracy under one attack."""

    name: str
    parameters: dict[str, float | int | str]
    accuracy: Count
    w_robust_fraction: float
    """Mean of clean accuracy and accuracy under this attack."""
    duration_seconds: float


class CostRow(_Table):
    """What one model costs; latencies of all rows come from one interleaved run."""

    name: str
    num_parameters: int | None
    num_multiply_adds: int | None
    num_bytes: int
    latency_ms: float
    """Median at batch 1 on the CPU, float32."""
    latency_low_ms: float
    """Tenth percentile."""
    latency_high_ms: float
    """Ninetieth percentile."""


class TeacherRow(_Table):
    """A teacher, by content, and what it scored on a few held-out images before training."""

    role: Literal["clean", "robust"]
    name: str
    sha256: str
    clean: Count
    robust: Count | None


class DataFacts(_Table):
    """Which images; every hash is a SHA-256."""

    source: str
    class_names: tuple[str, ...]
    training_content_sha256: str
    num_training: int
    num_validation: int
    validation_index_sha256: str
    test_content_sha256: str
    num_test: int
    test_index_sha256: str


class SelectionFacts(_Table):
    """Which weights, chosen on held-out training images."""

    epoch: int
    candidate: str
    attack: str
    clean: Count
    robust: Count


class RobustnessReport(_Table):
    """The result of verifying one network on test images."""

    schema_version: Literal[1] = 1
    name: str
    recipe_id: str
    recipe: dict[str, Any]
    architecture: str
    model_sha256: str
    norm: Literal["linf"]
    epsilon_pixels: float
    data: DataFacts
    selection: SelectionFacts
    teachers: tuple[TeacherRow, ...]
    clean: Count
    attacks: tuple[AttackRow, ...]
    worst_case: Count
    """Images that stay correct clean and under every attack above."""
    cost: tuple[CostRow, ...]
    environment: dict[str, Any]
    """Of the verification."""
    training_environment: dict[str, Any]
    duration_seconds: float
    caveat: str = CAVEAT


def write_report(report: RobustnessReport, *, json_path: Path, markdown_path: Path) -> None:
    """Write both forms, each as a whole or not at all."""
    write_json_atomically(json_path, report.model_dump(mode="json"))
    write_text_atomically(markdown_path, to_markdown(report))


def read_report(path: Path) -> RobustnessReport:
    """A report from JSON.

    Raises:
        RunError: if it is missing, damaged or of another schema.
    """
    try:
        return RobustnessReport.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise RunError(
            f"{path} is not a report of schema {SCHEMA_VERSION}: {place}: {first['msg']}; "
            "write it again with `robust-compress verify RUN`"
        ) from None


def to_markdown(report: RobustnessReport) -> str:
    """For people: what was measured, what it costs, where it comes from."""
    epsilon = format_pixels(report.epsilon_pixels)
    sections = [
        f"# {report.name}",
        f"`{report.architecture}`, threat {report.norm} {epsilon}, "
        f"{report.clean.num_total} test images of `{report.data.source}`, float32.",
        "## Accuracy",
        _accuracy_table(report),
        f"Worst case: an image counts only if it stays correct under every row. {report.caveat}",
        "## What compression bought",
        cost_table(report.cost),
        "Ratios are to the trained network. Latency: CPU, batch 1, float32, "
        f"{report.environment.get('num_threads', '?')} threads, interleaved, median (10th to 90th "
        "percentile).",
        "## Teachers",
        _teacher_table(report.teachers),
        "## Provenance",
        _provenance(report),
    ]
    return "\n\n".join(sections) + "\n"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in GitHub's Markdown."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def percent(count: Count) -> str:
    """`52.00 %`."""
    return f"{100 * count.fraction:.2f} %"


def cost_table(rows: Sequence[CostRow]) -> str:
    """Every cost beside its ratio to the trained network's, the last row that is no file."""
    student = [row for row in rows if row.num_parameters is not None][-1]
    header = ("model", "parameters", "multiply-adds", "bytes", "latency")
    return markdown_table(header, [_cost_cells(row, student) for row in rows])


def _cost_cells(row: CostRow, student: CostRow) -> list[str]:
    spread = f"{row.latency_low_ms:.2f} to {row.latency_high_ms:.2f}"
    return [
        row.name,
        _with_ratio(row.num_parameters, student.num_parameters),
        _with_ratio(row.num_multiply_adds, student.num_multiply_adds),
        _with_ratio(row.num_bytes, student.num_bytes),
        f"{row.latency_ms:.2f} ms ({spread}), {row.latency_ms / student.latency_ms:.2f}x",
    ]


def _with_ratio(value: int | None, reference: int | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}, {value / reference:.2f}x" if reference else f"{value:,}"


def _accuracy_table(report: RobustnessReport) -> str:
    rows = [["clean", *_accuracy_cells(report.clean), ""]]
    for attack in report.attacks:
        w_robust = f"{100 * attack.w_robust_fraction:.2f} %"
        rows.append([attack.name, *_accuracy_cells(attack.accuracy), w_robust])
    w_robust = f"{50 * (report.clean.fraction + report.worst_case.fraction):.2f} %"
    rows.append(["**worst case**", *_accuracy_cells(report.worst_case), w_robust])
    return markdown_table(("images", "accuracy", "correct", "95 % interval", "W-Robust"), rows)


def _accuracy_cells(count: Count) -> list[str]:
    interval = f"{100 * count.low_95:.2f} to {100 * count.high_95:.2f}"
    return [percent(count), f"{count.num_correct} of {count.num_total}", interval]


def _teacher_table(teachers: Sequence[TeacherRow]) -> str:
    if not teachers:
        return "None: trained on labels."
    rows = [
        [
            t.role,
            t.name,
            f"{percent(t.clean)} of {t.clean.num_total}",
            f"{percent(t.robust)} of {t.robust.num_total}" if t.robust else "no gradient",
            f"`{t.sha256}`",
        ]
        for t in teachers
    ]
    text = markdown_table(("role", "model", "clean", "short PGD", "sha256"), rows)
    note = "Teachers are measured on held-out training images before the run; if they were trained "
    return f"{text}\n\n{note}on those images themselves, these two columns are optimistic."


def _provenance(report: RobustnessReport) -> str:
    data, selection = report.data, report.selection
    chosen = (
        f"epoch {selection.epoch} ({selection.candidate}): clean {percent(selection.clean)}, "
        f"{percent(selection.robust)} under {selection.attack}, of {selection.clean.num_total} "
        "held-out images"
    )
    facts = {
        "selected": chosen,
        "recipe": f"`{report.recipe_id}`",
        "model sha256": f"`{report.model_sha256}`",
        "training images": f"{data.num_training} + {data.num_validation} for validation",
        "training content": f"`{data.training_content_sha256}`",
        "validation index": f"`{data.validation_index_sha256}`",
        "test content": f"`{data.test_content_sha256}`",
        "verification": f"{report.duration_seconds:.0f} s",
        **{name: str(value) for name, value in report.environment.items()},
    }
    trained = report.training_environment
    facts |= {f"training {name}": str(trained[name]) for name in _TRAINING_FACTS if name in trained}
    return "\n".join(f"- {name}: {value}" for name, value in facts.items())
