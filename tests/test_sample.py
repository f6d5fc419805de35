"""pytest tests/test_sample.py"""
import math
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoint
import config
import data
import flow
import masks
import sample
from cola import Tokenizer
from conftest import TINY
from cuda_attention import make_plan
from masks import T2I, Sample, pack
from sample import Settings
from text_vae import TextVAE

CAPTIONS = ["a large red circle above a small blue square on a gray background", "a cat",
            "a small green cross above a small cyan star, which is above a small red triangle"]
STORY = ("there is a red circle. the background is gray. there are two objects. "
         "the circle is above a square.")
BLOCK = 4
S = Settings(steps=4)


def system(*flags):
    """A random model in which every weight matters: none is zero, as some are at the start."""
    args = config.merge(config.parse([*TINY, "--block_len", str(BLOCK), *flags]))
    cola = checkpoint.new_model(args, data.Scenes(0, (32, 32), 64))
    for part in cola.parts().values():
        for p in part.eval().parameters():
            p.data.add_(torch.randn_like(p), alpha=0.15)
    return cola


@pytest.fixture(scope="module")
def model():
    return system()


@pytest.fixture
def latents(monkeypatch):
    """What every call of transport returned, in order."""
    found, transport = [], sample.transport
    monkeypatch.setattr(sample, "transport",
                        lambda *given: found.append(transport(*given)) or found[-1])
    return found


@pytest.fixture
def calls(model):
    """(text latents, time of each position, layout, commit) of every pass through the prior."""
    found = []

    def record(module, args, options):
        text, _, t, t_index, layout, *_ = args
        found.append((text.clone(), t[t_index], layout, options.get("commit", False)))
    hook = model.mmdit.register_forward_pre_hook(record, with_kwargs=True)
    yield found
    hook.remove()


def prefix_of(model, n):
    """The longest beginning of the story with n tokens."""
    return next(STORY[:i] for i in range(len(STORY), -1, -1)
                if len(model.tokenizer.encode(STORY[:i])) == n)


def picture(seed, hw=(32, 32)):
    return np.random.default_rng(seed).integers(0, 255, (*hw, 3), dtype=np.uint8)


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-4, rtol=0)

# ---- The context -------------------------------------------------------------------------------

class Uncached(sample.Context):
    """The oracle of the cache: every call computes the whole context again."""
    def __init__(self, model):
        super().__init__(model)
        self.text, self.image, self.layout = self.no_text, self.no_image, pack([], BLOCK)

    def plan(self, layout):
        return make_plan(masks.concat(self.layout, layout))

    def velocity(self, text, image, t, t_index, layout, plan):
        t_index = torch.cat([torch.zeros(len(self.layout), dtype=torch.long), t_index + 1])
        v_text, v_image, _ = self.model.mmdit(
            torch.cat([self.text, text]), torch.cat([self.image, image]), torch.tensor([0.0, *t]),
            t_index, masks.concat(self.layout, layout), plan)
        return v_text[len(self.text):], None if v_image is None else v_image[len(self.image):]

    def add(self, text, image, layout):
        self.text, self.image = torch.cat([self.text, text]), torch.cat([self.image, image])
        self.cache.layout = self.layout = masks.concat(self.layout, layout)


def test_the_cache_equals_recomputation(model, latents, monkeypatch):
    """Every remainder of a prefix, from no whole block to two, and four further blocks."""
    s = replace(S, guidance=3.0)
    prefixes = [prefix_of(model, n) for n in range(3 * BLOCK)]
    prompts, images = ["describe the image.", "what is above the blue square?", "a"], range(3)

    def everything():
        latents.clear()
        texts = sample.generate_text(model, prefixes, settings=s, max_tokens=3 * BLOCK + 1)
        texts += sample.generate_text(model, prefixes[1:6:2], prompts,
                                      [picture(i) for i in images], s, 2 * BLOCK)
        sample.generate_images(model, CAPTIONS, s, (32, 48))
        return texts, list(latents)

    texts, z = everything()
    monkeypatch.setattr(sample, "Context", Uncached)
    oracle_texts, oracle_z = everything()
    assert texts == oracle_texts and len(set(texts)) == len(texts) and len(z) > 6
    for a, b in zip(z, oracle_z, strict=True):
        close(a, b)
    assert not torch.equal(z[0], oracle_z[0]), "the two ways of computing must differ"

# ---- Seeds and lengths -------------------------------------------------------------------------

def test_a_sample_is_the_same_alone_and_in_a_batch(model, latents):
    """And another one where the number, the caption, the question or the seed is another."""
    s = replace(S, guidance=3.0)
    batch = sample.generate_images(model, CAPTIONS, s, first=5)
    for i in range(3):
        alone = sample.generate_images(model, CAPTIONS[i:i + 1], s, first=5 + i)
        close(latents[-1], latents[0].chunk(3)[i])
        assert np.abs(alone[0].astype(int) - batch[i]).max() <= 1
    assert not np.array_equal(*sample.generate_images(model, CAPTIONS[:1] * 2, s))
    prefixes = [prefix_of(model, n) for n in (0, 3, 9)]
    for more in ((), (["a", "b c d", ""], [picture(i) for i in range(3)])):
        write = lambda part, first, seed=0: sample.generate_text(
            model, *(x[part] for x in (prefixes, *more)), settings=replace(S, seed=seed),
            max_tokens=10, first=first)
        batch = write(slice(3), 5)
        assert len(set(batch)) == 3 and not set(batch) & set(write(slice(3), 5, seed=1))
        for i in range(3):
            assert write(slice(i, i + 1), 5 + i) == [batch[i]]


def test_max_tokens_cuts_and_the_end_token_ends(model, monkeypatch):
    write = lambda n: sample.generate_text(model, [STORY], settings=S, max_tokens=n)[0]
    short, long = write(4), write(8)             # blocks end at 1, 5 and 9 tokens
    assert long.startswith(short) and short != long
    decode, end = model.text_vae.decode, len(model.tokenizer.encode(STORY)) + 4

    def ending(z, lengths):
        logits = decode(z, lengths)
        logits[end:end + 1, model.tokenizer.end] = 1e9
        return logits
    monkeypatch.setattr(model.text_vae, "decode", ending)
    assert write(99) == short

# ---- What the prior sees -----------------------------------------------------------------------

def test_clean_repaint(model, calls):
    """Known latents of the first block: at every step bit-identical and at t = 0."""
    prefix = prefix_of(model, 2 * BLOCK + 3)
    z, _ = model.encode_text([model.tokenizer.encode(prefix)])
    s = replace(S, guidance=3.0, steps=3, snap=False)
    sample.generate_text(model, [prefix], settings=s, max_tokens=2)
    past, *steps, commit = calls[:5]
    assert past[3] and torch.equal(past[0], z[:2 * BLOCK]) and len(steps) == 3
    for text, t, layout, is_commit in steps:               # with context and without
        assert not is_commit and layout.sample.tolist() == [0] * BLOCK + [1] * BLOCK
        assert layout.block.tolist() == [2] * 2 * BLOCK
        assert torch.equal(text[:BLOCK], text[BLOCK:]) and torch.equal(text[:3], z[2 * BLOCK:])
        assert not t[:3].any() and not t[BLOCK:][:3].any() and t[3] > 0
    assert commit[3] and torch.equal(commit[0][:3], z[2 * BLOCK:]) and not commit[1].any()
    assert not torch.equal(steps[0][0][3], commit[0][3])


@pytest.mark.parametrize("mode", ("left", "right"))
def test_padding_fills_the_block_of_the_prefix(model, calls, mode):
    """With end tokens before or after it; generation starts with a new block."""
    ids, end = model.tokenizer.encode(STORY)[:2 * BLOCK + 3], [model.tokenizer.end]
    sample.generate_text(replace(model, first_block=mode), [prefix_of(model, 2 * BLOCK + 3)],
                         settings=S, max_tokens=2)
    close(calls[0][0], model.encode_text([end + ids if mode == "left" else ids + end])[0])
    for _, t, layout, _ in calls[1:]:
        assert t.min() > 0 and layout.row.tolist() == list(range(3 * BLOCK, 4 * BLOCK))


@torch.no_grad()
def test_partial_repaint(model, calls):
    """The known latents under the noise of the time in half of the steps, each taken three times;
    the same alone and in a batch, and at any temperature."""
    repainted = replace(model, first_block="repaint")
    prefixes = [prefix_of(model, 2 * BLOCK + 3), prefix_of(model, BLOCK)]
    z, _ = model.encode_text([model.tokenizer.encode(prefixes[0])])
    s = replace(S, repaint_share=0.5, repaint_cycles=3, snap=False, temperature=0.0)
    write = lambda prefixes, first=0: sample.generate_text(repainted, prefixes, settings=s,
                                                           max_tokens=2 * BLOCK, first=first)
    texts = write(prefixes[:1])
    past, *steps, commit = calls[:2 + 2 * 3 + 2]
    assert [t[0].item() for _, t, *_ in steps] == [1, 1, 1, 0.75, 0.75, 0.75, 0.5, 0.25]
    assert not steps[0][0][3:].any(), "at temperature 0 only known latents have noise"
    for text, t, *_ in steps[:6]:
        noise = (text[:3] - (1 - t[0]) * z[2 * BLOCK:]) / t[0]
        assert (t == t[0]).all() and 0.6 < noise.std() < 1.4
    assert len({text[:3].sum().item() for text, *_ in steps}) == 8, "fresh noise at every step"
    assert commit[3] and not torch.equal(commit[0][:3], z[2 * BLOCK:])
    assert write(prefixes) == texts + write(prefixes[1:], 1)


def test_a_finished_text_takes_no_more_work(model, calls, monkeypatch):
    """Its blocks neither join the context nor are generated."""
    end = model.tokenizer.end
    tokens = iter([[end] * BLOCK, [5], [5] * BLOCK, [end] * BLOCK])    # of the texts in turn
    monkeypatch.setattr(sample, "likeliest", lambda *given: next(tokens))
    prefix = prefix_of(model, BLOCK + 3)
    texts = sample.generate_text(model, ["", prefix], settings=S)
    assert texts == ["", model.tokenizer.decode([5] * (1 + BLOCK))]
    joined, made = ([len(layout) // BLOCK for *_, layout, commit in calls if commit == joins]
                    for joins in (True, False))
    assert joined == [1, 1, 1] and made == [2] * S.steps + [1] * 2 * S.steps


@pytest.mark.parametrize("snap", (False, True))
@pytest.mark.parametrize("extra", (0, 3), ids=["whole block", "inside a block"])
def test_finished_blocks_join_the_context(model, calls, latents, snap, extra):
    """As they were transported, or as the encoder's means of the tokens they decode to."""
    prefix = prefix_of(model, BLOCK + extra)
    text = sample.generate_text(model, [prefix], settings=replace(S, snap=snap, guidance=3.0),
                                max_tokens=3 * BLOCK)
    head = model.tokenizer.encode(prefix)
    ids, z = list(head), model.encode_text([head])[0][:BLOCK]
    first, *rest = calls
    close(first[0], z)
    for made in latents:
        steps, rest = rest[:S.steps], rest[S.steps:]
        assert not any(commit for *_, commit in steps)
        generated = torch.cat([z, made])
        logits = model.text_vae.decode(generated, [len(generated)])
        ids += logits.argmax(-1).tolist()[len(ids):]       # decoded tokens never change
        z = model.encode_text([ids])[0] if snap else generated
        if rest:                                           # the last block joins no context
            (joined, t, _, commit), *rest = rest
            assert commit and not t.any()
            close(joined, z[-BLOCK:])
    assert not rest and text[0] == model.tokenizer.decode(ids[len(head):][:3 * BLOCK])
    assert snap == ((z[-BLOCK:] - made).abs().max() > 0.1)


@pytest.fixture(scope="module")
def released():
    """As the public release: both have blocks of 16, and a token that is not the end fills them."""
    cola = system("--block_len", "16", "--vae_block_len", "16")
    tokens, special = cola.tokenizer.tokens, cola.tokenizer.special
    tokenizer = Tokenizer(tokens, cola.tokenizer.pattern, special | {"<|pad|>": len(tokens) + 1})
    vae = TextVAE(replace(cola.text_vae.config, vocab_size=tokenizer.n_vocab)).eval()
    for p in vae.parameters():
        p.data.add_(torch.randn_like(p), alpha=0.15)
    return replace(cola, text_vae=vae, tokenizer=tokenizer)


@pytest.mark.parametrize("n", range(1, 34))
def test_a_prefix_is_filled_to_whole_blocks_before_it_is_encoded(released, n, monkeypatch):
    """The latents that join the context or stay clean in the first block."""
    kept, tokenizer = [], released.tokenizer
    monkeypatch.setattr(sample.Context, "add", lambda self, z, image, layout: kept.append(z))
    monkeypatch.setattr(sample, "transport", lambda context, layout, z, s, known, noise:
                        kept.append(z[known]) or z)
    head = tokenizer.encode(prefix_of(released, n))
    sample.generate_text(released, [prefix_of(released, n)], settings=S, max_tokens=1)
    filled = head + [tokenizer.pad] * (-n % 16)
    assert len(head) == n and tokenizer.pad == tokenizer.end + 1
    close(torch.cat(kept), released.encode_text([filled])[0][:n])


def test_a_prefix_keeps_its_latents(model, calls):
    """Where the text VAE sees whole blocks, when more tokens have been generated."""
    model = replace(model, text_vae=system("--vae_block_len", str(BLOCK)).text_vae)
    prefix = prefix_of(model, BLOCK + 2)
    z, _ = model.encode_text([model.fill(model.tokenizer.encode(prefix))])
    sample.generate_text(model, [prefix], settings=S, max_tokens=2 * BLOCK)
    first, second, *_ = (text for text, *_, commit in calls if commit)
    assert torch.equal(first, z[:BLOCK]) and torch.equal(second[:2], z[BLOCK:BLOCK + 2])

# ---- Tokens ------------------------------------------------------------------------------------

def test_the_repetition_penalty():
    logits = torch.tensor([[2.0, 1.9, -1.0], [2.0, 1.0, -1.0], [-0.5, -0.6, -0.45]])
    assert sample.likeliest(logits, [], 1.1) == [0, 0, 2]
    assert sample.likeliest(logits, [0, 2, 0], 1.1) == [1, 0, 2]
    assert sample.likeliest(logits, [0, 2, 0], 1.5) == [1, 0, 1]
    assert sample.likeliest(logits, [0, 2, 0], 1.0) == [0, 0, 2]
    assert logits[0, 0] == 2.0                             # an argument is left alone


def test_tokens_of_the_blocks_before_are_penalized(model, monkeypatch):
    """All since the last whole block of the prefix, but none in the first block generated."""
    seen, likeliest = [], sample.likeliest
    monkeypatch.setattr(sample, "likeliest",
                        lambda *given: seen.append(given[1:]) or likeliest(*given))
    monkeypatch.setattr(model.tokenizer, "end", -1)        # no text ends
    prefixes = [prefix_of(model, BLOCK + 1), prefix_of(model, 2)]
    heads = [model.tokenizer.encode(prefix) for prefix in prefixes]
    sample.generate_text(model, prefixes, settings=replace(S, repetition_penalty=1.2),
                         max_tokens=2 * BLOCK)
    assert seen[:2] == [([], 1.2)] * 2
    for text, head in enumerate(heads):
        start = len(head) // BLOCK * BLOCK
        for block, (own, _) in enumerate(seen[text + 2::2], 1):
            assert len(own) == block * BLOCK and own[:len(head) - start] == head[start:]


def test_a_special_token_ends_a_text(model, monkeypatch):
    end, tokens = model.tokenizer.end, iter([[5, 6, 7, 8], [9, 4, 5, 6]])
    monkeypatch.setattr(model.tokenizer, "special", {"<|endoftext|>": end, "<|stop|>": 4})
    monkeypatch.setattr(sample, "likeliest", lambda *given: next(tokens))
    text, = sample.generate_text(model, [""], settings=replace(S, stop="<|stop|>"))
    assert text == model.tokenizer.decode([5, 6, 7, 8, 9])


def test_guidance_of_a_model_that_never_dropped_conditions_warns(model, capsys):
    data.warn_once.cache_clear()
    for guidance, learned, text_lines, image_lines in (
            (1.0, (), 0, 0), (2.0, masks.TASKS, 0, 0), (2.0, ("t2i",), 1, 0),
            (2.0, ("t2t",), 0, 1)):
        own, settings = replace(model, unconditional=learned), replace(S, guidance=guidance)
        sample.generate_text(own, ["a" * BLOCK], max_tokens=1, settings=settings)
        assert capsys.readouterr().err.count("guidance of t2t") == text_lines
        sample.generate_images(own, CAPTIONS, settings)
        assert capsys.readouterr().err.count("guidance of t2i") == image_lines


def test_a_missing_release_is_one_line(capsys):
    assert sample.main(["t2t", "cat", "--official", "no_folder"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("sample.py: ") and "no_folder" in err and err.count("\n") == 1

# ---- Guidance, times, noise --------------------------------------------------------------------

def test_guidance(model, latents):
    """z is linear in w; w = 1 takes one velocity, and w = 0 is the model without any context."""
    for w in (1.0, 0.0, 3.0):
        sample.generate_images(model, CAPTIONS, replace(S, steps=1, guidance=w))
    conditional, unconditional, guided = latents
    assert (conditional - unconditional).abs().max() > 1e-2
    close(guided, unconditional + 3.0 * (conditional - unconditional))
    layout = pack([Sample(T2I, image=(4, 4))] * 3, BLOCK)
    noise = sample.draw_noise(sample.make_rngs(0, 0, 3), 16, 32)
    with torch.no_grad():
        close(sample.transport(sample.Context(model), layout, noise, replace(S, steps=1)),
              unconditional)


def test_guidance_needs_a_context_and_acts_in_its_interval(model, calls):
    """The first block of a text without prefix has nothing to be guided by; the second has. A
    guided call has every sample twice."""
    for length, samples in ((2, [1] * 4), (BLOCK, [1] + [2] * 4)):
        prefix = prefix_of(model, length)
        sample.generate_text(model, [prefix], settings=replace(S, guidance=7.0), max_tokens=1)
        assert [layout.task.numel() for *_, layout, _ in calls] == samples
        calls.clear()
    s = replace(S, steps=10, guidance=3.0, shift=1.0, interval=(0.25, 0.75))
    sample.generate_images(model, CAPTIONS[:1], s)
    guided = [float(t[0]) for _, t, layout, _ in calls if layout.task.numel() == 2]
    assert guided == pytest.approx([0.7, 0.6, 0.5, 0.4, 0.3])


def test_temperature_scales_the_noise(model, monkeypatch):
    begun, solve = [], flow.solve
    monkeypatch.setattr(flow, "solve", lambda f, z, *rest: begun.append(z) or solve(f, z, *rest))
    for temperature in (1.0, 0.5):
        s = replace(S, steps=1, temperature=temperature)
        sample.generate_images(model, CAPTIONS[:1], s)
        sample.generate_text(model, [""], settings=s, max_tokens=1)
    for whole, half in (begun[::2], begun[1::2]):          # of the image, of the block of text
        assert whole.any() and torch.equal(half, 0.5 * whole)


def test_the_time_grid_of_images_follows_their_size(model, calls):
    """The shift of training: 12 x 16 positions of 32 channels are 6144 numbers, above 4096. Heun's
    solver takes two calls a step, the second at the end of it."""
    shifted = flow.shift_time(torch.tensor(0.5), math.e * flow.image_shift(6144)).item()
    for loc, hw, shift, middle in ((1.0, (96, 128), None, shifted), (0.0, None, None, 0.5),
                                   (1.0, (96, 128), 1.0, 0.5)):
        calls.clear()
        sample.generate_images(replace(model, image_loc=loc), CAPTIONS[:1],
                               replace(S, steps=2, shift=shift, solver="heun"), hw)
        assert [float(t[0]) for _, t, *_ in calls[1:]] == pytest.approx([1, middle, middle, 0])

# ---- Command line ------------------------------------------------------------------------------

@pytest.fixture
def here(tiny, tmp_path, monkeypatch):
    """An empty working folder, and the flags that name the checkpoint and keep sampling short."""
    monkeypatch.chdir(tmp_path)
    return ["--checkpoint", str(tiny / "ckpt.pt"), "--steps", "2", "--device", "cpu"]


def test_t2i(here):
    prompt = "ein großes rotes Quadrat 红"
    assert sample.main(["t2i", prompt, "--out", "a.png", *here, "--size", "48"]) == 0
    assert Image.open("a.png").text["caption"] == prompt and Image.open("a.png").size == (48, 48)
    assert sample.main(["t2i", prompt, "--n", "2", "--size", "32", "48", *here]) == 0
    drawn = [Image.open(f"sample_{i}.png") for i in range(2)]
    assert drawn[0].size == (48, 32) and not np.array_equal(*drawn)


def test_it2t_and_t2t(here, capsys):
    Image.fromarray(picture(0, (40, 60))).save("a.jpg")
    answers = []
    for more in ([], ["describe the image.", "--seed", "0"]):
        assert sample.main(["it2t", "a.jpg", *more, *here]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]
    for prompt in ("", "there is a"):
        assert sample.main(["t2t", prompt, "--guidance", "2", *here]) == 0
    assert "\nthere is a" in capsys.readouterr().out


def test_settings_are_those_of_the_task_and_of_the_flags():
    assert sample.parse(["t2i", "a cat"]).settings == sample.IMAGE
    assert sample.parse(["video", "a cat"]).settings == sample.EDIT
    assert sample.parse(["edit", "a.png", "a cat"]).settings == sample.EDIT != sample.IMAGE
    assert sample.parse(["t2t", "a cat"]).settings == sample.TEXT != sample.IMAGE
    assert sample.parse(["t2t", "a cat", "--official", "x"]).settings == sample.RELEASED
    s = sample.parse(["t2t", "a", "--temperature", "0.5", "--no-snap", "--seed", "3"]).settings
    assert s == replace(sample.TEXT, temperature=0.5, snap=False, seed=3)


@pytest.mark.parametrize("line, word", [
    ("t2i cat --size 33 32", "33"), ("t2i cat --size 32 32 32", "--size"),
    ("t2i cat --steps 0", "--steps"), ("t2i cat --seed -1", "--seed"),
    ("t2i cat --guidance nan", "--guidance"), ("t2i cat --guid 3", "--guid"),
    ("t2i cat --solver rk5", "rk5"), ("t2i cat --out no/such/a.png", "no/such"),
    ("t2i cat --out .", "--out"), ("t2i cat --n 3 --temperature 0", "--n"),
    ("t2i '' --n 3", "prompt"), ("t2t cat --temperature -1", "--temperature"),
    ("t2t cat --max_tokens many", "--max_tokens"), ("t2t cat --checkpoint no.pt", "no.pt"),
    ("t2t cat --official no_folder", "--checkpoint"), ("it2t no.png", "no.png"),
    ("it2t text.png", "text.png"), ("t2v cat", "t2v"), ("t2i", "prompt"),
    ("edit text.png 'make it blue.'", "not for ii"), ("edit a.png", "prompt"),
    ("story 'a cat' ''", "prompt"), ("video cat --images a.png --frames 1", "--frames"),
    ("video cat --out v.png", ".gif"),
])
def test_a_mistake_is_one_line_and_status_2(line, word, here, capsys, monkeypatch):
    """Before anything is drawn; a picture that cannot be read is named."""
    Path("text.png").write_text("hello")
    monkeypatch.setattr(sample, "transport", lambda *given: pytest.fail("something was drawn"))
    task, *given = shlex.split(line)
    try:
        status = sample.main([task, *here, *given])
    except SystemExit as exit_:
        status = exit_.code
    out, err = capsys.readouterr()
    assert status == 2 and not out and err.startswith("sample.py: ") and err.count("\n") == 1
    assert word in err and [p.name for p in Path().iterdir()] == ["text.png"]


def test_an_interrupt_is_status_130(here, capsys, monkeypatch):
    def interrupt(*given):
        raise KeyboardInterrupt
    monkeypatch.setattr(sample, "transport", interrupt)
    assert sample.main(["t2i", "a cat", *here]) == 130 and not capsys.readouterr().err
