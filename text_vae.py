"""Text VAE: tokens to continuous latents and back, one latent for every `patch_size` tokens.

    q(z | x) = N(mu(x), diag sigma(x)^2),    z_0 = mu + sigma eps               (paper, Eq. 16.1)
    stage 1:  -E_q log p(x | z_0) + beta KL(q || N(0, I)) + lambda_mask L_mask  (paper, Eq. 3.16)
    stage 2:  -E_q log p(x | z_0) + beta E_q log q        + lambda_mask L_mask  (paper, Eq. 3.18)
    logSNR = log(mean mu^2 / mean sigma^2)                                      (paper, Eq. 16.2)

Encoder and decoder are causal transformers, because the prior writes latents from left to right.
A LayerNorm makes mean mu^2 = 1, so a fixed logSNR gives a constant sigma: this noise teaches the
decoder to tolerate the prior's errors. Names and arithmetic are those of the public release.

Shapes: T tokens of all texts, L = T / patch_size latents, D width, Dz latent channels, V vocabulary
size, nh heads, hd head width; plan: which latent sees which (cuda_attention.make_plan).
Run: python text_vae.py   (CPU, 5 s)
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import masks
from cuda_attention import Plan, attention, make_plan


@dataclass
class TextVAEConfig:
    vocab_size: int                    # V
    dim: int = 96                      # D
    ffn_dim: int = 384                 # gate and up projection of SwiGLU together
    num_heads: int = 3                 # nh
    encoder_num_blocks: int = 2
    decoder_num_blocks: int = 2
    latent_dim: int = 16               # Dz
    patch_size: int = 1                # tokens per latent
    block_len: int = 1                 # latents that see each other; 1 is causal, as in the paper
    logsnr: float | None = 2.5         # of Eq. 16.2; None learns sigma for every coordinate
    rope_theta: float = 500000.0
    layer_norm_eps: float = 1e-6
    qk_bias: bool = False
    bias: bool = True
    encoder_last_ln: bool = True       # the LayerNorm of mu
    scaling_factor: float = 1.0        # of the latents that prior and decoder take
    shifting_factor: float = 0.0

    def __post_init__(self) -> None:
        if self.dim % (2 * self.num_heads):
            raise ValueError(f"text VAE width {self.dim}: expected a multiple of 2 x num_heads")
        if self.logsnr is not None and not self.encoder_last_ln:
            raise ValueError("a fixed logsnr needs encoder_last_ln, which fixes the mean's power")


def rope_table(position: Tensor, c: TextVAEConfig) -> tuple[Tensor, Tensor]:
    """cos, sin of position * theta^(-2i / hd), i = 0 .. hd/2 - 1. (L,) -> two fp32 (L, 1, hd/2)"""
    head_dim = c.dim // c.num_heads
    two_i = torch.arange(0, head_dim, 2, device=position.device, dtype=torch.float32)
    angle = position[:, None, None].float() * c.rope_theta ** (-two_i / head_dim)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """RoPE that pairs channel i with channel i + hd/2. x (L, nh, hd) -> the same shape"""
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)                                         # (L, nh, hd/2) each
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Block(nn.Module):
    """Transformer block of the release, with QK LayerNorm and SwiGLU."""
    def __init__(self, c: TextVAEConfig):
        super().__init__()
        self.head_shape = c.num_heads, -1
        self.qkv_proj = nn.Linear(c.dim, 3 * c.dim, bias=c.qk_bias)
        self.q_norm = nn.LayerNorm(c.dim, c.layer_norm_eps)           # over all heads together
        self.k_norm = nn.LayerNorm(c.dim, c.layer_norm_eps)
        self.attn_out_proj = nn.Linear(c.dim, c.dim, bias=c.bias)
        self.norm_attn = nn.LayerNorm(c.dim, c.layer_norm_eps)
        self.ffn_proj = nn.Linear(c.dim, c.ffn_dim, bias=c.bias)
        self.ffn_out = nn.Linear(c.ffn_dim // 2, c.dim, bias=c.bias)
        self.norm_ffn = nn.LayerNorm(c.dim, c.layer_norm_eps)

    def forward(self, x: Tensor, plan: Plan, rope: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = self.qkv_proj(x).chunk(3, dim=-1)                   # (L, D) each
        q = rotate(self.q_norm(q).unflatten(1, self.head_shape), rope).to(v.dtype)   # (L, nh, hd)
        k = rotate(self.k_norm(k).unflatten(1, self.head_shape), rope).to(v.dtype)
        o = attention(q, k, v.unflatten(1, self.head_shape), plan).flatten(1)        # (L, D)
        x = self.norm_attn(x) + self.attn_out_proj(o)   # as released: normalizes x, not the branch
        up, gate = self.ffn_proj(x).chunk(2, dim=-1)                  # (L, ffn_dim / 2) each
        return x + self.norm_ffn(self.ffn_out(F.silu(gate) * up))     # (L, D)


class Encoder(nn.Module):
    def __init__(self, c: TextVAEConfig):
        super().__init__()
        self.config = c
        self.wte = nn.Embedding(c.vocab_size + 1, c.dim)              # row V is the mask token
        self.patch_embedder = nn.Conv1d(c.dim, c.dim, c.patch_size, stride=c.patch_size)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.encoder_num_blocks))
        self.final_layer = nn.Linear(c.dim, 2 * c.latent_dim)

    def forward(self, ids: Tensor, plan: Plan) -> Tensor:
        """ids (T,) -> mean | logvar (L, 2 Dz)"""
        kernel = self.patch_embedder.weight.transpose(1, 2).flatten(1)           # (D, patch * D)
        x = self.wte(ids).view(len(plan.q), kernel.shape[1])          # (L, patch * D)
        x = F.linear(x, kernel, self.patch_embedder.bias)             # the convolution, (L, D)
        rope = rope_table(plan.q.col, self.config)
        for block in self.blocks:
            x = block(x, plan, rope)
        return self.final_layer(x)


class Decoder(nn.Module):
    def __init__(self, c: TextVAEConfig):
        super().__init__()
        self.config = c
        self.in_layer = nn.Linear(c.latent_dim, c.dim)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.decoder_num_blocks))
        self.unpatch_layer = nn.Linear(c.dim, c.patch_size * c.dim)
        self.final_norm = nn.LayerNorm(c.dim, c.layer_norm_eps)
        self.final_layer = nn.Linear(c.dim, c.vocab_size)

    def forward(self, z: Tensor, plan: Plan) -> Tensor:
        """All but final_layer: L_mask needs logits at a few tokens only. (L, Dz) -> (T, D)"""
        x = self.in_layer(z)                                          # (L, D)
        rope = rope_table(plan.q.col, self.config)
        for block in self.blocks:
            x = block(x, plan, rope)
        x = self.unpatch_layer(x).unflatten(1, (x.shape[1], -1))      # (L, D, patch)
        return self.final_norm(x.transpose(1, 2).flatten(0, 1))       # (T, D)

# ---- The VAE -----------------------------------------------------------------------------------

class TextVAE(nn.Module):
    def __init__(self, config: TextVAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        for name, p in self.named_parameters():
            if p.dim() > 1:                                           # as in the release's config
                nn.init.trunc_normal_(p, std=0.02, a=-0.06, b=0.06)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def make_plan(self, lengths: list[int]) -> Plan:
        """Which latent sees which, as clean text; lengths: the number of latents of each text."""
        texts = [masks.Sample(masks.T2T, clean=int(n)) for n in lengths]
        return make_plan(masks.pack(texts, self.config.block_len, self.encoder.wte.weight.device))

    def encode(self, ids: Tensor, lengths: list[int], plan=None) -> tuple[Tensor, Tensor]:
        """The posterior of Eq. 16.1, not yet scaled. ids (T,) -> mean, logvar (L, Dz) fp32
        plan: of these lengths, if it was made before."""
        c, plan = self.config, plan or self.make_plan(lengths)
        if len(ids) != len(plan.q) * c.patch_size:
            raise ValueError(f"got {len(ids)} tokens for {len(plan.q)} latents of {c.patch_size}")
        if not len(ids):               # a batch of images whose captions are all dropped
            return torch.zeros(2, 0, c.latent_dim, device=ids.device).unbind()
        mean, logvar = self.encoder(ids, plan).float().chunk(2, dim=-1)        # (L, Dz) each
        if c.encoder_last_ln:
            mean = F.layer_norm(mean, (c.latent_dim,), eps=c.layer_norm_eps)
        if c.logsnr is not None:
            logvar = torch.full_like(mean, -c.logsnr)                 # mean mu^2 is 1
        return mean, logvar.clamp(-30.0, 20.0)

    def scale_latents(self, mean: Tensor, logvar=None, noise=None) -> Tensor:
        """The latents that prior and decoder take; without noise, from the mean. All (L, Dz)."""
        z = mean if noise is None else mean + (0.5 * logvar).exp() * noise
        return (z - self.config.shifting_factor) * self.config.scaling_factor

    def decode(self, z: Tensor, lengths: list[int], plan=None) -> Tensor:
        """Scaled latents z (L, Dz) -> logits of every token (T, V)"""
        return self.decoder.final_layer(self.decoder(z, plan or self.make_plan(lengths)))

# ---- Losses ------------------------------------------------------------------------------------

def kl(mean: Tensor, logvar: Tensor, mean_ref=0.0, logvar_ref=torch.zeros(())) -> Tensor:
    """KL(q || q_ref) of diagonal Gaussians; by default q_ref = N(0, I). (L, Dz) -> nats (L,)"""
    log_ratio = logvar - logvar_ref
    distance = (mean - mean_ref).square() * (-logvar_ref).exp()
    return 0.5 * (log_ratio.exp() + distance - 1.0 - log_ratio).sum(-1)


def expected_log_q(logvar: Tensor) -> Tensor:
    """E_q log q(z | x), the negative entropy of q (paper, Eq. 3.18). (L, Dz) -> nats (L,)"""
    return -0.5 * (math.log(2 * math.pi * math.e) + logvar).sum(-1)


def logsnr(mean: Tensor, logvar: Tensor) -> Tensor:
    """log(mean mu^2 / mean sigma^2) over a batch (paper, Eq. 16.3). (L, Dz) -> ()"""
    return (mean.square().mean() / logvar.exp().mean()).log()


def text_vae_loss(vae: TextVAE, ids: Tensor, lengths: list[int], noise: Tensor,
                  mask: Tensor | None = None, *, beta=1e-3, lambda_mask=0.1, learned_prior=False,
                  posterior: tuple[Tensor, Tensor] | None = None, count: int | None = None,
                  mask_count: int | None = None, plan: Plan | None = None) -> tuple[Tensor, dict]:
    """The loss in nats per token, and its terms, detached and unweighted.

    ids (T,); noise (L, Dz) ~ N(0, I); mask (T,): tokens that L_mask hides and predicts, if any.
    learned_prior: Eq. 3.18 instead of 3.16; the prior's own loss stands for -E_q log p(z).
    posterior, plan: (mean, logvar) of these ids and the plan of these lengths, if made before.
    count, mask_count: tokens of all workers and micro-steps to divide by; default, those given."""
    plan, count = plan or vae.make_plan(lengths), count or len(ids)
    mean, logvar = posterior or vae.encode(ids, lengths, plan)
    logits = vae.decode(vae.scale_latents(mean, logvar, noise), lengths, plan)   # (T, V)
    recon = F.cross_entropy(logits, ids, reduction="sum") / count     # -log p(x | z_0)
    rate = (expected_log_q(logvar) if learned_prior else kl(mean, logvar)).sum() / count
    terms = {"recon": recon, "log_q" if learned_prior else "kl": rate}
    loss = recon + beta * rate
    if mask is not None:
        hidden = ids.masked_fill(mask, vae.config.vocab_size)         # the mask token
        z = vae.scale_latents(*vae.encode(hidden, lengths, plan), noise)         # (L, Dz)
        logits = vae.decoder.final_layer(vae.decoder(z, plan)[mask])  # (masked tokens, V)
        total = F.cross_entropy(logits, ids[mask], reduction="sum")
        terms["mask"] = total / (mask_count or max(len(logits), 1))
        loss = loss + lambda_mask * terms["mask"]
    share = len(ids) / count                              # a step sums the terms of its batches
    terms["logsnr"] = share * logsnr(mean, logvar) if share else mean.new_zeros(())
    return loss, {name: term.detach() for name, term in terms.items()}


@torch.no_grad()
def noised_accuracy(vae: TextVAE, ids: Tensor, lengths: list[int], eps: Tensor, t: float) -> float:
    """Fraction of tokens decoded right from z_t = (1 - t) mu + t eps (paper, Sec. 5.4)."""
    z = vae.scale_latents(vae.encode(ids, lengths)[0])
    read = vae.decode((1 - t) * z + t * eps, lengths).argmax(-1)      # (T,)
    return (read == ids).float().mean().item()


if __name__ == "__main__":
    torch.manual_seed(0)
    caption = "a large red circle above a small blue square on a gray background".split()
    words = sorted(set(caption))
    vae = TextVAE(TextVAEConfig(len(words)))
    optimizer = torch.optim.AdamW(vae.parameters(), lr=4e-3)
    for _ in range(100):                                  # on 16 random texts of 13 words each
        ids, noise = torch.randint(len(words), (208,)), torch.randn(208, 16)
        loss, _ = text_vae_loss(vae, ids, [13] * 16, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    ids = torch.tensor([words.index(word) for word in caption])
    for t, expected in ((0, "1"), (0.25, "more than 0.9"), (0.5, "more than 0.7")):
        share = noised_accuracy(vae, ids, [13], torch.randn(13, 16), t)
        print(f"noise t = {t}: {share:.2f} of the words are decoded right (expect {expected})")
