"""Schedules: the factor on every rate as a function of progress. Nothing is changed in place."""

import math
from dataclasses import dataclass

from compressor.recipe import (
    CosineRecipe,
    MilestonesRecipe,
    OneCycleRecipe,
    Recipe,
    ScheduleRecipe,
)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands before a step; all counts from 0."""

    epoch: int
    step: int
    num_epochs: int
    num_steps: int

    @property
    def fraction(self) -> float:
        """Share of the run that is done, in [0, 1)."""
        return self.step / self.num_steps


def num_steps_of(recipe: Recipe, *, num_images: int) -> int:
    """Steps of a run on `num_images`; every epoch keeps its last, smaller batch."""
    return math.ceil(num_images / recipe.training.batch_size) * recipe.training.epochs


def rate_factor(schedule: ScheduleRecipe, progress: Progress) -> float:
    """Factor on the learning rate, and on both rates of the balancers, in [0, 1]."""
    if isinstance(schedule, MilestonesRecipe):
        return _milestones(schedule, progress)
    if isinstance(schedule, OneCycleRecipe):
        return _one_cycle(schedule, progress)
    return _cosine(schedule, progress)


def _milestones(schedule: MilestonesRecipe, progress: Progress) -> float:
    """At 215/300 of 300 epochs, the first epoch with the lower rate is number 216, from 1."""
    if progress.epoch < round(schedule.idle_fraction * progress.num_epochs):
        return 0.0
    # Rounded, but a run of one epoch has a first one: only a milestone at 0 comes before it.
    first_epochs = [
        max(1, round(m * progress.num_epochs)) if m > 0 else 0 for m in schedule.milestones
    ]
    passed = [first <= progress.epoch for first in first_epochs]
    return float(schedule.decay ** sum(passed))


def _one_cycle(schedule: OneCycleRecipe, progress: Progress) -> float:
    warmup = schedule.warmup_fraction
    if progress.fraction < warmup:
        share = progress.fraction / warmup
        return schedule.initial_factor + (1 - schedule.initial_factor) * share
    share = (progress.fraction - warmup) / (1 - warmup)
    return (1 + math.cos(math.pi * share)) / 2


def _cosine(_: CosineRecipe, progress: Progress) -> float:
    return (1 + math.cos(math.pi * progress.fraction)) / 2
