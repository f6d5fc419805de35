"""pytest tests/test_flow.py"""
import math
from itertools import pairwise

import pytest
import torch

import flow
from closed_form import mixture_velocity

F64 = torch.float64


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


M, S = torch.tensor([[0.5, -1.0], [0.6, 1.7]], dtype=F64)


def gaussian_velocity(z, t, m=M, s=S):
    """Exact for data N(m, diag s^2), not derived from mixture_velocity; it takes z_1 to m + s z_1.

    z_t = (1 - t) m + sd(t) u with u fixed along a path and sd(1) = 1, so dz/dt = -m + sd'(t) u.
    """
    sd = torch.sqrt((1 - t) ** 2 * s ** 2 + t ** 2)
    return -m + (t - (1 - t) * s ** 2) / sd * (z - (1 - t) * m) / sd

# ---- The path ----------------------------------------------------------------------------------

def test_path():
    """Its ends, its slope, and a time for every sample or position."""
    z0, eps = draw(2, 5, 3), draw(2, 5, 3, seed=1)
    assert torch.equal(flow.interpolate(z0, eps, 0.0), z0)
    assert torch.equal(flow.interpolate(z0, eps, 1.0), eps)
    slope = (flow.interpolate(z0, eps, 0.7) - flow.interpolate(z0, eps, 0.2)) / 0.5
    torch.testing.assert_close(slope, flow.velocity(z0, eps))
    for t in (draw(2).sigmoid(), draw(2, 5).sigmoid()):
        each = t.view(2, -1, 1).expand(2, 5, 3)
        torch.testing.assert_close(flow.interpolate(z0, eps, t), (1 - each) * z0 + each * eps)

# ---- Times -------------------------------------------------------------------------------------

def test_logit_normal_has_the_papers_density():
    """Eq. 16.9, integrated over bins, against drawn frequencies."""
    loc, scale, edges = 0.7, 1.3, torch.linspace(0, 1, 11, dtype=F64)
    t = flow.sample_time(torch.special.ndtr(draw(200_000)), loc=loc, scale=scale)
    frequencies = torch.histogram(t, edges).hist / len(t)
    x = (torch.arange(100_000, dtype=F64) + 0.5) / 100_000
    bell = (-(torch.logit(x) - loc) ** 2 / (2 * scale ** 2)).exp()
    density = bell / (scale * math.sqrt(2 * math.pi)) / (x * (1 - x))
    expected = density.reshape(10, -1).mean(1) / 10
    torch.testing.assert_close(frequencies, expected, atol=0.004, rtol=0)


def test_uniform_times_are_the_numbers_and_all_times_in_the_interval():
    u = draw(100).sigmoid()
    assert torch.equal(flow.sample_time(u, "uniform", loc=5.0, scale=9.0), u)
    for law in ("logit_normal", "uniform"):
        t = flow.sample_time(torch.tensor([[0.0, 0.5, 1.0]]), law, shift=3.0)
        assert t.shape == (1, 3) and t.min() >= 0 and t.max() <= 1


def test_shift_is_a_translation_of_the_logit():
    u = draw(100).sigmoid()
    t = flow.sample_time(u, loc=0.4)
    torch.testing.assert_close(torch.logit(flow.shift_time(t, 3.0)), torch.logit(t) + math.log(3.0))
    moved = flow.sample_time(u, loc=0.4 + math.log(3.0))
    torch.testing.assert_close(flow.sample_time(u, loc=0.4, shift=3.0), moved)
    each = torch.where(torch.arange(100) % 2 == 0, 3.0, 1.0).double()        # a shift a draw
    torch.testing.assert_close(flow.sample_time(u, loc=0.4, shift=each),
                               torch.where(each == 3.0, moved, t))


def test_text_loc_and_image_shift():
    """Eq. 15.38 is linear in ln d."""
    locs = [flow.text_loc(d, 16) for d in (16, 64, 256)]
    assert locs == pytest.approx([1, 1 + math.log(2), 1 + 2 * math.log(2)])
    assert flow.text_loc(16, 1) == 2.0
    assert flow.image_shift(256) == 1.0 and flow.image_shift(4 * 4096) == 2.0


def test_noise_near_other_latents():
    """It has variance 1. At times shifted by sigma^-1, data are seen through as much of it."""
    z, eps, t = draw(20000, 2), draw(20000, 2, seed=1), torch.tensor(0.7, dtype=torch.float64)
    near = flow.near(z, eps, 0.9)
    assert near.std() == pytest.approx(1, abs=0.02) and torch.equal(flow.near(z, eps, 0.0), eps)
    assert (near * z).mean() == pytest.approx(0.9, abs=0.02)
    sigma = (1 - 0.9 ** 2) ** 0.5
    later = flow.shift_time(t, 1 / sigma)
    torch.testing.assert_close((1 - later) / (sigma * later), (1 - t) / t)
    assert flow.near_shift(0.9) == pytest.approx(sigma ** -3) and flow.near_shift(0.0) == 1.0


@pytest.mark.parametrize("shift", [1.0, 3.7, 0.3])
def test_time_grid(shift):
    grid = flow.time_grid(16, shift)
    assert grid.shape == (17,) and grid[0] == 1 and grid[-1] == 0 and (grid.diff() < 0).all()
    assert grid[8].item() == pytest.approx(shift / (shift + 1))              # t = 1/2 moves here

# ---- Loss --------------------------------------------------------------------------------------

def test_loss():
    """The mean of a step over the positions that bear it; in float32, and 0 without positions."""
    v_pred, v = draw(6, 4, 3).requires_grad_(), draw(6, 4, 3, seed=1)
    mask = draw(6, 4, seed=2) > 0
    torch.testing.assert_close(flow.flow_matching_loss(v_pred, v, v.numel()),
                               (v_pred - v).square().mean().float())
    loss = sum(flow.flow_matching_loss(v_pred[i], v[i], 3 * int(mask.sum()), mask[i])
               for i in torch.arange(6).split(2))
    torch.testing.assert_close(loss, (v_pred - v)[mask].square().mean().float())
    loss.backward()
    assert (v_pred.grad[~mask] == 0).all() and (v_pred.grad[mask] != 0).all()
    v = v.bfloat16()
    assert flow.flow_matching_loss(v, v + 1, 12).dtype == torch.float32
    assert flow.flow_matching_loss(v[:0], v[:0], 0) == 0


def test_closed_form_velocity_is_the_conditional_mean():
    """Eq. 9.34: eps - z_0 minus v*(z_t, t) has no correlation with any function of z_t."""
    n, t = 400_000, 0.4
    means = torch.tensor([[0.0, 1.0], [0.0, -1.0]], dtype=F64)
    stds = torch.tensor([0.4, 0.2], dtype=F64)
    k = torch.randint(0, 2, (n,), generator=torch.Generator().manual_seed(3))
    z0, eps = means[k] + stds[k, None] * draw(n, 2), draw(n, 2, seed=1)
    zt = flow.interpolate(z0, eps, t)
    residual = flow.velocity(z0, eps) - mixture_velocity(means, stds)(zt, t)
    for g in (torch.ones_like(zt), zt, zt.flip(1), zt.cos(), (3 * zt).sin(), (zt > 0.3).to(F64)):
        product = residual * g
        assert (product.mean(0).abs() < 4.5 * product.std(0) / math.sqrt(n)).all()

# ---- Sampling ----------------------------------------------------------------------------------

@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2), ("rk4", 4)])
def test_order_of_convergence(solver, order, shift):
    """From noise to data, and back."""
    noise = draw(50, 2)
    data, grids = M + S * noise, [flow.time_grid(n, shift) for n in (20, 40, 80)]
    down = [flow.solve(gaussian_velocity, noise, grid, solver) - data for grid in grids]
    up = [flow.solve(gaussian_velocity, data, grid.flip(0), solver) - noise for grid in grids]
    for offs in (down, up):
        for coarse, fine in pairwise(off.abs().max().item() for off in offs):
            assert math.log2(coarse / fine) == pytest.approx(order, abs=0.35)


@pytest.mark.parametrize("solver", flow.SOLVERS)
def test_known_positions_stay_and_the_others_move(solver):
    """With the calls of the table, at times from 1 to 0."""
    z1, calls = draw(3, 4, 2), []
    known = torch.tensor([[True, True, False, False]] * 2 + [[False] * 4])
    velocity_fn = lambda z, t: calls.append(t) or z.cos() + t
    z0 = flow.solve(velocity_fn, z1, flow.time_grid(6), solver, known)
    assert len(calls) == 6 * flow.SOLVERS[solver] and calls[0] == 1.0
    assert all(type(t) is float and 0 <= t <= 1 for t in calls)
    assert torch.equal(z0[known], z1[known]) and (z0[~known] != z1[~known]).all()
    free = flow.solve(velocity_fn, z1, flow.time_grid(6), solver)
    assert torch.equal(z0[~known], free[~known])           # this velocity does not mix positions


def test_latents_stay_float32_under_a_bfloat16_network():
    step = 1e-4                                            # lost when added to 1 in bfloat16
    z1 = torch.ones(1, 1).bfloat16()
    z = flow.solve(lambda z, t: torch.full_like(z, step).bfloat16(), z1, flow.time_grid(4))
    assert z.dtype == torch.float32 and z.item() == pytest.approx(1 - step, abs=1e-6)


def test_repaint_approaches_the_conditional_with_more_cycles():
    """Two positions of N(0, [[1, .9], [.9, 1]]). If the first is 2, the second has mean 1.8."""
    eigenvalues, U = torch.linalg.eigh(torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=F64))
    zero, sd = torch.zeros(2, dtype=F64), eigenvalues.sqrt()
    known, g = torch.tensor([True, False]).expand(4000, 2), torch.Generator().manual_seed(1)

    def means(fraction, cycles):
        z = draw(4000, 2, 1)
        z[:, 0] = 2.0
        velocity_fn = lambda z, t: gaussian_velocity(z[..., 0].to(F64) @ U, t, zero, sd) @ U.T
        z0 = flow.repaint(lambda z, t: velocity_fn(z, t)[..., None], z, flow.time_grid(16), known,
                          lambda: torch.randn(4000, 2, 1, generator=g), fraction, cycles)
        return z0.mean((0, 2)).tolist()

    (first, once), (_, three), (_, ten) = means(1, 1), means(1, 3), means(1, 10)
    drifted, half = means(0.5, 1)                          # reset in half of the steps
    assert first == pytest.approx(2, abs=0.1) and 0.7 < once < three - 0.3 < ten - 0.5
    assert ten == pytest.approx(1.8, abs=0.15)
    assert drifted < 1.2 and half < once - 0.2


@pytest.mark.parametrize("fraction", (0.0, 1.0))
def test_repaint_starts_from_noise_and_without_known_positions_is_euler(fraction):
    z1, calls = draw(3, 4, 2).float(), []
    known = torch.tensor([True, True, False, False]).expand(3, 4)
    velocity_fn = lambda z, t: calls.append(z) or z.cos() + t
    problem = z1, flow.time_grid(6)
    flow.repaint(velocity_fn, *problem, known, lambda: torch.full_like(z1, 9.0), fraction)
    assert (calls[0][known] == 9).all() and torch.equal(calls[0][~known], z1[~known])
    got = flow.repaint(velocity_fn, *problem, known & False, lambda: torch.zeros_like(z1), fraction)
    torch.testing.assert_close(got, flow.solve(velocity_fn, *problem))


def test_guidance():
    v_c, v_t, v_u = (draw(4, 3, seed=seed) for seed in range(3))
    for w in (0, 1, 3):
        torch.testing.assert_close(flow.guide([v_c, v_u], [w]), w * v_c + (1 - w) * v_u)
        want = w * v_c + (2 - w) * v_t - v_u
        torch.testing.assert_close(flow.guide([v_c, v_t, v_u], [w, 2.0]), want)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="shift 0.0"):
        flow.time_grid(4, shift=0.0)
    with pytest.raises(ValueError, match="euller"):
        flow.solve(lambda z, t: z, draw(2, 2), flow.time_grid(2), "euller")
