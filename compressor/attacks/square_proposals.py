"""What the Square attack tries: where it starts, and the squares that it changes afterwards.

Source: Andriushchenko et al., "Square Attack: a query-efficient black-box adversarial attack via
random search", ECCV 2020, algorithms 2 and 3, with the schedule and the order of random numbers
of the released AutoAttack.

M samples, C channels, P pixels of an image counted along its rows, S of them in a window. Where
all samples share their draws, windows and bumps have one row instead of M.
"""

import bisect
import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from compressor.attacks.draws import Draws
from compressor.threat import Norm, ThreatModel

_HALVE_AFTER_ITERATIONS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
_NUM_TILES_ACROSS = 5
_TINY = 1e-12  # keeps a window without change at 0; the value of the released AutoAttack


@dataclass(frozen=True, kw_only=True)
class Window:
    """A square on an image; where exactly is drawn for each sample."""

    side_pixels: int
    height_pixels: int
    width_pixels: int
    reaches_edge: bool

    def place(self, u_M2: Tensor) -> Tensor:
        """The pixels of the window at a random place, int64 [M, 1, S].

        Args:
            u_M2: uniform numbers in [0, 1) for the row and the column of the upper left corner.
        """
        num_excluded = self.side_pixels - int(self.reaches_edge)
        top_M = (u_M2[:, 0] * (self.height_pixels - num_excluded)).long()
        left_M = (u_M2[:, 1] * (self.width_pixels - num_excluded)).long()
        steps = torch.arange(self.side_pixels, device=u_M2.device)
        window_S = (steps[:, None] * self.width_pixels + steps).flatten()
        return (top_M * self.width_pixels + left_M)[:, None, None] + window_S


def window_side_pixels(
    norm: Norm, *, iteration: int, p_init: float, height_pixels: int, width_pixels: int
) -> int:
    """Side of the window, whose area is about a fraction p of the image; p falls with time.

    The iterations after which p halves do not move with the number of queries, as in the released
    AutoAttack. In L2 the side is at least 3, and odd unless it is that of the image.
    """
    p = p_init / 2 ** bisect.bisect_left(_HALVE_AFTER_ITERATIONS, iteration)
    side = round(math.sqrt(p * height_pixels * width_pixels))
    side = max(side, 1) if norm == "linf" else max(side, 3) // 2 * 2 + 1
    return min(side, height_pixels, width_pixels)


def vertical_stripes(x_MCHW: Tensor, *, threat: ThreatModel, draws: Draws) -> Tensor:
    """Start in Linf: every column of every channel up or down by epsilon."""
    _, num_channels, _, width = x_MCHW.shape
    sign = _signs(draws.uniform([num_channels, 1, width])).to(x_MCHW.dtype)
    return (x_MCHW + threat.epsilon_pixels * sign).clamp(0, 1)


def recolour_window(
    x_MCHW: Tensor, best_MCHW: Tensor, *, threat: ThreatModel, window: Window, draws: Draws
) -> Tensor:
    """Next point in Linf: each channel of one window goes to one face of the ball."""
    num_samples, num_channels, height, width = x_MCHW.shape
    u = draws.common_uniform([2 + num_channels])
    pixels = window.place(u[:, :2]).expand(num_samples, num_channels, -1)
    best_MCP = best_MCHW.flatten(2)
    change = 2 * threat.epsilon_pixels * _signs(u[:, 2:, None]).to(x_MCHW.dtype)
    moved_MCS = best_MCP.gather(2, pixels) + change
    new_MCS = threat.project(moved_MCS, x_MCHW.flatten(2).gather(2, pixels))
    return best_MCP.scatter(2, pixels, new_MCS).view(-1, num_channels, height, width)


def tiled_bumps(x_MCHW: Tensor, *, threat: ThreatModel, draws: Draws) -> Tensor:
    """Start in L2: bumps side by side, together epsilon long, each with a sign per channel.

    As in the released code, the height alone gives the side of a tile and the place of the
    first, and the last may stick out. That code then fails unless a tile is one pixel; here a
    tile is cut off at the edge. It also fails below 5 pixels, and starts from the image itself
    where a tile is wider than it; here a tile has a pixel at least, and at most the whole width.
    """
    num_channels, height, width = x_MCHW.shape[1:]
    side = max(min(height // _NUM_TILES_ACROSS, width), 1)
    first = height % _NUM_TILES_ACROSS // 2 if height >= _NUM_TILES_ACROSS else 0
    change = torch.zeros_like(x_MCHW)
    for i in range(height // side):
        for j in range(width // side):
            top, left = first + i * side, first + j * side
            bump = _bumps(draws.common_uniform([1]), side, x_MCHW).view(-1, 1, side, side)
            tile = bump * _signs(draws.uniform([num_channels, 1, 1])).to(x_MCHW.dtype)
            place = change[:, :, top : top + side, left : left + side]
            place += tile[:, :, : place.shape[2], : place.shape[3]]
    return (x_MCHW + threat.epsilon_pixels * threat.steepest(change)).clamp(0, 1)


def move_change(
    x_MCHW: Tensor, best_MCHW: Tensor, *, threat: ThreatModel, window: Window, draws: Draws
) -> Tensor:
    """Next point in L2: the change in a second window goes to the first, as one more bump there.

    What clipping to [0, 1] left unused of epsilon goes there too. The whole is made epsilon long
    again, then clipped.
    """
    num_samples, num_channels = x_MCHW.shape[:2]
    u = draws.common_uniform([5])
    sign_MC1 = _signs(draws.uniform([num_channels, 1])).to(x_MCHW.dtype)
    to_M1S, from_M1S = window.place(u[:, :2]), window.place(u[:, 2:4])
    to_MCS = to_M1S.expand(num_samples, num_channels, -1)
    from_MCS = from_M1S.expand(num_samples, num_channels, -1)

    change = best_MCHW - x_MCHW
    change_MCP = change.flatten(2)  # a view
    is_inside = torch.zeros_like(change_MCP[:, :1])
    is_inside.scatter_(2, to_MCS[:, :1], 1.0).scatter_(2, from_MCS[:, :1], 1.0)
    squares_MCP = change_MCP**2  # roots that are squared again round as the released code does
    whole_M11 = squares_MCP.flatten(1).sum(dim=1).sqrt().view(-1, 1, 1)
    inside_MC1 = (squares_MCP * is_inside).sum(dim=2, keepdim=True).sqrt()
    epsilon_M11 = torch.full_like(whole_M11, threat.epsilon_pixels)
    unused_M11 = (epsilon_M11**2 - whole_M11**2).clamp(min=0)
    length_MC1 = (unused_M11 / num_channels + inside_MC1**2).sqrt()

    old_MCS = change_MCP.gather(2, to_MCS)
    new_MCS = _bumps(u[:, 4:], window.side_pixels, x_MCHW) * sign_MC1
    new_MCS = new_MCS + old_MCS / (_TINY + _length(old_MCS))
    new_MCS = new_MCS / (_TINY + _length(new_MCS)) * length_MC1
    change_MCP.scatter_(2, from_MCS, 0.0).scatter_(2, to_MCS, new_MCS)
    return threat.steepest(change).mul_(threat.epsilon_pixels).add_(x_MCHW).clamp_(0, 1)


def _signs(u: Tensor) -> Tensor:
    return (2 * u - 1).sign()


def _length(change_MCS: Tensor) -> Tensor:
    """L2 norm within each channel, [M, C, 1]."""
    return (change_MCS**2).sum(dim=2, keepdim=True).sqrt()


def _bumps(u_M1: Tensor, side: int, like: Tensor) -> Tensor:
    """A bump above its opposite or to the left of it, by the toss of a coin; [M, 1, S]."""
    both_2S = _both_bumps(side, like.dtype, like.device)
    return both_2S[(u_M1 > 0.5).long()]


@lru_cache(maxsize=64)
def _both_bumps(side: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    upper = _half_bump(side // 2, side, dtype=dtype)
    lower = _half_bump(side - side // 2, side, dtype=dtype)
    bump = torch.cat([upper, -lower])
    bump = bump / (bump**2).sum().sqrt()
    return torch.stack([bump.flatten(), bump.T.flatten()]).to(device)


def _half_bump(height: int, width: int, *, dtype: torch.dtype) -> Tensor:
    """1 + 1/4 + 1/9 + ... in the middle, one term less with each pixel outwards; length 1."""
    rows_H1 = (torch.arange(height) - height // 2).abs()[:, None]
    columns_W = (torch.arange(width) - width // 2).abs()
    distance_HW = torch.maximum(rows_H1, columns_W)
    bump = torch.zeros(height, width, dtype=dtype)
    for n in range(max(height, width) // 2 + 1):
        bump += (distance_HW <= n) * (1 / (n + 1) ** 2)
    return bump / (bump**2).sum().sqrt()
