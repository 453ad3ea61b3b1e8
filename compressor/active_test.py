"""The active test: on this very model, can the attack find what is known to be there?

N images, P points around each, M points in a batch, C channels, H and W pixels, D features.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compressor.attacks.draws import Draws, KeyedDraws
from compressor.attacks.protocol import Model
from compressor.attacks.search import Search, by_logits
from compressor.check import SIGNIFICANCE, Check, binomial_tail
from compressor.origins import Origins, distinct
from compressor.randomness import child_keys
from compressor.report import ValidityRow
from compressor.threat import ThreatModel

NUM_IMAGES = 32
NUM_INNER = 200
NUM_BORDER = 8
"""Candidates per image for the point that is there to be found."""
CLOSENESS = 0.9
"""Where the hyperplane lies between the innermost (0) and the border point (1)."""
SHRINKAGE = 0.1
MIN_FOUND = 0.95
MAX_RANDOM = 0.5
BATCH_SIZE = 256

ACTIVE_TEST = Check(
    name="active_test",
    threshold=f"alarm if the share found is below {MIN_FOUND:.0%} with p < {SIGNIFICANCE:.0%}",
    advice="On the features of this very model, every image was given an adversarial image in the "
    "ball, and the attack missed some. What it did not break says nothing. Look for hidden "
    "gradients, a step size too small, or too few steps.",
)


@dataclass(frozen=True, kw_only=True, eq=False)
class PlantedModel:
    """A two-class model in which every image has an adversarial image: [M, C, H, W] -> [M, 2].

    Class 0 is what lies around the image, class 1 what lies beyond its hyperplane.
    """

    features: Model
    origins: Origins
    weight_ND: Tensor
    bias_N: Tensor

    def __call__(self, x_MCHW: Tensor) -> Tensor:
        """Logits."""
        places_M = self.origins.of(x_MCHW)
        features_MD = self.features(x_MCHW)
        score_M = (features_MD * self.weight_ND[places_M]).sum(dim=1) + self.bias_N[places_M]
        return torch.stack([-score_M / 2, score_M / 2], dim=1)


def border_points(x_NCHW: Tensor, threat: ThreatModel, draws: Draws) -> Tensor:
    """Random corners of the ball (linf) or points of its sphere (l2), then cut to [0, 1]."""
    direction = threat.steepest(draws.normal(x_NCHW.shape[1:]).to(x_NCHW.dtype))
    return (x_NCHW + threat.epsilon_pixels * direction).clamp(0, 1)


@torch.no_grad()
def plant(features: Model, x_NCHW: Tensor, *, threat: ThreatModel, keys_N: Tensor, num_inner=NUM_INNER, shrinkage=SHRINKAGE, closeness=CLOSENESS,num_border=NUM_BORDER):
    draws = KeyedDraws(keys_N=keys_N)
    inner_NPD = [features(x_NCHW)] + [features(_inner_points(x_NCHW, threat, draws)) for _ in range(num_inner)]
    inner_NPD = torch.stack(inner_NPD, dim=1).double()
    border_NBD = torch.stack([features(border_points(x_NCHW, threat, draws)) for _ in range(num_border)], dim=1).double()
    mean_N1D = inner_NPD.mean(dim=1, keepdim=True)
    inner_NPD = inner_NPD - mean_N1D; border_NBD=border_NBD-mean_N1D
    cov = inner_NPD.mT @ inner_NPD / inner_NPD.shape[1]
    D = cov.shape[-1]
    var = cov.diagonal(dim1=1,dim2=2).mean(1)
    cov = (1-shrinkage)*cov + shrinkage*var[:,None,None]*torch.eye(D) + 1e-30*torch.eye(D)
    w_NDB = torch.linalg.solve(cov, border_NBD.mT)
    inner_NPB = inner_NPD @ w_NDB
    border_NB = (border_NBD * w_NDB.mT).sum(-1)
    sd = inner_NPB.std(1)
    top_NB = inner_NPB.amax(1)
    gap_NB = (border_NB - top_NB)/sd
    best = gap_NB.argmax(1)
    n=torch.arange(len(x_NCHW))
    w = w_NDB[n,:,best]/sd[n,best][:,None]
    edge = (top_NB[n,best] + closeness*(border_NB-top_NB)[n,best])/sd[n,best]
    bias = -edge - (w*mean_N1D[:,0]).sum(1)
    return w.float(), bias.float(), gap_NB[n,best], edge

def _inner_points(x_NCHW, threat, draws):
    if threat.norm == "linf":
        change = 2*draws.uniform(x_NCHW.shape[1:])-1
    else:
        change = threat.steepest(draws.normal(x_NCHW.shape[1:]))*draws.uniform((1,1,1))
    return (x_NCHW + threat.epsilon_pixels*change).clamp(0,1)
