"""Features: an encoder of pictures, trained without labels, whose features L_REPA can align with.

    python -m experiments.features features.npy --seed 0         2 minutes on one CPU core
    python train.py --seed 0 --w_repa 0.5 --repa_features features.npy

The flags behind the file name are those of train.py: seed, data and image size name the pictures.
Features of any other encoder do as well: a float array (images, rows x columns, channels), in the
order of data.open_data(args).images, with one row and column for each image latent.

Two views of a picture differ in brightness, in the strength of each color and in noise. The feature
of a place in one view must be nearer to that of the same place in the other view than to those of
all other places and pictures of the batch (InfoNCE, van den Oord et al. 1807.03748)."""
import os
import sys

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import config
import data
from cola import to_float

CHANNELS, STEPS, BATCH, TEMPERATURE = 64, 400, 32, 0.1


def encoder(downsample: int) -> nn.Sequential:
    """Pictures (B, 3, H, W) -> features (B, CHANNELS, H / downsample, W / downsample)."""
    layers, channels = [nn.Conv2d(3, 32, 3, padding=1)], 32
    for _ in range(downsample.bit_length() - 1):           # each halves the size
        layers += [nn.GELU(), nn.Conv2d(channels, 64, 4, stride=2, padding=1)]
        channels = 64
    return nn.Sequential(*layers, nn.GELU(), nn.Conv2d(channels, CHANNELS, 3, padding=1))


def view(x: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] with other colors and noise."""
    gain = 1 + 0.2 * torch.randn(len(x), 3, 1, 1)
    return gain * x + 0.2 * torch.randn(len(x), 1, 1, 1) + 0.1 * torch.randn_like(x)


def contrast(a: Tensor, b: Tensor) -> Tensor:
    """InfoNCE of the features (B, CHANNELS, h, w) of two views; a scalar."""
    a, b = (F.normalize(x.movedim(1, -1).flatten(0, 2), dim=-1) for x in (a, b))   # (B h w, F)
    return F.cross_entropy(a @ b.T / TEMPERATURE, torch.arange(len(a)))


def main(out: str, flags: list[str]) -> None:
    """Trains an encoder on the pictures of these flags, and writes their features to the file."""
    args = config.merge(config.parse(flags, "experiments.features"))
    dataset, rng = data.open_data(args), np.random.default_rng(args.seed)
    if not dataset.num_images or args.aspect:
        raise ValueError("features need images, all of one size")
    torch.manual_seed(args.seed)
    net = encoder(args.downsample)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    for step in (bar := tqdm(range(STEPS), "contrast")):
        images = dataset.images(rng.integers(dataset.num_images, size=BATCH))
        x = to_float(np.stack(images))                                           # (B, 3, H, W)
        loss = contrast(net(view(x)), net(view(x)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    features = []
    with torch.inference_mode():
        for start in tqdm(range(0, dataset.num_images, 250), "features"):
            numbers = range(start, min(start + 250, dataset.num_images))
            x = net(to_float(np.stack(dataset.images(numbers))))
            features.append(x.flatten(2).transpose(1, 2).half().numpy())         # (n, h w, F)
    with open(f"{out}.tmp", "wb") as file:
        np.save(file, np.concatenate(features))
    os.replace(f"{out}.tmp", out)


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python -m experiments.features FILE.npy [--seed N ..]")
    try:
        main(sys.argv[1], sys.argv[2:])
    except (ValueError, OSError) as error:
        print(f"experiments.features: {error}", file=sys.stderr)
        sys.exit(2)
