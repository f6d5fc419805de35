"""Likelihood: log p of a text under the whole system, by the density of the flow (paper, Sec. 10).

    log p(z_0) = log N(z_1; 0, I) + integral of div v dt,  t from 0 to 1     (Eq. 10.23, 10.24)
    div v = E[e^T (dv/dz) e],  E[e e^T] = I              Hutchinson          (Eq. 10.25)
    log w = log p(x | z) + log p(z) - log q(z | x),  z ~ q(z | x)            (Eq. 10.8)
    ELBO = mean of log w,  IWAE = log of the mean of w   over K draws        (Eq. 10.9)
    log p(response | prefix) = log p(prefix, response) - log p(prefix)       (Eq. 10.12 - 10.14)
    perplexity = exp(-sum of log p / sum of tokens)                          (Eq. 10.7, 10.10)

All in nats. A low training loss does not imply a high log p (Sec. 5.1, 9.4).
Shapes: K draws, n latents of a text, L of all texts, Dz channels, bl latents in a block,
B samples of D numbers.
Run: python likelihood.py "there is a red circle." " the circle is red." --checkpoint out/ckpt.pt
     python likelihood.py "what color is the circle?" "red." --image a.png
"""
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import data
import flow
from cola import Cola, pad_to_multiple
from masks import IT2T, T2T, Sample, pack
from sample import (COUNT, Context, Parser, add_instructions, add_model_flags, draw_noise,
                    open_model, read_picture, within)


def log_normal(z: Tensor, mean: Tensor | float = 0.0, logvar: Tensor | float = 0.0) -> Tensor:
    """log N(z; mean, exp(logvar)) of every number by itself; shapes broadcast."""
    logvar = torch.as_tensor(logvar, dtype=z.dtype, device=z.device)
    return -0.5 * ((z - mean).square() * torch.exp(-logvar) + logvar + math.log(2 * math.pi))


def divergence(v: Tensor, z: Tensor, probe: Tensor | None) -> Tensor:
    """div v, (B,), of v (B, D), a function of z (B, D). With a probe e it is the estimate
    e^T (dv/dz) e, in one backward pass; without, it is exact and takes D passes."""
    if probe is not None:
        return (torch.autograd.grad(v, z, probe)[0] * probe).sum(1)
    return sum(torch.autograd.grad(v_i.sum(), z, retain_graph=True)[0][:, i]
               for i, v_i in enumerate(v.unbind(1)))


def log_prob(velocity_fn: flow.Velocity, z0: Tensor, grid: Tensor, probe: Tensor | None = None,
             known: Tensor | None = None) -> Tensor:
    """log p(z_0) under the flow, (B,), without a gradient (Eq. 10.23, 10.24).
    z0: (B, .., Dz); samples must not see each other in velocity_fn. grid: times from 1 to that of
    z0. probe: noise like z0, best random signs; None for the exact divergence. known: (B, ..) bool,
    positions that are fixed and not counted: log p(unknown | known)."""
    B, D = len(z0), z0[0].numel()
    moves = 1.0 if known is None else (~known[..., None]).expand_as(z0).reshape(B, D)
    probe = None if probe is None else probe.reshape(B, D) * moves

    def augmented(state: Tensor, t: float) -> Tensor:          # d/dt of (z, integral of div v)
        with torch.enable_grad():
            z = state[:, :D].detach().requires_grad_()                               # (B, D)
            v = velocity_fn(z.reshape(z0.shape), t).reshape(B, D) * moves            # (B, D)
            return torch.cat([v.detach(), divergence(v, z, probe)[:, None]], 1)      # (B, D + 1)

    state = torch.cat([z0.detach().reshape(B, D), z0.new_zeros(B, 1)], 1)            # (B, D + 1)
    state = flow.solve(augmented, state, grid.flip(0), "rk4")
    return (log_normal(state[:, :D]) * moves).sum(1) + state[:, D]


def elbo(log_px: Tensor, log_pz: Tensor, log_q: Tensor) -> Tensor:
    """The mean of log w over K draws, (K, ..) each -> (..); a lower bound of log p (Eq. 10.9)."""
    return (log_px + log_pz - log_q).mean(0)


def iwae(log_px: Tensor, log_pz: Tensor, log_q: Tensor) -> Tensor:
    """The log of the mean of w, (K, ..) each -> (..): tighter than the ELBO (Eq. 10.9). Noise of
    Hutchinson's estimate in log_pz enters the exponent: then this is not a lower bound."""
    return torch.logsumexp(log_px + log_pz - log_q, 0) - math.log(len(log_px))


def perplexity(log_p: Tensor, tokens: Tensor) -> Tensor:
    """Perplexity of texts with these log p and numbers of tokens (Eq. 10.7, 10.10); a scalar."""
    return (-torch.as_tensor(log_p).double().sum() / torch.as_tensor(tokens).sum()).exp()

# ---- Texts -------------------------------------------------------------------------------------

Condition = tuple[list[str], list[np.ndarray]]     # instructions; images uint8 (H, W, 3), one size


@torch.no_grad()
def log_weights(model: Cola, texts: list[list[int]], draws: Sequence[int], grid: Tensor,
                known: int = 0, seed: int = 0, exact: bool | None = None,
                condition: Condition | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """log p(x_b | z), log p(z_b | z_<b) and log q(z_b | x) of every block b of some texts, for one
    draw z ~ q(z | x) of each: (blocks of all texts,) each (Algorithm A.1, Eq. 10.16).
    texts: tokens in whole blocks; the same one K times for K draws. draws: their noise by number.
    known: latents at the front that are given and have no terms.
    condition: what the texts answer, for p(answer | image, instruction).
    grid: times from 1 to t_min. At t_min > 0 the flow ends at (1 - t_min) z + t_min eps: p and q
    are of z with noise of variance (t_min / (1 - t_min))^2.
    exact: the exact divergence, which takes a backward pass for each number of a block; else the
    estimate of one probe. None: exact for up to 64 numbers."""
    vae, patch = model.text_vae, model.text_vae.config.patch_size
    if exact is None:
        exact = model.block_len * vae.config.latent_dim <= 64
    lengths = [len(ids) // patch for ids in texts]
    given = torch.cat([torch.arange(n, device=model.device) < known for n in lengths])   # (L,)
    mean, logvar = posterior(model, texts, known, grid[-1].item())                   # (L, Dz)
    noise, signs = [], []
    for k, n in zip(draws, lengths):
        noise.append(draw_noise([data.rng(seed, k, data.Purpose.POSTERIOR)], n, mean.shape[1]))
        of_probe = data.rng(seed, k, data.Purpose.NOISE)
        signs.append(torch.from_numpy(of_probe.choice([-1.0, 1.0], (n, mean.shape[1]))))
    z = mean + (logvar / 2).exp() * torch.cat(noise).to(mean)                        # (L, Dz)
    probe = None if exact else torch.cat(signs).to(z)                                # (L, Dz)
    log_pz = prior_log_prob(model, z, lengths, given, grid, probe, condition)        # (blocks,)
    tokens = torch.tensor([i for ids in texts for i in ids], device=z.device)        # (L patch,)
    log_px = -F.cross_entropy(vae.decode(z, lengths), tokens, reduction="none")      # (L patch,)
    log_px = torch.where(given.repeat_interleave(patch), 0.0, log_px)
    log_q = torch.where(given[:, None], 0.0, log_normal(z, mean, logvar))            # (L, Dz)
    return tuple(x.view(len(log_pz), -1).sum(-1) for x in (log_px, log_pz, log_q))


def posterior(model: Cola, texts: list[list[int]], known: int,
              t_min: float) -> tuple[Tensor, Tensor]:
    """Mean and logvar of q(z | x), scaled as for the prior, with the noise of t_min; (L, Dz) each.
    Known latents are encoded alone, as in training, and have no further noise."""
    vae, patch = model.text_vae, model.text_vae.config.patch_size
    means, logvars = [], []
    for ids in texts:
        encode = lambda ids: vae.encode(torch.tensor(ids, device=model.device), [len(ids) // patch])
        mean, logvar = encode(ids)                                                   # (n, Dz)
        if known:
            alone = encode(model.fill(ids[:known * patch]))
            mean, logvar = (torch.cat([a[:known], x[known:]])
                            for a, x in zip(alone, (mean, logvar)))
        added = torch.full_like(mean, (t_min / (1 - t_min)) ** 2)
        added[:known] = 0.0
        logvar = logvar + 2 * math.log(vae.config.scaling_factor)
        means.append(vae.scale_latents(mean))
        logvars.append(torch.logaddexp(logvar, added.log()))
    return torch.cat(means), torch.cat(logvars)


def prior_log_prob(model: Cola, z: Tensor, lengths: list[int], given: Tensor, grid: Tensor,
                   probe: Tensor | None, condition: Condition | None) -> Tensor:
    """log p(z_b | z_<b) of every block of texts, (blocks,). z (L, Dz), given (L,) bool.
    One solve gives all: noisy blocks do not see each other, only the clean blocks before."""
    bl, channels, t_min = model.block_len, z.shape[1], grid[-1].item()
    context, task, starts = Context(model), T2T, [0] * len(lengths)
    if condition:
        task, starts = IT2T, add_instructions(context, *condition)
    clean, noisy = (pack([Sample(task, start=start, **{segment: n})
                          for start, n in zip(starts, lengths)], bl, model.device)
                    for segment in ("clean", "noisy"))
    context.add(z, context.no_image, clean)
    t_index, plan = (~given).long(), context.plan(noisy)                             # (L,)

    def velocity(z: Tensor, t: float) -> Tensor:
        v, _ = context.velocity(z.flatten(0, 1), context.no_image, [0.0, t], t_index, noisy, plan)
        return v.view_as(z)                                                          # (.., bl, Dz)

    factor = torch.where(given, 1.0, 1 - t_min)[:, None]       # (L, 1); the flow ends at factor * z
    blocks = (factor * z).view(-1, bl, channels)
    log_pz = log_prob(velocity, blocks, grid, probe, given.view(-1, bl))             # (blocks,)
    return log_pz + channels * factor.log().view(-1, bl).sum(1)    # log determinant of factor


def log_answers(model: Cola, prompt: str, image: np.ndarray, answers: list[str], steps: int,
                t_min: float = 0.1) -> list[float]:
    """log p(answer | image, instruction) in nats, by one draw and one probe of the ELBO for each of
    B answers, with the same noise for all: to be compared with each other alone."""
    ids = [model.ids(answer, end=True) for answer in answers]
    grid, n = t_min + (1 - t_min) * flow.time_grid(steps), len(answers)
    terms = log_weights(model, ids, [0] * n, grid, exact=False,
                        condition=([prompt] * n, [image] * n))
    blocks = [len(x) // (model.text_vae.config.patch_size * model.block_len) for x in ids]
    return [x.sum().item() for x in elbo(*(x[None] for x in terms)).split(blocks)]


def score(model: Cola, prefix: str, response: str, samples: int = 8, steps: int = 16,
          t_min: float = 0.1, seed: int = 0,
          image: np.ndarray | None = None) -> list[tuple[str, float, int]]:
    """Rows (name, log p in nats, tokens or 0): ELBO and IWAE of the text, the prefix and, as their
    difference, the response; then the response given latents of the prefix (Eq. 10.18), and its
    three terms. All end tokens count as one. With an image, the prefix is an instruction, and the
    rows are those of the response alone.
    ELBO and IWAE are of whole blocks: the end of a prefix that shares a block with the response
    counts as response. In the last rows it is given, if first_block is clean."""
    condition = None if image is None else ([prefix] * samples, [image] * samples)
    head = [] if condition else model.tokenizer.encode(prefix)
    tail, rows = model.tokenizer.encode(response), []
    patch, bl = model.text_vae.config.patch_size, model.block_len
    ids = pad_to_multiple(head + tail, patch * bl, model.tokenizer.end)
    grid = t_min + (1 - t_min) * flow.time_grid(steps)

    def terms_of(known: int) -> list[Tensor]:                                # (K, blocks) each
        terms = log_weights(model, [ids] * samples, range(samples), grid, known, seed,
                            condition=condition)
        return [x.view(samples, -1) for x in terms]

    cut = len(head) // (patch * bl)                            # whole blocks of the prefix
    known = len(head) // patch if model.first_block == "clean" else cut * bl         # its latents
    total, before = len(head) + len(tail) + 1, cut * bl * patch                      # tokens
    terms, given = terms_of(0), "image, prompt" if condition else "prefix"
    for name, bound in (("ELBO", elbo), ("IWAE", iwae)):
        whole = bound(*(x.sum(1) for x in terms)).item()
        first = bound(*(x[:, :cut].sum(1) for x in terms)).item()
        if not condition:
            rows += [(f"text, {name}", whole, total), (f"prefix, {name}", first, before)]
        rows += [(f"response | {given}, {name}", whole - first, total - before)]
    if known > cut * bl:
        terms = terms_of(known)
    px, pz, q = (x[:, cut:].sum(1) for x in terms)                                   # (K,) each
    if not condition:
        own = elbo(px, pz, q).item()
        rows += [("response | latents of the prefix", own, total - known * patch)]
    return rows + [("    log p(x | z)", px.mean().item(), 0),
                   (f"    log p(z | {given})", pz.mean().item(), 0),
                   ("    - log q(z | x)", -q.mean().item(), 0)]


def main(argv: list[str] | None = None) -> int:
    """The exit status: 0, 2 for a user's mistake, 130 when interrupted."""
    p = Parser(prog="likelihood.py", description=__doc__.partition("\n")[0])
    p.add_argument("prefix", help='"" for none')
    p.add_argument("response", help="what follows it, letter for letter")
    p.add_argument("--image", type=Path, help="a picture: the prefix is then an instruction about "
                   "it, such as a question, and the response its answer, with no space before it")
    p.add_argument("--steps", type=COUNT, default=16, help="steps of the rk4 solver")
    p.add_argument("--t_min", type=within(0, 0.999), default=0.1, help="flow time of the latents: "
                   "0 in the paper, but seldom trained; only scores of one t_min compare")
    p.add_argument("--samples", type=COUNT, default=8, help="draws K; more make IWAE tighter")
    add_model_flags(p)
    args = p.parse_args(argv)
    try:
        model = open_model(args, "it2t" if args.image else "t2t")
        image = read_picture(args.image, model) if args.image else None
        rows = score(model, args.prefix, args.response, args.samples, args.steps, args.t_min,
                     args.seed, image)
        print(f"{'':34}{'log p':>10}  tokens  nats/token  perplexity")
        for name, value, n in rows:
            per_token = f"{n:8}{-value / n:12.4f}{perplexity(value, n):12.5g}" if n else ""
            print(f"{name:34}{value:10.4f}{per_token}", flush=True)
        return 0
    except (ValueError, OSError) as error:
        print(f"likelihood.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
