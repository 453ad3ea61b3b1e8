"""Teacher: a frozen network to learn from, with a role.

N images, C channels, H and W pixels, K classes.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from compressor.errors import TeacherError
from compressor.networks import Classifier, NetworkSpec
from compressor.recipe import Role


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

    @property
    def identity(self) -> str:
        """The same for two teachers exactly if one is a copy of the other in the same role."""
        return f"{self.role} {self.sha256} {self.spec or self.onnx_input}"

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
            return self.answer(x_NCHW).to(x_NCHW.dtype)

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
