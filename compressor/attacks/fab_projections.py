"""The smallest change that puts a point of the box [0, 1] onto a hyperplane, for many rows.

In both norms the answer has one unknown per row. Let `gap` be what <w, t> must gain. Every
coordinate with a weight moves towards the end of the box that closes the gap, by
min(multiplier * speed, room), where `room` is its way to that end. The speed is 1 in L-infinity
and |w| in L2, by the Karush-Kuhn-Tucker conditions. What this gains is concave and piecewise
linear in the multiplier, so Newton's method from 0 never overshoots, and is exact as soon as no
further coordinate meets the border: after 3 to 8 rounds as a rule, with no sorting.

Source of the problem: Croce and Hein, "Minimally distorted adversarial examples with a fast
adaptive boundary attack", ICML 2020. They sort the coordinates by where they meet the border.
Their released L2 code also leaves coordinates with |w| < 1e-8 where they are; here only a weight
of 0 does that, so that the scale of the logits has no effect.

N rows, D coordinates; `_N1` is one column.
"""

import torch
from torch import Tensor


def project_linf(t_ND: Tensor, w_ND: Tensor, b_N: Tensor) -> Tensor:
    """The change d [N, D] of least L-infinity norm with <w, t + d> = b and 0 <= t + d <= 1.

    Args:
        t_ND: points in [0, 1].
        w_ND: normals of the hyperplanes, finite.
        b_N: offsets of the hyperplanes.

    Where the box does not reach the hyperplane, the change to its corner that comes nearest;
    coordinates of weight 0 never move.
    """
    return _project(t_ND, w_ND, b_N, speed=torch.ones_like(b_N)[:, None])


def project_l2(t_ND: Tensor, w_ND: Tensor, b_N: Tensor) -> Tensor:
    """The same in the L2 norm; see `project_linf`."""
    return _project(t_ND, w_ND, b_N, speed=w_ND.abs())


def _project(t_ND: Tensor, w_ND: Tensor, b_N: Tensor, *, speed: Tensor) -> Tensor:
    gap_N1 = (b_N - (w_ND * t_ND).sum(dim=1))[:, None]
    direction_ND = w_ND.sign() * gap_N1.sign()
    room_ND = torch.where(direction_ND > 0, 1 - t_ND, t_ND)
    multiplier_N1 = _multiplier(gap_N1.abs(), w_ND.abs(), speed=speed, room_ND=room_ND)
    return direction_ND * torch.minimum(multiplier_N1 * speed, room_ND)


def _multiplier(gap_N1: Tensor, gain_ND: Tensor, *, speed: Tensor, room_ND: Tensor) -> Tensor:
    """Smallest m with sum(gain * min(m * speed, room)) = gap; huge where there is none."""
    slope_ND, most_ND = gain_ND * speed, gain_ND * room_ND
    multiplier_N1 = torch.zeros_like(gap_N1)
    while True:
        is_free_ND = multiplier_N1 * speed < room_ND
        slope_N1 = torch.where(is_free_ND, slope_ND, 0).sum(dim=1, keepdim=True)
        stuck_N1 = torch.where(is_free_ND, 0, most_ND).sum(dim=1, keepdim=True)
        # A slope of 0 gives infinity; the largest finite number does not make 0 * m undefined.
        next_N1 = ((gap_N1 - stuck_N1) / slope_N1).nan_to_num()
        # Rounding may lower it, and that must not go on for ever.
        if not (next_N1 > multiplier_N1).any():
            return multiplier_N1
        multiplier_N1 = torch.maximum(multiplier_N1, next_N1)
