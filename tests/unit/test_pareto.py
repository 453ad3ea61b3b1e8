"""Who is not dominated, and the picture of it."""

import itertools
import re
from xml.etree import ElementTree

import pytest

import compressor.reports.pareto
from compressor.proportions import Proportion
from compressor.reports.pareto import not_dominated, pareto_picture
from compressor.reports.report import Count
from compressor.reports.svg import ACCENT, MUTED, standalone_svg
from tests.unit.benchmark_rows import POISON, a_benchmark, a_row, accuracy


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([(1, 1)], [True]),
        ([(1, 1), (2, 2)], [True, True]),
        ([(1, 2), (2, 1)], [True, False]),
        ([(1, 2), (1, 1)], [True, False]),
        ([(2, 1), (1, 1)], [False, True]),
        ([(1, 1), (1, 1)], [True, True]),
        ([(1, 1), (2, 3), (3, 2), (4, 4)], [True, True, False, True]),
    ],
)
def test_not_dominated(points, expected):
    assert not_dominated(points) == expected


# The picture


def texts(svg):
    root = ElementTree.fromstring(svg)
    return [element.text for element in root.iter() if element.tag.endswith("text")]


def test_no_picture_of_one_point():
    assert pareto_picture(a_benchmark(a_row("a", 40), a_row("b"))) is None
    assert pareto_picture(a_benchmark(a_row("a", 40), a_row("b", 30))) is not None


def test_dominated_targets_are_grey():
    rows = [a_row("good", 40), a_row("bad", 30, num_bytes=2_000_000)]
    picture = pareto_picture(a_benchmark(*rows))
    root = ElementTree.fromstring(picture.svg)
    fills = {t.text: t.get("style") for t in root.iter("text") if t.text in ("good", "bad")}
    assert "fill: currentColor" in fills["good"]
    assert "fill: var(--muted)" in fills["bad"]
    for colour in ("accent", "muted"):  # of the interval
        assert len(re.findall(rf'stroke: var\(--{colour}\); stroke-width: 1\.5"', picture.svg)) == 1
    assert picture.alt == (
        "Size and accuracy in the worst case: good: 1.00 MB, 40.00 %; bad: 2.00 MB, 30.00 %. "
        "Not dominated: good."
    )
    assert ACCENT not in picture.svg
    assert MUTED not in picture.svg


@pytest.mark.parametrize("num", [2, 5, 30])
def test_names_do_not_collide(num):
    """Even if all points are in one place, and the interval ends at a hundred."""
    picture = pareto_picture(a_benchmark(*(a_row(f"name{place}", 100) for place in range(num))))
    root = ElementTree.fromstring(picture.svg)
    names = [t for t in root.iter("text") if (t.text or "").startswith("name")]
    assert len(names) == num
    heights = sorted(float(text.get("y")) for text in names)
    assert min(b - a for a, b in itertools.pairwise(heights)) > 10  # the height of a letter
    top, bottom = 0, float(root.get("viewBox").split()[3])
    assert top < heights[0] - 10 < heights[-1] < bottom


def test_names_are_near_their_points():
    spread = compressor.reports.pareto.spread_out
    assert spread([10.0, 30.0, 20.0], gap=5, highest=40) == [10, 30, 20]
    assert spread([10.0, 12.0, 11.0], gap=5, highest=40) == [10, 20, 15]
    assert spread([40.0, 40.0, 0.0], gap=5, highest=40) == [35, 40, -5]


def test_of_long_names_the_end_is_shown():
    picture = pareto_picture(a_benchmark(a_row("x" * 60 + ".int8.onnx", 40), a_row("b", 30)))
    (shown,) = (text for text in texts(picture.svg) if text.endswith(".int8.onnx"))
    assert len(shown) == 22
    assert shown.startswith("…x")


def test_the_picture_is_a_file_of_its_own():
    rows = [a_row(POISON, 40), a_row("b", 30, num_bytes=10)]
    text = standalone_svg(pareto_picture(a_benchmark(*rows)))
    root = ElementTree.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert root[0].tag.endswith("title")
    assert POISON in root[0].text
    assert "<script" not in text
    assert not re.search(r"(href|src)=\"(?!#)", text)
    wanted = set(re.findall(r"var\((--\w+)\)", text))
    svg = "{http://www.w3.org/2000/svg}"
    light, _, dark = root.find(f"{svg}style").text.partition("@media(prefers-color-scheme:dark)")
    assert all(wanted <= set(re.findall(r"(--\w+):", style)) for style in (light, dark))
    assert root.find(f"{svg}desc").text.startswith("Grey: another is no larger")
    assert text == standalone_svg(pareto_picture(a_benchmark(*rows)))


def test_an_interval_that_is_off_by_rounding_is_drawn():
    count = Count.of(Proportion(num_correct=0, num_total=100))
    count = Count.model_validate(count.model_dump() | {"low_95": 9e-7})
    rows = [a_row("a", accuracy=accuracy(0, worst_case=count)), a_row("b", 30)]
    assert pareto_picture(a_benchmark(*rows))
