"""What a search for adversarial images is given and what it finds.

An `Attack` returns images; the searches here also say which images they have fooled and what
that cost, so that a fooled image can leave at once and the others go on.

N samples, M of them still in the search, K classes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from compressor.attacks.draws import Draws
from compressor.attacks.protocol import Model
from compressor.threat import ThreatModel

Judge = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(images [M, C, H, W], their logits from the search [M, K], labels [M]) -> fooled, bool [M]."""


def by_logits(x_MCHW: Tensor, logits_MK: Tensor, y_M: Tensor) -> Tensor:
    """Fooled where the largest logit is not the label's; no finite answer is no right answer."""
    del x_MCHW
    return (logits_MK.argmax(dim=1) != y_M) | ~logits_MK.amax(dim=1).isfinite()


@dataclass(frozen=True, kw_only=True, eq=False)
class SearchResult:
    """What was found for each sample."""

    x_adv_NCHW: Tensor
    """Images inside the threat model; they fool where `is_fooled_N`."""
    is_fooled_N: Tensor
    """bool [N], by the judge."""
    num_forwards_N: Tensor
    """Times that each sample went through the model, int64 [N]."""
    num_backwards_N: Tensor
    """Times that a gradient was taken back to each sample, int64 [N]."""


class Search(Protocol):
    """Looks within `threat` for images that the judge calls fooled; leaves no trace."""

    @property
    def threat(self) -> ThreatModel:
        """What the attacker may do."""

    def search(
        self, model: Model, x_NCHW: Tensor, y_N: Tensor, *, draws: Draws, judge: Judge
    ) -> SearchResult:
        """Search from the images themselves, never from another search's result.

        Args:
            model: the function under attack, in eval mode.
            x_NCHW: float32 images in [0, 1]; not changed.
            y_N: labels, int64.
            draws: the only source of randomness.
            judge: decides what counts as fooled.
        """
