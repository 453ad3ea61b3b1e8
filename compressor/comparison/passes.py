"""How many images go forwards and backwards through student and teachers per training image.

Counted, not declared: the method of a recipe takes steps on tiny networks that count every call, so
a method that is added later needs no line here. The size of a network changes none of the counts.

N images, C channels, H and W pixels, K classes, F values of any answer.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from compressor.attacks.protocol import Model
from compressor.data import Batch
from compressor.methods.build import build_method
from compressor.methods.protocol import Moment
from compressor.networks import NetworkSpec, build_classifier
from compressor.performance import Performance
from compressor.randomness import Stream, sample_keys, uniform
from compressor.recipe import Recipe
from compressor.student import LogitsAndMap, Student
from compressor.teacher import Teacher
from compressor.training_preparation import student_network

_NUM_MOMENTS, _NUM_KEYS = 20, 10_000
_GOLDEN_RATIO = (1 + 5**0.5) / 2
"""Its multiples, modulo one, are spread evenly over every part of a run."""
_NUM_IMAGES, _NUM_CLASSES = 4, 10
_SPEC = NetworkSpec(architecture="tiny", width=0.5, num_classes=_NUM_CLASSES, image_shape=(3, 8, 8))


@dataclass(frozen=True, kw_only=True)
class Passes:
    """Images through the networks per training image, the mean over a run.

    The passes of all teachers are added up, whatever their sizes are. A backward pass counts
    whether it ends at the image, as in an attack, or at the weights.
    """

    student_forwards: float
    student_backwards: float
    teacher_forwards: float
    teacher_backwards: float


def count_passes(recipe: Recipe, *, num_moments: int = _NUM_MOMENTS) -> Passes:
    """Let the method of `recipe` take a step at `num_moments` moments spread over the run.

    Methods that change their steps on the way are counted as often as they do at these moments.
    Where a batch tosses a coin for the next, coins fall as evenly as they can. Neither data nor
    the teachers' files are read.
    """
    student_tally, teacher_tally = _Tally(), _Tally()
    performance = Performance(device=torch.device("cpu"))
    student = _CountingStudent(student_network(recipe, _SPEC), performance, student_tally)
    teachers = [
        _counting_teacher(table.role, teacher_tally, seed=place)
        for place, table in enumerate(recipe.teachers)
    ]
    method = build_method(
        recipe.method, threat=recipe.threat.build(), teachers=teachers, num_steps=num_moments
    )
    state: Any = method.initial_state()
    for place, key in enumerate(_even_keys(num_moments)):
        moment = Moment(fraction=(place + 0.5) / num_moments)
        result, state = method.step(student, _batch(place, key), state, moment)
        if result.loss.requires_grad:
            result.loss.backward()  # type: ignore[no-untyped-call]
        student.network.zero_grad()
    num_images = num_moments * _NUM_IMAGES
    return Passes(
        student_forwards=student_tally.num_forwards / num_images,
        student_backwards=student_tally.num_backwards / num_images,
        teacher_forwards=teacher_tally.num_forwards / num_images,
        teacher_backwards=teacher_tally.num_backwards / num_images,
    )


@dataclass
class _Tally:
    """Images so far."""

    num_forwards: int = 0
    num_backwards: int = 0

    def watch(self, answer_NF: Tensor) -> Tensor:
        """Count these images now, and again if a gradient comes back through their answer."""
        self.num_forwards += len(answer_NF)
        if answer_NF.requires_grad:
            answer_NF.register_hook(self._count_backwards)  # type: ignore[no-untyped-call]
        return answer_NF

    def __deepcopy__(self, _: object) -> "_Tally":
        """A copy of a network counts with the network."""
        return self

    def _count_backwards(self, gradient_NF: Tensor) -> None:
        self.num_backwards += len(gradient_NF)


@dataclass(frozen=True)
class _CountedModel:
    model: Model
    tally: _Tally = field(repr=False)

    def __call__(self, x_NCHW: Tensor) -> Tensor:
        return self.tally.watch(self.model(x_NCHW))


class _CountingStudent(Student):
    def __init__(self, network: nn.Module, performance: Performance, tally: _Tally) -> None:
        super().__init__(network, performance)
        self._tally = tally

    def logits(self, x_NCHW: Tensor) -> Tensor:
        return self._tally.watch(super().logits(x_NCHW))

    def logits_and_map(self, x_NCHW: Tensor) -> LogitsAndMap:
        """Watched before they part: gradients of logits and map together are one way back."""
        if self._head is None:
            return super().logits_and_map(x_NCHW)  # which says what is missing
        watch = self._head.to_map.register_forward_hook(lambda *call: self._tally.watch(call[-1]))
        try:
            return super().logits_and_map(x_NCHW)
        finally:
            watch.remove()

    def evaluation_view(self) -> Model:
        return _CountedModel(super().evaluation_view(), self._tally)


class _CountedBackbone(nn.Module):
    def __init__(self, backbone: nn.Module, tally: _Tally) -> None:
        super().__init__()
        self.backbone, self.tally = backbone, tally

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self.tally.watch(self.backbone(x_NCHW))


def _counting_teacher(role: Any, tally: _Tally, *, seed: int) -> Teacher:  # noqa: ANN401 (a Role)
    network = build_classifier(_SPEC, seed=seed + 1)
    network.backbone = _CountedBackbone(network.backbone, tally)
    return Teacher(
        name=f"counted-{seed}",
        role=role,
        answer=network,
        network=network,
        spec=_SPEC,
        num_parameters=None,
        num_classes=_NUM_CLASSES,
        sha256="",
        num_bytes=0,
    )


def _even_keys(num_moments: int) -> Tensor:
    """First keys of batches that draw for the next one: a number in each n-th of [0, 1)."""
    keys = sample_keys(torch.arange(_NUM_KEYS), seed=0)
    keys = keys[uniform(keys, stream=Stream.NEXT_BATCH).argsort()]
    mixed = torch.arange(num_moments, dtype=torch.float64) * _GOLDEN_RATIO % 1
    quantiles = (mixed.argsort().argsort() + 0.5) / num_moments
    return keys[(quantiles * _NUM_KEYS).long()]


def _batch(place: int, first_key: Tensor) -> Batch:
    generator = torch.Generator().manual_seed(place)
    index_N = torch.arange(_NUM_IMAGES)
    keys_N = sample_keys(index_N, seed=place)
    keys_N[0] = first_key
    return Batch(
        x_NCHW=torch.rand(_NUM_IMAGES, *_SPEC.image_shape, generator=generator),
        y_N=index_N % _NUM_CLASSES,
        index_N=index_N,
        keys_N=keys_N,
    )
