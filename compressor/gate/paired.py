"""Two reports on the same images: what broke, what was fixed, and whether that can be chance.

An image stands or is broken, in the worst case over all attacks. Only images on which the two
models differ say anything about their difference (McNemar, Psychometrika 12, 1947; the exact
binomial form). Needs no torch.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from compressor.gate.sequential import LowerBound, upper_bound
from compressor.proportions import Proportion, beta_cdf
from compressor.reports.report import RobustnessReport
from compressor.threat import ThreatModel

_SIGNIFICANCE = 0.05
EPSILON_SLACK = 1e-9
"""Of radii that are the same: "8/255" and 0.031372549."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a verification is about; known before anything is attacked."""

    content_sha256: str
    class_names: tuple[str, ...]
    label_of: Mapping[int, int]
    """Position in the test images -> place of its class."""
    threat: ThreatModel
    protocol: str

    @classmethod
    def of(cls, report: RobustnessReport) -> "Asked":
        """What a report is about."""
        return cls(
            content_sha256=report.data.content_sha256,
            class_names=report.data.class_names,
            label_of=_labels(report),
            threat=ThreatModel(norm=report.norm, epsilon_pixels=report.epsilon_pixels),
            protocol=report.protocol,
        )


@dataclass(frozen=True, kw_only=True)
class BrokenImage:
    """An image that stood with the baseline and does not any more."""

    index: int
    """Position in the test images."""
    label: str
    attack: str
    """What broke it; `clean` if it is wrong without an attack."""


@dataclass(frozen=True, kw_only=True)
class ClassDrop:
    """The comparison on the images of one class."""

    label: str
    num_images: int
    num_newly_broken: int
    num_newly_fixed: int
    p_value_holm: float
    """One-sided, for a drop, corrected for the number of classes (Holm, 1979)."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A model and its baseline on the images that both reports hold."""

    baseline_name: str
    baseline_sha256: str
    num_images: int
    newly_broken: tuple[BrokenImage, ...]
    num_newly_fixed: int
    p_value_drop: float
    """One-sided: how often luck alone breaks so many of the images that differ."""
    p_value_change: float
    """Two-sided."""
    classes: tuple[ClassDrop, ...]

    @property
    def drop_fraction(self) -> float:
        """Of worst-case accuracy; negative where the model gained."""
        return (len(self.newly_broken) - self.num_newly_fixed) / self.num_images

    @property
    def has_dropped(self) -> bool:
        """Whether luck does not explain the drop, at the usual 5 %."""
        return self.p_value_drop <= _SIGNIFICANCE

    def drop_bounds(self, confidence: float, lower_bound: LowerBound) -> tuple[float, float]:
        """One-sided bounds of the drop in the population, each at `confidence`.

        Conservative: the bounds of newly broken and newly fixed share the permitted error.
        """
        broken = Proportion(num_correct=len(self.newly_broken), num_total=self.num_images)
        fixed = Proportion(num_correct=self.num_newly_fixed, num_total=self.num_images)
        side = (1 + confidence) / 2
        low = lower_bound(broken, side) - upper_bound(lower_bound, fixed, side)
        high = upper_bound(lower_bound, broken, side) - lower_bound(fixed, side)
        return low, high


def mismatch(asked: Asked, baseline: RobustnessReport) -> str | None:
    """Why a verification cannot be compared with a baseline image by image, or None."""
    before = Asked.of(baseline)
    for name, ours, theirs in (
        ("images (content_sha256)", asked.content_sha256, before.content_sha256),
        ("classes", asked.class_names, before.class_names),
        ("norm", asked.threat.norm, before.threat.norm),
        ("protocol", asked.protocol, before.protocol),
    ):
        if ours != theirs:
            return f"their {name} differ: {ours!r}, the baseline has {theirs!r}"
    epsilon, epsilon_before = asked.threat.epsilon_pixels, before.threat.epsilon_pixels
    if abs(epsilon - epsilon_before) > EPSILON_SLACK:
        return f"their epsilon_pixels differ: {epsilon!r}, the baseline has {epsilon_before!r}"
    if baseline.status in {"invalid", "unverified"}:
        return f"the baseline itself is {baseline.status}: {baseline.status_reason}"
    common = asked.label_of.keys() & before.label_of.keys()
    if not common:
        return "they have no image in common"
    if any(asked.label_of[index] != before.label_of[index] for index in common):
        return "the same images have other labels"
    return None


def compare(report: RobustnessReport, baseline: RobustnessReport) -> Comparison:
    """The images of both reports, one by one; `mismatch` must have been asked before."""
    ours, theirs, label_of = _broken_by(report), _broken_by(baseline), _labels(report)
    names = report.data.class_names
    common = [index for index in report.samples.index if index in theirs]
    broken = [i for i in common if theirs[i] is None and ours[i] is not None]
    fixed = [i for i in common if theirs[i] is not None and ours[i] is None]
    counts = [Counter(names[label_of[i]] for i in some) for some in (common, broken, fixed)]
    return Comparison(
        baseline_name=baseline.name,
        baseline_sha256=baseline.target.sha256,
        num_images=len(common),
        newly_broken=tuple(
            BrokenImage(index=i, label=names[label_of[i]], attack=str(ours[i]))
            for i in sorted(broken)
        ),
        num_newly_fixed=len(fixed),
        p_value_drop=p_value_of_drop(num_broken=len(broken), num_fixed=len(fixed)),
        p_value_change=p_value_of_change(num_broken=len(broken), num_fixed=len(fixed)),
        classes=_class_drops(*counts),
    )


def describe_comparison(comparison: Comparison) -> str:
    """For people: what broke, whether luck explains it, and in which classes it does not."""
    text = (
        f"{len(comparison.newly_broken)} newly broken and {comparison.num_newly_fixed} newly fixed "
        f"of {comparison.num_images} images; for a drop p = {comparison.p_value_drop:.2g}, for any "
        f"change p = {comparison.p_value_change:.2g} (exact McNemar test)"
    )
    dropped = [row for row in comparison.classes if row.p_value_holm <= _SIGNIFICANCE]
    if comparison.has_dropped:
        text += "; the drop is significant"
    if dropped:
        names = ", ".join(
            f"{row.label} ({row.num_newly_broken} broken, {row.num_newly_fixed} fixed of "
            f"{row.num_images}, p = {row.p_value_holm:.2g})"
            for row in dropped
        )
        text += f"; significant after Holm's correction in {names}"
    return text


def p_value_of_drop(*, num_broken: int, num_fixed: int) -> float:
    """P(at least so many of those that differ are broken), were both equally likely."""
    if num_broken == 0:
        return 1.0
    return beta_cdf(0.5, a=num_broken, b=num_fixed + 1)


def p_value_of_change(*, num_broken: int, num_fixed: int) -> float:
    """Twice the smaller tail, at most 1."""
    larger, smaller = max(num_broken, num_fixed), min(num_broken, num_fixed)
    return min(1.0, 2 * p_value_of_drop(num_broken=larger, num_fixed=smaller))


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values that may be compared with one level together.

    Source: Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal of
    Statistics 6, 1979.
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def _class_drops(
    num_images: Counter[str], broken: Counter[str], fixed: Counter[str]
) -> tuple[ClassDrop, ...]:
    labels = sorted(num_images)
    p_values = holm([p_value_of_drop(num_broken=broken[y], num_fixed=fixed[y]) for y in labels])
    return tuple(
        ClassDrop(
            label=label,
            num_images=num_images[label],
            num_newly_broken=broken[label],
            num_newly_fixed=fixed[label],
            p_value_holm=p_value,
        )
        for label, p_value in zip(labels, p_values, strict=True)
    )


def _labels(report: RobustnessReport) -> Mapping[int, int]:
    return dict(zip(report.samples.index, report.samples.label, strict=True))


def _broken_by(report: RobustnessReport) -> Mapping[int, str | None]:
    return dict(zip(report.samples.index, report.samples.broken_by, strict=True))
