"""pytest tests/test_release.py"""
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import regex
import tiktoken
import torch
import torch.nn as nn

import cola
import masks
import release
from cola import Cola, Tokenizer
from cuda_attention import make_plan
from image_vae import ImageVAE, ImageVAEConfig
from masks import T2T, Sample, pack
from mmdit import Cache, MMDiT, MMDiTConfig
from text_vae import TextVAE, TextVAEConfig

OFFICIAL = Path(__file__).parent / "official_tiny"
TEXT = "there is a red circle. it's 12345 m wide,\n  naïve 漢字!  the end"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["there is a red circle. it is above a blue square.", TEXT] * 3, 400)


def system(tokenizer, logsnr=None, as_released=True) -> Cola:
    """A system of random weights, none of them 0."""
    torch.manual_seed(0)
    vae = TextVAE(TextVAEConfig(tokenizer.n_vocab, 24, 48, 2, 1, 2, 8, patch_size=2, block_len=2,
                                logsnr=logsnr, scaling_factor=0.7, shifting_factor=0.1))
    mmdit = MMDiT(MMDiTConfig(8, 4, width=16, heads=2, head_dim=8, layers=2, dual_layers=1,
                              emb_dim=16, rope_dim=6, as_released=as_released))
    for p in (*vae.parameters(), *mmdit.parameters()):
        p.data.normal_(std=0.3)
    image_vae = ImageVAE(ImageVAEConfig(4, width=8, blocks=1))
    return Cola(vae.eval(), image_vae, mmdit.eval(), tokenizer, 4, (16, 16), 0.0)


@pytest.fixture
def saved(tokenizer, tmp_path):
    """A system and its folder."""
    model = system(tokenizer)
    release.save(model, tmp_path / "r")
    return model, tmp_path / "r"


def close(a, b, atol=1e-4):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def refused(match, function, *args):
    """The error is one line."""
    with pytest.raises((ValueError, FileNotFoundError), match=f"^.*{match}.*$"):
        function(*args)

# ---- The numbers of the public code ------------------------------------------------------------

@pytest.mark.parametrize("patch", ("p1", "p2"))
@torch.no_grad()
def test_a_public_release(patch, tmp_path):
    """Posteriors and logits of the text VAE; velocities of the prior, in training and cached. Then
    every tensor and setting is written back."""
    folder = OFFICIAL / patch
    vae = release.load_text_vae(folder / "cola_vae")
    model, bl = release.load_mmdit(folder / "cola_dit")
    want = release.read_safetensors(folder / "expected.safetensors")
    lengths = [len(want["mean_0"]), len(want["mean_1"])]
    for i in (0, 1):
        mean, logvar = vae.encode(want[f"ids_{i}"], [lengths[i]])
        close(mean, want[f"mean_{i}"])
        close(logvar, want[f"logvar_{i}"])
    packed, _ = vae.encode(torch.cat([want["ids_0"], want["ids_1"]]), lengths)
    close(vae.scale_latents(packed), want["decode_latents"])
    close(vae.decode(want["decode_latents"], lengths), want["decode_logits"], atol=2e-4)

    layout = pack([Sample(T2T, clean=int(n), noisy=int(n)) for n in want["train_len"]], bl)
    assert layout.col.tolist() == want["train_pos"].tolist()
    t, t_index = torch.unique(want["train_timestep"] / 1000, return_inverse=True)
    v, none, _ = model(want["train_x"], None, t, t_index, layout, make_plan(layout))
    close(v, want["train_v"])
    assert none is None

    n, m = len(want["gen_prefix"]), len(want["gen_z"])
    prefix, block = pack([Sample(T2T, clean=n)], bl), pack([Sample(T2T, noisy=m, first=n)], bl)
    cache, zeros, t = Cache(), torch.zeros(n + m, dtype=torch.long), torch.tensor([0.7])
    model(want["gen_prefix"], None, torch.zeros(1), zeros[:n], prefix, make_plan(prefix), cache,
          commit=True)
    alone, after = make_plan(block), make_plan(block, masks.concat(prefix, block))
    z, zeros = want["gen_z"], zeros[n:]
    close(model(z, None, t, zeros, block, after, cache)[0], want["gen_v_cond"])
    close(model(z, None, t, zeros, block, alone)[0], want["gen_v_uncond"])

    small = Tokenizer([b"a"], ".", {"<|endoftext|>": 1})
    release.save(Cola(vae, None, model, small, bl, (0, 0), 0.0), tmp_path / "r")
    for part in ("cola_vae", "cola_dit"):
        want, got = (release.read_weights(x / part) for x in (folder, tmp_path / "r/cola_dlm"))
        assert got.keys() == want.keys()
        for name, x in want.items():                        # freqs are computed anew
            close(got[name], x, atol=1e-7 if name.endswith("freqs") else 0)
        want, got = (json.loads((x / part / "config.json").read_text())
                     for x in (folder, tmp_path / "r/cola_dlm"))
        assert got.items() <= want.items()

# ---- Round trips -------------------------------------------------------------------------------

@torch.no_grad()
def outputs(model: Cola) -> list[torch.Tensor]:
    """Posterior, logits and velocity of one text, at its length in latents."""
    ids = model.ids(TEXT, end=True)
    n = len(ids) // 2
    mean, logvar = model.text_vae.encode(torch.tensor(ids), [n])
    layout = pack([Sample(T2T, clean=n, noisy=n)], model.block_len)
    z, t_index = torch.cat([mean, mean + 1]), (layout.segment == masks.N).long()
    image = None if model.image_vae is None else torch.zeros(0, 4)
    v = model.mmdit(z, image, torch.tensor([0.0, 0.6]), t_index, layout, make_plan(layout))[0]
    return [mean, logvar, model.text_vae.decode(mean, [n]), v]


@pytest.mark.parametrize("logsnr", (None, 1.5))             # 1.5 becomes a constant of the head
def test_a_saved_system_computes_the_same(tokenizer, tmp_path, logsnr):
    model = system(tokenizer, logsnr=logsnr)
    release.save(model, tmp_path / "r")
    again = release.load(tmp_path / "r")
    assert again.block_len == 4 and again.tasks == ("t2t",) and again.image_vae is None
    assert again.text_vae.config.logsnr is None
    assert again.tokenizer.to_dict() == model.tokenizer.to_dict()
    assert not again.mmdit.training and not again.text_vae.training
    for a, b in zip(outputs(model), outputs(again)):
        close(a, b, atol=1e-5)
    path = tmp_path / "r/cola_dlm/cola_vae/model.safetensors"
    before = path.read_bytes()
    for p in again.text_vae.parameters():
        p.data += 1
    assert path.read_bytes() == before                      # the mapping is private


def test_shards_of_every_type_become_float32(tmp_path):
    want = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        tensors = torch.randn(3, 4), torch.randn(4, 3).T, torch.tensor(2.5)
        shard = {f"{dtype} {i}": x.to(dtype) for i, x in enumerate(tensors)}
        release.write_safetensors(tmp_path / f"{dtype}.safetensors", shard)
        want |= {name: x.float() for name, x in shard.items()}
    torch.testing.assert_close(release.read_weights(tmp_path), want, atol=0, rtol=0)


def test_a_fresh_image_side(saved):
    """The text side is as released; the image side starts as in a new model."""
    text = release.load(saved[1]).mmdit.state_dict()
    for dual_layers in (0, 2):
        model = release.load(saved[1], 4, dual_layers).mmdit
        assert len(model.image_blocks) == dual_layers
        for name, p in model.named_parameters():
            if not name.startswith("image_"):
                assert torch.equal(p, text[name]), name
            elif name.endswith(("proj_qkv.weight", "mlp.proj_in.weight", "image_in.weight")):
                assert 0.01 < p.std() < 1, name
        assert (model.image_norm.weight == 1).all() and not model.image_out.weight.any()


def test_command_and_flags(saved, tmp_path, capsys):
    model, path = saved[0], tmp_path / "ckpt.pt"
    assert release.flags(saved[1]) == {
        "text_latent_dim": 8, "text_patch": 2, "text_vae_width": 24, "text_vae_layers": 1,
        "text_vae_heads": 2, "vae_block_len": 2, "vae_logsnr": "learned", "width": 16, "layers": 2,
        "heads": 2, "block_len": 4, "vocab_size": model.tokenizer.n_vocab, "tokenizer": "",
        "as_released": True}
    state = nn.ModuleDict(model.parts()).state_dict()
    torch.save({"format": cola.FORMAT, "config": model.config(), "model": state, "ema": {},
                "tokenizer": model.tokenizer.to_dict(), "progress": {"mmdit": 1},
                "args": {"cfg_drop": 0.1, "cfg_drop_text": 0.0}}, path)
    argv = [str(tmp_path / "out"), "--checkpoint", str(path)]
    assert release.main(argv) == 0 and "cola_dlm/cola_vae" in capsys.readouterr().out
    for part in ("cola_dlm/cola_vae", "cola_dlm/cola_dit"):
        assert (tmp_path / "out" / part / "model.safetensors").read_bytes() == \
            (saved[1] / part / "model.safetensors").read_bytes()
    for argv, word in ((argv, "exists"), ([str(tmp_path / "a"), "--checkpoint", "no.pt"], "no.pt")):
        assert release.main(argv) == 2
        error = capsys.readouterr().err
        assert error.startswith("release.py: ") and word in error and error.count("\n") == 1


def test_layouts_of_the_folder(saved, tmp_path):
    """As released, and all beside each other."""
    released, flat = saved[1], tmp_path / "flat"
    shutil.copytree(released / "cola_dlm", flat)
    shutil.copy(released / "tokenizer.json", flat)
    for folder in (str(released), flat):
        assert release.flags(folder) == release.flags(released)
        assert release.load(folder).tokenizer.to_dict() == saved[0].tokenizer.to_dict()
    (flat / "tokenizer.json").unlink()
    refused(f"{flat}/tokenizer.json", release.load, flat)
    refused("nowhere/cola_vae/config.json", release.load, "nowhere")

# ---- Wrong files -------------------------------------------------------------------------------

def test_damaged_tensors(tmp_path):
    """Every truncation, and headers that do not fit the bytes."""
    path = tmp_path / "a.safetensors"
    whole = (OFFICIAL / "p1" / "expected.safetensors").read_bytes()
    for size in (*range(0, len(whole), 97), len(whole) - 1):
        path.write_bytes(whole[:size])
        refused("a.safetensors", release.read_safetensors, path)
    right = {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}
    for wrong in ({"shape": [4]}, {"data_offsets": [4, 16]}, {"dtype": "F8"}, {"shape": 0.5}):
        text = json.dumps({"a": right | wrong}).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(12))
        refused("a.safetensors", release.read_safetensors, path)


@pytest.mark.parametrize("part, change, match", (
    ("cola_vae", {"act": "gelu"}, "act"), ("cola_vae", {"latent_dim": 9}, "size mismatch"),
    ("cola_vae", {"dim": "24"}, "dim"), ("cola_vae", {"block_size": 0}, ""),
    ("cola_dit", {"block_size": 0}, "blocks of 0"), ("cola_dit", {"num_layers": 3}, "Missing key"),
    ("cola_dit", {"patch_size": 2}, "patch_size")))
def test_a_wrong_config(saved, part, change, match):
    path = saved[1] / "cola_dlm" / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    refused(f"{saved[1]}.*{match}", release.load, saved[1])


@pytest.mark.parametrize("name", ("cola_dlm/cola_vae/config.json", "cola_dlm/cola_dit/config.json",
                                  "tokenizer.json"))
def test_a_missing_or_wrong_file(name, saved):
    for content in ("{", "{}", "[1]", "3"):
        (saved[1] / name).write_text(content)
        refused(name, release.load, saved[1])
    (saved[1] / name).unlink()
    refused(name, release.load, saved[1])


def test_models_that_the_format_cannot_describe(tokenizer, tmp_path):
    for model, flag in ((replace(system(tokenizer), first_block="left"), "--first_block"),
                        (system(tokenizer, as_released=False), "--as_released")):
        refused(flag, release.save, model, tmp_path / "r")
    assert not (tmp_path / "r").exists()

# ---- tokenizer.json ----------------------------------------------------------------------------

@pytest.fixture
def written(tokenizer, tmp_path):
    """A tokenizer.json and what is in it."""
    path = tmp_path / "tokenizer.json"
    release.write_tokenizer(path, tokenizer)
    return path, json.loads(path.read_text("utf-8"))


def by_merges(state: dict, text: str, pattern: str) -> list[int]:
    """The ids that a tokenizer.json defines: in every word, again and again the first merge of the
    list that applies anywhere."""
    order = {tuple(pair.split(" ") if isinstance(pair, str) else pair): i
             for i, pair in enumerate(state["model"]["merges"])}
    ids = []
    for word in regex.findall(pattern, text):
        parts = [release.LETTERS[b] for b in word.encode()]
        while len(parts) > 1:
            pairs = enumerate(zip(parts, parts[1:]))
            rank, j = min((order.get(pair, 1 << 30), j) for j, pair in pairs)
            if rank == 1 << 30:
                break
            parts[j:j + 2] = [parts[j] + parts[j + 1]]
        ids += [state["model"]["vocab"][part] for part in parts]
    return ids


def test_tokenizer_json_round_trip(tokenizer, written):
    path, state = written
    again = release.read_tokenizer(path)
    assert again.to_dict() == tokenizer.to_dict()
    for text in (TEXT, "", " ", "a  b", "\n\n x"):
        want = by_merges(state, text, tokenizer.pattern)
        assert again.encode(text) == tokenizer.encode(text) == want


def test_bytes_in_another_order_and_the_pattern_of_gpt2(tokenizer, written):
    """As in public releases: merges as strings, bytes in the order of their letters, more special
    tokens than the end."""
    path, state = written
    words = [*state["model"]["vocab"]]
    words = sorted(words[:256]) + words[256:-1]             # the last is <|endoftext|>
    state["model"]["vocab"] = {word: i for i, word in enumerate(words)}
    want = by_merges(state, TEXT, release.GPT2_PATTERN)
    state["model"]["merges"] = [" ".join(pair) for pair in state["model"]["merges"]]
    state["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    n = len(words)
    special = {"<|one|>": n, "<|endoftext|>": n + 1, "<|pad|>": n + 4}
    state["added_tokens"] = [{"content": name, "id": i} for name, i in special.items()]
    path.write_text(json.dumps(state))
    read = release.read_tokenizer(path)
    assert read.encode(TEXT) == want != tokenizer.encode(TEXT)
    assert read.decode(read.encode(TEXT)) == TEXT and (read.end, read.n_vocab) == (n + 1, n + 5)


@pytest.mark.parametrize("at, listed", ((0, True), (0, False), (100, True), (259, False)))
def test_special_tokens_first_and_in_the_middle(at, listed, tmp_path, monkeypatch):
    """As Hugging Face's tokenizers write it. listed: in the vocabulary, too; merges as strings."""
    merges = [["a", "n"], ["n", "a"], ["an", "a"], ["b", "an"], ["\u0120", "ban"]]
    words = [*sorted(release.LETTERS.values()), *map("".join, merges)]
    words[at:at] = ["<pad>", "<|endoftext|>"]
    special = {"<pad>": at, "<|endoftext|>": at + 1, "<last>": len(words) + 2}
    ids = {word: i for i, word in enumerate(words)} | special
    level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    state = {"added_tokens": [{"content": name, "id": i} for name, i in special.items()],
             "pre_tokenizer": level, "model": {
                 "vocab": ids if listed else {w: i for w, i in ids.items() if w not in special},
                 "merges": [" ".join(pair) for pair in merges] if listed else merges}}
    (tmp_path / "a.json").write_text(json.dumps(state))
    read = release.read_tokenizer(tmp_path / "a.json")
    assert (read.end, read.n_vocab, read.decode([at])) == (at + 1, len(words) + 3, "<pad>")
    assert b"" not in read.encoding._mergeable_ranks
    for text in ("banana bananas anna nan", TEXT, "", "<pad> <|endoftext|>"):
        got = read.encode(text)
        assert got == by_merges(state, text, release.GPT2_PATTERN) and read.decode(got) == text

    release.write_tokenizer(tmp_path / "b.json", read)
    written = json.loads((tmp_path / "b.json").read_text("utf-8"))["model"]
    assert written["merges"] == merges and written["vocab"] == ids
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: read.encoding)
    for again in (release.read_tokenizer(tmp_path / "b.json"), Tokenizer.named("some")):
        assert again.to_dict() == read.to_dict() == Tokenizer.from_dict(read.to_dict()).to_dict()


@pytest.mark.parametrize("change, match", (
    (lambda s, model, split, level: level.update(type="Metaspace"), "changes texts"),
    (lambda s, model, split, level: s.update(normalizer={"type": "NFC"}), "changes texts"),
    (lambda s, model, split, level: level.update(add_prefix_space=True), "changes texts"),
    (lambda s, model, split, level: split.update(behavior="Removed"), "regex"),
    (lambda s, model, split, level: split.update(invert=True), "regex"),
    (lambda s, model, split, level: level.update(use_regex=True), "regex"),
    (lambda s, model, split, level: model["vocab"].pop("a"), "count up"),
    (lambda s, model, split, level: model["vocab"].update(zz=9), "count up"),
    (lambda s, model, split, level: s["added_tokens"][0].update(id=9), "count up"),
    (lambda s, model, split, level: s["added_tokens"][0].update(id=len(model["vocab"]) - 2),
     "count up"),
    (lambda s, model, split, level: model["merges"].reverse(), "order of merges"),
    (lambda s, model, split, level: model.update(merges=[*map(" ".join, model["merges"][::-1])]),
     "order of merges"),
    (lambda s, model, split, level: s["added_tokens"].clear(), "no special token <.endoftext.>"),
    (lambda s, model, split, level: model.pop("merges"), "merges")))
def test_other_tokenizers_are_refused(change, match, written):
    path, state = written
    change(state, state["model"], *state["pre_tokenizer"]["pretokenizers"])
    path.write_text(json.dumps(state))
    refused(match, release.read_tokenizer, path)
