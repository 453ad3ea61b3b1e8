"""Paired tests against brute force, spreads against textbook values."""

import itertools
import math
import statistics
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.comparison.statistics import (
    PairedTest,
    Spread,
    interval_at_mean,
    paired_test,
    sign_flip_p_value,
)
from compressor.gate.paired import p_value_of_change
from compressor.proportions import Proportion

small = st.lists(st.integers(-4, 4), min_size=1, max_size=9)


def brute_force(differences):
    """The definition: all choices of signs, one by one."""
    observed, sizes = abs(sum(differences)), [abs(value) for value in differences]
    choices = list(itertools.product((-1, 1), repeat=len(sizes)))
    sums = [sum(s * size for s, size in zip(signs, sizes, strict=True)) for signs in choices]
    return sum(abs(total) >= observed for total in sums) / len(choices)


@given(small)
@settings(max_examples=150)
def test_sign_flips_are_those_of_brute_force(differences):
    assert sign_flip_p_value(differences) == pytest.approx(brute_force(differences), abs=1e-12)


@given(small)
@settings(max_examples=50)
def test_sign_flips_know_no_order_and_no_side(differences):
    p_value = sign_flip_p_value(differences)
    assert sign_flip_p_value([-value for value in reversed(differences)]) == p_value
    assert sign_flip_p_value([3 * value for value in differences]) == pytest.approx(p_value)
    assert sign_flip_p_value([*differences, 0, 0]) == p_value


@pytest.mark.parametrize(("num_up", "num_down"), [(0, 0), (5, 0), (3, 9), (400, 300), (60, 60)])
def test_one_seed_is_mcnemar(num_up, num_down):
    ours = (True,) * num_up + (False,) * num_down + (True,) * 7
    theirs = (False,) * num_up + (True,) * num_down + (True,) * 7
    test = paired_test([tuple(map(int, ours))], [tuple(map(int, theirs))])
    expected = p_value_of_change(num_broken=num_down, num_fixed=num_up)
    assert test.p_value == pytest.approx(expected, rel=1e-9)
    assert test.num_images == len(ours)
    assert test.mean == pytest.approx((num_up - num_down) / len(ours))
    assert test.over_seeds_95() is None


def test_many_images_of_two_sizes_agree_with_a_normal_tail():
    # Sums are two apart, so the tail of the normal begins one before them.
    differences = [1] * 4000 + [-1] * 3800 + [2] * 500 + [-2] * 480
    z = (sum(differences) - 1) / math.sqrt(sum(value**2 for value in differences))
    assert sign_flip_p_value(differences) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=2e-3)


def test_a_copied_seed_proves_nothing_more():
    """Two seeds with the same answers are one seed as far as the images go."""
    ours, theirs = (1,) * 9 + (0,) * 3 + (1,), (0,) * 9 + (1,) * 3 + (1,)
    once = paired_test([ours], [theirs])
    twice = paired_test([ours, ours], [theirs, theirs])
    assert twice.p_value == pytest.approx(once.p_value)
    assert twice.mean == once.mean


def test_seeds_are_averaged_and_points_are_units():
    test = paired_test([(2, 0, 1), (2, 2, 2)], [(1, 1, 1), (0, 0, 2)], points_per_unit=2)
    assert test.differences == (0.0, 4 / 6)
    assert test.mean == pytest.approx(2 / 6)
    assert test.p_value == brute_force([3, 1, 0])


@pytest.mark.parametrize(
    ("ours", "theirs"), [([(1, 0)], [(1,)]), ([(1,), (1,)], [(1,)]), ([()], [()]), ([], [])]
)
def test_what_does_not_correspond_is_refused(ours, theirs):
    with pytest.raises(ValueError, match="seeds of"):
        paired_test(ours, theirs)


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=6))
def test_spread_is_that_of_the_standard_library(values):
    spread = Spread.of(values)
    assert spread.mean == pytest.approx(statistics.fmean(values), abs=1e-12)
    assert spread.sample_sd == pytest.approx(statistics.stdev(values), abs=1e-9)


def test_one_value_has_no_spread():
    assert Spread.of([0.25]) == Spread(mean=0.25, sample_sd=None)
    with pytest.raises(ValueError, match="nothing"):
        Spread.of([])


@pytest.mark.parametrize(("num", "quantile"), [(2, 12.7062), (3, 4.30265), (10, 2.26216)])
def test_interval_over_seeds_has_the_tabulated_quantile(num, quantile):
    values = [0.0] * (num - 1) + [0.1]
    test = PairedTest(
        num_images=10**6, differences=tuple(values), p_value=1.0, over_images_95=(-1.0, 1.0)
    )
    reach = quantile * statistics.stdev(values) / math.sqrt(num)
    low, high = test.over_seeds_95()
    assert low == pytest.approx(0.1 / num - reach, rel=1e-4)
    assert high == pytest.approx(0.1 / num + reach, rel=1e-4)


@pytest.mark.parametrize("points_per_unit", [1, 2])
def test_agreeing_seeds_leave_the_width_of_rounding(points_per_unit):
    """12.7 sd / sqrt(2), and sd^2 is that of two uniform numbers of the width of a point."""
    point = 1 / (100 * points_per_unit)
    test = PairedTest(
        num_images=100,
        differences=(0.0, 0.0),
        p_value=1.0,
        over_images_95=(-1.0, 1.0),
        points_per_unit=points_per_unit,
    )
    reach = 12.7062 * point * math.sqrt(2 / 12) / math.sqrt(2)
    assert test.over_seeds_95() == pytest.approx((-reach, reach), rel=1e-4)


def test_the_interval_ends_where_differences_end():
    test = PairedTest(
        num_images=100, differences=(0.9, -0.4), p_value=1.0, over_images_95=(-1.0, 1.0)
    )
    assert test.over_seeds_95() == (-1.0, 1.0)


@pytest.mark.parametrize("spread_images", [0.2, 0.5, 1.0, 3.0])
def test_two_seeds_of_like_methods_seldom_exclude_zero(spread_images):
    """All pairs of differences of two rounded normal counts, each with its probability."""
    reach = math.ceil(6 * spread_images)

    def below(x):
        return math.erfc(-x / (spread_images * math.sqrt(2))) / 2

    count = {k: below(k + 0.5) - below(k - 0.5) for k in range(-reach, reach + 1)}
    difference = Counter()
    for (a, p), (b, q) in itertools.product(count.items(), repeat=2):
        difference[a - b] += p * q
    wrong = 0.0
    for (a, p), (b, q) in itertools.combinations_with_replacement(difference.items(), 2):
        test = PairedTest(
            num_images=1000,
            differences=(a / 1000, b / 1000),
            p_value=1.0,
            over_images_95=(-1.0, 1.0),
        )
        low, high = test.over_seeds_95()
        wrong += p * q * (1 if a == b else 2) * (low > 0 or high < 0)
    assert wrong < 0.05


@pytest.mark.parametrize(("num_up", "num_down"), [(0, 0), (5, 0), (3, 9), (40, 30)])
def test_interval_over_images_of_one_seed_is_that_of_bonett_and_price(num_up, num_down):
    num = 100
    ours = [(1,) * num_up + (0,) * (num - num_up)]
    theirs = [(0,) * num_up + (1,) * num_down + (0,) * (num - num_up - num_down)]
    up, down = (num_up + 1) / (num + 2), (num_down + 1) / (num + 2)
    reach = 1.959964 * math.sqrt((up + down - (up - down) ** 2) / (num + 2))
    found = paired_test(ours, theirs).over_images_95
    assert found == pytest.approx((up - down - reach, up - down + reach), rel=1e-6)


@pytest.mark.parametrize("num_seeds", [1, 2])
@pytest.mark.parametrize("num_images", [60, 300])
def test_interval_over_images_holds_the_truth_as_often_as_it_says(num_seeds, num_images):
    """Points of W-Robust, correlated between methods and between seeds; the truth is known."""
    generator = np.random.default_rng(0)
    num_held, num_trials = 0, 1000
    for _ in range(num_trials):
        hardness = generator.uniform(-0.4, 0.4, num_images)

        def points(mean, hardness=hardness):
            chances = np.clip(mean + hardness, 0, 1)
            clean = generator.random((num_seeds, num_images)) < chances
            stands = clean & (generator.random((num_seeds, num_images)) < 0.4)
            return [tuple(row) for row in (clean.astype(int) + stands).tolist()]

        test = paired_test(points(0.6), points(0.5), points_per_unit=2)
        low, high = test.over_images_95
        num_held += low <= 0.1 * 1.4 / 2 <= high
    assert 0.93 <= num_held / num_trials <= 0.97


def test_interval_over_images_keeps_to_possible_differences():
    test = paired_test([(1, 1)], [(0, 0)])
    assert test.over_images_95[1] == 1.0
    assert paired_test([(0, 0)], [(1, 1)]).over_images_95[0] == -1.0


def test_interval_at_the_mean_rounds_outwards():
    def counts(*correct):
        return [Proportion(num_correct=c, num_total=50) for c in correct]

    assert interval_at_mean(counts(20)) == counts(20)[0].interval()
    low, high = interval_at_mean(counts(20, 21))
    assert low == counts(20)[0].interval()[0]
    assert high == counts(21)[0].interval()[1]
    with pytest.raises(ValueError, match="images"):
        interval_at_mean([*counts(1), Proportion(num_correct=1, num_total=9)])
