"""Auto-PGD on models of one pixel, which can be worked by hand, and what its rows keep apart."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch.testing import assert_close

from compressor.attacks.apgd import APGD
from compressor.attacks.draws import KeyedDraws
from compressor.attacks.search import by_logits
from compressor.losses import cross_entropy, dlr, margin, targeted_dlr
from compressor.threat import ThreatModel

EPSILON = 0.25
THREATS = {
    "linf": ThreatModel(norm="linf", epsilon_pixels=EPSILON),
    "l2": ThreatModel(norm="l2", epsilon_pixels=EPSILON),
}
PIXEL = torch.full((1, 1, 1, 1), 0.5, dtype=torch.float64)
LABEL = torch.tensor([0])

both_norms = pytest.mark.parametrize("norm", THREATS)


@dataclass(frozen=True)
class Upwards:
    """Every draw is the largest, so the start is half a grey pixel plus epsilon."""

    def uniform(self, shape):
        return torch.ones(1, *shape)

    def normal(self, shape):
        return torch.ones(1, *shape)


def never_fooled(x_NCHW):
    return torch.cat([10 + x_NCHW.flatten(1)[:, :1], 0 * x_NCHW.flatten(1)[:, :1]], dim=1)


def flat_objective(value, *, slope):
    """The same value everywhere, with a gradient all the same."""

    def objective(logits_NK, y_N):
        rise_N = slope * logits_NK[:, 0]
        return value + rise_N - rise_N.detach()

    return objective


def points_of(objective, *, norm="linf", num_steps):
    """Where a model of one pixel is asked, the first time at 0.75."""
    seen = []

    def watched(x_NCHW):
        seen.append(float(x_NCHW.detach()))
        return never_fooled(x_NCHW)

    apgd = APGD(threat=THREATS[norm], objective=objective, num_steps=num_steps)
    found = apgd.search(watched, PIXEL, LABEL, draws=Upwards())
    assert len(seen) == num_steps + 1 == int(found.num_forwards_N)
    return seen


def step_sizes_of(objective, *, num_steps, monkeypatch, **options):
    sizes, original = [], APGD._move

    def watched(apgd, rows, *, momentum):
        sizes.append(float(rows.step_size) / EPSILON)
        return original(apgd, rows, momentum=momentum)

    monkeypatch.setattr(APGD, "_move", watched)
    apgd = APGD(threat=THREATS["linf"], objective=objective, num_steps=num_steps, **options)
    apgd.search(never_fooled, PIXEL, LABEL, draws=Upwards())
    return sizes


def test_apgd_judges_its_step_after_22_41_57_70_80_87_93_and_99_steps(monkeypatch):
    sizes = step_sizes_of(flat_objective(-1.0, slope=-1), num_steps=100, monkeypatch=monkeypatch)
    halved_after = [step for step in range(1, 100) if sizes[step] < sizes[step - 1]]
    assert halved_after == [22, 41, 57, 70, 80, 87, 93, 99]
    assert sizes[0] == 2
    assert sizes[-1] == 2 / 2**8


@pytest.mark.parametrize(
    ("num_steps", "expected"), [(20, [4, 7, 9, 10]), (50, [11, 21, 30, 38, 45]), (4, [1, 2, 3])]
)
def test_apgd_windows_shrink_with_the_number_of_steps(num_steps, expected, monkeypatch):
    flat = flat_objective(-1.0, slope=-1)
    sizes = step_sizes_of(flat, num_steps=num_steps, monkeypatch=monkeypatch)
    halved_after = [step for step in range(1, num_steps) if sizes[step] < sizes[step - 1]]
    assert halved_after[: len(expected)] == expected


def test_apgd_keeps_its_step_while_it_improves(monkeypatch):
    calls = iter(range(1_000))

    def rising(logits_NK, y_N):
        return next(calls) + 0 * logits_NK[:, 0]

    sizes = step_sizes_of(rising, num_steps=100, monkeypatch=monkeypatch)
    assert sizes == [2.0] * 100


@pytest.mark.parametrize(("rho", "last_size"), [(0.4, 2.0), (0.6, 2 / 2**8)])
def test_apgd_halves_where_too_small_a_share_of_steps_improves(rho, last_size, monkeypatch):
    calls = iter(range(1_000))

    def zigzag(logits_NK, y_N):
        number = next(calls)
        return (number if number % 2 else -number) + 0 * logits_NK[:, 0]

    sizes = step_sizes_of(zigzag, num_steps=100, monkeypatch=monkeypatch, rho=rho)
    assert sizes[-1] == last_size


def test_apgd_counts_the_first_improvement_against_zero(monkeypatch):
    positive = step_sizes_of(flat_objective(1.0, slope=-1), num_steps=4, monkeypatch=monkeypatch)
    assert positive == [2, 2, 1, 0.5]
    negative = step_sizes_of(flat_objective(-1.0, slope=-1), num_steps=4, monkeypatch=monkeypatch)
    assert negative == [2, 1, 0.5, 0.25]


def test_apgd_halves_where_the_best_has_not_risen_since_an_unhalved_judgement(monkeypatch):
    values = iter([100.0, *range(1, 1_000)])

    def climbing_below_the_start(logits_NK, y_N):
        return next(values) + 0 * logits_NK[:, 0]

    sizes = step_sizes_of(climbing_below_the_start, num_steps=100, monkeypatch=monkeypatch)
    halved_after = [step for step in range(1, 100) if sizes[step] < sizes[step - 1]]
    assert halved_after == [41, 70, 87, 99]  # every second judgement; the first has none before


def test_apgd_momentum_continues_the_last_move_with_a_quarter():
    calls = iter([-1, 1, 1])

    def turning(logits_NK, y_N):
        return next(calls) * logits_NK[:, 0]

    start, first, second = points_of(turning, num_steps=2)
    assert start == pytest.approx(0.5 + EPSILON)
    assert first == pytest.approx(0.5 - EPSILON)  # the whole first step, of twice epsilon
    assert second == pytest.approx(first + 0.75 * 2 * EPSILON + 0.25 * (first - start))


def test_apgd_goes_back_to_the_best_point_when_it_halves():
    start, first, second, third, fourth = points_of(flat_objective(-1.0, slope=-1), num_steps=4)
    assert first == pytest.approx(start - 2 * EPSILON)
    assert second == pytest.approx(start - 0.75 * EPSILON)  # halved, and no inertia is left
    assert third == pytest.approx(start - 0.75 * EPSILON / 2)
    assert fourth == pytest.approx(start - 0.75 * EPSILON / 4)


def test_apgd_returns_the_best_point_and_not_the_last():
    """Step 50 is the best, and step 100 comes after the last judgement, which goes back to it."""
    calls, seen = iter(range(1_000)), []

    def objective(logits_NK, y_N):
        number = next(calls)
        slope_N = logits_NK[:, 0] if number % 2 else -logits_NK[:, 0]
        return -abs(number - 50) + slope_N - slope_N.detach()

    def watched(x_NCHW):
        seen.append(x_NCHW.detach().clone())
        return never_fooled(x_NCHW)

    apgd = APGD(threat=THREATS["linf"], objective=objective, num_steps=100)
    found = apgd.search(watched, PIXEL, LABEL, draws=Upwards())
    assert torch.equal(found.x_adv_NCHW, seen[50])
    assert not torch.equal(seen[100], seen[50])
    assert not found.is_fooled_N.any()


@both_norms
def test_apgd_starts_on_the_sphere_and_in_the_box(norm):
    x = torch.full((8, 3, 5, 5), 0.5)
    x[4:] = 1
    apgd = APGD(threat=THREATS[norm], num_steps=0)
    start = apgd.search(lambda x: x.flatten(1)[:, :2], x, x[:, 0, 0, 0].long(), draws=keyed(x))
    distance = THREATS[norm].length(start.x_adv_NCHW - x)
    assert_close(distance[:4], torch.full((4,), EPSILON))
    assert float(start.x_adv_NCHW.max()) == 1
    assert len({tuple(change.flatten().tolist()) for change in start.x_adv_NCHW[:4] - x[:4]}) == 4


def keyed(x_NCHW):
    return KeyedDraws(keys_N=torch.arange(len(x_NCHW)) * 7_919 + 3)


@pytest.fixture(scope="module")
def curved():
    """A random network in float64, images, and the labels that it gives them."""
    generator = torch.Generator().manual_seed(2)
    first = torch.randn(48, 32, generator=generator).double() / 3
    second = torch.randn(32, 5, generator=generator).double()
    x = torch.rand(24, 3, 4, 4, generator=generator).double()

    def model(x_NCHW):
        return torch.tanh((x_NCHW.flatten(1) - 0.5) @ first) @ second

    return model, x, model(x).argmax(dim=1)


def search(curved, *, norm="linf", epsilon_pixels=0.02, **options):
    model, x, y = curved
    threat = replace(THREATS[norm], epsilon_pixels=epsilon_pixels)
    return APGD(threat=threat, num_steps=20, **options).search(model, x, y, draws=keyed(x))


@both_norms
@pytest.mark.parametrize("objective", [cross_entropy, dlr, margin])
def test_apgd_leaving_changes_no_other_row(objective, norm, curved):
    epsilon_pixels = {"linf": 0.02, "l2": 0.1}[norm]
    options = {"objective": objective, "norm": norm, "epsilon_pixels": epsilon_pixels}
    leaving = search(curved, **options)
    staying = search(curved, **options, leaves_when_fooled=False)
    is_fooled = leaving.is_fooled_N
    assert 3 < int(is_fooled.sum()) < 21
    assert torch.equal(is_fooled, staying.is_fooled_N)
    assert_close(leaving.x_adv_NCHW[~is_fooled], staying.x_adv_NCHW[~is_fooled], rtol=0, atol=1e-9)
    assert (leaving.num_forwards_N[~is_fooled] == 21).all()
    assert (leaving.num_forwards_N[is_fooled] < 21).all()
    assert (staying.num_forwards_N == 21).all()


def test_apgd_that_stays_returns_the_last_fooling_point(curved):
    model, x, y = curved
    seen = []

    def watched(x_NCHW):
        logits_NK = model(x_NCHW)
        seen.append((x_NCHW.detach().clone(), logits_NK.detach().argmax(dim=1) != y))
        return logits_NK

    found = search((watched, x, y), leaves_when_fooled=False)
    expected = x.clone()
    for points, is_wrong in seen:
        expected[is_wrong] = points[is_wrong]
    assert torch.equal(found.x_adv_NCHW[found.is_fooled_N], expected[found.is_fooled_N])


def test_apgd_rows_of_one_owner_leave_together(curved):
    model, x, y = curved
    owner = torch.arange(len(x)).repeat_interleave(2)
    pairs = torch.stack([y[owner], (y[owner] + 1 + torch.arange(2).repeat(len(x))) % 5], dim=1)
    apgd = APGD(
        threat=replace(THREATS["linf"], epsilon_pixels=0.02), objective=targeted_dlr, num_steps=20
    )
    found = apgd.search_targets(
        model, x[owner], pairs, owner_N=owner, draws=keyed(x[owner]), judge=by_logits
    )
    is_fooled, forwards = found.is_fooled_N.view(-1, 2), found.num_forwards_N.view(-1, 2)
    assert torch.equal(forwards[:, 0], forwards[:, 1])
    assert (forwards[is_fooled.any(dim=1), 0] < 21).any()
    assert (forwards[~is_fooled.any(dim=1), 0] == 21).all()
    assert (is_fooled.sum(dim=1) == 1).any()  # one row took the other along


def test_apgd_point_that_the_judge_refuses_does_not_end_the_search(curved):
    model, x, y = curved
    asked = []

    def refuse(x_MCHW, logits_MK, y_M):
        asked.append(len(y_M))
        assert (logits_MK.argmax(dim=1) != y_M).all()
        return torch.zeros_like(y_M, dtype=torch.bool)

    apgd = APGD(threat=replace(THREATS["linf"], epsilon_pixels=0.02), num_steps=20)
    found = apgd.search(model, x, y, draws=keyed(x), judge=refuse)
    assert not found.is_fooled_N.any()
    assert (found.num_forwards_N == 21).all()
    assert len(asked) > 10


@both_norms
@pytest.mark.parametrize("kind", ["hidden", "constant"])
def test_apgd_without_a_gradient_stays_at_its_start(norm, kind):
    x = torch.full((3, 3, 4, 4), 0.5)
    models = {
        "hidden": lambda x: never_fooled(x.detach()),
        "constant": lambda x: torch.tensor([[1.0, 0.0]]).expand(len(x), 2) + 0 * x.sum(),
    }
    y = torch.zeros(3, dtype=torch.int64)
    apgd = APGD(threat=THREATS[norm], num_steps=5)
    found = apgd.search(models[kind], x, y, draws=keyed(x))
    start = replace(apgd, num_steps=0).search(models[kind], x, y, draws=keyed(x))
    assert torch.equal(found.x_adv_NCHW, start.x_adv_NCHW)
    assert not found.is_fooled_N.any()
    assert found.num_backwards_N.tolist() == [6, 6, 6]


def test_apgd_takes_an_answer_that_is_not_a_number_as_wrong():
    x = torch.full((2, 1, 4, 4), 0.5)
    apgd = APGD(threat=THREATS["linf"], num_steps=5)
    found = apgd.search(lambda x: never_fooled(x) * torch.nan, x, LABEL.expand(2), draws=keyed(x))
    assert found.is_fooled_N.all()
    assert found.num_forwards_N.tolist() == [1, 1]
    assert THREATS["linf"].contains(found.x_adv_NCHW, x).all()
