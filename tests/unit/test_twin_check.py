"""A file that follows its twin on clean images only is caught where attacks lead."""

from dataclasses import replace

import pytest
import torch

from compressor.attacks.apgd import APGD
from compressor.losses import margin
from compressor.threat import ThreatModel
from compressor.validity.claim import Claim
from compressor.validity.twin_check import TWIN_UNDER_ATTACK, _judge, _Margins, twin_checks
from compressor.validity.validity import check_validity

NUM_IMAGES = 40
WEIGHT = torch.randn(192, 4, generator=torch.Generator().manual_seed(5))
STRONG, WEAK = ThreatModel(epsilon_pixels=0.1), ThreatModel(epsilon_pixels=0.0001)
"""All images fool the twin; none does."""


def linear(x_NCHW):
    return (x_NCHW - 0.5).flatten(1) @ WEIGHT


X = 0.3 + 0.4 * torch.rand(NUM_IMAGES, 3, 8, 8, generator=torch.Generator().manual_seed(7))
Y = linear(X).argmax(dim=1)


def deaf(x_NCHW):
    """As the nearest clean image, whatever was added."""
    return linear(X[torch.cdist(x_NCHW.flatten(1), X.flatten(1)).argmin(dim=1)])


def rounded(x_NCHW):
    """As in 8 bits."""
    return (linear(x_NCHW) * 8).round() / 8


def another_off_the_images(x_NCHW):
    """With the weights of other pixels, wherever an image was changed."""
    change = x_NCHW - X[torch.cdist(x_NCHW.flatten(1), X.flatten(1)).argmin(dim=1)]
    return deaf(x_NCHW) + change.flatten(1) @ WEIGHT.roll(96, dims=0)


def half_as_steep(x_NCHW):
    return 0.45 * linear(x_NCHW) + 0.55 * deaf(x_NCHW)


def for_some(model, num):
    """Only these clean images have it; around the others it is the twin."""

    def answer(x_NCHW):
        nearest_N = torch.cdist(x_NCHW.flatten(1), X.flatten(1)).argmin(dim=1)
        return torch.where(nearest_N[:, None] < num, model(x_NCHW), linear(x_NCHW))

    return answer


def claim_of(file, *, threat=STRONG, **changes):
    claim = Claim(
        model=linear,
        x_NCHW=X,
        y_N=Y,
        keys_N=torch.arange(NUM_IMAGES) * 7_919,
        threat=threat,
        attack=APGD(threat=threat, objective=margin, num_steps=5),
        num_steps=5,
        broken_by_white_box_N=None,
        file=file,
        is_twin=True,
    )
    return replace(claim, **changes)


def row_of(file, **changes):
    (row,) = twin_checks(claim_of(file, **changes))
    return row


@pytest.mark.parametrize("threat", [STRONG, WEAK], ids=str)
@pytest.mark.parametrize(
    ("file", "expected"),
    [
        (linear, "passed"),
        (rounded, "passed"),
        (deaf, "alarm"),
        (another_off_the_images, "alarm"),
    ],
)
def test_a_file_must_follow_its_twin_under_attack(file, expected, threat):
    assert torch.equal(file(X).argmax(dim=1), Y)
    assert row_of(file, threat=threat).status == expected


def test_a_file_must_rise_as_its_twin_unless_it_is_fooled():
    assert row_of(half_as_steep, threat=WEAK).status == "alarm"
    assert row_of(half_as_steep).status == "passed"


def test_what_was_found_is_counted():
    assert row_of(linear).found == "0 of 40 images; 40 fool the twin, 40 of these the file"
    assert row_of(deaf).found == "40 of 40 images; 40 fool the twin, 0 of these the file"
    assert row_of(linear, threat=WEAK).found == (
        "0 of 40 images; 0 fool the twin, 0 of these the file"
    )


@pytest.mark.parametrize(("num", "expected"), [(2, "passed"), (6, "passed"), (7, "alarm")])
def test_some_images_are_chance(num, expected):
    """6 of 40 have p = 0.014 if one in twenty is tolerated, 7 have 0.003."""
    row = row_of(for_some(deaf, num))
    assert row.found.startswith(f"{num} of 40 images")
    assert row.status == expected
    assert row.p_value is not None


def test_a_few_images_that_differ_excuse_no_others():
    def surer_of_the_first(x_NCHW):
        nearest_N = torch.cdist(x_NCHW.flatten(1), X.flatten(1)).argmin(dim=1)
        sure_NK = torch.nn.functional.one_hot(Y[nearest_N], 4) * 1e6
        return deaf(x_NCHW) + torch.where(nearest_N[:, None] == 0, sure_NK, 0)

    assert row_of(surer_of_the_first).status == "alarm"


@pytest.mark.parametrize("shift", [0.0, 0.5, 2.0, 10.0])
def test_a_difference_on_all_images_excuses_none(shift):
    """A file that is surer of every answer than its twin chooses how much they differ."""

    def deaf_and_surer(x_NCHW):
        logits_NK = deaf(x_NCHW)
        return logits_NK + shift * torch.nn.functional.one_hot(logits_NK.argmax(dim=1), 4)

    assert row_of(deaf_and_surer).status == "alarm"


def test_points_are_carried_on_beyond_the_border():
    """Where the first point that fools the twin would leave a file of coarse steps standing."""
    row = row_of(lambda x_NCHW: (linear(x_NCHW) / 2).round() * 2)
    assert row.status == "passed"
    assert row.found == "0 of 28 images; 28 fool the twin, 28 of these the file"


@pytest.mark.parametrize(
    ("at_twin", "at_file", "expected"),
    [(0.5, 0.5, 0), (0.5, -0.1, 10), (-0.1, -0.1, 0), (-0.1, -0.6, 10), (9.0, 0.1, 0)],
)
def test_fooling_the_twin_alone_counts_however_far_the_file_moved(at_twin, at_file, expected):
    """Margins begin at -1; and where the twin stands, the file must move by half as much."""

    def margins(end):
        ends_N = torch.full((10,), end)
        return _Margins(clean_N=torch.full((10,), -1.0), found_N=ends_N, is_fooled_N=ends_N > 0)

    assert _judge(margins(at_twin), margins(at_file)).found.startswith(f"{expected} of 10 images")


def test_only_images_that_both_answer_correctly_count():
    wrong = Y.clone()
    wrong[:5] = (wrong[:5] + 1) % 4
    assert row_of(linear, y_N=wrong).found.startswith("0 of 35 images")

    def wrong_at_first(x_NCHW):
        nearest_N = torch.cdist(x_NCHW.flatten(1), X.flatten(1)).argmin(dim=1)
        return torch.where(nearest_N[:, None] < 4, linear(x_NCHW).roll(1, dims=1), linear(x_NCHW))

    assert row_of(wrong_at_first).found.startswith("0 of 36 images")
    assert row_of(linear, y_N=(Y + 1) % 4).advice == "no image is answered correctly"


def test_a_file_without_a_twin_has_not_passed():
    row = row_of(linear, is_twin=False)
    assert (row.name, row.status) == ("twin_under_attack", "not_run")
    assert row.advice == "the file has no twin; its source was followed instead"


def test_a_network_is_not_asked():
    assert twin_checks(claim_of(None)) == []
    assert TWIN_UNDER_ATTACK.name not in {row.name for row in check_validity(claim_of(None))}


def test_an_alarm_explains_what_the_attacks_did_not_find():
    rows = {row.name: row for row in check_validity(claim_of(deaf))}
    assert rows["twin_under_attack"].status == "alarm"
    assert rows["more_search"].advice == "explained by twin_under_attack"
    rows = {row.name: row for row in check_validity(claim_of(linear))}
    assert rows["more_search"].advice == "the white-box attacks were not run"
