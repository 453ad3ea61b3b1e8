"""Random orders of samples whose beginnings are like the whole.

N samples, K classes; draws are uniform numbers in [0, 1), of each sample its own.
"""

import torch
from torch import Tensor

from compressor.randomness import Stream, sample_keys, uniform


def balanced_order(labels_N: Tensor, draws_N: Tensor) -> Tensor:
    """All positions, so ordered that any beginning of them is balanced, int64 [N].

    Each class is shuffled by the draws; then come the first images of every class, then the
    second ones, and so on.
    """
    shuffled_N = torch.argsort(draws_N, stable=True)
    grouped_N = shuffled_N[torch.argsort(labels_N[shuffled_N], stable=True)]
    counts_K = torch.bincount(labels_N)
    first_K = counts_K.cumsum(0) - counts_K
    rank_N = torch.arange(len(labels_N)) - first_K[labels_N[grouped_N]]
    # Shuffled again, so that no class is preferred where the number does not divide.
    by_draw_N = torch.argsort(draws_N[grouped_N], stable=True)
    return grouped_N[by_draw_N[torch.argsort(rank_N[by_draw_N], stable=True)]]


def proportional_order(labels_N: Tensor, draws_N2: Tensor) -> Tensor:
    """All positions, so ordered that any beginning has the class shares of the whole, int64 [N].

    Each class is shuffled by the first draw of each sample and spread evenly over the order, each
    sample shifted by its second draw. (One draw for both would put the first samples of every
    class, those with the smallest draws, too early, and rare classes would be too frequent.) So
    the images attacked before a budget ends are a stratified random sample, whose proportions
    scatter no more than those of an unstratified one (Hoeffding, "On the distribution of the
    number of successes in independent trials", Annals of Mathematical Statistics 27, 1956).
    """
    counts_K = torch.bincount(labels_N)
    shuffled_N = torch.argsort(draws_N2[:, 0], stable=True)
    grouped_N = shuffled_N[torch.argsort(labels_N[shuffled_N], stable=True)]
    first_K = counts_K.cumsum(0) - counts_K
    rank_N = torch.arange(len(labels_N), device=labels_N.device) - first_K[labels_N[grouped_N]]
    share_N = (rank_N + draws_N2[grouped_N, 1].double()) / counts_K[labels_N[grouped_N]]
    return grouped_N[torch.argsort(share_N, stable=True)]


def representative_order(labels_N: Tensor, index_N: Tensor) -> Tensor:
    """All positions, always the same, any beginning of which is like the whole, int64 [N].

    Every n-th image would do for folders with one class after the other, but not where classes
    take turns.

    Args:
        labels_N: classes, int64.
        index_N: which samples they are, int64; draws are keyed by it.
    """
    draws_N2 = uniform(sample_keys(index_N, seed=0), stream=Stream.REPRESENTATIVES, shape=(2,))
    return proportional_order(labels_N, draws_N2)
