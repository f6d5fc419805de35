"""Text VAE: tokens <-> continuous latents, one latent for every `patch_size` tokens.

    q(z | x) = N(mu(x), diag sigma(x)^2),    z_0 = mu + sigma eps                   (paper, Eq. 16.1)
    stage 1:  -E_q log p(x | z_0) + beta KL(q || N(0, I)) + lambda_mask L_mask      (paper, Eq. 3.16)
    stage 2:  -E_q log p(x | z_0) + beta E_q log q        + lambda_mask L_mask      (paper, Eq. 3.18)
    logSNR = log(mean mu^2 / mean sigma^2)                                          (paper, Eq. 16.2)

The latents keep the order of the text, so the prior (mmdit.py) can write them block by block; encoder and
decoder are strictly causal by default. mu passes a LayerNorm without affine, so mean mu^2 = 1 everywhere, and
a fixed logSNR is the constant sigma^2 = exp(-logSNR): noise that teaches the decoder to bear the prior's
errors. A learned sigma settles where beta says. Names, shapes and arithmetic are those of the public Cola DLM
release, whose folder `load_official` reads and `save_official` writes.

Shapes: T tokens, L = T / patch_size latents (packed over samples), D width, Dz latent channels, V vocabulary,
nh heads, hd head width.    Run: python text_vae.py   (CPU, 5 s)
How much noise a trained decoder bears (paper, Sec. 5.4): python text_vae.py --checkpoint out/ckpt.pt
"""
from __future__ import annotations

import functools
import inspect
import json
import math
import mmap
import os
import struct
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import masks
from cuda_attention import Plan, attention, make_plan
from data import read_json


def rope_table(position: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos, sin of position * theta^(-2i / hd), i = 0 .. hd/2 - 1. position (L,) -> two fp32 (L, 1, hd/2)."""
    i = torch.arange(0, head_dim, 2, device=position.device, dtype=torch.float32)
    angle = position[:, None, None].float() * theta ** (-i / head_dim)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """RoPE, "rotate half" form: channel i pairs with channel i + hd/2. x (L, nh, hd) -> the same."""
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)                                               # (L, nh, hd/2) each
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Block(nn.Module):
    """Post-norm block: attention reads the stream as it is, and norm_attn normalises the stream itself."""

    def __init__(self, dim: int, ffn_dim: int, num_heads: int, qk_bias: bool, bias: bool, eps: float):
        super().__init__()
        self.num_heads = num_heads
        self.qkv_proj = nn.Linear(dim, 3 * dim, bias=qk_bias)
        self.q_norm = nn.LayerNorm(dim, eps)
        self.k_norm = nn.LayerNorm(dim, eps)
        self.attn_out_proj = nn.Linear(dim, dim, bias=bias)
        self.norm_attn = nn.LayerNorm(dim, eps)
        self.ffn_proj = nn.Linear(dim, ffn_dim, bias=bias)
        self.ffn_out = nn.Linear(ffn_dim // 2, dim, bias=bias)
        self.norm_ffn = nn.LayerNorm(dim, eps)

    def forward(self, x: Tensor, plan: Plan, rope: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = self.qkv_proj(x).chunk(3, dim=-1)                         # (L, D) each
        heads = (x.shape[0], self.num_heads, x.shape[1] // self.num_heads)
        q = rotate(self.q_norm(q).view(heads), rope).to(v.dtype)      # the norm spans all heads
        k = rotate(self.k_norm(k).view(heads), rope).to(v.dtype)            # (L, nh, hd)
        o = attention(q, k, v.view(heads), plan).flatten(1)                 # (L, D)
        x = self.norm_attn(x) + self.attn_out_proj(o)
        up, gate = self.ffn_proj(x).chunk(2, dim=-1)                  # (L, ffn_dim / 2) each, up first
        return x + self.norm_ffn(self.ffn_out(F.silu(gate) * up))           # (L, D)


class Encoder(nn.Module):
    def __init__(self, vocab_size: int, dim: int, latent_dim: int, patch_size: int, num_blocks: int, **block):
        super().__init__()
        self.wte = nn.Embedding(vocab_size + 1, dim)                  # the extra row V is the mask token
        self.patch_embedder = nn.Conv1d(dim, dim, patch_size, stride=patch_size)
        self.blocks = nn.ModuleList(Block(dim, **block) for _ in range(num_blocks))
        self.final_layer = nn.Linear(dim, 2 * latent_dim)

    def forward(self, ids: Tensor, plan: Plan, rope: tuple[Tensor, Tensor]) -> Tensor:
        w = self.patch_embedder.weight.transpose(1, 2).flatten(1)     # stride = kernel: one matrix product
        x = self.wte(ids).view(len(plan.q), w.shape[1])                     # (L, patch * D)
        x = F.linear(x, w, self.patch_embedder.bias)                        # (L, D)
        for block in self.blocks:
            x = block(x, plan, rope)
        return self.final_layer(x)                                    # (L, 2 Dz): mean | logvar


class Decoder(nn.Module):
    def __init__(self, vocab_size: int, dim: int, latent_dim: int, patch_size: int, num_blocks: int, **block):
        super().__init__()
        self.in_layer = nn.Linear(latent_dim, dim)
        self.blocks = nn.ModuleList(Block(dim, **block) for _ in range(num_blocks))
        self.unpatch_layer = nn.Linear(dim, patch_size * dim)
        self.final_norm = nn.LayerNorm(dim, block["eps"])
        self.final_layer = nn.Linear(dim, vocab_size)

    def forward(self, z: Tensor, plan: Plan, rope: tuple[Tensor, Tensor]) -> Tensor:
        """All but final_layer: a loss over a few positions then pays the vocabulary for those alone."""
        x = self.in_layer(z)                                                # (L, D)
        for block in self.blocks:
            x = block(x, plan, rope)
        patch = self.unpatch_layer.out_features // x.shape[1]
        x = self.unpatch_layer(x).view(*x.shape, patch)               # (L, D, patch): patch runs fastest
        return self.final_norm(x.transpose(1, 2).flatten(0, 1))             # (T, D)


class TextVAE(nn.Module):
    """Causal transformer VAE over packed texts. `TextVAE(**vae.config)` builds its twin.

    `lengths` is everywhere the number of latents of each text in packed order: L = sum(lengths). A `plan`
    from make_plan(lengths) may be passed to share it between calls on the same lengths.
    vae_logsnr: the fixed logSNR of Eq. 16.2, or None for a sigma learned per coordinate.
    block_len: how many latents see each other; 1 is strictly causal (the paper), the release is block-causal.
    """

    def __init__(self, vocab_size: int, dim: int = 96, ffn_dim: int = 384, num_heads: int = 3,
                 encoder_num_blocks: int = 2, decoder_num_blocks: int = 2, latent_dim: int = 16,
                 patch_size: int = 1, block_len: int = 1, vae_logsnr: float | None = 1.5,
                 rope_theta: float = 500000.0, layer_norm_eps: float = 1e-6, qk_bias: bool = False,
                 bias: bool = True, encoder_last_ln: bool = True, scaling_factor: float = 1.0,
                 shifting_factor: float = 0.0):
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        if dim % (2 * num_heads):
            raise ValueError(f"text VAE width {dim}: {num_heads} heads need a multiple of {2 * num_heads}")
        if ffn_dim % 2 or min(vocab_size, ffn_dim, latent_dim, patch_size, block_len) < 1:
            raise ValueError(f"text VAE: got vocab_size {vocab_size}, ffn_dim {ffn_dim}, latent_dim "
                             f"{latent_dim}, patch_size {patch_size}, block_len {block_len}; expected all "
                             "to be at least 1 and ffn_dim even")
        if vae_logsnr is not None and not encoder_last_ln:
            raise ValueError("a fixed vae_logsnr needs encoder_last_ln: else the mean has no fixed power")
        self.vocab_size, self.latent_dim, self.patch_size = vocab_size, latent_dim, patch_size
        self.mask_id = vocab_size
        shape = dict(vocab_size=vocab_size, dim=dim, latent_dim=latent_dim, patch_size=patch_size, bias=bias,
                     ffn_dim=ffn_dim, num_heads=num_heads, qk_bias=qk_bias, eps=layer_norm_eps)
        self.encoder = Encoder(num_blocks=encoder_num_blocks, **shape)
        self.decoder = Decoder(num_blocks=decoder_num_blocks, **shape)
        self.apply(init_weights)

    def make_plan(self, lengths) -> Plan:
        """Who sees whom among texts of `lengths` latents: shared by all layers of encoder and decoder."""
        device = self.encoder.wte.weight.device
        return make_plan(masks.text_layout(lengths, self.config["block_len"], device))

    def rope(self, plan: Plan) -> tuple[Tensor, Tensor]:
        c = self.config
        return rope_table(plan.q.col, c["dim"] // c["num_heads"], c["rope_theta"])

    def encode(self, ids: Tensor, lengths, plan: Plan | None = None) -> tuple[Tensor, Tensor]:
        """The posterior of Eq. 16.1: ids (T,) -> mean, logvar (L, Dz) fp32, not scaled (see `latents`)."""
        plan = self.make_plan(lengths) if plan is None else plan
        if len(ids) != len(plan.q) * self.patch_size:
            raise ValueError(f"got {len(ids)} tokens for {len(plan.q)} latents of {self.patch_size}; pad "
                             "texts with end tokens to whole latents, and count latents in lengths")
        if not len(ids):                       # a batch of images whose captions were all dropped
            return torch.zeros(2, 0, self.latent_dim, device=ids.device).unbind()
        mean, logvar = self.encoder(ids, plan, self.rope(plan)).float().chunk(2, dim=-1)  # (L, Dz) each
        if self.config["encoder_last_ln"]:
            mean = F.layer_norm(mean, (self.latent_dim,), eps=self.config["layer_norm_eps"])
        if self.config["vae_logsnr"] is not None:
            logvar = torch.full_like(mean, -self.config["vae_logsnr"])      # mean mu^2 = 1 already
        return mean, logvar.clamp(-30.0, 20.0)

    def latents(self, mean: Tensor, logvar: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        """What prior and decoder take: (z - shift) * scale, z = mean + sigma noise, or the mean where no
        noise is given (inference). All (L, Dz)."""
        z = mean if noise is None else mean + (0.5 * logvar).exp() * noise
        return (z - self.config["shifting_factor"]) * self.config["scaling_factor"]

    def decode(self, z: Tensor, lengths, plan: Plan | None = None) -> Tensor:
        """Logits of every token from `latents`, taken as they are: z (L, Dz) -> (T, V)."""
        plan = self.make_plan(lengths) if plan is None else plan
        return self.decoder.final_layer(self.decoder(z, plan, self.rope(plan)))


def init_weights(module: nn.Module) -> None:
    """N(0, 0.02) cut at 3 deviations, as the release's config says; biases zero."""
    if isinstance(module, (nn.Linear, nn.Conv1d, nn.Embedding)):
        nn.init.trunc_normal_(module.weight, std=0.02, a=-0.06, b=0.06)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)


def kl(mean: Tensor, logvar: Tensor, mean_ref: Tensor | None = None,
       logvar_ref: Tensor | None = None) -> Tensor:
    """KL(q || q_ref) of diagonal Gaussians, q_ref = N(0, I) by default. (L, Dz) -> nats per latent (L,).

    beta's term of Eq. 3.16; with a frozen stage-1 encoder's posterior, lambda_ref's term of Eq. 3.18."""
    if mean_ref is None:
        return 0.5 * (logvar.exp() + mean.square() - 1.0 - logvar).sum(-1)
    ratio = logvar - logvar_ref
    return 0.5 * (ratio.exp() + (mean - mean_ref).square() * (-logvar_ref).exp() - 1.0 - ratio).sum(-1)


def expected_log_q(logvar: Tensor) -> Tensor:
    """E_q log q(z | x), the negative entropy of q (paper, Eq. 3.18). (L, Dz) -> nats per latent (L,)."""
    return -0.5 * (math.log(2 * math.pi * math.e) + logvar).sum(-1)


def logsnr(mean: Tensor, logvar: Tensor) -> Tensor:
    """VAE logSNR = log(mean mu^2 / mean sigma^2) over a batch (paper, Eq. 16.3). (L, Dz) -> ()."""
    return (mean.square().mean() / logvar.exp().mean()).log()


def text_vae_loss(vae: TextVAE, ids: Tensor, lengths, noise: Tensor, mask: Tensor | None = None, *,
                  beta: float = 1e-3, lambda_mask: float = 0.1, learned_prior: bool = False,
                  posterior: tuple[Tensor, Tensor] | None = None, count: int | None = None,
                  mask_count: int | None = None,
                  plan: Plan | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """The VAE's loss in nats per token, and its terms (detached, before their weights).

    ids (T,); noise (L, Dz) ~ N(0, I); mask (T,) bool, the tokens to hide and predict in a second pass (None:
    no L_mask). With a causal encoder L_mask is prediction from the left.
    learned_prior: False is stage 1 (Eq. 3.16, KL to N(0, I)). True is stage 2 (Eq. 3.18): log p(z) is then
    the prior's matter, in L_FM, and E log q is what is left of the KL.
    posterior: (mean, logvar) already computed, so that L_FM and this loss share one pass and one sample.
    count, mask_count: tokens to divide by, over all workers and micro-steps; default, those given here.
    """
    plan = vae.make_plan(lengths) if plan is None else plan
    count = len(ids) if count is None else count
    mean, logvar = vae.encode(ids, lengths, plan) if posterior is None else posterior
    logits = vae.decode(vae.latents(mean, logvar, noise), lengths, plan)    # (T, V)
    recon = F.cross_entropy(logits, ids, reduction="sum") / count           # -log p(x | z_0)
    rate = (expected_log_q(logvar) if learned_prior else kl(mean, logvar)).sum() / count
    terms = {"recon": recon, "log_q" if learned_prior else "kl": rate}
    loss = recon + beta * rate
    if mask is not None:
        hidden = ids.masked_fill(mask, vae.mask_id)
        z = vae.latents(*vae.encode(hidden, lengths, plan), noise)
        h = vae.decoder(z, plan, vae.rope(plan))[mask]                      # (masked tokens, D)
        mask_count = max(len(h), 1) if mask_count is None else mask_count
        terms["mask"] = F.cross_entropy(vae.decoder.final_layer(h), ids[mask], reduction="sum") / mask_count
        loss = loss + lambda_mask * terms["mask"]
    return loss, {k: v.detach() for k, v in terms.items()} | {"logsnr": logsnr(mean, logvar).detach()}


@torch.no_grad()
def noised_accuracy(vae: TextVAE, ids: Tensor, lengths, noise: Tensor, t: float) -> float:
    """Fraction of tokens decoded right from mean latents noised to z_t = (1 - t) z_0 + t eps (paper, Sec. 5.4
    and Eq. 9.31); t = 0 is plain reconstruction. noise (L, Dz)."""
    plan = vae.make_plan(lengths)
    z = vae.latents(vae.encode(ids, lengths, plan)[0])
    return (vae.decode((1 - t) * z + t * noise, lengths, plan).argmax(-1) == ids).float().mean().item()


# The public release's files.

SAFETENSORS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
               "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
               "U8": torch.uint8, "BOOL": torch.bool}
MAX_HEADER = 16 << 20                      # bytes of a table of tensors: some 100,000 of them


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of one .safetensors file, of its shards (given .index.json), or of a folder with either.

    Files are mapped, not read: memory is paid as pages are touched. The mapping is private: changing a tensor
    never changes the file. ValueError, naming the file, for whatever breaks the format: 8-byte little-endian
    header length, JSON header {name: {dtype, shape, data_offsets}}, then the raw bytes without gaps.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "model.safetensors"
        index = Path(f"{path}.index.json")
        path = index if index.exists() and not path.exists() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected model.safetensors or its shards")
    if path.name.endswith(".index.json"):
        return read_shards(path)
    size = path.stat().st_size
    if size < 8:
        raise ValueError(f"{path}: {size} bytes, too short for a safetensors file; fetch it again")
    with open(path, "rb") as file:
        raw = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    start = 8 + struct.unpack("<Q", raw[:8])[0]
    if start > min(size, MAX_HEADER):
        raise ValueError(f"{path}: header ends at byte {start} of {size}; truncated, or no safetensors file")
    try:
        header = json.loads(raw[8:start].decode())
        header.pop("__metadata__", None)
        entries = sorted((*e["data_offsets"], k, str(e["dtype"]), tuple(e["shape"])) for k, e in header.items())
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: the header is not a table of tensors ({error!r})") from None
    tensors, end = {}, 0
    for first, last, name, dtype, shape in entries:
        if dtype not in SAFETENSORS:
            raise ValueError(f"{path}: {name} has dtype {dtype}; expected one of {', '.join(SAFETENSORS)}")
        if not all(type(n) is int and n >= 0 for n in (first, last, *shape)) or \
                math.prod(n or 1 for n in shape) >= 1 << 48:            # also of a tensor with nothing in it
            raise ValueError(f"{path}: {name} has shape {shape} at {first}..{last}; expected lengths of a tensor")
        items, width = math.prod(shape), SAFETENSORS[dtype].itemsize
        if first != end or last != first + items * width or start + last > size:
            raise ValueError(f"{path}: {name} {dtype} {shape} lies at bytes {first}..{last}; expected "
                             f"{items * width} bytes from {end} within {size - start}: truncated or damaged")
        values = torch.empty(0, dtype=SAFETENSORS[dtype])             # frombuffer refuses an empty tensor
        if items:
            values = torch.frombuffer(raw, dtype=SAFETENSORS[dtype], count=items, offset=start + first)
        tensors[name], end = values.view(shape), last
    if start + end != size:
        raise ValueError(f"{path}: {size - start - end} bytes after the last tensor: damaged")
    return tensors


def read_shards(index: Path) -> dict[str, Tensor]:
    """The tensors that a model.safetensors.index.json spreads over several files beside it."""
    try:
        where = dict(read_json(index, MAX_HEADER)["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index}: no weight_map of tensor names to files ({error!r})") from None
    for shard in where.values():
        if type(shard) is not str or Path(shard).name != shard:
            raise ValueError(f"{index}: shard {shard!r} is not the name of a file beside the index")
    shards = {shard: read_safetensors(index.parent / shard) for shard in sorted(set(where.values()))}
    for name, shard in where.items():
        if name not in shards[shard]:
            raise ValueError(f"{index}: {name} is not in {shard}; index and shards must be of one release")
    return {name: shards[shard][name] for name, shard in where.items()}


def write_safetensors(path: str | Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors as one .safetensors file, whole or not at all."""
    code = {dtype: name for name, dtype in SAFETENSORS.items()}
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))  # wide first: all are aligned
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for x, name in ((tensors[name], name) for name in order):
        header[name] = {"dtype": code[x.dtype], "shape": list(x.shape), "data_offsets": [end, end + x.nbytes]}
        end += x.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(f"{path}.tmp", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            file.write(tensors[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.tmp", path)


def check_settings(settings: dict, like: Callable) -> None:
    """ValueError unless these are of the types that the parameters of `like` have, and no number is beyond 2^31."""
    types = {"int": (int,), "float": (int, float), "bool": (bool,), "tuple[int, ...]": (int,)}
    parameters = inspect.signature(like).parameters
    for name, value in settings.items():
        kind = parameters[name].annotation
        items = value if kind.startswith("tuple") and isinstance(value, list) else [value]
        if not (value is None and kind.endswith(" | None")) and \
                not all(type(x) in types[kind.removesuffix(" | None")] and abs(x) < 1 << 31 for x in items):
            raise ValueError(f"{name} is no {kind} of a model")


def described(make: Callable[..., nn.Module], settings: dict, like: Callable, counts: list[str],
              tensors: dict[str, Tensor], where: str | Path) -> nn.Module:
    """What a config.json describes, on the meta device. ValueError, one line, where that is no model, or one of
    more blocks (`counts`) than there are tensors. like: its parameters say of what type each setting is."""
    try:
        check_settings(settings, like)
        for name, value in settings.items():
            if type(value) is not bool and name != "shifting_factor" and not value > 0:
                raise ValueError(f"{name} is {value}, expected more than 0")
            if name in counts and value > len(tensors):
                raise ValueError(f"{name} is {value!r:.40}, of {len(tensors)} tensors")
        with torch.device("meta"):
            return make(**settings)
    except Exception as error:             # whatever a forged size can raise
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise ValueError(f"{where}: its config.json describes no model ({reason})") from None


def check_names(tensors: dict[str, Tensor], state: dict[str, Tensor], where: str | Path) -> None:
    """ValueError, naming the first mismatch, unless `tensors` have exactly the names and shapes of a state."""
    want = {k: tuple(v.shape) for k, v in state.items()}
    have = {k: tuple(v.shape) for k, v in tensors.items()}
    for name in sorted(want.keys() | have.keys()):
        if want.get(name) != have.get(name):
            raise ValueError(f"{where}: {name} is {have.get(name, 'missing')}, its config.json asks for "
                             f"{want.get(name, 'no such tensor')}; both must come from one release")


RELEASE = {"model_type": "cola_text_vae", "act": "swiglu", "block_causal": True, "post_norm": True,
           "qk_norm": True, "qk_norm_affine": True, "layer_norm_affine": True,
           "layer_norm_type": "layer_norm"}


def load_official(folder: str | Path) -> TextVAE:
    """The released text VAE from its cola_vae folder: config.json and model.safetensors or shards.

    Built on the meta device and given the mapped tensors themselves, but for those of another type than float32:
    the weights are never held twice."""
    path = Path(folder, "config.json")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected the release's cola_vae folder")
    raw = read_json(path)
    for key, value in RELEASE.items():
        if raw.get(key, value) != value:
            raise ValueError(f"{path}: {key} is {raw[key]!r}; only {value!r} is built here")
    keys = inspect.signature(TextVAE).parameters.keys() - {"vae_logsnr", "block_len"}
    missing = sorted((keys | {"block_size"}) - raw.keys())
    if missing:
        raise ValueError(f"{path}: no {', '.join(missing)}; expected the config.json of a cola_vae")
    tensors = read_safetensors(folder)
    settings = {key: raw[key] for key in keys} | {"block_len": raw["block_size"]}
    vae = described(functools.partial(TextVAE, vae_logsnr=None), settings, TextVAE,
                    ["encoder_num_blocks", "decoder_num_blocks"], tensors, folder)
    check_names(tensors, vae.state_dict(), folder)
    vae.load_state_dict({name: x.float() for name, x in tensors.items()}, assign=True)
    return vae


def save_official(vae: TextVAE, folder: str | Path) -> None:
    """Write a cola_vae folder that `load_official` reads back. The format has no fixed logSNR: it becomes a
    constant of the head, logvar rows with zero weight and bias -vae_logsnr."""
    config = {**vae.config, **RELEASE, "block_size": vae.config["block_len"]}
    fixed, _ = config.pop("vae_logsnr"), config.pop("block_len")
    tensors = dict(vae.state_dict())
    if fixed is not None:
        for name, value in (("encoder.final_layer.weight", 0.0), ("encoder.final_layer.bias", -fixed)):
            tensors[name] = tensors[name].clone()
            tensors[name][vae.latent_dim:] = value
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_safetensors(Path(folder, "model.safetensors"), tensors)
    Path(folder, "config.json").write_text(json.dumps(config, indent=2) + "\n")


def robustness(checkpoint: str, files: list[str], count: int = 256, seq_len: int = 128) -> None:
    """Print, and plot in robustness.png, the token accuracy of decoding latents noised to t (paper, Sec. 5.4),
    on `count` texts: stories of another seed's scenes, or windows of seq_len tokens of files."""
    from PIL import Image, ImageDraw

    import data
    import sample
    model, seed = sample.build(sample.read_checkpoint(checkpoint)), data.SEEDS - 1    # no run's own, most likely
    texts = data.TextFiles(files, seed, seq_len) if files else data.GeneratedScenes(seed)
    p = model.text_vae.patch_size
    ids = [model.ids(texts.t2t(k), end=False)[:seq_len // p * p] for k in range(count)]
    total, right, generator = sum(map(len, ids)), Counter(), torch.Generator().manual_seed(0)
    for some in (ids[k:k + 16] for k in range(0, count, 16)):         # logits of a large vocabulary are large
        lengths, flat = [len(i) // p for i in some], torch.tensor([token for i in some for token in i])
        noise = torch.randn(sum(lengths), model.text_vae.latent_dim, generator=generator)
        for t in range(0, 1001, 50):
            right[t] += noised_accuracy(model.text_vae, flat, lengths, noise, t / 1000) * len(flat)
    curve = [(t, n / total) for t, n in right.items()]
    print(f"{count} texts, {total} tokens; share of tokens decoded right from mean latents noised to t")
    print("1000 t  share")
    for t, share in curve:
        print(f"{t:6d}  {share:.3f}  {'#' * round(50 * share)}")
    canvas = Image.new("RGB", (440, 320), "white")
    pen, corner = ImageDraw.Draw(canvas), (40, 20, 420, 280)
    pen.rectangle(corner, outline="gray")
    pen.line([(40 + 380 * t / 1000, 280 - 260 * share) for t, share in curve], fill="#1f77b4", width=2)
    for words, place in (("1", (26, 14)), ("0", (26, 274)), ("0", (38, 286)), ("1000 t", (390, 286)),
                         ("tokens decoded right", (46, 4))):
        pen.text(place, words, fill="black")
    canvas.save("robustness.png")
    print("robustness.png drawn")


def demonstrate() -> None:
    """Train on captions of the running example's form, word by word, then decode them from noised latents."""
    import itertools
    torch.manual_seed(0)
    kinds = itertools.product(("large", "small"), ("red", "blue", "green"), ("circle", "square", "star"))
    things = [f"a {size} {color} {shape}" for size, color, shape in kinds]
    captions = [f"{a} {relation} {b} on a {ground} background" for a, relation, b, ground in
                itertools.product(things, ("above", "below"), things, ("gray", "white"))]
    example = "a large red circle above a small blue square on a gray background"
    captions.remove(example)                                          # it is never trained on
    words = sorted(set(example.split()).union(*(c.split() for c in captions)))
    encode = lambda text: torch.tensor([words.index(w) for w in text.split()])
    encoded = torch.stack([encode(c) for c in captions])              # (captions, 13)

    vae = TextVAE(len(words))
    optimizer = torch.optim.AdamW(vae.parameters(), lr=4e-3, betas=(0.9, 0.95), weight_decay=0.01)
    lengths = [encoded.shape[1]] * 16
    plan = vae.make_plan(lengths)
    for step in range(81):
        ids = encoded[torch.randint(len(encoded), (16,))].flatten()   # (T,)
        noise, mask = torch.randn(len(ids), vae.latent_dim), torch.rand(len(ids)) < 0.15
        loss, terms = text_vae_loss(vae, ids, lengths, noise, mask, plan=plan)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 40 == 0:
            print(f"step {step}: {terms['recon']:.3f} nats per token (expect {math.log(len(words)):.2f} = "
                  f"ln {len(words)} at 0, < 0.1 at 80); masked {terms['mask']:.2f} (guessed: never 0)")
    print(f"logSNR of the posterior: {terms['logsnr']:.3f} (expect {vae.config['vae_logsnr']:.3f}, fixed)")
    with torch.no_grad():
        mean, _ = vae.encode(encode(example), lengths[:1])
        read = vae.decode(vae.latents(mean), lengths[:1]).argmax(-1)
    print(f"read back: {' '.join(words[i] for i in read)!r} (never trained on; expect the running example)")
    curve = [f"{noised_accuracy(vae, ids, lengths, noise, t):.3f} at t = {t}" for t in (0, 0.1, 0.25, 0.5)]
    print(f"tokens right from noised latents: {', '.join(curve)} (expect 1 at 0, > 0.97 at 0.25)")


def main(argv: list[str] | None = None) -> int:
    from sample import Parser
    parser = Parser(prog="text_vae.py", description="a text VAE in seconds, or the robustness of a trained one")
    parser.add_argument("--checkpoint", help="plot how much noise the decoder of this checkpoint bears")
    parser.add_argument("--text", nargs="+", default=[], help="text files to do it on; none: generated stories")
    args = parser.parse_args(argv)
    if args.text and args.checkpoint is None:
        parser.error("--text needs the --checkpoint whose text VAE reads it")
    if args.checkpoint is None:
        demonstrate()
        return 0
    try:
        robustness(args.checkpoint, args.text)
    except (ValueError, OSError) as error:
        print(f"text_vae.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
