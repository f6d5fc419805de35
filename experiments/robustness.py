"""How much noise the text VAE's decoder tolerates (paper, Sec. 5.4).

    share(t) = fraction of tokens decoded right from z_t = (1 - t) z_0 + t eps    (paper, Eq. 9.31)

z_0 are the mean latents of 256 texts: stories about generated scenes that no run is trained on, or
windows of text files. Prints a row for every t from 0 to 1 in steps of 0.05.
Run: python -m experiments.robustness --checkpoint out/ckpt.pt [--text FILE ..]     (CPU, 1 min)
"""
from __future__ import annotations

import argparse
import sys
from collections import Counter

import torch

import cola
import data
from text_vae import TextVAE, noised_accuracy

TEXTS, TOKENS = 256, 128               # texts, and tokens of each at most
BATCH = 16                             # texts decoded at once


def accuracy_curve(vae: TextVAE, texts: list[list[int]]) -> list[tuple[int, float]]:
    """(1000 t, share of tokens decoded right) of texts of whole latents; the noise is seeded."""
    generator, right = torch.Generator().manual_seed(0), Counter()
    for batch in (texts[k:k + BATCH] for k in range(0, len(texts), BATCH)):
        lengths = [len(ids) // vae.config.patch_size for ids in batch]
        flat = torch.tensor([token for ids in batch for token in ids])             # (T,)
        noise = torch.randn(sum(lengths), vae.config.latent_dim, generator=generator)
        for t in range(0, 1001, 50):
            right[t] += noised_accuracy(vae, flat, lengths, noise, t / 1000) * len(flat)
    total = sum(map(len, texts))
    return [(t, count / total) for t, count in right.items()]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="robustness.py", allow_abbrev=False,
                                     description="tokens decoded right from noised latents")
    parser.add_argument("--checkpoint", default="out/ckpt.pt", help="whose text VAE is measured")
    parser.add_argument("--text", nargs="+", help="text files; by default, stories about scenes")
    args = parser.parse_args(argv)
    try:
        model, seed = cola.load(args.checkpoint), data.SEEDS - 1     # a seed that runs seldom have
        texts = data.TextFiles(args.text, seed, TOKENS) if args.text else data.Scenes(seed)
    except (ValueError, OSError) as error:
        print(f"robustness.py: {error}", file=sys.stderr)
        return 2
    whole = TOKENS // model.text_vae.config.patch_size * model.text_vae.config.patch_size
    ids = [model.ids(texts.t2t(k), end=False)[:whole] for k in range(TEXTS)]
    print(f"{TEXTS} texts, {sum(map(len, ids))} tokens\n1000 t  share of tokens decoded right")
    for t, share in accuracy_curve(model.text_vae, ids):
        print(f"{t:6d}  {share:.3f}  {'#' * round(50 * share)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
