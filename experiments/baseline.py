"""Baseline: the default run beside two priors that one might write instead, at equal parameters.

    python -m experiments.baseline unpacked --optimizer adamw --out_dir DIR     flags of train.py
    python -m experiments.baseline plain --optimizer adamw --lr 2e-3 --out_dir DIR

Both pad every sample of a batch to the longest one and, in sampling, compute the clean context anew
at every step. All else, data, VAEs, losses and evaluation, is that of the default run.

    unpacked   the same MMDiT
    plain      nn.TransformerEncoder with a float mask; the embedded time is added to its input

Shapes: L positions, of which Lt text; S samples of W positions; D width; U distinct times.
"""
from __future__ import annotations

import sys

import torch
import torch.nn as nn
from torch import Tensor

import checkpoint
import cola
import masks
import train
import workers
from cuda_attention import Plan, make_plan
from masks import Layout
from mmdit import Cache, MMDiT, MMDiTConfig, PositionEmbedding, timestep_embedding

UNSEEN = 1 << 20              # a block that no text has


def padding(layout: Layout) -> Layout:
    """What makes all samples as long as the longest one: noisy text in a block of its own, which no
    other position may attend to."""
    counts = torch.bincount(layout.sample, minlength=len(layout.task))                   # (S,)
    sample = torch.arange(len(counts)).repeat_interleave(counts.max() - counts)
    same = torch.zeros_like(sample)
    return Layout(sample, same + masks.N, same + UNSEEN, same, same, layout.task)


class Unpacked(MMDiT):
    """MMDiT.forward with the same arguments. The cache keeps latents instead of keys and values."""
    def forward(self, text: Tensor, image: Tensor | None, t: Tensor, t_index: Tensor,
                layout: Layout, plan: Plan, cache: Cache | None = None, commit=False,
                targets: tuple[Tensor, Plan] | None = None, tap=-1) -> tuple[Tensor | None, ...]:
        new = slice(0, len(text)), slice(0, len(image))    # of text and of images
        if cache is not None:
            if cache.layout is not None:
                old_text, old_image = cache.kv[0]
                new = slice(len(old_text), None), slice(len(old_image), None)
                text, image = torch.cat([old_text, text]), torch.cat([old_image, image])
                t_index = torch.cat([torch.zeros_like(cache.layout.sample), t_index])    # t[0] = 0
                layout = masks.concat(cache.layout, layout)
            if commit:
                cache.layout, cache.kv[0] = layout, (text, image)
                return None, None, None
        pad = padding(layout)
        every = masks.concat(layout, pad)
        v_text, v_image = self.velocity(
            torch.cat([text, text.new_zeros(len(pad), text.shape[1])]), image, t,
            torch.cat([t_index, torch.zeros_like(pad.sample)]), every)
        v_text = v_text[:len(text)]
        if targets is None:
            return v_text[new[0]], None if v_image is None else v_image[new[1]], None
        chosen = torch.zeros_like(layout.sample, dtype=torch.bool)
        chosen[targets[0]] = True
        is_image = layout.segment == masks.I
        return (v_text[chosen[~is_image]],
                None if v_image is None else v_image[chosen[is_image]], None)

    def velocity(self, text: Tensor, image: Tensor, t: Tensor, t_index: Tensor,
                 layout: Layout) -> tuple[Tensor, Tensor | None]:
        """The velocities of all text and image positions of samples of one length."""
        return super().forward(text, image, t, t_index, layout, make_plan(layout))[:2]


class Plain(Unpacked):
    def __init__(self, config: MMDiTConfig):
        nn.Module.__init__(self)
        c = self.config = config
        # A block of the MMDiT has 18 D^2 weights, 6 of them of the times; one of these 12.
        layers = round((c.layers + c.dual_layers) * 18 / 12)
        layer = nn.TransformerEncoderLayer(c.width, c.heads, c.expand_ratio * c.width, dropout=0.0,
                                           activation="gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, nn.LayerNorm(c.width), False)
        self.time = nn.Sequential(nn.Linear(256, c.width), nn.SiLU(), nn.Linear(c.width, c.width))
        self.position = PositionEmbedding(c.width)
        self.text_in = nn.Linear(c.text_channels, c.width)
        self.image_in = nn.Linear(c.image_channels, c.width)
        self.text_out = nn.Linear(c.width, c.text_channels)
        self.image_out = nn.Linear(c.width, c.image_channels)

    def velocity(self, text: Tensor, image: Tensor, t: Tensor, t_index: Tensor,
                 layout: Layout) -> tuple[Tensor, Tensor | None]:
        is_image, samples = layout.segment == masks.I, len(layout.task)
        x = self.position(layout) + self.time(timestep_embedding(t))[t_index]            # (L, D)
        x[~is_image] += self.text_in(text).float()
        x[is_image] += self.image_in(image).float()
        row = layout.sample.argsort(stable=True).view(samples, -1)                       # (S, W)
        allowed = masks.allowed(layout, row[:, :, None], layout, row[:, None, :])        # (S, W, W)
        mask = torch.zeros(allowed.shape).masked_fill(~allowed, float("-inf"))
        y = self.encoder(x[row], mask.repeat_interleave(self.config.heads, 0)).float()
        x = torch.empty_like(x).index_put((row.flatten(),), y.flatten(0, 1))
        return self.text_out(x[~is_image]).float(), self.image_out(x[is_image]).float()


def main() -> int:
    """The exit status of train.py."""
    kinds = {"unpacked": Unpacked, "plain": Plain}
    if len(sys.argv) < 2 or sys.argv[1] not in kinds:
        print(f"baseline.py: the first argument is one of {', '.join(kinds)}", file=sys.stderr)
        return 2
    cola.MMDiT = checkpoint.MMDiT = kinds[sys.argv[1]]
    workers.autocast = lambda stage, bf16, device: torch.autocast(device, torch.bfloat16, bf16)
    torch.backends.mha.set_fastpath_enabled(False)         # it takes no mask for each sample
    return train.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
