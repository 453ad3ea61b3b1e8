"""Claim: what an evaluation says about a model, with all that is needed to doubt it.

N images, C channels, H and W pixels, K classes, D features.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum

import torch
from torch import Tensor

from compressor.attacks.draws import KeyedDraws
from compressor.attacks.protocol import Model
from compressor.attacks.search import Search, by_logits
from compressor.randomness import child_keys
from compressor.threat import ThreatModel


class Purpose(IntEnum):
    """Which random numbers of an image a check takes; a cascade takes those of small numbers."""

    GRADIENTS = 1001
    NOISE = 1002
    FIRST_SEARCH = 1003
    SECOND_SEARCH = 1004
    UNCONSTRAINED = 1005
    ATTACK = 1006
    TRANSFER = 1007
    ACTIVE_TEST = 1008


@dataclass(frozen=True, kw_only=True, eq=False)
class Claim:
    """That `model` answers these images correctly within `threat`, but for those broken."""

    model: Model
    """In float32 and differentiable."""
    x_NCHW: Tensor
    """Float32 images in [0, 1]; a random part of those attacked."""
    y_N: Tensor
    keys_N: Tensor
    threat: ThreatModel
    attack: Search
    """The strongest white-box search of the evaluation, as it was run."""
    num_steps: int
    """Of that search."""
    broken_by_white_box_N: Tensor | None
    """bool [N]: which correctly answered images the white-box attacks broke, all of them together;
    None unless the evaluation has run them."""
    broken_by_square_N: Tensor | None = None
    """bool [N]: which images the Square attack broke; it may have tried only those left over."""
    teachers: Mapping[str, Model] = field(default_factory=dict)
    """Models by name, from which adversarial images may transfer."""
    features: Model | None = None
    """Images -> what the last linear layer of the model is given [N, D], if there is one."""

    def first(self, num_images: int) -> "Claim":
        """The same about the first images."""
        part = slice(num_images)
        white_box, square = self.broken_by_white_box_N, self.broken_by_square_N
        return Claim(
            model=self.model,
            x_NCHW=self.x_NCHW[part],
            y_N=self.y_N[part],
            keys_N=self.keys_N[part],
            threat=self.threat,
            attack=self.attack,
            num_steps=self.num_steps,
            broken_by_white_box_N=None if white_box is None else white_box[part],
            broken_by_square_N=None if square is None else square[part],
            teachers=self.teachers,
            features=self.features,
        )

    def is_correct(self) -> Tensor:
        """Which images are answered correctly without an attack, bool [N]."""
        with torch.no_grad():
            return ~by_logits(self.x_NCHW, self.model(self.x_NCHW), self.y_N)

    def keys(self, purpose: Purpose) -> Tensor:
        """Keys of the images for one purpose, int64 [N]."""
        return child_keys(self.keys_N, purpose)

    def draws(self, purpose: Purpose, index_M: Tensor) -> KeyedDraws:
        """Draws of some of the images for one purpose."""
        return KeyedDraws(keys_N=self.keys(purpose)[index_M])
