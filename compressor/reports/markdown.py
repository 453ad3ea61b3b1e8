"""A report as Markdown, for people and for pull requests. Needs no torch."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from compressor.reports.circumstances import circumstances, cost_cells
from compressor.reports.report import CostRow, RobustnessReport
from compressor.reports.sections import Section, Table, findings, headline, setting, verdict

if TYPE_CHECKING:
    from compressor.reports.svg import Picture

_RULES = {"l": "---", "r": "---:"}


def to_markdown(report: RobustnessReport) -> str:
    """For people: what was measured, what it costs, where it comes from.

    Names, paths and advice come from strangers: none of them can become markup.
    """
    word, meaning, reason = verdict(report)
    facts = "\n".join(f"- {what}: {plain(value)}" for what, value in setting(report))
    blocks = [f"# {plain(report.name)}", f"**{word}.** {meaning} Reason: {plain(reason)}.", facts]
    if report.status != "invalid":
        blocks.append(_table(headline(report)))
    for section in (*findings(report), *circumstances(report)):
        blocks += _blocks(section)
    return "\n\n".join(blocks) + "\n"


def cost_table(rows: Sequence[CostRow]) -> str:
    """Every cost beside its ratio to the trained network's, the last row that is no file."""
    return _table(cost_cells(rows))


def markdown_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, align: str | None = None
) -> str:
    """A table in GitHub's Markdown.

    Args:
        header: a text for each column.
        rows: cells; they may hold Markdown, and a bar or a line break in one stays in it.
        align: a letter for each column, `l` or `r`; by default the first is `l`, the others `r`.
    """
    letters = align or "l" + "r" * (len(header) - 1)
    lines = [header, [_RULES[letter] for letter in letters], *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def markdown_picture(picture: "Picture", name: str) -> str:
    """A picture in a file of that name, and what is to be read under it."""
    return f"![{plain(picture.alt)}]({name})\n\n{plain(picture.caption)}"


def plain(text: str) -> str:
    """`text` so that Markdown shows it as it is, in one line."""
    return re.sub(r"([\\`*<&\[\]~]|\b_|_\b)", r"\\\1", " ".join(text.split()))


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _table(table: Table) -> str:
    rows = [[plain(cell) for cell in row] for row in table.rows]
    return markdown_table(table.header, rows, align=table.align)


def _blocks(section: Section) -> list[str]:
    heading = "#" * section.level + " " + section.title
    return [heading, *map(plain, section.notes), *map(_table, section.tables)]
