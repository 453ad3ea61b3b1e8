"""FAB against exact distances of linear models, the released code, and its own promises."""

from copy import deepcopy

import pytest
import torch
from pyautoattack.fab_pt import FABAttack_PT
from torch.testing import assert_close

from compressor.attacks.draws import seeded_draws
from compressor.attacks.fab import FAB
from compressor.attacks.search import by_logits
from compressor.threat import ThreatModel

both_norms = pytest.mark.parametrize("norm", ["linf", "l2"])
PEER_NAMES = {"linf": "Linf", "l2": "L2"}
EPSILON_PIXELS = {"linf": 8 / 255, "l2": 0.5}
FAR = 100.0  # every point of the box is within


def attack(norm="linf", *, epsilon_pixels=None, **settings):
    epsilon_pixels = EPSILON_PIXELS[norm] if epsilon_pixels is None else epsilon_pixels
    return FAB(threat=ThreatModel(norm=norm, epsilon_pixels=epsilon_pixels), **settings)


def search(fab, model, x_NCHW, pairs_N2, *, owner_N=None, judge=by_logits):
    owner_N = torch.arange(len(x_NCHW)) if owner_N is None else owner_N
    draws = seeded_draws(0, x_NCHW)
    return fab.search_targets(model, x_NCHW, pairs_N2, owner_N=owner_N, draws=draws, judge=judge)


def pairs_of(model, x_NCHW, *, rank):
    """Each image's own class and the one at this rank of its logits, the own class being 0."""
    ranked_NK = model(x_NCHW).detach().argsort(dim=1, descending=True)
    return ranked_NK[:, [0, rank]]


class Linear:
    """Ten classes; margins grow with `gain`, and the image in the middle of the box is near."""

    def __init__(self, *, num_classes=10, image_shape=(3, 8, 8), dtype=torch.float64):
        generator = torch.Generator().manual_seed(5)
        num_pixels = torch.Size(image_shape).numel()
        self.weights_KD = torch.randn(num_classes, num_pixels, generator=generator).to(dtype)
        self.seen = []

    def __call__(self, x_NCHW):
        self.seen.append(x_NCHW.detach())
        return (x_NCHW - 0.5).flatten(1) @ self.weights_KD.T

    def distances(self, x_NCHW, pairs_N2, *, norm):
        """From each image to where its target overtakes its label; no border of the box."""
        normal_ND = self.weights_KD[pairs_N2[:, 1]] - self.weights_KD[pairs_N2[:, 0]]
        gap_N = -((x_NCHW - 0.5).flatten(1) * normal_ND).sum(1)
        return gap_N / (normal_ND.abs().sum(1) if norm == "linf" else normal_ND.norm(dim=1))


def images_near_the_middle(num_images=12, *, image_shape=(3, 8, 8), dtype=torch.float64):
    generator = torch.Generator().manual_seed(6)
    noise = torch.rand(num_images, *image_shape, generator=generator) - 0.5
    return (0.5 + 0.2 * noise).to(dtype)


def shortest_ratio(eta, num_steps, *, alpha_max=0.1, beta=0.9):
    """Distance of FAB's nearest point over the exact one, on one flat boundary without a box."""
    ratio, nearest = 0.0, float("inf")
    for _ in range(num_steps):
        missing = abs(1 - ratio)
        alpha = min(missing / (missing + 1), alpha_max)
        ratio = (1 - alpha) * (ratio + eta * (1 - ratio)) + alpha * eta
        nearest = min(nearest, ratio) if ratio > 1 else nearest
        ratio = beta * ratio if ratio > 1 else ratio
    return nearest


@both_norms
@pytest.mark.parametrize(("eta", "within"), [(1.05, 0.0055), (1.001, 0.001)])
def test_fab_finds_the_exact_distance_of_a_linear_model(norm, eta, within):
    model, x = Linear(), images_near_the_middle()
    pairs = pairs_of(model, x, rank=1)
    exact = torch.stack(
        [model.distances(x, pairs_of(model, x, rank=k), norm=norm) for k in range(1, 10)]
    )
    nearest_first = exact.argmin(dim=0) == 0  # elsewhere another class is met on the way
    assert nearest_first.sum() > 5
    fab = attack(norm, epsilon_pixels=FAR, num_steps=5, eta=eta, stops_at_epsilon=False)
    found = search(fab, model, x, pairs)
    assert found.is_fooled_N.all()
    ratio = (fab.threat.length(found.x_adv_NCHW - x) / exact[0])[nearest_first]
    assert_close(ratio, torch.full_like(ratio, shortest_ratio(eta, 5)), rtol=0, atol=1e-6)
    assert float(ratio.min()) >= 1
    assert float(ratio.max()) <= 1 + within


@both_norms
def test_fab_is_fooled_exactly_where_a_linear_model_can_be(norm):
    """FAB overshoots, so what lies less than one per cent within the radius is left open."""
    model, x = Linear(), images_near_the_middle(60)
    exact = torch.stack(
        [model.distances(x, pairs_of(model, x, rank=k), norm=norm) for k in range(1, 10)]
    )
    epsilon_pixels = float(exact.amin(0).median())
    fab = attack(norm, epsilon_pixels=epsilon_pixels, num_steps=30)
    found = [search(fab, model, x, pairs_of(model, x, rank=k)) for k in range(1, 10)]
    is_fooled = torch.stack([result.is_fooled_N for result in found]).any(0)
    assert not is_fooled[exact.amin(0) > epsilon_pixels].any()
    assert is_fooled[exact.amin(0) < 0.99 * epsilon_pixels].all()


@pytest.fixture(scope="module")
def trained(make_trained):
    network, x, y = make_trained(24)
    x[:, :, :2], x[:, :, -1:] = 0, 1  # where only the box holds a change back
    is_right = network(x).argmax(1) == y
    assert is_right.sum() > 12
    return network, x[is_right][:16]


def released(model, x_NCHW, y_N, *, norm, epsilon_pixels, rank, num_steps):
    peer = FABAttack_PT(
        model, norm=PEER_NAMES[norm], n_iter=num_steps, eps=epsilon_pixels, targeted=True
    )
    peer.target_class = rank + 1
    with torch.random.fork_rng(devices=[]):
        return peer.attack_single_run(x_NCHW, y_N, is_targeted=True)


@both_norms
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_fab_agrees_with_the_released_code(norm, rank, trained):
    network, x = trained
    pairs = pairs_of(network, x, rank=rank)
    fab = attack(norm, epsilon_pixels=FAR, stops_at_epsilon=False)
    found = search(fab, network, x, pairs)
    settings = {"norm": norm, "epsilon_pixels": FAR, "rank": rank, "num_steps": 100}
    theirs = released(deepcopy(network), x, pairs[:, 0], **settings)  # leaves gradients behind
    their_distance, distance = (fab.threat.length(z - x) for z in (theirs, found.x_adv_NCHW))
    assert torch.equal(found.is_fooled_N, their_distance > 0)
    assert found.is_fooled_N.sum() > 12
    assert_close(distance, their_distance, rtol=1e-3, atol=0)
    epsilon_pixels = float(their_distance.median()) * 1.0001
    near = attack(norm, epsilon_pixels=epsilon_pixels)
    assert torch.equal(
        search(near, network, x, pairs).is_fooled_N, their_distance <= epsilon_pixels
    )


@both_norms
def test_fab_follows_the_released_code_step_by_step(norm, trained):
    """The points at which the gradient and the label are taken, before rounding adds up.

    A step may end where a ReLU has its kink, and rounding, which differs among processors, then
    chooses between two slopes: one image may go another way.
    """
    network, x = trained
    network, pairs = deepcopy(network), pairs_of(network, x, rank=2)
    ours, theirs = [], []

    def watched(points):
        return lambda x_NCHW: points.append(x_NCHW.detach().clone()) or network(x_NCHW)

    fab = attack(norm, num_steps=4, epsilon_pixels=FAR, stops_at_epsilon=False)
    search(fab, watched(ours), x, pairs)
    settings = {"norm": norm, "epsilon_pixels": FAR, "rank": 2, "num_steps": 4}
    released(watched(theirs), x, pairs[:, 0], **settings)
    theirs = theirs[2:]  # it asks for the clean logits twice before it starts
    assert len(ours) == len(theirs) == 8
    apart_N = sum(
        ((our_point - their_point).abs() > 1e-5).flatten(1).any(dim=1)
        for our_point, their_point in zip(ours, theirs, strict=True)
    )
    assert int((apart_N > 0).sum()) <= 1, apart_N
    assert not (apart_N == len(ours)).any()  # all begin alike


@both_norms
def test_fab_points_fool_within_the_threat_model(norm, trained):
    network, x = trained
    before = x.clone()
    for rank in (1, 2, 3):
        pairs = pairs_of(network, x, rank=rank)
        fab = attack(norm, epsilon_pixels=3 * EPSILON_PIXELS[norm], num_steps=20)
        found = search(fab, network, x, pairs)
        assert found.is_fooled_N.any()
        assert fab.threat.contains(found.x_adv_NCHW, x).all()
        is_wrong = network(found.x_adv_NCHW).argmax(1) != pairs[:, 0]
        assert torch.equal(found.is_fooled_N, is_wrong)
        assert torch.equal(found.x_adv_NCHW[~is_wrong], x[~is_wrong])
    assert torch.equal(x, before)
    assert not x.requires_grad
    assert x.grad is None
    assert all(p.grad is None and p.requires_grad for p in network.parameters())


@both_norms
def test_fab_that_goes_on_finds_nearer_points(norm, trained):
    network, x = trained
    pairs = pairs_of(network, x, rank=1)
    first = search(attack(norm, epsilon_pixels=FAR), network, x, pairs)
    fab = attack(norm, epsilon_pixels=FAR, stops_at_epsilon=False)
    last = search(fab, network, x, pairs)
    assert (first.num_backwards_N < 5).all()
    assert (last.num_backwards_N == 100).all()
    first_N, last_N = (fab.threat.length(found.x_adv_NCHW - x) for found in (first, last))
    assert (last_N <= first_N).all()
    assert float((last_N / first_N).mean()) < 0.98


@pytest.mark.parametrize("num_owners", [2, 5])
def test_fab_rows_of_one_owner_leave_together_and_the_others_do_not_notice(num_owners, trained):
    network, x = trained
    network, x = deepcopy(network).double(), x[:10].double()
    pairs = torch.cat([pairs_of(network, x, rank=rank) for rank in (1, 2, 3)])
    rows = x.repeat(3, 1, 1, 1)
    owner = torch.arange(30) * 7 % num_owners
    fab = attack(epsilon_pixels=14 / 255, num_steps=15)
    alone = search(fab, network, rows, pairs)
    together = search(fab, network, rows, pairs, owner_N=owner)
    assert len(alone.num_backwards_N.unique()) > 2  # rows come to an end at several steps
    for name in range(num_owners):
        mine = owner == name
        first_end = alone.num_backwards_N[mine].min()
        assert (together.num_backwards_N[mine] == first_end).all()
        is_fooled = alone.is_fooled_N & mine & (alone.num_backwards_N == first_end)
        assert torch.equal(together.is_fooled_N[mine], is_fooled[mine])
        found, found_alone = together.x_adv_NCHW[is_fooled], alone.x_adv_NCHW[is_fooled]
        assert_close(found, found_alone, rtol=0, atol=1e-9)
        left = mine & ~is_fooled
        assert torch.equal(together.x_adv_NCHW[left], rows[left])


class Steadfast:
    """Follows every change, and answers class 0 all the same."""

    def __init__(self):
        self.num_rows, self.num_rows_with_graph = 0, 0

    def __call__(self, x_NCHW):
        self.num_rows += len(x_NCHW)
        self.num_rows_with_graph += len(x_NCHW) * torch.is_grad_enabled()
        pixels_ND = x_NCHW.flatten(1)
        return torch.stack([100 + pixels_ND.sum(1), pixels_ND[:, 0], pixels_ND[:, 1]], dim=1)


@both_norms
def test_fab_counts_every_pass_of_an_unfoolable_model(norm):
    model, x = Steadfast(), images_near_the_middle(5)
    pairs = torch.tensor([[0, 1 + row % 2] for row in range(5)])
    asked, fab = [], attack(norm, epsilon_pixels=FAR)
    found = search(fab, model, x, pairs, judge=lambda *question: asked.append(question))
    assert not asked
    assert not found.is_fooled_N.any()
    assert torch.equal(found.x_adv_NCHW, x)
    assert found.num_forwards_N.tolist() == [200] * 5
    assert found.num_backwards_N.tolist() == [100] * 5
    assert model.num_rows == 1000
    assert model.num_rows_with_graph == 500


def test_fab_counts_the_passes_that_were_made():
    model, x = Linear(), images_near_the_middle(30)
    pairs = pairs_of(model, x, rank=2)
    epsilon_pixels = float(model.distances(x, pairs, norm="linf").median())
    model.seen.clear()
    found = search(attack(epsilon_pixels=epsilon_pixels, num_steps=9), model, x, pairs)
    assert len(found.num_forwards_N.unique()) > 1
    assert int(found.num_forwards_N.sum()) == sum(len(points) for points in model.seen)
    assert torch.equal(found.num_forwards_N, 2 * found.num_backwards_N)
    assert (found.num_backwards_N[~found.is_fooled_N] == 9).all()


@both_norms
@pytest.mark.parametrize("image_shape", [(1, 6, 9), (3, 5, 4)])
@pytest.mark.parametrize("num_classes", [2, 5])
def test_fab_takes_any_shape_and_stays_in_the_box(norm, image_shape, num_classes):
    model = Linear(num_classes=num_classes, image_shape=image_shape, dtype=torch.float32)
    x = images_near_the_middle(image_shape=image_shape, dtype=torch.float32)
    x[:, :, 0], x[:, :, 1] = 0, 1
    pairs = pairs_of(model, x, rank=1)
    fab = attack(norm, epsilon_pixels=FAR, num_steps=12, stops_at_epsilon=False)
    found = search(fab, model, x, pairs)
    assert found.is_fooled_N.all()
    assert found.x_adv_NCHW.shape == x.shape
    assert found.x_adv_NCHW.dtype == torch.float32
    assert min(float(points.min()) for points in model.seen) >= 0
    assert max(float(points.max()) for points in model.seen) <= 1


def test_fab_judge_is_asked_only_about_near_wrong_answers_and_decides():
    model, x = Linear(), images_near_the_middle(20)
    pairs = pairs_of(model, x, rank=1)
    exact = model.distances(x, pairs, norm="linf")
    fab = attack(epsilon_pixels=float(exact.median()), num_steps=6)
    asked = []

    def refuse(x_MCHW, logits_MK, y_M):
        assert_close(logits_MK, model(x_MCHW))
        assert (logits_MK.argmax(1) != y_M).all()
        asked.append(x_MCHW)
        return torch.zeros_like(y_M, dtype=torch.bool)

    found = search(fab, model, x, pairs, judge=refuse)
    assert not found.is_fooled_N.any()
    assert torch.equal(found.x_adv_NCHW, x)
    assert (found.num_backwards_N == 6).all()
    assert 0 < sum(len(points) for points in asked)
    distances = [(points[:, None] - x).flatten(2).abs().amax(2).amin(1) for points in asked]
    assert float(torch.cat(distances).max()) <= fab.threat.epsilon_pixels


def test_fab_point_that_the_judge_refuses_does_not_hide_a_later_one():
    model, x = Linear(), images_near_the_middle(6)
    pairs = pairs_of(model, x, rank=1)
    answers = iter([False, False, True])

    def refuse_twice(x_MCHW, logits_MK, y_M):
        return torch.full_like(y_M, next(answers), dtype=torch.bool)

    found = search(attack(epsilon_pixels=FAR), model, x, pairs, judge=refuse_twice)
    assert found.is_fooled_N.all()
    assert (found.num_backwards_N == 3).all()
    assert (model(found.x_adv_NCHW).argmax(1) != pairs[:, 0]).all()


@both_norms
@pytest.mark.parametrize("kind", ["hidden", "zero", "infinite", "undefined"])
def test_fab_without_a_usable_gradient_finds_nothing_and_breaks_nothing(norm, kind):
    seen = []

    def model(x_NCHW):
        seen.append(x_NCHW.detach())
        logits_NK = torch.tensor([2.0, 1.0, 0.0]).expand(len(x_NCHW), 3)
        if kind == "hidden":
            return logits_NK
        slope = {"zero": 0.0, "infinite": torch.inf, "undefined": torch.nan}[kind]
        wave = x_NCHW.flatten(1).sum(1, keepdim=True)
        wave.register_hook(lambda gradient: gradient + slope) if wave.requires_grad else None
        return logits_NK + torch.tensor([0.0, 1.0, 0.0]) * (wave - wave.detach())

    x = images_near_the_middle(4, dtype=torch.float32)
    pairs = torch.tensor([[0, 2]] * 4 if kind == "zero" else [[0, 1]] * 4)
    found = search(attack(norm, num_steps=5), model, x, pairs)
    assert not found.is_fooled_N.any()
    assert torch.equal(found.x_adv_NCHW, x)
    assert len(seen) == 10
    assert all(points.isfinite().all() for points in seen)


def test_fab_takes_an_answer_that_is_not_finite_as_wrong():
    def breaks_off(x_NCHW):
        pixels_ND = x_NCHW.flatten(1)
        logits_NK = torch.stack([10 - pixels_ND.sum(1), pixels_ND[:, 0], pixels_ND[:, 1]], dim=1)
        return torch.where(pixels_ND[:, 5:6] > 0.51, torch.nan, logits_NK)

    x = torch.full((3, 1, 4, 4), 0.5)
    pairs = torch.tensor([[0, 1]] * 3)
    found = search(attack(epsilon_pixels=0.2), breaks_off, x, pairs)
    assert found.is_fooled_N.all()
    assert (found.num_backwards_N == 1).all()


def test_fab_without_rows_or_steps_asks_nothing():
    model, x = Linear(), images_near_the_middle(4)
    pairs = torch.tensor([[0, 1]] * 4)
    for found in (
        search(attack(), model, x[:0], pairs[:0]),
        search(attack(num_steps=0), model, x, pairs),
    ):
        assert not found.is_fooled_N.any()
        assert int(found.num_forwards_N.sum()) == 0
    assert not model.seen
