"""Image VAE: pixels to a small grid of continuous latents and back, by a convolutional autoencoder.

    z     = mu(x) + sigma eps,  eps ~ N(0, I)                                     posterior q(z|x)
    d     = decode(z) - x
    L     = |d| + w_mse d^2 + w_pyr mean_k |lap_k(d)| + beta KL(q || N(0, I))     each a mean
    lap_k = avg_k(d) - up(avg_{k+1}(d)),  avg_k = mean over 2^k x 2^k pixels      Laplacian pyramid
    z_bar = (z - m_c) / s_c                                                       input of the MMDiT

One position of the MMDiT is one latent pixel: `downsample` image pixels a side, C numbers. All
layers are convolutions, so one model takes every height and width that `downsample` divides.
Convolutions at full resolution cost the most, so the stem folds `patch` x `patch` pixels into
channels first. The last part of the downsampling folds cells into latent channels, so the blocks
work on a finer grid than the latents (generated scenes: 8 x 8 cells become 4 x 4 latents).
The pyramid takes the place of a perceptual loss: a wrong edge costs at every scale. The fixed sigma
teaches the decoder to tolerate the prior's errors. There is no attention and no adversarial loss.

    scenes, 32 px     downsample  8, 32 channels, patch 4, width  64, multipliers 1, 2 blocks
    paper, 1024 px    downsample 16, 64 channels, patch 2, width 128, multipliers 1 2 4 4, 3 blocks

Shapes: B images; H, W pixels; C latent channels; h, w = H, W / downsample; D width of a level.
Run: python image_vae.py   (CPU, 4 s)
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain, pairwise

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


@dataclass
class ImageVAEConfig:
    latent_channels: int = 32              # C
    downsample: int = 8                    # image pixels per latent pixel and side
    width: int = 64                        # D of the first level
    multipliers: tuple[int, ...] = (1,)    # level i has D = width * multipliers[i], half the size
    blocks: int = 2                        # residual blocks per level, in encoder and decoder
    patch: int = 4                         # pixels a side that the stem folds into one cell
    posterior_std: float = 0.1             # sigma

    def __post_init__(self) -> None:
        reached = self.patch * 2 ** (len(self.multipliers) - 1)      # by stem and levels
        self.fold = self.downsample // reached     # cells a side that the head folds into a latent
        if self.fold < 1 or self.downsample % reached:
            raise ValueError(f"downsample {self.downsample}: expected a multiple of {reached}, as "
                             f"patch is {self.patch} and there are {len(self.multipliers)} levels")
        if self.latent_channels % self.fold ** 2:
            raise ValueError(f"latent_channels {self.latent_channels}: expected a multiple of "
                             f"{self.fold ** 2}, the cells in a latent pixel")


# ---- Layers ------------------------------------------------------------------------------------

class Conv(nn.Module):
    """A k x k convolution with "same" zero padding. The kernel is stored as a matrix, because Muon
    takes matrices; viewed as (out, fan_in, k, k) it is channels-last, the fast layout."""

    def __init__(self, fan_in: int, out: int, k: int = 3, gain: float = 1.0):
        super().__init__()
        self.shape = (out, k, k, fan_in)
        inputs = k * k * fan_in
        self.weight = nn.Parameter(torch.randn(out, inputs) * gain / math.sqrt(inputs))
        self.bias = nn.Parameter(torch.zeros(out))

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.weight.view(self.shape).permute(0, 3, 1, 2)              # (out, fan_in, k, k)
        return F.conv2d(x, kernel, self.bias, padding=self.shape[1] // 2)


class PixelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each pixel: a faint object counts as much as a bright one."""

    def forward(self, x: Tensor) -> Tensor:                                      # (B, D, H, W)
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Block(nn.Module):
    """x + conv(silu(conv(norm(x)))), the identity at the start of training."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = PixelNorm(width)
        self.conv1, self.conv2 = Conv(width, width), Conv(width, width, gain=0.0)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(self.norm(x))))


def halve(fine: int, coarse: int) -> list[nn.Module]:
    """Layers from width `fine` to width `coarse` at half the resolution."""
    return [nn.PixelUnshuffle(2), Conv(4 * fine, coarse, k=1)]


def double(coarse: int, fine: int) -> list[nn.Module]:
    """Layers from width `coarse` to width `fine` at twice the resolution."""
    return [Conv(coarse, 4 * fine, k=1), nn.PixelShuffle(2)]


def stack(widths: list[int], blocks: int,
          resize: Callable[[int, int], list[nn.Module]]) -> nn.Sequential:
    """Residual blocks at every width, and the layers of `resize` from each level to the next."""
    levels = [[Block(width) for _ in range(blocks)] for width in widths]
    for level, (before, after) in zip(levels[1:], pairwise(widths)):
        level[:0] = resize(before, after)
    return nn.Sequential(*chain(*levels))


# ---- The VAE -----------------------------------------------------------------------------------

class ImageVAE(nn.Module):
    def __init__(self, config: ImageVAEConfig):
        super().__init__()
        c = self.config = config
        self.channels, self.downsample = c.latent_channels, c.downsample
        widths, cell = [c.width * m for m in c.multipliers], c.latent_channels // c.fold ** 2
        fine, coarse = widths[0], widths[-1]
        blocks = stack(widths, c.blocks, halve)
        self.encoder = nn.ModuleDict({
            "stem": nn.Sequential(nn.PixelUnshuffle(c.patch), Conv(3 * c.patch ** 2, fine)),
            "blocks": blocks,
            "head": nn.Sequential(PixelNorm(coarse), Conv(coarse, cell),
                                  nn.PixelUnshuffle(c.fold))})
        blocks = stack(widths[::-1], c.blocks, double)
        self.decoder = nn.ModuleDict({
            "stem": nn.Sequential(nn.PixelShuffle(c.fold), Conv(cell, coarse)),
            "blocks": blocks,
            "head": nn.Sequential(PixelNorm(fine), Conv(fine, 3 * c.patch ** 2, gain=0.3),
                                  nn.PixelShuffle(c.patch))})
        self.register_buffer("latent_mean", torch.zeros(c.latent_channels))      # m_c
        self.register_buffer("latent_std", torch.ones(c.latent_channels))        # s_c

    def check_size(self, H: int, W: int) -> None:
        """ValueError, naming the nearest sizes that fit, unless `downsample` divides H and W."""
        d = self.downsample
        if min(H, W) < d or H % d or W % d:
            smaller = max(d, H // d * d), max(d, W // d * d)
            larger = max(d, -(-H // d) * d), max(d, -(-W // d) * d)
            sizes = " or ".join(dict.fromkeys(f"{h} x {w}" for h, w in (smaller, larger)))
            raise ValueError(f"image size {H} x {W}: expected multiples of {d}; use {sizes}")

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) in [-1, 1] -> mean and logvar of q(z|x), each (B, C, h, w) fp32.

        ValueError for a size that check_size refuses."""
        self.check_size(*x.shape[2:])
        h = x.contiguous(memory_format=torch.channels_last)
        for part in self.encoder.values():
            h = part(h)
        mean = h.float()
        return mean, torch.full_like(mean, 2 * math.log(self.config.posterior_std))

    def decode(self, z: Tensor) -> Tensor:
        """Latents (B, C, h, w), not normalised -> images (B, 3, H, W) fp32, not clamped."""
        h = z.contiguous(memory_format=torch.channels_last)
        for part in self.decoder.values():
            h = part(h)
        return h.float()

    def normalize(self, z: Tensor) -> Tensor:
        """z -> z_bar: mean 0, variance 1 per channel over the images of set_statistics."""
        return (z - self.latent_mean[:, None, None]) / self.latent_std[:, None, None]

    def denormalize(self, z: Tensor) -> Tensor:
        """z_bar -> z, both (B, C, h, w): the inverse of normalize."""
        return z * self.latent_std[:, None, None] + self.latent_mean[:, None, None]

    @torch.no_grad()
    def set_statistics(self, batches: Iterable[Tensor]) -> None:
        """Set m_c and s_c from the mean latents of image batches (B, 3, H, W), each of any size.

        ValueError if there is no image."""
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


# ---- Loss --------------------------------------------------------------------------------------

def laplacian_pyramid(x: Tensor, levels: int = 3) -> list[Tensor]:
    """[lap_0, lap_1, ..], (B, 3, H / 2^k, W / 2^k) each: what halving the resolution removes."""
    bands = []
    for _ in range(levels):
        coarse = F.avg_pool2d(x, 2)
        bands.append(x - F.interpolate(coarse, x.shape[2:]))
        x = coarse
    return bands


def image_vae_loss(vae: ImageVAE, x: Tensor, noise: Tensor, kl_weight: float = 1e-3,
                   mse_weight: float = 1.0,
                   pyramid_weight: float = 0.5) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and its detached terms, means over the batch; kl is in nats per latent number.

    x (B, 3, H, W) in [-1, 1]; noise (B, C, h, w) ~ N(0, I)."""
    mean, logvar = vae.encode(x)
    d = vae.decode(mean + torch.exp(0.5 * logvar) * noise) - x                   # (B, 3, H, W)
    bands = laplacian_pyramid(d)
    terms = {"l1": d.abs().mean(), "mse": d.square().mean(),
             "pyramid": sum(band.abs().mean() for band in bands) / len(bands),
             "kl": 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()}
    loss = (terms["l1"] + mse_weight * terms["mse"] + pyramid_weight * terms["pyramid"]
            + kl_weight * terms["kl"])
    return loss, {name: term.detach() for name, term in terms.items()}


if __name__ == "__main__":
    def draw(n: int, size: int) -> Tensor:
        """n images (n, 3, size, size), each a large red circle somewhere on a gray background."""
        center = 0.2 + 0.6 * torch.rand(2, n, 1, 1)
        y, x = torch.meshgrid(*2 * [(torch.arange(size) + 0.5) / size], indexing="ij")
        distance = torch.hypot(x - center[0], y - center[1])[:, None]          # (n, 1, size, size)
        return torch.where(distance < 0.18, torch.tensor((0.6, -1.0, -0.7))[:, None, None], 0.0)

    torch.manual_seed(0)
    vae, steps = ImageVAE(ImageVAEConfig(width=32)), 100
    optimizer = torch.optim.AdamW(vae.parameters(), lr=4e-3, betas=(0.9, 0.95))
    for step in range(steps + 1):
        optimizer.param_groups[0]["lr"] = 4e-3 * (1 - step / steps)
        loss, terms = image_vae_loss(vae, draw(16, 32), torch.randn(16, 32, 4, 4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % steps == 0:
            print(f"step {step}: loss {loss:.3f} (expect about 0.5 at 0, less than 0.1 at {steps})")

    vae.set_statistics([draw(256, 32)])
    x = draw(64, 32)
    with torch.no_grad():
        z = vae.normalize(vae.encode(x)[0])                                    # (64, 32, 4, 4)
        print(f"latents of new images: mean {z.mean():.2f}, std {z.std():.2f} (expect 0 and 1)")
        for std in (0.0, 0.2, 0.8):
            y = vae.decode(vae.denormalize(z + std * torch.randn(z.shape))).clamp(-1, 1)
            psnr = -10 * math.log10((x - y).square().mean() / 4)
            print(f"decoded from latents with noise {std}: PSNR {psnr:.1f} dB (expect it to fall)")
        h, w = vae.encode(draw(1, 64))[0].shape[2:]
        print(f"an image of 64 x 64 pixels has {h} x {w} latents (expect 8 x 8)")
