"""Image VAE: pixels to a small grid of continuous latents and back, by a convolutional autoencoder.

    z     = mu(x) + sigma eps,  eps ~ N(0, I)                                     posterior q(z|x)
    d     = decode(z) - x
    L     = |d| + d^2 + 0.5 mean_k |lap_k(d)| + 0.001 KL(q || N(0, I))            each a mean
    lap_k = avg_k(d) - up(avg_{k+1}(d)),  avg_k = mean over 2^k x 2^k pixels      Laplacian pyramid
    z_bar = (z - m_c) / s_c                                                       input of the MMDiT

Convolutions at full resolution cost the most, so the blocks work on cells:

    stem: patch x patch pixels -> a cell;  further levels: 2 x 2 cells -> a cell;
    head: fold x fold cells -> a latent

The pyramid replaces a perceptual loss. The fixed sigma teaches the decoder to tolerate errors.

Shapes: B images; H, W pixels; C latent channels; h, w = H, W / downsample; D width of a level.
Run: python image_vae.py   (CPU, 4 s)
"""
import math
from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


@dataclass
class ImageVAEConfig:
    """The paper has 64 channels and sides / 16 (Sec. 5.5), and states no more. A VAE of that kind:
    ImageVAEConfig(64, 16, 128, (1, 2, 4, 4), 3, 2)."""
    latent_channels: int = 32              # C
    downsample: int = 8                    # image pixels per latent pixel and side
    width: int = 64                        # D of the first level
    multipliers: tuple[int, ...] = (1,)    # D of each level / width; each level halves the size
    blocks: int = 2                        # residual blocks per level, in encoder and decoder
    patch: int = 4                         # pixels a side that the stem folds into one cell
    posterior_std: float = 0.1             # sigma

    def __post_init__(self) -> None:
        cell = self.patch * 2 ** (len(self.multipliers) - 1)     # pixels a side, after all levels
        self.fold = self.downsample // cell                      # cells a side of a latent pixel
        if self.fold < 1 or self.downsample % cell:
            raise ValueError(f"downsample {self.downsample}: expected a multiple of "
                             f"patch x 2^(levels - 1) = {cell}")
        if self.latent_channels % self.fold ** 2:
            raise ValueError(f"latent_channels {self.latent_channels}: expected a multiple of "
                             f"{self.fold ** 2}, the cells in a latent pixel")


class Conv(nn.Module):
    """A k x k convolution that keeps H and W. Its kernel is a matrix, as Muon takes matrices."""
    def __init__(self, fan_in: int, out: int, k: int = 3, gain: float = 1.0):
        super().__init__()
        self.kernel_shape = (out, k, k, fan_in)
        inputs = k * k * fan_in
        self.weight = nn.Parameter(torch.empty(out, inputs))
        nn.init.normal_(self.weight, std=gain / math.sqrt(inputs))
        self.bias = nn.Parameter(torch.zeros(out))

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.weight.view(self.kernel_shape).permute(0, 3, 1, 2)    # channels-last is fast
        return F.conv2d(x, kernel, self.bias, padding=self.kernel_shape[1] // 2)


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


def stack(widths: list[int], blocks: int, up: bool) -> nn.Sequential:
    """Residual blocks at each width; between two widths the resolution doubles (up) or halves."""
    levels = [[Block(width) for _ in range(blocks)] for width in widths]
    layers = levels[0]
    for before, after, level in zip(widths, widths[1:], levels[1:]):
        if up:
            resize = [Conv(before, 4 * after, k=1), nn.PixelShuffle(2)]
        else:
            resize = [nn.PixelUnshuffle(2), Conv(4 * before, after, k=1)]
        layers += resize + level
    return nn.Sequential(*layers)

# ---- The VAE -----------------------------------------------------------------------------------

class ImageVAE(nn.Module):
    def __init__(self, config: ImageVAEConfig):
        super().__init__()
        c = self.config = config
        self.channels, self.downsample = c.latent_channels, c.downsample
        widths = [c.width * m for m in c.multipliers]
        fine, coarse = widths[0], widths[-1]
        patch_channels = 3 * c.patch ** 2
        cell_channels = c.latent_channels // c.fold ** 2
        blocks = stack(widths, c.blocks, up=False)
        stem = nn.Sequential(nn.PixelUnshuffle(c.patch), Conv(patch_channels, fine))
        head = nn.Sequential(PixelNorm(coarse), Conv(coarse, cell_channels),
                             nn.PixelUnshuffle(c.fold))
        self.encoder = nn.Sequential(OrderedDict(stem=stem, blocks=blocks, head=head))

        blocks = stack(widths[::-1], c.blocks, up=True)
        stem = nn.Sequential(nn.PixelShuffle(c.fold), Conv(cell_channels, coarse))
        head = nn.Sequential(PixelNorm(fine), Conv(fine, patch_channels, gain=0.3),
                             nn.PixelShuffle(c.patch))
        self.decoder = nn.Sequential(OrderedDict(stem=stem, blocks=blocks, head=head))
        self.register_buffer("latent_mean", torch.zeros(c.latent_channels))      # m_c
        self.register_buffer("latent_std", torch.ones(c.latent_channels))        # s_c

    def check_size(self, H: int, W: int) -> None:
        d = self.downsample
        if min(H, W) < d or H % d or W % d:
            raise ValueError(f"image size {H} x {W}: expected positive multiples of {d}")

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) in [-1, 1] -> mean and logvar of q(z|x), each (B, C, h, w) fp32."""
        self.check_size(*x.shape[2:])
        mean = self.encoder(x.contiguous(memory_format=torch.channels_last)).float()
        return mean, torch.full_like(mean, 2 * math.log(self.config.posterior_std))

    def decode(self, z: Tensor) -> Tensor:
        """Latents (B, C, h, w), not normalized -> images (B, 3, H, W) fp32, not clamped."""
        return self.decoder(z.contiguous(memory_format=torch.channels_last)).float()

    def normalize(self, z: Tensor) -> Tensor:
        """z -> z_bar, with mean 0 and variance 1 per channel. Both (B, C, h, w)."""
        return (z - self.latent_mean[:, None, None]) / self.latent_std[:, None, None]

    def normalized_posterior_std(self) -> Tensor:
        """Standard deviation of q(z_bar | x), (C,)."""
        return self.config.posterior_std / self.latent_std

    def denormalize(self, z: Tensor) -> Tensor:
        return z * self.latent_std[:, None, None] + self.latent_mean[:, None, None]

    @torch.no_grad()
    def set_statistics(self, batches) -> None:
        """Set m_c and s_c from the mean latents of image batches (B, 3, H, W), each of any size."""
        count, first, second = 0, 0.0, 0.0
        for x in batches:
            z = self.encode(x)[0].double()
            count += z[:, 0].numel()
            first, second = first + z.sum((0, 2, 3)), second + z.square().sum((0, 2, 3))
        mean = first / count
        self.latent_mean.copy_(mean)
        self.latent_std.copy_((second / count - mean.square()).clamp_min(1e-8).sqrt())


def laplacian_pyramid(x: Tensor, levels: int = 3) -> list[Tensor]:
    """[lap_0, lap_1, ..], (B, 3, H / 2^k, W / 2^k) each: what halving the resolution removes."""
    bands = []
    for _ in range(levels):
        coarse = F.avg_pool2d(x, 2)
        bands.append(x - F.interpolate(coarse, x.shape[2:]))
        x = coarse
    return bands


def image_vae_loss(vae: ImageVAE, x: Tensor, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """L and its detached terms. x (B, 3, H, W) in [-1, 1]; noise (B, C, h, w) ~ N(0, I)."""
    mean, logvar = vae.encode(x)
    d = vae.decode(mean + torch.exp(0.5 * logvar) * noise) - x                   # (B, 3, H, W)
    bands = laplacian_pyramid(d)
    terms = {"l1": d.abs().mean(), "mse": d.square().mean(),
             "pyramid": sum(band.abs().mean() for band in bands) / len(bands),
             "kl": 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()}
    loss = terms["l1"] + terms["mse"] + 0.5 * terms["pyramid"] + 1e-3 * terms["kl"]
    return loss, {name: term.detach() for name, term in terms.items()}


if __name__ == "__main__":
    torch.manual_seed(0)
    center = 6 + 20 * torch.rand(2, 1024, 1, 1)           # of a red circle on a gray background
    distance = torch.hypot(torch.arange(32) - center[0], torch.arange(32)[:, None] - center[1])
    red = torch.tensor([0.6, -1.0, -0.7])[:, None, None]
    images, new = torch.where(distance[:, None] < 6, red, 0.0).split([960, 64])  # (n, 3, 32, 32)
    vae = ImageVAE(ImageVAEConfig(width=32))
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.95))
    for _ in range(100):
        batch = images[torch.randint(960, (16,))]
        loss, _ = image_vae_loss(vae, batch, torch.randn(16, 32, 4, 4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"after 100 steps: loss {loss:.3f} (expect less than 0.1)")
    vae.set_statistics([images])
    z = vae.normalize(vae.encode(new)[0])                                        # (64, 32, 4, 4)
    print(f"latents of new images: mean {z.mean():.2f}, std {z.std():.2f} (expect 0 and 1)")
    error = (vae.decode(vae.denormalize(z)) - new).square().mean().item()
    print(f"new images: PSNR {-10 * math.log10(error / 4):.1f} dB (expect more than 25)")
