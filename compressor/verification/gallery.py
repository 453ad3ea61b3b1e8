"""Adversarial images to show: those with the clearest wrong answer, and the closest ones.

N images.
"""

import base64
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from compressor.attacks.protocol import Model
from compressor.data import Batch, TestSplit, evaluation_batches
from compressor.reports.html import GalleryImage
from compressor.verification.gallery_entry import GalleryEntry, best_of_gallery
from compressor.verification.verification import Verification, VerificationPlan, verification_order


def first_images(split: TestSplit, plan: VerificationPlan, *, num_images: int) -> Batch:
    """The images that the verification attacked first."""
    places = range(min(num_images, split.num_images))
    return _images_at(split, plan, places)


def choose_gallery(
    split: TestSplit, plan: VerificationPlan, found: Verification, *, answer: Model
) -> list[GalleryImage]:
    """The best of what the attacks kept; an image is shown at the point that broke it first."""
    broken_by = {place: sample.broken_by for place, sample in enumerate(found.samples)}
    first = [entry for entry in found.gallery if broken_by[entry.place] == entry.attack]
    chosen = best_of_gallery(first)
    if not chosen:
        return []
    batch = _images_at(split, plan, [entry.place for entry in chosen])
    with torch.no_grad():
        confidences_N = F.softmax(answer(batch.x_NCHW), dim=1).amax(dim=1).tolist()
    levels_NHWC = (batch.x_NCHW * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    images = []
    for n, entry in enumerate(chosen):
        sample = found.samples[entry.place]
        images.append(
            GalleryImage(
                group=entry.group,
                index=sample.index,
                label=sample.label,
                attack=entry.attack,
                clean_HWC=levels_NHWC[n],
                adv_HWC=_decode(entry, split.image_shape),
                clean_confidence_fraction=confidences_N[n],
                adv_confidence_fraction=entry.confidence_fraction,
                adv_prediction=entry.prediction,
                distance_pixels=entry.distance_pixels,
                margin=entry.margin,
            )
        )
    return images


def _images_at(split: TestSplit, plan: VerificationPlan, places: Sequence[int]) -> Batch:
    order_N = verification_order(split, seed=plan.seed)[list(places)]
    batches = evaluation_batches(split, batch_size=len(places), seed=plan.seed, order_N=order_N)
    return next(iter(batches))


def _decode(entry: GalleryEntry, image_shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    levels = np.frombuffer(base64.b64decode(entry.adv_base64), dtype=np.uint8)
    return levels.reshape(image_shape).transpose(1, 2, 0)
