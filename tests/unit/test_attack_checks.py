"""Comparisons of attacks on a linear model, whose breakable images are known exactly."""

import math
from dataclasses import replace

import pytest
import torch

from compressor.attacks.apgd import APGD
from compressor.attacks.draws import KeyedDraws
from compressor.attacks.search import SearchResult
from compressor.losses import margin
from compressor.threat import ThreatModel
from compressor.validity.attack_checks import ATTACK_CHECKS, attack_checks
from compressor.validity.check import SIGNIFICANCE, binomial_tail
from compressor.validity.claim import Claim, Purpose
from compressor.validity.origins import border_points

THREAT = ThreatModel(epsilon_pixels=0.05)
WEIGHT = torch.randn(192, generator=torch.Generator().manual_seed(5))
REACH = THREAT.epsilon_pixels * float(WEIGHT.abs().sum())
"""How far an attack can move the score; the margin moves by twice as much."""


def linear(x_NCHW):
    score_N = (x_NCHW - 0.5).flatten(1) @ WEIGHT
    return torch.stack([score_N, -score_N], dim=1)


def images(shares):
    """Of class 0, with scores that are these shares of what an attack can move."""
    shares = torch.tensor(shares)
    noise = 0.2 * torch.rand(len(shares), 192, generator=torch.Generator().manual_seed(7)) - 0.1
    noise = noise - (noise @ WEIGHT)[:, None] * WEIGHT / WEIGHT.square().sum()
    x = 0.5 + noise + shares[:, None] * REACH * WEIGHT / WEIGHT.square().sum()
    return x.view(-1, 3, 8, 8), torch.zeros(len(shares), dtype=torch.long)


def claim_of(shares, *, flags=None, **changes):
    """Without flags: those that a perfect attack gives."""
    x, y = images(shares)
    broken = [share < 1 for share in shares] if flags is None else flags
    values = {
        "model": linear,
        "x_NCHW": x,
        "y_N": y,
        "keys_N": torch.arange(len(y)) * 7_919,
        "threat": THREAT,
        "attack": APGD(threat=THREAT, objective=margin, num_steps=10),
        "num_steps": 10,
        "broken_by_white_box_N": torch.tensor(broken),
    }
    return Claim(**(values | changes))


def rows_of(claim):
    rows = attack_checks(claim)
    assert [row.name for row in rows] == [check.name for check in ATTACK_CHECKS]
    return {row.name: row for row in rows}


def alarms(claim):
    return {name for name, row in rows_of(claim).items() if row.status == "alarm"}


HALF_BREAKABLE = [0.5] * 50 + [2.0] * 50


def test_attack_checks_pass_a_perfect_attack():
    claim = claim_of(
        HALF_BREAKABLE,
        teachers={"itself": linear},
        broken_by_square_N=torch.zeros(100, dtype=torch.bool),
    )
    rows = rows_of(claim)
    assert {row.status for row in rows.values()} == {"passed"}
    assert rows["noise"].found == "0 of 100 images, 50 of which stood"


def test_attack_checks_leave_out_what_is_wrong_without_an_attack():
    rows = rows_of(claim_of([-1.0] * 30 + HALF_BREAKABLE, flags=[False] * 30 + [True] * 100))
    assert rows["unconstrained"].found == "0 of 100 images stand"
    assert rows["noise"].advice == "no image stands, so nothing can flatter"


@pytest.mark.parametrize(
    ("num_won", "num_total", "p_value"),
    [(0, 128, 1.0), (1, 128, 1 - 0.995**128), (3, 3, 0.005**3)],
)
def test_binomial_tail_by_hand(num_won, num_total, p_value):
    found = binomial_tail(num_won, num_total=num_total, probability=0.005)
    assert found == pytest.approx(p_value, rel=1e-12)


def test_binomial_tail_equals_the_sum():
    n, p = 100, 0.01
    for k in range(8):
        tail = sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k, n + 1))
        assert binomial_tail(k, num_total=n, probability=p) == pytest.approx(tail, rel=1e-9)


@pytest.mark.parametrize(("num_won", "expected"), [(0, "passed"), (3, "passed"), (5, "alarm")])
def test_black_box_counts_what_only_square_broke(num_won, expected):
    square = torch.tensor([True] * 50 + [True] * num_won + [False] * (50 - num_won))
    row = rows_of(claim_of(HALF_BREAKABLE, broken_by_square_N=square))["black_box"]
    assert row.status == expected
    assert row.found == f"{num_won} of 100 images, 50 of which stood"
    assert row.p_value == binomial_tail(num_won, num_total=100, probability=0.005)


def test_black_box_is_corrected_for_the_other_tests():
    # 4 of 100 have p = 0.0017 alone, above a sixth of 1 %.
    square = torch.tensor([False] * 50 + [True] * 4 + [False] * 46)
    row = rows_of(claim_of(HALF_BREAKABLE, broken_by_square_N=square))["black_box"]
    assert row.p_value < SIGNIFICANCE
    assert row.status == "passed"


def test_noise_wins_where_the_attack_did_nothing():
    # A random corner moves the score by about a tenth of what an attack can.
    flags = [False] * 100
    assert "noise" in alarms(claim_of([0.01] * 10 + [2.0] * 90, flags=flags))
    assert "noise" not in alarms(claim_of([0.9] * 10 + [2.0] * 90, flags=flags))


@pytest.mark.parametrize(("num_won", "expected"), [(0, "passed"), (3, "passed"), (5, "alarm")])
def test_transfer_counts_what_only_transferred_images_broke(num_won, expected):
    """Of a stage that came after the attacks with gradients; it needs no teacher."""
    transfer = torch.tensor([True] * 50 + [True] * num_won + [False] * (50 - num_won))
    row = rows_of(claim_of(HALF_BREAKABLE, broken_by_transfer_N=transfer))["transfer"]
    assert (row.status, row.found) == (expected, f"{num_won} of 100 images, 50 of which stood")


def test_transfer_adds_those_that_a_teacher_breaks():
    transfer = torch.tensor([False] * 50 + [True] + [False] * 49)
    claim = claim_of(
        HALF_BREAKABLE,
        flags=[False] * 2 + [True] * 48 + [False] * 50,
        broken_by_transfer_N=transfer,
        teachers={"itself": linear},
    )
    assert rows_of(claim)["transfer"].found == "3 of 100 images, 52 of which stood"


def test_transfer_needs_no_gradient_of_the_model():
    hidden = claim_of(
        HALF_BREAKABLE, flags=[False] * 100, model=lambda x: linear((8 * x).round() / 8)
    )
    assert "transfer" not in alarms(hidden)
    rows = rows_of(replace(hidden, teachers={"plain": linear, "blind": lambda x: -linear(x)}))
    assert rows["transfer"].status == "alarm"


def test_transferred_points_go_on_after_they_fool_the_teacher():
    # The teacher is fooled by the clean image; the model only at the border of the ball.
    claim = claim_of(
        [0.9] * 100,
        flags=[False] * 100,
        teachers={"easy": lambda x: linear(x) - torch.tensor([1.9 * REACH, 0.0])},
    )
    assert rows_of(claim)["transfer"].found == "100 of 100 images, 100 of which stood"


def test_more_search_breaks_what_was_left():
    assert alarms(claim_of(HALF_BREAKABLE, flags=[False] * 100)) >= {"more_search"}
    assert alarms(claim_of(HALF_BREAKABLE, flags=[True] * 45 + [False] * 55)) == set()  # 5 of 100


class Scripted:
    """A search that asks about some points and returns others."""

    threat = THREAT

    def __init__(self, *, asks, returns):
        self._asks, self._returns = asks, returns

    def search(self, model, x_NCHW, y_N, *, draws, judge):
        del draws, judge
        for point in self._asks(x_NCHW):
            model(point)
        zeros = torch.zeros_like(y_N)
        return SearchResult(
            x_adv_NCHW=self._returns(x_NCHW),
            is_fooled_N=zeros.bool(),
            num_forwards_N=zeros,
            num_backwards_N=zeros,
        )


def moved(x_NCHW, share):
    """Moved by a share of what is allowed, down the score."""
    step = share * THREAT.epsilon_pixels * WEIGHT.sign().view(3, 8, 8)
    return x_NCHW - step


@pytest.mark.parametrize(
    ("returned_share", "expected"),
    [(0.0, {"silent_success"}), (3.0, {"silent_success"}), (1.0, set())],
    ids=["lost", "outside", "kept"],
)
def test_silent_success_is_what_was_met_and_not_returned(returned_share, expected):
    attack = Scripted(asks=lambda x: [moved(x, 1.0)], returns=lambda x: moved(x, returned_share))
    # Flags as an attack gives them that returned nothing; the longer search tells, too.
    found = alarms(claim_of(HALF_BREAKABLE, flags=[False] * 100, attack=attack))
    assert found == {"more_search"} | expected


def test_silent_success_does_not_count_points_outside():
    attack = Scripted(asks=lambda x: [moved(x, 3.0)], returns=lambda x: moved(x, 0.99))
    assert alarms(claim_of([2.0] * 100, attack=attack)) == set()


@pytest.mark.parametrize(
    ("share", "expected"), [(0.0, {"converged"}), (0.75, {"converged"}), (0.85, set())]
)
def test_converged_asks_for_most_of_the_rise(share, expected):
    attack = Scripted(asks=lambda x: [], returns=lambda x: moved(x, share))
    claim = claim_of([2.0] * 30, attack=attack)
    assert alarms(claim) == expected
    assert f"the median reaches {100 * share:.0f} %" in rows_of(claim)["converged"].found


def test_converged_is_about_what_still_stands():
    row = rows_of(claim_of(HALF_BREAKABLE, flags=[False] * 100))["converged"]
    assert row.found == "0 of 50 images reach less, the median reaches 100 %"
    row = rows_of(claim_of([0.5] * 50, flags=[False] * 50))["converged"]
    assert row.advice == "no image stands when the attack is run again"


def test_converged_needs_more_than_a_few_images():
    attack = Scripted(asks=lambda x: [], returns=lambda x: x)
    row = rows_of(claim_of([2.0] * 5, attack=attack))["converged"]
    assert row.found == "5 of 5 images reach less, the median reaches 0 %"
    assert row.p_value == pytest.approx(1 / 32)
    assert row.status == "passed"


def test_unconstrained_attack_follows_gradients_only():
    claim = claim_of(HALF_BREAKABLE)
    hidden = replace(claim, model=lambda x: linear((8 * x).round() / 8))
    assert rows_of(claim)["unconstrained"].status == "passed"
    assert rows_of(hidden)["unconstrained"].status == "alarm"
    assert rows_of(hidden)["unconstrained"].found == "100 of 100 images stand"


def test_attack_checks_in_l2():
    threat = ThreatModel(norm="l2", epsilon_pixels=THREAT.epsilon_pixels * 192**0.5)
    reach = threat.epsilon_pixels * float(WEIGHT.norm()) / REACH
    attack = APGD(threat=threat, objective=margin, num_steps=10)
    shares = [0.5 * reach] * 50 + [2 * reach] * 50
    flags = [True] * 50 + [False] * 50
    claim = claim_of(shares, flags=flags, threat=threat, attack=attack)
    assert alarms(claim) == set()
    assert "more_search" in alarms(replace(claim, broken_by_white_box_N=torch.zeros(100) > 0))


def test_attack_checks_say_why_they_were_not_run():
    claim = claim_of(HALF_BREAKABLE)
    rows = rows_of(claim)
    assert rows["black_box"].advice == "the Square attack was not run"
    assert rows["transfer"].advice == "there is no other network that images could come from"
    rows = rows_of(replace(claim, broken_by_white_box_N=None))
    reasons = {name: row.advice for name, row in rows.items() if row.status == "not_run"}
    assert set(reasons) == {check.name for check in ATTACK_CHECKS} - {"unconstrained"}
    assert set(reasons.values()) == {"the white-box attacks were not run"}


def test_purposes_draw_different_numbers():
    claim = claim_of([2.0] * 3)
    draws = [claim.draws(purpose).uniform((2,)) for purpose in Purpose]
    assert len({tuple(draw.flatten().tolist()) for draw in draws}) == len(Purpose)
    point = border_points(claim.x_NCHW, THREAT, claim.draws(Purpose.NOISE))
    own = border_points(claim.x_NCHW[1:], THREAT, claim.select(torch.tensor([1, 2])).draws(1002))
    assert torch.equal(point[1:], own)
    assert isinstance(claim.draws(Purpose.NOISE), KeyedDraws)
