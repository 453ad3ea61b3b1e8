"""Counts of a ranking, from networks whose answers can be worked out by hand.

Images have two pixels; each teacher looks at one of them and says class 1 above a half.
"""

import math
import time

import pytest
import torch

from compressor.data import Batch
from compressor.errors import TeacherError
from compressor.randomness import sample_keys
from compressor.teacher import Teacher
from compressor.teacher_ranking import Measured, measure_teachers
from compressor.teacher_ranking_record import (
    Found,
    notes_on,
    ranked_teachers,
    recommend,
    transfer_cells,
)
from compressor.threat import ThreatModel

THREAT = ThreatModel(epsilon_pixels=0.1)
GAPS_FIRST = (0.05, 0.05, 0.3, 0.3, 0.3, -0.2)
"""How far the first pixel of each image is on the right side: two can be pushed over, one is
wrong."""
GAPS_SECOND = (0.05, 0.3, 0.05, 0.3, -0.2, 0.3)


class Look(torch.nn.Module):
    """Looks at pixels with these weights; bends the score where told."""

    def __init__(self, weights, bend=lambda score: score):
        super().__init__()
        self.backbone = torch.nn.Identity()
        self.weights = torch.nn.Parameter(torch.tensor(weights))
        self.bend = bend

    def forward(self, x_NCHW):
        score = self.bend(((x_NCHW[:, 0, 0] - 0.5) * self.weights).sum(dim=1) * 4)
        return torch.stack([-score, score], dim=1)


FIRST, SECOND, BOTH = (1.0, 0.0), (0.0, 1.0), (0.5, 0.5)


def teacher(name, network, *, blind=False):
    return Teacher(
        name=name,
        role="robust",
        answer=network,
        network=None if blind else network,
        spec=None,
        num_parameters=2,
        num_classes=2,
        sha256=name,
        num_bytes=1,
    )


def images(batch_size=4):
    y_N = torch.tensor([0, 1, 0, 1, 0, 1])
    sign_N1 = (2 * y_N - 1)[:, None]
    gaps_N2 = torch.tensor([GAPS_FIRST, GAPS_SECOND]).T
    x_NCHW = (0.5 + sign_N1 * gaps_N2)[:, None, None, :]
    keys_N = sample_keys(torch.arange(6), seed=0)
    return [
        Batch(x_NCHW=x_NCHW[rows], y_N=y_N[rows], index_N=rows, keys_N=keys_N[rows])
        for rows in torch.arange(6).split(batch_size)
    ]


def found(*teachers, batch_size=4, **settings):
    measured = measure_teachers(
        teachers, images(batch_size), threat=THREAT, num_steps=10, **settings
    )
    return Found(teachers=teachers, measured=measured)


def pair():
    return found(teacher("first", Look(FIRST)), teacher("second", Look(SECOND)))


def rows_of(result):
    num = len(result.teachers)
    return ranked_teachers(result, sources=["x"] * num, seen=["no"] * num)


def notes_of(result, seen=None):
    return notes_on(result, seen=seen or ["no"] * len(result.teachers))


def of(count):
    return count and (count.num_correct, count.num_total)


def test_accuracies_are_those_worked_out_by_hand():
    rows = {row.name: row for row in rows_of(pair())}
    assert of(rows["first"].clean) == (5, 6)
    assert of(rows["first"].robust) == of(rows["first"].worst_case) == (3, 6)
    assert of(rows["second"].clean) == (5, 6)
    assert of(rows["second"].robust) == (3, 6)


def test_both_matrices_have_their_own_denominators():
    """What is done to the one pixel leaves the other where it is, but for the random start."""
    cells = {(cell.made_on, cell.shown_to): cell for cell in transfer_cells(pair())}
    assert of(cells[1, 2].accuracy) == (4, 5)  # wrong on the fifth, which the first gets right
    assert of(cells[1, 1].accuracy) == (3, 5)
    assert of(cells[1, 2].transferability) == (0, 2)
    assert of(cells[1, 1].transferability) == (2, 2)


def test_transfer_counts_what_fools_the_first_and_the_second_gets_right_clean():
    """Written down image by image; each way has its own images."""
    answers = {
        "is_right_TN": [[1, 1, 1, 0], [1, 0, 1, 1]],
        "was_fooled_TN": [[1, 1, 0, 0], [0, 0, 1, 0]],
        "falls_TTN": [[[1, 1, 0, 0], [1, 1, 0, 0]], [[0, 0, 0, 1], [0, 0, 1, 0]]],
    }
    measured = Measured(
        has_gradient_T=(True, True),
        clean_entropy_nats_T=(0.0, 0.0),
        adversarial_entropy_nats_T=(0.0, 0.0),
        forward_ms_T=(1.0, 1.0),
        **{name: torch.tensor(rows, dtype=torch.bool) for name, rows in answers.items()},
    )
    result = Found(
        teachers=(teacher("a", Look(FIRST)), teacher("b", Look(FIRST))), measured=measured
    )
    cells = {(cell.made_on, cell.shown_to): cell for cell in transfer_cells(result)}
    assert of(cells[1, 2].transferability) == (1, 1)
    assert of(cells[2, 1].transferability) == (0, 1)
    assert of(cells[1, 2].accuracy) == (1, 3)
    chosen = recommend(result, num_wanted=2, transfer_weight=1.0)
    assert (chosen.mean_transferability, chosen.mean_robust) == (0.5, 0.25)


def test_what_fools_one_that_looks_at_the_same_pixel_fools_the_other():
    result = found(teacher("a", Look(FIRST)), teacher("b", Look(FIRST)))
    cells = {(cell.made_on, cell.shown_to): cell for cell in transfer_cells(result)}
    assert of(cells[1, 2].transferability) == of(cells[2, 1].transferability) == (2, 2)


def test_batches_change_nothing():
    whole, single = (
        pair(),
        found(teacher("first", Look(FIRST)), teacher("second", Look(SECOND)), batch_size=1),
    )
    assert transfer_cells(whole) == transfer_cells(single)
    entropies = [r.measured.adversarial_entropy_nats_T for r in (whole, single)]
    assert entropies[0] == pytest.approx(entropies[1])


def test_entropies_are_means_over_all_images():
    row = next(row for row in rows_of(pair()) if row.name == "first")

    def entropy(gap):
        p = 1 / (1 + math.exp(-8 * gap))
        return -p * math.log(p) - (1 - p) * math.log(1 - p)

    assert row.clean_entropy_nats == pytest.approx(sum(map(entropy, GAPS_FIRST)) / 6, abs=1e-6)
    # Pushed by 0.1 where it was right; where it was wrong, left alone.
    pushed = [gap - 0.1 if gap > 0 else gap for gap in GAPS_FIRST]
    expected = sum(map(entropy, pushed)) / 6
    assert row.adversarial_entropy_nats == pytest.approx(expected, abs=1e-4)


def test_a_teacher_without_gradient_is_shown_images_and_never_recommended():
    result = found(teacher("file", Look(FIRST), blind=True), teacher("net", Look(FIRST)))
    net, file = rows_of(result)
    assert (net.name, file.name) == ("net", "file")
    assert (file.robust, file.worst_case, file.adversarial_entropy_nats) == (None, None, None)
    cells = {(cell.made_on, cell.shown_to): cell for cell in transfer_cells(result)}
    assert cells.keys() == {(1, 1), (1, 2)}
    assert of(cells[1, 2].transferability) == (2, 2)
    assert recommend(result, num_wanted=2, transfer_weight=0.5).numbers == (1,)
    assert any(note.startswith("file: an ONNX file gives no gradient") for note in notes_of(result))


def test_hidden_gradients_do_not_win():
    """A network that rounds withstands its own attack, and not the images made on another."""
    masked = teacher("masked", Look(FIRST, bend=lambda score: score.detach()))
    result = found(masked, teacher("open", Look(FIRST)))
    rows = {row.name: row for row in rows_of(result)}
    assert of(rows["masked"].robust) == (4, 6)  # one random start is beyond the edge
    assert of(rows["masked"].worst_case) == (3, 6)
    assert any(
        "masked: images made on other teachers fool it on 1 of 4" in note
        for note in notes_of(result)
    )


def test_the_recommended_are_those_that_do_not_share_what_fools_them():
    result = found(teacher("a", Look(FIRST)), teacher("b", Look(FIRST)), teacher("c", Look(SECOND)))
    chosen = recommend(result, num_wanted=2, transfer_weight=0.5)
    names = {rows_of(result)[number - 1].name for number in chosen.numbers}
    assert names == {"a", "c"}  # a before b, the same otherwise
    assert chosen.mean_transferability == 0.25  # one random start moves the other pixel too far
    assert chosen.num_robust == 3
    assert chosen.same_choice.num_total == 200
    assert chosen == recommend(result, num_wanted=2, transfer_weight=0.5)


def test_who_was_trained_on_the_images_is_named():
    result = found(*(teacher(name, Look(FIRST)) for name in "abc"))
    said = " ".join(notes_of(result, ["yes", "no", "unknown"]))
    assert "a was trained on some of these images; its accuracies flatter" in said
    assert "c may have been trained on some of these images" in said
    assert "b " not in said
    assert "accuracies would then flatter beside the others" in said
    assert not any("trained on" in note for note in notes_of(result, ["no"] * 3))


def test_where_nothing_is_known_of_any_teacher_that_is_said():
    result = found(*(teacher(name, Look(FIRST)) for name in "abc"))
    (note,) = [note for note in notes_of(result, ["unknown"] * 3) if "trained on" in note]
    assert note == (
        "a, b, c may have been trained on some of these images, which files do not say; "
        "accuracies would then flatter"
    )


def test_the_first_batch_is_not_timed():
    """As of a network that is slow at first."""
    calls = []

    def slow_at_first(score):
        if not calls:
            time.sleep(0.3)
        calls.append(None)
        return score

    (row,) = rows_of(found(teacher("slow", Look(FIRST, bend=slow_at_first))))
    assert row.forward_ms < 300 / 6 / 2


@pytest.mark.parametrize("kind", ["clean", "adversarial"])
def test_answers_that_are_no_numbers_are_refused_by_name(kind):
    def bend(score):
        if kind == "clean":
            return score * torch.nan
        return torch.where((score > 0.75) & (score < 0.85), torch.nan, score)

    broken = teacher("broken", Look((1.0, 0.0), bend=bend))
    with pytest.raises(TeacherError, match=rf"teacher broken answers \d of \d {kind} images with"):
        found(broken, teacher("good", Look(FIRST)))


def test_progress_ends_near_its_end():
    told = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compressor.teacher_ranking._OBSERVE_EVERY_SECONDS", 0.0)
        found(teacher("a", Look(FIRST)), teacher("b", Look(SECOND)), observe=told.append)
    fractions = [event.done_fraction for event in told]
    assert fractions == sorted(fractions)
    assert 0.9 < fractions[-1] <= 1
    assert told[-1].left_seconds is not None
