"""What a report says twice must agree: a stranger may have raised one of the two.

Needs no torch.
"""

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from compressor.reports.report import AttackRow, Count, RobustnessReport

WRONG_CLEAN = "clean"
"""What broke an image that is answered wrongly without any attack."""
AUTOATTACK = ("apgd_ce", "apgd_t", "fab_t", "square")
"""As in `compressor.attacks.stages`, which needs torch."""


def contradictions(report: "RobustnessReport") -> Iterator[str]:
    """Every disagreement between the numbers of a report, its samples and its status."""
    samples = report.samples
    columns = (samples.index, samples.label, samples.broken_by, samples.prediction)
    if len({len(column) for column in columns}) != 1:
        yield "the columns of samples have different lengths"
        return
    yield from _of_samples(report)
    yield from _of_counts(report)
    yield from _of_attacks(report)
    yield from _of_protocol(report)
    yield from _of_status(report)
    yield from _of_artefact(report)
    yield from _of_training(report)
    yield from _of_cost(report)


def _of_samples(report: "RobustnessReport") -> Iterator[str]:
    samples, num_classes = report.samples, len(report.data.class_names)
    if len(set(samples.index)) != len(samples.index):
        yield "an image is in samples twice"
    if any(not 0 <= label < num_classes for label in samples.label):
        yield f"a label in samples is none of the {num_classes} classes"
    answers = zip(samples.broken_by, samples.prediction, strict=True)
    if any((broken_by is None) != (prediction is None) for broken_by, prediction in answers):
        yield "an image in samples is broken without a wrong answer, or stands with one"


def _of_counts(report: "RobustnessReport") -> Iterator[str]:
    num_images, broken = len(report.samples.index), Counter(report.samples.broken_by)
    yield from _unequal("clean", report.clean, num_images - broken[WRONG_CLEAN], num_images)
    if report.worst_case is not None:
        yield from _unequal("worst_case", report.worst_case, broken[None], num_images)
    rounding = report.eight_bit
    if rounding and not 0 <= rounding.num_still_fooling <= rounding.num_found:
        yield f"{rounding.num_still_fooling} of {rounding.num_found} is not a proportion"


def _of_attacks(report: "RobustnessReport") -> Iterator[str]:
    num_images, broken = len(report.samples.index), Counter(report.samples.broken_by)
    names = [WRONG_CLEAN, *(row.name for row in report.attacks)]
    if len(set(names)) != len(names):
        yield "two attacks have one name, or an attack is called clean"
    for name in sorted(str(name) for name in broken.keys() - {None, *names}):
        yield f"samples are broken by {name}, which is not among the attacks"
    num_standing = num_correct = num_images - broken[WRONG_CLEAN]
    for row in report.attacks:
        if row.num_broken != broken[row.name]:
            yield f"{row.name} broke {row.num_broken}, samples say otherwise"
        if not num_standing <= row.num_tried <= num_correct:
            yield (
                f"{row.name} tried {row.num_tried} images, where {num_standing} stood before it "
                f"and {num_correct} are right without an attack"
            )
        yield from _of_passes(row)
        num_standing -= broken[row.name]
        yield from _unequal(f"standing after {row.name}", row.standing, num_standing, num_images)
        alone = row.accuracy
        if alone and not (
            alone.num_total == num_images
            and num_standing <= alone.num_correct <= report.clean.num_correct - row.num_broken
        ):
            yield f"accuracy under {row.name} alone does not go with what it broke"


def _of_passes(row: "AttackRow") -> Iterator[str]:
    if row.num_forwards < row.num_tried:
        yield f"{row.name} tried {row.num_tried} images in {row.num_forwards} forward passes"
    if row.num_backwards < 0:
        yield f"{row.name} took {row.num_backwards} backward passes"
    if row.duration_seconds < 0:
        yield f"{row.name} took {row.duration_seconds:g} seconds"


def _of_protocol(report: "RobustnessReport") -> Iterator[str]:
    """A protocol of any other name says nothing that the rows could contradict."""
    protocol, names = report.protocol, [row.name for row in report.attacks]
    missing = [name for name in AUTOATTACK if name not in names]
    if protocol.startswith("AutoAttack") and missing:
        yield f"the protocol is {protocol!r} without {', '.join(missing)}"
    of_rows = f"worst of {', '.join(names)}" if names else "no attack"
    if protocol.startswith(("worst of", "no attack")) and protocol != of_rows:
        yield f"the protocol is {protocol!r}, the attacks are {', '.join(names) or 'none'}"


def _of_status(report: "RobustnessReport") -> Iterator[str]:
    has_alarm = any(row.status == "alarm" for row in report.validity)
    if has_alarm != (report.status == "invalid"):
        yield f"status {report.status!r} does not go with the validity checks"
    num_images, num_planned = len(report.samples.index), report.data.num_planned
    if num_images > num_planned:
        yield f"{num_images} images are in samples, {num_planned} were planned"
    if report.status == "verified" and (report.worst_case is None or num_images != num_planned):
        yield "a verified report has a worst case over all planned images"
    if report.status == "unverified" and report.worst_case is not None:
        yield "an unverified report has no worst case"
    is_white_box = any(row.kind == "white-box" for row in report.attacks)
    if report.status in ("verified", "incomplete") and report.worst_case and not is_white_box:
        yield f"a report without a white-box attack cannot be {report.status}"
    if report.status in ("verified", "incomplete") and not report.validity:
        yield f"a report without a validity check cannot be {report.status}"
    if report.duration_seconds < 0:
        yield f"the verification took {report.duration_seconds:g} seconds"


def _of_artefact(report: "RobustnessReport") -> Iterator[str]:
    facts = report.artefact
    if facts is not None and facts.gradients_are_masked and report.status != "invalid":
        yield f"a report whose gradients are masked cannot be {report.status}"


def _of_training(report: "RobustnessReport") -> Iterator[str]:
    training, content_sha256 = report.training, report.data.content_sha256
    if training is not None and training.content_sha256 == content_sha256:
        yield f"the test images are the training images (both have SHA-256 {content_sha256[:12]})"


def _of_cost(report: "RobustnessReport") -> Iterator[str]:
    for row in report.cost:
        sizes = {
            "parameters": row.num_parameters,
            "multiply-adds": row.num_multiply_adds,
            "bytes": row.num_bytes,
        }
        for what, size in sizes.items():
            if size is not None and size <= 0:
                yield f"{row.name} has {size} {what}"
        low, median, high = row.latency_low_ms, row.latency_ms, row.latency_high_ms
        if not 0 < low <= median <= high:
            yield f"{row.name} takes {median:g} ms, between {low:g} and {high:g}"


def _unequal(name: str, count: "Count", num_correct: int, num_total: int) -> Iterator[str]:
    if (count.num_correct, count.num_total) != (num_correct, num_total):
        yield (
            f"{name} is {count.num_correct} of {count.num_total}, samples say {num_correct} "
            f"of {num_total}"
        )
