"""Schedules: the factor on every rate, at the authors' epochs and in shorter runs."""

import pytest

from compressor.recipe import CosineRecipe, MilestonesRecipe, OneCycleRecipe
from compressor.schedules import Progress, rate_factor


def at_epoch(epoch_from_1, *, num_epochs=300, schedule=None):
    progress = Progress(
        epoch=epoch_from_1 - 1,
        step=(epoch_from_1 - 1) * 391,
        num_epochs=num_epochs,
        num_steps=num_epochs * 391,
    )
    return rate_factor(schedule or MilestonesRecipe(), progress)


def curve(schedule, num_steps=1_000):
    return [
        rate_factor(schedule, Progress(epoch=0, step=step, num_epochs=1, num_steps=num_steps))
        for step in range(num_steps)
    ]


@pytest.mark.parametrize(
    ("epoch", "learning_rate", "weight_rate", "temperature_rate"),
    [
        (1, 0.1, 0.025, 1e-3),
        (215, 0.1, 0.025, 1e-3),
        (216, 0.01, 2.5e-3, 1e-4),
        (260, 0.01, 2.5e-3, 1e-4),
        (261, 1e-3, 2.5e-4, 1e-5),
        (285, 1e-3, 2.5e-4, 1e-5),
        (286, 1e-4, 2.5e-5, 1e-6),
        (300, 1e-4, 2.5e-5, 1e-6),
    ],
)
def test_milestones_authors_epochs(epoch, learning_rate, weight_rate, temperature_rate):
    factor = at_epoch(epoch)
    rates = (0.1 * factor, 0.025 * factor, 1e-3 * factor)
    assert rates == pytest.approx((learning_rate, weight_rate, temperature_rate), rel=1e-12)


@pytest.mark.parametrize(
    ("num_epochs", "last_epochs_of_each_rate"), [(60, [43, 52, 57]), (20, [14, 17, 19])]
)
def test_milestones_same_fractions_of_short_runs(num_epochs, last_epochs_of_each_rate):
    factors = [at_epoch(e, num_epochs=num_epochs) for e in range(1, num_epochs + 1)]
    drops = [e for e in range(1, num_epochs) if factors[e] < factors[e - 1]]
    assert drops == last_epochs_of_each_rate
    assert factors[-1] == pytest.approx(1e-3)


@pytest.mark.parametrize("milestone", [0.01, 0.5, 215 / 300])
def test_milestones_never_come_before_the_first_epoch_ends(milestone):
    schedule = MilestonesRecipe(milestones=(milestone,))
    assert at_epoch(1, num_epochs=1, schedule=schedule) == 1
    assert at_epoch(1, num_epochs=1, schedule=MilestonesRecipe(milestones=(0.0,))) == 0.1


def test_milestones_empty_never_decays():
    assert at_epoch(300, schedule=MilestonesRecipe(milestones=())) == 1


def test_milestones_other_decay():
    schedule = MilestonesRecipe(milestones=(0.5, 0.75), decay=0.5)
    factors = [at_epoch(e, num_epochs=4, schedule=schedule) for e in (1, 2, 3, 4)]
    assert factors == [1, 1, 0.5, 0.25]


@pytest.mark.parametrize(("num_epochs", "num_idle"), [(350, 3), (100, 1), (20, 0)])
def test_milestones_idle_epochs_scale_with_the_run(num_epochs, num_idle):
    schedule = MilestonesRecipe(idle_fraction=3 / 350)
    factors = [at_epoch(e, num_epochs=num_epochs, schedule=schedule) for e in range(1, 6)]
    assert factors == [0.0] * num_idle + [1.0] * (5 - num_idle)


def test_one_cycle_rises_then_falls():
    factors = curve(OneCycleRecipe(warmup_fraction=0.3, initial_factor=0.04))
    assert factors[0] == pytest.approx(0.04)
    assert factors[150] == pytest.approx(0.52)
    assert max(factors) == factors[300] == pytest.approx(1)
    assert factors[650] == pytest.approx(0.5)
    assert 0 < factors[-1] < 1e-4
    assert factors[:301] == sorted(factors[:301])
    assert factors[300:] == sorted(factors[300:], reverse=True)


@pytest.mark.parametrize(("warmup", "first", "last"), [(0.0, 1.0, 0.0), (1.0, 0.04, 1.0)])
def test_one_cycle_extreme_warmup(warmup, first, last):
    factors = curve(OneCycleRecipe(warmup_fraction=warmup))
    assert factors[0] == pytest.approx(first)
    assert factors[-1] == pytest.approx(last, abs=2e-3)


def test_cosine_falls_from_one_to_zero():
    factors = curve(CosineRecipe())
    assert factors[0] == 1
    assert factors[500] == pytest.approx(0.5)
    assert 0 < factors[-1] < 1e-4
    assert factors == sorted(factors, reverse=True)


@pytest.mark.parametrize("schedule", [MilestonesRecipe(), OneCycleRecipe(), CosineRecipe()])
def test_every_factor_is_in_the_unit_interval(schedule):
    assert all(0 <= factor <= 1 for factor in curve(schedule))
