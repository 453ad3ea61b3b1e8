"""One stage on some images: the float32 answer alone decides, and nothing leaves the ball."""

import base64
import json
from dataclasses import dataclass, replace

import pytest
import torch

from compressor.attacks.search import SearchResult
from compressor.attacks.stages import Stage
from compressor.data import Batch
from compressor.errors import InvalidEvaluationError
from compressor.threat import ThreatModel
from compressor.verification.cascade import (
    NUM_BISECTIONS,
    Outcome,
    Subject,
    answer_clean,
    run_stage,
)
from compressor.verification.gallery_entry import GALLERY_SIZE, GalleryEntry, best_of_gallery

EPSILON = 8 / 255
THREAT = ThreatModel(epsilon_pixels=EPSILON)


@dataclass(frozen=True)
class Move:
    """Moves every pixel by so much, and claims to have fooled all."""

    by: float
    threat: ThreatModel = THREAT

    def search(self, model, x_NCHW, y_N, *, draws, judge):
        del draws, judge
        model(x_NCHW)
        ones_N = torch.ones_like(y_N)
        return SearchResult(
            x_adv_NCHW=x_NCHW + self.by,
            is_fooled_N=ones_N.bool(),
            num_forwards_N=3 * ones_N,
            num_backwards_N=2 * ones_N,
        )


@dataclass(frozen=True)
class AskTheJudge:
    """Moves every pixel by so much, and says what the judge says."""

    by: float
    threat: ThreatModel = THREAT

    def search(self, model, x_NCHW, y_N, *, draws, judge):
        x_adv = x_NCHW + self.by
        fooled_N = judge(x_adv, model(x_adv), y_N)
        found = Move(self.by).search(model, x_NCHW, y_N, draws=draws, judge=judge)
        return replace(found, is_fooled_N=fooled_N)


def stage(search, **changes):
    values = {"name": "fgsm", "kind": "white-box", "search": search, "runs_on": "search_dtype"}
    return Stage(**(values | {"parameters": {}, "max_forwards": 1} | changes))


def brightness(limit):
    """Class 1 where the mean pixel is above `limit`, else class 0; the margin is the distance."""

    def answer(x_NCHW):
        above_N = x_NCHW.flatten(1).mean(dim=1) - limit
        return torch.stack([-above_N / 2, above_N / 2], dim=1)

    return answer


def dark_or_bright(search, limit, batch, *, sign):
    """What `search` finds in a model that answers 1 above `limit`, or below it if `sign` is -1."""
    answer = brightness(limit)
    found, _ = run(search, lambda x_NCHW: sign * answer(x_NCHW), batch)
    return found


def always(label):
    return lambda x_NCHW: torch.eye(2)[label].expand(len(x_NCHW), 2)


def grey(*values):
    """One even image for each value, of class 0."""
    x_NCHW = torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 1, 4, 4).contiguous()
    index_N = torch.arange(len(values))
    return Batch(x_NCHW=x_NCHW, y_N=torch.zeros_like(index_N), index_N=index_N, keys_N=index_N)


def run(search, answer, batch, *, searched=None):
    subject = Subject(answer=answer, float32=answer, search_dtype=searched or answer)
    places = torch.arange(len(batch.y_N)) + 100
    return run_stage(stage(search), subject, batch, places, form="search_dtype", seed=0)


@pytest.mark.parametrize(
    ("by", "value"),
    [(1.01 * EPSILON, 0.5), (-EPSILON, 0.01), (EPSILON, 0.99), (float("nan"), 0.5)],
    ids=["too far", "below black", "above white", "not a number"],
)
def test_a_point_outside_the_threat_model_ends_everything(by, value):
    with pytest.raises(InvalidEvaluationError, match="fgsm left its threat model linf 8/255"):
        run(Move(by), brightness(0.9), grey(0.5, value))


def test_the_answer_decides_where_the_search_lies():
    """A search in few bits that sees every image fooled; one that sees none."""
    batch = grey(0.3, 0.49)
    for liar in (always(1), always(0)):
        for search in (Move(EPSILON), AskTheJudge(EPSILON)):
            found, _ = run(search, brightness(0.5), batch, searched=liar)
            assert [row.is_fooled for row in found] == [False, True]
            assert [row.prediction for row in found] == [0, 1]


def test_the_judge_of_a_search_is_the_answer():
    asked = []

    def answer(x_NCHW):
        asked.append(len(x_NCHW))
        return brightness(0.5)(x_NCHW)

    @dataclass(frozen=True)
    class Note(AskTheJudge):
        def search(self, model, x_NCHW, y_N, *, draws, judge):
            fooled_N = judge(x_NCHW, always(1)(x_NCHW), y_N)
            assert fooled_N.tolist() == [False, False]
            return super().search(model, x_NCHW, y_N, draws=draws, judge=judge)

    run(Note(EPSILON), answer, grey(0.3, 0.4), searched=always(1))
    assert asked[0] == 2


def test_no_finite_answer_is_never_right():
    nan, batch = float("nan"), grey(0.2, 0.4)

    def sometimes(x_NCHW):
        logits_NK = torch.tensor([[1.0, 0.0]]).repeat(len(x_NCHW), 1)
        logits_NK[x_NCHW.flatten(1).amax(dim=1) > 0.3] = nan
        return logits_NK

    subject = Subject(answer=sometimes, float32=sometimes, search_dtype=sometimes)
    clean = answer_clean(subject, batch, torch.arange(2))
    assert [row.is_fooled for row in clean] == [False, True]
    found, _ = run(Move(EPSILON), sometimes, grey(0.2, 0.29))
    assert [row.is_fooled for row in found] == [False, True]


def test_clean_answers_cost_one_pass_and_are_wrong_or_not():
    subject = Subject(answer=brightness(0.5), float32=always(1), search_dtype=always(1))
    wrong, right = answer_clean(subject, grey(0.6, 0.2), torch.tensor([4, 9]))
    assert (wrong.place, wrong.is_fooled, wrong.prediction) == (4, True, 1)
    assert wrong.margin == pytest.approx(0.1)
    assert (right.place, right.is_fooled, right.prediction) == (9, False, 0)
    assert (right.num_forwards, right.num_backwards, right.distance_pixels) == (1, 0, 0)


def test_what_was_found_is_told():
    (row,), _ = run(Move(EPSILON), brightness(0.5), grey(0.48))
    assert (row.place, row.is_fooled, row.prediction) == (100, True, 1)
    assert row.margin == pytest.approx(0.48 + EPSILON - 0.5, abs=1e-6)
    assert (row.num_forwards, row.num_backwards) == (3 + 1, 2)


@pytest.mark.parametrize("value", [0.4801, 0.49, 0.4995])
def test_distance_is_that_of_the_nearest_fooling_point_on_the_way(value):
    """Within a 256th of the way, and never below the true one."""
    (row,), _ = run(Move(EPSILON), brightness(0.5), grey(value))
    true = 0.5 - value
    assert true - 1e-6 <= row.distance_pixels <= true + EPSILON / 2**NUM_BISECTIONS + 1e-6


def test_distance_of_an_image_that_stands_is_that_of_the_point():
    (row,), _ = run(Move(EPSILON / 2), brightness(0.9), grey(0.5))
    assert not row.is_fooled
    assert row.distance_pixels == pytest.approx(EPSILON / 2)


def test_eight_bits_must_fool_too():
    """At 125.6 of 255 levels, rounding goes up; at 125.4 it goes down again."""
    batch = grey(*((level - 7.5) / 255 for level in (125.6, 125.4)))
    found, _ = run(Move(7.5 / 255), brightness(125.3 / 255), batch)
    assert [row.is_fooled for row in found] == [True, True]
    assert [row.fools_in_8_bits for row in found] == [True, False]


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("sign", [1, -1])
def test_eight_bits_need_not_be_the_nearest(norm, sign):
    """31.7 levels away, the 32nd is outside; the 31st fools the second model, not the first."""
    epsilon = 31.7475 / 255  # 0.1245
    pixels = epsilon if norm == "linf" else epsilon * 4  # of 16 pixels
    search = Move(sign * epsilon, ThreatModel(norm=norm, epsilon_pixels=pixels))
    for num_levels, expected in [(31.5, False), (30.5, True)]:
        limit = (100 + sign * num_levels) / 255
        (row,) = dark_or_bright(search, limit, grey(100 / 255), sign=sign)
        assert (row.is_fooled, row.fools_in_8_bits) == (True, expected)


@pytest.mark.parametrize("levels", [103.2, 103.7])
def test_eight_bits_may_be_nearer_to_the_clean_image(levels):
    """Of a model that is wrong between 102.5 and 103.8 levels, though 104 are inside the ball."""

    def answer(x_NCHW):
        levels_N = x_NCHW.flatten(1).mean(dim=1) * 255
        is_wrong_N = (levels_N > 102.5) & (levels_N < 103.8)
        return torch.stack([~is_wrong_N, is_wrong_N], dim=1).float()

    (row,), _ = run(Move((levels - 100) / 255), answer, grey(100 / 255))
    assert (row.is_fooled, row.fools_in_8_bits) == (True, True)


@pytest.mark.parametrize("epsilon", [8 / 255, 0.03137, 0.0314, 0.1245, 1 / 255])
@pytest.mark.parametrize("sign", [1, -1])
def test_no_level_is_lost_to_float32(epsilon, sign):
    """Of the whole levels that epsilon holds, all count, from every level of the clean image.

    Half of the pixels move by so many levels, the others by epsilon.
    """
    num_levels = int(epsilon * 255 + 1e-9)
    by = torch.full((4, 4), sign * epsilon)
    by[:2] = sign * num_levels / 255
    search = Move(by, ThreatModel(epsilon_pixels=epsilon))
    for level in range(40, 216):
        limit = (level + sign * (num_levels - 0.1)) / 255
        (row,) = dark_or_bright(search, limit, grey(level / 255), sign=sign)
        assert (row.is_fooled, row.fools_in_8_bits) == (True, True), level


def test_eight_bits_outside_the_ball_do_not_count():
    """Nearer than one level there is none inside but that of the clean image."""
    epsilon = 0.7 / 255
    search = Move(epsilon, ThreatModel(epsilon_pixels=epsilon))
    (row,), _ = run(search, brightness(100.5 / 255), grey(100 / 255))
    assert (row.is_fooled, row.fools_in_8_bits) == (True, False)


def test_an_image_that_stands_does_not_fool_in_eight_bits():
    """Though rounding may carry it over the boundary: no attack broke it."""
    (row,), _ = run(Move(3.7 / 255), brightness(103.8 / 255), grey(100 / 255))
    assert (row.is_fooled, row.fools_in_8_bits) == (False, False)


def test_gallery_shows_the_points_of_which_it_speaks():
    """The clearest is the point found, the closest the same drawn back; each with its own facts."""
    values = [0.47 + 0.001 * n for n in range(30)]
    batch = grey(0.3, *values)
    found, gallery = run(Move(EPSILON), brightness(0.5), batch)
    fooled = {row.place: row for row in found if row.is_fooled}
    assert fooled.keys() == set(range(101, 131))
    of_group = {
        group: [entry for entry in gallery if entry.group == group]
        for group in ("clearest", "closest")
    }
    for group, entries in of_group.items():
        assert {entry.place for entry in entries} == set(range(125, 131)), group
    for entry in gallery:
        row = fooled[entry.place]
        shift = EPSILON if entry.group == "clearest" else row.distance_pixels
        x_adv = batch.x_NCHW[entry.place - 100] + shift
        levels = torch.frombuffer(bytearray(base64.b64decode(entry.adv_base64)), dtype=torch.uint8)
        assert torch.equal(levels.view(1, 4, 4), (x_adv * 255).round().to(torch.uint8))
        assert entry.distance_pixels == pytest.approx(shift, abs=1e-6)
        assert entry.prediction == row.prediction
        assert entry.confidence_fraction == pytest.approx(torch.tensor(entry.margin).sigmoid())
    assert all(entry.margin == fooled[entry.place].margin for entry in of_group["clearest"])
    assert all(0 <= e.margin < fooled[e.place].margin for e in of_group["closest"])


def test_best_of_gallery_is_the_clearest_and_the_closest():
    entries = [
        GalleryEntry(
            group=group,
            place=n,
            attack="a",
            adv_base64="",
            prediction=0,
            confidence_fraction=0.5 + (n % 5) / 10,
            distance_pixels=(n * 7 % 20) / 255,
            margin=1.0,
        )
        for n in range(20)
        for group in ("closest", "clearest")
    ]
    best = best_of_gallery(list(reversed(entries)))
    clearest = [entry for entry in best if entry.group == "clearest"]
    closest = [entry for entry in best if entry.group == "closest"]
    assert best == clearest + closest
    assert [entry.place for entry in clearest] == [4, 9, 14, 19, 3, 8]
    assert [entry.place * 7 % 20 for entry in closest] == list(range(GALLERY_SIZE))


def test_outcome_survives_json():
    found, gallery = run(Move(EPSILON), brightness(0.5), grey(0.3, 0.49))
    found = (*found, replace(found[0], margin=-float("inf"), distance_pixels=0.1 + 0.2))
    outcome = Outcome(chunk=3, stage="fgsm", found=found, gallery=gallery, duration_seconds=0.1)
    assert Outcome.from_json(json.loads(json.dumps(outcome.to_json()))) == outcome


def test_watched_subject_ticks_before_every_pass():
    events = []

    def model(name):
        def answer(x_NCHW):
            events.append(name)
            return x_NCHW

        return answer

    names = ("answer", "float32", "search_dtype")
    subject = Subject(**{name: model(name) for name in names}).watched(events.append)
    x_NCHW = torch.ones(3, 1, 2, 2)
    assert all(getattr(subject, name)(x_NCHW) is x_NCHW for name in names)
    assert events == [3, "answer", 3, "float32", 3, "search_dtype"]
