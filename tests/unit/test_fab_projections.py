"""Projections onto a hyperplane inside the box, against two solvers and the laws of optimality."""

import pytest
import torch
from pyautoattack.fab_projections import projection_l2, projection_linf
from torch.testing import assert_close

from compressor.attacks.fab_projections import project_l2, project_linf

both_norms = pytest.mark.parametrize("project", [project_linf, project_l2])
PEERS = {project_linf: projection_linf, project_l2: projection_l2}
LENGTHS = {
    project_linf: lambda d_ND: d_ND.abs().amax(1),
    project_l2: lambda d_ND: d_ND.square().sum(1).sqrt(),
}
SHAPES = [(200, 16), (60, 192), (12, 3072), (5, 9408)]


def random_rows(num_rows, num_coordinates, *, gap_over_reach, seed=0, dtype=torch.float32):
    """Points with a fifth of their coordinates on the border; a fifth of the weights is 0.

    `gap_over_reach` is how far away the plane is, 1 being the farthest that the box reaches.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (num_rows, num_coordinates)
    t = (torch.rand(shape, generator=generator) * 1.25 - 0.125).clamp(0, 1)
    w = torch.randn(shape, generator=generator) * torch.rand(shape, generator=generator)
    w = torch.where((torch.rand(shape, generator=generator) < 0.2) | (w.abs() < 1e-6), 0.0, w)
    t, w = t.to(dtype), w.to(dtype)
    side = torch.where(torch.arange(num_rows) % 2 == 0, 1.0, -1.0).to(dtype)
    reach = corner(t, w, side)
    return t, w, (w * t).sum(1) + gap_over_reach * (w * reach).sum(1), side


def corner(t_ND, w_ND, side_N):
    """The change to the corner of the box that lies farthest on one side of the plane."""
    return torch.where(side_N[:, None] * w_ND > 0, 1 - t_ND, -t_ND) * (w_ND != 0)


def bisect(t_ND, w_ND, b_N, *, project):
    """In float64 on the logarithm of the multiplier, 120 halvings."""
    t, w, b = t_ND.double(), w_ND.double(), b_N.double()
    gap = b - (w * t).sum(1)
    far = corner(t, w, gap.sign())
    speed = w.abs() if project is project_l2 else torch.ones_like(w)
    low, high = torch.full_like(b, -100.0), torch.full_like(b, 100.0)
    for _ in range(120):
        middle = (low + high) / 2
        gained = (w.abs() * torch.minimum(2 ** middle[:, None] * speed, far.abs())).sum(1)
        low = torch.where(gained < gap.abs(), middle, low)
        high = torch.where(gained < gap.abs(), high, middle)
    return far.sign() * torch.minimum(2 ** high[:, None] * speed, far.abs())


@both_norms
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gap_over_reach", [1e-4, 0.05, 0.5, 0.95])
def test_projection_agrees_with_bisection_in_float64(project, shape, gap_over_reach):
    t, w, b, _ = random_rows(*shape, gap_over_reach=gap_over_reach)
    ours = project(t, w, b)
    assert ours.dtype == torch.float32
    assert_close(ours.double(), bisect(t, w, b, project=project), rtol=1e-4, atol=1e-5)


@both_norms
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gap_over_reach", [0.0, 1e-4, 0.05, 0.5, 0.95, 1.5])
def test_projection_agrees_with_the_released_code(project, shape, gap_over_reach):
    t, w, b, _ = random_rows(*shape, gap_over_reach=gap_over_reach)
    # The released code loses digits where nearly all coordinates have met the border.
    assert_close(project(t, w, b), PEERS[project](t, w, b), rtol=1e-4, atol=2e-4)


@both_norms
@pytest.mark.parametrize("gap_over_reach", [0.01, 0.3, 0.9, 0.999])
def test_projection_is_optimal_among_feasible_points(project, gap_over_reach):
    """Feasible, and no feasible point is shorter: not even of 400 that are drawn."""
    t, w, b, side = random_rows(30, 24, gap_over_reach=gap_over_reach, dtype=torch.float64)
    d = project(t, w, b)
    assert_close((w * (t + d)).sum(1), b, rtol=0, atol=1e-12)
    assert float((t + d).min()) >= -1e-15
    assert float((t + d).max()) <= 1 + 1e-15
    generator = torch.Generator().manual_seed(1)
    beyond = t + corner(t, w, side)
    for _ in range(400):
        start = torch.rand(t.shape, generator=generator, dtype=t.dtype)
        start = torch.where(torch.rand(30, 1, generator=generator) < 0.5, start, t + d)
        value, value_beyond = (w * start).sum(1), (w * beyond).sum(1)
        share = (b - value) / (value_beyond - value)
        feasible = start + share[:, None] * (beyond - start)
        rows = (share >= 0) & (share <= 1)
        change = (feasible - t)[rows]
        assert (LENGTHS[project](change) >= LENGTHS[project](d[rows]) - 1e-12).all()
        if project is project_l2:  # the angle at a projection onto a convex set is not acute
            assert ((change - d[rows]) * d[rows]).sum(1).min() >= -1e-12


def test_projection_worked_example():
    """From (0.5, 0.9, 0.2) to 2 a + b - c = 2.4, which is 0.7 away; b meets its border."""
    t, w, b = torch.tensor([[0.5, 0.9, 0.2]]), torch.tensor([[2.0, 1.0, -1.0]]), torch.tensor([2.4])
    # 2 m + 0.1 + m = 0.7
    assert_close(project_linf(t, w, b), torch.tensor([[0.2, 0.1, -0.2]]))
    # 4 m + 0.1 + m = 0.7
    assert_close(project_l2(t, w, b), torch.tensor([[0.24, 0.1, -0.12]]))


@both_norms
def test_projection_goes_to_the_nearest_corner_where_the_box_ends(project):
    t, w, b, side = random_rows(20, 48, gap_over_reach=1.5)
    assert_close(project(t, w, b), corner(t, w, side), rtol=0, atol=0)


@both_norms
def test_projection_without_weights_or_without_distance_is_no_change(project):
    t, w, b, _ = random_rows(4, 16, gap_over_reach=0.3)
    no_change = torch.zeros_like(t)
    assert torch.equal(project(t, torch.zeros_like(w), b), no_change)
    assert torch.equal(project(t, w, (w * t).sum(1)), no_change)


@both_norms
def test_projection_moves_no_coordinate_without_weight(project):
    t, w, b, _ = random_rows(20, 48, gap_over_reach=0.7)
    assert torch.equal(project(t, w, b)[w == 0], torch.zeros(int((w == 0).sum())))


@both_norms
@pytest.mark.parametrize("power", [-40, 40])
def test_projection_does_not_depend_on_the_scale_of_the_weights(project, power):
    t, w, b, _ = random_rows(20, 48, gap_over_reach=0.3)
    assert torch.equal(project(t, 2.0**power * w, 2.0**power * b), project(t, w, b))


@both_norms
def test_projection_of_a_row_does_not_depend_on_the_others(project):
    t, w, b, _ = random_rows(20, 48, gap_over_reach=0.3, dtype=torch.float64)
    together = project(t, w, b)
    assert together.dtype == torch.float64
    for row in range(20):
        alone = project(*(z[row : row + 1] for z in (t, w, b)))
        assert_close(alone, together[row : row + 1], rtol=1e-12, atol=0)


@both_norms
def test_projection_of_weights_that_differ_by_many_powers_ends(project):
    """Each coordinate meets its border in a round of its own: the most rounds there can be."""
    w = 2.0 ** -torch.arange(24.0)[None]
    t = torch.zeros_like(w)
    room_for_all = (w * (1 - 1e-3)).sum(1)
    d = project(t, w, room_for_all)
    assert_close((w * d).sum(1), room_for_all)


@both_norms
def test_projection_that_is_done_waits_for_the_others(project):
    """The first row is a corner that the plane just touches; the second needs more rounds."""
    w = torch.stack([torch.ones(5), 8.0 ** -torch.arange(5)])
    t, b = torch.zeros_like(w), torch.stack([w[0].sum(), 0.99 * w[1].sum()])
    assert_close(project(t, w, b)[0], torch.ones(5))


@both_norms
def test_projection_onto_what_is_no_plane_ends(project):
    t, w, b, _ = random_rows(4, 16, gap_over_reach=0.3)
    w[0], w[1, 3], b[2] = torch.nan, torch.inf, torch.nan
    assert_close(project(t, w, b)[3], project(t[3:], w[3:], b[3:])[0])


@both_norms
def test_projection_leaves_its_arguments(project):
    arguments = random_rows(4, 16, gap_over_reach=0.3)[:3]
    before = [z.clone() for z in arguments]
    project(*arguments)
    assert all(torch.equal(z, z_before) for z, z_before in zip(arguments, before, strict=True))
