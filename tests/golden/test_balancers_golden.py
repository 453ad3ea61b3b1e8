"""Both balances of one clean and one robust teacher are the authors' to the last bit.

The oracle spells out the order of the released script's arithmetic, in float64 as there: its
temperatures, weights and first losses are Python floats.
"""

import itertools
import math
import random

import pytest
import torch

from compressor.balancers import LossWeightState, balance_loss_weights, balance_temperatures

NUM_STEPS = 5_000
SEEDS = range(4)
BOUNDS = (1.0, 10.0)
RATES = [1.0, 0.1, 0.1 * 0.1]


def oracle_temperatures(adv, nat, adv_entropy, nat_entropy, rate):
    """Entropies are tensors and carry the sign that the script gives them."""
    adv_entropy = torch.tensor(adv_entropy, dtype=torch.float64)
    nat_entropy = torch.tensor(nat_entropy, dtype=torch.float64)
    adv = adv - rate * torch.sign(adv_entropy / nat_entropy - 1).item()
    nat = nat - rate * torch.sign(nat_entropy / adv_entropy - 1).item()
    return max(min(10.0, adv), 1.0), max(min(10.0, nat), 1.0)


def oracle_weights(adv, nat, adv_loss, nat_loss, first_adv, first_nat, rate):
    adv_relative = adv_loss / first_adv
    nat_relative = nat_loss / first_nat
    mean = (adv_relative + nat_relative) / 2
    adv_part, nat_part = adv_relative / mean, nat_relative / mean
    nat = nat - rate * (nat - nat_part / (adv_part + nat_part))
    adv = adv - rate * (adv - adv_part / (adv_part + nat_part))
    adv, nat = (0 if adv < 0 else adv), (0 if nat < 0 else nat)
    factor = 1.0 / (adv + nat)
    return adv * factor, nat * factor


def losses_of(generator):
    """Falling from chance, with noise and now and then a spike; some of float32, as on devices."""
    for step in range(NUM_STEPS):
        level = 0.2 * math.exp(-step / 900)
        loss = level * generator.lognormvariate(0, 0.4) * generator.choice([1] * 50 + [30, 1e-4])
        yield loss if step % 2 else torch.tensor(loss, dtype=torch.float32).item()


def entropies_of(generator):
    """Sums of p log(p + guard): below 0, of a one-hot answer just above, and sometimes alike."""
    for _ in range(NUM_STEPS):
        first, second = (-2.3 * generator.random() for _ in range(2))
        yield generator.choice([(first, second)] * 20 + [(first, first), (1e-5, first), (0.0, 0.0)])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("rate", [0.025, 0.2, 1.0])
def test_loss_weights_equal_the_script(seed, rate):
    adv_losses, nat_losses = (losses_of(random.Random(10 * seed + i)) for i in range(2))
    factors = random.Random(seed).choices(RATES, k=NUM_STEPS)
    state, adv, nat, first = LossWeightState(weights=(0.5, 0.5)), 0.5, 0.5, None
    for losses, factor in zip(zip(adv_losses, nat_losses, strict=True), factors, strict=True):
        first = first or losses
        adv, nat = oracle_weights(adv, nat, *losses, *first, rate * factor)
        state = balance_loss_weights(state, losses, shares=(1.0, 1.0), rate=rate * factor)
        assert state == LossWeightState(weights=(adv, nat), first_losses=first)
    assert 0 < adv != 0.5


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("rate", [0.001, 0.05])
def test_temperatures_equal_the_script(seed, rate):
    generator = random.Random(seed)
    temperatures, seen = (1.0, 1.0), set()
    # Each pair stays for a while, so that the temperatures travel from one bound to the other.
    for entropies in itertools.islice(entropies_of(generator), NUM_STEPS // 20):
        for _ in range(generator.randrange(40)):
            factor = generator.choice(RATES)
            expected = oracle_temperatures(*temperatures, *entropies, rate * factor)
            temperatures = balance_temperatures(
                temperatures, entropies, rate=rate * factor, bounds=BOUNDS
            )
            assert temperatures == expected
            seen.add(temperatures)
    assert len(seen) > 100
