"""Teachers whose answers are drawn: dropout and batch statistics left on while they teach.

N images, K classes.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from compressor.errors import TeacherError
from compressor.teacher import Teacher

_DRAWING_LAYERS = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
    nn.MultiheadAttention,
)


class Answering(Protocol):
    """What a method asks of a teacher."""

    def logits(self, x_NCHW: Tensor) -> Tensor:
        """Logits [N, K] of images in [0, 1], without a graph."""


@dataclass(frozen=True, kw_only=True, eq=False)
class DrawingTeacher:
    """A copy of a teacher's network, some layers of which are in train mode. It stays frozen."""

    network: nn.Module = field(repr=False)

    def logits(self, x_NCHW: Tensor) -> Tensor:
        """Logits [N, K]; another draw at every call."""
        with torch.no_grad():
            logits_NK: Tensor = self.network(x_NCHW)
        return logits_NK.to(x_NCHW.dtype)


def drawing_teachers(
    teachers: Sequence[Teacher], *, mode: Literal["dropout", "train"]
) -> tuple[DrawingTeacher, ...]:
    """Copies in a mode; the given teachers stay as they are.

    The copies answer in float32, whatever the format of training.

    Args:
        teachers: networks, not files.
        mode: `dropout` for the layers that draw, attention included; `train` for all layers.

    Raises:
        TeacherError: naming the teacher that is an ONNX file, which has only the mode that it was
            exported in; or if no teacher of mode `dropout` has a layer that draws.
    """
    copies = tuple(_drawing(teacher, mode=mode) for teacher in teachers)
    if mode == "dropout" and not any(m.training for c in copies for m in c.network.modules()):
        names = ", ".join(teacher.name for teacher in teachers)
        raise TeacherError(
            f'method.teacher_mode = "dropout", but no teacher has a layer that draws ({names}); '
            'set method.teacher_mode = "eval"'
        )
    return copies


def collected_statistics(teachers: Sequence[DrawingTeacher]) -> Mapping[str, Tensor]:
    """What the layers of teachers in train mode change in place, by teacher and name."""
    found = {}
    for place, teacher in enumerate(teachers):
        parameters = {name for name, _ in teacher.network.named_parameters()}
        for name, value in teacher.network.state_dict().items():
            if name not in parameters:
                found[f"teacher_{place}.{name}"] = value
    return found


@contextmanager
def drawing_from(seed: int, device: torch.device) -> Iterator[None]:
    """Global randomness of this device is a function of `seed` inside, and put back afterwards."""
    is_cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if is_cuda else []):
        torch.default_generator.manual_seed(seed)
        if is_cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def _drawing(teacher: Teacher, *, mode: Literal["dropout", "train"]) -> DrawingTeacher:
    if teacher.network is None:
        raise TeacherError(
            f"{teacher.role} teacher {teacher.name} is an ONNX file, which has no layers in train "
            f'mode; set method.teacher_mode = "eval" (it is {mode!r}), or give its weights as '
            "ARCH:FILE"
        )
    network = copy.deepcopy(teacher.network)
    for layer in network.modules():
        layer.training = mode == "train" or isinstance(layer, _DRAWING_LAYERS)
    return DrawingTeacher(network=network)
