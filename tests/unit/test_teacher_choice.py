"""Which teachers are recommended, from numbers that are written down."""

import itertools

import pytest

from compressor import teacher_choice
from compressor.teacher_choice import Evidence, choose, most_robust, robust_places, subset_of

NAMES = ("a", "b", "c", "d")
ROBUST = (0.50, 0.48, 0.46, 0.10)
TRANSFER = (
    (None, 0.9, 0.3, 0.2),
    (0.8, None, 0.5, 0.2),
    (0.4, 0.6, None, 0.2),
    (0.0, 0.0, 0.0, None),
)


def evidence(names=NAMES, robust=ROBUST, transfer=TRANSFER):
    return Evidence(names=names, robust=robust, transfer=transfer)


def permuted(order):
    transfer = [[TRANSFER[a][b] for b in order] for a in order]
    return evidence([NAMES[p] for p in order], [ROBUST[p] for p in order], transfer)


def names_of(subset, known):
    return "".join(known.names[place] for place in subset.places)


def test_means_are_over_teachers_and_over_ordered_pairs():
    subset = subset_of(evidence(), (0, 1, 2))
    assert subset.mean_robust == pytest.approx((0.50 + 0.48 + 0.46) / 3)
    assert subset.mean_transfer == pytest.approx((0.9 + 0.3 + 0.8 + 0.5 + 0.4 + 0.6) / 6)
    assert subset.score(0.5) == pytest.approx(subset.mean_robust - 0.5 * subset.mean_transfer)


@pytest.mark.parametrize(
    ("weight", "wanted", "expected"),
    [(0.0, 2, "ab"), (0.5, 2, "ac"), (0.0, 1, "a"), (5.0, 1, "a"), (0.5, 3, "abc")],
)
def test_the_best_pair_depends_on_what_transfer_is_worth(weight, wanted, expected):
    best = choose(evidence(), num_wanted=wanted, transfer_weight=weight)
    assert names_of(best, evidence()) == expected


def test_a_teacher_that_is_not_robust_is_never_chosen_however_little_it_transfers():
    assert robust_places(evidence()) == (0, 1, 2)
    assert names_of(choose(evidence(), num_wanted=4, transfer_weight=100), evidence()) == "abc"


def test_who_was_not_attacked_is_not_robust():
    known = evidence(robust=(None, 0.48, 0.46, 0.24))
    assert robust_places(known) == (1, 2, 3)  # half of the best is enough


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_the_order_of_the_teachers_does_not_matter(order):
    known = permuted(order)
    assert names_of(choose(known, num_wanted=2, transfer_weight=0.5), known) == "ac"


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_ties_go_to_the_first_names(order):
    names = ["xyz"[place] for place in order]
    known = evidence(names, [0.3] * 3, [[0.1] * 3] * 3)
    assert names_of(choose(known, num_wanted=2, transfer_weight=0.5), known) == "xy"


def test_nobody_is_recommended_where_nobody_withstands_anything():
    for robust in ((0.0, 0.0, 0.0, 0.0), (None,) * 4):
        assert choose(evidence(robust=robust), num_wanted=2, transfer_weight=0.5) is None
        assert most_robust(evidence(robust=robust), num_wanted=2) is None


def test_unknown_pairs_are_left_out_of_the_mean():
    known = evidence(transfer=((None, None, 0.3, None), (None,) * 4, (0.4,) * 4, (None,) * 4))
    assert subset_of(known, (0, 1)).mean_transfer is None
    assert subset_of(known, (0, 1)).score(1.0) == pytest.approx(0.49)
    assert subset_of(known, (0, 2)).mean_transfer == pytest.approx(0.35)


@pytest.mark.parametrize("wanted", [1, 2, 3])
def test_growing_finds_the_best_where_little_depends_on_pairs(wanted, monkeypatch):
    robust = (0.30, 0.29, 0.31, 0.28, 0.32)
    known = evidence("abcde", robust, [[0.5 + (a + b) / 100 for b in range(5)] for a in range(5)])
    exact = choose(known, num_wanted=wanted, transfer_weight=0.1)
    monkeypatch.setattr(teacher_choice, "MAX_SUBSETS", 0)
    assert choose(known, num_wanted=wanted, transfer_weight=0.1) == exact
