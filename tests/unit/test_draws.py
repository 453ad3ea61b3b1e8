"""Random draws: each sample's own by key, or the sequence of one generator as released."""

import pytest
import torch

from compressor.attacks.draws import GeneratorDraws, KeyedDraws, seeded_draws
from compressor.attacks.stages import build_stages
from compressor.randomness import child_keys
from compressor.threat import ThreatModel

KEYS = torch.arange(20) * 7_919 + 3
THREAT = ThreatModel(epsilon_pixels=8 / 255)


def keyed(rows=slice(None)):
    return KeyedDraws(keys_N=KEYS[rows])


def seeded(num_samples=20, seed=5):
    return seeded_draws(seed, torch.zeros(num_samples, 1))


every_kind = pytest.mark.parametrize("kind", ["uniform", "normal", "common_uniform"])


@every_kind
@pytest.mark.parametrize("rows", [[5], [5, 2], list(range(19, -1, -1))])
def test_keyed_draws_do_not_depend_on_the_batch(kind, rows):
    together, apart = keyed(), keyed(rows)
    for shape in ([3, 2, 2], [1], []):
        expected = getattr(together, kind)(shape)[rows]
        assert torch.equal(getattr(apart, kind)(shape), expected)


@every_kind
def test_keyed_draws_differ_between_samples_and_with_time(kind):
    draws = keyed()
    first, second = getattr(draws, kind)([4]), getattr(draws, kind)([4])
    assert first.shape == (20, 4)
    assert first.dtype == torch.float32
    assert len(torch.cat([first, second]).flatten().unique()) == 160


def test_keyed_draws_have_the_distributions_that_they_are_called_by():
    draws = KeyedDraws(keys_N=torch.arange(2_000))
    u, z = draws.uniform([10]), draws.normal([10])
    assert float(u.min()) >= 0
    assert float(u.max()) < 1
    assert float(u.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(u.std()) == pytest.approx(12**-0.5, abs=0.01)
    assert float(z.mean()) == pytest.approx(0, abs=0.03)
    assert float(z.std()) == pytest.approx(1, abs=0.03)


def test_keyed_draws_of_some_rows_go_on_where_all_were():
    whole, part = keyed(), keyed()
    whole.uniform([2])
    part.uniform([2])
    rows = torch.tensor([7, 1])
    assert torch.equal(part.rows(rows).uniform([3]), whole.uniform([3])[rows])


def test_keyed_draws_of_rows_leave_the_others_alone():
    draws, undisturbed = keyed(), keyed()
    draws.rows(torch.tensor([0])).uniform([3])
    assert torch.equal(draws.uniform([3]), undisturbed.uniform([3]))


def test_keyed_branches_depend_on_sample_and_number_only():
    early, late = keyed(), keyed()
    late.uniform([2])
    index, number = torch.tensor([4, 4, 9]), torch.tensor([0, 1, 1])
    branches = early.branch(index, number).uniform([5])
    assert torch.equal(late.branch(index, number).uniform([5]), branches)
    assert len(branches.flatten().unique()) == 15
    alone = keyed([9]).branch(torch.tensor([0]), torch.tensor([1])).uniform([5])
    assert torch.equal(alone, branches[2:])


def test_keyed_branches_are_not_the_sequence_itself():
    """Nor are they branches of branches, for small numbers."""
    index, seen = torch.arange(20), [keyed().uniform([4])]
    for number in range(5):
        branch = keyed().branch(index, torch.full((20,), number))
        seen += [branch.branch(index, torch.full((20,), n)).uniform([4]) for n in range(3)]
        seen.append(branch.uniform([4]))
    assert len(torch.stack(seen).unique()) == torch.stack(seen).numel()


@pytest.mark.parametrize("shape", [[3, 4, 4], [5], [1, 1, 1]])
def test_seeded_draws_are_the_sequence_of_torch(shape):
    draws = seeded()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        assert torch.equal(draws.uniform(shape), torch.rand([20, *shape]))
        assert torch.equal(draws.normal(shape), torch.randn([20, *shape]))
        common = draws.common_uniform(shape)
        assert torch.equal(common, torch.rand(torch.Size(shape).numel()).view(1, *shape))
        rows = draws.rows(torch.tensor([3, 8]))
        assert torch.equal(rows.uniform(shape), torch.rand([2, *shape]))
        branch = rows.branch(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 0]))
        assert torch.equal(branch.normal(shape), torch.randn([3, *shape]))
        assert torch.equal(draws.uniform(shape), torch.rand([20, *shape]))


def test_draws_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    for draws in (seeded(), keyed()):
        draws.uniform([3])
        draws.normal([3])
        draws.common_uniform([3])
        draws.rows(torch.tensor([1])).uniform([2])
    assert torch.equal(torch.get_rng_state(), before)


def test_seeded_draws_begin_anew():
    assert torch.equal(seeded().uniform([3]), seeded().uniform([3]))
    assert not torch.equal(seeded(seed=6).uniform([3]), seeded().uniform([3]))
    assert isinstance(seeded(), GeneratorDraws)


def test_fast_stages_draw_by_sample_and_each_its_own_numbers():
    names = ("pgd_sat", "apgd_ce", "apgd_t", "square")
    x = torch.zeros(20, 1, 2, 2)
    stages = build_stages(names, threat=THREAT, mode="fast", batch_size=8)
    draws = [stage.draws(x, keys_N=KEYS, seed=0) for stage in stages]
    assert len({tuple(d.keys_N.tolist()) for d in draws}) == len(names)
    other_seed = stages[0].draws(x, keys_N=child_keys(KEYS, 1), seed=0)
    assert not torch.equal(other_seed.keys_N, draws[0].keys_N)


def test_compat_stages_draw_from_the_seed_of_the_verification():
    x = torch.zeros(20, 1, 2, 2)
    for stage in build_stages(["apgd_ce", "square"], threat=THREAT, mode="compat", batch_size=8):
        draws = stage.draws(x, keys_N=KEYS, seed=5)
        assert torch.equal(draws.uniform([3]), seeded().uniform([3]))
