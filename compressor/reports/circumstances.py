"""What goes with the findings of a report: checks, rounding, cost, training, provenance.

Plain texts and cells, as in `sections.py`. Needs no torch.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from compressor.proportions import Proportion
from compressor.reports.report import CostRow, Count, RobustnessReport, TeacherRow, TrainingFacts
from compressor.reports.sections import (
    Section,
    Table,
    count_cells,
    count_text,
    validity_table,
)

_TRAINING_ENVIRONMENT = ("device", "number_format", "num_threads", "torch", "commit")


def circumstances(report: RobustnessReport) -> tuple[Section, ...]:
    """Whether it may be believed, what the model costs, and where all of it comes from."""
    training = (_training(report.training),) if report.training else ()
    return (
        _validity(report),
        _rounding(report),
        _cost(report),
        *training,
        _provenance(report),
    )


def cost_cells(rows: Sequence[CostRow]) -> Table:
    """Every cost beside its ratio to the trained network's, the last row that is no file."""
    networks = [row for row in rows if row.num_parameters is not None]
    header = ("model", "parameters", "multiply-adds", "bytes", "latency")
    cells = tuple(_cost_cells(row, networks[-1] if networks else None) for row in rows)
    return Table(align="lrrrr", header=header, rows=cells)


def _cost_cells(row: CostRow, student: CostRow | None) -> tuple[str, ...]:
    low, high = row.latency_low_ms, row.latency_high_ms
    latency = f"{row.latency_ms:.2f} ms ({low:.2f} to {high:.2f})"
    if student and student.latency_ms:
        latency += f", {row.latency_ms / student.latency_ms:.2f}x"
    return (
        row.name,
        _with_ratio(row.num_parameters, student.num_parameters if student else None),
        _with_ratio(row.num_multiply_adds, student.num_multiply_adds if student else None),
        _with_ratio(row.num_bytes, student.num_bytes if student else None),
        latency,
    )


def _with_ratio(value: int | None, reference: int | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}, {value / reference:.2f}x" if reference else f"{value:,}"


def _validity(report: RobustnessReport) -> Section:
    title = "Validity checks"
    if not report.validity:
        return Section(key="validity", title=title, notes=("None was run.",))
    note = "Checks of the evaluation itself; p is compared with 1 % after Holm's correction."
    table = validity_table(report.validity)
    return Section(key="validity", title=title, notes=(note,), tables=(table,))


def _rounding(report: RobustnessReport) -> Section:
    facts = report.eight_bit
    if facts is None:
        note = "Not measured."
    elif facts.num_found == 0:
        note = "No adversarial image was found, so there is none to round."
    else:
        fooling = Count.of(
            Proportion(num_correct=facts.num_still_fooling, num_total=facts.num_found)
        )
        note = (
            f"Cameras deliver 8 bits. {count_text(fooling)} of the adversarial images found still "
            f"fool after rounding to them, 95 % interval {count_cells(fooling)[2]}: to the nearest "
            "level, or towards the clean image where that leaves the threat model or fools no more."
        )
    title = "Rounding to 8 bits"
    title += ", not to be believed" if report.status == "invalid" else ""
    return Section(key="rounding", title=title, notes=(note,))


def _cost(report: RobustnessReport) -> Section:
    title = "What the model costs"
    if not report.cost:
        return Section(key="cost", title=title, notes=("Not measured.",))
    threads = report.environment.get("num_threads", "?")
    note = (
        "Ratios are to the trained network. Latency: CPU, batch 1, float32, "
        f"{threads} threads, interleaved, median (10th to 90th percentile)."
    )
    return Section(key="cost", title=title, notes=(note,), tables=(cost_cells(report.cost),))


def _training(facts: TrainingFacts) -> Section:
    chosen = facts.selection
    notes = [
        "Selected on held-out training images; the checkpoints, which say more, are gone."
        if chosen is None
        else f"Selected: epoch {chosen.epoch} ({chosen.candidate}), clean "
        f"{count_text(chosen.clean)}, {count_text(chosen.robust)} under {chosen.attack}, on "
        "held-out training images."
    ]
    title = "Teachers and selection"
    if not facts.teachers:
        notes.append("Teachers: none, trained on labels.")
        return Section(key="training", title=title, notes=tuple(notes))
    notes.append(
        "Teachers are measured on held-out training images before the run; if they were trained on "
        "those images themselves, these two columns are optimistic."
    )
    header = ("role", "teacher", "clean", "short PGD", "sha256")
    rows = tuple(_teacher_cells(row) for row in facts.teachers)
    table = Table(align="llrrl", header=header, rows=rows)
    return Section(key="training", title=title, notes=tuple(notes), tables=(table,))


def _teacher_cells(row: TeacherRow) -> tuple[str, ...]:
    robust = count_text(row.robust) if row.robust else "no gradient"
    return row.role, row.name, count_text(row.clean), robust, row.sha256


def _provenance(report: RobustnessReport) -> Section:
    facts = (*_facts(report), *_texts(report.environment))
    if report.training:
        facts += _training_facts(report.training)
    tables = [Table(align="ll", header=("fact", "value"), rows=facts)]
    rows = tuple((row.name, _settings(row.parameters)) for row in report.attacks)
    if rows:
        tables.append(Table(align="ll", header=("attack", "settings"), rows=rows))
    return Section(key="provenance", title="Provenance", tables=tuple(tables))


_Facts = tuple[tuple[str, str], ...]


def _facts(report: RobustnessReport) -> _Facts:
    source = report.target.source_sha256
    return (
        ("report schema", str(report.schema_version)),
        ("model sha256", report.target.sha256),
        *((("gradients from sha256", source),) if source else ()),
        ("test content sha256", report.data.content_sha256),
        ("test index sha256", report.data.index_sha256),
        ("seed", str(report.seed)),
        ("verification", f"{report.duration_seconds:.1f} s"),
    )


def _training_facts(training: TrainingFacts) -> _Facts:
    used = {
        f"training {name}": training.environment[name]
        for name in _TRAINING_ENVIRONMENT
        if name in training.environment
    }
    return (
        ("recipe", training.recipe_id),
        ("training images", f"{training.num_training} + {training.num_validation} for validation"),
        ("training content sha256", training.content_sha256),
        ("validation index sha256", training.validation_index_sha256),
        *_texts(used),
    )


def _texts(values: Mapping[str, Any]) -> _Facts:
    return tuple(
        (name, value if isinstance(value, str) else json.dumps(value))
        for name, value in values.items()
    )


def _settings(parameters: Mapping[str, float | int | str | bool]) -> str:
    return ", ".join(
        f"{name} {value:.6g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in parameters.items()
    )
