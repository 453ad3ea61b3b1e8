"""A ranking of teachers as tables, as Markdown and as a heat map. Needs no torch."""

from pathlib import Path
from typing import get_args

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from compressor.reports.markdown import markdown_picture, markdown_table, plain
from compressor.reports.report import Count, percent
from compressor.reports.sections import Table, count_cells
from compressor.reports.svg import (
    ACCENT,
    INK,
    MUTED,
    WIDTH_INCHES,
    Picture,
    canvas,
    label,
    standalone_svg,
)
from compressor.reports.teacher_ranking import (
    RankedTeacher,
    Seen,
    TeacherRanking,
    TransferCell,
)
from compressor.run_directory import write_json_atomically, write_text_atomically

MAX_DRAWN = 30
"""Teachers in the heat map."""
_MAX_WRITTEN = 8
"""Up to so many, its cells are wide enough for a number with its n."""
_NOT_ATTACKED = "-"
ACCURACY_NOTE = (
    "Accuracy of the teacher in the column on images made on the teacher in the row, over the "
    "images that the latter gets right clean (their number is the second column)."
)
TRANSFER_NOTE = (
    "Transferability: of the images that fool the teacher in the row and that the teacher in the "
    "column gets right clean (their number is in brackets), the share that the latter gets wrong."
)


def accuracy_table(ranking: TeacherRanking) -> Table:
    """Clean accuracy, accuracy under its own attack, and after all images made on others."""
    rows = []
    for number, teacher in enumerate(ranking.teachers, start=1):
        cells = [*_share_and_interval(teacher.clean), *_share_and_interval(teacher.robust)]
        worst = _NOT_ATTACKED if teacher.worst_case is None else percent(teacher.worst_case)
        rows.append((f"{number} {teacher.name}", *cells, worst))
    header = ("teacher", "clean", "95 % interval", "APGD", "95 % interval", "worst")
    return Table(align="lrrrrr", header=header, rows=tuple(rows))


def seen_line(ranking: TeacherRanking) -> str:
    """Which teachers were trained on some of the images; no table of 80 columns has room for it."""
    answers = ((seen, _names_of(ranking, seen)) for seen in get_args(Seen))
    said = "; ".join(f"{seen}: {names}" for seen, names in answers if names)
    return f"Seen in training, some of these images: {said}."


def _names_of(ranking: TeacherRanking, seen: Seen) -> str:
    return ", ".join(t.name for t in ranking.teachers if t.has_seen_images == seen)


def nature_table(ranking: TeacherRanking) -> Table:
    """Size, speed, entropies."""
    rows = tuple(
        (
            f"{number} {teacher.name}",
            teacher.architecture,
            "-" if teacher.num_parameters is None else f"{teacher.num_parameters:,}",
            f"{teacher.forward_ms:.2f}",
            f"{teacher.clean_entropy_nats:.3f}",
            _entropy(teacher),
        )
        for number, teacher in enumerate(ranking.teachers, start=1)
    )
    header = ("teacher", "network", "parameters", "ms/image", "nats clean", "nats APGD")
    return Table(align="llrrrr", header=header, rows=rows)


def transfer_accuracy_table(ranking: TeacherRanking) -> Table:
    """See `ACCURACY_NOTE`."""
    numbers = range(1, len(ranking.teachers) + 1)
    rows = []
    for number, teacher in zip(numbers, ranking.teachers, strict=True):
        cells = [ranking.cell(number, other) for other in numbers]
        totals = {cell.accuracy.num_total for cell in cells if cell and cell.accuracy}
        shares = [_NOT_ATTACKED if not cell else _short(cell.accuracy) for cell in cells]
        rows.append((f"{number} {teacher.name}", str(max(totals, default="-")), *shares))
    header = ("made on", "of", *map(str, numbers))
    return Table(align="l" + "r" * (len(header) - 1), header=header, rows=tuple(rows))


def transferability_table(ranking: TeacherRanking) -> Table:
    """See `TRANSFER_NOTE`."""
    numbers = range(1, len(ranking.teachers) + 1)
    rows = tuple(
        (
            f"{number} {teacher.name}",
            *(_transferred(ranking.cell(number, other)) for other in numbers),
        )
        for number, teacher in zip(numbers, ranking.teachers, strict=True)
    )
    return Table(align="l" + "r" * len(numbers), header=("made on", *map(str, numbers)), rows=rows)


def choice_text(ranking: TeacherRanking) -> str:
    """Who is recommended, in a line."""
    chosen = ranking.chosen
    if chosen is None:
        return "Recommended: nobody."
    names = ", ".join(ranking.teachers[number - 1].name for number in chosen.numbers)
    return f"Recommended: {names}."


def choice_lines(ranking: TeacherRanking) -> list[str]:
    """Why, and how sure that is; nothing if nobody is recommended."""
    chosen = ranking.chosen
    if chosen is None:
        return ["No teacher that could be attacked withstands anything."]
    same = chosen.same_choice
    if chosen.num_robust == len(chosen.numbers):  # there was nothing to choose
        return [chosen.reason]
    return [
        chosen.reason,
        f"Other images of the same number would give the same choice in about {percent(same)} of "
        f"cases ({same.num_correct} of {same.num_total} resamples).",
    ]


def to_markdown(ranking: TeacherRanking, picture: Picture | None, *, picture_name: str) -> str:
    """For people and for pull requests; names come from strangers and cannot become markup.

    Args:
        ranking: what was found.
        picture: its heat map, if there is one.
        picture_name: of its file, beside the page.
    """
    blocks = [
        "# Teachers",
        plain(f"{ranking.protocol}."),
        f"**{plain(choice_text(ranking))}**",
        *map(plain, choice_lines(ranking)),
        "\n".join(f"- {plain(note)}" for note in ranking.notes),
        "## Accuracy",
        f"Of {ranking.num_images} images. `worst`: right also on the images made on all others. "
        "`trained on them`: on some of these images; of a file alone that is unknown.",
        _markdown(_with_counts(ranking)),
        "## Size, speed and entropy",
        _markdown(nature_table(ranking)),
        "## Transfer",
        ACCURACY_NOTE,
        _markdown(transfer_accuracy_table(ranking)),
        TRANSFER_NOTE,
        _markdown(transferability_table(ranking)),
        "" if picture is None else markdown_picture(picture, picture_name),
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def heat_map(ranking: TeacherRanking) -> Picture:
    """One square for each pair; the darker, the more is transferred. The chosen are marked."""
    num = len(ranking.teachers)
    chosen = set(ranking.chosen.numbers) if ranking.chosen else set()
    with canvas("teachers", height_inches=(0.55 + 0.08 * min(num, 6)) * WIDTH_INCHES) as drawing:
        axes = drawing.figure.subplots()
        for y in range(num):
            for x in range(num):
                _draw_cell(axes, ranking.cell(y + 1, x + 1), y=y, x=x, num=num)
        names = [f"{number} {teacher.name}" for number, teacher in enumerate(ranking.teachers, 1)]
        axes.set_xticks(range(num), [str(number) for number in range(1, num + 1)])
        axes.set_yticks(range(num), [label(name) for name in names])
        for place, text in enumerate([*axes.get_xticklabels(), *axes.get_yticklabels()]):
            is_chosen = place % num + 1 in chosen
            text.set(color=ACCENT if is_chosen else INK, weight="bold" if is_chosen else "normal")
        limits = (-0.5, num - 0.5)
        axes.set(xlabel="shown to", ylabel="made on", xlim=limits, ylim=limits[::-1])
        axes.set_title("Transferability (%), recommended teachers in bold", fontsize=10)
        axes.grid(visible=False)
    pairs = ((cell, cell.transferability) for cell in ranking.transfer)
    said = "; ".join(
        f"{cell.made_on} to {cell.shown_to}: {_transferred(cell)}"
        for cell, share in pairs
        if share is not None and cell.made_on != cell.shown_to
    )
    return Picture(
        svg=drawing.svg,
        caption="From the teacher in the row to the one in the column; the stronger the colour, "
        "the more is transferred. Recommended teachers are bold.",
        alt=f"Transferability between {num} teachers, in per cent (n): {said or 'not measured'}. "
        f"{choice_text(ranking)}",
    )


def write_ranking(ranking: TeacherRanking, folder: Path) -> list[Path]:
    """Write teachers.md, the picture teachers.svg and, last, teachers.json; the JSON first named.

    Raises:
        OSError: if one cannot be written; it names the file.
    """
    record, page, drawing = (folder / f"teachers.{kind}" for kind in ("json", "md", "svg"))
    picture = heat_map(ranking) if 1 < len(ranking.teachers) <= MAX_DRAWN else None
    write_text_atomically(page, to_markdown(ranking, picture, picture_name=drawing.name))
    if picture is None:
        drawing.unlink(missing_ok=True)  # of an earlier ranking
    else:
        write_text_atomically(drawing, standalone_svg(picture))
    write_json_atomically(record, ranking.model_dump(mode="json"))
    return [record, page] if picture is None else [record, page, drawing]


def _draw_cell(axes: Axes, cell: TransferCell | None, *, y: int, x: int, num: int) -> None:
    share = cell.transferability if cell and y != x else None
    if share is not None:
        corner, strength = (x - 0.5, y - 0.5), 0.05 + 0.5 * share.fraction
        axes.add_patch(Rectangle(corner, 1, 1, color=ACCENT, alpha=strength, linewidth=0))
    if num > _MAX_WRITTEN:
        return
    if share is None:
        axes.text(x, y, _NOT_ATTACKED, ha="center", va="center", color=MUTED)
        return
    axes.text(x, y, _short(share), ha="center", va="bottom")
    axes.text(x, y + 0.08, f"of {share.num_total}", ha="center", va="top", fontsize=7.5)


def _with_counts(ranking: TeacherRanking) -> Table:
    """The accuracies, each with its n."""
    rows = []
    for number, teacher in enumerate(ranking.teachers, start=1):
        row = [f"{number} {teacher.name}"]
        for count in (teacher.clean, teacher.robust):
            row += [_NOT_ATTACKED] * 3 if count is None else list(count_cells(count))
        worst = teacher.worst_case
        row += [_NOT_ATTACKED] * 2 if worst is None else list(count_cells(worst)[:2])
        rows.append((*row, teacher.has_seen_images))
    header = ("teacher", "clean", "", "95 % interval", "APGD", "", "95 % interval", "worst", "")
    return Table(align="l" + "r" * 8 + "l", header=(*header, "trained on them"), rows=tuple(rows))


def _markdown(table: Table) -> str:
    rows = [[plain(cell) for cell in row] for row in table.rows]
    return markdown_table(table.header, rows, align=table.align)


def _share_and_interval(count: Count | None) -> tuple[str, str]:
    if count is None:
        return _NOT_ATTACKED, _NOT_ATTACKED
    return percent(count), f"{100 * count.low_95:.1f} to {100 * count.high_95:.1f}"


def _entropy(teacher: RankedTeacher) -> str:
    value = teacher.adversarial_entropy_nats
    return _NOT_ATTACKED if value is None else f"{value:.3f}"


def _short(count: Count | None) -> str:
    return "-" if count is None else f"{100 * count.fraction:.1f}"


def _transferred(cell: TransferCell | None) -> str:
    if cell is None or cell.transferability is None or cell.made_on == cell.shown_to:
        return _NOT_ATTACKED
    return f"{_short(cell.transferability)} ({cell.transferability.num_total})"
