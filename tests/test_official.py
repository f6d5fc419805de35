"""pytest tests/test_official.py: the public release as a whole, written by `export` and read by --official."""
import json
import shutil
from dataclasses import replace

import pytest
import torch

import data
import sample
import text_vae
import train
from conftest import TINY
from data import Tokenizer

TEXT = "there is a red circle. it's 12345 m wide,\n  naïve 漢字!  the end"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tiny run `as_released`."""
    out = tmp_path_factory.mktemp("run") / "out"
    assert train.main([*TINY, "--as_released", "--streams", "2", "--eval_samples", "0", "--out_dir", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def release(run):
    """Its text stream as a release, of weights that matter: none is 0."""
    model, folder = sample.load(run / "ckpt.pt"), run / "release"
    torch.manual_seed(0)
    for module in (model.text_vae, model.mmdit):
        for p in module.parameters():
            p.data.add_(torch.randn_like(p), alpha=0.1)
    sample.save_official(model, folder)
    return model, folder


def test_the_release_writes_what_the_checkpoint_wrote(release):
    ours, folder = release
    theirs = sample.load_official(folder)
    assert theirs.block_len == ours.block_len and theirs.tokenizer.to_dict() == ours.tokenizer.to_dict()
    settings = replace(sample.RELEASED, steps=3, temperature=0.5)
    told = [sample.generate_text(m, ["there is", ""], s=settings, max_tokens=12) for m in (ours, theirs)]
    assert told[0] == told[1] and any(told[0])
    rows = [sample.score(m, "there is", " a circle", samples=2, steps=2) for m in (ours, theirs)]
    for (name, value, tokens), (_, again, same) in zip(*rows):
        assert again == pytest.approx(value, rel=1e-4, abs=1e-2) and tokens == same, name


def test_commands_run_the_release(release, run, tmp_path, capsys):
    """As the paper samples, unless a flag says otherwise; and `export` writes what was trained."""
    ours, folder = release
    def told(*argv):
        assert sample.main([*argv, "--official", str(folder), "--steps", "2"]) == 0
        return capsys.readouterr().out
    for flags, changed in ((), {}), (("--guidance", "1.5", "--snap", "--no-kv_cache"), {"guidance": 1.5, "snap": True, "cached": False}):
        want = sample.generate_text(ours, ["there is"], s=replace(sample.RELEASED, steps=2, **changed), max_tokens=8)[0]
        assert want and want in told("t2t", "there is", "--max_tokens", "8", *flags)
    lines = told("score", "there is", " a circle", "--samples", "2")
    assert all(name in lines for name, *_ in sample.score(ours, "there is", " a circle", samples=2, steps=2)), lines
    assert sample.main(["export", str(tmp_path / "new"), "--checkpoint", str(run / "ckpt.pt")]) == 0
    trained, again = sample.load(run / "ckpt.pt"), sample.load_official(tmp_path / "new")
    text = {k: v for k, v in trained.mmdit.state_dict().items() if not k.startswith(("img_", "image_blocks."))}
    assert all(torch.equal(v, text[k]) for k, v in again.mmdit.state_dict().items())
    with pytest.raises(ValueError, match="--first_block left"):
        sample.save_official(replace(ours, first_block="left"), tmp_path / "other")


def test_training_starts_from_the_release(release, tmp_path):
    """The text stream as released, and what it says of text; the image side of two streams fresh."""
    ours, folder = release
    taken = "--text_vae_width --text_vae_heads --text_vae_layers --text_vae_steps --width --heads --layers " \
            "--block_len --vocab_size".split()
    flags = [x for pair in zip(TINY[::2], TINY[1::2]) if pair[0] not in taken for x in pair]
    flags += ["--init_official", str(folder), "--streams", "2", "--eval_samples", "0", "--out_dir",
              str(tmp_path / "out")]
    _, args = train.prepare(train.parse(flags))
    model = train.new_model(args, None)
    text = {k: v for k, v in model.mmdit.state_dict().items() if not k.startswith(("img_", "image_blocks."))}
    released = sample.load_official(folder)
    assert text.keys() == released.mmdit.state_dict().keys()
    assert all(torch.equal(v, text[k]) for k, v in released.mmdit.state_dict().items())
    for name, p in model.mmdit.named_parameters():
        assert torch.isfinite(p).all(), name
        if name.startswith("image_blocks.") and name.endswith(("proj_qkv.weight", "mlp.proj_in.weight")):
            assert p.std() > 0.01 and not torch.equal(p, text[name.removeprefix("image_")]), name
    freqs = [b.msa.rope.rope.freqs for b in (*model.mmdit.blocks, *model.mmdit.image_blocks)]
    assert all(torch.equal(f, freqs[0]) for f in freqs)
    told = [sample.generate_text(m, ["there"], s=replace(sample.RELEASED, steps=2), max_tokens=8)
            for m in (model, released)]
    assert told[0] == told[1]
    assert train.main(flags) == 0
    trained = sample.read_checkpoint(tmp_path / "out" / "ckpt.pt")
    assert trained["progress"] == {"text_vae": 0, "image_vae": 3, "mmdit": 4}
    again = sample.load(tmp_path / "out" / "ckpt.pt")             # an average of few steps has moved a little
    assert again.mmdit.config == model.mmdit.config and again.text_vae.config == released.text_vae.config
    assert train.main([*flags, "--resume", "auto", "--steps", "5"]) == 0
    assert sample.read_checkpoint(tmp_path / "out" / "ckpt.pt")["progress"] == trained["progress"] | {"mmdit": 5}
    assert train.main([*flags, "--eval_only"]) == 0


@pytest.mark.parametrize("argv, words", [
    (["t2i", "a circle", "--official", "{release}"], "for t2t, not for t2i"),
    (["t2t", "there", "--official", "{release}/nowhere"], "cola_vae: not there"),
    (["export", "{release}", "--checkpoint", "{run}"], "exists"),
    (["export", "{tmp}/new", "--checkpoint", "{tiny}"], "--as_released"),
])
def test_mistakes(argv, words, release, run, tiny, tmp_path, capsys):
    places = {"release": release[1], "run": run / "ckpt.pt", "tiny": tiny / "ckpt.pt", "tmp": tmp_path}
    assert sample.main([word.format(**places) for word in argv]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags, words", [
    (["--width", "64"], "--width 64"), (["--init_from", "x.pt"], "name one"),
])
def test_flags_the_release_settles(flags, words, release, tmp_path, capsys):
    argv = ["--init_official", str(release[1]), "--procs", "1", "--out_dir", str(tmp_path / "out"), *flags]
    assert train.main(argv) == 2
    assert words in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_release_of_two_minds_is_refused(release, tmp_path):
    _, folder = release
    for name in ("cola_vae", "cola_dit"):
        (tmp_path / name).symlink_to(folder / name)
    Tokenizer.train(["no end " * 40, "of words", *(f"word{i} word{i}" for i in range(400))], 900).save(
        tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match="both must be of one model"):
        sample.load_official(tmp_path)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float64))
def test_weights_of_another_type_are_converted(release, tmp_path, dtype):
    model, folder = release
    shutil.copytree(folder, tmp_path / "r")
    for part in ("cola_vae", "cola_dit"):
        path = tmp_path / "r" / part / "model.safetensors"
        text_vae.write_safetensors(path, {k: v.to(dtype) for k, v in text_vae.read_safetensors(path).items()})
    read, plain = sample.load_official(tmp_path / "r"), sample.load_official(folder)
    for a, b in zip((read.text_vae, read.mmdit), (plain.text_vae, plain.mmdit)):
        assert all(torch.equal(x, y.to(dtype).float()) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


@pytest.mark.parametrize("part, name, value, words", [
    ("cola_vae", "block_size", 3, "block in view"), ("cola_dit", "block_size", 0, "blocks of 0"),
    ("cola_dit", "num_layers", 10 ** 6, "tensors"), ("cola_dit", "heads", "x", "heads is no int"),
    ("cola_vae", "scaling_factor", float("nan"), "scaling_factor"), ("cola_vae", "num_heads", 0, "num_heads is 0"),
])
def test_a_forged_configuration_is_refused(release, tmp_path, part, name, value, words):
    shutil.copytree(release[1], tmp_path / "r")
    path = tmp_path / "r" / part / "config.json"
    config = json.loads(path.read_text())
    assert name in config
    path.write_text(json.dumps(config | {name: value}))
    with pytest.raises(ValueError, match=words) as error:
        sample.load_official(tmp_path / "r")
    assert "\n" not in str(error.value)


# ---- tokenizer.json ----------------------------------------------------------------------------------------

def by_merges(state: dict, text: str) -> list[int]:
    """What a tokenizer.json says a text is, the slow way: in every word, the first merge of the list that
    applies anywhere, again and again."""
    letters, vocab = data.byte_letters(), state["model"]["vocab"]
    order = {tuple(pair.split(" ") if isinstance(pair, str) else pair): i
             for i, pair in enumerate(state["model"]["merges"])}
    split = state["pre_tokenizer"].get("pretokenizers", [{}])[0].get("pattern", {}).get("Regex", data.GPT2_PATTERN)
    ids = []
    for word in data.regex.findall(split, text):
        parts = [letters[b] for b in word.encode()]
        while len(parts) > 1:
            rank, j = min((order.get(pair, 1 << 30), j) for j, pair in enumerate(zip(parts, parts[1:])))
            if rank == 1 << 30:
                break
            parts[j:j + 2] = [parts[j] + parts[j + 1]]
        ids += [vocab[part] for part in parts]
    return ids


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([*data.GeneratedScenes(0).corpus(200), TEXT * 3], 420)


def test_tokenizer_json_comes_back(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    again, state = Tokenizer.from_file(path), json.loads(path.read_text())
    assert again.to_dict() == tokenizer.to_dict() and again.end == tokenizer.end
    for text in (TEXT, "", " ", "a  b", "\n\n x"):
        assert again.encode(text) == tokenizer.encode(text) == by_merges(state, text)
        assert again.decode(again.encode(text)) == text


def test_bytes_in_another_order_and_gpt2s_pattern(tokenizer, tmp_path):
    """As public releases have it: bytes by their letters, merges as strings, special tokens before the end."""
    tokenizer.save(tmp_path / "tokenizer.json")
    state = json.loads((tmp_path / "tokenizer.json").read_text())
    vocab = state["model"]["vocab"]
    words = sorted(sorted(vocab, key=vocab.get)[:256]) + sorted(vocab, key=vocab.get)[256:]
    state["model"]["vocab"] = {word: i for i, word in enumerate(words)}
    state["model"]["merges"] = [" ".join(pair) for pair in state["model"]["merges"]]
    state["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    n = len(words)
    state["added_tokens"] = [{"content": "<|one|>", "id": n}, {"content": "<|endoftext|>", "id": n + 1},
                             {"content": "<|pad|>", "id": n + 4}]
    (tmp_path / "b.json").write_text(json.dumps(state))
    read = Tokenizer.from_file(tmp_path / "b.json")
    assert read.encode(TEXT) == by_merges(state, TEXT) != tokenizer.encode(TEXT)
    assert read.decode(read.encode(TEXT)) == TEXT and (read.end, read.n_vocab) == (n + 1, n + 5)
    assert Tokenizer.from_dict(read.to_dict()).encode(TEXT) == read.encode(TEXT)


@pytest.mark.parametrize("break_it, words", [
    (lambda s: s["model"].update(type="WordPiece"), "WordPiece"),
    (lambda s: s.update(normalizer={"type": "NFC"}), "NFC"),
    (lambda s: s["pre_tokenizer"]["pretokenizers"].insert(0, {"type": "Digits"}), "Digits"),
    (lambda s: s["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True), "space"),
    (lambda s: s["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed"), "dropped"),
    (lambda s: s["pre_tokenizer"]["pretokenizers"][0].update(invert=True), "dropped"),
    (lambda s: s["model"].update(end_of_word_suffix="</w>"), "affixes"),
    (lambda s: s["model"]["vocab"].pop("a"), "gaps"),
    (lambda s: s["model"]["merges"].reverse(), "order of merges"),
    (lambda s: s["added_tokens"].clear(), "end token"),
    (lambda s: s["model"]["vocab"].update({"漢": 419}), "KeyError"),
    (lambda s: s.pop("model"), "model"),
])
def test_other_tokenizers_are_refused(break_it, words, tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    state = json.loads(path.read_text())
    break_it(state)
    path.write_text(json.dumps(state))
    with pytest.raises(ValueError) as error:
        Tokenizer.from_file(path)
    assert words in str(error.value) and "\n" not in str(error.value)
