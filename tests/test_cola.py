"""pytest tests/test_cola.py"""
import json
import pickle
import random
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import regex
import tiktoken
import torch
import torch.nn as nn

import cola
from cola import FIRST_BLOCK, Cola, Tokenizer, pad_to_multiple
from image_vae import ImageVAE, ImageVAEConfig
from mmdit import MMDiT, MMDiTConfig
from text_vae import TextVAE, TextVAEConfig

CAPTION = "a large red circle above a small blue square on a gray background"

# ---- Tokenizer ---------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([CAPTION, "there is a red circle. it is above a blue square."] * 3, 512)


def test_any_text_round_trips(tokenizer):
    """Also that of the end token, which no text encodes to."""
    assert [tokenizer.decode([i]) for i in tokenizer.encode("a red")] == ["a", " red"]
    draw = random.Random(0)
    texts = ["".join(draw.choices("ab \n\t'é漢😀\u0301\u3000\0.!1२", k=k)) for k in range(100)]
    texts += ["".join(chr(i) for i in range(0x20000) if not 0xD800 <= i < 0xE000)]
    texts += [letter * 100_000 for letter in "a \n!漢9"]    # long runs are split in linear time
    for text in (*texts, "a<|endoftext|>b"):
        ids = tokenizer.encode(text)
        assert tokenizer.end not in ids and tokenizer.decode(ids) == text
    assert tokenizer.decode([*tokenizer.encode("a red"), tokenizer.end, *ids]) == "a red"
    assert tokenizer.decode([0xFF, 10**6]) == "\ufffd\ufffd"                 # no UTF-8, no token


def test_training_is_the_naive_algorithm():
    """The heap finds the pairs that a maximum over all pairs finds; it stops if none repeats."""
    trained = Tokenizer.train(["abab abab cd cd cd xy"], 300)
    assert trained.tokens[256:] == [b"ab", b" c", b" cd", b"abab"]           # 4, 3, 3 and 2 times
    assert trained.end == trained.n_vocab - 1 == 260
    with pytest.raises(ValueError, match="257"):
        Tokenizer.train(["a"], 256)
    draw = random.Random(1)
    text = " ".join("".join(draw.choices("abc", k=draw.randrange(1, 9))) for _ in range(300))
    words = [list(word.encode()) for word in regex.findall(cola.PATTERN, text)]
    tokens = [bytes([i]) for i in range(256)]
    while len(tokens) < 320:
        pairs = Counter(pair for word in words for pair in zip(word, word[1:]))
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        token = tokens[best[0]] + tokens[best[1]]
        if token not in tokens:
            tokens.append(token)
        words = [cola.merge(word, best, tokens.index(token)) for word in words]
    assert Tokenizer.train([text], 321).tokens == tokens


def test_encodings_by_name(tokenizer, monkeypatch):
    """tiktoken's encoding as it is, its unused ids included; offline, one line says what to do."""
    theirs = tiktoken.Encoding("some", pat_str=cola.PATTERN, special_tokens={"<|endoftext|>": 999},
                               mergeable_ranks={t: i for i, t in enumerate(tokenizer.tokens)})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: theirs)
    named = Tokenizer.from_dict(json.loads(json.dumps(Tokenizer.named("some").to_dict())))
    assert named.encode(CAPTION) == theirs.encode(CAPTION) and named.end == 999
    assert named.n_vocab == 1000 and named.decode([named.encode("a")[0], 998]) == "a\ufffd"

    def offline(name):
        raise ConnectionError("no\nroute")
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(ValueError, match="^.*cl100k_base.*online$"):
        Tokenizer.named("cl100k_base")

# ---- The system --------------------------------------------------------------------------------

def system(tokenizer, patch_size=2, **changes) -> Cola:
    torch.manual_seed(0)
    vae = TextVAEConfig(tokenizer.n_vocab, 24, 48, 2, 1, 1, latent_dim=8, patch_size=patch_size)
    prior = MMDiTConfig(8, 4, width=16, heads=2, head_dim=8, layers=1, emb_dim=16, rope_dim=8)
    image_vae = ImageVAE(ImageVAEConfig(4, width=8, blocks=1))
    settings = dict(block_len=3, image_hw=(16, 24), image_loc=0.5) | changes
    return Cola(TextVAE(vae), image_vae, MMDiT(prior), tokenizer, **settings)


@pytest.mark.parametrize("patch_size", (1, 2))
@pytest.mark.parametrize("first_block", FIRST_BLOCK)
def test_a_prefix_ends_with_a_latent_or_a_block(tokenizer, first_block, patch_size):
    model = system(tokenizer, patch_size, first_block=first_block)
    multiple, ids = (3 if first_block in ("left", "right") else 1) * patch_size, [*range(14)]
    for cut in range(15):
        out, new_cut, padded = model.align(ids, cut)
        at = cut if first_block == "right" else 0
        assert out == [*ids[:at], *[tokenizer.end] * (new_cut - cut), *ids[at:]]
        assert new_cut % multiple == 0 <= new_cut - cut < multiple
        inserted = {j // patch_size for j, i in enumerate(out) if i == tokenizer.end}
        assert {*padded} == (set() if first_block == "repaint" else inserted)


@torch.no_grad()
def test_texts_and_images_to_ids_and_latents(tokenizer):
    model, ids, end = system(tokenizer), tokenizer.encode("a red circle"), tokenizer.end
    assert model.ids("a red circle", end=False) == [*ids, end]               # 4 tokens, 2 latents
    assert model.ids("a red circle", end=True) == [*ids, end, end, end]      # 6 tokens, 1 block
    assert model.ids("", end=False) == []
    assert pad_to_multiple([1, 2, 3, 4], 4, 9) == [1, 2, 3, 4, 9, 9, 9, 9]
    assert pad_to_multiple([1, 2, 3, 4], 4, 9, ended=False) == [1, 2, 3, 4]
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 24, 3), np.uint8)
    assert np.array_equal(cola.to_uint8(cola.to_float(images)), images)
    z = model.encode_images([*images])
    assert z.shape == (2 * 2 * 3, 4)
    torch.testing.assert_close(model.encode_images([images[1]]), z[6:])
    out = model.decode_images(z, (2, 3))
    assert [x.shape for x in out] == [(16, 24, 3)] * 2 and out[0].dtype == np.uint8
    ids = [model.ids("a red", end=False), model.ids(CAPTION, end=True)]
    z, lengths = model.encode_text(ids)
    assert lengths == [len(i) // 2 for i in ids]
    torch.testing.assert_close(model.encode_text(ids[1:])[0], z[lengths[0]:])
    assert model.encode_text([[], []])[0].shape == (0, 8)


def test_parts_must_fit(tokenizer):
    model = system(tokenizer)
    vae, prior = model.text_vae.config, model.mmdit.config
    many = Tokenizer.train(["".join(map(chr, range(900))) * 2], 900)
    for change, match in (({"block_len": 0}, "blocks of 0"),
                          ({"text_vae": TextVAE(replace(vae, block_len=2))}, "multiple of 2"),
                          ({"tokenizer": many}, "tokens"),
                          ({"mmdit": MMDiT(replace(prior, text_channels=6))}, "8 channels.* 6")):
        with pytest.raises(ValueError, match=match):
            replace(model, **change)

# ---- Checkpoints -------------------------------------------------------------------------------

@pytest.fixture
def saved(tokenizer, tmp_path):
    """A system and its checkpoint, in which the averages of the prior are its weights + 1."""
    model = system(tokenizer, first_block="left", tasks=("t2t", "t2i"))
    state = nn.ModuleDict(model.parts()).state_dict()
    ema = {name: x + 1 for name, x in state.items() if name.startswith("mmdit.")}
    path = tmp_path / "ckpt.pt"
    torch.save({"format": cola.FORMAT, "config": model.config(), "tokenizer": tokenizer.to_dict(),
                "model": state, "ema": ema, "progress": {"mmdit": 1},
                "args": {"cfg_drop": 0.1, "cfg_drop_text": 0.0}}, path)
    return model, path


def test_build_gives_back_the_system(saved):
    model, path = saved
    before, random_state = path.read_bytes(), torch.get_rng_state()
    found = cola.read(path)
    for weights, shift in (("model", 0), ("ema", 1)):
        again = cola.build(found, weights)
        assert again.config() == model.config() and again.tasks == ("t2t", "t2i")
        assert again.unconditional == ("t2i",)
        dropped = found | {"args": {"cfg_drop": 0.0, "cfg_drop_text": 0.1}}
        assert cola.build(dropped, weights).unconditional == ("t2t",)      # it2t: not a task
        assert again.tokenizer.to_dict() == model.tokenizer.to_dict()
        for name, part in again.parts().items():
            assert not part.training
            for key, x in model.parts()[name].state_dict().items():
                assert torch.equal(part.state_dict()[key], x + shift * (name == "mmdit")), key
        for p in again.mmdit.parameters():
            p.data.zero_()                                  # a copy: neither file nor dict changes
    for again in (cola.load(path), cola.build(found)):
        assert torch.equal(again.mmdit.text_in.weight, model.mmdit.text_in.weight + 1)
    assert path.read_bytes() == before and torch.equal(torch.get_rng_state(), random_state)

    del found["config"]["image_vae"]                        # as in the public release
    found["model"] = {k: v for k, v in found["model"].items() if not k.startswith("image_vae.")}
    assert cola.build(found).image_vae is None


def test_a_checkpoint_from_before_there_were_turns(saved):
    found, place = cola.read(saved[1]), "mmdit.position.segment.weight"
    for state in (found["model"], found["ema"]):
        del state["mmdit.position.turn.weight"]
        state[place] = state[place][:4].clone()
    del found["config"]["image_rho"]
    found["args"] = {}
    want = found["ema"][place]
    old = saved[1].with_name("old.pt")
    torch.save(found, old)
    again = cola.read(old)
    assert again["args"]["image_rho"] == again["config"]["image_rho"] == 0
    again["args"] = cola.read(saved[1])["args"]
    assert again["ema"][place].shape == again["model"][place].shape == (5, want.shape[1])
    position = cola.build(again).mmdit.position
    assert torch.equal(position.segment.weight[4], want[2]) and not position.turn.weight.any()
    assert torch.equal(position.segment.weight[:4], want)


class Harmful:
    """Writes a file when it is unpickled."""
    def __reduce__(self):
        return Path.touch, (Path("ran"),)


def test_wrong_files_are_one_line(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole, found, bad = saved[1].read_bytes(), cola.read(saved[1]), tmp_path / "bad.pt"

    def refused(match, kind=ValueError):
        with pytest.raises(kind, match=f"^.*bad.pt.*{match}.*$"):
            cola.load(bad)
    refused("train.py", FileNotFoundError)
    with zipfile.ZipFile(saved[1]) as file:
        largest = max(file.infolist(), key=lambda entry: entry.file_size)
    flipped = bytearray(whole)
    flipped[largest.header_offset + largest.file_size] ^= 1                  # one bit of a weight
    for content in (b"", whole[:len(whole) // 2], whole[:-1], flipped, pickle.dumps(Harmful())):
        bad.write_bytes(content)
        refused("not a checkpoint")
    for foreign in ({"format": cola.FORMAT, "config": Harmful()}, {"format": "unified-cola-3"},
                    torch.zeros(3)):
        torch.save(foreign, bad)
        refused("not a checkpoint")
    assert not Path("ran").exists()                         # loading runs no code
    torch.save(found | {"progress": {"mmdit": 0}}, bad)
    refused("never trained")
    prior = found["config"]["mmdit"]
    for changed in ({"mmdit": prior | {"layers": 2}}, {"mmdit": prior | {"depth": 2}}, None):
        config = found["config"] | changed if changed else {}    # lacks weights; unknown; lacks all
        with pytest.raises(ValueError, match="^.*another architecture.*$"):
            cola.build(found | {"config": config})
