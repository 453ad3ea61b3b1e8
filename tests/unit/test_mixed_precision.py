"""Which layers stay in float, from measurements that are written down."""

from types import SimpleNamespace

import pytest

from compressor.paired_difference import PairedDrop
from compressor.proportions import Proportion
from exporters.int8.mixed_precision import (
    MAX_FLOAT_SHARE,
    LayerSensitivity,
    keep_until_inside,
    rank_layers,
)

NUM = 1000


def drop(num):
    """A drop of so many of 1,000 images."""
    return PairedDrop(num_newly_broken=max(num, 0), num_newly_fixed=max(-num, 0), num_total=NUM)


class Measured:
    """Layers a, b, c ... and what each costs alone in 8 bits; remembers what was asked."""

    def __init__(self, drops, decibels=None, *, budget=10):
        self.drops, self.budget = drops, budget
        self.decibels = decibels or {name: 50.0 - num for name, num in drops.items()}
        self.attacked, self.proxied = [], []

    def rounded(self, kept):
        return [name for name in self.drops if name not in kept]

    def proxy_db(self, kept):
        (name,) = self.rounded(kept)
        self.proxied.append(name)
        return self.decibels[name]

    def measure(self, kept):
        rounded = self.rounded(kept)
        self.attacked.append(tuple(kept))
        found = drop(sum(self.drops[name] for name in rounded))
        status = "verified" if found.num_newly_broken <= self.budget else "too_lossy"
        return verification(status, robust_drop=found)

    def rank(self, sizes=None):
        sizes = sizes or dict.fromkeys(self.drops, 100)
        return rank_layers(list(sizes.items()), proxy_db=self.proxy_db, measure=self.measure)


def verification(status, *, robust_drop=None, num_correct=0):
    """As much as is looked at."""
    return SimpleNamespace(
        status=status,
        robust_drop=robust_drop,
        robust=Proportion(num_correct=num_correct, num_total=100),
        sqnr_db=20.0,
    )


def names(layers):
    return "".join(layer.name for layer in layers)


# Ranking


def test_layers_are_ranked_by_what_they_lose_under_attack():
    measured = Measured({"a": 3, "b": 20, "c": -1, "d": 7})
    ranked = measured.rank()
    assert names(ranked) == "bdac"
    assert [layer.robust_drop for layer in ranked] == [drop(n) for n in (20, 7, 3, -1)]
    assert not any(layer.is_kept for layer in ranked)


def test_each_layer_is_measured_alone():
    measured = Measured({"a": 3, "b": 20, "c": 1})
    measured.rank()
    assert measured.proxied == ["a", "b", "c"]
    assert {frozenset(kept) for kept in measured.attacked} == {
        frozenset("bc"),
        frozenset("ac"),
        frozenset("ab"),
    }


def test_only_the_six_that_the_proxy_suspects_are_attacked():
    """Attacks cost minutes, the proxy a second."""
    drops = {name: number for number, name in enumerate("abcdefghij")}
    measured = Measured(drops)
    ranked = measured.rank()
    assert len(measured.attacked) == 6
    assert names(ranked) == "jihgfedcba"
    assert [layer.robust_drop is None for layer in ranked] == [False] * 6 + [True] * 4


def test_the_proxy_chooses_who_is_attacked_and_the_attack_who_is_worst():
    decibels = dict(zip("abcdefgh", (10, 11, 12, 13, 14, 15, 40, 50), strict=True))
    drops = dict(zip("abcdefgh", (1, 2, 3, 4, 5, 6, 99, 99), strict=True))
    assert names(Measured(drops, decibels).rank()) == "fedcbagh"


def test_layers_that_lose_alike_are_ranked_by_the_proxy():
    decibels = {"a": 30.0, "b": 10.0, "c": 20.0}
    assert names(Measured(dict.fromkeys("abc", 5), decibels).rank()) == "bca"


def test_numbers_of_weights_are_kept():
    ranked = Measured({"a": 1, "b": 2}).rank({"a": 7, "b": 9})
    assert [(layer.name, layer.num_weights) for layer in ranked] == [("b", 9), ("a", 7)]


# Keeping


def layers(text, *, sizes=None):
    """Already ranked."""
    return [
        LayerSensitivity(
            name=name, num_weights=(sizes or {}).get(name, 1), sqnr_db=20.0, robust_drop=None
        )
        for name in text
    ]


def statuses(*values):
    """A measurement that gives these, one after the other, and what it was asked."""
    asked, rest = [], list(values)

    def measure(kept):
        asked.append("".join(kept))
        return verification(rest.pop(0) if rest else "too_lossy")

    return asked, measure


MANY = "abcdefghijklmnopqrstuvwxyz"


def test_more_and_more_are_kept_until_it_is_enough():
    asked, measure = statuses(*["too_lossy"] * 4, "verified")
    marked, trials = keep_until_inside(layers(MANY), measure=measure)
    assert asked == ["a", "ab", "abc", "abcde", "abcdefgh"]
    assert [trial.num_kept for trial in trials] == [1, 2, 3, 5, 8]
    assert trials[-1].verification.status == "verified"
    assert names(layer for layer in marked if layer.is_kept) == "abcdefgh"
    assert names(marked) == MANY


@pytest.mark.parametrize("place", [0, 1, 2])
def test_it_stops_at_the_first_that_is_verified(place):
    asked, measure = statuses(*["failed"] * place, "verified", "verified")
    marked, trials = keep_until_inside(layers(MANY), measure=measure)
    assert len(asked) == len(trials) == place + 1
    assert sum(layer.is_kept for layer in marked) == trials[-1].num_kept == place + 1


@pytest.mark.parametrize("status", ["failed", "too_lossy"])
def test_nothing_but_verified_is_enough(status):
    asked, measure = statuses(status, "verified")
    keep_until_inside(layers(MANY), measure=measure)
    assert asked == ["a", "ab"]


def test_a_file_that_cannot_be_attacked_is_not_too_lossy():
    """Layers in float would not give it a differentiable form."""
    asked, measure = statuses("unverified", "verified")
    marked, _ = keep_until_inside(layers(MANY), measure=measure)
    assert asked == ["a"]
    assert names(layer for layer in marked if layer.is_kept) == "a"


def test_if_none_is_inside_the_budget_the_best_is_taken():
    robust = {1: 40, 2: 55, 3: 50, 5: 55, 8: 30}

    def measure(kept):
        return verification("too_lossy", num_correct=robust[len(kept)])

    marked, trials = keep_until_inside(layers(MANY), measure=measure)
    assert len(trials) == 5
    assert names(layer for layer in marked if layer.is_kept) == "ab"


def test_no_more_than_a_third_of_the_weights_stays_in_float():
    """Beyond that the file has half of the bytes of float32, which float16 gives without loss."""
    asked, measure = statuses()
    marked, trials = keep_until_inside(layers(MANY), measure=measure)
    assert trials[-1].num_kept == 8
    assert trials[-1].verification.status == "too_lossy"
    assert 8 / len(MANY) <= MAX_FLOAT_SHARE < 13 / len(MANY)


def test_a_layer_with_most_of_the_weights_is_never_kept():
    asked, measure = statuses()
    marked, trials = keep_until_inside(layers("ab", sizes={"a": 9, "b": 1}), measure=measure)
    assert (asked, trials) == ([], [])
    assert not any(layer.is_kept for layer in marked)


def test_weights_count_and_not_layers():
    sizes = {"a": 1, "b": 1, "c": 1, "d": 97}
    asked, measure = statuses()
    keep_until_inside(layers("abcd", sizes=sizes), measure=measure)
    assert asked == ["a", "ab", "abc"]


@pytest.mark.parametrize(
    ("num_first", "expected"), [(1, [1, 2, 3, 5, 8]), (4, [4, 5]), (8, [8]), (20, [])]
)
def test_the_first_number_can_be_chosen(num_first, expected):
    asked, measure = statuses()
    _, trials = keep_until_inside(layers(MANY), measure=measure, num_first=num_first)
    assert [trial.num_kept for trial in trials][: len(expected)] == expected
    assert all(trial.num_kept <= len(MANY) / 3 for trial in trials)


def test_ranking_and_keeping_together():
    """One bad layer among many: it alone stays in float."""
    measured = Measured(dict.fromkeys("abcdefgh", 1) | {"d": 40})
    marked, trials = keep_until_inside(measured.rank(), measure=measured.measure)
    assert names(layer for layer in marked if layer.is_kept) == "d"
    assert trials[-1].verification.robust_drop == drop(7)
