"""The record of a benchmark is refused if it is wrong; its tables, its picture, the page."""

import itertools
import json
import re
from xml.etree import ElementTree

import pytest

import compressor.reports.pareto
from compressor.errors import RunError
from compressor.proportions import Proportion
from compressor.reports.html import to_html, write_html
from compressor.reports.pareto import (
    Accuracy,
    Benchmark,
    BenchmarkRow,
    Timing,
    artefact_tables,
    latency_table,
    ms_text,
    not_dominated,
    pareto_picture,
    read_benchmark,
    standalone_svg,
    without_accuracy,
)
from compressor.reports.report import Count, ValidityRow
from compressor.reports.svg import ACCENT, MUTED

POISON = '"><script>hacked=1</script>'


def accuracy(num_correct, num_total=100, **changes):
    clean, worst = (
        Count.of(Proportion(num_correct=num, num_total=num_total))
        for num in (num_total, num_correct)
    )
    values = {
        "status": "verified",
        "report": "mine/report.json",
        "threat": "Linf, epsilon = 8/255",
        "protocol": "AutoAttack",
        "images_sha256": "e" * 64,
        "gradients_are_masked": False,
        "clean": clean,
        "worst_case": worst,
    }
    return Accuracy(**(values | changes))


def timing(**changes):
    values = {
        "batch_size": 1,
        "num_threads": 1,
        "num_rounds": 5,
        "num_calls": 200,
        "p50_ms": 0.5,
        "lowest_p50_ms": 0.4,
        "highest_p50_ms": 0.6,
        "p90_ms": 1.25,
        "p99_ms": 12.5,
        "images_per_second": 2000.0,
    }
    return Timing(**(values | changes))


def a_row(name, num_correct=None, **changes):
    values = {
        "name": name,
        "kind": "onnx",
        "precision": "fp32",
        "sha256": f"{name}-sha256",
        "source_sha256": None,
        "num_bytes": 1_000_000,
        "image_shape": (3, 8, 8),
        "takes_bytes": False,
        "runs_on": "nothing",
        "peak_memory_mib": 12.4,
        "timings": (timing(), timing(batch_size=8, p90_ms=None, p99_ms=None, num_calls=9)),
        "not_measured": (),
        "accuracy": None if num_correct is None else accuracy(num_correct),
    }
    return BenchmarkRow(**(values | changes))


def a_benchmark(*rows, **changes):
    values = {
        "targets": rows,
        "batch_sizes": (1, 8),
        "thread_counts": (1,),
        "num_cores": 2,
        "num_usable_cores": 2,
        "load_before": None,
        "load_after": 0.5,
        "mode": {"device": "cpu"},
    }
    return Benchmark(**(values | changes))


# The record


@pytest.fixture
def table():
    return a_benchmark(a_row("a", 40), a_row("b")).model_dump(mode="json")


@pytest.fixture
def save(tmp_path):
    def save(content):
        path = tmp_path / "bench.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return save


def test_a_record_is_read_as_it_was_written(table, save):
    assert read_benchmark(save(table)) == a_benchmark(a_row("a", 40), a_row("b"))


def spoilt(table, place, value):
    *path, last = place
    for key in path:
        table = table[key]
    table[last] = value


FIRST = ("targets", 0)
TIMING = (*FIRST, "timings", 0)
ACCURACY = (*FIRST, "accuracy")
VAST = {"num_correct": 10**400, "num_total": 2 * 10**400, "low_95": 0.5, "high_95": 0.5}
WRONG = {
    "another schema": (("schema_version",), 2),
    "an unknown key": (("more",), 1),
    "no targets": (("targets",), []),
    "too many targets": (("targets",), [{}] * 61),
    "no batch sizes": (("batch_sizes",), []),
    "a batch of none": (("batch_sizes",), [0]),
    "a number as text": ((*FIRST, "num_bytes"), "1"),
    "bytes beyond all measure": ((*FIRST, "num_bytes"), 10**400),
    "a long name": ((*FIRST, "name"), "a" * 501),
    "another kind": ((*FIRST, "kind"), "pickle"),
    "two sides": ((*FIRST, "image_shape"), [3, 8]),
    "time that runs backwards": ((*TIMING, "p50_ms"), -1.0),
    "an infinite time": ((*TIMING, "p99_ms"), 1e300),
    "p50 outside its range": ((*TIMING, "highest_p50_ms"), 0.45),
    "p90 below p50": ((*TIMING, "p90_ms"), 0.45),
    "p99 below p90": ((*TIMING, "p99_ms"), 1.0),
    "p99 of few calls": ((*TIMING, "num_calls"), 99),
    "numbers of an invalid one": ((*ACCURACY, "status"), "invalid"),
    "verified without numbers": ((*ACCURACY, "worst_case"), None),
    "an interval that is too good": ((*ACCURACY, "worst_case", "low_95"), 0.4),
    "more correct than there are": ((*ACCURACY, "clean", "num_correct"), 101),
    "counts beyond all measure": ((*ACCURACY, "clean"), VAST),
}


@pytest.mark.parametrize(("place", "value"), WRONG.values(), ids=WRONG)
def test_a_wrong_record_is_refused(place, value, table, save):
    spoilt(table, place, value)
    with pytest.raises(RunError, match=r"bench\.json is not a benchmark of schema 1: .*again$"):
        read_benchmark(save(table))


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "[" * 100_000, '"NaN"', "1" * 10_000])
def test_a_damaged_record_is_refused(content, save):
    with pytest.raises(RunError, match=r"bench\.json"):
        read_benchmark(save(content))


def test_a_record_is_not_larger_than_any(table, save, tmp_path):
    with pytest.raises(RunError, match="larger than any"):
        read_benchmark(save(json.dumps(table) + " " * 5_000_000))
    with pytest.raises(RunError, match="is missing"):
        read_benchmark(tmp_path / "nowhere.json")
    with pytest.raises(RunError, match="cannot be read"):
        read_benchmark(tmp_path)


# Domination


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


def test_only_what_was_verified_alike_is_compared():
    other = a_row("other", accuracy=accuracy(99, threat="L2, epsilon = 0.5"))
    elsewhere = a_row("elsewhere", accuracy=accuracy(99, images_sha256="d" * 64))
    invalid = a_row("invalid", accuracy=accuracy(1, status="invalid", clean=None, worst_case=None))
    rows = [other, a_row("a", 40), elsewhere, invalid, a_row("none"), a_row("b", 30)]
    assert [row.name for row, _ in a_benchmark(*rows).comparable] == ["a", "b"]
    assert a_benchmark(a_row("none")).comparable == ()


# Tables


def test_tables_say_what_is_known_and_what_is_not():
    invalid = accuracy(1, status="invalid", clean=None, worst_case=None)
    rows = [
        a_row("a", 40),
        a_row("b", peak_memory_mib=None, timings=(), not_measured=("all: no",)),
        a_row("c", accuracy=invalid),
    ]
    costs, found = artefact_tables(a_benchmark(*rows))
    assert costs.header[3] == "p50 ms, batch 1"
    assert costs.header[-1] == "images/s, batch 8"
    cells = ("1,000,000", "12 MiB", "0.500 (0.400 to 0.600)", "1.25", "12.5", "2000")
    assert costs.rows[0] == ("a", *cells)
    assert costs.rows[1] == ("b", "1,000,000", *["-"] * 5)
    worst = ("40.00 % (40 of 100)", "30.33 to 50.28 %")
    assert found.rows[0] == ("a", "100.00 % (100 of 100)", "96.38 to 100.00 %", *worst)
    assert found.rows[1:] == (
        ("b", "not verified", "-", "not verified", "-"),
        ("c", "invalid", "-", "invalid", "-"),
    )


def test_latencies_of_one_setting_are_together():
    table = latency_table(a_benchmark(a_row("a"), a_row("b")))
    assert [row[:3] for row in table.rows] == [
        ("1", "1", "a"),
        ("1", "1", "b"),
        ("1", "8", "a"),
        ("1", "8", "b"),
    ]
    assert table.rows[2][3:] == ("9", "0.500 (0.400 to 0.600)", "-", "-", "2000")
    assert {len(row) for row in table.rows} == {len(table.header)} == {len(table.align)}


@pytest.mark.parametrize(
    ("value_ms", "text"), [(None, "-"), (0.5904, "0.590"), (5.904, "5.90"), (59.04, "59.0")]
)
def test_milliseconds_have_about_three_digits(value_ms, text):
    assert ms_text(value_ms) == text


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
    spread = compressor.reports.pareto._spread_out
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
    assert wanted <= set(re.findall(r"(--\w+):", root.get("style")))
    assert text == standalone_svg(pareto_picture(a_benchmark(*rows)))


def test_an_interval_that_is_off_by_rounding_is_drawn():
    count = Count.of(Proportion(num_correct=0, num_total=100))
    count = Count.model_validate(count.model_dump() | {"low_95": 9e-7})
    rows = [a_row("a", accuracy=accuracy(0, worst_case=count)), a_row("b", 30)]
    assert pareto_picture(a_benchmark(*rows))


# In the page of a run


def section(html):
    found = re.search(r'<section aria-labelledby="artefacts">.*?</section>', html, flags=re.DOTALL)
    return found and found[0]


@pytest.fixture
def make_plain(make_report):
    """Builds a report whose page has no figures of its own, which take long to draw."""

    def make(**changes):
        names = tuple(f"kind {place}" for place in range(31))
        data = make_report().data.model_copy(update={"class_names": names})
        return make_report(curve=(), data=data, **changes).model_copy(update={"attacks": ()})

    return make


@pytest.fixture
def page(make_plain, tmp_path):
    """Writes the page of a report into a folder with this benchmark; the section on artefacts."""

    def page(content, **changes):
        (tmp_path / "bench.json").write_text(content)
        report = make_plain(**changes)
        write_html(tmp_path / "report.html", report, gallery=[], curves=[])
        return section((tmp_path / "report.html").read_text(encoding="utf-8"))

    return page


def own(*rows):
    """A benchmark that is of the model of `make_report` too."""
    return a_benchmark(a_row("own", 40, sha256="b" * 64), *rows).model_dump_json()


def test_the_page_of_a_run_shows_its_artefacts(page):
    text = page(own(a_row("small", 30, num_bytes=270)))
    assert "0.500 (0.400 to 0.600)" in text
    assert "40.00 % (40 of 100)" in text
    assert "30.00 % (30 of 100)" in text
    assert text.count("<svg") == 1


def test_a_page_without_a_benchmark_is_as_it_was(make_plain, tmp_path):
    report = make_plain()
    write_html(tmp_path / "report.html", report, gallery=[], curves=[])
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert section(text) is None
    assert text == to_html(report, gallery=[], curves=[])


@pytest.mark.parametrize("content", ["", "[]", '{"targets": 1}', "[" * 100_000])
def test_a_damaged_benchmark_is_a_sentence(content, page, tmp_path):
    text = page(content)
    assert "There is a benchmark that cannot be shown: bench.json " in text
    assert str(tmp_path) not in text
    assert "<table" not in text


def test_a_benchmark_of_other_models_is_not_shown(page):
    text = page(a_benchmark(a_row("a", 40)).model_dump_json())
    assert "bench.json is of other models" in text
    assert "<table" not in text


def test_a_page_that_is_not_verified_has_no_accuracy_of_its_model(page):
    alarm = ValidityRow(name="x", status="alarm", found="", threshold="", p_value=None, advice="do")
    other = a_row("small", 30, num_bytes=270)
    text = page(own(other), status="invalid", validity=(alarm,))
    assert "40.00 %" not in text
    assert "30.00 %" in text
    assert "not verified" in text


def test_accuracy_is_taken_away_from_one_target_only():
    benchmark = a_benchmark(a_row("a", 40), a_row("b", 30))
    changed = without_accuracy(benchmark, sha256="a-sha256")
    assert [row.accuracy is None for row in changed.targets] == [True, False]


def test_nothing_of_strangers_becomes_markup(page):
    rows = [a_row(POISON, accuracy=accuracy(30, protocol=POISON, report=POISON))]
    text = page(own(*rows))
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    for key in (POISON, "half \ud83d a pair"):
        text = page(json.dumps({key: 1}))
        assert "<script" not in text
        assert "cannot be shown" in text
