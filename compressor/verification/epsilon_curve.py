"""Accuracy within growing radii: whether robustness fades as it should, and where it ends.

N images.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from compressor.attacks.apgd import APGD
from compressor.attacks.draws import KeyedDraws
from compressor.attacks.search import by_logits
from compressor.data import Batch
from compressor.losses import dlr
from compressor.proportions import Proportion
from compressor.randomness import child_keys
from compressor.reports.consistency import WRONG_CLEAN
from compressor.reports.report import Count, CurvePoint
from compressor.threat import ThreatModel
from compressor.verification.cascade import Subject
from compressor.verification.samples import Sample

RADII_OVER_EPSILON = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0)
NUM_STEPS = 50


def accuracy_curve(
    subject: Subject, batch: Batch, samples: Sequence[Sample], *, threat: ThreatModel
) -> tuple[CurvePoint, ...]:
    """Points of the curve, from clean to four times epsilon; it never rises.

    At epsilon itself it is what the whole cascade found; elsewhere APGD on the logit ratio tries
    what no smaller radius has broken, so there the curve is a looser upper bound.

    Args:
        subject: the model.
        batch: the images of `samples`, in the same order.
        samples: what the cascade found.
        threat: its norm and epsilon.
    """
    device = batch.y_N.device
    broken_by_cascade_N = torch.tensor([s.broken_by is not None for s in samples], device=device)
    standing_N = torch.tensor([s.broken_by != WRONG_CLEAN for s in samples], device=device)
    points = []
    for number, ratio in enumerate(RADII_OVER_EPSILON):
        radius = replace(threat, epsilon_pixels=ratio * threat.epsilon_pixels)
        if ratio >= 1:
            standing_N &= ~broken_by_cascade_N
        if ratio not in (0.0, 1.0):
            standing_N &= ~_broken(subject, batch, standing_N, threat=radius, number=number)
        proportion = Proportion(num_correct=int(standing_N.sum()), num_total=len(samples))
        points.append(
            CurvePoint(epsilon_pixels=radius.epsilon_pixels, accuracy=Count.of(proportion))
        )
    return tuple(points)


def _broken(
    subject: Subject, batch: Batch, standing_N: Tensor, *, threat: ThreatModel, number: int
) -> Tensor:
    broken_N = torch.zeros_like(standing_N)
    rows_M = standing_N.nonzero()[:, 0]
    if len(rows_M):
        x, y = batch.x_NCHW[rows_M], batch.y_N[rows_M]
        keys = child_keys(batch.keys_N[rows_M], _CURVE + number)
        attack = APGD(threat=threat, objective=dlr, num_steps=NUM_STEPS)
        found = attack.search(subject.search_dtype, x, y, draws=KeyedDraws(keys_N=keys))
        with torch.no_grad():
            logits_MK = subject.answer(found.x_adv_NCHW)
        broken_N[rows_M] = by_logits(found.x_adv_NCHW, logits_MK, y)
    return broken_N


_CURVE = 1000  # numbers of draws that no attack of the cascade has
