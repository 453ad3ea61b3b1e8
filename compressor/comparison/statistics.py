"""Whether two methods differ on the same images, and how much a number moves from seed to seed.

Needs no torch.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from compressor.gate.paired import p_value_of_change
from compressor.proportions import Proportion, beta_quantile

_NORMAL_95 = NormalDist().inv_cdf(0.975)
Points = tuple[int, ...]
"""What each image scored with one set of weights; for an accuracy 0 or 1."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A number over seeds."""

    mean: float
    sample_sd: float | None
    """With n - 1 in the denominator; None for one seed, which has no spread."""

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Mean and sample standard deviation.

        Raises:
            ValueError: if there is no value.
        """
        if not values:
            raise ValueError("there is nothing to take the mean of")
        mean = math.fsum(values) / len(values)
        if len(values) == 1:
            return cls(mean=mean, sample_sd=None)
        squares = math.fsum((value - mean) ** 2 for value in values)
        return cls(mean=mean, sample_sd=math.sqrt(squares / (len(values) - 1)))


@dataclass(frozen=True, kw_only=True)
class PairedTest:
    """A method minus the reference on the same images, with the weights of the same seeds."""

    num_images: int
    differences: tuple[float, ...]
    """Mean points per image, a value per seed; for an accuracy a fraction."""
    p_value: float
    """Two-sided, exact, of the images; says nothing about other seeds."""
    over_images_95: tuple[float, float]
    """Of the mean difference for these weights, the images as the sample."""
    points_per_unit: int = 1
    """That make up a difference of 1."""

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return math.fsum(self.differences) / len(self.differences)

    def over_seeds_95(self) -> tuple[float, float] | None:
        """Student's t interval of the mean difference, the seeds as the sample; None for one.

        Each difference is one of two whole numbers of points, whose rounding counts as spread: or
        two seeds that agree by chance would leave an interval of no width.
        """
        spread = Spread.of(self.differences)
        if spread.sample_sd is None:
            return None
        num, point = len(self.differences), 1 / (self.num_images * self.points_per_unit)
        sd = math.hypot(spread.sample_sd, point / math.sqrt(6))  # of two uniform roundings
        reach = _t_quantile_95(num - 1) * sd / math.sqrt(num)
        return max(-1.0, spread.mean - reach), min(1.0, spread.mean + reach)


def paired_test(
    ours: Sequence[Points], theirs: Sequence[Points], *, points_per_unit: int = 1
) -> PairedTest:
    """Compare two methods image by image.

    Each image gives one number: the sum over the seeds of what it scored with one method, minus
    the same with the other. Were the methods alike, each sign would be as likely as the other; the
    p-value is the share of all choices of signs that give a sum as far from 0 (an exact
    randomisation test). So an image counts once, however many seeds there are, and with one seed
    this is the exact test of McNemar (Psychometrika 12, 1947).

    Args:
        ours: points of each image, a sequence per seed.
        theirs: the same of the reference, the same images and seeds in the same order.
        points_per_unit: that make up a difference of 1.

    Raises:
        ValueError: if images or seeds do not correspond, or there are none.
    """
    lengths = {len(points) for points in (*ours, *theirs)}
    if len(ours) != len(theirs) or len(lengths) != 1 or lengths == {0}:
        raise ValueError(f"{len(ours)} and {len(theirs)} seeds of {sorted(lengths)} images")
    (num_images,) = lengths
    per_seed = [sum(a) - sum(b) for a, b in zip(ours, theirs, strict=True)]
    per_image = [
        sum(a) - sum(b)
        for a, b in zip(zip(*ours, strict=True), zip(*theirs, strict=True), strict=True)
    ]
    return PairedTest(
        num_images=num_images,
        differences=tuple(total / (num_images * points_per_unit) for total in per_seed),
        p_value=sign_flip_p_value(per_image),
        over_images_95=_over_images_95(per_image, points_per_unit=len(ours) * points_per_unit),
        points_per_unit=points_per_unit,
    )


def _over_images_95(differences: Sequence[int], *, points_per_unit: int) -> tuple[float, float]:
    """Normal interval of the mean, with two images more: one all better, one all worse.

    Without these two, images that all agree would leave an interval of no width. For a difference
    of two proportions this is the adjusted Wald interval of Bonett and Price (Journal of
    Educational and Behavioral Statistics 37, 2012); for sums over seeds it is ours. `PairedDrop`
    has a better one for proportions alone; points of several seeds, or of W-Robust, are none.
    """
    num = len(differences) + 2
    total = math.fsum(differences)
    mean = total / num
    squares = math.fsum(value**2 for value in differences) + 2 * points_per_unit**2
    reach = _NORMAL_95 * math.sqrt((squares / num - mean**2) / num)
    low, high = ((mean + side * reach) / points_per_unit for side in (-1, 1))
    return max(-1.0, low), min(1.0, high)


def sign_flip_p_value(differences: Sequence[int]) -> float:
    """Two-sided: the share of all choices of signs whose sum is at least as far from 0.

    Args:
        differences: one whole number per image; zeros say nothing.
    """
    observed = abs(sum(differences))
    weights = Counter(abs(value) for value in differences if value)
    if observed == 0:
        return 1.0
    if len(weights) == 1:  # one size: the binomial test, which is exact far out in the tail too
        ((size, num),) = weights.items()
        larger = (num + observed // size) // 2
        return p_value_of_change(num_broken=larger, num_fixed=num - larger)
    distribution = np.ones(1)
    for size, num in sorted(weights.items()):
        distribution = np.convolve(distribution, _signed_sums(size, num))
    centre = len(distribution) // 2
    return min(1.0, 2 * math.fsum(distribution[centre + observed :].tolist()))


def interval_at_mean(values: Sequence[Proportion]) -> tuple[float, float]:
    """A 95 % interval of the mean of several proportions of the same images.

    That of one proportion with the mean count (Clopper and Pearson), rounded outwards. Means over
    seeds vary less than one proportion does, so it is if anything too wide for these weights; what
    another seed would change is not in it.

    Raises:
        ValueError: if the numbers of images differ.
    """
    totals = {value.num_total for value in values}
    if len(totals) != 1:
        raise ValueError(f"proportions of {sorted(totals)} images have no common interval")
    (num_total,) = totals
    num_correct = sum(value.num_correct for value in values)
    low = Proportion(num_correct=num_correct // len(values), num_total=num_total)
    high = Proportion(num_correct=-(-num_correct // len(values)), num_total=num_total)
    return low.interval()[0], high.interval()[1]


def _signed_sums(size: int, num: int) -> NDArray[np.float64]:
    """Distribution of the sum of `num` terms that are +size or -size; the middle entry is 0."""
    log_total = num * math.log(2) - math.lgamma(num + 1)
    up = np.arange(num + 1)
    logs = [-math.lgamma(k + 1) - math.lgamma(num - k + 1) - log_total for k in range(num + 1)]
    sums = np.zeros(2 * num * size + 1)
    sums[2 * size * up] = np.exp(logs)
    return sums


def _t_quantile_95(degrees: int) -> float:
    """Two-sided; where T is Student's, degrees / (degrees + T^2) is Beta(degrees / 2, 1 / 2)."""
    x = beta_quantile(0.05, a=degrees / 2, b=0.5)
    return math.sqrt(degrees * (1 / x - 1))
