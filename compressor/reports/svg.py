"""Figures as inline SVG, drawn by matplotlib and coloured by the page that they are in.

Colours are drawn as placeholders and replaced by CSS variables: one figure serves light, dark and
paper. Text stays text and is never markup. The same drawing gives the same bytes. Needs no torch.
"""

import html
import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
from matplotlib.figure import Figure

INK, ACCENT, MUTED, LINE = "#010203", "#010204", "#010205", "#010206"
"""Placeholders: text, the one accent colour, what stands back, thin lines."""
WIDTH_INCHES = 5.0

_CSS = {
    INK: "currentColor",
    ACCENT: "var(--accent)",
    MUTED: "var(--muted)",
    LINE: "var(--line)",
}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "robust-compress",
    "text.parse_math": False,  # a class may be called $x$
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "figure.facecolor": "none",
}
_PAGE_STYLE = (
    "svg{color:#1b1e23;background:#fff;font-family:sans-serif;--accent:#1f5fa8;--muted:#59616b;"
    "--line:#d5dae0}@media(prefers-color-scheme:dark){svg{color:#e6e8eb;background:#14171b;"
    "--accent:#7db3f0;--muted:#9aa3ad;--line:#3a414a}}"
)
_MAX_LABEL_LETTERS = 22
_SVG = "{http://www.w3.org/2000/svg}"
_HREF = "{http://www.w3.org/1999/xlink}href"


@dataclass(frozen=True, kw_only=True)
class Picture:
    """Inline SVG, a line to stand under it, and the same in words for who does not see it."""

    svg: str
    caption: str
    alt: str


class Drawing:
    """A figure to draw on; `svg` is there once its canvas is left."""

    def __init__(self, figure: Figure) -> None:
        self.figure = figure
        self.svg = ""


@contextmanager
def canvas(prefix: str, *, height_inches: float) -> Iterator[Drawing]:
    """An empty figure in the style of the page, whatever the style of the user is.

    Args:
        prefix: what all ids in the SVG begin with; figures of one page need different ones.
        height_inches: of the figure; a width of `WIDTH_INCHES` fits a phone.
    """
    with mpl.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # the reader has it
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        drawing = Drawing(Figure(figsize=(WIDTH_INCHES, height_inches), layout="constrained"))
        yield drawing
        svg = io.StringIO()
        drawing.figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
    drawing.svg = _inline(svg.getvalue(), prefix=prefix)


def standalone_svg(picture: Picture) -> str:
    """The picture as a file of its own, light or dark as its reader likes."""
    opening, _, rest = picture.svg.replace(' aria-hidden="true"', "", 1).partition(">")
    root = '<svg xmlns="http://www.w3.org/2000/svg" width="640" role="img"'
    said = f"<title>{html.escape(picture.alt)}</title><desc>{html.escape(picture.caption)}</desc>"
    return f"{opening.replace('<svg', root, 1)}>{said}<style>{_PAGE_STYLE}</style>{rest}"


def label(text: str) -> str:
    """A name from strangers, fit for an axis: one line, printable, not too long."""
    shown = "".join(letter for letter in " ".join(text.split()) if letter.isprintable())
    return shown if len(shown) <= _MAX_LABEL_LETTERS else shown[: _MAX_LABEL_LETTERS - 1] + "…"


def _inline(svg: str, *, prefix: str) -> str:
    """Without prologue, style sheet, fixed size and unused ids: what a page can hold many of."""
    root = ElementTree.fromstring(svg)
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', svg))
    _remove(root, {f"{_SVG}metadata", f"{_SVG}style"})
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        element.tail = None
        if element.tag != "text":
            element.text = None
        element.attrib = _attributes(element.attrib, used=used, prefix=prefix)
    root.attrib = {"viewBox": root.attrib["viewBox"], "aria-hidden": "true"}
    return ElementTree.tostring(root, encoding="unicode")


def _remove(parent: ElementTree.Element, tags: set[str]) -> None:
    for child in list(parent):
        if child.tag in tags:
            parent.remove(child)
        else:
            _remove(child, tags)


def _attributes(attributes: dict[str, str], *, used: set[str], prefix: str) -> dict[str, str]:
    kept = {}
    for key, value in attributes.items():
        if key == "id":
            if value in used:
                kept[key] = f"{prefix}-{value}"
        elif key == _HREF:
            kept["href"] = f"#{prefix}-{value[1:]}"
        elif key == "style":
            kept[key] = _coloured(value)
        else:
            kept[key] = value.replace("url(#", f"url(#{prefix}-")
    return kept


def _coloured(style: str) -> str:
    style = re.sub(r"\s*font-family:[^;]*;?", "", style)
    return re.sub("#0102\\d\\d", lambda match: _CSS[match[0]], style).strip("; ")
