"""Orders whose beginnings are like the whole: of equal shares, or of the shares of the classes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compressor.sample_order import balanced_order, proportional_order

LABELS = st.lists(st.integers(0, 5), min_size=1, max_size=60).map(torch.tensor)
SEEDS = st.integers(0, 2**31)


def draws_for(labels_N, seed):
    return torch.rand(len(labels_N), generator=torch.Generator().manual_seed(seed))


def pairs_for(labels_N, seed):
    return torch.rand(len(labels_N), 2, generator=torch.Generator().manual_seed(seed))


ORDERS = [
    lambda labels_N, seed: balanced_order(labels_N, draws_for(labels_N, seed)),
    lambda labels_N, seed: proportional_order(labels_N, pairs_for(labels_N, seed)),
]


def counts_of_beginnings(labels_N, order_N):
    """Images of each class among the first n + 1, [N, K]."""
    return torch.nn.functional.one_hot(labels_N[order_N]).cumsum(0)


@pytest.mark.parametrize("order", ORDERS)
@given(labels_N=LABELS, seed=SEEDS)
def test_every_image_comes_once(order, labels_N, seed):
    order_N = order(labels_N, seed)
    assert sorted(order_N.tolist()) == list(range(len(labels_N)))


@given(labels_N=LABELS, seed=SEEDS)
def test_balanced_beginnings_have_equally_many_of_each_class(labels_N, seed):
    """As long as a class has any left."""
    order_N = balanced_order(labels_N, draws_for(labels_N, seed))
    total_K = torch.bincount(labels_N)
    for count_K in counts_of_beginnings(labels_N, order_N):
        unfinished = count_K[count_K < total_K]
        assert not len(unfinished) or int(count_K.max() - unfinished.min()) <= 1


@given(labels_N=LABELS, seed=SEEDS)
def test_proportional_beginnings_have_the_shares_of_the_whole(labels_N, seed):
    """Each class lags or leads by less than one image, counted at the share it has reached."""
    order_N = proportional_order(labels_N, pairs_for(labels_N, seed))
    total_K = torch.bincount(labels_N).double()
    present_K = total_K > 0
    for count_K in counts_of_beginnings(labels_N, order_N).double():
        lowest = ((count_K[present_K] - 1) / total_K[present_K]).max()
        highest = ((count_K[present_K] + 1) / total_K[present_K]).min()
        assert float(lowest) < float(highest) + 1e-9


@pytest.mark.parametrize(
    ("sizes", "num_images"),
    [((600, 100, 100, 100, 100), 100), ((900, 50, 50), 10), ((40, *9 * (4,)), 10)],
)
def test_proportional_beginnings_prefer_no_class_on_average(sizes, num_images):
    """Also where a class has less than one image in a beginning."""
    labels_N = torch.cat([torch.full((size,), label) for label, size in enumerate(sizes)])
    num_of_first = 0
    for seed in range(1000):
        order_N = proportional_order(labels_N, pairs_for(labels_N, seed))
        num_of_first += int((labels_N[order_N[:num_images]] == 0).sum())
    fair = num_images * sizes[0] / sum(sizes)
    assert num_of_first / 1000 == pytest.approx(fair, abs=0.05)


def test_proportional_chunks_of_the_real_kind():
    """Of 1,000 images with shares 5, 3 and 2 tenths, chunks of 50 hold 25, 15 and 10, +-2."""
    labels_N = torch.tensor([0] * 500 + [1] * 300 + [2] * 200)
    order_N = proportional_order(labels_N, pairs_for(labels_N, 0))
    for chunk in torch.split(labels_N[order_N], 50):
        assert (torch.bincount(chunk) - torch.tensor([25, 15, 10])).abs().max() <= 2


@pytest.mark.parametrize("order", ORDERS)
def test_draws_decide_alone(order):
    labels_N = torch.arange(60) % 4
    one, same, other = (order(labels_N, seed) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("order", ORDERS)
def test_any_image_may_come_first(order):
    """Or a beginning would say nothing about the images that always come last."""
    labels_N = torch.tensor([0, 0, 0, 1, 1, 1])
    firsts = {int(order(labels_N, seed)[0]) for seed in range(100)}
    assert firsts == set(range(6))
