"""A report as one HTML page: no network, no script, light, dark and paper, phone and desk.

What it says comes from `sections.py` and `circumstances.py`, as in Markdown; here are the
pictures that go with it. HWC: H rows, W columns, C channels (1 or 3). Needs no torch.
"""

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jinja2 import Environment, StrictUndefined
from numpy.typing import NDArray
from PIL import Image

from compressor.errors import RunError
from compressor.reports.benchmark import Benchmark, read_benchmark, without_accuracy
from compressor.reports.benchmark_tables import artefact_tables
from compressor.reports.circumstances import circumstances
from compressor.reports.figures import report_figures
from compressor.reports.pareto import pareto_picture
from compressor.reports.report import RobustnessReport
from compressor.reports.sections import (
    Section,
    class_name,
    findings,
    headline,
    percent_text,
    setting,
    verdict,
)
from compressor.reports.svg import Picture
from compressor.reports.training_figures import training_figures
from compressor.run_directory import RunDirectory, write_text_atomically

Pixels = NDArray[np.uint8] | Sequence[Sequence[Sequence[int]]]

_GALLERY_BYTES = 900_000
"""What all images of a gallery together may take; larger ones lose rows and columns."""
_GROUPS = {
    "clearest": "The clearest: the highest confidence in a wrong answer",
    "closest": "The closest: the smallest distance",
}
_ARTEFACTS_NOTE = (
    "Measured by robust-compress bench, targets in turn on one machine, times in milliseconds "
    "with the range of the rounds; accuracies are of verifications of these very files."
)
_MAX_SAID_LETTERS = 300
_GALLERY_NOTE = (
    "Shown rounded to 8 bits; distances are before rounding. The change is the adversarial image "
    "minus the original, times the number under it; grey is no change."
)


@dataclass(frozen=True, kw_only=True)
class GalleryImage:
    """An image and what an attack made of it, both rounded to 8 bits."""

    group: Literal["clearest", "closest"]
    index: int
    """Position in the test images."""
    label: int
    attack: str | None
    """Which attack broke it; None: it stands."""
    clean_HWC: Pixels
    """uint8; 1 or 3 channels."""
    adv_HWC: Pixels
    """uint8, of the same shape."""
    clean_confidence_fraction: float
    """Of the answer on the clean image."""
    adv_confidence_fraction: float
    """Of the answer on the adversarial image."""
    adv_prediction: int
    distance_pixels: float
    """In the norm of the report, before rounding to 8 bits."""
    margin: float
    """Of the logits on the adversarial image."""


def write_html(
    path: Path,
    report: RobustnessReport,
    *,
    gallery: Sequence[GalleryImage],
    curves: Sequence[Mapping[str, Any]],
) -> None:
    """Write `to_html` as a whole or not at all; a benchmark in the folder becomes part of it.

    Raises:
        ValueError: as `to_html`.
    """
    benchmark = _benchmark_of(path.parent, report)
    text = to_html(report, gallery=gallery, curves=curves, benchmark=benchmark)
    write_text_atomically(path, text)


def to_html(
    report: RobustnessReport,
    *,
    gallery: Sequence[GalleryImage],
    curves: Sequence[Mapping[str, Any]],
    benchmark: Benchmark | str | None = None,
) -> str:
    """The whole page; the same input gives the same bytes.

    Names, paths and advice come from strangers: every text is escaped.

    Args:
        report: what was found.
        gallery: images to show, in this order within their group.
        curves: the lines of the run's `metrics.jsonl`; empty if the target is not a run.
        benchmark: of this model and what was made from it; a text says why it is not shown.

    Raises:
        ValueError: if an image of the gallery is not uint8 of 1 or 3 channels.
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = resources.files("compressor.reports").joinpath("report.html.j2")
    source = template.read_text(encoding="utf-8")
    cards, training = _cards(report, gallery), training_figures(curves)
    word, meaning, reason = verdict(report)
    recipe = json.dumps(report.training.recipe, indent=2) if report.training else None
    text = environment.from_string(source).render(
        report=report,
        word=word,
        meaning=meaning,
        reason=reason,
        numbers=() if report.status == "invalid" else headline(report).rows,
        setting=setting(report),
        sections=_sections(report, gallery=cards, training=training, benchmark=benchmark),
        figures={**_figures(report, benchmark), "curves": training},
        gallery=cards,
        recipe=recipe,
    )
    return text.encode("utf-8", "replace").decode()  # half a surrogate pair is no character


@dataclass(frozen=True, kw_only=True)
class _Shown:
    """One picture of a card."""

    name: str
    uri: str
    width: int
    height: int


@dataclass(frozen=True, kw_only=True)
class _Card:
    """One image of the gallery, in words and pictures."""

    label: str
    answer: str
    confidences: str
    facts: str
    pictures: tuple[_Shown, ...]


_Cards = Mapping[str, Sequence[_Card]]


def _sections(
    report: RobustnessReport,
    *,
    gallery: _Cards,
    training: Sequence[Picture],
    benchmark: Benchmark | str | None,
) -> Sequence[Section]:
    sections = [*findings(report)]
    if gallery:
        level = 3 if report.status == "invalid" else 2
        title = "Adversarial images"
        sections.append(Section(key="gallery", title=title, level=level, notes=(_GALLERY_NOTE,)))
    if training:
        sections.append(Section(key="curves", title="Training"))
    if isinstance(benchmark, str):
        sections.append(Section(key="artefacts", title="Artefacts", notes=(benchmark,)))
    elif benchmark is not None:
        tables = artefact_tables(benchmark)
        sections.append(
            Section(key="artefacts", title="Artefacts", notes=(_ARTEFACTS_NOTE,), tables=tables)
        )
    return [*sections, *circumstances(report)]


def _benchmark_of(folder: Path, report: RobustnessReport) -> Benchmark | str | None:
    """What lies in the folder; a sentence if that cannot be shown on the page of this model."""
    path = RunDirectory(folder).benchmark
    if not path.exists():
        return None
    try:
        benchmark = read_benchmark(path)
    except RunError as error:
        said = str(error).replace(str(path), path.name)[:_MAX_SAID_LETTERS]
        return f"There is a benchmark that cannot be shown: {said}."
    if report.target.sha256 not in {row.sha256 for row in benchmark.targets}:
        return f"{path.name} is of other models, so it is not shown; measure again."
    if report.status == "verified":
        return benchmark
    return without_accuracy(benchmark, sha256=report.target.sha256)


def _figures(
    report: RobustnessReport, benchmark: Benchmark | str | None
) -> Mapping[str, Sequence[Picture]]:
    figures = {key: (picture,) for key, picture in report_figures(report).items()}
    artefacts = pareto_picture(benchmark) if isinstance(benchmark, Benchmark) else None
    return {**figures, **({"artefacts": (artefacts,)} if artefacts else {})}


def _cards(report: RobustnessReport, gallery: Sequence[GalleryImage]) -> _Cards:
    """By the title of their group; a group without images has none."""
    max_side = math.isqrt(_GALLERY_BYTES // (12 * max(1, len(gallery))))
    cards = {
        title: [_card(report, image, max_side) for image in gallery if image.group == group]
        for group, title in _GROUPS.items()
    }
    return {title: of_group for title, of_group in cards.items() if of_group}


def _card(report: RobustnessReport, image: GalleryImage, max_side: int) -> _Card:
    clean, adv = _pixels(image.clean_HWC), _pixels(image.adv_HWC)
    if clean.shape != adv.shape:
        raise ValueError(f"image {image.index}: shapes {clean.shape} and {adv.shape} differ")
    step = math.ceil(max(clean.shape[:2]) / max_side)
    clean, adv = clean[::step, ::step], adv[::step, ::step]
    change = adv.astype(np.int16) - clean
    scale = max(1, 127 // max(1, int(np.abs(change).max())))
    before = percent_text(image.clean_confidence_fraction)
    after = percent_text(image.adv_confidence_fraction)
    facts = [_distance(report, image), image.attack or "stands", f"image {image.index}"]
    facts += [f"logit margin {image.margin:.2f}"]
    facts += [f"every {step}th row and column"] if step > 1 else []
    return _Card(
        label=class_name(report, image.label),
        answer=class_name(report, image.adv_prediction),
        confidences=f"{before} → {after} confident",
        facts=", ".join(facts),
        pictures=(
            _shown("original", clean),
            _shown("adversarial", adv),
            _shown(f"change × {scale}", (128 + scale * change).clip(0, 255).astype(np.uint8)),
        ),
    )


def _distance(report: RobustnessReport, image: GalleryImage) -> str:
    if report.norm == "l2":
        return f"L2 distance {image.distance_pixels:.3f}"
    return f"distance {255 * image.distance_pixels:.2f}/255"


def _pixels(image: Pixels) -> NDArray[np.uint8]:
    """As an array [H, W, C]; nested sequences may have bytes for pixels."""
    nested = image if isinstance(image, np.ndarray) else [[[*p] for p in row] for row in image]
    pixels = np.asarray(nested)
    is_image = pixels.ndim == 3 and pixels.size and pixels.shape[2] in (1, 3)
    if not is_image or pixels.dtype.kind not in "iu" or pixels.min() < 0 or pixels.max() > 255:
        raise ValueError(
            f"an image of the gallery has shape {pixels.shape} and type {pixels.dtype}; it must be "
            "rows x columns x 1 or 3 channels of uint8"
        )
    return pixels.astype(np.uint8)


def _shown(name: str, pixels_HWC: NDArray[np.uint8]) -> _Shown:
    height, width, num_channels = pixels_HWC.shape
    image = Image.fromarray(pixels_HWC[:, :, 0] if num_channels == 1 else pixels_HWC)
    file = io.BytesIO()
    image.save(file, format="PNG", optimize=True)
    uri = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    return _Shown(name=name, uri=uri, width=width, height=height)
