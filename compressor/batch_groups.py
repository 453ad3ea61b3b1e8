"""Batches whose gradients are added up before the weights change."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class BatchGroups:
    """An epoch cut into groups of batches; the last one may be smaller."""

    size: int
    num_batches: int
    """Of an epoch."""

    def place(self, batch_in_epoch: int) -> tuple[int, int]:
        """Which of its group a batch is, from 0, and how many batches that group has."""
        place = batch_in_epoch % self.size
        return place, min(self.size, self.num_batches - (batch_in_epoch - place))

    def num_changes(self, *, epoch: int, batch_in_epoch: int) -> int:
        """How often the weights changed before a batch of an epoch, both counted from 0."""
        num_per_epoch = math.ceil(self.num_batches / self.size)
        return epoch * num_per_epoch + batch_in_epoch // self.size

    def is_amid(self, num_done: int) -> bool:
        """Whether gradients for the next change of the weights are there after so many batches."""
        return num_done < self.num_batches and num_done % self.size > 0
