"""pytest tests/test_likelihood.py"""
import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.distributions import Normal, kl_divergence

import checkpoint
import config
import data
import flow
import likelihood
from closed_form import mixture_velocity
from conftest import TINY
from cuda_attention import make_plan
from likelihood import elbo, iwae, log_normal, log_prob
from masks import IT2T, N, Sample, pack

F64 = torch.float64


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)

# ---- The density, against closed forms ---------------------------------------------------------

MEANS = torch.tensor([[0.0, 1.0, 0.5], [0.8, -1.0, 0.0]], dtype=F64)
STDS = torch.tensor([0.4, 0.3], dtype=F64)


@pytest.mark.parametrize("dtype", (F64, torch.float32))
@pytest.mark.parametrize("t", (0.0, 0.3))
def test_density_of_a_mixture_of_gaussians(t, dtype):
    """Its velocity is not linear in z. Also of what the data has become at a time t above 0, where
    the grid ends."""
    z, grid = draw(50, 3), t + (1 - t) * flow.time_grid(64)
    got = log_prob(mixture_velocity(MEANS.to(dtype), STDS.to(dtype)), z.to(dtype), grid)
    parts = [Normal((1 - t) * m, ((1 - t) ** 2 * s ** 2 + t ** 2).sqrt()).log_prob(z).sum(1)
             for m, s in zip(MEANS, STDS)]
    assert got.dtype == dtype and got.shape == (50,)
    assert ((got - torch.logaddexp(*parts) + math.log(2)).abs() / 3).max() < 1e-3    # per number


@pytest.mark.parametrize("probe", (torch.sign, torch.clone), ids=("signs", "normal"))
def test_hutchinson_is_unbiased(probe):
    n, grid, velocity_fn = 10_000, flow.time_grid(8), mixture_velocity(MEANS, STDS)
    z = draw(1, 3).expand(n, 3)
    got = log_prob(velocity_fn, z, grid, probe(draw(n, 3, seed=4)))
    want = log_prob(velocity_fn, z[:1], grid)
    assert got.std() > 0.05, "a single probe is noisy"
    assert (got.mean() - want).abs() < 4.5 * got.std() / math.sqrt(n)


def test_known_positions_condition_the_density():
    """z = (a, b), a known and b | a ~ N(0.8 a, 0.3^2): the flow of b alone, in a larger latent. It
    is isotropic, so one probe of signs is exact."""
    def velocity_fn(z, t):
        a, b = z[:, :1], z[:, 1:]
        slope = (t - (1 - t) * 0.09) / ((1 - t) ** 2 * 0.09 + t ** 2)
        v = slope * (b - (1 - t) * 0.8 * a) - 0.8 * a
        return torch.cat([1e3 * b[:, :1], v], 1)           # that of a is ignored
    z, known = draw(30, 3, 4), torch.tensor([[True, False, False]]).expand(30, 3)
    exact, estimate = (log_prob(velocity_fn, z, flow.time_grid(32), probe, known)
                       for probe in (None, draw(30, 3, 4, seed=1).sign()))
    want = Normal(0.8 * z[:, :1], 0.3).log_prob(z[:, 1:]).sum((1, 2))
    assert (exact - want).abs().max() < 1e-3
    torch.testing.assert_close(estimate, exact)


@pytest.mark.parametrize("probe", (None, torch.ones(2, 3)))
@pytest.mark.parametrize("grad", (False, True))
def test_log_prob_leaves_no_graph(grad, probe):
    net, z0 = torch.nn.Linear(3, 3), torch.zeros(2, 3, requires_grad=True)
    with torch.set_grad_enabled(grad):
        got = log_prob(lambda z, t: net(z).tanh(), z0, flow.time_grid(2), probe)
    assert not got.requires_grad and got.isfinite().all()
    assert z0.grad is None and net.weight.grad is None

# ---- Bounds: z ~ N(0, 1) and x | z ~ N(z, NOISE), so that x ~ N(0, 1 + NOISE) ------------------

NOISE = 0.25
X = torch.tensor(1.3, dtype=F64)
TRUTH = Normal(0.0, math.sqrt(1 + NOISE)).log_prob(X)


def weights(mean, var, K, n):
    """The three terms of log w for n repetitions of K draws from q = N(mean, var), (K, n) each."""
    z = mean + math.sqrt(var) * draw(K, n)
    return (log_normal(X.expand(K, n), z, math.log(NOISE)), log_normal(z),
            log_normal(z, mean, math.log(var)))


def test_bounds_are_tight_for_the_exact_posterior_and_else_short_by_the_kl():
    mean, var = X / (1 + NOISE), NOISE / (1 + NOISE)           # of the posterior
    for bound in (elbo, iwae):
        torch.testing.assert_close(bound(*weights(mean, var, K=5, n=7)), TRUTH.expand(7))
    got = elbo(*weights(0.6, 0.3, K=200_000, n=1)).item()
    gap = kl_divergence(Normal(0.6, math.sqrt(0.3)), Normal(mean, math.sqrt(var)))
    assert got == pytest.approx((TRUTH - gap).item(), abs=0.01)


def test_the_iwae_is_above_the_elbo_and_rises_with_k():
    terms = weights(1.04, 0.5, K=64, n=4000)
    assert (iwae(*terms) >= elbo(*terms)).all()
    means = [iwae(*(term.reshape(K, -1) for term in terms)).mean().item()
             for K in (1, 2, 4, 16, 64)]
    assert means[0] == pytest.approx(elbo(*terms).mean().item())         # K = 1 is the ELBO
    assert all(low < high for low, high in pairwise(means))
    assert TRUTH - 0.01 < means[-1] < TRUTH + 0.005
    log_w, zero = torch.tensor([-2000.0, -2001.0]), torch.zeros(2)       # w itself would be 0
    assert iwae(log_w, zero, zero).item() == pytest.approx(-2000 + math.log((1 + math.exp(-1)) / 2))


def test_perplexity_counts_texts_by_their_length():
    assert likelihood.perplexity([-6.0, -2.0], [1, 3]).item() == pytest.approx(math.exp(2.0))

# ---- Texts -------------------------------------------------------------------------------------

TEXT = "there is a red circle. the background is gray. there are two objects."
GRID = flow.time_grid(2)


def system(block_len, noise, *flags):
    """Fresh weights with some noise; without it the prior says v = 0, and p(z) is N(0, I)."""
    args = config.merge(config.parse([*TINY, "--block_len", str(block_len), "--text_latent_dim",
                                      "4", *flags]))
    cola = checkpoint.new_model(args, data.Scenes(0, (32, 32), 64))
    for part in cola.parts().values():
        for p in part.eval().parameters():
            p.data.add_(torch.randn_like(p), alpha=noise)
    return cola


def log_weights(model, ids, K, *more, **options):
    """The terms of K draws of a text, (K, blocks) each."""
    terms = likelihood.log_weights(model, [ids] * K, range(K), *more, **options)
    return [x.view(K, -1) for x in terms]


@pytest.mark.parametrize("t_min", (0.0, 0.2))
@pytest.mark.parametrize("block_len, known, patch, scale",
                         ((1, 0, 1, 1.0), (4, 6, 1, 1.0), (2, 3, 2, 3.0)))
def test_terms_where_the_prior_is_standard_normal(block_len, known, patch, scale, t_min):
    """Against the decoder's log softmax, N(z; 0, I) and N(z; mean, var) of all latents that are not
    known. These are encoded alone, as in training: the text VAE has blocks, in which they would
    otherwise know the response. With t_min, N(0, I) is divided by 1 - t_min, and q has its noise.
    """
    flags = f"--text_patch {patch} --vae_block_len {block_len}"
    model, K = system(block_len, 0.0, *flags.split()), 3
    model.text_vae.config.scaling_factor = scale
    for p in model.text_vae.parameters():
        p.data.add_(torch.randn_like(p), alpha=0.1)
    ids = model.ids(TEXT, end=True)
    n = len(ids) // patch
    px, pz, q = log_weights(model, ids, K, t_min + (1 - t_min) * GRID, known, seed=5)
    assert px.shape == pz.shape == q.shape == (K, n // block_len)
    filled = torch.tensor(model.fill(ids[:known * patch]))
    alone = [x[:known] for x in model.text_vae.encode(filled, [len(filled) // patch])]
    whole = model.text_vae.encode(torch.tensor(ids), [n])
    assert not known or (alone[0] - whole[0][:known]).abs().max() > 1e-3
    mean, logvar = (torch.cat([a, x[known:]]) for a, x in zip(alone, whole))
    torch.testing.assert_close(likelihood.posterior(model, [ids], known, t_min)[0], mean * scale)
    std = (logvar / 2).exp() * scale
    std[known:] = (std[known:] ** 2 + (t_min / (1 - t_min)) ** 2).sqrt()
    for k in range(K):
        noise = data.rng(5, k, data.Purpose.POSTERIOR).standard_normal((n, 4), "float32")
        z = mean * scale + std * torch.from_numpy(noise)
        of_tokens = F.log_softmax(model.text_vae.decode(z, [n]), -1)[range(n * patch), ids]
        expected = (of_tokens.view(n, patch).sum(1),
                    Normal(0.0, 1 / (1 - t_min)).log_prob(z).sum(-1),
                    Normal(mean * scale, std).log_prob(z).sum(-1))
        for got, want in zip((px, pz, q), expected):
            want = torch.where(torch.arange(n) < known, 0.0, want).view(-1, block_len).sum(-1)
            torch.testing.assert_close(got[k], want, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("t_min", (0.0, 0.2))
@pytest.mark.parametrize("block_len, cut", ((1, 8), (4, 6)))
def test_a_text_is_the_product_of_its_blocks(block_len, cut, t_min):
    """Whole blocks of a prefix have the same terms alone; given as known, they leave the terms of
    later blocks as they are. The rest of a block that is known in part depends on that part."""
    model, grid = system(block_len, 0.1), t_min + (1 - t_min) * GRID
    ids, blocks, later = model.ids(TEXT[:30], end=True), cut // block_len, -(-cut // block_len)
    whole = log_weights(model, ids, 2, grid)
    first = log_weights(model, ids[:blocks * block_len], 2, grid)
    for a, b in zip(whole, first):
        torch.testing.assert_close(a[:, :blocks], b, atol=1e-3, rtol=1e-4)
    if t_min == 0.0:                       # otherwise known latents bear less noise
        for a, c in zip(whole, log_weights(model, ids, 2, grid, cut)):
            torch.testing.assert_close(a[:, later:], c[:, later:], atol=1e-3, rtol=1e-4)
            assert not c[:, :blocks].any()
            assert later == blocks or (a - c)[:, blocks].abs().min() > 1e-2
    flat = log_weights(system(block_len, 0.0), ids, 2, grid)
    assert (whole[1] - flat[1]).abs().max() > 0.1


def test_an_answer_is_conditioned_as_in_training():
    """Against a pass without a cache over [P][I][C][N]; answers of two lengths at once."""
    model, rng = system(1, 0.1), np.random.default_rng(0)
    prompts = ["what color is the circle?", "how many?"]
    images = [rng.integers(0, 255, (32, 32, 3), np.uint8) for _ in prompts]
    texts = [model.ids(text, end=True) for text in ("red.", "two, no, three.")]
    together = likelihood.log_weights(model, texts, [3, 3], GRID, condition=(prompts, images))
    ends = np.cumsum([0, *map(len, texts)])
    for i, ids in enumerate(texts):
        n, p = len(ids), len(model.ids(prompts[i], end=False))
        mean, logvar = likelihood.posterior(model, [ids], 0, 0.0)
        noise = data.rng(0, 3, data.Purpose.POSTERIOR).standard_normal((n, 4), "float32")
        z = (mean + (logvar / 2).exp() * torch.from_numpy(noise)).detach()
        z_prompt, _ = model.encode_text([model.ids(prompts[i], end=False)])
        z_image = model.encode_images([images[i]]).detach()
        layout = pack([Sample(IT2T, p, (4, 4), clean=n, noisy=n, start=p)], 1)
        t_index, plan = (layout.segment == N).long(), make_plan(layout)

        def velocity(noisy, t):
            text = torch.cat([z_prompt.detach(), z, noisy.flatten(0, 1)])
            v, *_ = model.mmdit(text, z_image, torch.tensor([0.0, t]), t_index, layout, plan)
            return v[-n:].view_as(noisy)
        want = likelihood.log_prob(velocity, z.view(n, 1, -1), GRID)
        got = together[1][ends[i]:ends[i + 1]]
        torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-4)
    other = likelihood.log_weights(model, texts, [3, 3], GRID, condition=(prompts, images[::-1]))
    assert (other[1] - together[1]).abs().min() > 1e-5 and torch.equal(other[2], together[2])
    answers = ["red.", "two, no, three."]
    both = likelihood.log_answers(model, prompts[0], images[0], answers, 2, 0.0)
    for answer, value in zip(answers, both):
        ids = model.ids(answer, end=True)
        px, pz, q = likelihood.log_weights(model, [ids], [0], GRID, exact=False,
                                           condition=(prompts[:1], images[:1]))
        assert value == pytest.approx((px + pz - q).sum().item(), abs=1e-3)


def test_hutchinson_agrees_with_the_exact_divergence_in_the_mean():
    """Over 300 draws: with a dozen the mean is too uncertain, as few signs make up its noise."""
    model = system(1, 0.1)
    ids = model.ids(TEXT, end=True)[:4]
    estimate, exact = (log_weights(model, ids, 300, GRID, exact=exact)[1].sum(1)
                       for exact in (False, True))
    error = estimate - exact
    assert error.std() > 1e-3 and error.mean().abs() < 3 * error.std() / math.sqrt(len(error))


@pytest.mark.parametrize("mode", ("clean", "repaint"))
@pytest.mark.parametrize("extra", (0, 3))
def test_rows(extra, mode):
    """Differences are of whole blocks. The response's own score knows the prefix to its last latent
    if the model has seen clean latents beside noise."""
    model = replace(system(4, 0.1), first_block=mode)
    encode = model.tokenizer.encode
    cut = next(i for i in range(len(TEXT)) if len(encode(TEXT[:i])) == 8 + extra)
    before, after = len(encode(TEXT[:cut])), len(encode(TEXT[cut:]))
    score = likelihood.score(model, TEXT[:cut], TEXT[cut:], 3, 2)
    rows = {name: (value, tokens) for name, value, tokens in score}
    for bound in ("ELBO", "IWAE"):
        whole, first, rest = (rows[f"{part}, {bound}"]
                              for part in ("text", "prefix", "response | prefix"))
        assert rest[0] == pytest.approx(whole[0] - first[0])
        assert (whole[1], first[1], rest[1]) == (before + after + 1, 8, before + after - 7)
    assert rows["text, IWAE"][0] >= rows["text, ELBO"][0]
    own, tokens = rows["response | latents of the prefix"]
    terms = [value for name, (value, _) in rows.items() if name.startswith("  ")]
    assert len(terms) == 3 and sum(terms) == pytest.approx(own, abs=1e-3)
    same = extra == 0 or mode != "clean"
    assert tokens == (before + after - 7 if same else after + 1)
    assert (own == pytest.approx(rows["response | prefix, ELBO"][0], abs=1e-3)) == same


def test_command(tiny, tmp_path, monkeypatch, capsys):
    flags = "--steps 1 --samples 2 --device cpu --checkpoint".split()
    assert likelihood.main(["a red", " circle.", *flags, str(tiny / "ckpt.pt")]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 11 and "perplexity" in out
    picture = str(tmp_path / "a.png")
    Image.new("RGB", (40, 40), "red").save(picture)
    argv = ["what is it?", "a circle.", "--image", picture, *flags, str(tiny / "ckpt.pt")]
    assert likelihood.main(argv) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row[:34].strip() for row in rows[1:3]] == [
        f"response | image, prompt, {bound}" for bound in ("ELBO", "IWAE")]
    assert len(rows) == 6 and likelihood.main(["a", "b", "--image", "none.png", *argv[4:]]) == 2
    assert "none.png" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        likelihood.main(["a", "b", "--t_min", "1"])
    assert "--t_min" in capsys.readouterr().err

    def interrupt(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(likelihood, "open_model", interrupt)
    assert likelihood.main(["a", "b"]) == 130 and capsys.readouterr() == ("", "")
