"""Tests of flow.py against closed forms.    Run: python -m pytest tests/test_flow.py"""
import math
import pathlib
import sys
from itertools import pairwise

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import flow

F64 = torch.float64


def draw(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def draw_signs(*shape, seed=0):
    return torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed)).to(F64) * 2 - 1


def gaussian_flow(m, s):
    """The exact flow of data N(m, diag s^2), derived apart from flow.mixture_velocity: velocity and map.

    z_t = (1 - t) m + sd(t) u with u fixed along a trajectory and sd(1) = 1, hence dz/dt = -m + sd'(t) u.
    """
    def velocity_fn(z, t):
        sd = torch.sqrt((1 - t) ** 2 * s ** 2 + t ** 2)
        return -m + (t - (1 - t) * s ** 2) / sd * (z - (1 - t) * m) / sd
    return velocity_fn, lambda z1: m + s * z1


def gaussian_log_density(z, m, cov):
    return torch.distributions.MultivariateNormal(m, cov).log_prob(z)


def rotated_flow(cov):
    """The exact flow of data N(0, cov) with correlated channels: dv/dz is symmetric but not diagonal."""
    eigenvalues, U = torch.linalg.eigh(cov)
    velocity_fn, _ = gaussian_flow(torch.zeros_like(eigenvalues), eigenvalues.sqrt())
    return lambda z, t: velocity_fn(z @ U, t) @ U.T


COV = torch.tensor([[1.0, 0.6, 0.2], [0.6, 0.8, -0.1], [0.2, -0.1, 0.5]], dtype=F64)


# The path

def test_path_ends_and_velocity():
    z0, eps = draw(2, 5, 3), draw(2, 5, 3, seed=1)
    assert torch.equal(flow.interpolate(z0, eps, 0.0), z0)
    assert torch.equal(flow.interpolate(z0, eps, 1.0), eps)
    slope = (flow.interpolate(z0, eps, 0.7) - flow.interpolate(z0, eps, 0.2)) / 0.5
    torch.testing.assert_close(slope, flow.velocity(z0, eps))


@pytest.mark.parametrize("t_shape", [(2,), (2, 5)])
def test_every_position_has_its_own_time(t_shape):
    z0, eps = draw(2, 5, 3), draw(2, 5, 3, seed=1)
    t = torch.rand(t_shape, dtype=F64, generator=torch.Generator().manual_seed(2))
    zt = flow.interpolate(z0, eps, t)
    for b in range(2):
        for i in range(5):
            tau = t[b, i] if len(t_shape) == 2 else t[b]
            torch.testing.assert_close(zt[b, i], (1 - tau) * z0[b, i] + tau * eps[b, i])
    v = flow.velocity(z0, eps)


# Times

def test_logit_normal_has_the_papers_density():
    """Eq. 16.9 integrated over bins against the drawn frequencies."""
    loc, scale, edges = 0.7, 1.3, torch.linspace(0, 1, 11, dtype=F64)
    t = flow.sample_time(draw(200_000), loc=loc, scale=scale)
    frequencies = torch.histogram(t, edges).hist / len(t)
    x = (torch.arange(100_000, dtype=F64) + 0.5) / 100_000
    bell = (-(torch.logit(x) - loc) ** 2 / (2 * scale ** 2)).exp() / (scale * math.sqrt(2 * math.pi))
    density = bell / (x * (1 - x))
    torch.testing.assert_close(frequencies, density.reshape(10, -1).mean(1) / 10, atol=0.004, rtol=0)


def test_uniform_times_are_uniform():
    t = flow.sample_time(draw(100_000), "uniform", loc=5.0, scale=9.0).sort().values
    torch.testing.assert_close(t, torch.linspace(0, 1, len(t), dtype=F64), atol=0.006, rtol=0)


def test_times_stay_in_the_interval_and_keep_their_shape():
    n = torch.tensor([[-40.0, 0.0, 40.0]])
    for kind in ("logit_normal", "uniform"):
        t = flow.sample_time(n, kind, shift=3.0)
        assert t.shape == n.shape and t.min() >= 0 and t.max() <= 1


def test_shift_is_a_translation_of_the_logit():
    n = draw(100)
    t = flow.sample_time(n, loc=0.4)
    torch.testing.assert_close(torch.logit(flow.shift_time(t, 3.0)), torch.logit(t) + math.log(3.0))
    moved = flow.sample_time(n, loc=0.4 + math.log(3.0))
    torch.testing.assert_close(flow.sample_time(n, loc=0.4, shift=3.0), moved)
    each = torch.where(torch.arange(100) % 2 == 0, 3.0, 1.0).double()          # one a draw
    torch.testing.assert_close(flow.sample_time(n, loc=0.4, shift=each), torch.where(each == 3.0, moved, t))


def test_default_loc_and_image_shift():
    """Eq. 15.38: linear in ln d, so every doubling adds the same."""
    assert [round(flow.default_loc(d, 16), 2) for d in (16, 64, 128)] == [1.0, 1.69, 2.04]
    assert flow.default_loc(16, 1) == 2.0
    steps = [flow.default_loc(2 * d, 16) - flow.default_loc(d, 16) for d in (16, 32, 64)]
    assert max(steps) - min(steps) < 1e-12
    assert flow.image_shift(256) == 1.0 and flow.image_shift(4 * 4096) == 2.0


@pytest.mark.parametrize("shift", [1.0, 3.7, 0.3])
def test_time_grid(shift):
    grid = flow.time_grid(16, shift)
    assert grid.shape == (17,) and grid[0] == 1 and grid[-1] == 0
    assert (grid.diff() < 0).all()
    middle = 8                                                           # t = 1/2 goes to s / (s + 1)
    assert grid[middle].item() == pytest.approx(shift / (shift + 1))


# Loss

def test_loss_is_the_mean_however_the_step_is_cut():
    v_pred, v = draw(6, 4, 3), draw(6, 4, 3, seed=1)
    whole = flow.fm_loss(v_pred, v, v.numel())
    parts = sum(flow.fm_loss(v_pred[i:i + 2], v[i:i + 2], v.numel()) for i in (0, 2, 4))
    torch.testing.assert_close(whole, torch.nn.functional.mse_loss(v_pred.float(), v.float()))
    torch.testing.assert_close(parts, whole)


def test_masked_positions_bear_no_loss_and_no_gradient():
    v_pred, v = draw(6, 4, 3).requires_grad_(), draw(6, 4, 3, seed=1)
    mask = torch.rand(6, 4, generator=torch.Generator().manual_seed(2)) < 0.5
    loss = flow.fm_loss(v_pred, v, int(mask.sum()) * 3, mask)
    torch.testing.assert_close(loss, ((v_pred - v)[mask] ** 2).mean().float())
    loss.backward()
    assert (v_pred.grad[~mask] == 0).all() and (v_pred.grad[mask] != 0).all()


def test_loss_is_float32_and_zero_without_positions():
    v = draw(4, 3).bfloat16()
    assert flow.fm_loss(v, v + 1, 12).dtype == torch.float32
    assert flow.fm_loss(v[:0], v[:0], 0) == 0


def test_closed_form_velocity_is_the_conditional_mean():
    """Eq. 9.34: eps - z_0 minus v*(z_t, t) has no correlation with any function of z_t."""
    n, t = 400_000, 0.4
    means, stds = torch.tensor([[0.0, 1.0], [0.0, -1.0]], dtype=F64), torch.tensor([0.4, 0.2], dtype=F64)
    k = torch.randint(0, 2, (n,), generator=torch.Generator().manual_seed(3))
    z0, eps = means[k] + stds[k, None] * draw(n, 2), draw(n, 2, seed=1)
    zt = flow.interpolate(z0, eps, t)
    residual = flow.velocity(z0, eps) - flow.mixture_velocity(means, stds)(zt, t)
    for g in (torch.ones_like(zt), zt, zt.flip(1), zt.cos(), (3 * zt).sin(), (zt > 0.3).to(F64)):
        product = residual * g
        assert (product.mean(0).abs() < 4.5 * product.std(0) / math.sqrt(n)).all()


# Solvers

M, S = torch.tensor([0.5, -1.0], dtype=F64), torch.tensor([0.6, 1.7], dtype=F64)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("solver, order", [("euler", 1), ("ab2", 2), ("heun", 2), ("rk4", 4)])
def test_order_of_convergence(solver, order, shift):
    velocity_fn, exact = gaussian_flow(M, S)
    z1 = draw(50, 2)
    errors = [(flow.solve(velocity_fn, z1, flow.time_grid(n, shift), solver) - exact(z1)).abs().max().item()
              for n in (20, 40, 80)]
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.35)


def test_ab2_is_exact_on_uneven_steps_but_for_its_first():
    """For dz/dt = 2 t only the opening Euler step errs, by its own h^2."""
    grid = torch.tensor([1.0, 0.9, 0.5, 0.45, 0.1, 0.0], dtype=F64)
    z0 = flow.solve(lambda z, t: torch.full_like(z, 2 * t), torch.ones(1, 1, dtype=F64), grid, "ab2")
    assert z0.item() == pytest.approx(0.0 - 0.1 ** 2, abs=1e-12)


@pytest.mark.parametrize("solver", flow.SOLVERS)
def test_calls_per_step(solver):
    calls = []
    flow.solve(lambda z, t: calls.append(t) or -z, draw(2, 3), flow.time_grid(5), solver)
    assert len(calls) == 5 * flow.SOLVERS[solver]
    assert all(type(t) is float and 0 <= t <= 1 for t in calls) and calls[0] == 1.0


@pytest.mark.parametrize("solver", flow.SOLVERS)
def test_known_positions_stay_and_the_rest_moves(solver):
    z1 = draw(3, 4, 2)
    known = torch.tensor([[True, True, False, False]] * 2 + [[False] * 4])
    z0 = flow.solve(lambda z, t: z.cos() + t, z1, flow.time_grid(6), solver, known)
    assert torch.equal(z0[known], z1[known])
    assert (z0[~known] != z1[~known]).all()
    free = flow.solve(lambda z, t: z.cos() + t, z1, flow.time_grid(6), solver)
    assert torch.equal(z0[~known], free[~known])           # this velocity acts position by position


def test_repaint_nears_the_conditional_with_its_cycles_and_drifts_without_its_lead():
    """Two positions of N(0, [[1, .9], [.9, 1]]), the first repainted to 2: the second is then 1.8 on average."""
    velocity_fn = rotated_flow(torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=F64))
    known, g = torch.tensor([True, False]).expand(4000, 2), torch.Generator().manual_seed(1)

    def means(fraction, cycles):
        z = draw(4000, 2, 1)
        z[:, 0] = 2.0
        z0 = flow.repaint(lambda z, t: velocity_fn(z[..., 0].to(F64), t)[..., None], z, flow.time_grid(16), known,
                          lambda: torch.randn(4000, 2, 1, generator=g), fraction, cycles)
        return z0.mean((0, 2)).tolist()
    (first, once), (_, three), (_, ten), (drifted, half) = means(1, 1), means(1, 3), means(1, 10), means(0.5, 1)
    assert first == pytest.approx(2, abs=0.1) and 0.7 < once < three - 0.3 < ten - 0.5
    assert ten == pytest.approx(1.8, abs=0.15)
    assert drifted < 1.2 and half < once - 0.2


@pytest.mark.parametrize("fraction", (0.0, 1.0))
def test_repaint_starts_from_noise(fraction):
    z1, known, seen = draw(3, 4, 2).float(), torch.tensor([True, True, False, False]).expand(3, 4), []
    flow.repaint(lambda z, t: seen.append(z) or z, z1, flow.time_grid(6), known, lambda: torch.full_like(z1, 9.0), fraction)
    assert (seen[0][known] == 9).all() and torch.equal(seen[0][~known], z1[~known])


def test_repaint_of_nothing_known_is_euler():
    z1, v = draw(3, 4, 2).float(), lambda z, t: z.cos() + t
    nothing = torch.zeros(3, 4, dtype=torch.bool)
    got = flow.repaint(v, z1, flow.time_grid(6), nothing, lambda: torch.full_like(z1, 9.0))
    torch.testing.assert_close(got, flow.solve(v, z1, flow.time_grid(6)))


def test_latents_stay_float32_under_a_bfloat16_network():
    step = 1e-4                                                          # lost when added to 1 in bfloat16
    z1 = torch.ones(1, 1).bfloat16()
    z = flow.solve(lambda z, t: torch.full_like(z, step).bfloat16(), z1, flow.time_grid(4))
    assert z.dtype == torch.float32
    assert z.item() == pytest.approx(1 - step, abs=1e-6)


def test_encoding_inverts_sampling():
    velocity_fn, _ = gaussian_flow(M, S)
    z1, grid = draw(20, 2), flow.time_grid(32)
    z0 = flow.solve(velocity_fn, z1, grid, "rk4")
    torch.testing.assert_close(flow.solve(velocity_fn, z0, grid.flip(0), "rk4"), z1, atol=1e-4, rtol=0)


# Guidance

def test_guidance():
    v_c, v_u = draw(4, 3), draw(4, 3, seed=1)
    torch.testing.assert_close(flow.guided(v_c, v_u, 1.0), v_c)
    torch.testing.assert_close(flow.guided(v_c, v_u, 0.0), v_u)
    torch.testing.assert_close(flow.guided(v_c, v_u, 3.0), 3 * v_c - 2 * v_u)
    assert [flow.guidance_at(t, 7.0, 0.2, 0.8) for t in (0.1, 0.2, 0.5, 0.8, 0.9)] == [1, 7, 7, 7, 1]
    assert flow.guidance_at(0.0, 7.0) == flow.guidance_at(1.0, 7.0) == 7


# Likelihood

def test_log_normal():
    z, mean, logvar = draw(4, 3), draw(4, 3, seed=1), draw(4, 3, seed=2)
    torch.testing.assert_close(flow.log_normal(z, mean, logvar),
                               torch.distributions.Normal(mean, (logvar / 2).exp()).log_prob(z))
    torch.testing.assert_close(flow.log_normal(z), torch.distributions.Normal(0.0, 1.0).log_prob(z))


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("solver, steps", [("rk4", 16), ("heun", 200)])
def test_gaussian_flow_density_exact(solver, steps, dtype):
    z0 = draw(40, 3)
    velocity_fn = rotated_flow(COV.to(dtype))
    got = flow.log_prob(velocity_fn, z0.to(dtype), flow.time_grid(steps), solver=solver)
    want = gaussian_log_density(z0, torch.zeros(3, dtype=F64), COV)
    assert got.dtype == dtype and got.shape == (40,)
    assert ((got - want).abs() / 3).max() < 1e-3                         # nats per dimension


def test_density_of_what_flows_to_a_time_above_0():
    t, z = 0.3, draw(40, 3)
    got = flow.log_prob(rotated_flow(COV), z, t + (1 - t) * flow.time_grid(16))
    want = gaussian_log_density(z, torch.zeros(3, dtype=F64), (1 - t) ** 2 * COV + t ** 2 * torch.eye(3, dtype=F64))
    assert ((got - want).abs() / 3).max() < 1e-4


def test_isotropic_flow_needs_one_sign_probe():
    m, s = draw(2, 4), torch.full((2, 4), 0.6, dtype=F64)
    velocity_fn, _ = gaussian_flow(m, s)
    z0, grid = m + s * draw(10, 2, 4, seed=1), flow.time_grid(16)
    want = torch.distributions.Normal(m, s).log_prob(z0).sum((1, 2))
    got = flow.log_prob(velocity_fn, z0, grid, draw_signs(10, 2, 4))
    assert ((got - want).abs() / 8).max() < 1e-3
    torch.testing.assert_close(got, flow.log_prob(velocity_fn, z0, grid))


@pytest.mark.parametrize("probe", [draw_signs, draw])
def test_hutchinson_is_unbiased(probe):
    """Mean over many probes at one point of a flow whose Jacobian is not diagonal."""
    n = 10_000
    z0 = draw(1, 3).expand(n, 3)
    got = flow.log_prob(rotated_flow(COV), z0, flow.time_grid(8), probe(n, 3, seed=4))
    want = flow.log_prob(rotated_flow(COV), z0[:1], flow.time_grid(8))
    assert got.std() > 0.05                                              # a single probe is noisy
    assert (got.mean() - want).abs() < 4.5 * got.std() / math.sqrt(n)


def test_mixture_density():
    means, stds = torch.tensor([[0.0, 1.0], [0.0, -1.0]], dtype=F64), torch.tensor([0.4, 0.2], dtype=F64)
    z0 = draw(50, 2)
    got = flow.log_prob(flow.mixture_velocity(means, stds), z0, flow.time_grid(64))
    parts = [gaussian_log_density(z0, m, s ** 2 * torch.eye(2, dtype=F64)) for m, s in zip(means, stds)]
    assert ((got - torch.logaddexp(*parts) + math.log(2)).abs() / 2).max() < 1e-3


@pytest.mark.parametrize("hutchinson", [False, True])
def test_known_positions_condition_the_density(hutchinson):
    """z = (a, b) with a known and b | a ~ N(0.8 a, 0.3^2): the flow of b alone, inside a larger latent."""
    def velocity_fn(z, t):
        a, b = z[:, :1], z[:, 1:]
        v, _ = gaussian_flow(0.8 * a, torch.tensor(0.3, dtype=F64))
        return torch.cat([1e3 * b, v(b, t)], dim=1)        # what it says of known positions is ignored
    z0 = draw(30, 2, 1)
    known = torch.tensor([[True, False]]).expand(30, 2)
    eps = draw_signs(30, 2, 1) if hutchinson else None
    got = flow.log_prob(velocity_fn, z0, flow.time_grid(32), eps, known)
    want = torch.distributions.Normal(0.8 * z0[:, 0, 0], 0.3).log_prob(z0[:, 1, 0])
    assert (got - want).abs().max() < 1e-3


def test_blocks_factorize():
    """Eq. 10.16: log p(z_1) + log p(z_2 | z_1), both blocks in one solve, is the joint Gaussian's density."""
    a, s = 0.8, 0.5
    z = draw(20, 2)                                        # z_1 ~ N(0, 1), z_2 | z_1 ~ N(a z_1, s^2)
    m = torch.stack([torch.zeros(20, dtype=F64), a * z[:, 0]], dim=1).reshape(40, 1)
    sd = torch.tensor([1.0, s], dtype=F64).expand(20, 2).reshape(40, 1)
    blocks = flow.log_prob(gaussian_flow(m, sd)[0], z.reshape(40, 1), flow.time_grid(32))
    cov = torch.tensor([[1.0, a], [a, a ** 2 + s ** 2]], dtype=F64)
    want = gaussian_log_density(z, torch.zeros(2, dtype=F64), cov)
    torch.testing.assert_close(blocks.reshape(20, 2).sum(1), want, atol=1e-4, rtol=0)


def test_log_prob_under_no_grad_leaves_no_graph_and_refuses_a_cut_one():
    net = torch.nn.Linear(3, 3)
    with torch.no_grad():
        got = flow.log_prob(lambda z, t: net(z), torch.zeros(2, 3), flow.time_grid(2))
    assert not got.requires_grad and net.weight.grad is None
    with pytest.raises(ValueError, match="differentiably"):
        flow.log_prob(torch.no_grad()(lambda z, t: net(z).detach()), torch.zeros(2, 3), flow.time_grid(2))


# Bounds: z ~ N(0, 1) and x | z ~ N(z, NOISE), so x ~ N(0, 1 + NOISE), and z | x is normal with mean
# x / (1 + NOISE) and variance NOISE / (1 + NOISE)

NOISE = 0.25


def weights(x, mean, var, K, n):
    """The three terms of log w for n repetitions of K samples from q = N(mean, var), each (K, n)."""
    z = mean + math.sqrt(var) * draw(K, n)
    return (flow.log_normal(x.expand(K, n), z, math.log(NOISE)), flow.log_normal(z),
            flow.log_normal(z, mean, math.log(var)))


def test_bounds_are_tight_for_the_exact_posterior():
    x = torch.tensor(1.3, dtype=F64)
    terms = weights(x, x / (1 + NOISE), NOISE / (1 + NOISE), K=5, n=7)
    want = torch.distributions.Normal(0.0, math.sqrt(1 + NOISE)).log_prob(x).expand(7)
    torch.testing.assert_close(flow.elbo(*terms), want)
    torch.testing.assert_close(flow.iwae(*terms), want)


def test_elbo_is_the_closed_form_bound():
    """log p(x) - KL(q || p(z|x))."""
    x, mean, var = torch.tensor(1.0, dtype=F64), 0.6, 0.3
    got = flow.elbo(*weights(x, mean, var, K=200_000, n=1)).item()
    posterior = torch.distributions.Normal(x / (1 + NOISE), math.sqrt(NOISE / (1 + NOISE)))
    gap = torch.distributions.kl_divergence(torch.distributions.Normal(mean, math.sqrt(var)), posterior)
    want = torch.distributions.Normal(0.0, math.sqrt(1 + NOISE)).log_prob(x) - gap
    assert got == pytest.approx(want.item(), abs=0.01)


def test_iwae_is_above_elbo_and_rises_with_k():
    x = torch.tensor(1.0, dtype=F64)
    terms = weights(x, 0.8, 0.5, K=64, n=4000)
    assert (flow.iwae(*terms) >= flow.elbo(*terms)).all()
    means = [flow.iwae(*(term.reshape(K, -1) for term in terms)).mean().item() for K in (1, 2, 4, 16, 64)]
    truth = torch.distributions.Normal(0.0, math.sqrt(1 + NOISE)).log_prob(x).item()
    assert means[0] == pytest.approx(flow.elbo(*terms).mean().item())    # K = 1 is the ELBO
    assert all(low < high for low, high in pairwise(means)) and means[-1] < truth + 0.005
    assert truth - means[-1] < 0.01


def test_iwae_survives_weights_that_underflow():
    log_w = torch.tensor([-2000.0, -2001.0], dtype=F64)
    zero = torch.zeros(2, dtype=F64)
    want = -2000 + math.log((1 + math.exp(-1)) / 2)
    assert flow.iwae(log_w, zero, zero).item() == pytest.approx(want)


def test_conditional_is_joint_minus_prefix():
    """x_i = z_i + noise with z_2 | z_1 ~ N(0.8 z_1, 1): Eq. 10.12 against the Gaussian's own conditional."""
    cov_z = torch.tensor([[1.0, 0.8], [0.8, 1.64]], dtype=F64)
    cov_x = cov_z + NOISE * torch.eye(2, dtype=F64)
    x = torch.tensor([0.5, -1.0], dtype=F64)

    def bound(x, cov_z, cov_x):                                          # IWAE under the exact posterior of z
        gain = cov_z @ torch.linalg.inv(cov_x)
        q = torch.distributions.MultivariateNormal(gain @ x, cov_z - gain @ cov_z)
        z = q.mean + draw(4, len(x)) @ torch.linalg.cholesky(q.covariance_matrix).T
        return flow.iwae(flow.log_normal(x.expand(4, -1), z, math.log(NOISE)).sum(-1),
                         gaussian_log_density(z, torch.zeros(len(x), dtype=F64), cov_z), q.log_prob(z))

    got = flow.conditional(bound(x, cov_z, cov_x), bound(x[:1], cov_z[:1, :1], cov_x[:1, :1]))
    mean, var = 0.8 / cov_x[0, 0] * x[0], cov_x[1, 1] - 0.8 ** 2 / cov_x[0, 0]
    torch.testing.assert_close(got, torch.distributions.Normal(mean, var.sqrt()).log_prob(x[1]))


def test_single_block_response_score():
    """Eq. 10.22, z_2 | z_1 ~ N(0.8 z_1, 1) by the ODE, under the exact posterior: log p(x_2 | z_1) itself."""
    z_prefix, x = torch.tensor(0.7, dtype=F64), torch.tensor(-0.2, dtype=F64)
    prior_mean = 0.8 * z_prefix
    q_mean, q_var = prior_mean + (x - prior_mean) / (1 + NOISE), NOISE / (1 + NOISE)
    z = q_mean + math.sqrt(q_var) * draw(6)
    velocity_fn, _ = gaussian_flow(prior_mean, torch.tensor(1.0, dtype=F64))
    prior = flow.log_prob(velocity_fn, z[:, None], flow.time_grid(32))
    score = flow.elbo(flow.log_normal(x.expand(6), z, math.log(NOISE)), prior,
                      flow.log_normal(z, q_mean, math.log(q_var)))
    want = torch.distributions.Normal(prior_mean, math.sqrt(1 + NOISE)).log_prob(x)
    torch.testing.assert_close(score, want, atol=1e-5, rtol=0)


def test_perplexity():
    """A model that is uniform over V symbols has perplexity V; texts weigh by their length, not equally."""
    lengths = torch.tensor([3, 50])
    assert flow.perplexity(-lengths * math.log(257), lengths).item() == pytest.approx(257, rel=1e-6)
    assert flow.nats_per_token([-6.0, -2.0], [1, 3]).item() == 2.0
    assert flow.perplexity([-1e6], [1]).item() == math.inf


# Mistakes

@pytest.mark.parametrize("mistake, names", [
    (lambda: flow.sample_time(draw(3), "cosine"), "cosine.*logit_normal"),
    (lambda: flow.time_grid(0), "at least 1"),
    (lambda: flow.time_grid(4, shift=0.0), "shift 0.0"),
    (lambda: flow.solve(lambda z, t: z, draw(2, 2), flow.time_grid(2), "euller"), "euller.*heun"),
])
def test_mistakes_are_one_line(mistake, names):
    with pytest.raises(ValueError, match=names) as error:
        mistake()
    assert "\n" not in str(error.value)
