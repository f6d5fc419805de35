"""Likelihoods of whole texts; the tests of flow.py hold the closed forms of the parts.
pytest tests/test_score.py"""
import math
from dataclasses import replace

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


def system(block_len, noise, *flags):
    """Fresh weights, with some noise added; without, the prior says v = 0 and p(z) is N(0, I)."""
    torch.manual_seed(0)
    flags = [*TINY, "--block_len", str(block_len), "--text_latent_dim", "4", *flags]
    cola = train.new_model(train.parse(flags), data.GeneratedScenes(0, 32, 64))
    for module in (cola.text_vae, cola.image_vae, cola.mmdit):
        for p in module.eval().parameters():
            p.data.add_(torch.randn_like(p), alpha=noise)
    return cola


def ids_of(model, text=TEXT):
    return model.ids(text, end=True)


@pytest.mark.parametrize("t_min", (0.0, 0.2))
@pytest.mark.parametrize("block_len, known, patch, scale",
                         ((1, 0, 1, 1.0), (4, 0, 1, 1.0), (4, 6, 1, 1.0), (2, 3, 2, 3.0)))
def test_terms_where_the_prior_is_standard_normal(block_len, known, patch, scale, t_min):
    """By hand: the decoder's log softmax, N(z; 0, I) and N(z; mean, var) of every latent that is not given. Stopped
    at t_min, what is N(0, I) there is divided by 1 - t_min, and the posterior has the noise of the time."""
    model, K = system(block_len, 0.0, "--text_patch", str(patch)), 3
    model.text_vae.config["scaling_factor"] = scale
    ids = ids_of(model)
    n = len(ids) // patch
    grid = t_min + (1 - t_min) * GRID
    px, pz, q = sample.log_weights(model, ids, K, grid, known=known, seed=5)
    assert px.shape == pz.shape == q.shape == (K, n // block_len)
    mean, logvar = model.text_vae.encode(torch.tensor(ids), [n])
    for k in range(K):
        noise = torch.from_numpy(data.rng(5, k, data.POSTERIOR).standard_normal((n, 4), "float32"))
        std = (logvar / 2).exp() * scale
        std[known:] = (std[known:] ** 2 + (t_min / (1 - t_min)) ** 2).sqrt()
        z = mean * scale + std * noise
        normal = torch.distributions.Normal
        of_tokens = F.log_softmax(model.text_vae.decode(z, [n]), -1)[range(n * patch), ids]
        expected = (of_tokens.view(n, patch).sum(1), normal(0.0, 1 / (1 - t_min)).log_prob(z).sum(-1),
                    normal(mean * scale, std).log_prob(z).sum(-1))
        for got, want in zip((px, pz, q), expected):
            want[:known] = 0.0
            torch.testing.assert_close(got[k], want.view(-1, block_len).sum(-1), atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("block_len, cut", ((1, 8), (4, 8), (4, 6)))
def test_a_text_is_the_product_of_its_blocks(block_len, cut):
    """Whole blocks of a prefix have the same terms alone; given as known, they leave those of later blocks. Of a
    block that is known in part, the rest is judged with that part in view."""
    model = system(block_len, 0.1)
    ids, blocks = ids_of(model), cut // block_len
    whole = sample.log_weights(model, ids, 2, GRID)
    first = sample.log_weights(model, ids[:blocks * block_len], 2, GRID)
    rest = sample.log_weights(model, ids, 2, GRID, known=cut)
    later = -(-cut // block_len)
    for a, b, c in zip(whole, first, rest):
        torch.testing.assert_close(a[:, :blocks], b, atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(a[:, later:], c[:, later:], atol=1e-3, rtol=1e-4)
        assert not c[:, :blocks].any() and (later == blocks or (a - c)[:, blocks].abs().min() > 1e-2)
    assert (whole[1] - sample.log_weights(system(block_len, 0.0), ids, 2, GRID)[1]).abs().max() > 0.1
    if (block_len, cut) == (4, 8):                             # so too where the flow stops before 0
        grid = 0.2 + 0.8 * GRID
        for a, b in zip(*(sample.log_weights(model, part, 2, grid) for part in (ids, ids[:cut]))):
            torch.testing.assert_close(a[:, :blocks], b, atol=1e-3, rtol=1e-4)


def test_given_latents_are_encoded_alone():
    """As training has them: where the text VAE looks ahead in its blocks, else they would know the response."""
    model = system(4, 0.0, "--vae_block_len", "4")
    for p in model.text_vae.parameters():
        p.data.add_(torch.randn_like(p), alpha=0.1)
    ids, known = ids_of(model), 6
    encode = lambda part: model.text_vae.encode(torch.tensor(part), [len(part)])
    apart = [torch.cat([a, b[known:]]) for a, b in zip(encode(ids[:known]), encode(ids))]
    assert (apart[0] - encode(ids)[0]).abs().max() > 1e-3
    px, _, _ = sample.log_weights(model, ids, 1, GRID, known=known, seed=5)
    noise = torch.from_numpy(data.rng(5, 0, data.POSTERIOR).standard_normal((len(ids), 4), "float32"))
    z = apart[0] + (apart[1] / 2).exp() * noise
    expected = F.log_softmax(model.text_vae.decode(z, [len(ids)]), -1)[range(len(ids)), ids]
    expected[:known] = 0.0
    torch.testing.assert_close(px[0], expected.view(-1, 4).sum(-1), atol=1e-3, rtol=1e-5)


def test_hutchinson_agrees_with_the_exact_divergence_in_the_mean():
    model = system(1, 0.1)
    ids = ids_of(model)[:4]
    error = torch.stack([sample.log_weights(model, ids, 1, GRID, exact=False, seed=s)[1].sum()
                         - sample.log_weights(model, ids, 1, GRID, seed=s)[1].sum() for s in range(20)])
    assert error.std() > 1e-3 and error.mean().abs() < 3 * error.std() / math.sqrt(len(error))


@pytest.mark.parametrize("mode", ("clean", "repaint"))
@pytest.mark.parametrize("extra", (0, 3))
def test_rows(extra, mode):
    """Differences are of whole blocks; the response's own score knows the prefix to the last latent, if the model
    has seen clean latents beside noise."""
    model = replace(system(4, 0.1), first_block=mode)
    cut = next(i for i in range(len(TEXT)) if len(model.tokenizer.encode(TEXT[:i])) == 8 + extra)
    before, after = (len(model.tokenizer.encode(t)) for t in (TEXT[:cut], TEXT[cut:]))
    rows = {name: (value, tokens) for name, value, tokens in sample.score(model, TEXT[:cut], TEXT[cut:], 3, 4)}
    for bound in ("ELBO", "IWAE"):
        whole, first, rest = (rows[f"{part}, {bound}"] for part in ("text", "prefix", "response | prefix"))
        assert rest[0] == pytest.approx(whole[0] - first[0])
        assert (whole[1], first[1], rest[1]) == (before + after + 1, 8, before + after - 7)
    assert rows["text, IWAE"][0] >= rows["text, ELBO"][0] and rows["prefix, IWAE"][0] >= rows["prefix, ELBO"][0]
    own, tokens = rows["response | latents of the prefix"]
    parts = [value for name, (value, tokens) in rows.items() if name.startswith("  ") and not tokens]
    assert len(parts) == 3 and sum(parts) == pytest.approx(own, abs=1e-3)
    whole = extra == 0 or mode != "clean"
    assert tokens == (before + after - 7 if whole else after + 1)
    assert (own == pytest.approx(rows["response | prefix, ELBO"][0], abs=1e-3)) == whole
    alone = dict((name, value) for name, value, _ in sample.score(model, "", TEXT, 2, 4))
    assert alone["prefix, ELBO"] == 0 and alone["response | prefix, IWAE"] == alone["text, IWAE"]


def test_command(tiny, capsys):
    flags = ["--checkpoint", str(tiny / "ckpt.pt"), "--steps", "1", "--samples", "2", "--solver", "euler",
             "--divergence", "hutchinson", "--device", "cpu"]
    assert sample.main(["score", "a red", " circle.", *flags]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 11 and "response | prefix, IWAE" in out and "perplexity" in out
    for argv, words in ((["a", ""], "response"), (["a", "b", "--samples", "0"], "--samples 0"),
                        (["a", "b", "--t_min", "1"], "--t_min 1")):
        assert sample.main(["score", *argv, *flags[:2]]) == 2 and words in capsys.readouterr().err
