"""Where a search takes its random numbers from.

`KeyedDraws` gives each sample numbers of its own, so its result does not depend on the batch it
is in. `GeneratorDraws` draws as the released AutoAttack does, from one generator on the CPU for
the whole batch, so that the numbers are the same as its.

N samples.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from compressor import randomness

_BRANCHES = -1  # no draw has this number


class Draws(Protocol):
    """A sequence of random draws for N samples."""

    def uniform(self, shape: Sequence[int]) -> Tensor:
        """Uniform in [0, 1), float32 [N, *shape]."""

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Standard normal, float32 [N, *shape]."""

    def common_uniform(self, shape: Sequence[int]) -> Tensor:
        """Uniform in [0, 1), float32 [N or 1, *shape]; where 1, all samples share the draw."""

    def rows(self, index_M: Tensor) -> "Draws":
        """The same sequence, going on for these samples only."""

    def branch(self, index_M: Tensor, number_M: Tensor) -> "Draws":
        """For each of these samples, the sequence with this number."""


@dataclass(kw_only=True)
class KeyedDraws:
    """Every sample draws by its own key; see `compressor.randomness`."""

    keys_N: Tensor
    num_drawn: int = 0

    def uniform(self, shape: Sequence[int]) -> Tensor:
        """See `Draws`."""
        return randomness.uniform(self._next_keys(), stream=0, shape=shape)

    def normal(self, shape: Sequence[int]) -> Tensor:
        """See `Draws`."""
        return randomness.normal(self._next_keys(), stream=0, shape=shape)

    def common_uniform(self, shape: Sequence[int]) -> Tensor:
        """Each sample's own."""
        return self.uniform(shape)

    def rows(self, index_M: Tensor) -> "KeyedDraws":
        """See `Draws`."""
        return KeyedDraws(keys_N=self.keys_N[index_M], num_drawn=self.num_drawn)

    def branch(self, index_M: Tensor, number_M: Tensor) -> "KeyedDraws":
        """New sequences, independent of this one and of how far it has come."""
        keys_N = randomness.child_keys(self.keys_N, _BRANCHES)
        return KeyedDraws(keys_N=randomness.child_keys(keys_N[index_M], number_M))

    def _next_keys(self) -> Tensor:
        self.num_drawn += 1
        return randomness.child_keys(self.keys_N, self.num_drawn)


@dataclass(kw_only=True)
class GeneratorDraws:
    """One CPU generator for all samples, as in the released AutoAttack."""

    generator: torch.Generator
    num_samples: int
    device: torch.device

    def uniform(self, shape: Sequence[int]) -> Tensor:
        """See `Draws`."""
        return torch.rand([self.num_samples, *shape], generator=self.generator).to(self.device)

    def normal(self, shape: Sequence[int]) -> Tensor:
        """See `Draws`."""
        return torch.randn([self.num_samples, *shape], generator=self.generator).to(self.device)

    def common_uniform(self, shape: Sequence[int]) -> Tensor:
        """One draw for all samples."""
        size = [1, *shape]
        return torch.rand(math.prod(shape), generator=self.generator).view(size).to(self.device)

    def rows(self, index_M: Tensor) -> "GeneratorDraws":
        """See `Draws`."""
        return GeneratorDraws(
            generator=self.generator, num_samples=len(index_M), device=self.device
        )

    def branch(self, index_M: Tensor, number_M: Tensor) -> "GeneratorDraws":
        """One generator has one sequence."""
        del number_M
        return self.rows(index_M)


def seeded_draws(seed: int, like_NCHW: Tensor) -> GeneratorDraws:
    """Draws for the samples of a batch from a generator of their own; nothing global changes."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return GeneratorDraws(generator=generator, num_samples=len(like_NCHW), device=like_NCHW.device)
