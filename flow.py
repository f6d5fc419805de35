"""Flow: the path from data to noise, its velocity, the loss, the ODE solvers, guidance and the likelihood.

    z_t = (1 - t) z_0 + t eps,  eps ~ N(0, I)             t = 0 data, t = 1 noise (paper, Eq. 9.31, alpha = t)
    v   = dz_t/dt = eps - z_0                             what the network predicts (Eq. 9.32)
    L   = sum |v_pred - v|^2 / count                      flow matching (Eq. 3.7, 9.33)
    t   = sigmoid(loc + scale n),  n ~ N(0, 1)            which times are trained (Eq. 16.5, 16.6)
    t'  = s t / (s t + 1 - t)                             time shift: logit t' = logit t + ln s
    z_0 = z_1 + integral of v dt, t: 1 -> 0               sampling (Eq. 10.2)
    v   = v_u + w (v_c - v_u)                             guidance; w = 1 is the conditional velocity
    log p(z_0) = log N(z_1; 0, I) + integral of div v dt  change of variables, t: 0 -> 1 (Eq. 10.23, 10.24)
    div v = E[eps^T (dv/dz) eps]                          Hutchinson, one eps a solve (Eq. 10.25)
    log w = log p(x|z) + log p(z) - log q(z|x)            ELBO: mean log w; IWAE: log mean w (Eq. 10.8, 10.9)
    PPL = exp(-sum log p / sum tokens)                    perplexity of a data set (Eq. 10.7, 10.10)

These conventions hold in the whole repository. The network is fed TIME_SCALE t = 1000 t. A clean position has
t = 0, so every position may have its own time. Nothing here draws randomness: noise is always an argument.
The flow solves for the prior p(z), it does not define it: a low L is not a high log p (paper, Sec. 9.4).
Shapes: B samples, L positions, Dz channels, K posterior samples. z is (..., Dz); t has leading dimensions of
z, or is a float. Likelihoods are in nats.    Run: python flow.py   (CPU, 3 s)
"""
import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

TIME_SCALE = 1000.0                                      # the network's time embedding sees 1000 t
SOLVERS = {"euler": 1, "ab2": 1, "heun": 2, "rk4": 4}    # network calls a step: compare at equal calls
Velocity = Callable[[Tensor, float], Tensor]             # (z, t) -> dz/dt, of z's shape


# ------------------------------------------------------------------------------------------------------------
# The path

def _over_channels(x: Tensor | float, z: Tensor) -> Tensor | float:
    """x with leading dimensions of z -> x that broadcasts against z."""
    return x.reshape(x.shape + (1,) * (z.ndim - x.ndim)) if isinstance(x, Tensor) else x


def interpolate(z0: Tensor, eps: Tensor, t: Tensor | float) -> Tensor:
    """The noisy latent z_t = (1 - t) z_0 + t eps (paper, Eq. 9.31). z0, eps (..., Dz); t (...) or a float."""
    t = _over_channels(t, z0)
    return (1 - t) * z0 + t * eps


def velocity(z0: Tensor, eps: Tensor) -> Tensor:
    """The regression target v = eps - z_0, constant along a path (paper, Eq. 9.32). Any equal shapes."""
    return eps - z0


# ------------------------------------------------------------------------------------------------------------
# Times

def shift_time(t: Tensor, shift: float | Tensor) -> Tensor:
    """Moves times towards noise if shift > 1; 0 and 1 stay exactly. Raises ValueError unless shift > 0.

    Large images need it: many correlated latents are still readable where few drown in the noise. On the
    logit-normal law a shift s is the same as adding ln s to loc.
    """
    if not torch.as_tensor(shift > 0).all():
        raise ValueError(f"time shift {shift} is not positive; use 1 to leave the times as they are")
    return shift * t / (shift * t + (1 - t))


def sample_time(normal: Tensor, kind: str = "logit_normal", loc: float | Tensor = 1.0,
                scale: float = 1.0, shift: float | Tensor = 1.0) -> Tensor:
    """Training times in [0, 1] from standard normal draws of any shape (paper, Eq. 16.5, 16.6).

    "logit_normal": sigmoid(loc + scale n), a larger loc trains noisier inputs. "uniform": Phi(n), without loc
    and scale. Normal draws for both, so that one random stream serves every law. Then shift_time. loc and
    shift are one for all or one a draw.
    """
    if kind == "logit_normal":
        t = torch.sigmoid(loc + scale * normal)
    elif kind == "uniform":
        t = torch.special.ndtr(normal)
    else:
        raise ValueError(f"time law {kind!r} is unknown; use logit_normal or uniform")
    return shift_time(t, shift)


def default_loc(dz: int, block_len: int) -> float:
    """loc for text latents of dz channels: 1 + ln(dz / 16) / 2, and 1 more for blocks of a single latent.

    The paper's law is a ln d + b (Eq. 15.38): more channels show the same meaning through more noise. a = 1/2
    keeps d exp(-2 loc) constant; 1.0, 1.69, 2.04 at 16, 64, 128 stand against measured optima 1.0, 1.7, 2.3.
    These are for blocks of 16. A latent alone has nobody to agree with: all is decided near noise (ours).
    """
    return 1.0 + 0.5 * math.log(dz / 16) + (block_len == 1)


def image_shift(dims: int) -> float:
    """Time shift of an image of dims latent numbers, positions x channels: sqrt(dims / 4096), at least 1."""
    return max(1.0, math.sqrt(dims / 4096))


def time_grid(steps: int, shift: float = 1.0) -> Tensor:
    """Sampling times from 1 down to 0, (steps + 1,) float64 on the CPU, with the shift used in training.

    Raises ValueError for fewer than one step.
    """
    if steps < 1:
        raise ValueError(f"{steps} sampling steps; use at least 1")
    return shift_time(torch.linspace(1, 0, steps + 1, dtype=torch.float64, device="cpu"), shift)


# ------------------------------------------------------------------------------------------------------------
# Training loss

def fm_loss(v_pred: Tensor, v: Tensor, count: int, mask: Tensor | None = None) -> Tensor:
    """Flow-matching loss (paper, Eq. 3.7, 9.33), a float32 scalar.

    v_pred, v: (..., Dz). mask: (...) bool, the positions that bear loss; all of them if absent.
    count: loss positions x channels of the whole optimizer step, over all workers and micro-steps: the sum of
    the parts is then a mean however the step is cut up. If it is 0 there is nothing to learn: 0, not NaN.
    """
    error = (v_pred.float() - v.float()).square()                      # (..., Dz)
    if mask is not None:
        error = torch.where(_over_channels(mask, error), error, 0.0)
    return error.sum() / max(count, 1)


# ------------------------------------------------------------------------------------------------------------
# Sampling

def _hold(v: Tensor, known: Tensor | None) -> Tensor:
    """v with zeros at known positions."""
    return v if known is None else torch.where(_over_channels(known, v), 0.0, v)


def solve(velocity_fn: Velocity, z: Tensor, grid: Tensor, solver: str = "euler",
          known: Tensor | None = None) -> Tensor:
    """Integrates dz/dt = velocity_fn(z, t) along the grid (paper, Eq. 10.2); returns z at its last time.

    z: (..., Dz) at time grid[0]; kept in float32 whatever the network's precision, or float64 if it comes so.
    grid: monotone times. time_grid(n) generates, noise -> data; time_grid(n).flip(0) encodes, data -> noise.
    solver: order 1 euler; order 2 heun and ab2 (Adams-Bashforth for uneven steps, begun with one Euler step,
    so one call a step); order 4 rk4. heun and rk4 ask for v at t = 0 itself: finite, but seldom trained.
    known: (...) bool, positions that keep their z: the clean repaint of the first block (paper, Sec. 5.2).
    velocity_fn gets t as a Python float, and must itself tell the network t = 0 at known positions.
    Raises ValueError for an unknown solver.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver {solver!r} is unknown; use one of {', '.join(SOLVERS)}")
    if z.dtype != torch.float64:
        z = z.float()

    def f(z: Tensor, t: float) -> Tensor:
        return _hold(velocity_fn(z, t).to(z.dtype), known)

    v_last = None
    for t, t_next in pairwise(grid.tolist()):
        h, v = t_next - t, f(z, t)                          # h < 0 when generating
        if solver == "heun":
            slope = (v + f(z + h * v, t_next)) / 2
        elif solver == "rk4":
            v2 = f(z + h / 2 * v, t + h / 2)
            v3 = f(z + h / 2 * v2, t + h / 2)
            slope = (v + 2 * v2 + 2 * v3 + f(z + h * v3, t_next)) / 6
        elif solver == "ab2" and v_last is not None:
            slope = v + h / (2 * h_last) * (v - v_last)     # line through the last two velocities, mid-step
        else:
            slope = v
        z, h_last, v_last = z + h * slope, h, v
    return z


def repaint(velocity_fn: Velocity, z: Tensor, grid: Tensor, known: Tensor, noise: Callable[[], Tensor],
            fraction: float = 1.0, cycles: int = 1) -> Tensor:
    """Partial repaint of a block (paper, Sec. 5.2, 17.1; 2201.09865), by Euler steps.

    z: (..., Dz), noise where unknown, clean latents where known (...) says so. In the first `fraction` of the
    steps, and at least the very first, the known positions are set to their clean latents under the noise of the
    time, and each step is taken `cycles` times, with noise put back in between; after them they drift with the others.
    noise: gives fresh noise of z's shape at every call.
    """
    clean, known = z.float(), _over_channels(known, z)
    z, steps = clean, len(grid) - 1
    for i, (t, t_next) in enumerate(pairwise(grid.tolist())):
        led = i < max(1, fraction * steps)
        for cycle in range(cycles if led else 1):
            if cycle:                                       # back from t_next to t, on the same path
                kept = (1 - t) / (1 - t_next)
                z = kept * z + math.sqrt(t * t - (kept * t_next) ** 2) * noise()
            if led:
                z = torch.where(known, interpolate(clean, noise(), t), z)
            z = z + (t_next - t) * velocity_fn(z, t).float()
    return z


def guided(v_c: Tensor, v_u: Tensor, w: float) -> Tensor:
    """Classifier-free guidance v_u + w (v_c - v_u): w = 0 unconditional, 1 conditional, above 1 sharpened."""
    return v_u + w * (v_c - v_u)


def guidance_at(t: float, w: float, low: float = 0.0, high: float = 1.0) -> float:
    """The guidance scale at time t: w inside [low, high], else 1, where callers save the unconditional call.

    Guidance at the highest noise costs variety, at the lowest it changes little (arXiv 2404.07724).
    """
    return w if low <= t <= high else 1.0


# ------------------------------------------------------------------------------------------------------------
# Likelihood (paper, Sec. 3.1.2 and 10)

def log_normal(z: Tensor, mean: Tensor | float = 0.0, logvar: Tensor | float = 0.0) -> Tensor:
    """log N(z; mean, exp(logvar)) in nats, number by number: q(z|x), or by default the base at t = 1."""
    logvar = torch.as_tensor(logvar, dtype=z.dtype, device=z.device)
    return -0.5 * ((z - mean).square() * torch.exp(-logvar) + logvar + math.log(2 * math.pi))


def log_prob(velocity_fn: Velocity, z0: Tensor, grid: Tensor, eps: Tensor | None = None,
             known: Tensor | None = None, solver: str = "rk4") -> Tensor:
    """log p(z_0) under the flow in nats, (B,): the augmented ODE from t = 0 to 1 (paper, Eq. 10.23, 10.24).

    z0: (B, ..., Dz); all behind B is summed. Samples must not see each other inside velocity_fn.
    grid: as for sampling, from 1 to 0, or to the time that z0 is of, whose density it then is; run backwards.
    eps: None for the exact divergence, D = z0[0].numel() backward passes a call, so small sizes only. A probe
    of z0's shape for Hutchinson's estimate (Eq. 10.25): one backward pass a call, one probe the whole solve.
    Any law with E[eps eps^T] = I is unbiased; signs +-1 vary least, and not at all where dv/dz is diagonal.
    known: (B, ...) bool, positions held fixed and not counted: log p(unknown | known).
    Block-causal text: with the clean copy fixed inside velocity_fn the noisy blocks do not see each other, so
    one solve with the blocks along B gives every log p(z_b | z_<b); their sum is log p(z) (paper, Eq. 10.16).
    Works under no_grad but not inference_mode. The result carries no gradient.
    Raises ValueError if the velocity cannot be differentiated.
    """
    if z0.dtype != torch.float64:
        z0 = z0.float()
    B, D = z0.shape[0], z0[0].numel()
    eps = None if eps is None else _hold(eps.to(z0.dtype), known)    # known rows of dv/dz are 0, columns not

    def augmented(state: Tensor, t: float) -> Tensor:                  # d/dt of (z, l), with dl/dt = div v
        with torch.enable_grad():
            z = state[:, :D].detach().reshape(z0.shape).requires_grad_()
            v = _hold(velocity_fn(z, t).to(z.dtype), known)            # (B, ..., Dz)
            if not v.requires_grad:
                raise ValueError("the velocity does not depend on z differentiably; keep no_grad, detach and "
                                 "inference_mode out of velocity_fn")
            if eps is None:
                div = sum(torch.autograd.grad(v_i.sum(), z, retain_graph=True)[0].reshape(B, D)[:, i]
                          for i, v_i in enumerate(v.reshape(B, D).unbind(1)))              # (B,)
            else:
                div = (torch.autograd.grad(v, z, eps)[0] * eps).reshape(B, D).sum(1)       # (B,)
        return torch.cat([v.detach().reshape(B, D), div[:, None]], dim=1)                  # (B, D + 1)

    state = torch.cat([z0.detach().reshape(B, D), z0.new_zeros(B, 1)], dim=1)              # (B, D + 1)
    state = solve(augmented, state, grid.flip(0), solver)
    base = _hold(log_normal(state[:, :D].reshape(z0.shape)), known)                        # (B, ..., Dz)
    return base.reshape(B, D).sum(1) + state[:, D]


def elbo(log_px: Tensor, log_pz: Tensor, log_q: Tensor) -> Tensor:
    """Evidence lower bound: the mean of log w = log p(x|z) + log p(z) - log q(z|x) (paper, Eq. 10.8, 10.9).

    Each (K, ...) in nats for K samples z ~ q(z|x); gives (...). If the three are those of a single new block,
    given the prefix and its latents, it is the single-block response score (paper, Eq. 10.21, 10.22).
    """
    return (log_px + log_pz - log_q).mean(0)


def iwae(log_px: Tensor, log_pz: Tensor, log_q: Tensor) -> Tensor:
    """Importance-weighted bound, log of the mean of w (paper, Eq. 10.9); shapes as in elbo, never below it.

    Its expectation rises with K towards log p(x). That needs an exact log p(z): Hutchinson's noise enters the
    exponent and biases it upwards, so with one probe a sample it is no longer a lower bound.
    """
    log_w = log_px + log_pz - log_q                                    # (K, ...)
    return torch.logsumexp(log_w, 0) - math.log(len(log_w))


def conditional(log_joint: Tensor, log_prefix: Tensor) -> Tensor:
    """log p(response | prefix) = log p(prefix, response) - log p(prefix) in nats (paper, Eq. 10.12 to 10.14).

    A difference of bounds is an estimate, not a bound: use one estimator and one K for both.
    """
    return log_joint - log_prefix


def nats_per_token(log_p: Tensor, tokens: Tensor) -> Tensor:
    """-sum log p / sum tokens, a float64 scalar; log_p in nats and token counts, one entry a text."""
    return -torch.as_tensor(log_p).double().sum() / torch.as_tensor(tokens).double().sum()


def perplexity(log_p: Tensor, tokens: Tensor) -> Tensor:
    """exp of nats_per_token: Eq. 10.7 from ELBOs (bounds the true one from above), Eq. 10.10 from IWAEs."""
    return nats_per_token(log_p, tokens).exp()


# ------------------------------------------------------------------------------------------------------------
# A flow known in closed form: data from K round Gaussians of equal weight (for the demonstration and tests)

def mixture_log_densities(z: Tensor, means: Tensor, stds: Tensor, t: float = 0.0) -> Tensor:
    """log p(z_t | component) of the noised mixture. z (B, Dz), means (K, Dz), stds (K,) -> (B, K)."""
    logvar = ((1 - t) ** 2 * stds ** 2 + t ** 2).log()                 # (K,)
    return log_normal(z[:, None], (1 - t) * means, logvar[:, None]).sum(-1)


def mixture_velocity(means: Tensor, stds: Tensor) -> Velocity:
    """What a perfect network would answer: v*(z, t) = E[eps - z_0 | z_t = z] (paper, Eq. 9.34)."""
    def velocity_fn(z: Tensor, t: float) -> Tensor:
        weight = mixture_log_densities(z, means, stds, t).softmax(-1)                      # (B, K)
        slope = (t - (1 - t) * stds ** 2) / ((1 - t) ** 2 * stds ** 2 + t ** 2)            # (K,)
        v = slope[:, None] * (z[:, None] - (1 - t) * means) - means                        # (B, K, Dz)
        return (weight[..., None] * v).sum(1)                                              # (B, Dz)
    return velocity_fn


if __name__ == "__main__":
    # "a large red circle above a small blue square on a gray background", as a density over the image plane:
    # half of it in a wide blob above, half in a narrow one below. The exact velocity stands for the network.
    torch.set_default_dtype(torch.float64)
    rng = torch.Generator().manual_seed(0)
    means, stds = torch.tensor([[0.0, 1.0], [0.0, -1.0]]), torch.tensor([0.4, 0.2])
    v = mixture_velocity(means, stds)
    z1 = torch.randn(2000, 2, generator=rng)

    z0 = solve(v, z1, time_grid(256), "rk4")
    above = z0[:, 1] > -0.3
    print(f"noise -> data: {above.double().mean():.2f} of 2000 points lie in the circle, spread "
          f"{z0[above].std(0).mean():.2f} there, {z0[~above].std(0).mean():.2f} in the square "
          f"(expect 0.50, 0.40, 0.20)")
    print("mean distance from the exact flow at equal calls (expect euler to halve, ab2 and heun to quarter)")
    for name in ("euler", "ab2", "heun"):
        distances = [(solve(v, z1, time_grid(calls // SOLVERS[name]), name) - z0).norm(dim=1).mean()
                     for calls in (16, 32, 64, 128)]
        print(f"  {name:5s} 16, 32, 64, 128 calls:" + "".join(f" {d:8.5f}" for d in distances))

    z, grid = z0[:200], time_grid(64)
    truth = mixture_log_densities(z, means, stds).logsumexp(1) - math.log(2)               # (200,)
    exact = log_prob(v, z, grid)
    print(f"log p(z_0) of 200 points: {exact.mean():.4f} by the ODE, {truth.mean():.4f} in closed form; "
          f"largest difference {(exact - truth).abs().max():.0e} nats (expect < 1e-3)")
    signs = torch.randint(0, 2, (200, 2), generator=rng) * 2.0 - 1
    print(f"  {log_prob(v, z, grid, signs).mean():.4f} with one Hutchinson probe each (expect within 0.1)")

    # A VAE in one dimension: z ~ N(0, 1), x|z ~ N(z, 0.25), with q(z|x) too wide. log p(x = 1) is known.
    z = 0.8 + 0.7 * torch.randn(64, 1000, generator=rng)                                   # (K, draws)
    terms = log_normal(torch.ones(1), z, math.log(0.25)), log_normal(z), log_normal(z, 0.8, 2 * math.log(0.7))
    bounds = ", ".join(f"{iwae(*(x.reshape(K, -1) for x in terms)).mean():.3f}" for K in (1, 4, 16, 64))
    print(f"log p(x): ELBO {elbo(*terms).mean():.3f}; IWAE {bounds} at K = 1, 4, 16, 64 (expect the ELBO "
          f"first, then rising to {log_normal(torch.ones(1), 0.0, math.log(1.25)).item():.3f})")
