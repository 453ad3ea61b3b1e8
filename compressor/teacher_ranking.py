"""How good teachers are, and how far images that fool one of them fool the others.

N images, M of them attacked, C channels, H and W pixels, K classes, T teachers.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from compressor.attacks.apgd import APGD
from compressor.attacks.draws import KeyedDraws
from compressor.data import Batch
from compressor.randomness import child_keys
from compressor.teacher import Teacher
from compressor.teacher_check import refuse_not_finite
from compressor.threat import ThreatModel

_OBSERVE_EVERY_SECONDS = 0.2
_PURPOSE = 31
"""Of the random numbers; the attacks of `verify` have others."""
_FORWARDS_OF_A_STEP = 3
"""A backward pass takes about as long as two forward passes."""


@dataclass(frozen=True, kw_only=True)
class RankingProgress:
    """How far the measurement has come."""

    doing: str
    done_fraction: float
    left_seconds: float | None
    """None while nothing is known about speed."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """What every teacher answered, image by image; teachers in the order given."""

    has_gradient_T: tuple[bool, ...]
    """Others could not be attacked: their rows below are all False."""
    is_right_TN: Tensor
    """bool: on the clean image."""
    was_fooled_TN: Tensor
    """bool: right on the clean image, and wrong on some iterate of its own attack."""
    falls_TTN: Tensor
    """bool [from, to, N]: the first was right on the clean image, and the second is wrong on the
    image that was made on the first."""
    clean_entropy_nats_T: tuple[float, ...]
    """Mean over all images."""
    adversarial_entropy_nats_T: tuple[float | None, ...]
    """Mean over all images, each attacked where the teacher was right and clean where it was
    wrong anyway."""
    forward_ms_T: tuple[float, ...]
    """Per image, of the clean pass in batches."""

    def standing(self) -> Tensor:
        """Right, and fooled neither by its own attack nor by images made on others; bool [T, N]."""
        return self.is_right_TN & ~self.was_fooled_TN & ~self.falls_TTN.any(dim=0)


def measure_teachers(
    teachers: Sequence[Teacher],
    batches: Sequence[Batch],
    *,
    threat: ThreatModel,
    num_steps: int,
    observe: Callable[[RankingProgress], None] = lambda _: None,
) -> Measured:
    """Ask every teacher, attack it where it is right, and show the result to all others.

    The image made from each image is the last iterate that fooled, or, where none did, the one of
    the highest cross-entropy. (That the last and the highest one transfer alike was measured on
    four networks: at most 1 of 190 images differ.) Random starts are the same for all teachers.

    Args:
        teachers: `answer` of each is asked, in float32.
        batches: the images, on the device of the teachers.
        threat: what the attacker may do.
        num_steps: of APGD on the cross-entropy.
        observe: told several times a second.

    Raises:
        TeacherError: if an answer is not finite.
    """
    clean = [_answer_clean(teacher, batches, observe) for teacher in teachers]
    meter = _Meter(clean, num_steps=num_steps, observe=observe)
    attack = APGD(threat=threat, num_steps=num_steps, leaves_when_fooled=False)
    measurement = _Measurement(teachers=teachers, attack=attack, meter=meter)
    attacked = []
    for place, found in enumerate(clean):
        parts = torch.split(found.is_right_N, [len(batch.y_N) for batch in batches])
        attacked.append(
            _joined(
                [
                    measurement.attack_on(place, batch, is_right_B)
                    for batch, is_right_B in zip(batches, parts, strict=True)
                ]
            )
        )
    return Measured(
        has_gradient_T=tuple(teacher.network is not None for teacher in teachers),
        is_right_TN=torch.stack([found.is_right_N for found in clean]),
        was_fooled_TN=torch.stack([found.was_fooled_N for found in attacked]),
        falls_TTN=torch.stack([found.falls_TN for found in attacked]),
        clean_entropy_nats_T=tuple(found.entropy_nats for found in clean),
        adversarial_entropy_nats_T=tuple(found.mean_entropy_nats for found in attacked),
        forward_ms_T=tuple(found.forward_ms for found in clean),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Clean:
    name: str
    is_attacked: bool
    is_right_N: Tensor
    entropy_nats: float
    forward_ms: float


@dataclass(frozen=True, kw_only=True, eq=False)
class _Attacked:
    """Of some images; empty entropies where there is no gradient."""

    was_fooled_N: Tensor
    falls_TN: Tensor
    entropy_nats_N: Tensor

    @property
    def mean_entropy_nats(self) -> float | None:
        return float(self.entropy_nats_N.mean()) if len(self.entropy_nats_N) else None


class _Meter:
    """Adds up passes, each weighted by the time that the teacher took for the clean images."""

    def __init__(
        self,
        clean: Sequence[_Clean],
        *,
        num_steps: int,
        observe: Callable[[RankingProgress], None],
    ) -> None:
        self._ms = [found.forward_ms for found in clean]
        self._names = [found.name for found in clean]
        num_right = [int(found.is_right_N.sum()) * found.is_attacked for found in clean]
        per_attack = _FORWARDS_OF_A_STEP * (num_steps + 1)
        steps_ms = sum(n * per_attack * ms for n, ms in zip(num_right, self._ms, strict=True))
        self._total_ms = steps_ms + sum(num_right) * sum(self._ms) or 1.0
        self._done_ms, self._observe = 0.0, observe
        self._began_at = time.monotonic()
        self._told_at = 0.0

    def tick(self, place: int, *, num_forwards: int, doing: str) -> None:
        """A teacher has answered so many images, or done as much work."""
        self._done_ms += num_forwards * self._ms[place]
        now = time.monotonic()
        if now - self._told_at < _OBSERVE_EVERY_SECONDS:
            return
        self._told_at = now
        fraction = min(self._done_ms / self._total_ms, 1.0)
        left = (now - self._began_at) * (1 - fraction) / fraction if fraction else None
        self._observe(
            RankingProgress(
                doing=f"{doing} {self._names[place]}", done_fraction=fraction, left_seconds=left
            )
        )


def _answer_clean(
    teacher: Teacher, batches: Sequence[Batch], observe: Callable[[RankingProgress], None]
) -> _Clean:
    observe(RankingProgress(doing=f"asking {teacher.name}", done_fraction=0.0, left_seconds=None))
    teacher.logits(batches[0].x_NCHW).cpu()  # the first time is slower, and not counted
    began_at = time.perf_counter()
    logits_NK = torch.cat([teacher.logits(batch.x_NCHW).cpu() for batch in batches])
    spent_seconds = time.perf_counter() - began_at
    refuse_not_finite(teacher, logits_NK, kind="clean")
    y_N = torch.cat([batch.y_N for batch in batches]).cpu()
    return _Clean(
        name=teacher.name,
        is_attacked=teacher.network is not None,
        is_right_N=logits_NK.argmax(dim=1) == y_N,
        entropy_nats=float(_entropy_nats(logits_NK).mean()),
        forward_ms=1000 * spent_seconds / len(y_N),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Measurement:
    teachers: Sequence[Teacher]
    attack: APGD
    meter: _Meter

    def attack_on(self, place: int, batch: Batch, is_right_N: Tensor) -> _Attacked:
        """Images made on one teacher where it is right, and what all answer to these."""
        falls_TN = torch.zeros(len(self.teachers), len(is_right_N), dtype=torch.bool)
        if self.teachers[place].network is None:
            return _Attacked(
                was_fooled_N=falls_TN[place], falls_TN=falls_TN, entropy_nats_N=torch.empty(0)
            )
        rows_M = is_right_N.nonzero()[:, 0]
        x_adv_NCHW, falls_TN[place] = self._search(place, batch, rows_M)
        own_NK = self.teachers[place].logits(x_adv_NCHW).cpu()
        refuse_not_finite(self.teachers[place], own_NK, kind="adversarial")
        x_adv_MCHW, y_M = x_adv_NCHW[rows_M.to(x_adv_NCHW.device)], batch.y_N.cpu()[rows_M]
        for other in range(len(self.teachers)):
            if other != place and len(rows_M):
                falls_TN[other, rows_M] = self._answers(other, x_adv_MCHW) != y_M
        return _Attacked(
            was_fooled_N=falls_TN[place],
            falls_TN=falls_TN,
            entropy_nats_N=_entropy_nats(own_NK),
        )

    def _search(self, place: int, batch: Batch, rows_M: Tensor) -> tuple[Tensor, Tensor]:
        """All images, those in `rows_M` attacked; and which of all were fooled, on the CPU."""
        teacher, rows = self.teachers[place], rows_M.to(batch.y_N.device)
        x_adv_NCHW, was_fooled_N = (
            batch.x_NCHW.clone(),
            torch.zeros(len(batch.y_N), dtype=torch.bool),
        )
        if len(rows) == 0:
            return x_adv_NCHW, was_fooled_N

        def model(x_MCHW: Tensor) -> Tensor:
            num_forwards = _FORWARDS_OF_A_STEP * len(x_MCHW)
            self.meter.tick(place, num_forwards=num_forwards, doing="attacking")
            return teacher.answer(x_MCHW)

        keys_M = child_keys(batch.keys_N[rows], _PURPOSE)
        found = self.attack.search(
            model, batch.x_NCHW[rows], batch.y_N[rows], draws=KeyedDraws(keys_N=keys_M)
        )
        x_adv_NCHW[rows] = found.x_adv_NCHW
        was_fooled_N[rows_M] = found.is_fooled_N.cpu()
        return x_adv_NCHW, was_fooled_N

    def _answers(self, place: int, x_MCHW: Tensor) -> Tensor:
        logits_MK = self.teachers[place].logits(x_MCHW).cpu()
        refuse_not_finite(self.teachers[place], logits_MK, kind="adversarial")
        self.meter.tick(place, num_forwards=len(x_MCHW), doing="showing the images to")
        return logits_MK.argmax(dim=1)


def _joined(parts: Sequence[_Attacked]) -> _Attacked:
    return _Attacked(
        was_fooled_N=torch.cat([part.was_fooled_N for part in parts]),
        falls_TN=torch.cat([part.falls_TN for part in parts], dim=1),
        entropy_nats_N=torch.cat([part.entropy_nats_N for part in parts]),
    )


def _entropy_nats(logits_NK: Tensor) -> Tensor:
    """Entropy of the softmax in float64, [N]."""
    log_p_NK = F.log_softmax(logits_NK.double(), dim=1)
    return -(log_p_NK.exp() * log_p_NK).sum(dim=1)
