"""From what teachers answered to counts, a recommended set and the reasons for it.

N images, T teachers in the order given; numbers are those of the ranking, from 1.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from compressor.proportions import Proportion
from compressor.reports.report import Count
from compressor.reports.teacher_ranking import ChosenTeachers, RankedTeacher, Seen, TransferCell
from compressor.teacher import Teacher
from compressor.teacher_choice import (
    MAX_SUBSETS,
    ROBUST_FLOOR,
    Evidence,
    Subset,
    choose,
    most_robust,
    robust_places,
)
from compressor.teacher_ranking import Measured

_NUM_RESAMPLES = 200
_SUSPICIOUS_SHARE = 0.05
"""Of all images: so many more fooled by images of others than by an attack of its own are odd."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Found:
    """Teachers and what they answered."""

    teachers: Sequence[Teacher]
    measured: Measured

    @cached_property
    def order(self) -> list[int]:
        """Places of the teachers by rank: the most robust first, those not attacked last."""
        standing = self.measured.standing().sum(dim=1).tolist()
        return sorted(
            range(len(self.teachers)),
            key=lambda place: (
                not self.measured.has_gradient_T[place],
                -standing[place] if self.measured.has_gradient_T[place] else 0,
                self.teachers[place].name,
            ),
        )


def ranked_teachers(
    found: Found, *, sources: Sequence[str], seen: Sequence[Seen]
) -> tuple[RankedTeacher, ...]:
    """The rows of the ranking, by rank."""
    measured, rows = found.measured, []
    standing_TN = measured.standing()
    for place in found.order:
        teacher, right_N = found.teachers[place], measured.is_right_TN[place]
        robust_N = right_N & ~measured.was_fooled_TN[place]
        is_attacked = measured.has_gradient_T[place]
        rows.append(
            RankedTeacher(
                name=teacher.name,
                source=sources[place],
                architecture="onnx" if teacher.spec is None else teacher.spec.architecture,
                sha256=teacher.sha256,
                num_parameters=teacher.num_parameters,
                clean=_share(right_N),
                robust=_share(robust_N) if is_attacked else None,
                worst_case=_share(standing_TN[place]) if is_attacked else None,
                clean_entropy_nats=measured.clean_entropy_nats_T[place],
                adversarial_entropy_nats=measured.adversarial_entropy_nats_T[place],
                forward_ms=measured.forward_ms_T[place],
                has_seen_images=seen[place],
            )
        )
    return tuple(rows)


def transfer_cells(found: Found) -> tuple[TransferCell, ...]:
    """Every pair whose first teacher was attacked, by rank."""
    measured, order = found.measured, list(enumerate(found.order, start=1))
    cells = []
    for made_on, a in order:
        if not measured.has_gradient_T[a]:
            continue
        for shown_to, b in order:
            falls_N = measured.falls_TTN[a, b]
            shared_N = measured.was_fooled_TN[a] & measured.is_right_TN[b]
            cells.append(
                TransferCell(
                    made_on=made_on,
                    shown_to=shown_to,
                    accuracy=_share_of(~falls_N, measured.is_right_TN[a]),
                    transferability=_share_of(falls_N, shared_N),
                )
            )
    return tuple(cells)


def recommend(found: Found, *, num_wanted: int, transfer_weight: float) -> ChosenTeachers | None:
    """The best set, how it was found, and how often other images would give the same."""
    evidence = _evidence(found, None)
    best = choose(evidence, num_wanted=num_wanted, transfer_weight=transfer_weight)
    strongest = most_robust(evidence, num_wanted=num_wanted)
    if best is None or strongest is None:
        return None
    generator = torch.Generator().manual_seed(0)
    num_same = 0
    for _ in range(_NUM_RESAMPLES):
        weights_N = _resample(found.measured.is_right_TN.shape[1], generator)
        again = choose(
            _evidence(found, weights_N), num_wanted=num_wanted, transfer_weight=transfer_weight
        )
        num_same += again is not None and again.places == best.places
    numbers = {place: number for number, place in enumerate(found.order, start=1)}
    return ChosenTeachers(
        numbers=tuple(sorted(numbers[place] for place in best.places)),
        num_wanted=num_wanted,
        num_robust=len(robust_places(evidence)),
        transfer_weight=transfer_weight,
        score=best.score(transfer_weight),
        mean_robust=best.mean_robust,
        mean_transferability=best.mean_transfer,
        same_choice=Count.of(Proportion(num_correct=num_same, num_total=_NUM_RESAMPLES)),
        reason=_reason(evidence, best, strongest, num_wanted=num_wanted, weight=transfer_weight),
    )


def notes_on(found: Found, *, seen: Sequence[Seen]) -> tuple[str, ...]:
    """What a reader must know of single teachers; `seen` in the order given."""
    measured, notes = found.measured, _notes_on_seen(found, seen)
    evidence = _evidence(found, None)
    best = max((value for value in evidence.robust if value is not None), default=0.0)
    fit = robust_places(evidence)
    standing_TN = measured.standing()
    for place in found.order:
        name, robust = found.teachers[place].name, evidence.robust[place]
        if robust is None:
            notes.append(
                f"{name}: an ONNX file gives no gradient, so it could not be attacked; nothing is "
                "known about its robustness, and it is not recommended as a robust teacher"
            )
            continue
        if place not in fit:
            than = f"less than half of the best ({100 * best:.1f} %)" if robust else "nothing"
            notes.append(
                f"{name}: not recommended as a robust teacher, as it keeps {100 * robust:.1f} % "
                f"under attack, {than}"
            )
        own_N = measured.is_right_TN[place] & ~measured.was_fooled_TN[place]
        num_more = int(own_N.sum() - standing_TN[place].sum())
        if num_more > _SUSPICIOUS_SHARE * len(own_N):
            notes.append(
                f"{name}: images made on other teachers fool it on {num_more} of "
                f"{int(own_N.sum())} images that its own attack left standing; its gradients may "
                "be hidden, so verify it before you trust it"
            )
    return tuple(notes)


def _notes_on_seen(found: Found, seen: Sequence[Seen]) -> list[str]:
    """Whose accuracies flatter, and whose may."""
    notes = [
        f"{found.teachers[place].name} was trained on some of these images; its accuracies flatter"
        for place in found.order
        if seen[place] == "yes"
    ]
    unknown = [found.teachers[place].name for place in found.order if seen[place] == "unknown"]
    if unknown:
        beside = "" if len(unknown) == len(seen) else " beside the others"
        notes.append(
            f"{', '.join(unknown)} may have been trained on some of these images, which files do "
            f"not say; accuracies would then flatter{beside}"
        )
    return notes


def _evidence(found: Found, weights_N: Tensor | None) -> Evidence:
    """Fractions over the images, each counted as often as its weight says."""
    measured = found.measured
    num_teachers, num_images = measured.is_right_TN.shape
    weights_N = torch.ones(num_images) if weights_N is None else weights_N
    robust_T = (measured.standing().float() @ weights_N / num_images).tolist()
    shared_TTN = measured.was_fooled_TN[:, None] & measured.is_right_TN[None, :]
    total_TT = shared_TTN.float() @ weights_N
    fooled_TT = (shared_TTN & measured.falls_TTN).float() @ weights_N
    share_TT = (fooled_TT / total_TT).tolist()  # 0 / 0 is not a number
    return Evidence(
        names=[teacher.name for teacher in found.teachers],
        robust=[
            value if measured.has_gradient_T[place] else None
            for place, value in enumerate(robust_T)
        ],
        transfer=[[None if math.isnan(value) else value for value in row] for row in share_TT],
    )


def _resample(num_images: int, generator: torch.Generator) -> Tensor:
    """How often each image is drawn, of as many draws with replacement; float [N]."""
    drawn_N = torch.randint(num_images, (num_images,), generator=generator)
    return torch.bincount(drawn_N, minlength=num_images).float()


def _reason(
    evidence: Evidence, best: Subset, strongest: Subset, *, num_wanted: int, weight: float
) -> str:
    num_fit, num_taken = len(robust_places(evidence)), len(best.places)
    if num_taken < num_wanted or num_fit == num_taken:
        few = f" ({num_wanted} were asked for)" if num_taken < num_wanted else ""
        return (
            f"No others are robust{few}, which here means at least {100 * ROBUST_FLOOR:.0f} % of "
            f"the best robust accuracy: {_means(best)}."
        )
    is_exhaustive = math.comb(num_fit, num_taken) <= MAX_SUBSETS
    how = "the one" if is_exhaustive else "the one, found by adding the best next teacher,"
    said = (
        f"Of all sets of {num_taken} among the {num_fit} robust teachers, {how} with the highest "
        f"mean robust accuracy less {weight:g} times the mean transferability: {_means(best)}."
    )
    if best.places == strongest.places:
        return f"{said} They are also the most robust {num_taken}."
    names = ", ".join(evidence.names[place] for place in strongest.places)
    return f"{said} The most robust, {names}, would have: {_means(strongest)}."


def _means(subset: Subset) -> str:
    robust = f"robust accuracy {100 * subset.mean_robust:.1f} %"
    if subset.mean_transfer is None:
        return robust
    return f"{robust}, transferability {100 * subset.mean_transfer:.1f} %"


def _share(is_so_N: Tensor) -> Count:
    return Count.of(Proportion(num_correct=int(is_so_N.sum()), num_total=len(is_so_N)))


def _share_of(is_so_N: Tensor, among_N: Tensor) -> Count | None:
    num_total = int(among_N.sum())
    if num_total == 0:
        return None
    num_correct = int((is_so_N & among_N).sum())
    return Count.of(Proportion(num_correct=num_correct, num_total=num_total))
