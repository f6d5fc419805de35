"""MMDiT: the shared block-causal prior over packed text and image latents.

    v = MMDiT(z_t, t, layout)     predicts eps - z_0 at every position     (paper, Eq. 9.32; blog, section 3)

A transformer with adaLN (Peebles & Xie 2212.09748): every position has its own flow time, clean context
t = 0, and the time alone sets the shift, scale and gate of each sub-layer, so these are computed once per
distinct time of a stream. Text and image latents enter through their own linear maps and share one attention;
`streams` says whether they also share the weights around it (1) or each have their own (2, Esser et al.
2403.03206). What attends to what is the layout's business (masks.py).

The text side has the parameter names and, `as_released`, the arithmetic of the public Cola DLM release:
`load_official` reads it, and text alone gives the same numbers. Else two things are ours: Place, and the time
embedding divided by its root mean square, without which it can blow up at times seldom trained. The image side
(img_*) is the mirror image of the text's.

    block:  x = x + gate * attention((1 + scale) * LN(x) + shift),   then the same with the MLP
            [shift | scale] = ada[.._in](t),   gate = ada[.._out](t)
    rope:   pair i of a head turns by freq_i * (row if i is even else col); text has row = col

Shapes: L packed positions, Lt text and Li image positions among them, U distinct times, E width of their
embedding, D width, nh heads, hd head width, Dz text and Cz image latent channels.
Run: python mmdit.py   (CPU, 5 s)
"""
from __future__ import annotations

import json
import math
from collections.abc import Container
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import masks
from cuda_attention import Plan, attention, make_plan
from flow import TIME_SCALE
from masks import Layout
from text_vae import check_names, described, write_safetensors


@dataclass
class MMDiTConfig:
    text_channels: int = 16            # Dz
    image_channels: int = 32           # Cz; 0 builds the text-only model of the release
    width: int = 128                   # D
    heads: int = 4
    head_dim: int = 32
    layers: int = 4
    expand_ratio: int = 4              # MLP width / D
    emb_dim: int = 128                 # E
    rope_dim: int = 32                 # channels of a head that turn
    streams: int = 1                   # 1 weights shared by text and image, 2 one set each
    as_released: bool = False          # without Place and the norm of the time embedding, which are ours
    qk_bias: bool = False
    norm_eps: float = 1e-5

    def __post_init__(self):
        if self.rope_dim % 2 or not 0 < self.rope_dim <= self.head_dim:
            raise ValueError(f"rope_dim {self.rope_dim}: expected an even number up to {self.head_dim}, "
                             "the head width")
        if self.streams not in (1, 2):
            raise ValueError(f"streams {self.streams}: 1 (shared weights) or 2 (weights per modality)")


Modulation = tuple[Tensor, ...]            # shift, 1 + scale and gate of the attention, then of the MLP; each (U, D)


@dataclass
class Cache:
    """Keys and values of clean context, per layer, and the layout they belong to; and what adaLN makes of times
    that were there before, as every block is integrated over the same."""
    layout: Layout | None = None
    kv: list[tuple[Tensor, Tensor]] = field(default_factory=list)       # per layer, each (Lc, nh, hd)
    times: dict[tuple, dict] = field(default_factory=dict)       # of each "emb", and by layer the Modulations


def timestep_embedding(t: Tensor, width: int = 256) -> Tensor:
    """[sin | cos] of 1000 t at frequencies 10000^(-i / (width/2)). t (U,) in [0, 1] -> (U, width)"""
    freqs = torch.exp(-math.log(10000.0) / (width // 2) * torch.arange(width // 2, device=t.device))
    angle = TIME_SCALE * t.float()[:, None] * freqs
    return torch.cat([angle.sin(), angle.cos()], -1)


def rope_angles(layout: Layout, freqs: Tensor) -> Tensor:
    """exp(i angle) of every pair at every position, complex (L, 1, rope_dim / 2): even pairs turn with the
    row, odd ones with the column."""
    by_row = torch.arange(freqs.numel(), device=freqs.device) % 2 == 0
    angle = torch.where(by_row, layout.row[:, None], layout.col[:, None]) * freqs.float()
    return torch.polar(torch.ones_like(angle), angle)[:, None]


def apply_rope(x: Tensor, rope: Tensor) -> Tensor:
    """Turn the interleaved pairs (0, 1), (2, 3), ... of the first rope_dim channels: one complex product,
    eight times faster on a CPU than cosines and sines. x (L, nh, hd) fp32"""
    turning, rest = x[..., :2 * rope.shape[-1]], x[..., 2 * rope.shape[-1]:]
    turned = torch.view_as_real(torch.view_as_complex(turning.unflatten(-1, (-1, 2))) * rope).flatten(-2)
    return torch.cat([turned, rest], -1) if rest.shape[-1] else turned


def Ada(emb_dim: int, out: int) -> nn.Sequential:
    """An adaLN projection of silu(time embedding); all share the one SiLU in MMDiT.embed. Index 1 of the
    sequence is the release's name for the map."""
    return nn.Sequential(nn.Identity(), nn.Linear(emb_dim, out))


class RoPE(nn.Module):
    """Holds the frequencies under the release's name, rope.rope.freqs."""
    def __init__(self, rope_dim: int):
        super().__init__()
        self.rope = nn.Module()
        self.rope.register_buffer("freqs", 10000.0 ** (-torch.arange(0, rope_dim, 2) / rope_dim))


class Attention(nn.Module):
    def __init__(self, c: MMDiTConfig):
        super().__init__()
        self.shape = (3, c.heads, c.head_dim)
        inner = c.heads * c.head_dim
        self.proj_qkv = nn.Linear(c.width, 3 * inner, bias=c.qk_bias)
        self.norm_q = nn.LayerNorm(c.head_dim, eps=c.norm_eps)
        self.norm_k = nn.LayerNorm(c.head_dim, eps=c.norm_eps)
        self.proj_out = nn.Linear(inner, c.width, bias=c.qk_bias)
        self.rope = RoPE(c.rope_dim)

    def qkv(self, h: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """h (L, D) -> q, k, v, each (L, nh, hd); norms and rotation in fp32."""
        q, k, v = self.proj_qkv(h).unflatten(-1, self.shape).unbind(1)               # (L, nh, hd)
        q, k = (apply_rope(F.layer_norm(x.float(), x.shape[-1:], norm.weight.float(), norm.bias.float(), norm.eps), rope)
                for x, norm in ((q, self.norm_q), (k, self.norm_k)))
        return q.to(v.dtype), k.to(v.dtype), v


class MLP(nn.Module):
    def __init__(self, c: MMDiTConfig):
        super().__init__()
        self.proj_in = nn.Linear(c.width, c.expand_ratio * c.width)
        self.proj_out = nn.Linear(c.expand_ratio * c.width, c.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj_out(F.gelu(self.proj_in(x), approximate="tanh"))


class Block(nn.Module):
    """One layer of one stream, in two halves: attention lies between them and is shared by the streams."""
    def __init__(self, c: MMDiTConfig):
        super().__init__()
        self.width, self.eps = c.width, c.norm_eps
        self.ada = nn.ModuleDict(dict(msa_in=Ada(c.emb_dim, 2 * c.width), msa_out=Ada(c.emb_dim, c.width),
                                      mlp_in=Ada(c.emb_dim, 2 * c.width), mlp_out=Ada(c.emb_dim, c.width)))
        self.msa = Attention(c)
        self.mlp = MLP(c)

    def modulation(self, emb: Tensor) -> Modulation:
        """emb (U, E), silu(time embedding) -> what adaLN does at these times, fp32."""
        made = {name: ada(emb).float() for name, ada in self.ada.items()}
        (shift, scale), (shift_mlp, scale_mlp) = (made[name].chunk(2, -1) for name in ("msa_in", "mlp_in"))
        return shift, 1 + scale, made["msa_out"], shift_mlp, 1 + scale_mlp, made["mlp_out"]

    def modulate(self, x: Tensor, shift: Tensor, scale: Tensor, t_index: Tensor) -> Tensor:
        """scale LN(x) + shift, each of the position's time. (L, D)"""
        return torch.addcmul(shift.index_select(0, t_index), F.layer_norm(x, (self.width,), eps=self.eps),
                             scale.index_select(0, t_index))

    def before(self, x: Tensor, times: Tensor | Modulation, t_index: Tensor,
               rope: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], Modulation]:
        """x (L, D), times as emb (U, E) or what it made -> q, k, v (L, nh, hd) and the modulation"""
        mod = self.modulation(times) if isinstance(times, Tensor) else times
        return self.msa.qkv(self.modulate(x, mod[0], mod[1], t_index), rope), mod

    def after(self, x: Tensor, o: Tensor, mod: Modulation, t_index: Tensor) -> Tensor:
        """x (L, D), o (L, nh, hd) what attention returned -> (L, D)"""
        h = self.msa.proj_out(o.flatten(1))
        x = torch.addcmul(x, h.to(x.dtype), mod[2].index_select(0, t_index))
        h = self.mlp(self.modulate(x, mod[3], mod[4], t_index))
        return torch.addcmul(x, h.to(x.dtype), mod[5].index_select(0, t_index))


class In(nn.Module):
    def __init__(self, channels: int, width: int):
        super().__init__()
        self.proj = nn.Linear(channels, width)


class Place(nn.Module):
    """What RoPE cannot tell: the segment type, and where in its text or image a position lies. RoPE knows
    distances only, and neither an image nor a block of noise has an end to count them from. Ours: the release
    does without."""
    def __init__(self, width: int):
        super().__init__()
        self.proj = nn.Linear(64, width, bias=False)
        self.segment = nn.Embedding(len(masks.SEGMENTS), width)

    def forward(self, layout: Layout) -> Tensor:
        """(L, D)"""
        grid = torch.stack([layout.row, layout.col], -1)[..., None]                  # (L, 2, 1)
        angle = grid * 10.0 ** -torch.linspace(0, 2, 16, device=grid.device)         # wavelengths of 6 to 600
        return self.proj(torch.cat([angle.sin(), angle.cos()], -1).flatten(1)) + self.segment(layout.segment)


class Out(nn.Module):
    def __init__(self, width: int, channels: int):
        super().__init__()
        self.proj = nn.Linear(width, channels)


class TimeEmbedding(nn.Module):
    def __init__(self, emb_dim: int):
        super().__init__()
        self.proj_in = nn.Linear(256, emb_dim)
        self.proj_hid = nn.Linear(emb_dim, emb_dim)
        self.proj_out = nn.Linear(emb_dim, emb_dim)

    def forward(self, t: Tensor) -> Tensor:
        return self.proj_out(F.silu(self.proj_hid(F.silu(self.proj_in(timestep_embedding(t))))))


class Streams:
    """Which of some positions are text and which image, and the parts that pass through weights of their own:
    the two of them, or all positions in one."""
    def __init__(self, segment: Tensor, apart: bool, always: bool = False):
        is_image = segment == masks.I
        self.text, self.image = (~is_image).nonzero()[:, 0], is_image.nonzero()[:, 0]
        self.order = torch.argsort(torch.cat([self.text, self.image]))
        self.apart = apart and (always or len(self.image) > 0)

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """(L, ..) -> its parts."""
        return (x.index_select(0, self.text), x.index_select(0, self.image)) if self.apart else (x,)

    def join(self, parts: tuple[Tensor, ...]) -> Tensor:
        """Parts -> packed order."""
        return torch.cat(parts).index_select(0, self.order) if len(parts) > 1 else parts[0]


class MMDiT(nn.Module):
    def __init__(self, config: MMDiTConfig):
        super().__init__()
        c = self.config = config
        self.emb_in = TimeEmbedding(c.emb_dim)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.image_blocks = nn.ModuleList(Block(c) for _ in range(c.layers if c.streams == 2 else 0))
        for side, channels in (("txt", c.text_channels), ("img", c.image_channels)):
            if channels:
                setattr(self, f"{side}_in", In(channels, c.width))
                setattr(self, f"{side}_out_norm", nn.LayerNorm(c.width, eps=c.norm_eps))
                setattr(self, f"{side}_out_ada", nn.ModuleDict(dict(out_in=Ada(c.emb_dim, 2 * c.width))))
                setattr(self, f"{side}_out", Out(c.width, channels))
        self.place = None if c.as_released else Place(c.width)
        self.both_streams = False          # True: the image's blocks run without an image too (FSDP)
        self.reset_parameters()

    def reset_parameters(self, names: Container[str] | None = None) -> None:
        """Fresh values for the parameters of these names, or for all. Gates start at 1, shifts and scales at 0,
        outputs at 0: a plain pre-norm transformer with v = 0.

        adaLN-Zero starts the gates at 0, which costs a short run most of its steps: after 600 of them those
        of clean context were still near 0.1, and images as good as unread. Matrices inside the blocks start
        at the variance 1 / (3 inputs) of nn.Linear, those that end a residual branch below, by their number.
        """
        zero = "place.segment.", ".ada.", "_out_ada.", "_out.proj."
        for name, p in self.named_parameters():
            if ".norm_" in name or "_norm." in name or names is not None and name not in names:
                continue
            if p.dim() < 2 or any(part in name for part in zero):
                nn.init.constant_(p, 1.0 if name.endswith(("msa_out.1.bias", "mlp_out.1.bias")) else 0.0)
            else:
                inside = "blocks." in name
                branches = 2 * self.config.layers if inside and name.endswith("proj_out.weight") else 1
                nn.init.normal_(p, std=(p.shape[1] * (3 if inside else 1) * branches) ** -0.5)

    def compile_blocks(self) -> None:
        """Have torch.compile fuse what lies on both sides of the attention, for any lengths."""
        for block in (*self.blocks, *self.image_blocks):
            block.before, block.after = (torch.compile(f, dynamic=True) for f in (block.before, block.after))

    def embed(self, t: Tensor) -> Tensor:
        """t (U,) in [0, 1] -> silu(time embedding), what every adaLN projects. (U, E)"""
        emb = self.emb_in(t)
        return F.silu(emb if self.config.as_released else F.rms_norm(emb, emb.shape[-1:]))

    def forward(self, text: Tensor, image: Tensor | None, t: Tensor, t_index: Tensor, layout: Layout,
                plan: Plan, cache: Cache | None = None, commit: bool = False,
                targets: tuple[Tensor, Plan] | None = None, tap: int = -1) -> tuple[Tensor | None, ...]:
        """The velocity at every position, or at the targets alone.

        text (Lt, Dz) and image (Li, Cz): latents of the text and of the image positions, in packed order;
        t (U,) distinct flow times in [0, 1], t_index (L,) the time of each position.
        With a cache, the keys are the cache's and then these positions; the plan is that of the two layouts.
        commit=True appends these positions to the cache and stops there, returning three None: nobody asks
        for the velocity of clean context.
        targets: (n,) positions whose velocity is wanted, and the plan of these queries; the last layer
        computes no others, and the velocities are those of the text and the image positions among them.
        Returns v_text (Lt, Dz), v_image (Li, Cz) or None where there is no image, and the hidden state (L, D)
        after layer `tap`, from 0 and with targets before the last, or None.
        """
        where = Streams(layout.segment, self.config.streams == 2, self.both_streams)
        x = self.txt_in.proj(text)                                                   # (Lt, D)
        x = where.join((x, self.img_in.proj(image))) if len(where.image) else x      # (L, D)
        x = where.split((x + self.place(layout) if self.place else x).float())
        rope = where.split(rope_angles(layout, self.blocks[0].msa.rope.rope.freqs))
        used, t_part = zip(*(i.unique(return_inverse=True) for i in where.split(t_index)))
        stored, hidden = {}, None                              # what earlier calls made of these times
        if cache is not None:
            stored = cache.times.setdefault((tuple(t.tolist()), *(tuple(u.tolist()) for u in used)), stored)
        if "emb" not in stored:
            emb = self.embed(t)                                                      # (U, E)
            stored["emb"] = [emb.index_select(0, u) for u in used]     # each stream projects the times it has
        for layer in range(self.config.layers):
            blocks = [stream[layer] for stream in (self.blocks, self.image_blocks) if len(stream)]
            times = stored.get(layer, stored["emb"])
            qkv, mod = zip(*(b.before(*part) for b, *part in zip(blocks, x, times, t_part, rope)))
            q, k, v = map(where.join, zip(*qkv))                                     # (L, nh, hd) each
            if cache is not None:
                stored[layer] = mod
                if layer < len(cache.kv):
                    k, v = torch.cat([cache.kv[layer][0], k]), torch.cat([cache.kv[layer][1], v])
            if commit:
                cache.kv[layer:layer + 1] = [(k, v)]
            if layer == self.config.layers - 1:
                if commit:
                    cache.layout = layout if cache.layout is None else masks.concat(cache.layout, layout)
                    return None, None, None
                if targets is not None:
                    index, plan = targets
                    q, *rest = (a.index_select(0, index) for a in (q, where.join(x), where.join(t_part)))
                    where = Streams(layout.segment[index], where.apart, self.both_streams)
                    x, t_part = map(where.split, rest)
            o = where.split(attention(q, k, v, plan))                                # (L, nh, hd)
            x = tuple(b.after(*part) for b, *part in zip(blocks, x, o, mod, t_part))
            hidden = where.join(x) if layer == tap else hidden
        x, t_index = where.join(x), where.join(t_part)
        v_text = self.head("txt", where.text, x, stored["emb"][0], t_index)
        v_image = self.head("img", where.image, x, stored["emb"][-1], t_index) if len(where.image) else None
        return v_text, v_image, hidden

    def head(self, side: str, index: Tensor, x: Tensor, emb: Tensor, t_index: Tensor) -> Tensor:
        """x (L, D), of which index (n,) are of this side -> velocity (n, channels) fp32"""
        x, t_index = x.index_select(0, index), t_index[index]
        ada = getattr(self, f"{side}_out_ada")["out_in"](emb)                        # (U, 2 D)
        shift, scale = (a.index_select(0, t_index) for a in ada.chunk(2, -1))
        h = torch.addcmul(shift, getattr(self, f"{side}_out_norm")(x), 1 + scale)
        return getattr(self, f"{side}_out").proj(h).float()


# ---- the public release's files ----------------------------------------------------------------------------

IMAGE_SIDE = ("img_", "image_blocks.")
RELEASE_KEYS = {"txt_in_channels": "text_channels", "txt_dim": "width", "heads": "heads",
                "head_dim": "head_dim", "num_layers": "layers", "expand_ratio": "expand_ratio",
                "emb_dim": "emb_dim", "rope_dim": "rope_dim", "qk_bias": "qk_bias", "norm_eps": "norm_eps"}


def load_official(config: dict, tensors: dict[str, Tensor], image_channels: int = 0,
                  streams: int = 1) -> tuple[MMDiT, int]:
    """The released text-only DiT, from its config.json as a dict and its tensors (text_vae.read_safetensors).

    With image_channels the image side is there too, and with 2 streams its own blocks, all of them fresh.
    Returns the model and its block_len. The released weights are the given tensors themselves where they are float32.
    ValueError, one line, where config and tensors do not fit.
    """
    missing = [key for key in (*RELEASE_KEYS, "block_size") if key not in config]
    if missing:
        raise ValueError(f"cola_dit config: no {', '.join(missing)}; expected the config.json of a cola_dit")
    channels = config["txt_in_channels"]
    if config.get("patch_size", 1) != 1 or config.get("txt_out_channels", channels) != channels:
        raise ValueError("cola_dit config: only patch_size 1 and as many channels out as in are built here")
    settings = {ours: config[theirs] for theirs, ours in RELEASE_KEYS.items()}
    model = described(lambda **released: MMDiT(MMDiTConfig(**released, image_channels=image_channels, streams=streams,
                                                           as_released=True)),
                      settings, MMDiTConfig, ["layers"], tensors, "cola_dit")
    fresh = {name for name in model.state_dict() if name.startswith(IMAGE_SIDE)}
    check_names(tensors, {k: v for k, v in model.state_dict().items() if k not in fresh}, "cola_dit")
    new = {name: torch.empty(v.shape) for name, v in model.state_dict().items() if name in fresh}
    for name, value in new.items():
        if name.endswith("rope.freqs"):
            value.copy_(tensors["blocks.0.msa.rope.rope.freqs"])
        elif ".norm_" in name or "_norm." in name:             # LayerNorm's affine part
            value.fill_(float(name.endswith("weight")))
    model.load_state_dict({name: x.float() for name, x in tensors.items()} | new, assign=True)
    model.reset_parameters(fresh)
    return model, config["block_size"]


def save_official(model: MMDiT, block_len: int, folder: str | Path) -> None:
    """Write the text stream as a cola_dit folder that `load_official` reads back.

    ValueError for a model that is not `as_released`."""
    if not model.config.as_released:
        raise ValueError("the prior has an absolute place at its entrance and a norm in its time embedding, "
                         "which the public format has not; train with --as_released")
    config = {theirs: getattr(model.config, ours) for theirs, ours in RELEASE_KEYS.items()}
    config |= {"model_type": "cola_dit", "block_size": block_len, "patch_size": 1,
               "txt_out_channels": model.config.text_channels}
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_safetensors(Path(folder, "model.safetensors"),
                      {k: v for k, v in model.state_dict().items() if not k.startswith(IMAGE_SIDE)})
    Path(folder, "config.json").write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    torch.manual_seed(0)
    model = MMDiT(MMDiTConfig())
    caption, bl = "a large red circle above a small blue square on a gray background", 16
    layout = masks.pack([masks.Sample(masks.T2I, clean=16, image=(4, 4), noisy=16)], bl)
    plan = make_plan(layout)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters; "
          f"one T2I sample: {len(layout)} positions for {caption!r}")
    text, image = torch.randn(32, 16), torch.randn(16, 32)
    t = torch.tensor([0.0, 0.3, 0.8])                                    # clean, caption, image
    t_index = torch.tensor([0, 0, 2, 1])[layout.segment]
    v_text, v_image, _ = model(text, image, t, t_index, layout, plan)
    print(f"velocities: text {tuple(v_text.shape)}, image {tuple(v_image.shape)}; at the start both are "
          f"{v_text.abs().max():.1f} and {v_image.abs().max():.1f} (expect 0)")
    for p in model.parameters():
        p.data.normal_(std=0.05)
    before = model(text, image, t, t_index, layout, plan)
    text[16:] += 1.0                                         # the noisy caption, which the image may not see
    after = model(text, image, t, t_index, layout, plan)
    print(f"change the noisy caption: image velocity moves by {(after[1] - before[1]).abs().max():.1e} "
          f"(expect 0), its own by {(after[0] - before[0])[16:].abs().max():.1e} (expect more)")
    text[0] += 1.0                                           # a clean latent, which the image sees
    later = model(text, image, t, t_index, layout, plan)
    print(f"change a clean latent: image velocity moves by {(later[1] - after[1]).abs().max():.1e} "
          "(expect more than 0)")

    cache, c = Cache(), layout.segment == masks.C
    clean, picture = layout.select(c), layout.select(layout.segment == masks.I)
    zeros = torch.zeros(16, dtype=torch.long)
    with torch.no_grad():
        model(text[:16], image[:0], t[:1], zeros, clean, make_plan(clean), cache, commit=True)
        plan = make_plan(picture, masks.concat(cache.layout, picture))
        cached = model(text[:0], image, t[2:], zeros, picture, plan, cache)[1]
    print(f"image from the cached caption: {(cached - later[1]).abs().max():.1e} from the whole pass "
          "(expect < 1e-5)")


if __name__ == "__main__":
    main()
