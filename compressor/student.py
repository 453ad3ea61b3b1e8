"""The network under training, as a method sees it.

N images, M teachers, K classes.
"""

from typing import NamedTuple

from torch import Tensor, nn

from compressor.architectures.teacher_map import find_teacher_map
from compressor.attacks.protocol import Model
from compressor.compilation import compiled
from compressor.convolution import arrange_convolutions
from compressor.folding import EvaluationView
from compressor.performance import Performance


class LogitsAndMap(NamedTuple):
    """Both answers of a network with a teacher map."""

    logits_NK: Tensor
    map_NMK: Tensor
    """One slice of K values for each teacher, from which the logits are read."""


class Student:
    """Two ways to ask one network: as it trains, and as an attacker meets it."""

    def __init__(self, network: nn.Module, performance: Performance) -> None:
        self.network = performance.place_network(network).train()
        if performance.is_bfloat16_on_cpu:
            arrange_convolutions(self.network)
        self.performance = performance
        self._view = EvaluationView(self.network, performance)
        self._head = find_teacher_map(self.network)
        # What ranks tell each other in the middle of a pass cannot be compiled.
        is_alone = performance.ranks.num_ranks == 1
        self._trained = compiled(self.network, performance) if is_alone else self.network

    def logits(self, x_NCHW: Tensor) -> Tensor:
        """Train-mode logits [N, K]: BatchNorm uses and updates the statistics of this batch."""
        with self.performance.autocast():
            logits_NK = self._trained(x_NCHW)
        return logits_NK.to(x_NCHW.dtype)

    def logits_and_map(self, x_NCHW: Tensor) -> LogitsAndMap:
        """As `logits`, with the student-teacher map of the same pass.

        Raises:
            TypeError: if the network has no `StudentTeacherHead`.
        """
        if self._head is None:
            raise TypeError("this student has no teacher map; see add_teacher_map")
        seen: list[Tensor] = []
        hook = self._head.to_map.register_forward_hook(lambda *call: seen.append(call[-1]))
        try:
            with self.performance.autocast():
                logits_NK = self.network(x_NCHW).to(x_NCHW.dtype)
        finally:
            hook.remove()
        return LogitsAndMap(logits_NK, self._head.slices(seen[-1]).to(x_NCHW.dtype))

    def read_out(self, map_NMK: Tensor) -> Tensor:
        """Logits [N, K] of a map [N, M, K]; from a detached one only the last layer learns.

        Raises:
            TypeError: if the network has no `StudentTeacherHead`.
        """
        if self._head is None:
            raise TypeError("this student has no teacher map; see add_teacher_map")
        with self.performance.autocast():
            logits_NK = self._head.read_out(map_NMK)
        return logits_NK.to(map_NMK.dtype)

    def evaluation_view(self) -> Model:
        """The present weights in eval mode, as a function of images alone."""
        self._view.refresh()
        return self._view
