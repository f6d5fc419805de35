"""MMDiT: one block-causal transformer that predicts the velocity of text and image latents.

    v = MMDiT(z_t, t, layout), trained to predict eps - z_0        (paper, Eq. 9.32; blog, Sec. 3)
    block    x = x + gate * attention((1 + scale) * LN(x) + shift),    then the same with an MLP
             shift, scale, gate: linear maps of the embedded time (adaLN, Peebles & Xie 2212.09748)
    RoPE     channels (2i, 2i + 1) of a head turn by freq_i * (row if i is even, else column);
             text has row = column, so plain 1-D RoPE

Texts and images lie in one packed sequence (masks.py); each position has its own flow time, clean
context t = 0. In the first `dual_layers` layers, text and image have their own weights and meet in
attention (Esser et al. 2403.03206); in the other layers they share one set, as in the blog.

Shapes: L packed positions, Lt of text, Li of images; U distinct times; E width of their embedding;
D width; nh heads; hd head width; Dz text, Cz image latent channels.    Run: python mmdit.py
"""
import math
from collections import OrderedDict
from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import masks
from cuda_attention import Plan, attention, make_plan


@dataclass
class MMDiTConfig:
    text_channels: int = 16            # Dz
    image_channels: int = 32           # Cz; 0 builds a text-only model
    width: int = 128                   # D
    heads: int = 8                     # nh
    head_dim: int = 16                 # hd
    layers: int = 4
    dual_layers: int = 4               # first layers with separate weights for text and image
    expand_ratio: int = 4              # MLP width / D
    emb_dim: int = 128                 # E
    rope_dim: int = 16                 # channels of a head that RoPE rotates
    as_released: bool = False          # release: no PositionEmbedding, no RMS norm, tanh GELU
    qk_bias: bool = False              # biases in attention's projections (the release's name)
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.rope_dim % 2 or not 0 < self.rope_dim <= self.head_dim:
            raise ValueError(f"rope_dim {self.rope_dim}: expected an even number <= head_dim")
        # At most all layers; a text-only model has no second set of weights.
        self.dual_layers = min(self.dual_layers, self.layers) if self.image_channels else 0


@dataclass
class Cache:
    """Keys and values of each layer, and the layout of their positions."""
    layout: masks.Layout | None = None
    kv: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)   # layer: (cached, nh, hd)

    def extend(self, layer: int, k: Tensor, v: Tensor, commit: bool) -> tuple[Tensor, Tensor]:
        """The cached keys and values of a layer, followed by k and v; commit stores the result."""
        if layer in self.kv:
            k, v = (torch.cat([old, new]) for old, new in zip(self.kv[layer], (k, v)))
        if commit:
            self.kv[layer] = k, v
        return k, v

# ---- Embeddings --------------------------------------------------------------------------------

def timestep_embedding(t: Tensor) -> Tensor:
    """[sin | cos] of 1000 t at frequencies 10000^(-i / 128), i = 0 .. 127. t (U,) -> (U, 256)"""
    freqs = torch.exp(-math.log(10000.0) / 128 * torch.arange(128, device=t.device))
    angle = 1000.0 * t.float()[:, None] * freqs                                  # (U, 128)
    return torch.cat([angle.sin(), angle.cos()], -1)


class PositionEmbedding(nn.Module):
    """Absolute position, turn and segment: RoPE shows only the distances inside a text or image."""
    def __init__(self, width: int):
        super().__init__()
        self.proj = nn.Linear(64, width, bias=False)
        self.turn = nn.Linear(32, width, bias=False)
        self.segment = nn.Embedding(len(masks.SEGMENTS), width)

    def forward(self, layout: masks.Layout) -> Tensor:
        place = torch.stack([layout.row, layout.col], -1)[..., None]             # (L, 2, 1)
        # A small grid of latents has few rows and columns: their sinusoids must differ more.
        is_image = masks.is_image(layout.segment)
        place = torch.where(is_image[:, None, None], 8 * place, place)
        angle = place * 10.0 ** -torch.linspace(0, 2, 16, device=place.device)   # (L, 2, 16)
        sinusoids = torch.cat([angle.sin(), angle.cos()], -1).flatten(1)         # (L, 64)
        in_turn = is_image | (layout.segment == masks.P)
        turn = torch.where(in_turn, layout.block, 0)[:, None]                    # (L, 1)
        angle = turn * 10.0 ** -torch.linspace(0, 1.5, 16, device=turn.device)   # (L, 16)
        turns = torch.cat([angle.sin(), 1 - angle.cos()], -1)                    # (L, 32), 0 at 0
        return self.proj(sinusoids) + self.turn(turns) + self.segment(layout.segment)      # (L, D)


def rope_rotations(layout: masks.Layout, rope_dim: int) -> Tensor:
    """exp(i angle) of every channel pair at every position: complex (L, 1, rope_dim / 2)."""
    pair = torch.arange(rope_dim // 2, device=layout.row.device)
    freqs = 10000.0 ** (-2 * pair / rope_dim)
    coordinate = torch.where(pair % 2 == 0, layout.row[:, None], layout.col[:, None])
    angle = coordinate * freqs                                                   # (L, rope_dim / 2)
    return torch.polar(torch.ones_like(angle), angle)[:, None]


def apply_rope(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate the pairs (0, 1), (2, 3), ... of the first rope_dim channels. x (L, nh, hd) fp32"""
    rotated, rest = x[..., :2 * rope.shape[-1]], x[..., 2 * rope.shape[-1]:]
    # A complex product is eight times faster on a CPU than products with cosines and sines.
    pairs = torch.view_as_complex(rotated.unflatten(-1, (-1, 2)))            # (L, nh, rope_dim / 2)
    rotated = torch.view_as_real(pairs * rope).flatten(-2)
    return torch.cat([rotated, rest], -1) if rest.shape[-1] else rotated

# ---- Block -------------------------------------------------------------------------------------

class QKNorm(nn.LayerNorm):
    """LayerNorm over one head in fp32, also where FSDP holds its weights in bf16."""
    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps)


def modulate(h: Tensor, ada: Tensor, t_index: Tensor) -> Tensor:
    """(1 + scale) * h + shift, of each position's time. h (L, D), ada (U, 2 D) = [shift | scale]"""
    shift, scale = ada.float().chunk(2, -1)                                      # (U, D) each
    return torch.addcmul(shift.index_select(0, t_index), h, (1 + scale).index_select(0, t_index))


class Block(nn.Module):
    def __init__(self, c: MMDiTConfig):
        super().__init__()
        self.norm = nn.LayerNorm(c.width, c.norm_eps, elementwise_affine=False)
        self.ada_msa_in = nn.Linear(c.emb_dim, 2 * c.width)
        self.ada_msa_out = nn.Linear(c.emb_dim, c.width)
        self.ada_mlp_in = nn.Linear(c.emb_dim, 2 * c.width)
        self.ada_mlp_out = nn.Linear(c.emb_dim, c.width)
        self.head_dim = c.head_dim
        inner, hidden = c.heads * c.head_dim, c.expand_ratio * c.width           # nh hd, MLP width
        self.msa = nn.ModuleDict(dict(
            proj_qkv=nn.Linear(c.width, 3 * inner, bias=c.qk_bias),
            norm_q=QKNorm(c.head_dim, eps=c.norm_eps),
            norm_k=QKNorm(c.head_dim, eps=c.norm_eps),
            proj_out=nn.Linear(inner, c.width, bias=c.qk_bias)))
        self.mlp = nn.Sequential(OrderedDict(
            proj_in=nn.Linear(c.width, hidden),
            gelu=nn.GELU("tanh" if c.as_released else "none"),
            proj_out=nn.Linear(hidden, c.width)))

    def pre_attention(self, x: Tensor, emb: Tensor, t_index: Tensor, rope: Tensor) -> tuple:
        """x (L, D) -> q, k, v, each (L, nh, hd)"""
        h = modulate(self.norm(x), self.ada_msa_in(emb), t_index)
        q, k, v = self.msa.proj_qkv(h).unflatten(-1, (3, -1, self.head_dim)).unbind(1)
        q = apply_rope(self.msa.norm_q(q), rope).to(v.dtype)
        k = apply_rope(self.msa.norm_k(k), rope).to(v.dtype)
        return q, k, v

    def post_attention(self, x: Tensor, o: Tensor, emb: Tensor, t_index: Tensor) -> Tensor:
        """x (L, D) and the output of attention o (L, nh, hd) -> (L, D)"""
        gate = self.ada_msa_out(emb).float().index_select(0, t_index)            # (L, D)
        x = torch.addcmul(x, self.msa.proj_out(o.flatten(1)).to(x.dtype), gate)
        h = modulate(self.norm(x), self.ada_mlp_in(emb), t_index)
        gate = self.ada_mlp_out(emb).float().index_select(0, t_index)
        return torch.addcmul(x, self.mlp(h).to(x.dtype), gate)

# ---- Model -------------------------------------------------------------------------------------

def split(is_image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Positions of text, positions of images, and the place of each position in [text | image]."""
    text, image = (~is_image).nonzero()[:, 0], is_image.nonzero()[:, 0]
    return text, image, torch.cat([text, image]).argsort()


def take(x: Tensor, index: Tensor | None) -> Tensor:
    """x at some positions; None takes all of them and copies nothing."""
    return x if index is None else x.index_select(0, index)


def join(parts: list[Tensor], order: Tensor) -> Tensor:
    """[text, image] -> packed order (L, ..); a single part is in that order already."""
    return parts[0] if len(parts) == 1 else torch.cat(parts).index_select(0, order)


class MMDiT(nn.Module):
    def __init__(self, config: MMDiTConfig):
        super().__init__()
        c = self.config = config
        self.time_embedding = nn.Sequential(OrderedDict(
            proj_in=nn.Linear(256, c.emb_dim), silu_in=nn.SiLU(),
            proj_hid=nn.Linear(c.emb_dim, c.emb_dim), silu_hid=nn.SiLU(),
            proj_out=nn.Linear(c.emb_dim, c.emb_dim)))
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

    def reset_parameters(self, names: set[str] | None = None) -> None:
        """Initialize the parameters of these names, or all of them, so that v = 0.

        Gates start at 1; from 0 (adaLN-Zero) they would grow slowly. Matrices of blocks have
        variance 1 / (3 inputs), divided by 2 x layers where a branch ends. Places and turns begin
        with three times the usual weights, so that they stand out from the content of a latent."""
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
                gain = 3 if name.startswith("position.") else 1
                branches = 2 * self.config.layers if inside and "proj_out" in name else 1
                std = gain * (p.shape[1] * (3 if inside else 1) * branches) ** -0.5
                nn.init.normal_(p, std=std)

    def streams(self, layer: int, at_text: Tensor, at_image: Tensor) -> list[tuple]:
        """The blocks of a layer, each with its positions (None: all of them)."""
        # Both run even without positions: all FSDP workers must gather the same blocks.
        if layer < self.config.dual_layers:
            return [(self.blocks[layer], at_text), (self.image_blocks[layer], at_image)]
        return [(self.blocks[layer], None)]

    def forward(self, text: Tensor, image: Tensor | None, t: Tensor, t_index: Tensor,
                layout: masks.Layout, plan: Plan, cache: Cache | None = None, commit=False,
                targets: tuple[Tensor, Plan] | None = None, tap=-1) -> tuple[Tensor | None, ...]:
        """-> v_text (Lt, Dz), v_image (Li, Cz; None without images), output (L, D) of layer `tap`.

        text (Lt, Dz), image (Li, Cz): the latents of each modality, in packed order.
        t (U,): the distinct flow times in [0, 1]; t_index (L,): which of them each position has.
        plan: make_plan(layout); with a cache make_plan(layout, concat(cache.layout, layout)).
        commit: add these positions to the cache, and return three None.
        targets: (n,) positions with a loss, and the plan from them to all; the last layer and the
            velocities are computed at these positions only.
        tap: the layer whose output to return, -1 for none; with targets, one before the last."""
        is_image = masks.is_image(layout.segment)
        at_text, at_image, order = split(is_image)
        x = self.text_in(text)                                                   # (Lt, D)
        if len(at_image):
            x = join([x, self.image_in(image)], order)                           # (L, D)
        emb = self.time_embedding(timestep_embedding(t))                         # (U, E)
        if not self.config.as_released:
            x = x + self.position(layout)
            emb = F.rms_norm(emb, emb.shape[-1:])          # bounds emb at rare times
        x, emb = x.float(), F.silu(emb)    # the residual stream is fp32; adaLN maps take silu(emb)
        rope = rope_rotations(layout, self.config.rope_dim)                   # (L, 1, rope_dim / 2)
        last = self.config.layers - 1
        hidden = None
        for layer in range(self.config.layers):
            parts = [block.pre_attention(take(x, i), emb, take(t_index, i), take(rope, i))
                     for block, i in self.streams(layer, at_text, at_image)]
            q, k, v = (join(part, order) for part in zip(*parts))                # (L, nh, hd) each
            if cache is not None:
                k, v = cache.extend(layer, k, v, commit)
            if layer == last and commit:
                cache.layout = masks.concat(cache.layout, layout) if cache.layout else layout
                return None, None, None
            if layer == last and targets is not None:      # from here on, L is the targets alone
                index, plan = targets
                q, x, t_index, is_image = (take(a, index) for a in (q, x, t_index, is_image))
                at_text, at_image, order = split(is_image)
            o = attention(q, k, v, plan)                                         # (L, nh, hd)
            parts = [block.post_attention(take(x, i), take(o, i), emb, take(t_index, i))
                     for block, i in self.streams(layer, at_text, at_image)]
            x = join(parts, order)                                               # (L, D)
            hidden = x if layer == tap else hidden

        h = modulate(self.text_norm(take(x, at_text)), self.text_ada(emb), take(t_index, at_text))
        v_text, v_image = self.text_out(h).float(), None
        if len(at_image):
            h = self.image_norm(take(x, at_image))
            h = modulate(h, self.image_ada(emb), take(t_index, at_image))
            v_image = self.image_out(h).float()
        return v_text, v_image, hidden


if __name__ == "__main__":
    torch.manual_seed(0)
    layout = masks.pack([masks.Sample(masks.T2I, clean=16, image=(4, 4), noisy=16)], block_len=16)
    t = torch.tensor([0.0, 0.3, 0.8])                      # of clean text, noisy text, image
    t_index = torch.tensor([0, 0, 2, 1])[layout.segment]   # of the segments P, C, I, N
    model = MMDiT(MMDiTConfig())
    clean, noisy = torch.randn(2, 16, 16)
    inputs = torch.randn(16, 32), t, t_index, layout, make_plan(layout)
    v = model(torch.cat([clean, noisy]), *inputs)[1]
    print(f"untrained: image velocity {v.abs().max():.1f} (expect 0.0)")
    for p in model.parameters():
        p.data.normal_(std=0.05)
    v = model(torch.cat([clean, noisy]), *inputs)[1]
    moved = model(torch.cat([clean, noisy + 1]), *inputs)[1] - v
    print(f"noisy caption + 1: moved by {moved.abs().max():.1e} (expect 0: not visible to it)")
    moved = model(torch.cat([clean + 1, noisy]), *inputs)[1] - v
    print(f"clean caption + 1: moved by {moved.abs().max():.1e} (expect more than 0)")
