"""The network under training, as a method sees it."""

from torch import Tensor, nn

from compressor.attacks.protocol import Model
from compressor.folding import EvaluationView
from compressor.performance import Performance


class Student:
    """Two ways to ask one network: as it trains, and as an attacker meets it."""

    def __init__(self, network: nn.Module, performance: Performance) -> None:
        self.network = performance.place_network(network).train()
        self.performance = performance
        self._view = EvaluationView(self.network, performance)

    def logits(self, x_NCHW: Tensor) -> Tensor:
        """Train-mode logits [N, K]: BatchNorm uses and updates the statistics of this batch."""
        with self.performance.autocast():
            logits_NK: Tensor = self.network(x_NCHW)
        return logits_NK.to(x_NCHW.dtype)

    def evaluation_view(self) -> Model:
        """The present weights in eval mode, as a function of images alone."""
        self._view.refresh()
        return self._view
