"""A flow known in closed form, for tests: data from K round Gaussians of equal weight."""
import math

from torch import Tensor

from flow import Velocity


def mixture_log_densities(z: Tensor, means: Tensor, stds: Tensor, t: float = 0.0) -> Tensor:
    """log p(z_t | component) in nats. z (B, Dz), means (K, Dz), stds (K,) -> (B, K)."""
    var = (1 - t) ** 2 * stds ** 2 + t ** 2                                  # (K,)
    offset = z[:, None] - (1 - t) * means                                    # (B, K, Dz)
    return -0.5 * (offset.square() / var[:, None] + (2 * math.pi * var[:, None]).log()).sum(-1)


def mixture_velocity(means: Tensor, stds: Tensor) -> Velocity:
    """The velocity of a perfect network, v*(z, t) = E[eps - z_0 | z_t = z] (paper, Eq. 9.34)."""
    def velocity_fn(z: Tensor, t: float) -> Tensor:
        weight = mixture_log_densities(z, means, stds, t).softmax(-1)        # (B, K)
        slope = (t - (1 - t) * stds ** 2) / ((1 - t) ** 2 * stds ** 2 + t ** 2)
        v = slope[:, None] * (z[:, None] - (1 - t) * means) - means          # (B, K, Dz)
        return (weight[..., None] * v).sum(1)                                # (B, Dz)
    return velocity_fn
