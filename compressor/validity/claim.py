"""Claim: what an evaluation says about a model, with all that is needed to doubt it.

N images, M of them chosen, C channels, H and W pixels, K classes, D features.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum

import torch
from torch import Tensor

from compressor.attacks.draws import KeyedDraws
from compressor.attacks.protocol import Model
from compressor.attacks.search import Search, by_logits
from compressor.randomness import child_keys
from compressor.threat import ThreatModel


class Purpose(IntEnum):
    """Which random numbers of an image a check takes; the attacks of a cascade take small ones."""

    GRADIENTS = 1001
    NOISE = 1002
    FIRST_SEARCH = 1003
    SECOND_SEARCH = 1004
    ATTACK = 1005
    TRANSFER = 1006
    UNCONSTRAINED = 1007
    ACTIVE_TEST = 1008
    TWIN_NOISE = 1009
    TWIN_ATTACK = 1010


@dataclass(frozen=True, kw_only=True, eq=False)
class Claim:
    """That `model` answers these images correctly everywhere within `threat`, but for those broken.

    All images are taken for a random part of those that were attacked.
    """

    model: Model
    """In float32 and differentiable; the function that attacks followed."""
    x_NCHW: Tensor
    y_N: Tensor
    keys_N: Tensor
    threat: ThreatModel
    attack: Search
    """The strongest white-box search of the evaluation, as it was run."""
    num_steps: int
    """Of that search."""
    broken_by_white_box_N: Tensor | None
    """bool [N], broken by any white-box attack; None if they were not run as they have to be."""
    tried_by_white_box_N: Tensor | None = None
    """bool [N], False where a transferred image broke it before; None if all were tried."""
    broken_by_square_N: Tensor | None = None
    """bool [N], broken by the Square attack, which may have tried only what others left."""
    broken_by_transfer_N: Tensor | None = None
    """bool [N], broken by images made on other networks, tried after all white-box attacks."""
    teachers: Mapping[str, Model] = field(default_factory=dict)
    """Models by name, from which adversarial images may transfer."""
    features: Model | None = None
    """Images -> what the last linear layer of the model is given [N, D], if there is one."""
    file: Model | None = None
    """What answers in the end, if `model` was only followed in its place."""
    is_twin: bool = False
    """Whether `model` is the differentiable twin of the file, and not its source."""

    def select(self, index_M: Tensor) -> "Claim":
        """The same about some of the images."""

        def part(flags_N: Tensor | None) -> Tensor | None:
            return None if flags_N is None else flags_N[index_M]

        return replace(
            self,
            x_NCHW=self.x_NCHW[index_M],
            y_N=self.y_N[index_M],
            keys_N=self.keys_N[index_M],
            broken_by_white_box_N=part(self.broken_by_white_box_N),
            tried_by_white_box_N=part(self.tried_by_white_box_N),
            broken_by_square_N=part(self.broken_by_square_N),
            broken_by_transfer_N=part(self.broken_by_transfer_N),
        )

    def correct(self) -> "Claim":
        """The same about the images that are answered correctly without an attack."""
        return self.select((~self.fooled_by(self.x_NCHW)).nonzero()[:, 0])

    def tried(self) -> "Claim":
        """The same about the images that the white-box attacks have tried."""
        tried_N = self.tried_by_white_box_N
        return self if tried_N is None else self.select(tried_N.nonzero()[:, 0])

    @torch.no_grad()
    def fooled_by(self, x_adv_NCHW: Tensor) -> Tensor:
        """Whether the model answers wrongly at one point per image, bool [N]."""
        return by_logits(x_adv_NCHW, self.model(x_adv_NCHW), self.y_N)

    def draws(self, purpose: Purpose) -> KeyedDraws:
        """Random numbers for one purpose, each image's own."""
        return KeyedDraws(keys_N=child_keys(self.keys_N, purpose))
