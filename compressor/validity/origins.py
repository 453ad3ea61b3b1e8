"""Points within a threat model: on its border, and from any point back to its clean image.

A search may drop, repeat and reorder its rows, and says nothing about it to the model. A model
that answers each image by a rule of its own, or remembers what it was asked, has to know.

N clean images, M points in a batch, C channels, H and W pixels, K classes.
"""

import torch
from torch import Tensor

from compressor.attacks.draws import Draws
from compressor.attacks.protocol import Model
from compressor.losses import margin
from compressor.threat import ThreatModel


class Origins:
    """Clean images so far apart that every point within the threat model has one origin.

    Raises:
        ValueError: if two images are within twice epsilon; `distinct` finds some that are not.
    """

    def __init__(self, x_NCHW: Tensor, threat: ThreatModel) -> None:
        if len(distinct(x_NCHW, threat)) < len(x_NCHW):
            raise ValueError(f"some of the {len(x_NCHW)} images are nearer than twice {threat}")
        self.x_NCHW, self._threat = x_NCHW, threat

    @torch.no_grad()
    def of(self, x_MCHW: Tensor) -> Tensor:
        """Place of the nearest clean image, int64 [M]."""
        return _distances(x_MCHW, self.x_NCHW, self._threat).argmin(dim=1)


class Watch:
    """Answers as `model`, and remembers the highest margin seen around each clean image.

    Points outside the threat model do not count.
    """

    def __init__(self, model: Model, x_NCHW: Tensor, y_N: Tensor, *, threat: ThreatModel) -> None:
        self._model, self._y_N, self._threat = model, y_N, threat
        self._origins = Origins(x_NCHW, threat)
        self.highest_margin_N = torch.full_like(x_NCHW[:, 0, 0, 0], -torch.inf)

    def __call__(self, x_MCHW: Tensor) -> Tensor:
        """Logits [M, K]."""
        logits_MK = self._model(x_MCHW)
        places_M = self._origins.of(x_MCHW)
        margin_M = margin(logits_MK.detach(), self._y_N[places_M])
        is_inside_M = self._threat.contains(x_MCHW.detach(), self._origins.x_NCHW[places_M])
        seen_M = margin_M.masked_fill(~is_inside_M, -torch.inf)
        self.highest_margin_N.scatter_reduce_(0, places_M, seen_M, reduce="amax")
        return logits_MK


def distinct(x_NCHW: Tensor, threat: ThreatModel) -> Tensor:
    """Places of the images farther than twice epsilon from all before them, int64."""
    is_near_NN = _distances(x_NCHW, x_NCHW, threat) <= 2.01 * threat.epsilon_pixels
    return (~is_near_NN.tril(diagonal=-1).any(dim=1)).nonzero()[:, 0]


def border_points(x_NCHW: Tensor, threat: ThreatModel, draws: Draws) -> Tensor:
    """Random corners of the ball (linf) or points of its sphere (l2), then cut to [0, 1]."""
    direction = threat.steepest(draws.normal(x_NCHW.shape[1:]).to(x_NCHW.dtype))
    return (x_NCHW + threat.epsilon_pixels * direction).clamp(0, 1)


def inner_points(x_NCHW: Tensor, threat: ThreatModel, draws: Draws) -> Tensor:
    """Uniform in the cube (linf), or at uniform distances in random directions (l2)."""
    shape = x_NCHW.shape[1:]
    if threat.norm == "linf":
        change = 2 * draws.uniform(shape) - 1
    else:
        change = draws.uniform((1, 1, 1)) * threat.steepest(draws.normal(shape))
    return (x_NCHW + threat.epsilon_pixels * change.to(x_NCHW.dtype)).clamp(0, 1)


def _distances(x_MCHW: Tensor, x_NCHW: Tensor, threat: ThreatModel) -> Tensor:
    order = torch.inf if threat.norm == "linf" else 2.0
    exact = "donot_use_mm_for_euclid_dist"
    return torch.cdist(x_MCHW.flatten(1), x_NCHW.flatten(1), p=order, compute_mode=exact)
