"""The interval of a paired drop: published values, an independent derivation, exact coverage."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressor.paired_difference import PairedDrop

Z_95 = 1.959963984540054


def drop(broken, fixed, total):
    return PairedDrop(num_newly_broken=broken, num_newly_fixed=fixed, num_total=total)


def test_published_interval():
    """Airway hyper-responsiveness of 21 children before and after a transplantation.

    Bentur et al. 2009, as in Fagerland, Lydersen, Laake, "Recommended tests and confidence
    intervals for paired binomial proportions", Statistics in Medicine 33, 2014.
    """
    found = drop(1, 7, 21)
    assert found.fraction == pytest.approx(-6 / 21)
    assert [round(limit, 3) for limit in found.interval_95()] == [-0.517, -0.026]


@pytest.mark.parametrize("total", [10, 50, 2000])
def test_nothing_changed_says_no_more_than_n_allows(total):
    """There the limits have a closed form."""
    limit = Z_95**2 / (total + Z_95**2)
    assert drop(0, 0, total).interval_95() == pytest.approx((-limit, limit), abs=1e-8)


@pytest.mark.parametrize("total", [10, 50, 2000])
def test_everything_changed_has_wilsons_limit(total):
    low, high = drop(total, 0, total).interval_95()
    assert high == pytest.approx(1, abs=1e-6)
    assert low == pytest.approx((total - Z_95**2) / (total + Z_95**2), abs=1e-6)


COUNTS = st.tuples(st.integers(0, 60), st.integers(0, 60), st.integers(1, 200)).map(
    lambda counts: (counts[0], counts[1], sum(counts))
)


@given(COUNTS)
def test_interval_holds_the_estimate_and_mirrors_with_the_models(counts):
    broken, fixed, total = counts
    found = drop(broken, fixed, total)
    low, high = found.interval_95()
    assert -1 <= low <= found.fraction <= high <= 1
    assert low < high
    mirrored = drop(fixed, broken, total)
    assert mirrored.fraction == -found.fraction
    assert mirrored.interval_95() == pytest.approx((-high, -low), abs=1e-8)


def log_likelihood(broken, fixed, total, *, difference, share_fixed):
    shares = (share_fixed + difference, share_fixed, 1 - 2 * share_fixed - difference)
    counts = (broken, fixed, total - broken - fixed)
    if min(shares) < 0 or any(c and not p for c, p in zip(counts, shares, strict=True)):
        return -math.inf
    return sum(c * math.log(p) for c, p in zip(counts, shares, strict=True) if c)


def score(broken, fixed, total, *, difference):
    """The statistic, with the nuisance share found by search instead of Tango's formula."""
    low, high = max(0.0, -difference), (1 - difference) / 2

    def at(share):
        return log_likelihood(broken, fixed, total, difference=difference, share_fixed=share)

    for _ in range(200):
        third = (high - low) / 3
        if at(low + third) < at(high - third):
            low += third
        else:
            high -= third
    share = (low + high) / 2
    variance = total * (2 * share + difference - difference**2)
    return (broken - fixed - total * difference) / math.sqrt(variance)


@pytest.mark.parametrize(
    ("broken", "fixed", "total"), [(9, 7, 500), (14, 5, 50), (0, 3, 50), (6, 16, 161), (30, 2, 60)]
)
def test_limits_are_where_the_score_reaches_its_quantile(broken, fixed, total):
    low, high = drop(broken, fixed, total).interval_95()
    assert score(broken, fixed, total, difference=low) == pytest.approx(Z_95, abs=1e-5)
    assert score(broken, fixed, total, difference=high) == pytest.approx(-Z_95, abs=1e-5)


@pytest.mark.parametrize(
    ("share_broken", "share_fixed"), [(0.05, 0.05), (0.1, 0.02), (0.02, 0.3), (0.3, 0.3)]
)
def test_true_drop_is_inside_as_often_as_promised(share_broken, share_fixed):
    """Exactly: over all counts that 100 images can give, with their probabilities."""
    total, covered, seen = 100, 0.0, 0.0
    for broken in range(total + 1):
        for fixed in range(total + 1 - broken):
            likelihood = probability(broken, fixed, total, share_broken, share_fixed)
            if likelihood < 1e-6:
                continue
            low, high = drop(broken, fixed, total).interval_95()
            covered += likelihood * (low <= share_broken - share_fixed <= high)
            seen += likelihood
    assert seen > 0.998
    assert 0.935 < covered / seen < 0.97


def probability(broken, fixed, total, share_broken, share_fixed):
    rest = total - broken - fixed
    logs = math.lgamma(total + 1) - sum(math.lgamma(n + 1) for n in (broken, fixed, rest))
    logs += broken * math.log(share_broken) + fixed * math.log(share_fixed)
    return math.exp(logs + rest * math.log(1 - share_broken - share_fixed))


@pytest.mark.parametrize("counts", [(-1, 0, 10), (0, -1, 10), (6, 5, 10), (0, 0, 0)])
def test_impossible_counts_are_refused(counts):
    with pytest.raises(ValueError, match="is not a paired difference"):
        drop(*counts)


def test_text_has_points_interval_and_counts():
    assert str(drop(9, 7, 500)) == ("0.40 points (-1.30 to 2.17; 9 newly broken, 7 fixed of 500)")
