"""What a training method is: a step, and a state that is a value.

The trainer knows nothing else, so a new method, another number of teachers or another inner
attack is one more file in this folder.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from compressor.data import Batch
from compressor.student import Student

State = TypeVar("State")


@dataclass(frozen=True, kw_only=True)
class Moment:
    """Where a step stands in its run."""

    fraction: float = 0.0
    """Share of the run that is done, in [0, 1); at the beginning of epoch e of E it is e / E."""
    rate_factor: float = 1.0
    """Learning rate now over the highest one; other rates follow it."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one step hands to the trainer."""

    loss: Tensor
    """Scalar to minimise."""
    logged: Mapping[str, float]
    """What happened, each name with its unit; holds `loss_nats`."""


class Method(Protocol[State]):
    """One paper, one file."""

    def initial_state(self) -> State:
        """The state before the first step."""

    def restore_state(self, values: Mapping[str, object]) -> State:
        """The inverse of `dataclasses.asdict`, for checkpoints."""

    def tensors(self) -> Mapping[str, Tensor]:
        """What steps change in place besides the student, by name; checkpoints hold it."""

    def step(
        self, student: Student, batch: Batch, state: State, moment: Moment
    ) -> tuple[StepResult, State]:
        """Losses of one batch, and the state of the next one.

        Args:
            student: the network under training, in train mode.
            batch: clean images and labels.
            state: what earlier steps left.
            moment: how far the run is.
        """


@dataclass(frozen=True, kw_only=True)
class NoState:
    """A method that carries nothing from step to step."""


class WithoutTensors:
    """Mixin of methods that change nothing in place but the student."""

    def tensors(self) -> Mapping[str, Tensor]:
        """None."""
        return {}


class Stateless(WithoutTensors):
    """Mixin of methods whose steps depend on nothing before them."""

    def initial_state(self) -> NoState:
        """Nothing."""
        return NoState()

    def restore_state(self, values: Mapping[str, object]) -> NoState:
        """Nothing, whatever the checkpoint says."""
        del values
        return NoState()


def read_back(*scalars: Tensor) -> list[float]:
    """Scalars of the device as Python floats, in one transfer: the only wait of a step."""
    stacked: list[float] = torch.stack([scalar.detach() for scalar in scalars]).tolist()
    return stacked
