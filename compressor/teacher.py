"""Teacher: a frozen network to learn from, with a role.

N images, C channels, H and W pixels, K classes.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from compressor.errors import TeacherError
from compressor.networks import Classifier, NetworkSpec
from compressor.recipe import Role


class _Tally:
    """Counts answers that are not finite, without waiting for the device."""

    num_bad: Tensor | int = 0

    def note(self, x_NCHW: Tensor, logits_NK: Tensor) -> None:
        """Images of a broken student are not the teacher's fault."""
        is_asked_N = x_NCHW.flatten(1).isfinite().all(dim=1)
        is_answered_N = logits_NK.isfinite().all(dim=1)
        self.num_bad = self.num_bad + (is_asked_N & ~is_answered_N).sum()


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A frozen network with a role. Construction puts `network` into eval mode and freezes it."""

    name: str
    role: Role
    answer: Callable[[Tensor], Tensor] = field(repr=False)
    """Images [N, C, H, W] in [0, 1] to logits [N, K]."""
    network: Classifier | None = field(repr=False)
    """None for ONNX files, which give no gradient."""
    spec: NetworkSpec | None
    num_parameters: int | None
    num_classes: int
    sha256: str
    num_bytes: int
    onnx_input: NetworkSpec | None = None
    """What is done to the images before an ONNX file; of the preprocessing alone."""
    tally: _Tally = field(default_factory=_Tally, repr=False, compare=False)

    @property
    def identity(self) -> str:
        """The same for two teachers exactly if one is a copy of the other in the same role.

        Of networks the tensors count and not their files, which may say more about themselves.
        """
        content = self.sha256 if self.network is None else _hash_of_tensors(self.network)
        return f"{self.role} {content} {self.spec or self.onnx_input}"

    def __post_init__(self) -> None:
        if self.network is not None:
            self.network.eval().requires_grad_(False)  # noqa: FBT003 (torch's signature)

    def logits(self, x_NCHW: Tensor) -> Tensor:
        """Logits [N, K] in the format of the images, without a graph, fit to be targets in one.

        `no_grad` and not `inference_mode`: what the latter makes cannot be saved for a
        backward pass without a copy, and with the copy it is no faster.
        """
        self._assert_as_given()
        with torch.no_grad():
            logits_NK = self.answer(x_NCHW).to(x_NCHW.dtype)
            self.tally.note(x_NCHW, logits_NK)
        return logits_NK

    def num_not_finite(self) -> int:
        """How many finite images were answered with numbers that are not; waits for the device."""
        return int(self.tally.num_bad)

    def logits_with_gradient(self, x_NCHW: Tensor) -> Tensor:
        """As `logits`, with a graph to the images; the frozen weights get no gradient.

        Raises:
            TeacherError: if the teacher gives none, as an ONNX file.
        """
        self.require_network("asked for the gradient of its answers")
        self._assert_as_given()
        return self.answer(x_NCHW).to(x_NCHW.dtype)

    def require_network(self, purpose: str) -> Classifier:
        """The network itself, for what answers are not enough for.

        Args:
            purpose: of the message; it follows the teacher's name and a colon.

        Raises:
            TeacherError: if there is none: an ONNX file, which answers without a gradient.
        """
        if self.network is None:
            raise TeacherError(
                f"{self.role} teacher {self.name}: {purpose}, but an ONNX file gives no gradient; "
                "give its weights as ARCH:FILE or the folder of its run, or choose a method that "
                "only asks its teachers, such as rslad or bmtard"
            )
        return self.network

    def _assert_as_given(self) -> None:
        """Asks the top of the network: every layer takes 0.4 ms for a ResNet-18, in every step."""
        network = self.network
        if network is not None:
            is_still = not (network.training or network.backbone.training)
            is_frozen = not next(network.parameters()).requires_grad
            assert is_still, f"teacher {self.name} is in training mode"  # noqa: S101
            assert is_frozen, f"teacher {self.name} is not frozen"  # noqa: S101


def _hash_of_tensors(network: Classifier) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
