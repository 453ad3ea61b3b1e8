"""Keyed random numbers: pinned values, distribution, and independence.

The seeds are fixed, so nothing here is flaky; the thresholds are four to five standard errors.
"""

import math

import pytest
import torch

from compressor.randomness import Stream, normal, permutation, sample_keys, uniform

MASK = 2**64 - 1
NUM = 200_000
STANDARD_ERROR = 1 / math.sqrt(NUM)

PINNED_KEYS = [-2864160017715922665, -3468711268937631744, -1472510842369216801]
PINNED_UNIFORM = [0.31775879859924316, 0.7173110842704773, 0.16987723112106323]
PINNED_NORMAL = [-0.4260101, -0.0953013, -0.0526981]
PINNED_PERMUTATION = [4, 0, 5, 1, 3, 6, 7, 2]


def mix(value):
    """SplitMix64's finaliser on Python integers."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & MASK
    return value ^ (value >> 31)


def reference_bits(*, seed, epoch, index, stream, element):
    key = mix((mix((mix(seed) + epoch) & MASK) + index) & MASK)
    return mix((mix(key ^ (stream << 48)) + element * 0x9E3779B97F4A7C15) & MASK)


def keys(num=NUM, *, seed=0, epoch=0, first=0):
    return sample_keys(torch.arange(first, first + num), seed=seed, epoch=epoch)


def correlation(a, b):
    return float(torch.corrcoef(torch.stack([a.flatten().double(), b.flatten().double()]))[0, 1])


def test_uniform_equals_integer_reference():
    for seed, epoch, index in [(0, 0, 0), (0, 0, 1), (2**62 + 5, 299, 49_999), (1, 7, 123)]:
        drawn = uniform(
            sample_keys(torch.tensor([index]), seed=seed, epoch=epoch),
            stream=Stream.FLIP,
            shape=(5,),
        )
        bits = [
            reference_bits(
                seed=seed, epoch=epoch, index=index, stream=int(Stream.FLIP), element=element
            )
            for element in range(5)
        ]
        assert drawn[0].tolist() == [(value >> 40) / 2**24 for value in bits]


def test_normal_equals_integer_reference():
    drawn = normal(keys(1, seed=3, first=11), stream=Stream.ATTACK_START, shape=(2, 2))
    expected = []
    for element in range(4):
        bits = reference_bits(seed=3, epoch=0, index=11, stream=5, element=element)
        radius = math.sqrt(-2 * math.log(((bits >> 40) + 1) / 2**24))
        expected.append(radius * math.cos(2 * math.pi * (bits & 0xFFFFFF) / 2**24))
    assert drawn.flatten().tolist() == pytest.approx(expected, abs=2e-6)


def test_values_are_pinned():
    """Every run and every report depends on these numbers: they may never change."""
    three = keys(3, seed=1, epoch=2)
    assert three.tolist() == PINNED_KEYS
    assert uniform(three, stream=Stream.CROP_ROW).tolist() == PINNED_UNIFORM
    drawn = normal(three, stream=Stream.ATTACK_START).tolist()
    assert drawn == pytest.approx(PINNED_NORMAL, abs=2e-6)
    assert permutation(keys(8)).tolist() == PINNED_PERMUTATION


def test_shapes_and_types():
    assert uniform(keys(4), stream=1).shape == (4,)
    drawn = normal(keys(4), stream=1, shape=(3, 2, 2))
    assert drawn.shape == (4, 3, 2, 2)
    assert drawn.dtype == torch.float32
    assert keys(4).dtype == torch.int64


def test_uniform_moments_and_range():
    u = uniform(keys(), stream=Stream.CROP_ROW).double()
    assert float(u.min()) >= 0
    assert float(u.max()) < 1
    assert float(u.mean()) == pytest.approx(0.5, abs=5 * STANDARD_ERROR / math.sqrt(12))
    assert float(u.var()) == pytest.approx(1 / 12, rel=0.01)
    counts = torch.histc(u, bins=64, min=0, max=1)
    chi_square = float(((counts - NUM / 64) ** 2 / (NUM / 64)).sum())
    assert chi_square < 63 + 5 * math.sqrt(2 * 63)


@pytest.mark.parametrize("seed", [0, 1, 2**62])
def test_normal_moments(seed):
    z = normal(keys(NUM // 8, seed=seed), stream=Stream.ATTACK_START, shape=(8,)).double()
    assert torch.isfinite(z).all()
    assert float(z.mean()) == pytest.approx(0, abs=5 * STANDARD_ERROR)
    assert float(z.std()) == pytest.approx(1, abs=5 * STANDARD_ERROR)
    assert float((z**3).mean()) == pytest.approx(0, abs=5 * math.sqrt(15) * STANDARD_ERROR)
    assert float((z**4).mean()) == pytest.approx(3, abs=5 * math.sqrt(96) * STANDARD_ERROR)
    assert float((z.abs() > 1.959964).double().mean()) == pytest.approx(0.05, abs=0.003)


BASE = {"seed": 0, "epoch": 0, "first": 0}


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({"seed": 1}, id="seeds"),
        pytest.param({"epoch": 1}, id="epochs"),
        pytest.param({"first": 1}, id="neighbours"),
        pytest.param({"seed": 1, "epoch": 1}, id="both"),
    ],
)
@pytest.mark.parametrize("draw", [uniform, normal])
def test_draws_are_uncorrelated_between(other, draw):
    a = draw(keys(**BASE), stream=Stream.FLIP)
    b = draw(keys(**BASE | other), stream=Stream.FLIP)
    assert abs(correlation(a, b)) < 4.5 * STANDARD_ERROR
    assert abs(correlation(a**2, b**2)) < 4.5 * STANDARD_ERROR


def test_streams_are_uncorrelated():
    drawn = torch.stack([uniform(keys(), stream=s) for s in Stream]).double()
    matrix = torch.corrcoef(drawn) - torch.eye(len(Stream))
    assert float(matrix.abs().max()) < 4.5 * STANDARD_ERROR


def test_elements_of_one_sample_are_uncorrelated():
    z = normal(keys(NUM // 8), stream=Stream.ATTACK_START, shape=(8,)).double()
    matrix = torch.corrcoef(z.T) - torch.eye(8)
    assert float(matrix.abs().max()) < 4.5 / math.sqrt(NUM // 8)


def test_keys_do_not_collide():
    every = torch.cat([keys(20_000, seed=s, epoch=e) for s in range(3) for e in range(3)])
    assert len(every.unique()) == len(every)


def test_sample_does_not_depend_on_its_neighbours():
    z = normal(keys(10), stream=Stream.ATTACK_START, shape=(4,))
    order = torch.tensor([7, 0, 3])
    alone = normal(keys(10)[order], stream=Stream.ATTACK_START, shape=(4,))
    assert torch.equal(z[order], alone)


@pytest.mark.parametrize("num", [0, 1, 2, 1_000])
def test_permutation_is_one(num):
    assert permutation(keys(num)).sort().values.tolist() == list(range(num))


def test_permutation_differs_by_epoch_and_mixes():
    first, second = (permutation(keys(50_000, epoch=e)) for e in (0, 1))
    places = torch.arange(50_000)
    for a, b in [(first, second), (first, places), (first[1:], first[:-1])]:
        assert abs(correlation(a, b)) < 4.5 / math.sqrt(50_000)


def test_global_generator_is_neither_used_nor_changed():
    before = torch.random.get_rng_state()
    a = uniform(keys(5), stream=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(1)
    assert torch.equal(uniform(keys(5), stream=1), a)
