"""pytest tests/test_text_vae.py"""
import math

import pytest
import torch
import torch.nn.functional as F

import text_vae as tv
from experiments.robustness import accuracy_curve
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


def test_rope_is_complex_rotation():
    x, position = torch.randn(7, 3, 8), torch.arange(7) + 11
    angle = position[:, None] * 10000.0 ** (-torch.arange(4) / 4)
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones(7, 4), angle)[:, None]
    got = tv.rotate(x, tv.rope_table(position, 8, 10000.0))
    torch.testing.assert_close(got, torch.cat([turned.real, turned.imag], -1))


@pytest.mark.parametrize("patch_size,block_len", [(1, 1), (2, 1), (1, 4), (2, 3)])
def test_no_leak(patch_size, block_len):
    """A later block and another text change nothing, not a bit; the own block and the past do."""
    vae = make(patch_size=patch_size, block_len=block_len)
    lengths, at = [6, 9], 6 + 4                            # perturb latent 4 of the second text
    ids, z, _ = tokens(vae, lengths)
    first = 6 + 4 // block_len * block_len                 # the first latent that may change
    other = ids.clone()
    other[at * patch_size] = (ids[at * patch_size] + 1) % vae.config.vocab_size
    for a, b in zip(vae.encode(ids, lengths), vae.encode(other, lengths)):
        assert torch.equal(a[:first], b[:first])
    assert not torch.equal(vae.encode(ids, lengths)[0][first], vae.encode(other, lengths)[0][first])
    moved = z.clone()
    moved[at] += 1.0
    a, b = vae.decode(z, lengths), vae.decode(moved, lengths)
    assert torch.equal(a[:first * patch_size], b[:first * patch_size])
    assert not torch.equal(a[first * patch_size], b[first * patch_size])
    assert not torch.equal(a[-1], b[-1])


def test_packing_changes_nothing():
    vae, lengths = make(patch_size=2, block_len=3), [4, 7]
    ids, z, _ = tokens(vae, lengths)
    alone = [vae.encode(ids[:8], [4])[0], vae.encode(ids[8:], [7])[0]]
    torch.testing.assert_close(vae.encode(ids, lengths)[0], torch.cat(alone))
    alone = [vae.decode(z[:4], [4]), vae.decode(z[4:], [7])]
    torch.testing.assert_close(vae.decode(z, lengths), torch.cat(alone))


def test_patch_order():
    """Conv1d over the tokens of a patch, and unpatching puts channel c of token p at 2 c + p."""
    vae = make(patch_size=2, encoder_num_blocks=0, decoder_num_blocks=0)
    ids, z, _ = tokens(vae, [3, 2])
    x = vae.encoder.patch_embedder(vae.encoder.wte(ids).T[None])[0].T                    # (L, D)
    mean = vae.encoder.final_layer(x).chunk(2, -1)[0]
    torch.testing.assert_close(vae.encode(ids, [3, 2])[0], F.layer_norm(mean, (8,), eps=1e-6))
    out = vae.decoder.unpatch_layer(vae.decoder.in_layer(z))                # channel c * patch + p
    by_hand = torch.stack([out[i // 2, i % 2::2] for i in range(10)])
    logits = vae.decoder.final_layer(vae.decoder.final_norm(by_hand))
    torch.testing.assert_close(vae.decode(z, [3, 2]), logits)


@pytest.mark.parametrize("fixed", [1.0, 2.0])
def test_fixed_logsnr(fixed):
    vae = make(logsnr=fixed, scaling_factor=0.7, shifting_factor=0.1)
    ids, noise, _ = tokens(vae, [5, 4])
    mean, logvar = vae.encode(ids, [5, 4])
    torch.testing.assert_close(mean.square().mean(-1), torch.ones(9), atol=1e-3, rtol=0)
    torch.testing.assert_close(tv.logsnr(mean, logvar).item(), fixed, atol=1e-3, rtol=0)
    z = (mean + math.exp(-fixed / 2) * noise - 0.1) * 0.7
    torch.testing.assert_close(vae.scale_latents(mean, logvar, noise), z)
    torch.testing.assert_close(vae.scale_latents(mean), (mean - 0.1) * 0.7)


def test_gaussian_terms():
    """kl and E log q against torch.distributions, logsnr against its definition."""
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
    loss, terms = tv.text_vae_loss(vae, ids, lengths, noise, mask, beta=0.3, lambda_mask=0.7)
    mean, logvar = vae.encode(ids, lengths)
    recon = F.cross_entropy(vae.decode(mean + (logvar / 2).exp() * noise, lengths), ids)
    m, lv = vae.encode(torch.where(mask, 23, ids), lengths)
    masked = F.cross_entropy(vae.decode(m + (lv / 2).exp() * noise, lengths)[mask], ids[mask])
    torch.testing.assert_close(terms["recon"], recon.detach())
    torch.testing.assert_close(terms["mask"], masked.detach())
    torch.testing.assert_close(loss, recon + 0.3 * tv.kl(mean, logvar).sum() / 16 + 0.7 * masked)
    stage2, _ = tv.text_vae_loss(vae, ids, lengths, noise, mask, beta=0.3, lambda_mask=0.7,
                                 learned_prior=True, posterior=(mean, logvar))
    rate = tv.expected_log_q(logvar).sum() / 16
    torch.testing.assert_close(stage2, recon + 0.3 * rate + 0.7 * masked)
    common = dict(beta=0.3, lambda_mask=0.7, count=16, mask_count=int(mask.sum()))
    parts = [tv.text_vae_loss(vae, ids[a:b], [n], noise[a // 2:b // 2], mask[a:b], **common)[0]
             for a, b, n in ((0, 6, 3), (6, 16, 5))]
    torch.testing.assert_close(sum(parts), loss)


def test_gradients():
    """The encoder learns through the latent, the mask's row from L_mask; an empty mask gives 0."""
    vae = make(logsnr=None)
    ids, noise, mask = tokens(vae, [6, 6])
    tv.text_vae_loss(vae, ids, [6, 6], noise, beta=0.1)[0].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in vae.parameters())
    rows = vae.encoder.wte.weight.grad
    assert not rows[23].any() and rows[ids[0]].any()
    tv.text_vae_loss(vae, ids, [6, 6], noise, mask, beta=0.1)[0].backward()
    assert rows[23].any()
    assert tv.text_vae_loss(vae, ids, [6, 6], noise, torch.zeros_like(mask))[1]["mask"] == 0


@pytest.mark.parametrize("patch_size", [1, 2])
def test_overfits_one_batch(patch_size):
    torch.manual_seed(0)
    vae = TextVAE(TextVAEConfig(40, dim=48, ffn_dim=96, encoder_num_blocks=1, decoder_num_blocks=1,
                                patch_size=patch_size))
    lengths = [12, 8, 4]
    ids, noise, mask = tokens(vae, lengths)
    optimizer, plan = torch.optim.AdamW(vae.parameters(), lr=1e-2), vae.make_plan(lengths)
    for _ in range(80):
        loss, _ = tv.text_vae_loss(vae, ids, lengths, torch.randn(24, 16), mask, plan=plan)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    clean, noisy, lost = (tv.noised_accuracy(vae, ids, lengths, noise, t) for t in (0.0, 0.1, 1.0))
    assert clean == 1.0 and noisy > 0.95 and lost < 0.5
    curve = accuracy_curve(vae, [x.tolist() for x in ids.split([n * patch_size for n in lengths])])
    assert [t for t, _ in curve] == list(range(0, 1001, 50))
    assert curve[0][1] == 1.0 and curve[-1][1] < 0.5


@pytest.mark.parametrize("config,words", [
    (dict(dim=20), "multiple of 6"), (dict(ffn_dim=47), "even"), (dict(patch_size=0), "at least 1"),
    (dict(encoder_last_ln=False), "encoder_last_ln")])
def test_refuses_bad_configs(config, words):
    with pytest.raises(ValueError, match=words):
        TextVAEConfig(23, **config)


def test_refuses_a_wrong_number_of_tokens():
    with pytest.raises(ValueError, match="got 7 tokens for 3 latents of 2"):
        make(patch_size=2).encode(torch.zeros(7, dtype=torch.long), [3])
    assert all(len(x) == 0 for x in make().encode(torch.zeros(0, dtype=torch.long), []))
