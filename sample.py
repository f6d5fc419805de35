"""Sample: text, images, captions and answers from a checkpoint.

    z_1 ~ T N(0, I);  dz/dt = v(z, t | context), t from 1 to 0;  x ~ p(x | z_0)  (paper, Sec. 3.2.3, Eq. 10.2)

Clean context (instruction, input image, caption, text so far) is encoded by its posterior mean and passes
through the prior once; its keys and values stay in the cache. An image is one block; text is transported
block by block, each finished block joining the context at t = 0: as the posterior mean of the tokens it
decodes to, for the prior knows no latents between two words (cf. the "clamping" of 2205.14217; the paper's
sampler, snap=False, goes without). Guidance mixes in the velocity of a shorter layout, the block or the image
without its context: v = v_u + w (v_c - v_u). The temperature T is by default 1 for images and 0.3 for text;
at 0 nothing is left to chance. A block that begins inside the prompt keeps the known latents at every step
("clean repaint", Sec. 5.2); the paper's other ways are there to compare (`align`, flow.repaint). Where a
latent is a patch of tokens, end tokens before the prompt move its end to that of a patch. Of p(x | z_0) the
mode is taken.

    python sample.py t2i  "a large red circle above a small blue square on a gray background" --out a.png
    python sample.py it2t a.png "describe the image."
    python sample.py t2t  "there is a red circle."
    python sample.py score "there is a red circle." " the circle is red."

Shapes: B samples, Dz and Cz text and image latent channels, bl latents in a text block.
"""
from __future__ import annotations

import argparse
import difflib
import functools
import json
import math
import re
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, PngImagePlugin
from torch import Tensor

import data
import flow
import masks
from cuda_attention import Plan, make_plan
from image_vae import ImageVAE
from masks import IT2T, T2I, T2T, Layout, Sample, pack
from mmdit import Cache, MMDiT, MMDiTConfig
from mmdit import load_official as load_prior, save_official as save_prior
from text_vae import TextVAE, check_settings, read_safetensors
from text_vae import load_official as load_vae, save_official as save_vae

FIRST_BLOCK = ("clean", "repaint", "left", "right")
FORMAT = "unified-cola-3"                  # what a checkpoint of ours says of itself
CONTENTS = dict.fromkeys(("config", "args", "tokenizer", "model", "ema", "progress", "reference", "optimizers"), dict) | \
    {"seconds": float}                     # and has
COUNTS = {"text_vae": ("encoder_num_blocks", "decoder_num_blocks"), "image_vae": ("blocks",), "mmdit": ("layers",)}
                                           # its parts and stages, and what each counts that has tensors of its own
EXACT = 64                                 # numbers of a block up to which `score` takes the exact divergence
MAX_LATENTS = 1 << 14                      # of an image that is drawn, and tokens of a text: masks have the square of that
MAX_BLOCK = 1 << 12                        # latents


@dataclass
class Cola:
    """The whole system: two VAEs, the prior between them, and the tokenizer."""
    text_vae: TextVAE
    image_vae: ImageVAE | None             # None: the public release, which has text alone
    mmdit: MMDiT
    tokenizer: data.Tokenizer
    block_len: int
    image_hw: tuple[int, int]
    image_loc: float                       # mean of the logit time that images were trained at
    first_block: str = "clean"             # what becomes of a prefix that ends inside a block
    tasks: tuple[str, ...] = masks.TASKS   # that it was trained for

    def __post_init__(self) -> None:
        if type(self.block_len) is not int or not 1 <= self.block_len <= MAX_BLOCK:
            raise ValueError(f"blocks of {self.block_len!r:.20} latents, expected 1 to {MAX_BLOCK}")
        if self.first_block not in FIRST_BLOCK or not {*self.tasks} <= {*masks.TASKS}:
            raise ValueError("a first block or tasks that are not known here")
        if self.block_len % (inner := self.text_vae.config["block_len"]):
            raise ValueError(f"blocks of {self.block_len} latents, of {inner} in the text VAE: a block's context would "
                             "have been encoded with the block in view")
        if self.tokenizer.n_vocab > self.text_vae.vocab_size:
            raise ValueError(f"{self.tokenizer.n_vocab} tokens in the tokenizer, {self.text_vae.vocab_size} in the text "
                             "VAE; both must be of one model")

    def to(self, device: str | torch.device) -> Cola:
        """Itself, its modules moved."""
        for module in filter(None, (self.text_vae, self.image_vae, self.mmdit)):
            module.to(device)
        return self

    @property
    def device(self) -> torch.device:
        return next(self.mmdit.parameters()).device

    def ids(self, text: str, end: bool) -> list[int]:
        """Tokens of a text; end=True appends the end token and fills the last block with it."""
        multiple = self.text_vae.patch_size * (self.block_len if end else 1)
        return data.pad_to_multiple(self.tokenizer.encode(text), multiple, self.tokenizer.end, ended=end)

    def align(self, ids: list[int], cut: int) -> tuple[list[int], int, range]:
        """Tokens of a text whose first `cut` are given, moved by end tokens until the cut is the end of a latent (paper,
        Sec. 5.3), or of a block where one is padded (Sec. 5.2): the tokens, the cut among them, and which latents are
        filled up, in whole or in part: they are given, and never to be told. The end tokens come first, but with
        padding on the right at the cut; in a block that is repainted, what fills it is as what else is given."""
        p, way = self.text_vae.patch_size, self.first_block
        fill, at = -cut % (p * (self.block_len if way in ("left", "right") else 1)), cut if way == "right" else 0
        filled = range(0) if way == "repaint" else range(at // p, -(-(at + fill) // p))
        return [*ids[:at], *[self.tokenizer.end] * fill, *ids[at:]], cut + fill, filled

    def encode_text(self, ids: list[list[int]]) -> tuple[Tensor, list[int]]:
        """Posterior means of texts, packed (L, Dz), and the number of latents of each."""
        lengths = [len(i) // self.text_vae.patch_size for i in ids]
        if not sum(lengths):
            return torch.zeros(0, self.text_vae.latent_dim, device=self.device), lengths
        flat = torch.tensor([t for i in ids for t in i], device=self.device)
        return self.text_vae.latents(self.text_vae.encode(flat, lengths)[0]), lengths

    def encode_images(self, images: list[np.ndarray]) -> Tensor:
        """Images uint8 (H, W, 3) of one size -> normalised mean latents, packed (B h w, Cz)."""
        x = to_float(np.stack(images)).to(self.device)                               # (B, 3, H, W)
        z = self.image_vae.normalize(self.image_vae.encode(x)[0])                    # (B, Cz, h, w)
        return z.flatten(2).transpose(1, 2).flatten(0, 1)

    def decode_images(self, z: Tensor, hw: tuple[int, int]) -> list[np.ndarray]:
        """Packed latents (B h w, Cz) -> images uint8 (H, W, 3)."""
        z = z.view(-1, *hw, z.shape[-1]).permute(0, 3, 1, 2)                         # (B, Cz, h, w)
        return list(to_uint8(self.image_vae.decode(self.image_vae.denormalize(z))))


def to_float(images: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) -> (B, 3, H, W) in [-1, 1]"""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(x: Tensor) -> np.ndarray:
    """(B, 3, H, W) in [-1, 1] -> uint8 (B, H, W, 3)"""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


class Context:
    """Clean positions that later queries may attend to. cached=False recomputes them at every call, which is
    slow: what the cache is tested against."""
    def __init__(self, model: Cola, cached: bool = True):
        self.model, self.cached, self.cache = model, cached, Cache() if cached else None
        self.past: tuple[Tensor, Tensor, Layout] | None = None                       # text, image, layout

    def plan(self, layout: Layout) -> Plan:
        """The plan of queries of this layout, for all the steps they take."""
        if self.past is None:
            return make_plan(layout)
        both = masks.concat(self.past[2], layout)
        return make_plan(layout, both) if self.cached else make_plan(both)

    def joined(self, text: Tensor, image: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Layout]:
        """The context and then these positions."""
        if self.past is None:
            return text, image, layout
        old_text, old_image, old_layout = self.past
        return torch.cat([old_text, text]), torch.cat([old_image, image]), masks.concat(old_layout, layout)

    def velocity(self, text: Tensor, image: Tensor, t: list[float], t_index: Tensor, layout: Layout,
                 plan: Plan) -> tuple[Tensor, Tensor | None]:
        """The velocity of text (Lt, Dz) and image (Li, Cz) at times t[t_index]; plan is self.plan(layout)."""
        n_text = n_image = 0
        if self.past is not None and not self.cached:
            n_text, n_image = len(self.past[0]), len(self.past[1])
            text, image, layout = self.joined(text, image, layout)
            t, t_index = [0.0, *t], torch.cat([t_index.new_zeros(n_text + n_image), t_index + 1])
        times = torch.tensor(t, device=text.device, dtype=torch.float32)
        v_text, v_image, _ = self.model.mmdit(text, image, times, t_index, layout, plan, self.cache, False)
        return v_text[n_text:], None if v_image is None else v_image[n_image:]

    def add(self, text: Tensor, image: Tensor, layout: Layout) -> None:
        """Let clean latents join the context at t = 0."""
        if self.cached:
            t, t_index = text.new_zeros(1), torch.zeros(len(layout), dtype=torch.long, device=text.device)
            self.model.mmdit(text, image, t, t_index, layout, self.plan(layout), self.cache, True)
        self.past = self.joined(text, image, layout)


@dataclass
class Settings:
    """How to integrate: steps, guidance, where to start. Images and text have defaults of their own below."""
    steps: int = 16
    guidance: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)     # flow times at which guidance acts
    solver: str = "euler"                  # a block that is repainted always takes euler
    shift: float | None = None             # of the time grid; None: as in training for images, 1 for text
    temperature: float = 1.0               # scale of the noise to start from; 0 leaves nothing to chance
    repaint_share: float = 1.0             # of a model trained for it (flow.repaint)
    repaint_cycles: int = 1
    snap: bool = True                      # a finished text block counts as the tokens it decodes to
    seed: int = 0
    cached: bool = True


IMAGE = Settings(guidance=2.0, interval=(0.6, 1.0))    # at lower times it bleeds colours (cf. 2404.07724)
TEXT = Settings(shift=3.0, temperature=0.3)           # 1 has outliers, 0 but one story; guidance oversharpens
RELEASED = Settings(guidance=7.0, snap=False)          # the paper's, for the public release


def transport(context: Context, layout: Layout, z: Tensor, s: Settings, known: Tensor | None = None,
              redraw: Callable[[], Tensor] | None = None) -> Tensor:
    """Integrate noise z of one modality, laid out as given, to clean latents, with guidance.

    z (L, channels); known (L,) bool: positions that are clean already. They stay, or are repainted with the
    fresh noise that `redraw` gives (flow.repaint)."""
    model = context.model
    is_image = bool((layout.segment == masks.I).any())
    moves = torch.ones_like(layout.segment) if known is None or redraw else (~known).long()
    empty = z.new_zeros(0, model.text_vae.latent_dim if is_image else model.mmdit.config.image_channels)
    # Guided, every sample is there twice, and the second has no context: one pass for both velocities.
    passes = {False: (layout, context.plan(layout), moves)}
    if context.past is not None and s.guidance != 1.0:
        both = masks.twice(layout)
        passes[True] = both, context.plan(both), torch.cat([moves, moves])

    def velocity(z: Tensor, t: float, doubled: bool) -> Tensor:
        layout, plan, moves = passes[doubled]
        text, image = (empty, z) if is_image else (z, empty)
        return context.velocity(text, image, [0.0, t], moves, layout, plan)[int(is_image)]

    def guided(z: Tensor, t: float) -> Tensor:
        w = flow.guidance_at(t, s.guidance, *s.interval) if True in passes else 1.0
        return velocity(z, t, False) if w == 1.0 else \
            flow.guided(*velocity(torch.cat([z, z]), t, True).chunk(2), w)

    times = flow.time_grid(s.steps, 1.0 if s.shift is None else s.shift)
    if redraw:
        return flow.repaint(guided, z, times, known, redraw, s.repaint_share, s.repaint_cycles)
    return flow.solve(guided, z, times, s.solver, known)


def noise(seed: int, first: int, count: int) -> list[np.random.Generator]:
    """One generator per sample number: a sample is the same alone and in any batch."""
    return [data.rng(seed, first + k, data.SAMPLE) for k in range(count)]


@torch.inference_mode()
def generate_images(model: Cola, captions: list[str], s: Settings = IMAGE, hw: tuple[int, int] | None = None,
                    first: int = 0) -> list[np.ndarray]:
    """Text to image. captions of B samples, numbered from `first`; hw in pixels, by default the size trained.
    Returns uint8 (H, W, 3) images. ValueError for a size the image VAE cannot take."""
    height, width = hw or model.image_hw
    model.image_vae.check_size(height, width)
    h, w = height // model.image_vae.downsample, width // model.image_vae.downsample
    context = Context(model, s.cached)
    z_text, lengths = model.encode_text([model.ids(c, end=True) for c in captions])
    clean = pack([Sample(T2I, clean=n) for n in lengths], model.block_len, model.device)
    length, channels = h * w, model.image_vae.channels
    context.add(z_text, z_text.new_zeros(0, channels), clean)
    layout = pack([Sample(T2I, image=(h, w))] * len(captions), model.block_len, model.device)
    generators = noise(s.seed, first, len(captions))
    z = np.concatenate([g.standard_normal((length, channels), np.float32) for g in generators])
    if s.shift is None:
        s = replace(s, shift=math.exp(model.image_loc) * flow.image_shift(length * channels))
    z = transport(context, layout, s.temperature * torch.from_numpy(z).to(model.device), s)
    return model.decode_images(z, (h, w))


@torch.inference_mode()
def generate_text(model: Cola, prefixes: list[str], prompts: list[str] | None = None,
                  images: list[np.ndarray] | None = None, s: Settings = TEXT, max_tokens: int = 64,
                  first: int = 0) -> list[str]:
    """Text to text, or image and text to text where prompts and images (uint8, of one size) are given.

    Continues each of B prefixes, numbered from `first`, until an end token or max_tokens new tokens; returns
    the continuations alone."""
    task, p, bl = (T2T if images is None else IT2T), model.text_vae.patch_size, model.block_len
    dz, device, B = model.text_vae.latent_dim, model.device, len(prefixes)
    context, starts = Context(model, s.cached), [0] * B
    if task == IT2T:
        z_prompt, starts = model.encode_text([model.ids(x, end=False) for x in prompts])
        z_image = model.encode_images(images)
        h, w = (side // model.image_vae.downsample for side in images[0].shape[:2])
        layout = pack([Sample(IT2T, prompt=n, image=(h, w)) for n in starts], bl, device)
        context.add(z_prompt, z_image, layout)
    ids = [model.align(i, len(i))[0] for i in map(model.tokenizer.encode, prefixes)]     # whole latents
    z_known, known = model.encode_text(ids)
    z = list(z_known.split(known))                                                   # B of (n, Dz)
    block = [n // bl for n in known]                                                 # which each fills next
    empty = z_known.new_zeros(0, model.mmdit.config.image_channels)
    if any(block):
        layout = pack([Sample(task, clean=b * bl, start=n) for b, n in zip(block, starts)], bl, device)
        context.add(torch.cat([x[:b * bl] for x, b in zip(z, block)]), empty, layout)
    generators, texts = noise(s.seed, first, B), ids
    repainted = model.first_block == "repaint" and task == T2T

    def fresh(scale: Tensor | float = s.temperature) -> Tensor:
        z = np.concatenate([g.standard_normal((bl, dz), np.float32) for g in generators])
        return scale * torch.from_numpy(z).to(device)                                # (B bl, Dz)

    while True:
        z_block = fresh().view(B, bl, dz)
        is_known = torch.zeros(B, bl, dtype=torch.bool, device=device)
        for i in range(B):
            rest = z[i][block[i] * bl:]
            z_block[i, :len(rest)], is_known[i, :len(rest)] = rest, True
        spots = [(b * bl, n) for b, n in zip(block, starts)]
        noisy = pack([Sample(task, noisy=bl, start=n, first=f) for f, n in spots], bl, device)
        # What is given has the noise of its time, whatever the temperature of what is not.
        scale = torch.where(is_known.flatten(), 1.0, s.temperature)[:, None]                         # (B bl, 1)
        redraw = functools.partial(fresh, scale) if repainted else None
        z0 = transport(context, noisy, z_block.flatten(0, 1), s, is_known.flatten(), redraw)
        repainted = False                  # only first blocks hold something of a prefix
        z = [torch.cat([x[:b * bl], y]) for x, b, y in zip(z, block, z0.view(B, bl, dz))]
        lengths = [len(x) for x in z]
        tokens = model.text_vae.decode(torch.cat(z), lengths).argmax(-1).split([n * p for n in lengths])
        texts = [i + t[len(i):].tolist() for i, t in zip(texts, tokens)]             # what is said is said
        new = [x[len(i):] for x, i in zip(texts, ids)]
        if all(model.tokenizer.end in n or len(n) >= max_tokens for n in new):
            return [model.tokenizer.decode(n[:max_tokens]) for n in new]
        if s.snap:                         # but a prefix stays as it was encoded, alone, as in training
            z = [torch.cat([given, x[len(given):]]) for given, x in
                 zip(z_known.split(known), model.encode_text(texts)[0].split(lengths))]
        clean = pack([Sample(task, clean=bl, start=n, first=f) for f, n in spots], bl, device)
        context.add(torch.cat([x[b * bl:] for x, b in zip(z, block)]), empty, clean)
        block = [b + 1 for b in block]


# ---- likelihood (paper, Sec. 10) ---------------------------------------------------------------------------

@torch.no_grad()
def log_weights(model: Cola, ids: list[int], samples: int, grid: Tensor, *, known: int = 0, exact: bool = True,
                solver: str = "rk4", seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """log p(x_b | z), log p(z_b | z_<b) and log q(z_b | x) of every block b of a text, for K = samples draws
    z ~ q(z | x): each (K, blocks) in nats (paper, Algorithm A.1, Eq. 10.8, 10.16). Sums over blocks are what
    flow.elbo and flow.iwae take.

    grid: from 1 to the time t_min at which the flow stops; 0 in the paper, but a prior trained at logit-normal times
    has met next to none near 0, where its velocity is far off. What flows to t_min > 0 and is then divided by
    1 - t_min, as noise is not decoded, is a model of its own, of latents that bear noise of variance
    (t_min / (1 - t_min))^2 more; q has it, too, so that the bounds are bounds.
    ids: tokens in whole blocks. known: latents at the front that are given and bear no term; a block that they
    share with others counts for the others alone. exact: the divergence by one backward pass for each of the
    bl Dz numbers of a block, else Hutchinson's estimate with one probe."""
    vae, bl, K, n = model.text_vae, model.block_len, samples, len(ids) // model.text_vae.patch_size
    t_min, given = grid[-1].item(), torch.arange(n, device=model.device).repeat(K) < known         # (K n,)
    tokens, lengths = torch.tensor(ids * K, device=model.device), [n] * K
    generators = [data.rng(seed, k, data.POSTERIOR) for k in range(K)]
    eps = np.concatenate([g.standard_normal((n, vae.latent_dim), np.float32) for g in generators])
    posterior = [x.view(K, n, -1) for x in vae.encode(tokens, lengths)]
    if known:                              # encoded alone, as in training
        alone = vae.encode(tokens[:known * vae.patch_size], [known])
        posterior = [torch.cat([x.expand(K, -1, -1), y[:, known:]], 1) for x, y in zip(alone, posterior)]
    mean, logvar = (x.flatten(0, 1) for x in posterior)                              # (K n, Dz) each
    more = torch.where(given, 0.0, (t_min / (1 - t_min)) ** 2)[:, None]              # (K n, 1)
    mean, logvar = vae.latents(mean), torch.logaddexp(logvar + 2 * math.log(vae.config["scaling_factor"]), more.log())
    z = mean + (logvar / 2).exp() * torch.from_numpy(eps).to(model.device)
    log_q = flow.log_normal(z, mean, logvar)
    log_px = -F.cross_entropy(vae.decode(z, lengths), tokens, reduction="none")      # (K n patch,)

    context, image = Context(model), z.new_zeros(0, model.mmdit.config.image_channels)
    context.add(z, image, pack([Sample(T2T, clean=n)] * K, bl, model.device))
    noisy = pack([Sample(T2T, noisy=n)] * K, bl, model.device)      # its blocks do not see each other
    plan = context.plan(noisy)

    def velocity(z: Tensor, t: float) -> Tensor:
        flat = z.flatten(0, 1).float()
        return context.velocity(flat, image, [0.0, t], (~given).long(), noisy, plan)[0].view_as(z)

    blocks, signs = (-1, bl, vae.latent_dim), None
    if not exact:
        signs = np.concatenate([g.choice([-1.0, 1.0], (n, vae.latent_dim)) for g in generators])
        signs = torch.from_numpy(signs).to(z).view(blocks)
    kept = torch.where(given, 1.0, 1 - t_min)[:, None]                               # (K n, 1)
    log_pz = flow.log_prob(velocity, (kept * z).view(blocks), grid, signs, given.view(-1, bl), solver)   # (K blocks,)
    log_pz = log_pz + vae.latent_dim * kept.log().view(-1, bl).sum(1)
    per_block = (K, n // bl, -1)
    log_px = torch.where(given.repeat_interleave(vae.patch_size), 0.0, log_px)
    return (log_px.view(per_block).sum(-1), log_pz.view(K, -1),
            torch.where(given[:, None], 0.0, log_q).view(per_block).sum(-1))


def score(model: Cola, prefix: str, response: str, samples: int = 8, steps: int = 16, t_min: float = 0.1,
          **options) -> list[tuple]:
    """Likelihoods of a text in rows (name, log p in nats, tokens; 0 of them for a term): ELBO and IWAE of the
    whole, of the prefix and, as their difference, of the response (Eq. 10.8, 10.9, 10.13, 10.14); and the
    response's own score given latent draws of the prefix (Eq. 10.21, summed over its blocks), with its three
    terms. The text ends with an end token and is filled up with more to whole blocks, whose nats are in the sums but
    which are not counted as tokens. It is laid out from its first token on, whatever the model does with prefixes.
    t_min: where the flow stops (log_weights).

    Only whole blocks have a likelihood: in the differences, what of the prefix shares a block (or patch) with
    the response counts as response, as the tokens beside them say; in the own score only what shares a patch, but
    for models whose first block is not clean, which know no given latents beside noise.
    """
    head, tail = model.tokenizer.encode(prefix), model.tokenizer.encode(response)
    p, grid, rows = model.text_vae.patch_size, t_min + (1 - t_min) * flow.time_grid(steps), []
    ids = data.pad_to_multiple(head + tail, p * model.block_len, model.tokenizer.end)
    cut = len(head) // (p * model.block_len)
    known = len(head) // p if model.first_block == "clean" else cut * model.block_len
    total, before = len(head) + len(tail) + 1, cut * model.block_len * p
    terms = log_weights(model, ids, samples, grid, **options)                        # (K, blocks) each
    for name, bound in (("ELBO", flow.elbo), ("IWAE", flow.iwae)):
        whole, first = (bound(*(x[:, :end].sum(1) for x in terms)).item() for end in (None, cut))
        rows += [(f"text, {name}", whole, total), (f"prefix, {name}", first, before),
                 (f"response | prefix, {name}", flow.conditional(whole, first), total - before)]
    if known > cut * model.block_len:
        terms = log_weights(model, ids, samples, grid, known=known, **options)
    px, pz, q = own = [x[:, cut:].sum(1) for x in terms]
    rows.append(("response | latents of the prefix", flow.elbo(*own).item(), total - known * p))
    return rows + [(f"    {name}", x.mean().item(), 0) for name, x in
                   (("log p(x | z)", px), ("log p(z | z of the prefix)", pz), ("- log q(z | x)", -q))]


# ---- checkpoints -------------------------------------------------------------------------------------------

def read_checkpoint(path: str | Path) -> dict:
    """The dict of a checkpoint of ours; nothing in the file can run code.

    FileNotFoundError or ValueError, one line."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint; "
                                "`python train.py` writes one, out/ckpt.pt")
    try:
        with zipfile.ZipFile(path) as file:                    # torch.load compares no checksums
            members = file.infolist()
            if any(m.compress_type for m in members) or sum(m.file_size for m in members) > path.stat().st_size:
                raise zipfile.BadZipFile("its members are larger than the file")
            if name := file.testzip():                         # every worker does: all must come to the same end
                raise zipfile.BadZipFile(f"{name} was changed")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError:
        raise
    except Exception as error:             # torch.load has no class of its own: zip, pickle, runtime errors
        reason = str(error).partition("\n")[0][:80]
        raise ValueError(f"{path}: not a readable checkpoint ({reason}); it may be damaged, take an earlier "
                         "copy or train anew") from None
    found = checkpoint.get("format") if isinstance(checkpoint, dict) else None
    if not isinstance(found, str) or found != FORMAT:          # what repr makes of a forged object may have no end
        found = repr(found[:40]) if isinstance(found, str) else type(found).__name__
        raise ValueError(f"{path}: not a checkpoint of this program (format {found}, expected {FORMAT!r}); "
                         "make one with train.py")
    wrong = [name for name, kind in CONTENTS.items() if not isinstance(checkpoint.get(name), kind)]
    progress = checkpoint.get("progress")
    if not wrong and not all(type(progress.get(stage)) is int and progress[stage] >= 0 for stage in COUNTS):
        wrong = ["progress"]
    if wrong:
        raise ValueError(f"{path}: damaged in {', '.join(wrong)}; take an earlier copy")
    return {name: checkpoint[name] for name in ("format", *CONTENTS)}                # nothing else can pass for ours


def check_state(state: dict, want: dict[str, Tensor]) -> None:
    """ValueError, naming the first difference, unless tensors of a checkpoint are as wanted: names, shapes, types,
    and none that claims more memory than it has."""
    for name in sorted(want.keys() | state.keys(), key=str):
        x, like = state.get(name), want.get(name)
        if like is None or not isinstance(x, Tensor) or x.layout != torch.strided or x.is_meta or \
                (x.shape, x.dtype) != (like.shape, like.dtype) or not x.is_contiguous():
            raise ValueError(f"{str(name)[:80]} is not what the model has by that name")


def image_loc(args: dict) -> float:
    """Mean of the logit time that these flags train images at, by which sampling is shifted; uniform times are not.
    ValueError for what no flag can be."""
    law, loc = args["time_law"], float(args["image_loc"])
    if law not in ("logit_normal", "uniform") or not -100 <= loc <= 100:
        raise ValueError("damaged in its flags --time_law or --image_loc")
    return 0.0 if law == "uniform" else loc


def build(checkpoint: dict, weights: str = "ema") -> Cola:
    """The system of a checkpoint, its weights copied. weights: "ema" (what is sampled) or "model" (what is
    trained). ValueError, one line, where its parts do not fit each other; sizes that it names cost no memory."""
    try:
        c = checkpoint["config"]
        for part, like in (("text_vae", TextVAE), ("image_vae", ImageVAE), ("mmdit", MMDiTConfig)):
            check_settings(c[part], like)
        if not isinstance(c["image_hw"], list) or not isinstance(c["tasks"], list):
            raise ValueError("image_hw or tasks is no list")
        for part, counts in COUNTS.items():
            for name in counts:
                if not 0 <= c[part][name] <= len(checkpoint[weights][part]):
                    raise ValueError(f"{name} {c[part][name]} for {len(checkpoint[weights][part])} tensors")
        with torch.device("meta"):
            parts = TextVAE(**c["text_vae"]), ImageVAE(**c["image_vae"]), MMDiT(MMDiTConfig(**c["mmdit"]))
        model = Cola(*parts, data.Tokenizer.from_dict(checkpoint["tokenizer"]), int(c["block_len"]),
                     tuple(map(int, c["image_hw"])), image_loc(checkpoint["args"]),
                     checkpoint["args"]["first_block"], tuple(c["tasks"]))
        for name, part in zip(COUNTS, parts):
            check_state(checkpoint[weights][name], part.state_dict())
            part.load_state_dict({k: v.clone() for k, v in checkpoint[weights][name].items()}, assign=True)
            part.eval()
    except Exception as error:                                 # whatever a forged configuration can raise
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise ValueError(f"the checkpoint is of another architecture: {reason}") from None
    return model


def load(path: str | Path, device: str = "cpu") -> Cola:
    """The system in a checkpoint file, ready to sample. ValueError also where its prior was never trained."""
    checkpoint = read_checkpoint(path)
    if not checkpoint["progress"]["mmdit"]:
        raise ValueError(f"{path}: its prior was never trained; go on with train.py --resume auto --stage all")
    return build(checkpoint).to(device)


def load_official(folder: str | Path, image_channels: int = 0, streams: int = 1) -> Cola:
    """The public release: cola_vae/, cola_dit/ and tokenizer.json in a folder; text alone, but with
    image_channels a prior that has a fresh image side (mmdit.load_official). Weights are mapped, not copied.

    FileNotFoundError or ValueError, one line."""
    folder = Path(folder)
    for name in ("cola_vae", "cola_dit/config.json", "tokenizer.json"):
        if not (folder / name).exists():
            raise FileNotFoundError(f"{folder / name}: not there; expected the folder of a public release")
    text_vae, tokenizer = load_vae(folder / "cola_vae"), data.Tokenizer.from_file(folder / "tokenizer.json")
    config = data.read_json(folder / "cola_dit" / "config.json")
    prior, block_len = load_prior(config, read_safetensors(folder / "cola_dit"), image_channels, streams)
    if prior.config.text_channels != text_vae.latent_dim:
        raise ValueError(f"{folder}: latents of {text_vae.latent_dim} channels in cola_vae, of "
                         f"{prior.config.text_channels} in cola_dit; both must be of one release")
    return Cola(text_vae.eval(), None, prior.eval(), tokenizer, block_len, (0, 0), 0.0, tasks=("t2t",))


def save_official(model: Cola, folder: str | Path) -> None:
    """Write the text stream as a folder that `load_official` reads back. ValueError for what it has no place for."""
    if model.first_block != "clean":
        raise ValueError(f"this model has --first_block {model.first_block}; a release says nothing of it and is taken as clean")
    save_prior(model.mmdit, model.block_len, Path(folder, "cola_dit"))
    save_vae(model.text_vae, Path(folder, "cola_vae"))
    model.tokenizer.save(Path(folder, "tokenizer.json"))


# ---- command line ------------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """argparse that names the nearest flag and says everything in one line."""
    def __init__(self, *args, **kwargs):
        formatter = argparse.ArgumentDefaultsHelpFormatter
        super().__init__(*args, allow_abbrev=False, formatter_class=formatter, **kwargs)

    def error(self, message: str):
        parsers = [self]                   # what a subcommand does not know is reported by the parser above
        for action in self._actions:
            parsers += action.choices.values() if isinstance(action, argparse._SubParsersAction) else []
        known = [o for p in parsers for a in p._actions for o in a.option_strings]
        for word in re.findall(r"--[\w-]+", message if "unrecognized" in message else ""):
            near = difflib.get_close_matches(word, known, 1)
            message = f"unknown flag {word}" + (f"; did you mean {near[0]}?" if near else "; see --help")
            if word in known:
                message = f"{word} is no flag of this task; see --help behind its name"
            break
        self.exit(2, f"{self.prog.split()[0]}: {message}\n")


def parse(argv: list[str] | None) -> argparse.Namespace:
    trained = Parser(add_help=False)
    trained.add_argument("--checkpoint", default="out/ckpt.pt", help="what train.py wrote")
    base = Parser(add_help=False, parents=[trained])
    base.add_argument("--official", default="", help="the folder of a public Cola DLM release (cola_vae/, "
                      "cola_dit/, tokenizer.json) in place of a checkpoint; it knows text alone, and is sampled as the "
                      f"paper does: guidance {RELEASED.guidance}, temperature {RELEASED.temperature}, no snapping, an even grid")
    base.add_argument("--steps", type=int, default=16, help="solver steps; fewer is faster and coarser")
    base.add_argument("--seed", type=int, default=0, help="same seed, same samples")
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    base.add_argument("--device", default=default_device, help="where to run")
    common = Parser(add_help=False, parents=[base])
    common.add_argument("--guidance", type=float, default=argparse.SUPPRESS,
                        help="guidance scale w; 1 is conditional, more follows the prompt more "
                        f"(default {IMAGE.guidance} for images, {TEXT.guidance} for text)")
    common.add_argument("--interval", type=float, nargs=2, metavar=("LOW", "HIGH"), default=argparse.SUPPRESS,
                        help="flow times between which guidance acts; narrower is cheaper (default "
                        f"{IMAGE.interval[0]} {IMAGE.interval[1]} for images, all for text)")
    common.add_argument("--solver", choices=flow.SOLVERS, default="euler",
                        help="heun and rk4 call the model 2 and 4 times a step, ab2 once")
    common.add_argument("--shift", type=float, default=argparse.SUPPRESS,
                        help="shift of the time grid; larger spends more steps near noise "
                        f"(default: by size for images, {TEXT.shift} for text)")
    common.add_argument("--temperature", type=float, default=argparse.SUPPRESS,
                        help="scale of the noise to start from; at 0 all samples are the same "
                        f"(default {IMAGE.temperature} for images, {TEXT.temperature} for text)")
    common.add_argument("--snap", action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS,
                        help="text goes on from the tokens that its latents so far decode to; off, as in the "
                        "paper, from these latents themselves")
    common.add_argument("--n", type=int, default=1, help="samples to draw; of text at a temperature above 0")
    common.add_argument("--kv_cache", action=argparse.BooleanOptionalAction, default=True,
                        help="off recomputes the context at every step: slower, the same result")
    parser = Parser(prog="sample.py", description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="task", required=True, parser_class=Parser)
    p = commands.add_parser("t2i", parents=[common], help="text to image")
    p.add_argument("prompt", help="what to draw")
    p.add_argument("--out", default="sample.png",
                   help="PNG to write; with --n above 1 a number is added to its name")
    p.add_argument("--size", type=int, nargs="+", help="pixels: one number, or height and width")
    p = commands.add_parser("it2t", parents=[common], help="image and text to text")
    p.add_argument("image", help="a picture of any size and format")
    p.add_argument("prompt", nargs="?", default="describe the image.", help="what to do, or a question")
    p.add_argument("--max_tokens", type=int, default=64, help="longest answer")
    p = commands.add_parser("t2t", parents=[common], help="continue a text")
    p.add_argument("prompt", help="the text")
    p.add_argument("--max_tokens", type=int, default=64, help="longest continuation")
    p.add_argument("--repaint_share", type=float, default=argparse.SUPPRESS, help="of a model trained with "
                   "--first_block repaint: share of the steps in which the prompt leads its block (default "
                   f"{TEXT.repaint_share})")
    p.add_argument("--repaint_cycles", type=int, default=argparse.SUPPRESS,
                   help=f"how often each of these steps is taken (default {TEXT.repaint_cycles})")
    p = commands.add_parser("score", parents=[base], help="likelihood of a text and of its end")
    p.add_argument("prefix", help='"" for none')
    p.add_argument("response", help="what follows it, letter for letter")
    p.add_argument("--solver", choices=flow.SOLVERS, default="rk4", help="rk4 costs most and errs least")
    p.add_argument("--t_min", type=float, default=0.1, help="flow time at which the latents are scored, with its noise; "
                   "0 is the paper's, but by default next to no times below 0.1 are trained; each is another model, and "
                   "scores of different ones do not compare")
    p.add_argument("--samples", type=int, default=8, help="draws K of the latents; IWAE is tighter with more")
    p.add_argument("--divergence", choices=("exact", "hutchinson"), default=None,
                   help="exact takes a backward pass for every number of a block; hutchinson one in all, but its noise "
                   f"biases the IWAE upwards (default: exact for blocks of up to {EXACT} numbers)")
    p = commands.add_parser("export", parents=[trained],
                            help="write text VAE, text stream and tokenizer as the public release has them")
    p.add_argument("folder", help="a new one, for cola_vae/, cola_dit/ and tokenizer.json")
    args = parser.parse_args(argv)
    check(args)
    return args


def settings(args: argparse.Namespace) -> Settings:
    """The task's defaults, and what the flags say otherwise."""
    given = {name: value for name, value in vars(args).items() if name in Settings.__dataclass_fields__}
    default = IMAGE if args.task == "t2i" else RELEASED if args.official else TEXT
    return replace(default, cached=args.kv_cache, **given)


def check(args: argparse.Namespace) -> None:
    """Refuse impossible values before any work. ValueError or FileNotFoundError, one line."""
    if args.task == "export":
        if Path(args.folder).exists():
            raise ValueError(f"{args.folder} exists; name a new folder")
        return
    for name in ("n", "steps", "max_tokens", "samples", "repaint_cycles"):
        if getattr(args, name, 1) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: expected at least 1")
    if not 0 <= args.seed < data.SEEDS:
        raise ValueError(f"--seed {args.seed}: expected at least 0 and below 2^56")
    if args.task != "score":
        s = settings(args)
        if not 0 <= s.interval[0] <= s.interval[1] <= 1:
            raise ValueError(f"--interval {s.interval[0]} {s.interval[1]}: expected rising numbers in 0 .. 1")
        if not abs(s.guidance) <= 1e6:
            raise ValueError(f"--guidance {s.guidance}: expected a number, at most 1e6")
        if s.shift is not None and not 0 < s.shift <= 1e6:
            raise ValueError(f"--shift {s.shift}: expected a number above 0, at most 1e6; 1 leaves the times as they are")
        if not 0 <= s.temperature <= 1e6:
            raise ValueError(f"--temperature {s.temperature}: expected a number from 0 to 1e6")
        if not 0 <= s.repaint_share <= 1:
            raise ValueError(f"--repaint_share {s.repaint_share}: expected a share between 0 and 1")
        if args.n > 1 and s.temperature == 0:
            raise ValueError(f"--n {args.n}: at temperature 0 all samples are the same; add --temperature 1")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", args.device):
        raise ValueError(f"--device {args.device}: expected cpu, cuda or cuda:1")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device}: torch finds no CUDA device here; use --device cpu")
    if int(args.device.partition(":")[2] or 0) >= max(1, torch.cuda.device_count()):
        raise ValueError(f"--device {args.device}: torch finds {torch.cuda.device_count()} CUDA devices here, "
                         "counted from 0")
    if not 0 <= getattr(args, "t_min", 0) < 1:
        raise ValueError(f"--t_min {args.t_min}: expected a time from 0 to below 1")
    for name in ("prompt", "prefix", "response"):
        text = getattr(args, name, None)
        if text is not None and not text.strip() and (name == "response" or args.task in ("t2i", "it2t")):
            raise ValueError(f"the {name} is empty; say what to draw, to ask or to score")
        if text and text.strip():
            data.clean_text(text, f"the {name}")
    if args.task == "t2i":
        if args.size and len(args.size) > 2:
            raise ValueError(f"--size {args.size}: expected one number of pixels, or height and width")
        if Path(args.out).suffix.lower() != ".png":
            raise ValueError(f"--out {args.out}: expected a name that ends in .png, "
                             "which carries the caption along")
        if Path(args.out).is_dir():
            raise ValueError(f"--out {args.out}: that is a folder; name a file")
        if not Path(args.out).parent.is_dir():
            folder = Path(args.out).parent
            raise FileNotFoundError(f"--out {args.out}: there is no folder {folder}; make it first")


def run(args: argparse.Namespace, model: Cola, hw: tuple[int, int], picture: np.ndarray | None) -> None:
    """Sample and write. hw: pixels of the images to draw; picture: what it2t is asked about."""
    if args.task == "score":
        numbers = model.block_len * model.text_vae.latent_dim
        exact = args.divergence == "exact" or args.divergence is None and numbers <= EXACT
        rows = score(model, args.prefix, args.response, args.samples, args.steps, args.t_min,
                     solver=args.solver, exact=exact, seed=args.seed)
        divergence = "exact" if exact else "Hutchinson's"
        if shared := len(model.tokenizer.encode(args.prefix)) - rows[1][2]:
            print(f"of the prefix the end ({shared}) shares a block with the response: in ELBO and IWAE it counts as response")
        print(f"{f'log p in nats, t_min {args.t_min:g} ({divergence} divergence), of tokens':52} nats/token perplexity")
        for name, value, tokens in rows:
            rates = flow.nats_per_token(value, tokens), flow.perplexity(value, tokens)
            per_token = f"{tokens:7d} {rates[0]:10.4f} {rates[1]:10.4f}" if tokens else ""
            print(f"{name:32} {value:11.4f} {per_token}")
        return
    s = settings(args)
    if args.task == "t2i":
        images = generate_images(model, [args.prompt] * args.n, s, hw)
        path = Path(args.out)
        paths = [path.with_stem(f"{path.stem}_{i}") for i in range(args.n)] if args.n > 1 else [path]
        for path, image in zip(paths, images):
            info = PngImagePlugin.PngInfo()
            info.add_text("caption", args.prompt)
            Image.fromarray(image).save(path, pnginfo=info)
        for path in paths:
            print(f"{path}  {images[0].shape[1]} x {images[0].shape[0]}  {args.prompt}")
    elif args.task == "it2t":
        prompts, pictures = [args.prompt] * args.n, [picture] * args.n
        for answer in generate_text(model, [""] * args.n, prompts, pictures, s, args.max_tokens):
            print(answer)
    else:
        for text in generate_text(model, [args.prompt] * args.n, s=s, max_tokens=args.max_tokens):
            print(args.prompt + text)


def refuse(error: Exception) -> int:
    """One line for the user, and the exit status."""
    print(f"sample.py: {error}", file=sys.stderr)
    return 2


def main(argv: list[str] | None = None) -> int:
    """The exit status: 0, 2 for a user's mistake, 130 when interrupted."""
    try:
        try:                               # whatever a user can get wrong
            args = parse(argv)
            if args.task == "export":
                save_official(load(args.checkpoint), args.folder)
                print(f"{args.folder}: cola_vae, cola_dit and tokenizer.json written")
                return 0
            model = load_official(args.official).to(args.device) if args.official else \
                load(args.checkpoint, args.device)
            if (needed := "t2t" if args.task == "score" else args.task) not in model.tasks:
                raise ValueError(f"{args.official or args.checkpoint} was trained for {', '.join(model.tasks)}, "
                                 f"not for {needed}")
            for name in ("prompt", "prefix", "response"):
                n = len(model.tokenizer.encode(getattr(args, name, "")))
                if n > MAX_LATENTS:
                    raise ValueError(f"the {name} has {n:,} tokens; expected at most {MAX_LATENTS:,}")
            if {"repaint_share", "repaint_cycles"} & vars(args).keys() and model.first_block != "repaint":
                raise ValueError(f"--repaint_share, --repaint_cycles: this model has --first_block {model.first_block}")
            picture = None
            hw = model.image_hw
            if args.task == "it2t":
                picture = data.load_image(args.image, hw)
            elif args.task == "t2i" and args.size:
                hw = args.size[0], args.size[-1]
                model.image_vae.check_size(*hw)
                if (n := hw[0] * hw[1] // model.image_vae.downsample ** 2) > MAX_LATENTS:
                    raise ValueError(f"--size {hw[0]} x {hw[1]}: {n:,} latents; expected at most "
                                     f"{MAX_LATENTS:,}")
        except (ValueError, OSError) as error:
            return refuse(error)
        try:
            run(args, model, hw, picture)
        except (OSError, UnicodeError) as error:       # no room, no permission; letters of the terminal
            return refuse(error)
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
