"""Likelihood: log p of a text under the whole system, by the density of the flow (paper, Sec. 10).

    log p(z_0) = log N(z_1; 0, I) + integral of div v dt,  t from 0 to 1     (Eq. 10.23, 10.24)
    div v = E[e^T (dv/dz) e],  E[e e^T] = I              Hutchinson          (Eq. 10.25)
    log w = log p(x | z) + log p(z) - log q(z | x),  z ~ q(z | x)            (Eq. 10.8)
    ELBO = mean of log w,  IWAE = log of the mean of w   over K draws        (Eq. 10.9)
    log p(response | prefix) = log p(prefix, response) - log p(prefix)       (Eq. 10.12 - 10.14)
    perplexity = exp(-sum of log p / sum of tokens)                          (Eq. 10.7, 10.10)

All in nats. A low training loss does not imply a high log p (Sec. 5.1, 9.4).
Shapes: K draws, n latents of a text, Dz channels, bl latents in a block, B samples of D numbers.
Run: python likelihood.py "there is a red circle." " the circle is red." --checkpoint out/ckpt.pt
"""
import math
import sys

import torch
import torch.nn.functional as F
from torch import Tensor

import data
import flow
from cola import Cola, pad_to_multiple
from masks import T2T, Sample, pack
from sample import COUNT, Context, Parser, add_model_flags, draw_noise, open_model, within


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

@torch.no_grad()
def log_weights(model: Cola, ids: list[int], K: int, grid: Tensor, known: int = 0,
                exact: bool = True, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """log p(x_b | z), log p(z_b | z_<b) and log q(z_b | x) of every block b of a text, for K draws
    z ~ q(z | x): (K, blocks) each (Algorithm A.1, Eq. 10.16).
    ids: tokens in whole blocks. known: latents at the front that are given and have no terms.
    grid: times from 1 to t_min. At t_min > 0 the flow ends at (1 - t_min) z + t_min eps: p and q
    are of z with noise of variance (t_min / (1 - t_min))^2.
    exact: the exact divergence, or else the estimate of one probe."""
    vae, n = model.text_vae, len(ids) // model.text_vae.config.patch_size
    given = torch.arange(n, device=model.device).repeat(K) < known                   # (K n,)
    mean, logvar = (x.repeat(K, 1) for x in posterior(model, ids, known, grid[-1].item()))
    rngs = [data.rng(seed, k, data.Purpose.POSTERIOR) for k in range(K)]
    z = mean + (logvar / 2).exp() * draw_noise(rngs, n, mean.shape[1]).to(mean)         # (K n, Dz)
    signs = [torch.from_numpy(g.choice([-1.0, 1.0], (n, z.shape[1]))) for g in rngs]
    probe = None if exact else torch.cat(signs).to(z)                                # (K n, Dz)
    log_pz = prior_log_prob(model, z, given.view(K, n), grid, probe)                 # (K blocks,)
    tokens = torch.tensor(ids * K, device=z.device)                                  # (K n patch,)
    log_px = -F.cross_entropy(vae.decode(z, [n] * K), tokens, reduction="none")      # (K n patch,)
    log_px = torch.where(given.repeat_interleave(vae.config.patch_size), 0.0, log_px)
    log_q = torch.where(given[:, None], 0.0, log_normal(z, mean, logvar))            # (K n, Dz)
    return tuple(x.view(K, n // model.block_len, -1).sum(-1) for x in (log_px, log_pz, log_q))


def posterior(model: Cola, ids: list[int], known: int, t_min: float) -> tuple[Tensor, Tensor]:
    """Mean and logvar of q(z | x), scaled as for the prior, with the noise of t_min; (n, Dz) each.
    Known latents are encoded alone, as in training, and have no further noise."""
    vae, patch = model.text_vae, model.text_vae.config.patch_size
    encode = lambda ids: vae.encode(torch.tensor(ids, device=model.device), [len(ids) // patch])
    mean, logvar = encode(ids)
    if known:
        alone = encode(ids[:known * patch])
        mean, logvar = (torch.cat([a, x[known:]]) for a, x in zip(alone, (mean, logvar)))
    added = torch.full_like(mean, (t_min / (1 - t_min)) ** 2)
    added[:known] = 0.0
    logvar = logvar + 2 * math.log(vae.config.scaling_factor)
    return vae.scale_latents(mean), torch.logaddexp(logvar, added.log())


def prior_log_prob(model: Cola, z: Tensor, given: Tensor, grid: Tensor,
                   probe: Tensor | None) -> Tensor:
    """log p(z_b | z_<b) of every block of K texts, (K blocks,). z (K n, Dz), given (K, n) bool.
    One solve gives all: noisy blocks do not see each other, only the clean blocks before."""
    (K, n), bl, channels = given.shape, model.block_len, z.shape[1]
    t_min = grid[-1].item()
    given, t_index = given.flatten(), (~given).flatten().long()                      # (K n,) each
    context = Context(model)
    context.add(z, context.no_image, pack([Sample(T2T, clean=n)] * K, bl, model.device))
    noisy = pack([Sample(T2T, noisy=n)] * K, bl, model.device)
    plan = context.plan(noisy)

    def velocity(z: Tensor, t: float) -> Tensor:
        v, _ = context.velocity(z.flatten(0, 1), context.no_image, [0.0, t], t_index, noisy, plan)
        return v.view_as(z)                                                          # (.., bl, Dz)

    factor = torch.where(given, 1.0, 1 - t_min)[:, None]     # (K n, 1); the flow ends at factor * z
    blocks = (factor * z).view(-1, bl, channels)
    log_pz = log_prob(velocity, blocks, grid, probe, given.view(-1, bl))             # (K blocks,)
    return log_pz + channels * factor.log().view(-1, bl).sum(1)    # log determinant of factor


def score(model: Cola, prefix: str, response: str, samples: int = 8, steps: int = 16,
          t_min: float = 0.1, seed: int = 0) -> list[tuple[str, float, int]]:
    """Rows (name, log p in nats, tokens or 0): ELBO and IWAE of the text, the prefix and, as their
    difference, the response; then the response given latents of the prefix (Eq. 10.21), and its
    three terms. All end tokens count as one.
    ELBO and IWAE are of whole blocks: the end of a prefix that shares a block with the response
    counts as response. In the last rows it is given, if first_block is clean."""
    head, tail = model.tokenizer.encode(prefix), model.tokenizer.encode(response)
    patch, bl, rows = model.text_vae.config.patch_size, model.block_len, []
    # The exact divergence takes a backward pass for each number of a block, the estimate one.
    exact = bl * model.text_vae.config.latent_dim <= 64
    ids = pad_to_multiple(head + tail, patch * bl, model.tokenizer.end)
    grid = t_min + (1 - t_min) * flow.time_grid(steps)
    cut = len(head) // (patch * bl)                            # whole blocks of the prefix
    known = len(head) // patch if model.first_block == "clean" else cut * bl         # its latents
    total, before = len(head) + len(tail) + 1, cut * bl * patch                      # tokens
    terms = log_weights(model, ids, samples, grid, 0, exact, seed)                   # (K, blocks)
    for name, bound in (("ELBO", elbo), ("IWAE", iwae)):
        whole = bound(*(x.sum(1) for x in terms)).item()
        first = bound(*(x[:, :cut].sum(1) for x in terms)).item()
        rows += [(f"text, {name}", whole, total), (f"prefix, {name}", first, before),
                 (f"response | prefix, {name}", whole - first, total - before)]
    if known > cut * bl:
        terms = log_weights(model, ids, samples, grid, known, exact, seed)
    px, pz, q = (x[:, cut:].sum(1) for x in terms)                                   # (K,) each
    return rows + [("response | latents of the prefix", elbo(px, pz, q).item(),
                    total - known * patch),
                   ("    log p(x | z)", px.mean().item(), 0),
                   ("    log p(z | z of the prefix)", pz.mean().item(), 0),
                   ("    - log q(z | x)", -q.mean().item(), 0)]


def main(argv: list[str] | None = None) -> int:
    """The exit status: 0, 2 for a user's mistake, 130 when interrupted."""
    p = Parser(prog="likelihood.py", description=__doc__.partition("\n")[0])
    p.add_argument("prefix", help='"" for none')
    p.add_argument("response", help="what follows it, letter for letter")
    p.add_argument("--steps", type=COUNT, default=16, help="steps of the rk4 solver")
    p.add_argument("--t_min", type=within(0, 0.999), default=0.1, help="flow time of the latents: "
                   "0 in the paper, but seldom trained; only scores of one t_min compare")
    p.add_argument("--samples", type=COUNT, default=8, help="draws K; more make IWAE tighter")
    add_model_flags(p)
    args = p.parse_args(argv)
    try:
        rows = score(open_model(args, "t2t"), args.prefix, args.response, args.samples, args.steps,
                     args.t_min, args.seed)
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
