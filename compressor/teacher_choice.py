"""Which teachers to take: robust ones whose adversarial images are not each other's.

Source of the idea: DARHT, whose authors choose robust teachers of low transferability; their code
has no rule for it, so the rule here is ours. Numbers are fractions. Needs no torch.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

ROBUST_FLOOR = 0.5
"""Of the best robust accuracy. Below it a teacher is not called robust, however little of what
fools it fools others: adversarial images of a clean teacher hardly fool a robust one."""
MAX_SUBSETS = 2_000
"""Up to so many, all are compared; of more, one is grown teacher by teacher."""
_TIE = 1e-12


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What is known of each of T teachers."""

    names: Sequence[str]
    robust: Sequence[float | None]
    """Robust accuracy; None where it could not be attacked."""
    transfer: Sequence[Sequence[float | None]]
    """[from][to]: share of images that fool the one which fool the other too; None if unknown."""


@dataclass(frozen=True, kw_only=True)
class Subset:
    """Some teachers together."""

    places: tuple[int, ...]
    """In the evidence, the names rising."""
    mean_robust: float
    mean_transfer: float | None
    """Over all ordered pairs whose transferability is known; None if there is none."""

    def score(self, transfer_weight: float) -> float:
        """What is maximised: mean robust accuracy less the weighted mean transferability."""
        return self.mean_robust - transfer_weight * (self.mean_transfer or 0.0)


def robust_places(evidence: Evidence) -> tuple[int, ...]:
    """Teachers that may be chosen, the names rising: attacked, and robust enough.

    Robust enough is above 0 and at least `ROBUST_FLOOR` of the best.
    """
    known = {place: value for place, value in enumerate(evidence.robust) if value is not None}
    floor = ROBUST_FLOOR * max(known.values(), default=0.0)
    fit = [place for place, value in known.items() if value > 0 and value >= floor]
    return tuple(sorted(fit, key=lambda place: evidence.names[place]))


def choose(evidence: Evidence, *, num_wanted: int, transfer_weight: float) -> Subset | None:
    """The best subset of `num_wanted` robust teachers, or of all if there are fewer.

    Ties go to the names that come first in the alphabet, so that the order in which teachers are
    given does not matter. None if no teacher is robust.
    """
    places = robust_places(evidence)
    size = min(num_wanted, len(places))
    if size == 0:
        return None
    if math.comb(len(places), size) <= MAX_SUBSETS:
        subsets = [subset_of(evidence, some) for some in itertools.combinations(places, size)]
        return _best(subsets, transfer_weight)
    return _grown(evidence, places, size=size, transfer_weight=transfer_weight)


def most_robust(evidence: Evidence, *, num_wanted: int) -> Subset | None:
    """What would be chosen if transferability did not matter."""
    return choose(evidence, num_wanted=num_wanted, transfer_weight=0.0)


def subset_of(evidence: Evidence, places: Sequence[int]) -> Subset:
    """The means of some teachers, all of which were attacked."""
    robust = [evidence.robust[place] or 0.0 for place in places]
    pairs = [evidence.transfer[a][b] for a, b in itertools.permutations(places, 2)]
    known = [value for value in pairs if value is not None]
    return Subset(
        places=tuple(sorted(places, key=lambda place: evidence.names[place])),
        mean_robust=math.fsum(robust) / len(robust),
        mean_transfer=math.fsum(known) / len(known) if known else None,
    )


def _grown(
    evidence: Evidence, places: Sequence[int], *, size: int, transfer_weight: float
) -> Subset:
    """The best pair, or the best single one, and then each time the best addition."""
    start = itertools.combinations(places, min(2, size))
    best = _best([subset_of(evidence, some) for some in start], transfer_weight)
    while len(best.places) < size:
        more = [place for place in places if place not in best.places]
        grown = [subset_of(evidence, (*best.places, place)) for place in more]
        best = _best(grown, transfer_weight)
    return best


def _best(subsets: Sequence[Subset], transfer_weight: float) -> Subset:
    """The first of the best, up to rounding."""
    best = subsets[0]
    for subset in subsets[1:]:
        if subset.score(transfer_weight) > best.score(transfer_weight) + _TIE:
            best = subset
    return best
