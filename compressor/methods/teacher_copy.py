"""A copy of a teacher that training changes; the teacher itself stays as it was given.

N examples, K classes.
"""

import copy
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from compressor.performance import Performance
from compressor.ranks import Ranks
from compressor.teacher import Teacher

Statistics = Literal["kept", "batch"]


class TeacherCopy:
    """The network of a teacher to be trained on, with the momentum of its own SGD.

    With `statistics="kept"` BatchNorm stays as the teacher came; with `"batch"` it uses the
    statistics of each batch, and collects them in every answer.
    """

    def __init__(self, teacher: Teacher, *, statistics: Statistics, purpose: str) -> None:
        """Copy the network of `teacher`, on its device.

        Args:
            teacher: is not changed.
            statistics: of BatchNorm.
            purpose: why a network is needed, for the message.

        Raises:
            TeacherError: if the teacher has no network, as an ONNX file.
        """
        self.statistics = statistics
        network = copy.deepcopy(teacher.require_network(purpose))
        self._network = network.requires_grad_().train(statistics == "batch")
        self._momentum = {
            name: torch.zeros_like(parameter) for name, parameter in network.named_parameters()
        }

    def tensors(self) -> Mapping[str, Tensor]:
        """Weights, BatchNorm statistics and momentum by name, for checkpoints."""
        state = {f"teacher.{name}": t for name, t in self._network.state_dict().items()}
        return state | {f"teacher_momentum.{name}": t for name, t in self._momentum.items()}

    def logits(self, x_NCHW: Tensor, performance: Performance) -> Tensor:
        """Logits [N, K] in the format of the images, with a graph to the copy's own weights."""
        with performance.autocast():
            logits_NK: Tensor = self._network(x_NCHW)
        return logits_NK.to(x_NCHW.dtype)

    def collect_statistics(self, x_NCHW: Tensor, performance: Performance) -> None:
        """Answer images for what they leave in BatchNorm alone."""
        with torch.no_grad():
            self.logits(x_NCHW, performance)

    def descend(
        self, loss: Tensor, *, rate: float, momentum: float, weight_decay: float, ranks: Ranks
    ) -> None:
        """One step of SGD down a scalar loss, in place; no gradient is left behind."""
        parameters = dict(self._network.named_parameters())
        slopes = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        with torch.no_grad():
            for (name, parameter), slope in zip(parameters.items(), slopes, strict=True):
                if slope is not None:
                    slope = ranks.sum_in_place(slope.contiguous())
                    slope = slope + weight_decay * parameter
                    speed = self._momentum[name].mul_(momentum).add_(slope)
                    parameter.sub_(rate * speed)
