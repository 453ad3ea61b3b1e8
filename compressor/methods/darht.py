"""DARHT: distilling adversarial robustness using heterogeneous teachers.

N images, M teachers, K classes.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from compressor.attacks.protocol import Attack
from compressor.data import Batch
from compressor.losses import cross_entropy, kl_divergence
from compressor.methods.protocol import Moment, StepResult, read_back
from compressor.methods.teacher_modes import Answering, drawing_from
from compressor.randomness import Stream, uniform
from compressor.student import Student

_NUM_SEEDS = 2**24
"""As many as a uniform number of float32 has values."""


@dataclass(frozen=True, kw_only=True)
class DARHTState:
    """What one step leaves to the next."""

    draw: float = 0.5
    """Uniform in [0, 1), from the keys of the batch before: whether the batch is attacked, and
    what teachers with dropout draw. So it is known without waiting for the device."""


@dataclass(frozen=True, kw_only=True)
class DARHT:
    """Teachers of any kind, each imitated by its own slice of a map that the logits are read from.

    The student ends in two linear layers: features to the map m of M x K values, and m to the
    logits z. A batch u is attacked with probability a half (cross-entropy of z), else clean.
    With the trust v_i in teacher i, from its cross-entropy c_i, the mean over the batch,

        L_KD = sum_i v_i KL(softmax(t_i(u)) || softmax(m_i)),    v_i = exp(-c_i) / sum_j exp(-c_j)

    is minimised in three phases: CE(z, y) alone until 50 of 350 epochs, CE + L_KD until 118, and
    L_KD from there on.

    Source: Deng et al., "Distilling adversarial robustness using heterogeneous teachers", arXiv
    2402.15586, 2024, as in the authors' released script for CIFAR-100; of the paper itself only
    the abstract was at hand.
    Deviations, each with a setting that gives what is released: in the last phase the logits'
    own layer goes on learning from labels, the rest of the network from teachers alone (released:
    it learns nothing, and reads a map that changes); trust sums to one (released: exp(-c_i) as
    it is); no batch is left out (released: those whose cross-entropy is above 8); teachers are
    in eval mode (released: in train mode, dropout and BatchNorm); the attack reaches epsilon
    (released: 10 steps of 0.003 at 0.031); there are no epochs at rate zero (released: three).
    Without a setting: the best epoch is chosen on held-out training images by the mean of clean and
    robust accuracy (released: on test images by robust accuracy). The order of teachers decides
    which slice starts where, and a teacher that is named twice takes trust from the others. The
    script's name speaks of multiplicative updates with a state; the weights that it uses have none,
    and neither have these.
    """

    teachers: Sequence[Answering]
    """Teacher i owns slice i of the map."""
    attack: Attack
    adversarial_share: float
    distil_from: float
    labels_until: float
    last_layer: Literal["labels", "frozen", "decaying"]
    normalise_trust: bool
    skip_above_nats: float | None
    has_drawing_teachers: bool
    statistics: Mapping[str, Tensor] = field(repr=False)
    """What teachers in train mode change in place."""

    def initial_state(self) -> DARHTState:
        """The first batch is clean, where the share is a half."""
        return DARHTState()

    def restore_state(self, values: Mapping[str, Any]) -> DARHTState:
        """From `dataclasses.asdict` of a state."""
        return DARHTState(**values)

    def tensors(self) -> Mapping[str, Tensor]:
        """The statistics of teachers in train mode."""
        return self.statistics

    def step(
        self, student: Student, batch: Batch, state: DARHTState, moment: Moment
    ) -> tuple[StepResult, DARHTState]:
        """Perhaps an attack, one pass of the student, one of each teacher from phase two on."""
        is_adversarial = state.draw < self.adversarial_share
        u_NCHW = batch.x_NCHW
        if is_adversarial:
            view = student.evaluation_view()
            u_NCHW = self.attack(view, u_NCHW, batch.y_N, keys_N=batch.keys_N)
        logits_NK, map_NMK = student.logits_and_map(u_NCHW)
        label_loss = batch.mean(cross_entropy(logits_NK, batch.y_N))
        parts = [label_loss] if moment.fraction < self.labels_until else []
        watched = {"label_loss_nats": label_loss}
        if moment.fraction >= self.distil_from:
            divergence_M, trust_M = self._compare(map_NMK, u_NCHW, batch, draw=state.draw)
            parts.append((trust_M * divergence_M).sum())
            watched |= {"distillation_loss_nats": parts[-1]}
            watched |= _by_teacher("loss_nats", divergence_M)
            watched |= _by_teacher("trust_ratio", trust_M)
        if moment.fraction >= self.labels_until:
            parts += self._loss_of_last_layer(student, map_NMK, batch)
        total = torch.stack(parts).sum()

        draw = uniform(batch.key, stream=Stream.NEXT_BATCH)[0].to(total)
        loss_value, next_draw, *values = read_back(total, draw, *watched.values())
        logged = {"loss_nats": loss_value, **dict(zip(watched, values, strict=True))}
        logged["adversarial_fraction"] = float(is_adversarial)
        if self.skip_above_nats is not None:
            is_skipped = logged["label_loss_nats"] > self.skip_above_nats
            logged["skipped_fraction"] = float(is_skipped)
            total = _nothing_to_learn(total) if is_skipped else total
        return StepResult(loss=total, logged=logged), DARHTState(draw=next_draw)

    def _compare(
        self, map_NMK: Tensor, u_NCHW: Tensor, batch: Batch, *, draw: float
    ) -> tuple[Tensor, Tensor]:
        """Divergence of each slice from its teacher [M], and the trust in that teacher [M]."""
        seeded = drawing_from(int(draw * _NUM_SEEDS), u_NCHW.device)
        with seeded if self.has_drawing_teachers else nullcontext():
            teacher_logits = [teacher.logits(u_NCHW) for teacher in self.teachers]
        slices = map_NMK.unbind(dim=1)
        divergences = [
            batch.mean(kl_divergence(t_NK, m_NK))
            for t_NK, m_NK in zip(teacher_logits, slices, strict=True)
        ]
        label_losses = [batch.mean(cross_entropy(t_NK, batch.y_N)) for t_NK in teacher_logits]
        trust_M = trust_of(torch.stack(label_losses), normalise=self.normalise_trust)
        return torch.stack(divergences), trust_M

    def _loss_of_last_layer(self, student: Student, map_NMK: Tensor, batch: Batch) -> list[Tensor]:
        """What moves the layer from map to logits, and nothing before it, in the last phase."""
        if self.last_layer == "frozen":
            return []
        loss = batch.mean(cross_entropy(student.read_out(map_NMK.detach()), batch.y_N))
        # A gradient of zero lets the optimiser decay and coast; no gradient stops it.
        return [loss if self.last_layer == "labels" else 0 * loss]


def trust_of(label_loss_M: Tensor, *, normalise: bool) -> Tensor:
    """exp(-cross-entropy) of each teacher [M], over their sum where `normalise`."""
    return F.softmax(-label_loss_M, dim=0) if normalise else torch.exp(-label_loss_M)


def _by_teacher(quantity: str, values_M: Tensor) -> dict[str, Tensor]:
    return {f"teacher_{place}_{quantity}": value for place, value in enumerate(values_M, 1)}


def _nothing_to_learn(like: Tensor) -> Tensor:
    """A loss of no parameter: the optimiser then takes no step, not even a decaying one."""
    return torch.zeros_like(like, requires_grad=True)
