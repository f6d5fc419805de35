"""Flow: the straight path from data to noise, the training times, the loss and the ODE solvers.

    z_t = (1 - t) z_0 + t eps,  eps ~ N(0, I)        paper, Eq. 9.31 with alpha(t) = t
    v   = dz_t/dt = eps - z_0                        the network predicts this (Eq. 9.32)
    L   = sum |v_pred - v|^2 / count                 flow matching (Eq. 3.7, 9.33)
    t   = sigmoid(loc + scale n),  n ~ N(0, 1)       training times (Eq. 16.5, 16.6)
    t'  = s t / (s t + 1 - t)                        shift: logit t' = logit t + ln s
    z_0 = z_1 + integral of v dt from t = 1 to 0     sampling (Eq. 10.2)
    v   = v_u + w (v_c - v_u)                        classifier-free guidance

t = 0 is data, t = 1 is noise; of an image in a sequence, noise near the image before it. Clean
context has t = 0, so every position may have its own time. This file draws no random numbers: noise
is always an argument.

Shapes: Dz channels. z is (..., Dz); t has the leading dimensions of z, or is a float.
Run: python flow.py   (CPU, 2 s)
"""
import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

SOLVERS = {"euler": 1, "heun": 2, "rk4": 4}      # network calls a step: compare at equal calls
Velocity = Callable[[Tensor, float], Tensor]     # (z, t) -> dz/dt, of z's shape

# ---- The path ----------------------------------------------------------------------------------

def over_channels(x: Tensor, z: Tensor) -> Tensor:
    """x (...) with dimensions of size 1 appended, to broadcast with z (..., Dz)."""
    return x.reshape(x.shape + (1,) * (z.ndim - x.ndim))


def interpolate(z0: Tensor, eps: Tensor, t: Tensor | float) -> Tensor:
    """The noisy latent z_t (paper, Eq. 9.31). t: the leading dimensions of z0, or a float."""
    if isinstance(t, Tensor):
        t = over_channels(t, z0)
    return (1 - t) * z0 + t * eps


def velocity(z0: Tensor, eps: Tensor) -> Tensor:
    """The regression target v = eps - z_0, constant along a path (paper, Eq. 9.32)."""
    return eps - z0


def near(z: Tensor, eps: Tensor, rho: float) -> Tensor:
    """Noise rho z + sqrt(1 - rho^2) eps near the normalized latents z, of variance 1 as well. From
    there the path to latents that equal z in most places is short."""
    return rho * z + math.sqrt(1 - rho ** 2) * eps


def near_shift(rho: float) -> float:
    """Time shift that goes with it: sigma^-3, where sigma = sqrt(1 - rho^2). With sigma^-1, data
    would be seen through as much of eps as without rho. A larger shift trains more of the times at
    which a change is not visible yet; there the model must infer it from the conditions."""
    return (1 - rho ** 2) ** -1.5

# ---- Training: times and loss -------------------------------------------------------------------

def shift_time(t: Tensor, shift: float | Tensor) -> Tensor:
    """Moves times other than 0 and 1 towards noise if shift > 1, as large images need: the more
    correlated the latents, the more noise they can be read through. ValueError: shift <= 0."""
    if not torch.as_tensor(shift > 0).all():
        raise ValueError(f"shift {shift}: expected a positive number; 1 changes nothing")
    return shift * t / (shift * t + (1 - t))


def sample_time(u: Tensor, law: str = "logit_normal", loc: float | Tensor = 1.0,
                scale: float = 1.0, shift: float | Tensor = 1.0) -> Tensor:
    """Training times in [0, 1], made from uniform numbers u in [0, 1] of any shape. Their normal
    quantiles are n in the formula above.

    law: "logit_normal" (paper, Eq. 16.5, 16.6), where a larger loc trains noisier inputs, or
    "uniform" without loc and scale. loc and shift: numbers, or tensors like u."""
    if law == "uniform":
        return shift_time(u, shift)
    return shift_time(torch.sigmoid(loc + scale * torch.special.ndtri(u)), shift)


def text_loc(channels: int, block_len: int) -> float:
    """loc of the times of text latents: 1 + ln(channels / 16) / 2, plus 1 if block_len is 1.

    More channels carry the same meaning through more noise: the paper measured optima of 1.0, 1.7,
    2.3 at 16, 64, 128 channels (Eq. 15.38, Fig. 2); without the 1, these are 1.0, 1.7, 2.0.
    The extra 1 is not the paper's: alone in its block, a latent's meaning is decided near noise."""
    return 1.0 + 0.5 * math.log(channels / 16) + (block_len == 1)


def image_shift(numbers: int) -> float:
    """Time shift of an image with so many numbers, positions x channels: the square root of their
    ratio to 4096 (Zheng et al. 2510.11690), but at least 1."""
    return max(1.0, math.sqrt(numbers / 4096))


def time_grid(steps: int, shift: float = 1.0) -> Tensor:
    """Sampling times from 1 to 0, (steps + 1,) float64 on the CPU."""
    return shift_time(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift)


def flow_matching_loss(v_pred: Tensor, v: Tensor, count: float, weight=None) -> Tensor:
    """Flow-matching loss (paper, Eq. 3.7, 9.33), a float32 scalar.

    v_pred, v: (..., Dz). weight: (...), of each position; None: 1.
    count: sum of the weights x channels of a whole step, over all workers and micro-steps, so that
    the losses of its batches add up to the mean of the step. 0 positions give 0, not NaN."""
    error = (v_pred.float() - v.float()).square()                   # (..., Dz)
    if weight is not None:
        error = error * over_channels(weight, error)
    return error.sum() / (count or 1)

# ---- Sampling ----------------------------------------------------------------------------------

def solve(velocity_fn: Velocity, z: Tensor, grid: Tensor, solver: str = "euler",
          known: Tensor | None = None) -> Tensor:
    """Integrates dz/dt = velocity_fn(z, t) along the grid (paper, Eq. 10.2); returns the last z.

    z: (..., Dz) at time grid[0]; float32, or float64 if z is, for any precision of the network.
    grid: monotone times. time_grid(n) generates; time_grid(n).flip(0) encodes data into noise.
    solver: of order 1, 2 or 4. heun and rk4 also evaluate v at t = 0, which is seldom trained.
    known: (...) bool, positions that keep their z, as in the clean repaint of a first block (paper,
    Sec. 5.2); velocity_fn must itself give the network t = 0 there. ValueError: unknown solver."""
    if solver not in SOLVERS:
        raise ValueError(f"solver {solver!r}: expected one of {', '.join(SOLVERS)}")
    if z.dtype != torch.float64:
        z = z.float()

    def f(z: Tensor, t: float) -> Tensor:
        v = velocity_fn(z, t).to(z.dtype)
        return v if known is None else v.masked_fill(over_channels(known, v), 0.0)

    for t, t_next in pairwise(grid.tolist()):
        h = t_next - t                                              # negative when generating
        v = f(z, t)
        if solver == "heun":
            v = (v + f(z + h * v, t_next)) / 2
        elif solver == "rk4":
            v2 = f(z + h / 2 * v, t + h / 2)
            v3 = f(z + h / 2 * v2, t + h / 2)
            v = (v + 2 * v2 + 2 * v3 + f(z + h * v3, t_next)) / 6
        z = z + h * v
    return z


def repaint(velocity_fn: Velocity, z: Tensor, grid: Tensor, known: Tensor,
            noise: Callable[[], Tensor], fraction: float = 1.0, cycles: int = 1) -> Tensor:
    """Partial repaint of a block by Euler steps (paper, Sec. 5.2, 17.1; arXiv 2201.09865).

    z: (..., Dz), clean latents where known (...) is True, and noise elsewhere.
    noise: returns fresh noise of z's shape at every call.
    fraction (m in the paper): share of the steps, at least the first, in which known positions are
    reset to their clean latents with the noise of time t. In later steps they move like the others.
    cycles (t in the paper): how often each of these steps is taken; noise takes z back to t before
    a repetition."""
    start = z = z.float()
    known = over_channels(known, z)
    steps = len(grid) - 1
    for i, (t, t_next) in enumerate(pairwise(grid.tolist())):
        in_lead = i < max(1, fraction * steps)
        for cycle in range(cycles if in_lead else 1):
            if cycle:                                               # back from t_next to t
                alpha_ratio = (1 - t) / (1 - t_next)
                added = math.sqrt(t * t - (alpha_ratio * t_next) ** 2)
                z = alpha_ratio * z + added * noise()
            if in_lead:
                z = torch.where(known, interpolate(start, noise(), t), z)
            z = z + (t_next - t) * velocity_fn(z, t).float()
    return z


def guide(velocities: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Classifier-free guidance: v_n + sum of w_i (v_i - v_(i+1)). velocities: v_1 with all
    conditions, then one condition less in each, v_n last; weights: w_1 .. w_(n-1). At w_i = 0
    condition i counts for nothing, at 1 it is as trained; above 1, samples follow it more closely
    and vary less. Two conditions: Brooks et al. 2211.09800, Eq. 3."""
    pairs = zip(weights, pairwise(velocities), strict=True)
    return velocities[-1] + sum(w * (v - less) for w, (v, less) in pairs)


if __name__ == "__main__":
    # The data are N(-1, 1.5^2). Their exact velocity E[eps - z_0 | z_t] (paper, Eq. 9.34) stands
    # for the network. It takes the noise z_1 to -1 + 1.5 z_1.
    mean, std = -1.0, 1.5

    def exact_velocity(z: Tensor, t: float) -> Tensor:
        variance = (1 - t) ** 2 * std ** 2 + t ** 2
        return (t - (1 - t) * std ** 2) / variance * (z - (1 - t) * mean) - mean

    z1 = torch.randn(2000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    print("mean distance from the exact flow at 16, 32, 64, 128 network calls (expect each "
          "doubling to halve it for euler, to divide it by about 4 for heun and 20 for rk4)")
    for name, calls_a_step in SOLVERS.items():
        ends = [solve(exact_velocity, z1, time_grid(calls // calls_a_step), name)
                for calls in (16, 32, 64, 128)]
        distances = [(end - (mean + std * z1)).abs().mean() for end in ends]
        print(f"  {name:5s} " + "  ".join(f"{distance:.1e}" for distance in distances))
