"""Likelihood: log p of a text under the whole system, by the density of the flow (paper, Sec. 10).

    log p(z_0) = log N(z_1; 0, I) + integral of div v dt,  t from 0 to 1     (Eq. 10.23, 10.24)
    div v = E[e^T (dv/dz) e],  E[e e^T] = I              Hutchinson          (Eq. 10.25)
    log w = log p(x | z) + log p(z) - log q(z | x),  z ~ q(z | x)            (Eq. 10.8)
    ELBO = mean of log w,  IWAE = log of the mean of w   over K draws        (Eq. 10.8, 10.9)
    log p(response | prefix) = log p(prefix, response) - log p(prefix)       (Eq. 10.12 - 10.14)
    perplexity = exp(-sum of log p / sum of tokens)                          (Eq. 10.7, 10.10)

All in nats. A low training loss does not imply a high log p (Sec. 9.4).

Shapes: K draws, n latents of a text, Dz channels, bl latents in a block, B samples of D numbers.
Run: python likelihood.py "there is a red circle." " the circle is red." --checkpoint out/ckpt.pt
"""
import math
import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import data
import flow
from cola import Cola, pad_to_multiple
from masks import T2T, Sample, pack
from sample import COUNT, Context, Parser, add_model_flags, draw_noise, open_model, within

EXACT = 64         # up to so many numbers in a block, the divergence is exact by default


# ---- The density of a flow, and bounds ---------------------------------------------------------

def log_normal(z: Tensor, mean: Tensor | float = 0.0, logvar: Tensor | float = 0.0) -> Tensor:
    """log N(z; mean, exp(logvar)) of every number by itself; shapes broadcast."""
    logvar = torch.as_tensor(logvar, dtype=z.dtype, device=z.device)
    return -0.5 * ((z - mean).square() * torch.exp(-logvar) + logvar + math.log(2 * math.pi))


def divergence(v: Tensor, z: Tensor, probe: Tensor | None) -> Tensor:
    """div v, (B,), of v (B, ..), a function of z (B, ..). With a probe e it is the estimate
    e^T (dv/dz) e, in one backward pass; without, it is exact and takes D passes."""
    B, D = len(z), z[0].numel()
    if probe is not None:
        return (torch.autograd.grad(v, z, probe)[0] * probe).reshape(B, D).sum(1)
    return sum(torch.autograd.grad(v_i.sum(), z, retain_graph=True)[0].reshape(B, D)[:, i]
               for i, v_i in enumerate(v.reshape(B, D).unbind(1)))


def log_prob(velocity_fn: flow.Velocity, z0: Tensor, grid: Tensor, probe: Tensor | None = None,
             known: Tensor | None = None) -> Tensor:
    """log p(z_0) under the flow, (B,), without a gradient (Eq. 10.23, 10.24).

    z0: (B, .., Dz); samples must not see each other inside velocity_fn.
    grid: times from 1 to 0, as for sampling, or to the time of z0. They are run backwards.
    probe: None for the exact divergence, or noise like z0; random signs vary least.
    known: (B, ..) bool, positions that are fixed and not counted: log p(unknown | known)."""
    B, D = len(z0), z0[0].numel()
    moves = 1.0 if known is None else flow.over_channels(~known, z0)
    probe = None if probe is None else probe * moves

    def augmented(state: Tensor, t: float) -> Tensor:          # d/dt of (z, integral of div v)
        with torch.enable_grad():
            z = state[:, :D].detach().reshape(z0.shape).requires_grad_()
            v = velocity_fn(z, t) * moves                                            # (B, .., Dz)
            div = divergence(v, z, probe)                                            # (B,)
        return torch.cat([v.detach().reshape(B, D), div[:, None]], 1)                # (B, D + 1)

    state = torch.cat([z0.detach().reshape(B, D), z0.new_zeros(B, 1)], 1)            # (B, D + 1)
    state = flow.solve(augmented, state, grid.flip(0), "rk4")
    base = log_normal(state[:, :D].reshape(z0.shape)) * moves                        # (B, .., Dz)
    return base.reshape(B, D).sum(1) + state[:, D]


def elbo(log_px: Tensor, log_pz: Tensor, log_q: Tensor) -> Tensor:
    """The mean of log w over K draws, (K, ..) each -> (..); a lower bound of log p (Eq. 10.8)."""
    return (log_px + log_pz - log_q).mean(0)


def iwae(log_px: Tensor, log_pz: Tensor, log_q: Tensor) -> Tensor:
    """The log of the mean of w, (K, ..) each -> (..): tighter than the ELBO (Eq. 10.9). Noise of
    Hutchinson's estimate in log_pz enters the exponent: then this is not a lower bound."""
    log_w = log_px + log_pz - log_q                                                  # (K, ..)
    return torch.logsumexp(log_w, 0) - math.log(len(log_w))


def perplexity(log_p: Tensor, tokens: Tensor) -> Tensor:
    """Perplexity of texts with these log p and numbers of tokens (Eq. 10.7, 10.10); a scalar."""
    log_p, tokens = torch.as_tensor(log_p).double(), torch.as_tensor(tokens).double()
    return (-log_p.sum() / tokens.sum()).exp()


# ---- Texts -------------------------------------------------------------------------------------

@torch.no_grad()
def log_weights(model: Cola, ids: list[int], samples: int, grid: Tensor, known: int = 0,
                exact: bool = True, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """log p(x_b | z), log p(z_b | z_<b) and log q(z_b | x) of every block b of a text, for K =
    samples draws z ~ q(z | x): (K, blocks) each (Algorithm A.1, Eq. 10.16).

    ids: tokens in whole blocks. known: latents at the front that are given and have no terms.
    grid: times from 1 to t_min. With t_min > 0 the latents have further noise of variance
        (t_min / (1 - t_min))^2, in p and in q: another model, of times that training has seen.
    exact: the exact divergence, or else the estimate of one probe."""
    vae, K, n = model.text_vae, samples, len(ids) // model.text_vae.config.patch_size
    tokens = torch.tensor(ids * K, device=model.device)                              # (K n patch,)
    given = torch.arange(n, device=model.device).repeat(K) < known                   # (K n,)
    mean, logvar = (x.repeat(K, 1) for x in posterior(model, ids, known, grid[-1].item()))
    generators = [data.rng(seed, k, data.Purpose.POSTERIOR) for k in range(K)]
    z = mean + (logvar / 2).exp() * draw_noise(generators, n, mean.shape[1]).to(mean)   # (K n, Dz)
    signs = None
    if not exact:
        signs = np.concatenate([g.choice([-1.0, 1.0], (n, z.shape[1])) for g in generators])
        signs = torch.from_numpy(signs).to(z)                                        # (K n, Dz)
    log_pz = prior_log_prob(model, z, given.view(K, n), grid, signs)                 # (K blocks,)
    log_px = -F.cross_entropy(vae.decode(z, [n] * K), tokens, reduction="none")      # (K n patch,)
    log_px = torch.where(given.repeat_interleave(vae.config.patch_size), 0.0, log_px)
    log_q = torch.where(given[:, None], 0.0, log_normal(z, mean, logvar))            # (K n, Dz)
    by_block = (K, n // model.block_len, -1)
    return log_px.view(by_block).sum(-1), log_pz.view(K, -1), log_q.view(by_block).sum(-1)


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
                   signs: Tensor | None) -> Tensor:
    """log p(z_b | z_<b) of every block of K texts, (K blocks,). z (K n, Dz), given (K, n) bool.

    One solve gives all: noisy blocks do not see each other, only the clean blocks before."""
    (K, n), bl, channels, t_min = given.shape, model.block_len, z.shape[1], grid[-1].item()
    blocks, given = (-1, bl, channels), given.flatten()
    context = Context(model)
    context.add(z, context.no_image, pack([Sample(T2T, clean=n)] * K, bl, model.device))
    noisy = pack([Sample(T2T, noisy=n)] * K, bl, model.device)
    plan = context.plan(noisy)

    def velocity(z: Tensor, t: float) -> Tensor:
        flat = z.flatten(0, 1)                                                       # (K n, Dz)
        v, _ = context.velocity(flat, context.no_image, [0.0, t], (~given).long(), noisy, plan)
        return v.view_as(z)

    # The flow ends at (1 - t_min) z, whose density differs by the determinant of this factor.
    factor = torch.where(given, 1.0, 1 - t_min)[:, None]                             # (K n, 1)
    probe = None if signs is None else signs.view(blocks)
    log_pz = log_prob(velocity, (factor * z).view(blocks), grid, probe, given.view(-1, bl))
    return log_pz + channels * factor.log().view(-1, bl).sum(1)


def score(model: Cola, prefix: str, response: str, samples: int = 8, steps: int = 16,
          t_min: float = 0.1, **options) -> list[tuple[str, float, int]]:
    """Rows (name, log p in nats, tokens or 0): ELBO and IWAE of the text, of the prefix and of the
    response, their difference; then the response given latents of the prefix (Eq. 10.21), and its
    three terms. options: exact and seed of log_weights.

    All end tokens count as one. Only whole blocks have a likelihood: in the first rows the end of
    a prefix that shares a block with the response counts as response. In the last score it is
    given, if the model was trained with clean latents in a noisy block (first_block clean)."""
    head, tail = model.tokenizer.encode(prefix), model.tokenizer.encode(response)
    patch, bl, rows = model.text_vae.config.patch_size, model.block_len, []
    ids = pad_to_multiple(head + tail, patch * bl, model.tokenizer.end)
    grid = t_min + (1 - t_min) * flow.time_grid(steps)
    cut = len(head) // (patch * bl)                            # whole blocks of the prefix
    known = len(head) // patch if model.first_block == "clean" else cut * bl         # its latents
    total, before = len(head) + len(tail) + 1, cut * bl * patch                      # tokens
    terms = log_weights(model, ids, samples, grid, **options)                        # (K, blocks)
    for name, bound in (("ELBO", elbo), ("IWAE", iwae)):
        whole = bound(*(x.sum(1) for x in terms)).item()
        first = bound(*(x[:, :cut].sum(1) for x in terms)).item()
        rows += [(f"text, {name}", whole, total), (f"prefix, {name}", first, before),
                 (f"response | prefix, {name}", whole - first, total - before)]
    if known > cut * bl:
        terms = log_weights(model, ids, samples, grid, known, **options)
    px, pz, q = (x[:, cut:].sum(1) for x in terms)                                   # (K,) each
    own = elbo(px, pz, q).item()
    return rows + [("response | latents of the prefix", own, total - known * patch),
                   ("    log p(x | z)", px.mean().item(), 0),
                   ("    log p(z | z of the prefix)", pz.mean().item(), 0),
                   ("    - log q(z | x)", -q.mean().item(), 0)]


def main(argv: list[str] | None = None) -> int:
    """The exit status: 0, or 2 for a user's mistake."""
    p = Parser(prog="likelihood.py", description=__doc__.partition("\n")[0])
    p.add_argument("prefix", help='"" for none')
    p.add_argument("response", help="what follows it, letter for letter")
    p.add_argument("--steps", type=COUNT, default=16, help="steps of the rk4 solver")
    p.add_argument("--t_min", type=within(0, 0.999), default=0.1, help="flow time at which "
                   "latents are scored; the paper has 0, but times near it are seldom trained; "
                   "scores of different t_min do not compare")
    p.add_argument("--samples", type=COUNT, default=8, help="draws K; more make IWAE tighter")
    p.add_argument("--divergence", choices=("auto", "exact", "hutchinson"), default="auto",
                   help="exact takes a backward pass for every number of a block, hutchinson one, "
                   f"but its noise biases IWAE; auto is exact for blocks of up to {EXACT} numbers")
    add_model_flags(p)
    args = p.parse_args(argv)
    try:
        if not args.response:
            raise ValueError("the response is empty")
        model = open_model(args, "t2t")
        small = model.block_len * model.text_vae.config.latent_dim <= EXACT
        exact = small if args.divergence == "auto" else args.divergence == "exact"
        rows = score(model, args.prefix, args.response, args.samples, args.steps, args.t_min,
                     exact=exact, seed=args.seed)
    except (ValueError, OSError) as error:
        print(f"likelihood.py: {error}", file=sys.stderr)
        return 2
    print(f"{'':34}{'log p':>10}  tokens  nats/token  perplexity")
    for name, value, tokens in rows:
        print(f"{name:34}{value:10.4f}", end="" if tokens else "\n")
        if tokens:
            print(f"{tokens:8}{-value / tokens:12.4f}{perplexity(value, tokens):12.5g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
