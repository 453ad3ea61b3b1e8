"""Random numbers that are functions of a key, not of the order in which they are drawn.

Every draw is `hash(key of the sample, stream, element)`: a counter-based generator in the
sense of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), with the
finaliser of SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014) as the hash. So the crop, the flip and the attack noise of a
sample are the same in any batch, on any device and in any process, and there is no
generator state to save. Not for cryptography.

N samples; keys are int64 tensors of shape [N].
"""

import math
from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9e3779b97f4a7c15 as a signed number
_MIX_1 = -4658895280553007687  # 0xbf58476d1ce4e5b9
_MIX_2 = -7723592293110705685  # 0x94d049bb133111eb


class Stream(IntEnum):
    """What a draw is for. Two streams of one sample are independent."""

    ORDER = 1
    CROP_ROW = 2
    CROP_COLUMN = 3
    FLIP = 4
    ATTACK_START = 5
    HOLD_OUT = 6
    SUBSET = 7
    ATTACK_RADIUS = 8
    VERIFICATION_ORDER = 9
    REPRESENTATIVES = 10
    NEXT_BATCH = 11
    CROP_AREA = 12
    CROP_ASPECT = 13


def sample_keys(index_N: Tensor, *, seed: int, epoch: int = 0) -> Tensor:
    """Keys of samples, int64 [N], on the device of `index_N` (int64 positions in the split)."""
    base = torch.full_like(index_N, seed)
    return _mix(_mix(_mix(base) + epoch) + index_N)


def child_keys(keys_N: Tensor, number: int | Tensor) -> Tensor:
    """Keys of the same samples for the `number`-th purpose, int64 [N]; independent of the others.

    For where purposes are counted (attack, target, restart, draw) instead of named. Each sample
    may have a number of its own, int64 [N].
    """
    return _mix(_mix(keys_N) + number)


def uniform(keys_N: Tensor, *, stream: int, shape: Sequence[int] = ()) -> Tensor:
    """Uniform numbers in [0, 1), float32 [N, *shape]."""
    return (_bits(keys_N, stream=stream, shape=shape) >> 40 & 0xFFFFFF).float() * 2.0**-24


def normal(keys_N: Tensor, *, stream: int, shape: Sequence[int] = ()) -> Tensor:
    """Standard normal numbers by Box and Muller, float32 [N, *shape].

    One hash serves both uniforms: its upper and its lower 24 bits.
    """
    bits = _bits(keys_N, stream=stream, shape=shape)
    radius_uniform = ((bits >> 40 & 0xFFFFFF).float() + 1) * 2.0**-24  # in (0, 1]
    angle_uniform = (bits & 0xFFFFFF).float() * 2.0**-24
    return torch.sqrt(-2 * torch.log(radius_uniform)) * torch.cos(2 * math.pi * angle_uniform)


def permutation(keys_N: Tensor) -> Tensor:
    """A random order of N items, int64 [N], from their keys."""
    return torch.argsort(_bits(keys_N, stream=Stream.ORDER, shape=()), stable=True)


def _bits(keys_N: Tensor, *, stream: int, shape: Sequence[int]) -> Tensor:
    counters = torch.arange(math.prod(shape), device=keys_N.device, dtype=torch.int64)
    streams_N = _mix(keys_N ^ (int(stream) << 48))
    return _mix(streams_N[:, None] + counters * _GOLDEN).view(-1, *shape)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ (x >> 30 & 0x3FFFFFFFF)) * _MIX_1  # the mask makes the shift logical
    x = (x ^ (x >> 27 & 0x1FFFFFFFFF)) * _MIX_2
    return x ^ (x >> 31 & 0x1FFFFFFFF)
