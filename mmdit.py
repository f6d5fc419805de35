"""MMDiT: one block-causal transformer that predicts the velocity of text and image latents.

    v = MMDiT(z_t, t, layout), trained to predict eps - z_0        (paper, Eq. 9.32; blog, Sec. 3)

    block    x = x + gate * attention((1 + scale) * LN(x) + shift),    then the same with an MLP
             shift, scale, gate: linear maps of the embedded time (adaLN, Peebles & Xie 2212.09748)
    RoPE     channels (2i, 2i + 1) of a head turn by freq_i * (row if i is even, else column)

Texts and images lie in one packed sequence; its layout says which position attends to which
(masks.py). Every position has its own flow time, and clean context has t = 0. The stack is a
hybrid, as in the blog: in the first `dual_layers` layers text and image have their own weights and
meet in attention (Esser et al. 2403.03206); in the other layers they share one set.

With as_released, text is computed as in the public Cola DLM release (release.py). Without it, there
is also an absolute position embedding, and an RMS norm of the time embedding, which otherwise can
grow without bound at times that training seldom draws.

Shapes: L packed positions, Lt of text, Li of images; U distinct times; E width of their embedding;
D width; nh heads; hd head width; Dz text, Cz image latent channels.
Run: python mmdit.py   (CPU, 4 s)
"""
from __future__ import annotations

import math
from collections.abc import Container, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import masks
from cuda_attention import Plan, attention, make_plan
from masks import Layout

TIME_SCALE = 1000.0                    # the sinusoids of the time embedding take 1000 t


@dataclass
class MMDiTConfig:
    text_channels: int = 16            # Dz
    image_channels: int = 32           # Cz; 0 builds a text-only model
    width: int = 128                   # D
    heads: int = 4                     # nh
    head_dim: int = 32                 # hd
    layers: int = 4
    dual_layers: int = 1               # first layers with separate weights for text and image
    expand_ratio: int = 4              # MLP width / D
    emb_dim: int = 128                 # E
    rope_dim: int = 32                 # channels of a head that RoPE rotates
    as_released: bool = False          # no position embedding, no norm of the time embedding
    qk_bias: bool = False              # biases in the four projections of attention
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.rope_dim % 2 or not 0 < self.rope_dim <= self.head_dim:
            raise ValueError(f"rope_dim {self.rope_dim}: expected an even number, at most the head "
                             f"width {self.head_dim}")
        if not 0 <= self.dual_layers <= self.layers:
            raise ValueError(f"dual_layers {self.dual_layers}: expected 0 to {self.layers}")
        if not self.image_channels:
            self.dual_layers = 0       # a text-only model has no second set of weights


@dataclass
class Cache:
    """The KV cache: keys and values of each layer, and the layout of their positions."""
    layout: Layout | None = None
    kv: list[tuple[Tensor, Tensor]] = field(default_factory=list)   # per layer, (cached, nh, hd)

    def extend(self, layer: int, k: Tensor, v: Tensor, commit: bool) -> tuple[Tensor, Tensor]:
        """The cached keys and values of a layer, followed by k and v; commit stores the result."""
        if layer < len(self.kv):
            k, v = (torch.cat([old, new]) for old, new in zip(self.kv[layer], (k, v)))
        if commit:
            self.kv[layer:layer + 1] = [(k, v)]
        return k, v

    def add(self, layout: Layout) -> None:
        self.layout = layout if self.layout is None else masks.concat(self.layout, layout)


# ---- Embeddings --------------------------------------------------------------------------------

def timestep_embedding(t: Tensor, width: int = 256) -> Tensor:
    """[sin | cos] of 1000 t at frequencies 10000^(-i / (width / 2)). t (U,) -> (U, width)"""
    half = width // 2
    freqs = torch.exp(-math.log(10000.0) / half * torch.arange(half, device=t.device))
    angle = TIME_SCALE * t.float()[:, None] * freqs                              # (U, width / 2)
    return torch.cat([angle.sin(), angle.cos()], -1)


class TimeEmbedding(nn.Module):
    def __init__(self, c: MMDiTConfig):
        super().__init__()
        self.as_released = c.as_released
        self.proj_in = nn.Linear(256, c.emb_dim)
        self.proj_hid = nn.Linear(c.emb_dim, c.emb_dim)
        self.proj_out = nn.Linear(c.emb_dim, c.emb_dim)

    def forward(self, t: Tensor) -> Tensor:
        """t (U,) in [0, 1] -> (U, E), with the SiLU that the input of every adaLN map has."""
        h = F.silu(self.proj_in(timestep_embedding(t)))
        emb = self.proj_out(F.silu(self.proj_hid(h)))
        return F.silu(emb if self.as_released else F.rms_norm(emb, emb.shape[-1:]))


class PositionEmbedding(nn.Module):
    """Absolute position and segment type. RoPE shows distances only, and from these a position
    cannot tell where in its image or text it lies."""

    def __init__(self, width: int):
        super().__init__()
        self.proj = nn.Linear(64, width, bias=False)
        self.segment = nn.Embedding(len(masks.SEGMENTS), width)

    def forward(self, layout: Layout) -> Tensor:
        """-> (L, D)"""
        place = torch.stack([layout.row, layout.col], -1)[..., None]             # (L, 2, 1)
        # 16 wavelengths, from 2 pi to 200 pi positions: (L, 2, 16)
        angle = place * 10.0 ** -torch.linspace(0, 2, 16, device=place.device)
        sinusoids = torch.cat([angle.sin(), angle.cos()], -1).flatten(1)         # (L, 64)
        return self.proj(sinusoids) + self.segment(layout.segment)


def rope_angles(layout: Layout, rope_dim: int) -> Tensor:
    """exp(i angle) of every channel pair at every position: complex (L, 1, rope_dim / 2)."""
    pair = torch.arange(rope_dim // 2, device=layout.row.device)
    freqs = 10000.0 ** (-2 * pair / rope_dim)
    coordinate = torch.where(pair % 2 == 0, layout.row[:, None], layout.col[:, None])
    angle = coordinate * freqs                                                   # (L, rope_dim / 2)
    return torch.polar(torch.ones_like(angle), angle)[:, None]


def apply_rope(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate the pairs (0, 1), (2, 3), ... of the first rope_dim channels. x (L, nh, hd) fp32

    One complex product is eight times faster on a CPU than products with cosines and sines."""
    rotated, rest = x[..., :2 * rope.shape[-1]], x[..., 2 * rope.shape[-1]:]
    pairs = torch.view_as_complex(rotated.unflatten(-1, (-1, 2)))            # (L, nh, rope_dim / 2)
    rotated = torch.view_as_real(pairs * rope).flatten(-2)
    return torch.cat([rotated, rest], -1) if rest.shape[-1] else rotated


# ---- Block -------------------------------------------------------------------------------------

class QKNorm(nn.LayerNorm):
    """LayerNorm over one head in fp32, also where FSDP holds its weights in bf16."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps)


class Attention(nn.Module):
    """The projections before and after attention."""

    def __init__(self, c: MMDiTConfig):
        super().__init__()
        self.heads, inner = c.heads, c.heads * c.head_dim
        self.proj_qkv = nn.Linear(c.width, 3 * inner, bias=c.qk_bias)
        self.norm_q = QKNorm(c.head_dim, eps=c.norm_eps)
        self.norm_k = QKNorm(c.head_dim, eps=c.norm_eps)
        self.proj_out = nn.Linear(inner, c.width, bias=c.qk_bias)

    def qkv(self, h: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """h (L, D) -> q, k, v, each (L, nh, hd)"""
        q, k, v = self.proj_qkv(h).unflatten(-1, (3, self.heads, -1)).unbind(1)
        q = apply_rope(self.norm_q(q), rope).to(v.dtype)
        k = apply_rope(self.norm_k(k), rope).to(v.dtype)
        return q, k, v


class MLP(nn.Module):
    def __init__(self, c: MMDiTConfig):
        super().__init__()
        self.proj_in = nn.Linear(c.width, c.expand_ratio * c.width)
        self.proj_out = nn.Linear(c.expand_ratio * c.width, c.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj_out(F.gelu(self.proj_in(x), approximate="tanh"))


def modulate(h: Tensor, ada: Tensor, t_index: Tensor) -> Tensor:
    """(1 + scale) * h + shift, of each position's time. h (L, D), ada (U, 2 D) = [shift | scale]"""
    shift, scale = ada.chunk(2, -1)                                              # (U, D) each
    return torch.addcmul(shift.index_select(0, t_index), h, (1 + scale).index_select(0, t_index))


class Block(nn.Module):
    """One layer in two halves: attention lies between them, and both modalities take part in it.

    adaLN maps are applied to emb (U, E), the distinct times, which are far fewer than positions."""

    def __init__(self, c: MMDiTConfig):
        super().__init__()
        self.norm = nn.LayerNorm(c.width, c.norm_eps, elementwise_affine=False)
        self.ada_msa_in = nn.Linear(c.emb_dim, 2 * c.width)
        self.ada_msa_out = nn.Linear(c.emb_dim, c.width)
        self.ada_mlp_in = nn.Linear(c.emb_dim, 2 * c.width)
        self.ada_mlp_out = nn.Linear(c.emb_dim, c.width)
        self.msa = Attention(c)
        self.mlp = MLP(c)

    def pre_attention(self, x: Tensor, emb: Tensor, t_index: Tensor,
                      rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (L, D) -> q, k, v, each (L, nh, hd)"""
        h = modulate(self.norm(x), self.ada_msa_in(emb).float(), t_index)
        return self.msa.qkv(h, rope)

    def post_attention(self, x: Tensor, o: Tensor, emb: Tensor, t_index: Tensor) -> Tensor:
        """x (L, D) and the output of attention o (L, nh, hd) -> (L, D)"""
        gate = self.ada_msa_out(emb).float().index_select(0, t_index)            # (L, D)
        x = torch.addcmul(x, self.msa.proj_out(o.flatten(1)).to(x.dtype), gate)
        h = modulate(self.norm(x), self.ada_mlp_in(emb).float(), t_index)
        gate = self.ada_mlp_out(emb).float().index_select(0, t_index)
        return torch.addcmul(x, self.mlp(h).to(x.dtype), gate)


# ---- Model -------------------------------------------------------------------------------------

class Split:
    """Where text and images lie in a packed sequence. is_image (L,) bool"""

    def __init__(self, is_image: Tensor):
        self.text, self.image = (~is_image).nonzero()[:, 0], is_image.nonzero()[:, 0]
        self.order = torch.cat([self.text, self.image]).argsort()    # (L,) places in [text | image]


def take(x: Tensor, index: Tensor | None) -> Tensor:
    """x at some positions; None means all of them and copies nothing."""
    return x if index is None else x.index_select(0, index)


def join(parts: Sequence[Tensor], order: Tensor) -> Tensor:
    """[text, image] -> packed order (L, ..); a single part has that order already."""
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts)).index_select(0, order)


class MMDiT(nn.Module):
    def __init__(self, config: MMDiTConfig):
        super().__init__()
        c = self.config = config
        self.time_embedding = TimeEmbedding(c)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.image_blocks = nn.ModuleList(Block(c) for _ in range(c.dual_layers))
        self.text_in = nn.Linear(c.text_channels, c.width)
        self.text_norm = nn.LayerNorm(c.width, eps=c.norm_eps)
        self.text_ada = nn.Linear(c.emb_dim, 2 * c.width)
        self.text_out = nn.Linear(c.width, c.text_channels)
        if c.image_channels:
            self.image_in = nn.Linear(c.image_channels, c.width)
            self.image_norm = nn.LayerNorm(c.width, eps=c.norm_eps)
            self.image_ada = nn.Linear(c.emb_dim, 2 * c.width)
            self.image_out = nn.Linear(c.width, c.image_channels)
        self.position = None if c.as_released else PositionEmbedding(c.width)
        self.reset_parameters()

    def reset_parameters(self, names: Container[str] | None = None) -> None:
        """Initialise the parameters of these names, or all of them.

        Gates start at 1, shifts, scales and outputs at 0: a pre-norm transformer that predicts 0.
        Gates of 0 (adaLN-Zero) learn too slowly for a short run: after 600 steps they are near 0.1.
        Matrices of blocks have nn.Linear's variance 1 / (3 inputs); at the end of a residual branch
        it is divided by the number of branches.
        """
        for name, p in self.named_parameters():
            if names is not None and name not in names:
                continue
            if p.dim() == 1:           # biases, and the weights of LayerNorms
                one = name.endswith(("weight", "ada_msa_out.bias", "ada_mlp_out.bias"))
                nn.init.constant_(p, float(one))
            elif "ada" in name or name.startswith(("text_out", "image_out", "position.segment")):
                nn.init.zeros_(p)
            else:
                inside = "blocks." in name
                branches = 2 * self.config.layers if inside and "proj_out" in name else 1
                nn.init.normal_(p, std=(p.shape[1] * (3 if inside else 1) * branches) ** -0.5)

    def streams(self, layer: int, at: Split) -> list[tuple[Block, Tensor | None]]:
        """The blocks of a layer, each with its positions (None: all of them).

        Both blocks of a dual layer run even on no position: all FSDP workers gather the same
        blocks, and the gradient of an unused block is zeros instead of None."""
        if layer < self.config.dual_layers:
            return [(self.blocks[layer], at.text), (self.image_blocks[layer], at.image)]
        return [(self.blocks[layer], None)]

    def forward(self, text: Tensor, image: Tensor | None, t: Tensor, t_index: Tensor,
                layout: Layout, plan: Plan, cache: Cache | None = None, commit: bool = False,
                targets: tuple[Tensor, Plan] | None = None,
                tap: int = -1) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The velocity at every position, or at the targets alone.

        text (Lt, Dz), image (Li, Cz): the latents of each modality, in packed order.
        t (U,): the distinct flow times in [0, 1]; t_index (L,): which of them each position has.
        plan: make_plan(layout); with a cache make_plan(layout, concat(cache.layout, layout)).
        commit: add the keys and values of these positions to the cache, and return three None.
        targets: (n,) positions with a loss, and the plan from them to all positions. The last layer
            computes only these, which saves a sixth of a training step.
        tap: the layer, from 0, whose output is also returned; with targets, any but the last.

        Returns v_text (Lt, Dz), v_image (Li, Cz) or None without an image position, both fp32 and
        of the targets alone where these are given; and the output of layer `tap` (L, D), or None.
        """
        is_image = layout.segment == masks.I
        at = Split(is_image)
        x = self.text_in(text)                                                   # (Lt, D)
        if len(at.image):
            x = join([x, self.image_in(image)], at.order)                        # (L, D)
        x = (x if self.position is None else x + self.position(layout)).float()
        emb, rope = self.time_embedding(t), rope_angles(layout, self.config.rope_dim)
        last, hidden = self.config.layers - 1, None
        for layer in range(self.config.layers):
            parts = [block.pre_attention(take(x, i), emb, take(t_index, i), take(rope, i))
                     for block, i in self.streams(layer, at)]
            q, k, v = (join(part, at.order) for part in zip(*parts))             # (L, nh, hd) each
            if cache is not None:
                k, v = cache.extend(layer, k, v, commit)
            if layer == last and commit:
                cache.add(layout)
                return None, None, None
            if layer == last and targets is not None:      # from here on, L is the targets alone
                index, plan = targets
                q, x, t_index, is_image = (take(a, index) for a in (q, x, t_index, is_image))
                at = Split(is_image)
            o = attention(q, k, v, plan)                                         # (L, nh, hd)
            parts = [block.post_attention(take(x, i), take(o, i), emb, take(t_index, i))
                     for block, i in self.streams(layer, at)]
            x = join(parts, at.order)                                            # (L, D)
            hidden = x if layer == tap else hidden

        h = modulate(self.text_norm(take(x, at.text)), self.text_ada(emb), take(t_index, at.text))
        v_text, v_image = self.text_out(h).float(), None
        if len(at.image):
            h = self.image_norm(take(x, at.image))
            h = modulate(h, self.image_ada(emb), take(t_index, at.image))
            v_image = self.image_out(h).float()
        return v_text, v_image, hidden


if __name__ == "__main__":
    torch.manual_seed(0)
    model = MMDiT(MMDiTConfig())
    # One T2I sample: a clean caption of 16 latents, a 4 x 4 image, the noisy copy of the caption.
    layout = masks.pack([masks.Sample(masks.T2I, clean=16, image=(4, 4), noisy=16)], block_len=16)
    plan, text, image = make_plan(layout), torch.randn(32, 16), torch.randn(16, 32)
    t = torch.tensor([0.0, 0.3, 0.8])                      # of clean text, noisy text, image
    t_index = torch.tensor([0, 0, 2, 1])[layout.segment]   # of the segments P, C, I, N
    with torch.no_grad():
        v_text, v_image, _ = model(text, image, t, t_index, layout, plan)
        print(f"untrained velocities {tuple(v_text.shape)} and {tuple(v_image.shape)}: at most "
              f"{max(v_text.abs().max(), v_image.abs().max()):.1f} (expect 0.0)")
        for p in model.parameters():
            p.normal_(std=0.05)
        v_image = model(text, image, t, t_index, layout, plan)[1]
        for name, changed in (("noisy", slice(16, 32)), ("clean", slice(0, 16))):
            text[changed] += 1.0
            moved = (model(text, image, t, t_index, layout, plan)[1] - v_image).abs().max()
            print(f"changing the {name} caption moves the image velocity by {moved:.1e} (expect "
                  f"{'0: the image does not see it' if name == 'noisy' else 'more than 0'})")
