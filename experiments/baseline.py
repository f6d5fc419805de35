"""Baseline: the default run with two priors that one might write instead, on a CPU.

    python -m experiments.baseline unpacked --out_dir DIR                     flags of train.py
    python -m experiments.baseline plain --lr 1e-3 --out_dir DIR

Both pad every sample of a batch to the longest one and, in sampling, compute the clean context anew
at every step. They train with AdamW and with PyTorch's autocast.

    unpacked   the same MMDiT
    plain      nn.TransformerEncoder with a float mask; the embedded time is added to its input. Its
               layers have as many parameters

Shapes: L positions, of which Lt text; S samples of W positions; D width; U distinct times.
"""
from __future__ import annotations

import re
import sys

import torch
import torch.nn as nn
from torch import Tensor

import checkpoint
import cola
import config
import masks
import train
import workers
from cuda_attention import Plan, make_plan
from masks import Layout
from mmdit import Cache, MMDiT, MMDiTConfig, PositionEmbedding, timestep_embedding

UNSEEN = 1 << 20              # a block that no text has
torch.backends.mha.set_fastpath_enabled(False)     # sampling computes as training does


def padding(layout: Layout) -> Layout:
    """What makes all samples as long as the longest one: noisy text in a block of its own, which no
    other position may attend to."""
    counts = torch.bincount(layout.sample, minlength=len(layout.task))                   # (S,)
    sample = torch.arange(len(counts)).repeat_interleave(counts.max() - counts)
    same = torch.zeros_like(sample)
    return Layout(sample, same + masks.N, same + UNSEEN, same, same, layout.task)


class Unpacked(MMDiT):
    """The cache keeps latents instead of keys and values."""
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
        v_text = v_text[:len(text)][new[0]]
        v_image = (image if v_image is None else v_image)[new[1]]
        if targets is not None:                            # never with a cache
            chosen = torch.zeros(len(layout), dtype=torch.bool)
            is_image = masks.is_image(layout.segment)
            chosen[targets[0]] = True
            v_text, v_image = v_text[chosen[~is_image]], v_image[chosen[is_image]]
        return v_text, v_image if len(v_image) else None, None

    def velocity(self, text: Tensor, image: Tensor, t: Tensor, t_index: Tensor,
                 layout: Layout) -> tuple[Tensor, Tensor | None]:
        """text (Lt, Dz), image (Li, Cz) of samples of one length -> their velocities."""
        return super().forward(text, image, t, t_index, layout, make_plan(layout))[:2]


class Plain(Unpacked):
    """A plain transformer in place of the MMDiT's blocks."""
    def __init__(self, config: MMDiTConfig):
        nn.Module.__init__(self)
        c = self.config = config
        # A block of the MMDiT has 18 D^2 weights, 6 of them for shift, scale and gate; one here 12.
        layers = round((c.layers + c.dual_layers) * 18 / 12)
        layer = nn.TransformerEncoderLayer(c.width, c.heads, c.expand_ratio * c.width, dropout=0.0,
                                           activation="gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, nn.LayerNorm(c.width), False)
        for p in self.encoder.parameters():                # its layers begin as copies of one
            if p.dim() > 1:
                nn.init.xavier_uniform_(p)
        self.time = nn.Sequential(nn.Linear(256, c.width), nn.SiLU(), nn.Linear(c.width, c.width))
        self.position = PositionEmbedding(c.width)
        self.reset_parameters({"position.proj.weight"})    # as in the MMDiT
        self.text_in = nn.Linear(c.text_channels, c.width)
        self.image_in = nn.Linear(c.image_channels, c.width)
        self.text_out = nn.Linear(c.width, c.text_channels)
        self.image_out = nn.Linear(c.width, c.image_channels)

    def velocity(self, text: Tensor, image: Tensor, t: Tensor, t_index: Tensor,
                 layout: Layout) -> tuple[Tensor, Tensor | None]:
        is_image, samples = masks.is_image(layout.segment), len(layout.task)
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
    (kind, *flags), kinds = sys.argv[1:] or [""], {"unpacked": Unpacked, "plain": Plain}
    given = config.parse(flags, "baseline.py") if kind in kinds else {}
    in_sequence = re.search("all|ii|vid", given.get("tasks", ""))
    if kind not in kinds or in_sequence or {"w_repa", "compile", "fsdp", "device"} & given.keys():
        print(f"baseline.py: expected one of {', '.join(kinds)}, then flags of train.py, without "
              "--w_repa, --compile, --fsdp, --device and the tasks ii and vid", file=sys.stderr)
        return 2
    cola.MMDiT = checkpoint.MMDiT = kinds[kind]
    workers.autocast = lambda stage, bf16, device: torch.autocast(device, torch.bfloat16, bf16)
    return train.main(["--device", "cpu", "--optimizer", "adamw", *flags])


if __name__ == "__main__":
    sys.exit(main())
