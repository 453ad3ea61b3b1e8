"""A targeted search: which classes it goes for, and that grouping its rows changes nothing."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch.testing import assert_close

from compressor.attacks.apgd import APGD
from compressor.attacks.compat import ReleasedTargets
from compressor.attacks.draws import KeyedDraws
from compressor.attacks.fab import FAB
from compressor.attacks.search import SearchResult, by_logits
from compressor.attacks.targeted import Targeted, Total, nearest_classes
from compressor.losses import targeted_dlr
from compressor.threat import ThreatModel

THREAT = ThreatModel(epsilon_pixels=0.02)


def keyed(x_NCHW):
    return KeyedDraws(keys_N=torch.arange(len(x_NCHW)) * 7_919 + 3)


def curved(num_classes, num_images=24):
    """A random network in float64, images, and the labels that it gives them."""
    generator = torch.Generator().manual_seed(2)
    first = torch.randn(48, 32, generator=generator).double() / 3
    second = torch.randn(32, num_classes, generator=generator).double()
    x = torch.rand(num_images, 3, 4, 4, generator=generator).double()

    def model(x_NCHW):
        return torch.tanh((x_NCHW.flatten(1) - 0.5) @ first) @ second

    return model, x, model(x).argmax(dim=1)


def run(targeted, images, *, judge=by_logits):
    model, x, y = images
    return targeted.search(model, x, y, draws=keyed(x), judge=judge)


@dataclass
class Note:
    """A search that fools what it is told to, and remembers what it was asked for."""

    fools: frozenset = frozenset()
    threat: ThreatModel = THREAT

    def __post_init__(self):
        self.calls = []

    def search_targets(self, model, x_NCHW, pairs_N2, *, owner_N, draws, judge):
        del model, draws, judge
        self.calls.append((owner_N.tolist(), pairs_N2[:, 1].tolist()))
        asked = zip(owner_N.tolist(), pairs_N2[:, 1].tolist(), strict=True)
        return SearchResult(
            x_adv_NCHW=pairs_N2[:, 1].view(-1, 1, 1, 1) + 0 * x_NCHW,  # says for which target
            is_fooled_N=torch.tensor([pair in self.fools for pair in asked]),
            num_forwards_N=torch.full_like(owner_N, 3),
            num_backwards_N=torch.full_like(owner_N, 2),
        )


def ranked(num_images):
    """Class 0 before 3, 1, 4 and 2."""
    logits_K = torch.tensor([9.0, 5.0, 1.0, 7.0, 3.0])
    x = torch.zeros(num_images, 1, 2, 2)
    return lambda x: logits_K.expand(len(x), 5), x, torch.zeros(num_images, dtype=torch.int64)


def test_nearest_classes_are_the_best_wrong_ones():
    logits = torch.tensor([[9.0, 5.0, 1.0, 7.0, 3.0], [1.0, 5.0, 2.0, 4.0, 3.0]])
    targets = nearest_classes(logits, torch.tensor([0, 4]), num_targets=3)
    assert targets.tolist() == [[3, 1, 4], [1, 3, 2]]
    assert nearest_classes(logits, torch.tensor([0, 4]), num_targets=9).shape == (2, 4)


def test_nearest_classes_never_hold_the_label():
    logits = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    y = torch.arange(50) % 7
    targets = nearest_classes(logits, y, num_targets=6)
    assert not (targets == y[:, None]).any()
    assert (targets.sort(dim=1).values.diff(dim=1) > 0).all()


def test_targeted_tries_the_nearest_class_first_and_then_what_fits():
    attack = Note()
    run(Targeted(attack=attack, max_rows=4), ranked(2))
    assert attack.calls == [
        ([0, 1], [3, 3]),
        ([0, 0, 1, 1], [1, 4, 1, 4]),
        ([0, 1], [2, 2]),
    ]


def test_targeted_always_makes_progress():
    attack = Note()
    run(Targeted(attack=attack, max_rows=1), ranked(3))
    assert [targets for _, targets in attack.calls] == [[3] * 3, [1] * 3, [4] * 3, [2] * 3]


def test_targeted_drops_what_is_fooled_and_returns_the_nearest_of_several_successes():
    attack = Note(fools=frozenset({(0, 3), (1, 1), (1, 4)}))
    found = run(Targeted(attack=attack), ranked(3))
    assert attack.calls == [([0, 1, 2], [3, 3, 3]), ([1, 1, 1, 2, 2, 2], [1, 4, 2, 1, 4, 2])]
    assert found.is_fooled_N.tolist() == [True, True, False]
    assert found.x_adv_NCHW[:, 0, 0, 0].tolist() == [3, 1, 0]
    assert found.num_forwards_N.tolist() == [1 + 3, 1 + 4 * 3, 1 + 4 * 3]
    assert found.num_backwards_N.tolist() == [2, 8, 8]


def test_targeted_stops_when_nothing_stands():
    attack = Note(fools=frozenset({(0, 3), (1, 3)}))
    run(Targeted(attack=attack), ranked(2))
    assert len(attack.calls) == 1


def test_released_targets_are_tried_one_after_the_other():
    attack = Note(fools=frozenset({(1, 1)}))
    released = ReleasedTargets(attack=attack, num_passes_before=2, num_passes_after=1)
    found = run(released, ranked(3))
    places = [[0, 1, 2], [0, 1, 2], [0, 2], [0, 2]]
    assert [owners for owners, _ in attack.calls] == places
    assert found.num_forwards_N.tolist() == [1 + 4 * 6, 1 + 2 * 6, 1 + 4 * 6]


@pytest.mark.parametrize("max_rows", [1, 30, 60, 10_000])
@pytest.mark.parametrize(
    "attack", [APGD(threat=THREAT, objective=targeted_dlr, num_steps=10), FAB(threat=THREAT)]
)
def test_targeted_grouping_does_not_change_what_is_found(attack, max_rows):
    attack = replace(attack, num_steps=10)
    images = curved(num_classes=6)
    alone = run(Targeted(attack=attack, num_targets=5, max_rows=1), images)
    grouped = run(Targeted(attack=attack, num_targets=5, max_rows=max_rows), images)
    stands = ~alone.is_fooled_N
    assert 3 < int(stands.sum()) < 21
    assert torch.equal(alone.is_fooled_N, grouped.is_fooled_N)
    assert torch.equal(alone.num_forwards_N[stands], grouped.num_forwards_N[stands])


def test_targeted_draws_of_a_target_do_not_depend_on_the_others():
    """The start of the second target is the same whether the first was tried beside it or not."""
    model, x, y = curved(num_classes=6, num_images=4)
    seen = []

    class Watched(Note):
        def search_targets(self, model, x_NCHW, pairs_N2, *, owner_N, draws, judge):
            draw = draws.uniform([2])
            rows = zip(owner_N.tolist(), pairs_N2[:, 1].tolist(), draw.tolist(), strict=True)
            seen.extend(rows)
            return super().search_targets(
                model, x_NCHW, pairs_N2, owner_N=owner_N, draws=draws, judge=judge
            )

    run(Targeted(attack=Watched(), max_rows=1), (model, x, y))
    one_by_one, seen = sorted(seen), []
    run(Targeted(attack=Watched(), max_rows=100), (model, x, y))
    assert sorted(seen) == one_by_one
    assert len({tuple(draw) for _, _, draw in seen}) == len(seen) == 20


@pytest.mark.parametrize("num_classes", [2, 3, 4])
@pytest.mark.parametrize(
    "attack", [APGD(threat=THREAT, objective=targeted_dlr), FAB(threat=THREAT)], ids=["APGD", "FAB"]
)
def test_targeted_takes_few_classes(attack, num_classes):
    images = curved(num_classes)
    attack = replace(attack, num_steps=10)
    found = run(Targeted(attack=attack), images)
    model, x, y = images
    assert 0 < int(found.is_fooled_N.sum()) < len(x)
    assert torch.equal(found.is_fooled_N, model(found.x_adv_NCHW).argmax(dim=1) != y)
    stands = ~found.is_fooled_N
    per_target = 11 if isinstance(attack, APGD) else 20
    assert (found.num_forwards_N[stands] == 1 + (num_classes - 1) * per_target).all()
    released = ReleasedTargets(attack=attack, num_passes_before=1, num_passes_after=0)
    slow = run(released, images)
    assert torch.equal(slow.is_fooled_N, model(slow.x_adv_NCHW).argmax(dim=1) != y)
    expected = 1 + (num_classes - 1) * (per_target + 1)
    assert (slow.num_forwards_N[~slow.is_fooled_N] == expected).all()


def test_total_adds_rows_up_to_samples():
    x = torch.zeros(3, 1, 1, 1)
    total = Total(x, num_forwards=1)
    owner = torch.tensor([0, 0, 2])
    found = SearchResult(
        x_adv_NCHW=torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1, 1),
        is_fooled_N=torch.tensor([True, True, False]),
        num_forwards_N=torch.tensor([5, 6, 7]),
        num_backwards_N=torch.tensor([1, 2, 3]),
    )
    total.add(owner, found)
    assert total.standing().tolist() == [1, 2]
    result = total.result()
    assert_close(result.x_adv_NCHW.flatten(), torch.tensor([1.0, 0.0, 0.0]))
    assert result.num_forwards_N.tolist() == [12, 1, 8]
    assert result.num_backwards_N.tolist() == [3, 0, 3]
