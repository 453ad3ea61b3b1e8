"""GalleryEntry: an adversarial image that may be shown; each attack keeps the best of its own.

N images, K classes.
"""

import base64
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from compressor.attacks.protocol import Model
from compressor.losses import margin
from compressor.threat import ThreatModel

GALLERY_SIZE = 6
"""Images of each group."""

Group = Literal["clearest", "closest"]


@dataclass(frozen=True, kw_only=True)
class GalleryEntry:
    """An adversarial image to show, and all that is said about this very point."""

    group: Group
    """`clearest`: the point found. `closest`: the same drawn back towards the clean image."""
    place: int
    attack: str
    adv_base64: str
    """Its 8-bit values [C, H, W]."""
    prediction: int
    confidence_fraction: float
    """Of the wrong answer."""
    distance_pixels: float
    margin: float


def best_of_gallery(entries: Iterable[GalleryEntry]) -> list[GalleryEntry]:
    """The clearest by confidence in the wrong answer, then the closest by distance."""
    entries = sorted(entries, key=lambda entry: entry.place)
    clearest = [entry for entry in entries if entry.group == "clearest"]
    closest = [entry for entry in entries if entry.group == "closest"]
    clearest.sort(key=lambda entry: entry.confidence_fraction, reverse=True)
    closest.sort(key=lambda entry: entry.distance_pixels)
    return clearest[:GALLERY_SIZE] + closest[:GALLERY_SIZE]


@dataclass(frozen=True, kw_only=True, eq=False)
class FooledImages:
    """What an attack fooled, and who answered."""

    attack: str
    answer: Model
    threat: ThreatModel
    x_NCHW: Tensor
    """Clean."""
    y_N: Tensor
    places_N: Tensor

    @torch.no_grad()
    def entries(self, group: Group, x_adv_NCHW: Tensor) -> list[GalleryEntry]:
        """Of these points, one of each image, those that might be shown in the end."""
        if not len(self.y_N):
            return []
        logits_NK = self.answer(x_adv_NCHW)
        confidence_N, prediction_N = F.softmax(logits_NK, dim=1).max(dim=1)
        columns = (
            self.places_N,
            prediction_N,
            confidence_N,
            self.threat.length(x_adv_NCHW - self.x_NCHW),
            margin(logits_NK, self.y_N),
        )
        table = torch.stack([column.double() for column in columns], dim=1).tolist()
        entries = [
            GalleryEntry(
                group=group,
                place=int(place),
                attack=self.attack,
                adv_base64="",
                prediction=int(prediction),
                confidence_fraction=confidence,
                distance_pixels=distance,
                margin=margin_,
            )
            for place, prediction, confidence, distance, margin_ in table
        ]
        levels_NCHW = (x_adv_NCHW * 255).round().to(torch.uint8).cpu().contiguous().numpy()
        levels_of = dict(zip((entry.place for entry in entries), levels_NCHW, strict=True))
        return [
            replace(entry, adv_base64=base64.b64encode(levels_of[entry.place]).decode())
            for entry in best_of_gallery(entries)
        ]
