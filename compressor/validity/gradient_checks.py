"""Second tier of the validity checks: whether there is a gradient for attacks to follow.

N images, M of them answered correctly, C channels, H and W pixels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.attacks.gradients import input_gradient
from compressor.attacks.protocol import Model
from compressor.attacks.search import by_logits
from compressor.losses import cross_entropy, margin
from compressor.randomness import uniform
from compressor.reports.report import ValidityRow
from compressor.validity.check import Check

NUM_IMAGES = 128
NOISE_PIXELS = 0.001
MAX_FRACTION = 0.01
PERCENTILES = (5, 50, 95)

FINITE_GRADIENTS = Check(
    name="finite_gradients",
    threshold="alarm above 0",
    advice="A gradient that is not a number leads nowhere, so attacks fail where the model does "
    "not hold. Look for a square root, a logarithm or a division at 0.",
)
ZERO_GRADIENT = Check(
    name="zero_gradient",
    threshold=f"alarm above {100 * MAX_FRACTION:g} %",
    advice="The margin does not change with the image as far as gradients can tell: rounding, a "
    "step function or a detached layer hides them. Replace that layer by a differentiable one in "
    "the attacked model, or attack with one.",
)
SATURATED_LOSS = Check(
    name="saturated_loss",
    threshold=f"alarm above {100 * MAX_FRACTION:g} %",
    advice="Logits are so large that cross-entropy is flat in float32, as after distilling at a "
    "temperature. Attacks on cross-entropy stand still; divide the logits by a constant.",
)
GRADIENT_CHECKS = (FINITE_GRADIENTS, ZERO_GRADIENT, SATURATED_LOSS)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Gradients:
    """Of one loss with respect to each image."""

    is_finite_M: Tensor
    is_zero_M: Tensor
    length_l1_M: Tensor

    @classmethod
    def of(cls, gradient_MCHW: Tensor) -> "_Gradients":
        flat = gradient_MCHW.flatten(1)
        return cls(
            is_finite_M=flat.isfinite().all(dim=1),
            is_zero_M=(flat == 0).all(dim=1),
            length_l1_M=flat.abs().sum(dim=1, dtype=torch.float64),
        )

    def percentiles(self) -> str:
        levels = torch.tensor(PERCENTILES, dtype=torch.float64, device=self.length_l1_M.device)
        values = torch.quantile(self.length_l1_M, levels / 100).tolist()
        return ", ".join(f"{value:.2g}" for value in values)


def gradient_checks(
    model: Model, x_NCHW: Tensor, y_N: Tensor, *, keys_N: Tensor
) -> list[ValidityRow]:
    """The rows of `GRADIENT_CHECKS`, at points next to the first correctly answered images.

    The points are moved by at most 0.001, off the kinks that grey levels may sit on.
    """
    with torch.no_grad():
        is_correct_N = ~by_logits(x_NCHW, model(x_NCHW), y_N)
    index_M = is_correct_N.nonzero()[:NUM_IMAGES, 0]
    if not len(index_M):
        return [check.not_run("no image is answered correctly") for check in GRADIENT_CHECKS]
    x, y = x_NCHW[index_M], y_N[index_M]
    noise = 2 * uniform(keys_N[index_M], stream=0, shape=x.shape[1:]).to(x.dtype) - 1
    point = (x + NOISE_PIXELS * noise).clamp(0, 1)
    by_margin = _Gradients.of(input_gradient(model, point, y, objective=margin))
    by_entropy = _Gradients.of(input_gradient(model, point, y, objective=cross_entropy))
    num_bad = int((~(by_margin.is_finite_M & by_entropy.is_finite_M)).sum())
    finite = FINITE_GRADIENTS.judged(
        f"{num_bad} of {len(x)} images have a gradient that is not finite", is_alarm=num_bad > 0
    )
    if num_bad:
        reason = f"explained by {FINITE_GRADIENTS.name}"
        return [finite, ZERO_GRADIENT.not_run(reason), SATURATED_LOSS.not_run(reason)]
    return [finite, _judge_zero(by_margin), _judge_saturated(by_margin, by_entropy)]


def _judge_zero(by_margin: _Gradients) -> ValidityRow:
    num_zero, num_total = int(by_margin.is_zero_M.sum()), len(by_margin.is_zero_M)
    return ZERO_GRADIENT.judged(
        f"the margin's gradient is exactly 0 for {num_zero} of {num_total} images",
        is_alarm=num_zero > MAX_FRACTION * num_total,
    )


def _judge_saturated(by_margin: _Gradients, by_entropy: _Gradients) -> ValidityRow:
    is_flat_M = by_entropy.is_zero_M & ~by_margin.is_zero_M
    num_flat, num_total = int(is_flat_M.sum()), len(is_flat_M)
    levels = ", ".join(map(str, PERCENTILES))
    return SATURATED_LOSS.judged(
        f"only cross-entropy's gradient is exactly 0 for {num_flat} of {num_total} images; L1 "
        f"norms at percentiles {levels}: cross-entropy {by_entropy.percentiles()}, margin "
        f"{by_margin.percentiles()}",
        is_alarm=num_flat > MAX_FRACTION * num_total,
    )
