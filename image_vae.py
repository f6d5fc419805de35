"""Image VAE: pixels <-> a small grid of continuous latents, by a convolutional KL autoencoder.

    z     = mu(x) + sigma(x) eps,  eps ~ N(0, I)                                        the posterior q(z|x)
    d     = decode(z) - x
    L     = |d| + w_mse d^2 + w_pyr mean_k |lap_k(d)| + beta KL(q(z|x) || N(0, I))      each a mean
    lap_k = avg_k(d) - up(avg_{k+1}(d)),  avg_k = mean over 2^k x 2^k pixels            the Laplacian pyramid
    z_bar = (z - m_c) / s_c                                                             what the MMDiT sees

One position of the MMDiT is one latent pixel: `downsample` image pixels a side, `channels` numbers. All is
convolution, so one set of weights takes every height and width that `downsample` divides. The cost sits at
the fine levels, and two shuffles keep the network away from them: the stem folds `patch` x `patch` pixels
into channels, and the downsampling that stem and levels leave over is folded into the latents, so that the
level that does the work is finer than the latent grid (scenes: 8 x 8 cells become 4 x 4 latents).
The pyramid stands in for a perceptual net: an edge out of place costs at every scale. A fixed sigma is the
error of the prior, foreseen: the decoder learns to ignore as much.
Left out: attention, adversarial and perceptual losses.

    scenes, 32 px     downsample  8, 32 channels, patch 4, width  64, multipliers (1,), blocks 2
    paper, 1024 px    downsample 16, 64 channels, patch 2, width 128, multipliers (1, 2, 4, 4), blocks 3

Shapes: B images, H, W pixels, C latent channels, h, w = H, W / downsample, D width of a level.
Run: python image_vae.py   (CPU, 4 s)
"""
from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import chain, pairwise

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


class Conv(nn.Module):
    """A k x k convolution with "same" zero padding. The kernel is kept as the matrix (out, k * k * fan_in):
    Muon takes nothing else, and its view as (out, fan_in, k, k) is channels-last already, the fast layout."""
    def __init__(self, fan_in: int, out: int, k: int = 3, gain: float = 1.0):
        super().__init__()
        self.shape = (out, k, k, fan_in)
        self.weight = nn.Parameter(torch.randn(out, k * k * fan_in) * gain / math.sqrt(k * k * fan_in))
        self.bias = nn.Parameter(torch.zeros(out))

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.weight.view(self.shape).permute(0, 3, 1, 2)                      # (out, fan_in, k, k)
        return F.conv2d(x, kernel, self.bias, padding=self.shape[1] // 2)


class PixelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each pixel, so that a faint object counts as much as a bright one."""
    def forward(self, x: Tensor) -> Tensor:                                                # (B, D, H, W)
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Block(nn.Module):
    """x + conv(silu(conv(norm(x)))), the identity at the start of training."""
    def __init__(self, width: int):
        super().__init__()
        self.norm = PixelNorm(width)
        self.conv1, self.conv2 = Conv(width, width), Conv(width, width, gain=0.0)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(self.norm(x))))


class ImageVAE(nn.Module):
    """The autoencoder. `config` rebuilds it: ImageVAE(**vae.config).

    latent_channels   C, numbers per latent pixel
    downsample        image pixels per latent pixel and side
    width             channels of the first level; level i has width * multipliers[i] at half the resolution
    blocks            residual blocks per level, in the encoder and again in the decoder
    patch             pixels a side that the stem folds into one cell of the first level
    posterior_std     sigma > 0, or None to learn it per latent

    Raises ValueError unless what stem and levels downsample by divides `downsample`, and the latent channels
    spread evenly over the cells of a latent pixel.
    """
    def __init__(self, latent_channels: int = 32, downsample: int = 8, width: int = 64,
                 multipliers: tuple[int, ...] = (1,), blocks: int = 2, patch: int = 4,
                 posterior_std: float | None = 0.1):
        super().__init__()
        self.config = {"latent_channels": latent_channels, "downsample": downsample, "width": width,
                       "multipliers": list(multipliers), "blocks": blocks, "patch": patch,
                       "posterior_std": posterior_std}
        self.channels, self.downsample, self.posterior_std = latent_channels, downsample, posterior_std
        reached = patch * 2 ** (len(multipliers) - 1)
        fold = downsample // reached                     # cells of the coarsest level a latent pixel and side
        if fold < 1 or downsample % reached:
            raise ValueError(f"downsample {downsample} is no multiple of {reached}, which patch {patch} and "
                             f"{len(multipliers)} levels make; use one, a smaller patch or fewer levels")
        if latent_channels % fold ** 2:
            raise ValueError(f"latent_channels {latent_channels} do not spread over {fold} x {fold} cells; "
                             f"use a multiple of {fold ** 2}")
        widths = [width * m for m in multipliers]
        fine, coarse = widths[0], widths[-1]
        moments = latent_channels * (2 if posterior_std is None else 1)

        levels = [[Block(D) for _ in range(blocks)] for D in widths]
        for level, (above, below) in zip(levels[1:], pairwise(widths)):
            level[:0] = nn.PixelUnshuffle(2), Conv(4 * above, below, k=1)
        self.encoder = nn.ModuleDict({
            "stem": nn.Sequential(nn.PixelUnshuffle(patch), Conv(3 * patch ** 2, fine)),
            "blocks": nn.Sequential(*chain(*levels)),
            "head": nn.Sequential(PixelNorm(coarse), Conv(coarse, moments // fold ** 2),
                                  nn.PixelUnshuffle(fold))})

        levels = [[Block(D) for _ in range(blocks)] for D in reversed(widths)]
        for level, (below, above) in zip(levels[1:], pairwise(reversed(widths))):
            level[:0] = Conv(below, 4 * above, k=1), nn.PixelShuffle(2)
        self.decoder = nn.ModuleDict({
            "stem": nn.Sequential(nn.PixelShuffle(fold), Conv(latent_channels // fold ** 2, coarse)),
            "blocks": nn.Sequential(*chain(*levels)),
            "head": nn.Sequential(PixelNorm(fine), Conv(fine, 3 * patch ** 2, gain=0.3),
                                  nn.PixelShuffle(patch))})

        self.register_buffer("latent_mean", torch.zeros(latent_channels))
        self.register_buffer("latent_std", torch.ones(latent_channels))

    def check_size(self, H: int, W: int) -> None:
        """Raises ValueError, naming the nearest sizes that fit, unless `downsample` divides H and W."""
        d = self.downsample
        if min(H, W) < d or H % d or W % d:
            smaller, larger = ([max(d, (side + extra) // d * d) for side in (H, W)] for extra in (0, d - 1))
            sizes = " or ".join(dict.fromkeys(f"{h} x {w}" for h, w in (smaller, larger)))
            raise ValueError(f"image size {H} x {W}: height and width must be multiples of {d}; use {sizes}")

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) in [-1, 1] -> mean and logvar of q(z|x), each (B, C, h, w) fp32.

        Raises ValueError as check_size does.
        """
        self.check_size(*x.shape[2:])
        h = x.contiguous(memory_format=torch.channels_last)
        for part in self.encoder.values():
            h = part(h)
        h = h.float()                                                                      # (B, C | 2C, h, w)
        if self.posterior_std is not None:
            return h, torch.full_like(h, 2 * math.log(self.posterior_std))
        mean, logvar = h.chunk(2, 1)
        return mean, logvar.clamp(-20, 4)

    def decode(self, z: Tensor) -> Tensor:
        """Latents (B, C, h, w), not normalised -> images (B, 3, H, W) fp32, not clamped to [-1, 1]."""
        h = z.contiguous(memory_format=torch.channels_last)
        for part in self.decoder.values():
            h = part(h)
        return h.float()

    def normalize(self, z: Tensor) -> Tensor:
        """z -> z_bar, mean 0 and variance 1 per channel over the images of set_statistics. (B, C, h, w)"""
        return (z - self.latent_mean[:, None, None]) / self.latent_std[:, None, None]

    def denormalize(self, z: Tensor) -> Tensor:
        """z_bar -> z, the inverse of normalize. (B, C, h, w)"""
        return z * self.latent_std[:, None, None] + self.latent_mean[:, None, None]

    @torch.no_grad()
    def set_statistics(self, batches: Iterable[Tensor]) -> None:
        """Set latent_mean and latent_std from the posterior means of image batches (B, 3, H, W) of any size.

        Raises ValueError if there is no image.
        """
        count, first, second = 0, 0.0, 0.0
        for x in batches:
            z = self.encode(x)[0].double()
            count += z[:, 0].numel()
            first, second = first + z.sum((0, 2, 3)), second + z.square().sum((0, 2, 3))
        if not count:
            raise ValueError("latent statistics of no images; pass at least one batch")
        mean = first / count
        self.latent_mean.copy_(mean)
        self.latent_std.copy_((second / count - mean.square()).clamp_min(1e-8).sqrt())


def laplacian_pyramid(x: Tensor, levels: int = 3) -> list[Tensor]:
    """[lap_0, lap_1, ..], each (B, 3, H / 2^k, W / 2^k): what halving the resolution would lose."""
    bands = []
    for _ in range(levels):
        coarse = F.avg_pool2d(x, 2)
        bands.append(x - F.interpolate(coarse, x.shape[2:]))
        x = coarse
    return bands


def image_vae_loss(vae: ImageVAE, x: Tensor, noise: Tensor, kl_weight: float = 1e-3, mse_weight: float = 1.0,
                   pyramid_weight: float = 0.5) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of stage 1b and its terms without gradient, means over the batch: l1, mse, pyramid and kl
    (nats per latent number).

    x (B, 3, H, W) in [-1, 1]; noise (B, C, h, w) standard normal, drawn by the caller.
    """
    mean, logvar = vae.encode(x)
    d = vae.decode(mean + torch.exp(0.5 * logvar) * noise) - x                             # (B, 3, H, W)
    bands = laplacian_pyramid(d)
    l1, mse = d.abs().mean(), d.square().mean()
    pyramid = sum(band.abs().mean() for band in bands) / len(bands)
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    loss = l1 + mse_weight * mse + pyramid_weight * pyramid + kl_weight * kl
    return loss, {"l1": l1.detach(), "mse": mse.detach(), "pyramid": pyramid.detach(), "kl": kl.detach()}


if __name__ == "__main__":
    def draw(n: int, size: int, generator: torch.Generator) -> Tensor:
        """A large red circle above a small blue square on a gray background, n times: (n, 3, size, size)."""
        u = torch.rand(4, n, 1, 1, generator=generator)                                # where the centres lie
        y, x = torch.meshgrid(*2 * [(torch.arange(size) + 0.5) / size], indexing="ij")
        from_circle = torch.hypot(x - 0.25 - 0.5 * u[0], y - 0.22 - 0.15 * u[1])       # (n, size, size)
        from_square = torch.maximum((x - 0.15 - 0.7 * u[2]).abs(), (y - 0.75 - 0.1 * u[3]).abs())
        image = torch.zeros(n, 3, size, size)
        objects = (from_circle, 0.18, (0.6, -1.0, -0.7)), (from_square, 0.12, (-1.0, -0.3, 1.0))
        for distance, radius, color in objects:
            inside = (0.5 + (radius - distance) * size).clamp(0, 1)[:, None]               # anti-aliased
            image += inside * (torch.tensor(color)[:, None, None] - image)
        return image

    def psnr(x: Tensor, y: Tensor) -> float:
        return -10 * math.log10((x - y.clamp(-1, 1)).square().mean().item() / 4)

    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(0)
    vae = ImageVAE(width=32)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=4e-3, betas=(0.9, 0.95))
    steps = 120
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * (1 - step / steps)
        x = draw(32, 32, rng)
        with torch.autocast("cpu", torch.bfloat16):
            loss, terms = image_vae_loss(vae, x, torch.randn(32, 32, 4, 4, generator=rng))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == 0:
            print(f"step 0: loss {loss.item():.3f} = " + ", ".join(f"{k} {v:.3f}" for k, v in terms.items()))
    print(f"step {steps}: loss {loss.item():.3f} = " + ", ".join(f"{k} {v:.3f}" for k, v in terms.items()))

    vae.set_statistics([draw(256, 32, rng)])
    x = draw(64, 32, rng)
    with torch.no_grad():
        z = vae.normalize(vae.encode(x)[0])                                                # (64, 32, 4, 4)
        print(f"new pictures: mean {z.mean():.2f}, std {z.std():.2f} of the normalised latents (expect 0, 1)")
        for std in (0.0, 0.1, 0.2, 0.4):
            y = vae.decode(vae.denormalize(z + std * torch.randn(z.shape, generator=rng)))
            print(f"  PSNR {psnr(x, y):.1f} dB with noise {std} on them")
        large = draw(8, 64, rng)
        print(f"64 x 64 by the same weights: {tuple(vae.encode(large)[0].shape[2:])} latents (expect 8 x 8)")
    try:
        vae.check_size(30, 44)
    except ValueError as error:
        print(f"refused: {error}")
