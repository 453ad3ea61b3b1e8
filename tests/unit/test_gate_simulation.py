"""A small part of the evidence: drawn populations that must not pass seldom do."""

import importlib.util
import math
from pathlib import Path

import pytest

NUM_DRAWS = 2_000
RATE = 0.05 + 3 * math.sqrt(0.05 * 0.95 / NUM_DRAWS)
"""Three standard errors above what is permitted."""


@pytest.fixture(scope="module")
def simulation():
    path = Path(__file__).parents[1] / "evidence" / "gate_simulation.py"
    spec = importlib.util.spec_from_file_location("gate_simulation", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("place", range(3), ids=["at the limit", "below", "mixed classes"])
@pytest.mark.parametrize("num_images", [50, 300])
def test_false_passes_of_drawn_populations(simulation, place, num_images):
    found = simulation.false_passes(
        simulation.POPULATIONS[place], num_images=num_images, num_draws=NUM_DRAWS, seed=1
    )
    assert found.one_look <= RATE
    assert found.sequential <= RATE
    assert found.average_images <= num_images


def test_repeated_tests_would_show_up(simulation):
    found = simulation.false_passes(
        simulation.POPULATIONS[0], num_images=300, num_draws=NUM_DRAWS, seed=1
    )
    assert found.repeated_one_look > RATE
    assert found.sequential > 0.01


def test_mixed_classes_have_the_accuracy_of_the_limit(simulation):
    for population in simulation.POPULATIONS:
        accuracies = population.class_accuracies
        assert sum(accuracies) / len(accuracies) <= simulation.LIMIT + 1e-12
        assert simulation.CHUNK_SIZE % len(accuracies) == 0


def test_incomplete_evaluations_do_not_pass_more_often_whoever_ends_them(simulation):
    for row in simulation.ended_early(num_draws=NUM_DRAWS, seed=1, num_images=300):
        assert row.early_look <= RATE


def test_needs_agree_with_exact_sums(simulation):
    found = simulation.need(0.45, 0.6, num_draws=NUM_DRAWS, seed=1)
    assert found.simulated_power == pytest.approx(found.power, abs=0.03)
    assert found.simulated_average == pytest.approx(found.average_if_assumed, rel=0.05)
    assert found.power >= 0.9
    assert found.average_if_clear < found.average_if_assumed < found.average_at_limit
