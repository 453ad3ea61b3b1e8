"""One attack on some images, and what it did to each of them.

N images, K classes.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from compressor.attacks.protocol import Model
from compressor.attacks.search import by_logits
from compressor.attacks.stages import Form, Stage
from compressor.data import Batch
from compressor.errors import InvalidEvaluationError
from compressor.losses import margin
from compressor.threat import ThreatModel
from compressor.verification.gallery_entry import FooledImages, GalleryEntry

NUM_BISECTIONS = 8
_LEVEL_SLACK = 2e-4
"""Of one of 255 levels: four times what float32 loses, and less than `ThreatModel` forgives."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The forms of one model under attack, all images [N, C, H, W] -> logits [N, K]."""

    answer: Model
    """What ships; its float32 answer alone decides whether an image is fooled."""
    float32: Model
    """The same function, or that of its source, with gradients."""
    search_dtype: Model
    """As `float32`, in the number format that searches fast."""

    def watched(self, tick: Callable[[int], None]) -> "Subject":
        """The same, telling `tick` before every pass how many images go through."""

        def watch(model: Model) -> Model:
            def ticking(x_NCHW: Tensor) -> Tensor:
                tick(len(x_NCHW))
                return model(x_NCHW)

            return ticking

        return Subject(
            answer=watch(self.answer),
            float32=watch(self.float32),
            search_dtype=watch(self.search_dtype),
        )


@dataclass(frozen=True, kw_only=True)
class Found:
    """What one attack did to one image."""

    place: int
    """In the order in which images are attacked."""
    is_fooled: bool
    prediction: int
    """Answered at the point found, in float32."""
    margin: float
    """Largest wrong logit minus the label's at the point found; above 0 where fooled."""
    distance_pixels: float
    """Of the point found; where fooled, drawn back towards the clean image while it still does."""
    fools_in_8_bits: bool
    """Fooled, and also after rounding to 255 levels: to the nearest, or, where that leaves the
    threat model or fools no more, towards the clean image."""
    num_forwards: int
    num_backwards: int


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one stage did to the images of one chunk that it tried."""

    chunk: int
    stage: str
    found: tuple[Found, ...]
    gallery: tuple[GalleryEntry, ...]
    duration_seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, table: object) -> "Outcome":
        """What `to_json` gave.

        Raises:
            ValidationError: for anything else.
        """
        return TypeAdapter(cls).validate_python(table)


@torch.no_grad()
def answer_clean(subject: Subject, batch: Batch, places: Tensor) -> tuple[Found, ...]:
    """The stage before all attacks: fooled here means wrong without one."""
    logits_NK = subject.answer(batch.x_NCHW)
    fooled_N = by_logits(batch.x_NCHW, logits_NK, batch.y_N)
    zeros_N = torch.zeros_like(batch.y_N)
    columns = _Columns(
        fooled_N=fooled_N,
        prediction_N=logits_NK.argmax(dim=1),
        margin_N=margin(logits_NK, batch.y_N),
        distance_N=zeros_N.float(),
        in_8_bits_N=fooled_N,
        num_forwards_N=zeros_N + 1,
        num_backwards_N=zeros_N,
    )
    return columns.rows(places)


def run_stage(
    stage: Stage, subject: Subject, batch: Batch, places: Tensor, *, form: Form, seed: int
) -> tuple[tuple[Found, ...], tuple[GalleryEntry, ...]]:
    """Attack the images of `batch` and judge every point found by the float32 answer alone.

    Args:
        stage: the attack.
        subject: the model.
        batch: only images that the stage is to try.
        places: their places in the order of the verification, int64 [N].
        form: of the model, that is searched.
        seed: of stages that draw as the released code.

    Raises:
        InvalidEvaluationError: if the attack left its threat model.
    """

    def judge(x_MCHW: Tensor, logits_MK: Tensor, y_M: Tensor) -> Tensor:
        del logits_MK
        with torch.no_grad():
            return by_logits(x_MCHW, subject.answer(x_MCHW), y_M)

    model = getattr(subject, form)
    draws = stage.draws(batch.x_NCHW, keys_N=batch.keys_N, seed=seed)
    is_own_judge = model is subject.answer
    result = stage.search.search(
        model, batch.x_NCHW, batch.y_N, draws=draws, judge=by_logits if is_own_judge else judge
    )
    threat = stage.search.threat
    _refuse_outside(result.x_adv_NCHW, batch.x_NCHW, stage.name, threat)
    with torch.no_grad():
        logits_NK = subject.answer(result.x_adv_NCHW)
        fooled_N = by_logits(result.x_adv_NCHW, logits_NK, batch.y_N)
        nearest = _draw_back(subject.answer, result.x_adv_NCHW, batch, fooled_N)
        columns = _Columns(
            fooled_N=fooled_N,
            prediction_N=logits_NK.argmax(dim=1),
            margin_N=margin(logits_NK, batch.y_N),
            distance_N=threat.length(nearest - batch.x_NCHW),
            in_8_bits_N=_fools_in_8_bits(
                subject.answer, result.x_adv_NCHW, batch, fooled_N, threat=threat
            ),
            num_forwards_N=result.num_forwards_N + 1,
            num_backwards_N=result.num_backwards_N,
        )
        rows_M = fooled_N.nonzero()[:, 0]
        fooled = FooledImages(
            attack=stage.name,
            answer=subject.answer,
            threat=threat,
            x_NCHW=batch.x_NCHW[rows_M],
            y_N=batch.y_N[rows_M],
            places_N=places[rows_M],
        )
        clearest = fooled.entries("clearest", result.x_adv_NCHW[rows_M])
        closest = fooled.entries("closest", nearest[rows_M])
    return columns.rows(places), (*clearest, *closest)


_FOUND_NAMES = tuple(field.name for field in fields(Found))


@dataclass(frozen=True, kw_only=True, eq=False)
class _Columns:
    """The fields of `Found` after its place, in their order."""

    fooled_N: Tensor
    prediction_N: Tensor
    margin_N: Tensor
    distance_N: Tensor
    in_8_bits_N: Tensor
    num_forwards_N: Tensor
    num_backwards_N: Tensor

    def rows(self, places: Tensor) -> tuple[Found, ...]:
        columns = [places.tolist(), *(column.tolist() for column in vars(self).values())]
        return tuple(
            Found(**dict(zip(_FOUND_NAMES, row, strict=True))) for row in zip(*columns, strict=True)
        )


def _refuse_outside(x_adv_NCHW: Tensor, x_NCHW: Tensor, name: str, threat: ThreatModel) -> None:
    is_inside_N = threat.contains(x_adv_NCHW, x_NCHW)
    if not bool(is_inside_N.all()):
        worst = float(threat.length(x_adv_NCHW - x_NCHW).amax())
        raise InvalidEvaluationError(
            f"{name} left its threat model {threat}: distance {worst:.6f}, pixels "
            f"{float(x_adv_NCHW.amin())} to {float(x_adv_NCHW.amax())}; no number was written. "
            "Please report it"
        )


def _draw_back(answer: Model, x_adv_NCHW: Tensor, batch: Batch, fooled_N: Tensor) -> Tensor:
    """Where fooled, the fooling point nearest to the clean image found on the line to it."""
    rows_M = fooled_N.nonzero()[:, 0]
    nearest_NCHW = x_adv_NCHW.clone()
    if not len(rows_M):
        return nearest_NCHW
    x, far, y = batch.x_NCHW[rows_M], x_adv_NCHW[rows_M], batch.y_N[rows_M]
    low = torch.zeros(len(rows_M), 1, 1, 1, device=x.device)
    high = torch.ones_like(low)
    for _ in range(NUM_BISECTIONS):
        middle = (low + high) / 2
        point = torch.lerp(x, far, middle)
        fools = by_logits(point, answer(point), y).view(-1, 1, 1, 1)
        low, high = torch.where(fools, low, middle), torch.where(fools, middle, high)
    nearest_NCHW[rows_M] = torch.lerp(x, far, high)
    return nearest_NCHW


def _fools_in_8_bits(
    answer: Model, x_adv_NCHW: Tensor, batch: Batch, fooled_N: Tensor, *, threat: ThreatModel
) -> Tensor:
    """Which of those fooled still are, inside the threat model, after rounding to 255 levels.

    The nearest level may be outside; a level nearer to the clean image, which has whole levels
    itself, is not.
    """
    in_8_bits_N = torch.zeros_like(fooled_N)
    for round_levels in (_to_nearest, _to_clean):
        rows_M = (fooled_N & ~in_8_bits_N).nonzero()[:, 0]
        if len(rows_M):
            x, y = batch.x_NCHW[rows_M], batch.y_N[rows_M]
            point = round_levels(x_adv_NCHW[rows_M] * 255, x * 255) / 255
            fools_M = by_logits(point, answer(point), y)
            in_8_bits_N[rows_M] = fools_M & threat.contains(point, x)
    return in_8_bits_N


def _to_nearest(levels_NCHW: Tensor, _clean_NCHW: Tensor) -> Tensor:
    return levels_NCHW.round()


def _to_clean(levels_NCHW: Tensor, clean_NCHW: Tensor) -> Tensor:
    """Whole levels of change, each as large as it can be without passing the one found."""
    is_above = levels_NCHW > clean_NCHW
    down, up = (levels_NCHW + _LEVEL_SLACK).floor(), (levels_NCHW - _LEVEL_SLACK).ceil()
    return torch.where(is_above, down, up)
