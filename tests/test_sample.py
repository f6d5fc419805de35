"""pytest tests/test_sample.py"""
import math
import pickle
import re
import resource
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import flow
import masks
import mmdit
import sample
import train
from conftest import TINY
from masks import T2I, Sample, pack
from sample import Settings

CAPTIONS = ["a large red circle above a small blue square on a gray background", "a cat",
            "a small green cross above a small cyan star, which is above a small red triangle"]
STORY = "there is a red circle. the background is gray. there are two objects. the circle is above a square."
BLOCK = 4
S = Settings(steps=4, guidance=1.0)


@pytest.fixture(scope="module")
def model():
    """A system in which every weight matters: none is zero, as adaLN-Zero would have it."""
    torch.manual_seed(0)
    cola = train.new_model(train.parse([*TINY, "--block_len", str(BLOCK)]), data.GeneratedScenes(0, 32, 64))
    for module in (cola.text_vae, cola.image_vae, cola.mmdit):
        for p in module.eval().parameters():
            p.data.add_(torch.randn_like(p), alpha=0.15)
    return cola


@pytest.fixture
def latents(monkeypatch):
    """What every call of transport returned, in order."""
    found, transport = [], sample.transport

    def recording(*args, **kwargs):
        found.append(transport(*args, **kwargs))
        return found[-1]
    monkeypatch.setattr(sample, "transport", recording)
    return found


@pytest.fixture
def calls(model):
    """(text, time of each position, layout, commit) of every pass through the prior, in order."""
    found = []
    hook = model.mmdit.register_forward_pre_hook(
        lambda module, a: found.append((a[0].clone(), a[2][a[3]], a[4], a[7])))
    yield found
    hook.remove()


def prefix_of(model, n):
    """The longest beginning of the story with n tokens."""
    return next(STORY[:i] for i in range(len(STORY), -1, -1) if len(model.tokenizer.encode(STORY[:i])) == n)


def picture(seed, hw=(32, 32)):
    return np.random.default_rng(seed).integers(0, 255, (*hw, 3), dtype=np.uint8)


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


# ---- the cache ---------------------------------------------------------------------------------------------

def test_cached_t2t_equals_uncached(model, latents):
    """Every residue of the prefix, from no whole block to two, and four blocks or more of continuation."""
    prefixes = [prefix_of(model, n) for n in range(3 * BLOCK)]
    cached, uncached = (replace(S, guidance=3.0, cached=c) for c in (True, False))
    texts = [sample.generate_text(model, prefixes, s=s, max_tokens=3 * BLOCK + 1) for s in (cached, uncached)]
    assert texts[0] == texts[1]
    blocks = len(latents) // 2
    assert blocks >= 4 and len(set(texts[0])) == len(prefixes), "each prefix has its own continuation"
    for pair in zip(latents[:blocks], latents[blocks:], strict=True):
        close(*pair)
    assert not torch.equal(latents[0], latents[blocks]), "the two paths must not be one"


def test_cached_it2t_equals_uncached(model, latents):
    prompts = ["describe the image.", "what is above the blue square?", "a"]
    prefixes, images = [prefix_of(model, n) for n in (0, 2, 5)], [picture(i) for i in range(3)]
    cached, uncached = (replace(S, guidance=3.0, cached=c) for c in (True, False))
    texts = [sample.generate_text(model, prefixes, prompts, images, s, 3 * BLOCK) for s in (cached, uncached)]
    assert texts[0] == texts[1] and any(texts[0])
    blocks = len(latents) // 2
    for pair in zip(latents[:blocks], latents[blocks:], strict=True):
        close(*pair)


def test_cached_t2i_equals_uncached(model, latents):
    cached, uncached = (replace(S, guidance=3.0, cached=c) for c in (True, False))
    images = [sample.generate_images(model, CAPTIONS, s, (32, 48)) for s in (cached, uncached)]
    close(*latents)
    assert not torch.equal(*latents)
    for a, b in zip(*images):
        assert a.shape == (32, 48, 3) and np.abs(a.astype(int) - b).max() <= 1


def test_a_time_is_projected_once_whatever_the_number_of_blocks(model, monkeypatch):
    made, modulation = [], mmdit.Block.modulation
    monkeypatch.setattr(mmdit.Block, "modulation", lambda block, emb: made.append(len(emb)) or modulation(block, emb))
    counts = []
    for blocks in (2, 5):
        made.clear()
        monkeypatch.setattr(model.tokenizer, "end", -1)
        sample.generate_text(model, ["a"], s=replace(S, guidance=3.0), max_tokens=blocks * BLOCK)
        counts.append(sum(made))
    layers = len(model.mmdit.blocks)
    # The first block has a clean and 4 noisy times at once, the others 4 and the clean one alone.
    assert counts == [layers * (4 * 2 + 1 + 4)] * 2


def test_the_context_matters(model, latents):
    sample.generate_images(model, CAPTIONS[:1], S)
    sample.generate_images(model, CAPTIONS[1:2], S)
    assert (latents[0] - latents[1]).abs().max() > 1e-2
    for asked, image in (("a", 0), ("b", 0), ("a", 1)):
        sample.generate_text(model, [""], [asked], [picture(image)], S, 1)
    a, other_prompt, other_image = latents[2:]
    assert (a - other_prompt).abs().max() > 1e-2 and (a - other_image).abs().max() > 1e-2


# ---- numbers and seeds -------------------------------------------------------------------------------------

def test_an_image_is_the_same_alone_and_in_a_batch(model, latents):
    s = replace(S, guidance=3.0)
    batch = sample.generate_images(model, CAPTIONS, s, first=5)
    for i, caption in enumerate(CAPTIONS):
        alone = sample.generate_images(model, [caption], s, first=5 + i)
        close(latents[-1], latents[0].view(3, -1, latents[0].shape[1])[i])
        assert np.abs(alone[0].astype(int) - batch[i]).max() <= 1


def test_a_text_is_the_same_alone_and_in_a_batch(model):
    prefixes = [prefix_of(model, n) for n in (0, 3, 9)]
    for more in ((), (["a", "b c d", ""], [picture(i) for i in range(3)])):
        batch = sample.generate_text(model, prefixes, *more, s=S, max_tokens=10, first=5)
        assert len(set(batch)) == 3
        for i in range(3):
            one = [x[i:i + 1] for x in (prefixes, *more)]
            assert sample.generate_text(model, *one, s=S, max_tokens=10, first=5 + i) == batch[i:i + 1]


def test_seeds(model):
    draw = lambda **kw: sample.generate_images(model, CAPTIONS[:1] * 2, replace(S, **kw))
    a, again, other = draw(seed=1), draw(seed=1), draw(seed=2)
    assert np.array_equal(a, again)
    assert not np.array_equal(a[0], other[0]) and not np.array_equal(a[0], a[1])
    write = lambda seed: sample.generate_text(model, ["a"], s=replace(S, seed=seed), max_tokens=8)
    assert write(1) == write(1) != write(2)


def test_max_tokens_cuts_and_the_end_token_ends(model, monkeypatch, latents):
    short, long = (sample.generate_text(model, [STORY], s=S, max_tokens=n)[0] for n in (5, 9))
    assert long.startswith(short) and short != long
    decode, end = model.text_vae.decode, len(model.tokenizer.encode(STORY)) + 5

    def ending(z, lengths):
        logits = decode(z, lengths)
        logits[end:end + 1, model.tokenizer.end] = 1e9
        return logits
    monkeypatch.setattr(model.text_vae, "decode", ending)
    latents.clear()
    assert sample.generate_text(model, [STORY], s=S, max_tokens=99) == [short]
    assert len(latents) == end // BLOCK - (end - 5) // BLOCK + 1, "generation goes on past the end"


# ---- what the prior is fed ---------------------------------------------------------------------------------

def test_clean_repaint(model, calls):
    """Known latents of the first block: bit-identical at every step and in the context, fed t = 0."""
    prefix = prefix_of(model, 2 * BLOCK + 3)
    z, _ = model.encode_text([model.tokenizer.encode(prefix)])
    sample.generate_text(model, [prefix], s=replace(S, guidance=3.0, steps=3, snap=False), max_tokens=2)
    past, *steps, commit = calls[:5]
    assert past[3] and torch.equal(past[0], z[:2 * BLOCK]) and len(steps) == 3
    for text, t, layout, is_commit in steps:
        assert not is_commit and layout.sample.tolist() == [0] * BLOCK + [1] * BLOCK     # and without context
        assert layout.segment.tolist() == [masks.N] * 2 * BLOCK and layout.block.tolist() == [2] * 2 * BLOCK
        assert torch.equal(text[:BLOCK], text[BLOCK:]) and torch.equal(text[:3], z[2 * BLOCK:])
        assert not t[:3].any() and not t[BLOCK:][:3].any() and t[3] > 0
    assert commit[3] and torch.equal(commit[0][:3], z[2 * BLOCK:]) and not commit[1].any()
    assert not torch.equal(steps[0][0][3], commit[0][3])


@pytest.mark.parametrize("mode", ("left", "right"))
def test_padding_fills_the_block_of_the_prefix(model, calls, mode):
    """With end tokens before or behind it; what is generated begins with a block."""
    prefix = prefix_of(model, 2 * BLOCK + 3)
    ids, end = model.tokenizer.encode(prefix), [model.tokenizer.end]
    sample.generate_text(replace(model, first_block=mode), [prefix], s=S, max_tokens=2)
    z, _ = model.encode_text([end + ids if mode == "left" else ids + end])
    past, *steps = calls
    close(past[0], z)
    assert past[3] and len(steps) == S.steps
    for _, t, layout, _ in steps:
        assert t.min() > 0 and layout.row.tolist() == list(range(3 * BLOCK, 4 * BLOCK))


@torch.no_grad()
def test_partial_repaint_leads_and_then_lets_go(model, calls):
    """The known latents under the noise of the time in the first half of the steps, each taken thrice."""
    prefix = prefix_of(model, 2 * BLOCK + 3)
    z, _ = model.encode_text([model.tokenizer.encode(prefix)])
    settings = replace(S, repaint_share=0.5, repaint_cycles=3, snap=False)
    sample.generate_text(replace(model, first_block="repaint"), [prefix], s=settings, max_tokens=2)
    past, *steps, commit = calls[:2 + 2 * 3 + 2]
    times = [t[0].item() for _, t, *_ in steps]
    assert times == pytest.approx([1, 1, 1, 0.75, 0.75, 0.75, 0.5, 0.25])
    for text, t, layout, is_commit in steps:
        assert not is_commit and (t == t[0]).all() and layout.block.tolist() == [2] * BLOCK
    for text, t, *_ in steps[3:6]:
        noise = (text[:3] - (1 - t[0]) * z[2 * BLOCK:]) / t[0]
        assert 0.6 < noise.std() < 1.4 and (text[:3] - z[2 * BLOCK:]).abs().max() > 0.1
    assert len({text[:3].sum().item() for text, *_ in steps}) == 8            # fresh noise every time
    assert commit[3] and not torch.equal(commit[0][:3], z[2 * BLOCK:])


@torch.no_grad()
def test_a_repainted_sample_does_not_depend_on_its_batch(model, calls):
    """Nor does one whose prefix fills its block. What is known has the noise of its time at any temperature."""
    prefixes = [prefix_of(model, BLOCK), prefix_of(model, BLOCK + 3)]
    repainted = replace(model, first_block="repaint")
    s = replace(S, repaint_cycles=2, temperature=0.0)
    both = sample.generate_text(repainted, prefixes, s=s, max_tokens=2 * BLOCK)
    for text, t, *_ in calls[1:3]:                             # both cycles of the first step
        assert t[0] == 1 and 0.6 < text[BLOCK:][:3].std() < 1.4 and not text[BLOCK:][3:].any()
    assert [sample.generate_text(repainted, [p], s=s, max_tokens=2 * BLOCK, first=i)[0]
            for i, p in enumerate(prefixes)] == both


@pytest.mark.parametrize("snap", (False, True))
@pytest.mark.parametrize("extra", (0, 3), ids=["whole block", "inside a block"])
def test_finished_blocks_join_the_context(model, calls, latents, snap, extra):
    """As they were transported, or as the encoder's means of the tokens they decode to."""
    prefix = prefix_of(model, BLOCK + extra)
    text = sample.generate_text(model, [prefix], s=replace(S, snap=snap, guidance=3.0), max_tokens=3 * BLOCK)
    head = model.tokenizer.encode(prefix)
    ids, (z, _) = list(head), model.encode_text([head])
    first, *rest = calls
    close(first[0], z[:BLOCK])
    z = z[:BLOCK]
    for made in latents:
        steps, rest = rest[:S.steps], rest[S.steps:]
        assert not any(commit for *_, commit in steps)
        decoded = model.text_vae.decode(torch.cat([z, made]), [len(z) + BLOCK]).argmax(-1).tolist()
        ids += decoded[len(ids):]
        whole = model.encode_text([ids])[0] if snap else torch.cat([z, made])
        if rest:                                                             # no one looks at the last
            (there, t, _, commit), *rest = rest
            assert commit and not t.any()
            close(there, whole[-BLOCK:])
        z = whole
    assert not rest and text[0] == model.tokenizer.decode(ids[len(head):][:3 * BLOCK])
    assert snap == ((whole[-BLOCK:] - made).abs().max() > 0.1)


@torch.no_grad()
def test_a_prefix_stays_as_it_was_encoded_alone(model, calls):
    """Where the text VAE looks ahead in its blocks, too, when what was generated is encoded anew."""
    ahead = train.new_model(train.parse([*TINY, "--block_len", str(BLOCK), "--vae_block_len", str(BLOCK)]),
                            data.GeneratedScenes(0, 32, 64))
    ahead = replace(model, text_vae=ahead.text_vae.eval())
    for p in ahead.text_vae.parameters():
        p.data.add_(torch.randn_like(p), alpha=0.15)
    prefix = prefix_of(model, BLOCK + 2)
    z, _ = ahead.encode_text([model.tokenizer.encode(prefix)])
    sample.generate_text(ahead, [prefix], s=S, max_tokens=2 * BLOCK)
    commits = [text for text, _, _, commit in calls if commit]
    assert len(commits) > 1 and torch.equal(commits[0], z[:BLOCK]) and torch.equal(commits[1][:2], z[BLOCK:])


def test_guidance_one_is_no_guidance(model, calls, latents):
    """w = 1 asks for no unconditional velocity; others take it in the same pass, without the caption; z is linear
    in w, and w = 0 what a model without any context makes."""
    sizes = []
    for w in (1.0, 0.0, 3.0):
        sample.generate_images(model, CAPTIONS, replace(S, steps=1, guidance=w))
        sizes.append([layout.task.numel() for *_, layout, _ in calls])
        calls.clear()
    assert sizes == [[3, 3], [3, 6], [3, 6]]                     # the captions, then the images
    conditional, unconditional, guided = latents
    close(guided, unconditional + 3.0 * (conditional - unconditional))
    sample.generate_images(model, CAPTIONS[::-1], replace(S, steps=1, guidance=0.0))
    close(latents[3], unconditional)
    assert (conditional - unconditional).abs().max() > 1e-2
    alone = pack([Sample(T2I, image=(4, 4))] * 3, BLOCK)
    z = np.concatenate([g.standard_normal((16, 32), np.float32) for g in sample.noise(S.seed, 0, 3)])
    close(sample.transport(sample.Context(model), alone, torch.from_numpy(z), replace(S, steps=1)), unconditional)


def test_guidance_is_off_where_there_is_no_context(model, calls):
    """The first block of a text without prefix has nothing to be guided by; the second has."""
    for prefix, sizes in ((prefix_of(model, 2), [1] * 4), (prefix_of(model, BLOCK), [1] + [2] * 4)):
        sample.generate_text(model, [prefix], s=replace(S, guidance=7.0), max_tokens=1)
        assert [layout.task.numel() for *_, layout, _ in calls] == sizes
        calls.clear()


def test_guidance_acts_inside_its_interval(model, calls):
    sample.generate_images(model, CAPTIONS[:1], replace(S, steps=10, guidance=3.0, shift=1.0,
                                                         interval=(0.25, 0.75)))
    assert len(calls) == 1 + 10
    guided = [float(t[0]) for _, t, layout, _ in calls if layout.task.numel() == 2]
    assert guided == pytest.approx([0.7, 0.6, 0.5, 0.4, 0.3])


def test_temperature_scales_the_noise(model, monkeypatch):
    begun, solve = [], flow.solve
    monkeypatch.setattr(flow, "solve", lambda f, z, *rest: begun.append(z.clone()) or solve(f, z, *rest))
    for temperature in (1.0, 0.5, 0.0):
        s = replace(S, steps=1, temperature=temperature)
        sample.generate_images(model, CAPTIONS[:1], s)
        sample.generate_text(model, [""], s=s, max_tokens=1)
    for whole, half, none in (begun[::2], begun[1::2]):                         # the image, the block of text
        assert whole.any() and torch.equal(half, 0.5 * whole) and torch.equal(none, 0.0 * whole)


def test_settings_are_the_tasks_own_and_what_the_flags_say():
    assert sample.settings(sample.parse(["t2i", "a cat"])) == sample.IMAGE
    assert sample.settings(sample.parse(["t2t", "a cat"])) == sample.TEXT != sample.IMAGE
    s = sample.settings(sample.parse(["t2t", "a cat", "--temperature", "0.5", "--no-kv_cache", "--seed", "3"]))
    assert s == replace(sample.TEXT, temperature=0.5, cached=False, seed=3)
    s = sample.settings(sample.parse(["t2i", "a cat", "--interval", "0.1", "0.9", "--shift", "2"]))
    assert s == replace(sample.IMAGE, interval=[0.1, 0.9], shift=2.0)


@pytest.mark.parametrize("solver", flow.SOLVERS)
def test_calls_of_a_solver(model, calls, latents, solver):
    expected = {"euler": 1, "heun": 2, "ab2": 1, "rk4": 4}[solver]
    sample.generate_images(model, CAPTIONS[:1], replace(S, steps=5, solver=solver))
    assert len(calls) == 1 + 5 * expected
    sample.generate_images(model, CAPTIONS[:1], replace(S, steps=5))
    assert torch.equal(*latents) == (solver == "euler")


def test_the_time_grid_of_images_follows_their_size(model, calls):
    """The shift of training: 12 x 16 positions of 32 channels are 6144 numbers, above 4096."""
    sample.generate_images(model, CAPTIONS[:1], replace(S, steps=2), (96, 128))
    shifted = flow.shift_time(torch.tensor(0.5), math.e * flow.image_shift(6144))
    assert float(calls[2][1][0]) == pytest.approx(float(shifted)) and shifted > 0.5
    calls.clear()
    sample.generate_images(replace(model, image_loc=0.0), CAPTIONS[:1], replace(S, steps=2))
    assert float(calls[2][1][0]) == 0.5
    calls.clear()
    sample.generate_images(model, CAPTIONS[:1], replace(S, steps=2, shift=1.0), (96, 128))
    assert float(calls[2][1][0]) == 0.5


# ---- command line ------------------------------------------------------------------------------------------

@pytest.fixture
def here(tiny, tmp_path, monkeypatch):
    """An empty working folder, and the flags that name the checkpoint and keep sampling short."""
    monkeypatch.chdir(tmp_path)
    return ["--checkpoint", str(tiny / "ckpt.pt"), "--steps", "2"]


def test_t2i(here, capsys):
    assert sample.main(["t2i", CAPTIONS[0], "--out", "a.png", *here]) == 0
    assert Image.open("a.png").text["caption"] == CAPTIONS[0] and Image.open("a.png").size == (32, 32)
    assert capsys.readouterr().out.startswith("a.png ")
    prompt = "ein großes rotes Quadrat 红"
    assert sample.main(["t2i", prompt, "--out", "b.png", "--n", "3", "--size", "32", "48", *here]) == 0
    assert {p.name for p in Path().iterdir()} == {"a.png", "b_0.png", "b_1.png", "b_2.png"}
    drawn = [Image.open(f"b_{i}.png") for i in range(3)]
    assert all(x.text["caption"] == prompt and x.size == (48, 32) for x in drawn)
    assert not np.array_equal(drawn[0], drawn[1])
    assert sample.main(["t2i", CAPTIONS[0], "--out", "c.png", "--no-kv_cache", *here]) == 0
    assert np.abs(np.asarray(Image.open("a.png"), int) - np.asarray(Image.open("c.png"), int)).max() <= 1


def test_it2t(here, capsys):
    Image.fromarray(picture(0, (40, 60))).save("a.jpg")
    assert sample.main(["it2t", "a.jpg", *here]) == 0
    first = capsys.readouterr().out
    assert sample.main(["it2t", "a.jpg", "describe the image.", "--seed", "0", *here]) == 0
    assert capsys.readouterr().out == first
    assert sample.main(["it2t", "a.jpg", "what color is it?", "--n", "2", "--temperature", "1",
                        "--max_tokens", "4", *here]) == 0
    assert len(capsys.readouterr().out.split("\n")) >= 3


def test_t2t(here, capsys):
    assert sample.main(["t2t", "there is a red circle.", "--solver", "heun", "--guidance", "2", *here]) == 0
    assert capsys.readouterr().out.startswith("there is a red circle.")
    assert sample.main(["t2t", "", *here]) == 0                  # from nothing: the start of some text


# ---- bad input: one line, status 2, nothing written --------------------------------------------------------

def fails(argv, capsys, *words):
    """main refuses argv in one line that holds the words, and leaves the working folder as it was."""
    before = {p: p.read_bytes() for p in Path().rglob("*") if p.is_file()}
    try:
        code = sample.main(argv)
    except SystemExit as exit_:
        code = exit_.code
    out, err = capsys.readouterr()
    assert code == 2 and out == "" and re.fullmatch(r"sample\.py: [^\n]+\n", err), (code, out, err)
    for word in words:
        assert word in err, err
    assert {p: p.read_bytes() for p in Path().rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("argv, words", [
    (["t2i", "a cat", "--size", "33"], ["33 x 33", "32 x 32", "40 x 40"]),
    (["t2i", "a cat", "--size", "0"], ["0 x 0", "8 x 8"]),
    (["t2i", "a cat", "--size", "32", "32", "32"], ["--size", "height and width"]),
    (["t2i", "a cat", "--steps", "0"], ["--steps 0", "at least 1"]),
    (["t2i", "a cat", "--n", "0"], ["--n 0", "at least 1"]),
    (["t2i", "a cat", "--seed", "-1"], ["--seed -1"]),
    (["t2i", "a cat", "--shift", "0"], ["shift 0"]),
    (["t2i", "a cat", "--interval", "0.9", "0.1"], ["--interval 0.9 0.1"]),
    (["t2i", "a cat", "--guidance", "nan"], ["--guidance nan"]),
    (["t2t", "a cat", "--temperature", "-1"], ["--temperature -1", "from 0 to"]),
    (["t2t", "a cat", "--n", "2", "--temperature", "0"], ["--n 2", "--temperature"]),
    (["t2i", "a cat", "--solver", "rk5"], ["rk5", "euler"]),
    (["t2i", "  "], ["prompt is empty"]),
    (["it2t", "a.png", ""], ["prompt is empty"]),
    (["t2t", "a \udcff cat"], ["prompt", "not UTF-8"]),
    (["t2i"], ["prompt"]),
    (["t2v", "a cat"], ["t2v", "t2i"]),
    ([], ["task"]),
    (["t2i", "a cat", "--out", "no/such/a.png"], ["no/such/a.png", "folder no/such"]),
    (["t2i", "a cat", "--out", "a.jpg"], ["a.jpg", ".png"]),
    (["t2t", "a cat", "--max_tokens", "0"], ["--max_tokens 0"]),
    (["it2t", "a.png", "what?", "--max_tokens", "-1"], ["--max_tokens -1"]),
    (["it2t", "a.png"], ["a.png", "does not exist"]),
    (["t2i", "a cat", "--guidence", "3"], ["--guidence", "did you mean --guidance"]),
    (["t2i", "a cat", "--device", "foo"], ["--device foo"]),
    (["t2i", "a cat", "--device", "meta"], ["--device meta"]),
    (["t2i", "a cat", "--seed", str(2 ** 70)], ["--seed", "2^56"]),
    (["score", "a cat", "sat", "--guidance", "3"], ["--guidance is no flag of this task"]),
    (["t2t", "a cat", "--maxtokens", "3"], ["did you mean --max_tokens"]),
    (["t2i", "a cat", "--guid", "3"], ["--guid"]),
    (["t2t", "a cat", "--steps", "many"], ["--steps", "many"]),
])
def test_bad_flags(argv, words, here, capsys):
    fails(argv if "--steps" in argv else [*argv, *here] if argv else argv, capsys, *words)


def test_files_that_are_no_images(here, capsys):
    good = Path("good.png")
    Image.fromarray(picture(0)).save(good)
    for content in (b"", b"hello", good.read_bytes()[:200]):
        Path("bad.png").write_bytes(content)
        fails(["it2t", "bad.png", *here], capsys, "bad.png")
    fails(["it2t", ".", *here], capsys, "image .")


class Harmful:
    """Writes a file when it is unpickled."""
    def __reduce__(self):
        return Path.touch, (Path("ran"),)


def test_bad_checkpoints(here, tiny, capsys):
    fails(["t2t", "a", "--checkpoint", "no/ckpt.pt"], capsys, "no/ckpt.pt", "train.py")
    fails(["t2t", "a", "--checkpoint", "."], capsys, "no such checkpoint")
    bad, whole = Path("bad.pt"), (tiny / "ckpt.pt").read_bytes()
    flags = ["t2i", "a cat", "--checkpoint", str(bad)]
    for content in (b"", b"hello", whole[:100], whole[:len(whole) // 2], whole[:-1], pickle.dumps(Harmful())):
        bad.write_bytes(content)
        fails(flags, capsys, "bad.pt", "not a readable checkpoint")
    torch.save({"format": sample.FORMAT, "config": Harmful()}, bad)
    fails(flags, capsys, "not a readable checkpoint")
    assert not Path("ran").exists(), "loading must not run code"
    for foreign in ({"weight": torch.zeros(3)}, torch.zeros(3), {"format": "unified-cola-0"}):
        torch.save(foreign, bad)
        fails(flags, capsys, "bad.pt", "not a checkpoint of this program")
    with zipfile.ZipFile(tiny / "ckpt.pt") as file:
        largest = max(file.infolist(), key=lambda entry: entry.file_size)
    flipped = bytearray(whole)
    flipped[largest.header_offset + largest.file_size] ^= 1             # of a weight: only its checksum tells
    bad.write_bytes(flipped)
    fails(flags, capsys, "bad.pt", "not a readable checkpoint", largest.filename)
    for key in ("config", "tokenizer", "ema", "progress"):
        checkpoint = sample.read_checkpoint(tiny / "ckpt.pt")
        del checkpoint[key]
        torch.save(checkpoint, bad)
        fails(flags, capsys, "bad.pt", "damaged", key)
    checkpoint = sample.read_checkpoint(tiny / "ckpt.pt")
    checkpoint["config"]["mmdit"]["layers"] = 3
    torch.save(checkpoint, bad)
    fails(flags, capsys, "another architecture")
    for name, value in (("image_loc", 1e4), ("image_loc", float("nan")), ("time_law", "cosine")):
        checkpoint = sample.read_checkpoint(tiny / "ckpt.pt")
        checkpoint["args"][name] = value
        torch.save(checkpoint, bad)
        fails(flags, capsys, "--image_loc")


@pytest.mark.parametrize("path", (["config", "image_hw"], ["config", "tasks"], ["tokenizer", "tokens"], ["tokenizer", "special", 0],
                                  ["model", "mmdit"], ["ema", "mmdit", 0], ["args", "image_loc"], ["format"], ["progress", "mmdit"]))
def test_a_tensor_that_claims_to_be_large_costs_nothing(tiny, tmp_path, path):
    """A number that says it is two thousand million of them, wherever it stands."""
    state = torch.load(tiny / "ckpt.pt", weights_only=True)
    at = state
    for name in path[:-1]:
        at = at[name]
    at[path[-1] if path[-1] else next(iter(at))] = torch.zeros(1).expand(2 * 10 ** 9)
    torch.save(state, tmp_path / "ckpt.pt")
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError) as error:
        sample.load(tmp_path / "ckpt.pt")
        train.prepare(train.parse(["--resume", "auto", "--out_dir", str(tmp_path)]))
        sample.build(sample.read_checkpoint(tmp_path / "ckpt.pt"), "model")
    assert "\n" not in str(error.value) and time.monotonic() - began < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000                       # KiB


def test_help(capsys):
    for argv in (["--help"], *([task, "--help"] for task in ("t2i", "it2t", "t2t", "score"))):
        with pytest.raises(SystemExit) as exit_:
            sample.main(argv)
        assert exit_.value.code == 0 and "usage: sample.py" in capsys.readouterr().out
