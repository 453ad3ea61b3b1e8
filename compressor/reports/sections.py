"""What a report says to people, section by section, whatever the form: Markdown or HTML.

All texts and cells are plain; each form escapes them for itself. Where the status takes numbers
away, it is done here, so that no form can forget it. Here are the findings; what goes with them is
in `circumstances.py`. Needs no torch.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from compressor.reports.report import (
    AttackRow,
    Count,
    RobustnessReport,
    Status,
    ValidityRow,
    class_counts,
    percent,
    w_robust_fraction,
)
from compressor.threat import Norm, format_pixels

MAX_CONFUSIONS = 20
"""So many of the most frequent confusions are listed."""

_MEANINGS: Mapping[Status, str] = {
    "verified": "Every planned image went through every attack, and no validity check raised an "
    "alarm.",
    "incomplete": "A budget ended first. The images that are done are a random part of those "
    "planned, and the intervals are as wide as their number asks for.",
    "unverified": "No white-box attack of this model was run, so nothing was shown about its "
    "robustness. This report has no accuracy under attack.",
    "invalid": "A validity check raised an alarm: the evaluation itself may have failed, so its "
    "numbers say nothing about the model, however good they look.",
}
_NORM_NAMES: Mapping[Norm, str] = {"linf": "Linf", "l2": "L2"}
_CHECK_WORDS = {"passed": "passed", "alarm": "ALARM", "not_run": "not run"}


@dataclass(frozen=True, kw_only=True)
class Table:
    """Plain cells; `align` has a letter for each column, `l` for words and `r` for numbers."""

    align: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading and what is under it; figures are found by `key`."""

    key: str
    title: str
    level: int = 2
    notes: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()


def verdict(report: RobustnessReport) -> tuple[str, str, str]:
    """The status as a word, what it means, and why it is so here."""
    return report.status.capitalize(), _MEANINGS[report.status], report.status_reason.rstrip(".")


def setting(report: RobustnessReport) -> tuple[tuple[str, str], ...]:
    """(what, value): what was attacked, how, and on what."""
    num_done, data = len(report.samples.index), report.data
    images = f"{num_done:,} of {data.num_planned:,} planned test images of {data.source}"
    if data.num_available > data.num_planned:
        images += f", a part of {data.num_available:,}"
    return (
        ("Protocol", report.protocol),
        ("Threat", threat_text(report)),
        ("Model", f"{report.target.architecture} ({report.target.kind})"),
        ("Images", images),
        ("What is bounded", report.caveat),
    )


def headline(report: RobustnessReport) -> Table:
    """Clean and, where something was shown, the worst case."""
    rows = [("clean", *count_cells(report.clean), "")]
    if report.worst_case is not None and shows_robust(report):
        mean = percent_text(w_robust_fraction(report.clean, report.worst_case))
        name = f"worst case under {report.protocol}, {threat_text(report)}"
        rows.append((name, *count_cells(report.worst_case), mean))
    header = ("images", "accuracy", "correct", "95 % interval", "W-Robust")
    return Table(align="lrrrr", header=header, rows=tuple(rows))


def shows_robust(report: RobustnessReport) -> bool:
    """Whether there is any accuracy under attack to show; that of an invalid one is set apart."""
    return report.worst_case is not None and report.status != "unverified"


def findings(report: RobustnessReport) -> tuple[Section, ...]:
    """What the attacks found; an invalid report has its alarms first and the numbers set apart."""
    is_invalid = report.status == "invalid"
    level = 3 if is_invalid else 2
    builders = (_artefact, _curve, _attacks, _classes, _confusion)
    sections = tuple(section for build in builders if (section := build(report, level)))
    return (_alarms(report), _distrusted(report), *sections) if is_invalid else sections


def confusions(report: RobustnessReport) -> list[tuple[int, int, int]]:
    """(label, answered class, images) of all images broken or wrong, the most frequent first."""
    samples = report.samples
    entries = zip(samples.label, samples.broken_by, samples.prediction, strict=True)
    counts = Counter((y, k) for y, broken_by, k in entries if broken_by and k is not None)
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [(label, answer, num) for (label, answer), num in ordered]


def class_name(report: RobustnessReport, place: int) -> str:
    """Of a label or an answer; a model may answer with a class that the data has no name for."""
    names = report.data.class_names
    return names[place] if 0 <= place < len(names) else f"class {place}"


def threat_text(report: RobustnessReport) -> str:
    """`Linf, epsilon = 8/255`."""
    return f"{_NORM_NAMES[report.norm]}, epsilon = {radius(report, report.epsilon_pixels)}"


def radius(report: RobustnessReport, distance_pixels: float) -> str:
    """A radius in the norm of the report: in 255ths if that is Linf."""
    return f"{distance_pixels:g}" if report.norm == "l2" else format_pixels(distance_pixels)


def percent_text(fraction: float) -> str:
    """`52.00 %`, as of a `Count`."""
    return f"{100 * fraction:.2f} %"


def count_text(count: Count) -> str:
    """`52.00 % (52 of 100)`."""
    return f"{percent(count)} ({count.num_correct} of {count.num_total})"


def count_cells(count: Count) -> tuple[str, str, str]:
    """Accuracy, n, and interval."""
    interval = f"{100 * count.low_95:.2f} to {100 * count.high_95:.2f} %"
    return percent(count), f"{count.num_correct} of {count.num_total}", interval


def validity_table(rows: Sequence[ValidityRow]) -> Table:
    """One check a row."""
    cells = tuple(
        (
            row.name,
            _CHECK_WORDS[row.status],
            row.found,
            row.threshold,
            "-" if row.p_value is None else f"{row.p_value:.2g}",
            row.advice,
        )
        for row in rows
    )
    header = ("check", "status", "found", "threshold", "p", "advice")
    return Table(align="llllrl", header=header, rows=cells)


def _alarms(report: RobustnessReport) -> Section:
    """In sentences: who reads on a phone must not have to look for the advice."""
    notes = tuple(
        f"{row.name}: {row.found} ({row.threshold}{_p_text(row)}). {row.advice}"
        for row in report.validity
        if row.status == "alarm"
    )
    return Section(key="alarms", title="Alarms", notes=notes)


def _p_text(row: ValidityRow) -> str:
    return "" if row.p_value is None else f", p = {row.p_value:.2g}"


def _distrusted(report: RobustnessReport) -> Section:
    return Section(
        key="distrusted",
        title="Numbers that are not to be believed",
        notes=("They are here to find the mistake with, not to be quoted.",),
        tables=(headline(report),),
    )


def _artefact(report: RobustnessReport, level: int) -> Section | None:
    facts = report.artefact
    if facts is None:
        return None
    through = {
        "twin": "Attacked through its differentiable twin, rebuilt from the numbers in the file; "
        "attacks without gradients ask the file itself, and what fools it is for the file to say.",
        "source": "Attacked through the network it was exported from; what fools it is for the "
        "file to say.",
    }
    said = (f"{_sentence(text)}." for text in (facts.twin, facts.masking))
    notes = (through[facts.attacked_through], *said)
    tables: tuple[Table, ...] = ()
    if facts.transfer is not None and facts.source is not None:
        rows = (
            ("images made on its source alone, tried on the file", *count_cells(facts.transfer)),
            ("the same attack on the source itself", *count_cells(facts.source)),
        )
        header = ("first images", "accuracy", "correct", "95 % interval")
        tables = (Table(align="lrrr", header=header, rows=rows),)
    return Section(key="artefact", title="The file", level=level, notes=notes, tables=tables)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _curve(report: RobustnessReport, level: int) -> Section | None:
    if not report.curve or not shows_robust(report):
        return None
    points = sorted(report.curve, key=lambda point: point.epsilon_pixels)
    rows = tuple((radius(report, p.epsilon_pixels), *count_cells(p.accuracy)) for p in points)
    note = "Over a part of the images; every point is an upper bound, as the worst case is."
    if report.data.class_names:
        note += f" Chance is {percent_text(1 / len(report.data.class_names))}."
    table = Table(
        align="lrrr", header=("epsilon", "accuracy", "correct", "95 % interval"), rows=rows
    )
    title = "Accuracy against epsilon"
    return Section(key="curve", title=title, level=level, notes=(note,), tables=(table,))


_Cells = Callable[[AttackRow], str]
_TRIED: Mapping[str, _Cells] = {
    "attack": lambda row: row.name,
    "kind": lambda row: row.kind,
    "tried": lambda row: f"{row.num_tried:,}",
    "broken": lambda row: f"{row.num_broken:,}",
}
_STANDING: Mapping[str, _Cells] = {
    "standing after": lambda row: count_text(row.standing),
    "95 % interval": lambda row: count_cells(row.standing)[2],
}
_EFFORT: Mapping[str, _Cells] = {
    "forwards": lambda row: f"{row.num_forwards:,}",
    "backwards": lambda row: f"{row.num_backwards:,}",
    "time": lambda row: f"{row.duration_seconds:.1f} s",
}


def _attacks(report: RobustnessReport, level: int) -> Section | None:
    if not report.attacks:
        return None
    columns = {**_TRIED, **(_STANDING if shows_robust(report) else {}), **_EFFORT}
    rows = tuple(tuple(cell(row) for cell in columns.values()) for row in report.attacks)
    tables = [Table(align="ll" + "r" * (len(columns) - 2), header=tuple(columns), rows=rows)]
    notes = [
        "Each attack tries the images that stood before it. Forwards and backwards count images "
        "that went through the model."
    ]
    alone = tuple((row.name, row.accuracy) for row in report.attacks if row.accuracy)
    if alone and shows_robust(report):
        tables.append(_alone(report, alone))
        notes.append("The second table: attacks that tried every image, each by itself.")
    title = "Which attack broke how many"
    return Section(
        key="attacks", title=title, level=level, notes=tuple(notes), tables=tuple(tables)
    )


def _alone(report: RobustnessReport, alone: Sequence[tuple[str, Count]]) -> Table:
    rows = tuple(
        (name, *count_cells(count), percent_text(w_robust_fraction(report.clean, count)))
        for name, count in alone
    )
    header = ("attack by itself", "accuracy", "correct", "95 % interval", "W-Robust")
    return Table(align="lrrrr", header=header, rows=rows)


def _classes(report: RobustnessReport, level: int) -> Section:
    names = ("clean", "under attack") if shows_robust(report) else ("clean",)
    header = ("class", *(cell for name in names for cell in (name, f"{name}, 95 % interval")))
    rows = tuple(
        (name, *(cell for count in counts[: len(names)] for cell in _interval_cells(count)))
        for name, *counts in class_counts(report)
    )
    table = Table(align="l" + "r" * (len(header) - 1), header=header, rows=rows)
    return Section(key="classes", title="Accuracy per class", level=level, tables=(table,))


def _interval_cells(count: Count) -> tuple[str, str]:
    return count_text(count), count_cells(count)[2]


def _confusion(report: RobustnessReport, level: int) -> Section | None:
    found = confusions(report)
    if not found:
        return None
    total = sum(num for _, _, num in found)
    rows = tuple(
        (class_name(report, label), class_name(report, answer), f"{num} of {total}")
        for label, answer, num in found[:MAX_CONFUSIONS]
    )
    note = f"Over the {total} images that are wrong without an attack or were broken"
    if len(found) > len(rows):
        note += f"; listed are the {len(rows)} most frequent of {len(found)} pairs of classes"
    note += "."
    table = Table(align="llr", header=("label", "answered", "images"), rows=rows)
    title = "Confusion under attack"
    return Section(key="confusion", title=title, level=level, notes=(note,), tables=(table,))
