"""Exact bounds: against binomial sums in exact arithmetic, known values, and true coverage."""

import math
import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressor.proportions import Proportion, beta_cdf


def binomial_tail(p, *, at_least, n):
    """P(X >= at_least), exact where `p` is a fraction."""
    return sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(at_least, n + 1))


def every_count(*sizes):
    return [(k, n) for n in sizes for k in range(n + 1)]


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.999])
@pytest.mark.parametrize(("k", "n"), every_count(1, 2, 5, 12))
def test_lower_bound_solves_the_binomial_equation(k, n, confidence):
    bound = Proportion(num_correct=k, num_total=n).lower_bound(confidence)
    if k == 0:
        assert bound == 0
    else:
        tail = binomial_tail(Fraction(bound), at_least=k, n=n)
        assert float(tail) == pytest.approx(1 - confidence, abs=1e-10)


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.999])
@pytest.mark.parametrize(("k", "n"), every_count(1, 2, 5, 12))
def test_upper_bound_mirrors_the_lower_one(k, n, confidence):
    upper = Proportion(num_correct=k, num_total=n).upper_bound(confidence)
    mirrored = Proportion(num_correct=n - k, num_total=n).lower_bound(confidence)
    assert upper == pytest.approx(1 - mirrored, abs=1e-11)


@pytest.mark.parametrize(
    ("k", "n", "interval"),
    [
        (0, 10, (0, 0.30849710781876083)),
        (10, 10, (0.6915028921812392, 1)),
        (5, 10, (0.18708602844739135, 0.8129139715526086)),
        (1, 2, (0.012579117093425212, 0.9874208829065748)),
        (5, 100, (0.01643187918, 0.11283491198)),
    ],
)
def test_interval_known_values(k, n, interval):
    assert Proportion(num_correct=k, num_total=n).interval(0.95) == pytest.approx(
        interval, abs=1e-9
    )


@pytest.mark.parametrize("n", [1, 7, 1_000, 10_000])
def test_bounds_without_a_failure_or_a_success_have_closed_forms(n):
    assert Proportion(num_correct=n, num_total=n).lower_bound(0.95) == pytest.approx(
        0.05 ** (1 / n), abs=1e-11
    )
    assert Proportion(num_correct=0, num_total=n).upper_bound(0.95) == pytest.approx(
        1 - 0.05 ** (1 / n), abs=1e-11
    )
    assert Proportion(num_correct=n, num_total=n).upper_bound() == 1
    assert Proportion(num_correct=0, num_total=n).lower_bound() == 0


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.99])
def test_true_coverage_is_never_below_confidence(confidence):
    n = 30
    lower = [Proportion(num_correct=k, num_total=n).lower_bound(confidence) for k in range(n + 1)]
    # Coverage is lowest just below each bound; a grid in between cannot surprise.
    probabilities = [bound - 1e-9 for bound in lower[1:]] + [i / 100 for i in range(101)]
    for p in probabilities:
        num_covering = sum(bound <= p for bound in lower)  # bounds rise with k
        coverage = 1 - binomial_tail(p, at_least=num_covering, n=n)
        assert coverage >= confidence - 1e-7


@pytest.mark.parametrize(("k", "n"), [(1, 10_000), (5_200, 10_000), (9_999, 10_000), (47, 1_000)])
def test_large_counts_are_quick_and_solve_the_equation(k, n):
    started = time.process_time()
    bound = Proportion(num_correct=k, num_total=n).lower_bound(0.95)
    assert time.process_time() - started < 0.5
    log_p, log_q = math.log(bound), math.log1p(-bound)
    log_terms = [
        math.lgamma(n + 1)
        - math.lgamma(i + 1)
        - math.lgamma(n - i + 1)
        + i * log_p
        + (n - i) * log_q
        for i in range(k, n + 1)
    ]
    assert math.fsum(map(math.exp, log_terms)) == pytest.approx(0.05, rel=1e-5)


@given(st.integers(1, 2_000), st.data())
def test_bounds_surround_the_estimate_and_tighten_with_confidence(n, data):
    proportion = Proportion(num_correct=data.draw(st.integers(0, n)), num_total=n)
    low, high = proportion.interval(0.95)
    narrow_low, narrow_high = proportion.interval(0.5)
    assert 0 <= low <= narrow_low <= proportion.fraction <= narrow_high <= high <= 1
    assert low <= proportion.lower_bound(0.95)


@given(st.integers(2, 500), st.data())
def test_lower_bound_rises_with_the_count(n, data):
    k = data.draw(st.integers(0, n - 1))
    fewer, more = (Proportion(num_correct=k + i, num_total=n).lower_bound() for i in (0, 1))
    assert fewer < more


@pytest.mark.parametrize(
    ("a", "b", "x", "expected"),
    [
        (1, 1, 0.3, 0.3),
        (2, 1, 0.3, 0.09),
        (1, 3, 0.2, 1 - 0.8**3),
        (0.5, 0.5, 0.25, 1 / 3),  # arcsine distribution
        (3, 4, 0.0, 0),
        (3, 4, 1.0, 1),
    ],
)
def test_beta_cdf_closed_forms(a, b, x, expected):
    assert beta_cdf(x, a=a, b=b) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("k", "n"), [(-1, 10), (11, 10), (0, 0), (0, -1), (1, 0)])
def test_impossible_counts_raise(k, n):
    with pytest.raises(ValueError, match="is not a proportion"):
        Proportion(num_correct=k, num_total=n)


def test_text_names_the_counts():
    assert str(Proportion(num_correct=5_200, num_total=10_000)) == "52.00 % (5200 of 10000)"
    assert Proportion(num_correct=1, num_total=4).fraction == 0.25
