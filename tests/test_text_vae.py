"""pytest tests/test_text_vae.py"""
import math

import pytest
import torch
import torch.nn.functional as F

import text_vae as tv
from experiments import robustness
from text_vae import TextVAE, TextVAEConfig


def make(**config) -> TextVAE:
    torch.manual_seed(0)
    small = dict(vocab_size=23, dim=24, ffn_dim=48, encoder_num_blocks=1, decoder_num_blocks=1,
                 latent_dim=8)
    vae = TextVAE(TextVAEConfig(**small | config))
    for p in vae.parameters():                             # zeros and ones could hide a mistake
        torch.nn.init.normal_(p, std=0.3)
    return vae


def tokens(vae, lengths, seed=1):
    g, c = torch.Generator().manual_seed(seed), vae.config
    ids = torch.randint(c.vocab_size, (sum(lengths) * c.patch_size,), generator=g)
    noise = torch.randn(sum(lengths), c.latent_dim, generator=g)
    return ids, noise, torch.rand(ids.shape, generator=g) < 0.3


@pytest.mark.parametrize("patch_size,block_len", [(1, 1), (2, 1), (1, 4), (2, 3)])
def test_no_leak(patch_size, block_len):
    """A later block and another text change not a bit, the own block and the past do; and a text
    of a pack is as alone."""
    vae = make(patch_size=patch_size, block_len=block_len, logsnr=None)
    lengths, at = [6, 9], 6 + 4                            # perturb latent 4 of the second text
    ids, z, _ = tokens(vae, lengths)
    other, moved = ids.clone(), z.clone()
    other[at * patch_size] = (ids[at * patch_size] + 1) % vae.config.vocab_size
    moved[at] += 1.0
    first = 6 + 4 // block_len * block_len                 # the first latent that may change
    for run, x, changed, start in ((lambda *x: vae.encode(*x)[0], ids, other, first),
                                   (lambda *x: vae.encode(*x)[1], ids, other, first),
                                   (vae.decode, z, moved, first * patch_size)):
        a, b, cut = run(x, lengths), run(changed, lengths), len(x) * 6 // 15
        assert torch.equal(a[:start], b[:start])
        assert not torch.equal(a[start], b[start]) and not torch.equal(a[-1], b[-1])
        torch.testing.assert_close(a, torch.cat([run(x[:cut], [6]), run(x[cut:], [9])]))


def test_fixed_logsnr():
    fixed, vae = 2.0, make(logsnr=2.0, scaling_factor=0.7, shifting_factor=0.1)
    ids, noise, _ = tokens(vae, [5, 4])
    mean, logvar = vae.encode(ids, [5, 4])
    torch.testing.assert_close(mean.square().mean(-1), torch.ones(9), atol=1e-3, rtol=0)
    torch.testing.assert_close(tv.logsnr(mean, logvar).item(), fixed, atol=1e-3, rtol=0)
    z = (mean + math.exp(-fixed / 2) * noise - 0.1) * 0.7
    torch.testing.assert_close(vae.scale_latents(mean, logvar, noise), z)
    torch.testing.assert_close(vae.scale_latents(mean), (mean - 0.1) * 0.7)


def test_gaussian_terms():
    """Against torch.distributions, and logsnr against its definition."""
    mean, logvar, mean_ref, logvar_ref = torch.randn(4, 6, 5)
    normal, divergence = torch.distributions.Normal, torch.distributions.kl_divergence
    q, r = normal(mean, (logvar / 2).exp()), normal(mean_ref, (logvar_ref / 2).exp())
    torch.testing.assert_close(tv.kl(mean, logvar), divergence(q, normal(0.0, 1.0)).sum(-1))
    torch.testing.assert_close(tv.kl(mean, logvar, mean_ref, logvar_ref), divergence(q, r).sum(-1))
    torch.testing.assert_close(tv.expected_log_q(logvar), -q.entropy().sum(-1))
    assert tv.logsnr(2 * torch.ones(3, 5), torch.zeros(3, 5)).item() == pytest.approx(math.log(4))


def test_loss_is_its_equation():
    """Eq. 3.16 and 3.18; a given posterior changes nothing; parts with a common count add up."""
    vae, lengths = make(logsnr=None, patch_size=2), [3, 5]
    ids, noise, mask = tokens(vae, lengths)
    weights = dict(beta=0.3, lambda_mask=0.7)
    loss, terms = tv.text_vae_loss(vae, ids, lengths, noise, mask, **weights)
    mean, logvar = vae.encode(ids, lengths)
    recon = F.cross_entropy(vae.decode(mean + (logvar / 2).exp() * noise, lengths), ids)
    m, lv = vae.encode(torch.where(mask, 23, ids), lengths)
    masked = F.cross_entropy(vae.decode(m + (lv / 2).exp() * noise, lengths)[mask], ids[mask])
    torch.testing.assert_close(terms["recon"], recon.detach())
    torch.testing.assert_close(terms["mask"], masked.detach())
    torch.testing.assert_close(loss, recon + 0.3 * tv.kl(mean, logvar).sum() / 16 + 0.7 * masked)
    stage2, _ = tv.text_vae_loss(vae, ids, lengths, noise, mask, **weights, learned_prior=True,
                                 posterior=(mean, logvar))
    rate = tv.expected_log_q(logvar).sum() / 16
    torch.testing.assert_close(stage2, recon + 0.3 * rate + 0.7 * masked)
    counts = dict(count=16, mask_count=int(mask.sum()))
    parts = [tv.text_vae_loss(vae, *part, **weights, **counts)[0] for part in (
        (ids[:6], [3], noise[:3], mask[:6]), (ids[6:], [5], noise[3:], mask[6:]))]
    torch.testing.assert_close(sum(parts), loss)


def test_gradients():
    """The encoder learns through the latent, the mask's row from L_mask; an empty mask gives 0."""
    vae = make(logsnr=None)
    ids, noise, mask = tokens(vae, [6, 6])
    for hidden in (None, mask):
        tv.text_vae_loss(vae, ids, [6, 6], noise, hidden)[0].backward()
        rows = vae.encoder.wte.weight.grad
        assert rows[ids[0]].any() and rows[23].any() == (hidden is not None)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in vae.parameters())
    for count in (None, 0):                                # of a step without a masked token
        _, terms = tv.text_vae_loss(vae, ids, [6, 6], noise, mask & False, mask_count=count)
        assert terms["mask"] == 0


@pytest.mark.parametrize("patch_size", [1, 2])
def test_overfits_one_batch(patch_size):
    torch.manual_seed(0)
    vae = TextVAE(TextVAEConfig(40, dim=48, ffn_dim=96, encoder_num_blocks=1, decoder_num_blocks=1,
                                patch_size=patch_size))
    lengths, optimizer = [12, 8, 4], torch.optim.AdamW(vae.parameters(), lr=1e-2)
    ids, _, mask = tokens(vae, lengths)
    for _ in range(80):
        loss, _ = tv.text_vae_loss(vae, ids, lengths, torch.randn(24, 16), mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    texts = ids.split([n * patch_size for n in lengths])
    curve = dict(robustness.accuracy_curve(vae, [text.tolist() for text in texts]))
    assert curve[0] == 1.0 and curve[100] > 0.95 and curve[1000] < 0.5


def test_refusals_and_no_text():
    with pytest.raises(ValueError, match="encoder_last_ln"):
        TextVAEConfig(23, encoder_last_ln=False)
    with pytest.raises(ValueError, match="got 7 tokens for 3 latents of 2"):
        make(patch_size=2).encode(torch.zeros(7, dtype=torch.long), [3])
    assert all(len(x) == 0 for x in make().encode(torch.zeros(0, dtype=torch.long), []))


def test_robustness_command(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(robustness, "TEXTS", 8)
    (tmp_path / "a.txt").write_text("the cat sat on the mat. " * 100)
    for flags in ([], ["--text", str(tmp_path / "a.txt")]):
        assert robustness.main(["--checkpoint", str(tiny / "ckpt.pt"), *flags]) == 0
        rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
        assert len(rows) == 21 and all(0 <= float(row[1]) <= 1 for row in rows)
    assert robustness.main(["--checkpoint", str(tmp_path / "no.pt")]) == 2
    assert "no.pt" in capsys.readouterr().err
