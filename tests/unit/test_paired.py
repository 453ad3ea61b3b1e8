"""Two reports image by image: exact p-values, Holm's correction, bounds of the drop."""

import math
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressor.gate.paired import (
    Asked,
    BrokenImage,
    Comparison,
    compare,
    describe_comparison,
    holm,
    mismatch,
    p_value_of_change,
    p_value_of_drop,
)
from compressor.proportions import Proportion
from compressor.reports.report import SampleTable, TestFacts

NONE_BROKEN = (None,) * 40


def broken(*places, num=40, by="pgd_sat"):
    return tuple(by if i in places else None for i in range(num))


@pytest.mark.parametrize(("b", "c"), [(0, 0), (0, 5), (1, 0), (3, 1), (10, 2), (2, 10), (25, 25)])
def test_p_values_are_binomial_sums(b, c):
    n = b + c
    tail = math.fsum(math.comb(n, k) for k in range(b, n + 1)) / 2**n
    assert p_value_of_drop(num_broken=b, num_fixed=c) == pytest.approx(tail, abs=1e-12)
    larger = math.fsum(math.comb(n, k) for k in range(max(b, c), n + 1)) / 2**n
    change = p_value_of_change(num_broken=b, num_fixed=c)
    assert change == pytest.approx(min(1, 2 * larger), abs=1e-12)
    assert change == p_value_of_change(num_broken=c, num_fixed=b)


@pytest.mark.parametrize(
    ("p_values", "adjusted"),
    [
        ([], []),
        ([0.03], [0.03]),
        ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),
        ([0.5, 0.5, 0.5], [1, 1, 1]),
        ([0.001, 0.9, 0.01, 0.02], [0.004, 0.9, 0.03, 0.04]),
    ],
)
def test_holm_known_values_in_any_order(p_values, adjusted):
    for places in permutations(range(len(p_values))):
        found = holm([p_values[place] for place in places])
        assert found == pytest.approx([adjusted[place] for place in places])


def test_compare_finds_each_image_once(make_report):
    report = make_report(broken(3, 6, 7) + (None, "clean"))
    baseline = make_report(broken(7, 8, 9, by="square") + (None, None))
    found = compare(report, baseline)
    assert [(i.index, i.label, i.attack) for i in found.newly_broken] == [
        (3, "three", "pgd_sat"),
        (6, "two", "pgd_sat"),
        (41, "one", "clean"),
    ]
    assert (found.num_newly_fixed, found.num_images) == (2, 42)
    assert found.drop_fraction == pytest.approx(1 / 42)
    assert found.p_value_drop == pytest.approx(0.5)
    assert (found.baseline_name, found.baseline_sha256) == ("tiny", "b" * 64)


def test_compare_takes_the_images_that_both_have_in_any_order(make_report):
    report = make_report(broken(1, num=4))
    table = SampleTable(
        index=(9, 1, 0),
        label=(1, 1, 0),
        broken_by=(None, None, "square"),
        prediction=(None, None, 2),
    )
    baseline = make_report((None, None, "square"), samples=table)
    found = compare(report, baseline)
    assert found.num_images == 2
    assert [image.index for image in found.newly_broken] == [1]
    assert found.num_newly_fixed == 1


def test_classes_are_corrected_together(make_report):
    places = [4 * i for i in range(7)]  # all of class zero
    found = compare(make_report(broken(*places)), make_report(NONE_BROKEN))
    p_values = {row.label: row.p_value_holm for row in found.classes}
    assert p_values == {"zero": pytest.approx(4 / 2**7), "one": 1, "two": 1, "three": 1}
    zero = next(row for row in found.classes if row.label == "zero")
    assert (zero.num_images, zero.num_newly_broken, zero.num_newly_fixed) == (10, 7, 0)


@pytest.mark.parametrize(
    ("num_broken", "says", "says_not"),
    [(1, "1 newly broken", "significant"), (6, "the drop is significant", "Holm")],
)
def test_description_tells_a_drop_from_luck(make_report, num_broken, says, says_not):
    found = compare(make_report(broken(*range(num_broken))), make_report(NONE_BROKEN))
    assert found.has_dropped == (num_broken == 6)
    assert says in describe_comparison(found)
    assert says_not not in describe_comparison(found)


def test_description_names_the_class(make_report):
    places = [4 * i for i in range(8)]
    text = describe_comparison(compare(make_report(broken(*places)), make_report(NONE_BROKEN)))
    assert "Holm's correction in zero (8 broken, 0 fixed of 10, p = 0.016)" in text


@given(st.integers(0, 100), st.integers(0, 100), st.integers(200, 2_000))
def test_drop_bounds_surround_the_drop(num_broken, num_fixed, total):
    found = Comparison(
        baseline_name="before",
        baseline_sha256="",
        num_images=total,
        newly_broken=(BrokenImage(index=0, label="", attack=""),) * num_broken,
        num_newly_fixed=num_fixed,
        p_value_drop=1.0,
        p_value_change=1.0,
        classes=(),
    )
    low, high = found.drop_bounds(0.95, Proportion.lower_bound)
    assert low <= found.drop_fraction <= high
    b = Proportion(num_correct=num_broken, num_total=total)
    c = Proportion(num_correct=num_fixed, num_total=total)
    assert high == pytest.approx(b.upper_bound(0.975) - c.lower_bound(0.975))
    assert low == pytest.approx(b.lower_bound(0.975) - c.upper_bound(0.975))


def test_drop_bounds_mirror_when_the_models_change_places(make_report):
    one, other = make_report(broken(1, 2, 3)), make_report(broken(3, 4))
    low, high = compare(one, other).drop_bounds(0.95, Proportion.lower_bound)
    mirrored = compare(other, one).drop_bounds(0.95, Proportion.lower_bound)
    assert mirrored == pytest.approx((-high, -low))


def mismatch_of(report, baseline):
    return mismatch(Asked.of(report), baseline)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"norm": "l2"}, "norm"),
        ({"epsilon_pixels": 4 / 255}, "epsilon_pixels"),
        ({"protocol": "AutoAttack (compat)"}, "protocol"),
        ({"status": "unverified", "worst_case": None}, "the baseline itself is unverified"),
    ],
)
def test_mismatch_names_the_difference(make_report, change, says):
    assert says in mismatch_of(make_report(), make_report(**change))


def test_mismatch_of_the_data(make_report):
    report, facts = make_report(), make_report().data
    other = facts.model_copy(update={"content_sha256": "0" * 64})
    assert "images (content_sha256) differ" in mismatch_of(report, make_report(data=other))
    other = TestFacts(**facts.model_dump() | {"class_names": ("a", "b", "c", "d")})
    assert "classes differ" in mismatch_of(report, make_report(data=other))


def test_mismatch_of_samples(make_report):
    report = make_report(broken(num=4))
    columns = {"broken_by": (None,) * 4, "prediction": (None,) * 4}
    elsewhere = SampleTable(index=(4, 5, 6, 7), label=(0, 1, 2, 3), **columns)
    assert "no image in common" in mismatch_of(report, make_report((None,) * 4, samples=elsewhere))
    relabelled = SampleTable(index=(0, 1, 2, 3), label=(0, 1, 2, 0), **columns)
    assert "other labels" in mismatch_of(report, make_report((None,) * 4, samples=relabelled))


def test_no_mismatch_with_another_part_or_an_incomplete_one(make_report):
    report = make_report((None,) * 8)
    facts = report.data.model_copy(update={"num_planned": 20, "index_sha256": "0" * 64})
    assert mismatch_of(report, make_report((None,) * 6, status="incomplete", data=facts)) is None
