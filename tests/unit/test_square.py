"""The Square attack: against the released code, against linear truth, and what it keeps."""

import copy

import pytest
import torch
from pyautoattack.square import SquareAttack
from torch.testing import assert_close

from compressor.attacks.draws import KeyedDraws, seeded_draws
from compressor.attacks.search import by_logits
from compressor.attacks.square import Square
from compressor.attacks.square_proposals import Window, window_side_pixels
from compressor.losses import margin
from compressor.threat import ThreatModel

THREATS = {
    "linf": ThreatModel(norm="linf", epsilon_pixels=32 / 255),
    "l2": ThreatModel(norm="l2", epsilon_pixels=1.2),
}
REFERENCE_NORMS = {"linf": "Linf", "l2": "L2"}
both_norms = pytest.mark.parametrize("norm", THREATS)


def keyed(x_NCHW):
    return KeyedDraws(keys_N=torch.arange(len(x_NCHW)) * 7_919 + 3)


def never(x_MCHW, logits_MK, y_M):
    return torch.zeros_like(y_M, dtype=torch.bool)


def search(model, x, y, *, norm="linf", draws=None, judge=by_logits, num_queries=60, **options):
    square = Square(threat=THREATS[norm], num_queries=num_queries, **options)
    return square.search(model, x, y, draws=draws or keyed(x), judge=judge)


def random_images(num_images, *image_shape, seed=0):
    return torch.rand(num_images, *image_shape, generator=torch.Generator().manual_seed(seed))


def curved_model(image_shape, *, num_classes=6):
    """A random network with one layer of hidden units."""
    generator, num_pixels = torch.Generator().manual_seed(1), image_shape.numel()
    first = torch.randn(num_pixels, 64, generator=generator) * 6 / num_pixels**0.5
    second = torch.randn(64, num_classes, generator=generator) / 8
    return lambda x_NCHW: torch.tanh((x_NCHW.flatten(1) - 0.5) @ first) @ second


@pytest.fixture(scope="module")
def trained(make_trained):
    network, x, y = make_trained(28)
    is_right = network(x).argmax(1) == y
    return network, x[is_right], y[is_right]


def reference_points(model, x, y, *, norm, num_queries, seed):
    """What the released code reaches, and how often it asked about each image."""
    attack = SquareAttack(
        model,
        norm=REFERENCE_NORMS[norm],
        eps=THREATS[norm].epsilon_pixels,
        n_queries=num_queries,
        resc_schedule=False,
    )
    attack.init_hyperparam(x)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        num_forwards_N, x_adv = attack.attack_single_run(x.clone(), y)
    return x_adv, num_forwards_N.long()


def check_against_reference(model, x, y, *, norm, num_queries, seed=5):
    expected, num_forwards_N = reference_points(
        model, x, y, norm=norm, num_queries=num_queries, seed=seed
    )
    draws = seeded_draws(seed, x)
    options = {"num_queries": num_queries, "windows_reach_edge": False}
    result = search(model, x, y, norm=norm, draws=draws, **options)
    assert_close(result.x_adv_NCHW, expected, rtol=0, atol=1e-6)
    assert torch.equal(result.is_fooled_N, model(expected).argmax(1) != y)
    assert torch.equal(result.num_forwards_N, num_forwards_N)
    return int(result.is_fooled_N.sum())


@both_norms
@pytest.mark.parametrize("seed", [0, 5])
def test_square_is_the_released_code_on_a_trained_network(norm, seed, trained):
    network, x, y = trained
    with torch.no_grad():  # the released code asks once more with gradients
        num_fooled = check_against_reference(network, x, y, norm=norm, num_queries=150, seed=seed)
    assert 5 <= num_fooled <= len(x) - 5  # or leaving, or staying, was not compared


@both_norms
@pytest.mark.parametrize(
    "image_shape",
    [(3, 7, 7), (1, 9, 9), (3, 11, 11), (1, 13, 13), (3, 32, 32), (3, 20, 10)],
)
def test_square_is_the_released_code_at_sizes_where_that_works(norm, image_shape):
    x = random_images(8, *image_shape)
    model = curved_model(x.shape[1:])
    check_against_reference(model, x, model(x).argmax(1), norm=norm, num_queries=80)


@pytest.mark.parametrize("norm", THREATS)
def test_square_window_sides_are_those_of_the_released_code(norm):
    schedule = SquareAttack(None, p_init=0.8, resc_schedule=False)
    for iteration in [0, 10, 11, 50, 51, 200, 201, 500, 501, 1001, 2001, 4001, 6001, 8001]:
        for height, width in [(4, 4), (8, 8), (9, 31), (32, 32), (224, 224)]:
            side = round((schedule.p_selection(iteration) * height * width) ** 0.5)
            if norm == "l2":
                side = max(side, 3)
                side += side % 2 == 0
            expected = min(max(side, 1), height, width)
            size = {"height_pixels": height, "width_pixels": width}
            assert window_side_pixels(norm, iteration=iteration, p_init=0.8, **size) == expected, (
                iteration,
                height,
                width,
            )


@both_norms
@pytest.mark.parametrize("rows", [[5], [5, 2], list(range(19, -1, -1))])
def test_square_sample_does_not_depend_on_its_batch(norm, rows, trained):
    network, x, y = trained
    network, x = copy.deepcopy(network).double(), x.double()
    together = search(network, x, y, norm=norm)
    apart = search(network, x[rows], y[rows], norm=norm, draws=keyed(x).rows(torch.tensor(rows)))
    assert_close(apart.x_adv_NCHW, together.x_adv_NCHW[rows], rtol=0, atol=1e-12)
    assert torch.equal(apart.is_fooled_N, together.is_fooled_N[rows])
    assert torch.equal(apart.num_forwards_N, together.num_forwards_N[rows])


@both_norms
def test_square_leaving_does_not_change_the_other_rows(norm, trained):
    network, x, y = trained
    result = search(network, x, y, norm=norm)
    stays = ~result.is_fooled_N
    assert 0 < int(stays.sum()) < len(x)
    nobody_leaves = search(network, x, y, norm=norm, judge=never)
    assert_close(result.x_adv_NCHW[stays], nobody_leaves.x_adv_NCHW[stays], rtol=0, atol=1e-6)


@both_norms
def test_square_samples_with_keys_have_windows_of_their_own(norm):
    x = torch.full((8, 3, 8, 8), 0.5)
    seen = points_of(x, norm=norm, num_queries=1)
    changes = (seen[1] - seen[0]).flatten(1)
    assert len({tuple(change.sign().tolist()) for change in changes}) == 8


def points_of(x, **options):
    """The points that a model without preference is asked about."""
    seen = []

    def indifferent(x_NCHW):
        assert not torch.is_grad_enabled()
        seen.append(x_NCHW.clone())
        return torch.tensor([[1.0, 0.0]]).expand(len(x_NCHW), 2)

    search(indifferent, x, torch.zeros(len(x), dtype=torch.int64), **options)
    return seen


@both_norms
def test_square_unfoolable_model_is_asked_once_per_query_and_once_for_the_start(norm):
    seen = points_of(random_images(3, 3, 8, 8), norm=norm, num_queries=40)
    assert [len(x) for x in seen] == [3] * 41
    x, y = random_images(3, 3, 8, 8), torch.zeros(3, dtype=torch.int64)
    result = search(lambda x: torch.tensor([[1.0, 0.0]]).expand(len(x), 2), x, y, norm=norm)
    assert result.num_forwards_N.tolist() == [61] * 3
    assert result.num_backwards_N.tolist() == [0] * 3
    assert result.num_forwards_N.dtype == result.num_backwards_N.dtype == torch.int64
    assert not result.is_fooled_N.any()


@both_norms
def test_square_fooled_start_costs_one_pass_and_nobody_costs_none(norm):
    def model(x_NCHW):
        assert len(x_NCHW)
        return torch.tensor([[1.0, 0.0]]).expand(len(x_NCHW), 2)

    x = random_images(3, 3, 8, 8)
    result = search(model, x, torch.tensor([1, 0, 1]), norm=norm)
    assert result.num_forwards_N.tolist() == [1, 61, 1]
    assert result.is_fooled_N.tolist() == [True, False, True]
    nobody = search(model, x[:0], torch.zeros(0, dtype=torch.int64), norm=norm)
    assert nobody.x_adv_NCHW.shape == (0, 3, 8, 8)


SIZES = [(side, side) for side in range(4, 41)]
SIZES += [(96, 96), (4, 96), (96, 4), (5, 9), (9, 5), (12, 31), (31, 12), (24, 14)]


@both_norms
@pytest.mark.parametrize("num_channels", [1, 3])
def test_square_every_size_stays_inside_the_threat_model(norm, num_channels):
    for height, width in SIZES:
        x = random_images(2, num_channels, height, width).round()
        x[0] = 0.5  # far from black and white, where the clip to [0, 1] holds too
        check_points_are_allowed(x, norm)


def check_points_are_allowed(x, norm):
    linear, seen = curved_model(x.shape[1:], num_classes=2), []

    def model(x_NCHW):
        seen.append(x_NCHW.clone())
        return linear(x_NCHW)

    y = torch.zeros(len(x), dtype=torch.int64)
    result = search(model, x, y, norm=norm, judge=never, num_queries=6)
    assert len(seen) == 7
    for point in [*seen, result.x_adv_NCHW]:
        assert THREATS[norm].contains(point, x).all(), x.shape
        assert ((point - x).flatten(1) != 0).any(dim=1).all(), x.shape
    assert not all(torch.equal(point, seen[0]) for point in seen)
    start_length = float(THREATS[norm].length(seen[0] - x)[0])
    assert start_length == pytest.approx(THREATS[norm].epsilon_pixels, rel=1e-5), x.shape


@pytest.mark.parametrize(("reaches_edge", "last_offset"), [(True, 5), (False, 4)])
def test_square_window_reaches_the_edge_if_told(*, reaches_edge, last_offset):
    window = Window(side_pixels=3, height_pixels=8, width_pixels=8, reaches_edge=reaches_edge)
    u = torch.linspace(0, 1 - 2**-24, 100)
    corners = window.place(torch.cartesian_prod(u, u))[:, 0, 0]
    every_offset = torch.arange(last_offset + 1)
    assert torch.equal(corners.unique(), (every_offset[:, None] * 8 + every_offset).flatten())
    whole = Window(side_pixels=8, height_pixels=8, width_pixels=8, reaches_edge=reaches_edge)
    assert torch.equal(whole.place(torch.rand(2, 2))[1, 0], torch.arange(64))


@pytest.mark.parametrize("reaches_edge", [True, False])
@pytest.mark.parametrize("make_draws", [keyed, lambda x: seeded_draws(0, x)])
def test_square_changes_the_last_row_and_column_if_windows_reach_them(*, reaches_edge, make_draws):
    x = torch.full((2, 1, 8, 8), 0.5)
    start, *others = points_of(
        x, draws=make_draws(x), num_queries=300, windows_reach_edge=reaches_edge
    )
    is_changed_HW = torch.stack([(point != start).any(0)[0] for point in others]).any(0)
    assert is_changed_HW[:7, :7].all()
    assert bool(is_changed_HW[7].all()) == bool(is_changed_HW[:, 7].all()) == reaches_edge
    assert bool(is_changed_HW[7].any()) == bool(is_changed_HW[:, 7].any()) == reaches_edge


@both_norms
def test_square_survivor_ends_at_its_highest_margin(norm, trained):
    network, x, y = trained
    margins = []

    def model(x_NCHW):
        logits_NK = network(x_NCHW)
        margins.append(margin(logits_NK, y))
        return logits_NK

    result = search(model, x, y, norm=norm, judge=never)
    highest_N = torch.stack(margins).amax(0)
    assert (highest_N > margins[0]).all()
    assert_close(margin(network(result.x_adv_NCHW), y), highest_N, rtol=0, atol=1e-5)


@both_norms
def test_square_changes_neither_its_inputs_nor_the_output_of_the_model(norm):
    x, y = random_images(4, 3, 8, 8), torch.tensor([0, 1, 0, 1])
    output, x_before, y_before = torch.tensor([[1.0, 0.5, 0.0]] * 4), x.clone(), y.clone()
    state = torch.random.get_rng_state()
    search(lambda x: output[: len(x)], x.requires_grad_(), y, norm=norm, draws=seeded_draws(1, x))
    assert torch.equal(output, torch.tensor([[1.0, 0.5, 0.0]] * 4))
    assert torch.equal(x, x_before)
    assert torch.equal(y, y_before)
    assert torch.equal(torch.random.get_rng_state(), state)


@both_norms
def test_square_refused_candidate_goes_on(norm, trained):
    network, x, y = trained
    refused, accepted = [], []

    def strict(x_MCHW, logits_MK, y_M):
        assert (margin(logits_MK, y_M) >= 0).all()  # nobody else comes before the judge
        verdict_M = margin(logits_MK, y_M) > 0.5
        refused.extend(x_MCHW[~verdict_M])
        accepted.extend(x_MCHW[verdict_M])
        return verdict_M

    result = search(network, x, y, norm=norm, judge=strict, num_queries=150)
    is_fooled_N = result.is_fooled_N
    assert len(refused) >= 5
    assert 5 <= int(is_fooled_N.sum()) == len(accepted)
    for point in result.x_adv_NCHW[is_fooled_N]:
        assert any(torch.equal(point, other) for other in accepted)
    lenient = search(network, x, y, norm=norm, num_queries=150)
    assert (lenient.num_forwards_N <= result.num_forwards_N).all()
    assert (lenient.num_forwards_N < result.num_forwards_N)[is_fooled_N].any()


def test_square_candidate_that_is_no_improvement_is_judged_too():
    """The search model was surest at the start, but its second point is the one that fools."""
    margins, seen = iter([3.0, 1.0, 2.0]), []

    def model(x_NCHW):
        seen.append(x_NCHW.clone())
        return torch.tensor([[0.0, next(margins)]])

    result = search(
        model,
        random_images(1, 3, 8, 8),
        torch.tensor([0]),
        judge=lambda x_MCHW, logits_MK, y_M: logits_MK[:, 1] == 1,
    )
    assert result.is_fooled_N.tolist() == [True]
    assert result.num_forwards_N.tolist() == [2]
    assert torch.equal(result.x_adv_NCHW, seen[1])


def test_square_ties_are_left_to_the_judge():
    x = random_images(2, 3, 8, 8)
    result = search(lambda x: torch.zeros(len(x), 3), x, torch.tensor([0, 1]), num_queries=5)
    assert result.is_fooled_N.tolist() == [False, True]
    assert result.num_forwards_N.tolist() == [6, 1]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_square_answers_that_are_no_numbers_are_left_to_the_judge(value):
    x, y = random_images(2, 3, 8, 8), torch.tensor([0, 1])
    broken = lambda x: torch.tensor([[value, 0.0]]).expand(len(x), 2)  # noqa: E731
    assert search(broken, x, y, num_queries=5).is_fooled_N.all()
    refused = search(broken, x, y, judge=never, num_queries=5)
    assert refused.num_forwards_N.tolist() == [6, 6]
    assert THREATS["linf"].contains(refused.x_adv_NCHW, x).all()


@pytest.mark.parametrize(("norm", "dual"), [("linf", 1), ("l2", 2)])
def test_square_breaks_most_of_what_is_breakable_on_a_linear_model_and_nothing_else(norm, dual):
    generator = torch.Generator().manual_seed(2)
    weights_KD = torch.randn(10, 192, generator=generator)
    x = torch.rand(60, 3, 8, 8, generator=generator) * 0.4 + 0.3  # the box is out of reach
    logits_NK = x.flatten(1) @ weights_KD.T
    y = logits_NK.argmax(1)
    gaps_NK = logits_NK.gather(1, y[:, None]) - logits_NK
    slopes_NK = (weights_KD[y][:, None] - weights_KD).norm(p=dual, dim=2)
    distance_N = (gaps_NK / slopes_NK).scatter(1, y[:, None], torch.inf).amin(1)
    epsilon = float(distance_N.median())
    square = Square(threat=ThreatModel(norm=norm, epsilon_pixels=epsilon), num_queries=600)
    result = square.search(
        lambda x: x.flatten(1) @ weights_KD.T, x, y, draws=keyed(x), judge=by_logits
    )
    is_breakable_N = distance_N < epsilon * (1 + 1e-4)
    assert not (result.is_fooled_N & ~is_breakable_N).any()
    assert int(result.is_fooled_N.sum()) > int(is_breakable_N.sum()) / 2 > 10


@both_norms
def test_square_takes_any_callable(norm, trained):
    network, x, y = trained
    weights_DK = torch.randn(192, 4, generator=torch.Generator().manual_seed(0))
    in_torch = search(lambda x: x.flatten(1) @ weights_DK, x, y, norm=norm)
    in_numpy = search(
        lambda x: torch.from_numpy(x.flatten(1).numpy() @ weights_DK.numpy()), x, y, norm=norm
    )
    assert torch.equal(in_numpy.is_fooled_N, in_torch.is_fooled_N)
    inference = torch.inference_mode()(network.forward)
    result = search(inference, x, y, norm=norm)
    assert torch.equal(result.x_adv_NCHW, search(network, x, y, norm=norm).x_adv_NCHW)
    assert not result.x_adv_NCHW.is_inference()
    result.x_adv_NCHW.requires_grad_().sum().backward()


@both_norms
def test_square_needs_no_particular_memory_layout(norm, trained):
    network, x, y = trained
    strided = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert not strided.is_contiguous()
    assert torch.equal(
        search(network, strided, y, norm=norm).x_adv_NCHW,
        search(network, x, y, norm=norm).x_adv_NCHW,
    )
