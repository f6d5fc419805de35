"""Likelihoods of whole texts; the tests of flow.py hold the closed forms of the parts.
pytest tests/test_score.py"""
import math

import pytest
import torch
import torch.nn.functional as F

import data
import flow
import sample
import train
from conftest import TINY

TEXT = "there is a red circle. the background is gray. there are two objects."
GRID = flow.time_grid(4)


def system(block_len, noise):
    """Fresh weights, with some noise added; without, the prior says v = 0 and p(z) is N(0, I)."""
    torch.manual_seed(0)
    cola = train.new_model(train.parse([*TINY, "--block_len", str(block_len), "--text_latent_dim", "4"]),
                           data.GeneratedScenes(0, 32, 64))
    for module in (cola.text_vae, cola.image_vae, cola.mmdit):
        for p in module.eval().parameters():
            p.data.add_(torch.randn_like(p), alpha=noise)
    return cola


def ids_of(model, text=TEXT):
    return model.ids(text, end=True)


@pytest.mark.parametrize("block_len, known", ((1, 0), (4, 0), (4, 6)))
def test_terms_where_the_prior_is_standard_normal(block_len, known):
    """By hand: the decoder's log softmax, N(z; 0, I) and N(z; mean, var) of every latent that is not given."""
    model, K = system(block_len, 0.0), 3
    ids = ids_of(model)
    n = len(ids)
    px, pz, q = sample.log_weights(model, ids, K, GRID, known=known, seed=5)
    assert px.shape == pz.shape == q.shape == (K, n // block_len)
    mean, logvar = model.text_vae.encode(torch.tensor(ids), [n])
    for k in range(K):
        noise = torch.from_numpy(data.rng(5, k, data.POSTERIOR).standard_normal((n, 4), "float32"))
        z = mean + (logvar / 2).exp() * noise
        normal = torch.distributions.Normal
        expected = (F.log_softmax(model.text_vae.decode(z, [n]), -1)[range(n), ids],
                    normal(0.0, 1.0).log_prob(z).sum(-1),
                    normal(mean, (logvar / 2).exp()).log_prob(z).sum(-1))
        for got, want in zip((px, pz, q), expected):
            want[:known] = 0.0
            torch.testing.assert_close(got[k], want.view(-1, block_len).sum(-1), atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("block_len", (1, 4))
def test_a_text_is_the_product_of_its_blocks(block_len):
    """Blocks of a prefix have the same terms alone; given as known, they leave the terms of the others."""
    model, cut = system(block_len, 0.1), 8
    ids = ids_of(model)
    whole = sample.log_weights(model, ids, 2, GRID)
    first = sample.log_weights(model, ids[:cut], 2, GRID)
    rest = sample.log_weights(model, ids, 2, GRID, known=cut)
    for a, b, c in zip(whole, first, rest):
        torch.testing.assert_close(a[:, :cut // block_len], b, atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(a[:, cut // block_len:], c[:, cut // block_len:], atol=1e-3, rtol=1e-4)
        assert not c[:, :cut // block_len].any()
    assert (whole[1] - sample.log_weights(system(block_len, 0.0), ids, 2, GRID)[1]).abs().max() > 0.1


def test_hutchinson_agrees_with_the_exact_divergence_in_the_mean():
    model = system(1, 0.1)
    ids = ids_of(model)[:4]
    error = torch.stack([sample.log_weights(model, ids, 1, GRID, exact=False, seed=s)[1].sum()
                         - sample.log_weights(model, ids, 1, GRID, seed=s)[1].sum() for s in range(40)])
    assert error.std() > 1e-3 and error.mean().abs() < 3 * error.std() / math.sqrt(len(error))


def test_rows():
    model = system(4, 0.1)
    rows = {name: (value, tokens) for name, value, tokens in sample.score(model, TEXT[:22], TEXT[22:], 3, 4)}
    before, after = (len(model.tokenizer.encode(t)) for t in (TEXT[:22], TEXT[22:]))
    for bound in ("ELBO", "IWAE"):
        whole, first, rest = (rows[f"{part}, {bound}"] for part in ("text", "prefix", "response | prefix"))
        assert rest[0] == pytest.approx(whole[0] - first[0])
        assert (whole[1], first[1], rest[1]) == (before + after + 1, before, after + 1)
    assert rows["text, IWAE"][0] >= rows["text, ELBO"][0] and rows["prefix, IWAE"][0] >= rows["prefix, ELBO"][0]
    parts = [value for name, (value, tokens) in rows.items() if name.startswith("  ") and not tokens]
    assert len(parts) == 3 and sum(parts) == pytest.approx(rows["response | latents of the prefix"][0], abs=1e-3)
    alone = dict((name, value) for name, value, _ in sample.score(model, "", TEXT, 2, 4))
    assert alone["prefix, ELBO"] == 0 and alone["response | prefix, IWAE"] == alone["text, IWAE"]


def test_command(tiny, capsys):
    flags = ["--checkpoint", str(tiny / "ckpt.pt"), "--steps", "1", "--samples", "2", "--solver", "euler",
             "--divergence", "hutchinson", "--device", "cpu"]
    assert sample.main(["score", "a red", " circle.", *flags]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 11 and "response | prefix, IWAE" in out and "perplexity" in out
    for argv, words in ((["a", ""], "response"), (["a", "b", "--samples", "0"], "--samples 0")):
        assert sample.main(["score", *argv, *flags[:2]]) == 2 and words in capsys.readouterr().err
