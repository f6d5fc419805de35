"""Text VAE: the release's numbers, RoPE, causality, losses against closed forms, files.
Run: pytest tests/test_text_vae.py"""
import json
import math
import struct
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import text_vae as tv
import train
from conftest import TINY

OFFICIAL = Path(__file__).parent / "official_tiny"


@pytest.fixture
def make():
    def build(seed=0, **config):
        torch.manual_seed(seed)
        config = dict(vocab_size=23, dim=24, ffn_dim=48, num_heads=3, encoder_num_blocks=1,
                      decoder_num_blocks=1, latent_dim=8) | config
        vae = tv.TextVAE(**config)
        for p in vae.parameters():                           # zeros and ones could hide a mistake
            torch.nn.init.normal_(p, std=0.3)
        return vae
    return build


def tokens(vae, lengths, seed=1):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(vae.vocab_size, (sum(lengths) * vae.patch_size,), generator=g)
    noise = torch.randn(sum(lengths), vae.latent_dim, generator=g)
    mask = torch.rand(ids.shape, generator=g) < 0.3
    return ids, noise, mask


@pytest.mark.parametrize("patch", ["p1", "p2"])
def test_release_numbers(patch):
    """Every text VAE tensor of the fixtures, sample by sample and packed."""
    vae = tv.load_official(OFFICIAL / patch / "cola_vae")
    want = tv.read_safetensors(OFFICIAL / patch / "expected.safetensors")
    lengths = [len(want["mean_0"]), len(want["mean_1"])]
    means, logvars = [], []
    for i in (0, 1):
        mean, logvar = vae.encode(want[f"ids_{i}"], [lengths[i]])
        torch.testing.assert_close(mean, want[f"mean_{i}"], atol=1e-4, rtol=0)
        torch.testing.assert_close(logvar, want[f"logvar_{i}"], atol=1e-4, rtol=0)
        means.append(mean), logvars.append(logvar)
    packed = vae.encode(torch.cat([want["ids_0"], want["ids_1"]]), lengths)
    torch.testing.assert_close(packed, (torch.cat(means), torch.cat(logvars)), atol=1e-5, rtol=0)
    z = want["decode_latents"]
    torch.testing.assert_close(vae.latents(packed[0]), z, atol=1e-4, rtol=0)         # the release's scaling
    torch.testing.assert_close(vae.decode(z, lengths), want["decode_logits"], atol=2e-4, rtol=0)


def test_rope_is_complex_rotation():
    x, position = torch.randn(7, 3, 8), torch.arange(7) + 11
    angle = position[:, None] * 10000.0 ** (-torch.arange(4) / 4)
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones(7, 4), angle)[:, None]
    got = tv.rotate(x, tv.rope_table(position, 8, 10000.0))
    torch.testing.assert_close(got, torch.cat([turned.real, turned.imag], -1))


@pytest.mark.parametrize("patch_size,block_len", [(1, 1), (2, 1), (1, 4), (2, 3)])
def test_no_leak(make, patch_size, block_len):
    """A later block, and another sample, change nothing, bit for bit; the own block and the past do."""
    vae = make(patch_size=patch_size, block_len=block_len)
    lengths, at = [6, 9], 6 + 4                              # perturb latent 4 of the second sample
    ids, z, _ = tokens(vae, lengths)
    first = 6 + 4 // block_len * block_len                   # first latent that may change
    other = ids.clone()
    other[at * patch_size] = (ids[at * patch_size] + 1) % vae.vocab_size
    for a, b in zip(vae.encode(ids, lengths), vae.encode(other, lengths)):
        assert torch.equal(a[:first], b[:first])
    assert not torch.equal(vae.encode(ids, lengths)[0][first], vae.encode(other, lengths)[0][first])
    moved = z.clone()
    moved[at] += 1.0
    a, b = vae.decode(z, lengths), vae.decode(moved, lengths)
    assert torch.equal(a[:first * patch_size], b[:first * patch_size])
    assert not torch.equal(a[first * patch_size], b[first * patch_size])
    assert not torch.equal(a[-1], b[-1])


def test_patch_order(make):
    """Conv1d over the tokens of a patch, and unpatch with the place in the patch running fastest."""
    vae = make(patch_size=2, encoder_num_blocks=0, decoder_num_blocks=0)
    ids, z, _ = tokens(vae, [3, 2])
    x = vae.encoder.patch_embedder(vae.encoder.wte(ids).T[None])[0].T                    # (L, D)
    mean, logvar = vae.encoder.final_layer(x).chunk(2, -1)
    torch.testing.assert_close(vae.encode(ids, [3, 2])[0], F.layer_norm(mean, (8,), eps=1e-6))
    out = vae.decoder.unpatch_layer(vae.decoder.in_layer(z))                         # channel c * patch + p
    by_hand = torch.stack([out[i // 2, i % 2::2] for i in range(10)])
    logits = vae.decoder.final_layer(vae.decoder.final_norm(by_hand))
    torch.testing.assert_close(vae.decode(z, [3, 2]), logits)


@pytest.mark.parametrize("fixed", [1.0, 2.0])
def test_fixed_logsnr(make, fixed):
    vae = make(vae_logsnr=fixed)
    ids, noise, _ = tokens(vae, [5, 4])
    mean, logvar = vae.encode(ids, [5, 4])
    torch.testing.assert_close(mean.square().mean(-1), torch.ones(9), atol=1e-3, rtol=0)
    torch.testing.assert_close(tv.logsnr(mean, logvar).item(), fixed, atol=1e-3, rtol=0)
    torch.testing.assert_close(vae.latents(mean, logvar, noise), mean + math.exp(-fixed / 2) * noise)
    with pytest.raises(ValueError, match="encoder_last_ln"):
        make(vae_logsnr=fixed, encoder_last_ln=False)


def test_gaussian_terms():
    """kl and E log q against torch.distributions, logsnr against its definition."""
    mean, logvar, mean_ref, logvar_ref = torch.randn(4, 6, 5)
    normal = torch.distributions.Normal
    q, r = normal(mean, (logvar / 2).exp()), normal(mean_ref, (logvar_ref / 2).exp())
    divergence = torch.distributions.kl_divergence
    torch.testing.assert_close(tv.kl(mean, logvar), divergence(q, normal(0.0, 1.0)).sum(-1))
    torch.testing.assert_close(tv.kl(mean, logvar, mean_ref, logvar_ref), divergence(q, r).sum(-1))
    torch.testing.assert_close(tv.kl(mean, logvar, mean, logvar), torch.zeros(6), atol=1e-6, rtol=0)
    torch.testing.assert_close(tv.expected_log_q(logvar), -q.entropy().sum(-1))
    torch.testing.assert_close(tv.logsnr(2 * torch.ones(3, 5), torch.zeros(3, 5)).item(), math.log(4.0))


def test_loss_is_its_equation(make):
    """Eq. 3.16 and 3.18, written out; a given posterior changes nothing; parts with a common count add up."""
    vae, lengths = make(vae_logsnr=None, patch_size=2), [3, 5]
    ids, noise, mask = tokens(vae, lengths)
    loss, terms = tv.text_vae_loss(vae, ids, lengths, noise, mask, beta=0.3, lambda_mask=0.7)
    mean, logvar = vae.encode(ids, lengths)
    z = mean + (logvar / 2).exp() * noise
    recon = F.cross_entropy(vae.decode(z, lengths), ids)
    hidden = torch.where(mask, vae.vocab_size, ids)
    m, lv = vae.encode(hidden, lengths)
    masked = F.cross_entropy(vae.decode(m + (lv / 2).exp() * noise, lengths)[mask], ids[mask])
    torch.testing.assert_close(terms["recon"], recon.detach())
    torch.testing.assert_close(terms["mask"], masked.detach())
    torch.testing.assert_close(loss, recon + 0.3 * tv.kl(mean, logvar).sum() / 16 + 0.7 * masked)
    stage2, _ = tv.text_vae_loss(vae, ids, lengths, noise, mask, beta=0.3, lambda_mask=0.7,
                                 learned_prior=True, posterior=(mean, logvar))
    torch.testing.assert_close(stage2, recon + 0.3 * tv.expected_log_q(logvar).sum() / 16 + 0.7 * masked)
    common = dict(beta=0.3, lambda_mask=0.7, count=16, mask_count=int(mask.sum()))
    parts = [tv.text_vae_loss(vae, ids[a:b], [n], noise[a // 2:b // 2], mask[a:b], **common)[0]
             for a, b, n in ((0, 6, 3), (6, 16, 5))]
    torch.testing.assert_close(sum(parts), loss)


def test_gradients(make):
    """The encoder learns through the latent, the mask row from L_mask alone; an empty mask is no NaN."""
    vae = make(vae_logsnr=None)
    ids, noise, mask = tokens(vae, [6, 6])
    tv.text_vae_loss(vae, ids, [6, 6], noise, beta=0.1)[0].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in vae.parameters())
    assert vae.encoder.wte.weight.grad[vae.mask_id].abs().max() == 0
    assert vae.encoder.wte.weight.grad[ids[0]].abs().max() > 0
    tv.text_vae_loss(vae, ids, [6, 6], noise, mask, beta=0.1)[0].backward()
    assert vae.encoder.wte.weight.grad[vae.mask_id].abs().max() > 0
    assert tv.text_vae_loss(vae, ids, [6, 6], noise, torch.zeros_like(mask))[1]["mask"] == 0


@pytest.mark.parametrize("patch_size", [1, 2])
def test_overfits_one_batch(patch_size):
    torch.manual_seed(0)
    size = dict(dim=48, ffn_dim=96, encoder_num_blocks=1, decoder_num_blocks=1)
    vae = tv.TextVAE(40, patch_size=patch_size, **size)
    lengths = [12, 8, 4]
    ids, _, mask = tokens(vae, lengths)
    optimizer, plan = torch.optim.AdamW(vae.parameters(), lr=1e-2), vae.make_plan(lengths)
    for _ in range(80):
        noise = torch.randn(24, 16)
        loss, _ = tv.text_vae_loss(vae, ids, lengths, noise, mask, plan=plan)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    clean, noisy, lost = (tv.noised_accuracy(vae, ids, lengths, noise, t) for t in (0.0, 0.1, 1.0))
    assert clean == 1.0 and noisy > 0.95 and lost < 0.5


def test_wrong_token_count(make):
    with pytest.raises(ValueError, match="got 7 tokens for 3 latents of 2"):
        make(patch_size=2).encode(torch.zeros(7, dtype=torch.long), [3])
    with pytest.raises(ValueError, match="multiple of 6"):
        make(dim=20)


# ---- files ----

def test_safetensors_round_trip(tmp_path):
    tensors = {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3), "flag": torch.tensor([True, False]),
               "half": torch.randn(3, 5).bfloat16(), "turned": torch.randn(4, 3).T, "i": torch.arange(5)}
    path = tmp_path / "a.safetensors"
    tv.write_safetensors(path, tensors)
    got = tv.read_safetensors(path)
    assert got.keys() == tensors.keys() and all(torch.equal(got[k], v) and got[k].dtype == v.dtype
                                                for k, v in tensors.items())
    assert all(v.data_ptr() % v.itemsize == 0 for v in got.values())
    before = path.read_bytes()
    got["i"] += 1                                            # a private mapping: the file stays as it is
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_loads_without_copy():
    """The parameters lie in the mapped file, and can be trained."""
    tensors = tv.read_safetensors(OFFICIAL / "p1" / "cola_vae")
    spans = sorted((v.data_ptr(), v.nbytes) for v in tensors.values())
    assert all(a + n == b for (a, n), (b, _) in zip(spans, spans[1:]))               # one gapless buffer
    vae = tv.load_official(OFFICIAL / "p1" / "cola_vae")
    ours = sorted((v.data_ptr(), v.nbytes) for v in vae.parameters())
    assert all(a + n == b for (a, n), (b, _) in zip(ours, ours[1:]))
    ids, noise, _ = tokens(vae, [8])
    tv.text_vae_loss(vae, ids, [8], noise)[0].backward()
    torch.optim.SGD(vae.parameters(), lr=0.1).step()
    assert not torch.equal(vae.decoder.in_layer.weight, tensors["decoder.in_layer.weight"])


def test_shards(tmp_path):
    tensors = tv.read_safetensors(OFFICIAL / "p2" / "cola_vae")
    where = {name: f"model-{i % 2 + 1}-of-2.safetensors" for i, name in enumerate(tensors)}
    for shard in set(where.values()):
        tv.write_safetensors(tmp_path / shard, {k: tensors[k] for k in where if where[k] == shard})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    (tmp_path / "config.json").write_bytes((OFFICIAL / "p2" / "cola_vae" / "config.json").read_bytes())
    got = tv.load_official(tmp_path).state_dict()
    assert got.keys() == tensors.keys() and all(torch.equal(got[k], v) for k, v in tensors.items())
    for bad, message in (({"a": "../x.safetensors"}, "beside the index"), ({"a": 3}, "beside the index"),
                         ({"nowhere": where[next(iter(where))]}, "nowhere is not in")):
        index.write_text(json.dumps({"weight_map": bad}))
        with pytest.raises(ValueError, match=message):
            tv.read_safetensors(tmp_path)


def entry(shape, first, last, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}


@pytest.mark.parametrize("header,message", [
    ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, "b F32"),                      # overlap
    ({"a": entry([2], 0, 8)}, "4 bytes after the last tensor"),
    ({"a": entry([2], 0, 8), "b": entry([2], 8, 16)}, "truncated or damaged"),       # past the end
    ({"a": entry([3], 4, 16)}, "truncated or damaged"),                              # gap
    ({"a": entry([4], 0, 12)}, "expected 16 bytes"),
    ({"a": entry([3], 0, 12, "F8")}, "dtype F8"),
    ({"a": entry([-3], 0, -12)}, "lengths of a tensor"),
    ({"a": entry([1.5, 2], 0, 12)}, "lengths of a tensor"),
    ({"a": {"dtype": "F32"}}, "not a table"),
    ({"a": {"dtype": "F32", "shape": 3, "data_offsets": [0, 12]}}, "not a table"),
    ([1], "not a table"),
])
def test_damaged_safetensors(tmp_path, header, message):
    text = json.dumps(header).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(12))
    with pytest.raises(ValueError, match=message) as caught:
        tv.read_safetensors(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content,message", [(b"", "too short"), (b"\xff" * 64, "header ends"),
                                             (struct.pack("<Q", 4) + b"\xff{}}", "not a table")])
def test_not_safetensors(tmp_path, content, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        tv.read_safetensors(tmp_path)
    with pytest.raises(FileNotFoundError, match="expected model.safetensors"):
        tv.read_safetensors(tmp_path / "nowhere")


def test_every_truncation_is_noticed(tmp_path):
    whole, path = (OFFICIAL / "p1" / "expected.safetensors").read_bytes(), tmp_path / "a.safetensors"
    for size in range(0, len(whole), 97):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError):
            tv.read_safetensors(path)


@pytest.mark.parametrize("fixed", [None, 1.5])
def test_save_official(tmp_path, make, fixed):
    vae = make(vae_logsnr=fixed, patch_size=2, block_len=3, scaling_factor=0.7, shifting_factor=0.1)
    ids, noise, _ = tokens(vae, [4, 5])
    tv.save_official(vae, tmp_path / "cola_vae")
    again = tv.load_official(tmp_path / "cola_vae")
    for a, b in zip(vae.encode(ids, [4, 5]), again.encode(ids, [4, 5])):
        torch.testing.assert_close(a, b)
    assert torch.equal(vae.decode(noise, [4, 5]), again.decode(noise, [4, 5]))


@pytest.mark.parametrize("change,message", [
    ({"act": "gelu"}, "act is 'gelu'"), ({"post_norm": False}, "post_norm is False"),
    ({"latent_dim": 9}, "its config.json asks for"), ({"dim": None}, "no dim")])
def test_official_config_is_checked(tmp_path, change, message):
    source = OFFICIAL / "p1" / "cola_vae"
    config = json.loads((source / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    (tmp_path / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=message) as caught:
        tv.load_official(tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="cola_vae folder"):
        tv.load_official(tmp_path / "nowhere")


def test_robustness_command(tiny, tmp_path, monkeypatch, capsys):
    """A row for every 50 of 1000 t, on stories and on a file; a checkpoint of stage 1 is enough."""
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("the cat sat on the mat. " * 500)
    assert train.main([*TINY, "--stage", "text_vae", "--text_vae_steps", "200", "--text_vae_batch", "32", "--eval_samples",
                       "0", "--out_dir", "stage1"]) == 0
    capsys.readouterr()
    monkeypatch.setattr(tv.robustness, "__defaults__", (32, 128))           # texts, tokens
    for flags in (["stage1/ckpt.pt"], [str(tiny / "ckpt.pt"), "--text", "a.txt"]):
        assert tv.main(["--checkpoint", *flags]) == 0
        rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:23]]
        assert [int(row[0]) for row in rows] == list(range(0, 1001, 50))
        shares = [float(row[1]) for row in rows]
        assert all(0 <= share <= 1 for share in shares) and Image.open("robustness.png").size == (440, 320)
        if flags[0] == "stage1/ckpt.pt":
            assert shares[0] > 0.9 and shares[2] > 0.8 and shares[10] < shares[0] - 0.02 and shares[-1] < 0.3
    for argv in (["--checkpoint", "no.pt"], ["--checkpoint", str(tiny / "ckpt.pt"), "--text", "no.txt"]):
        assert tv.main(argv) == 2
        assert argv[-1] in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit_:
        tv.main(["--text", "a.txt"])
    assert exit_.value.code == 2 and "--checkpoint" in capsys.readouterr().err
