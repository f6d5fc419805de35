"""pytest tests/test_batches.py"""
import copy
import statistics
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import batches
import checkpoint
import config
import cuda_attention
import data
import flow
import masks
from batches import Batches
from cola import FIRST_BLOCK
from conftest import TINY
from data import Purpose
from masks import II, IT2T, T2I, T2T, TASKS, VID, I, J, N, P
from text_vae import TextVAE

CPU = torch.device("cpu")


def batches_for(*flags):
    args = config.merge(config.parse([*TINY, *flags]))
    dataset = data.open_data(args)
    return Batches(args, dataset, checkpoint.new_model(args, dataset))


@pytest.fixture(scope="module")
def made():
    return batches_for("--cfg_drop_text", "0.1", "--w_filler", "1")


def with_flags(made, *flags, model=None):
    """The same data and system, or another one, under other flags."""
    return Batches(config.merge(config.parse([*TINY, *flags])), made.dataset, model or made.model)


def texts_of(made, task, k):
    """Those that the text VAE encodes for a sample: its text, then its instruction, if any."""
    item = getattr(made.dataset, TASKS[task])(k)
    return [item] if task == T2T else [item[0]] if task == T2I else [item[2], item[0]]

# ---- A batch against its samples ---------------------------------------------------------------

@pytest.mark.parametrize("task", [T2T, T2I, IT2T], ids=TASKS[:3])
def test_batch_against_its_samples(made, task):
    """Every position, from the sample's own tokens, cut and draws: the same in another batch."""
    args, model, bl, seen = made.args, made.model, made.args.block_len, set()
    b = made.prior([(task, k) for k in range(30)])
    is_text, t = b.layout.segment != I, b.t[b.t_index]
    tokens = b.ids[b.source]                                   # one token per latent
    noisy = b.layout.segment[is_text] == N
    assert torch.equal((t > 0).nonzero()[:, 0], b.targets) and (b.text_task == task).all()
    assert torch.equal(t[is_text] > 0, b.text_moves) and torch.equal(t[~is_text] > 0, b.image_moves)
    assert torch.equal(b.eps_text.any(1), noisy) and not b.text_moves[~noisy].any()
    assert task == T2T or b.text_moves[noisy].all()            # else below: some are given
    assert (b.image_moves == (task == T2I)).all() and len(b.z_image) == (~is_text).sum()
    for s in range(30):
        (text, *prompt), draw = texts_of(made, task, s), data.rng(0, s, Purpose.DROP)
        text, prompt = model.ids(text, end=True), model.ids("".join(prompt), end=False)
        dropped = draw.random() < (args.cfg_drop if task == T2I else args.cfg_drop_text)
        auxiliary = task == T2I and draw.random() < args.aux_caption
        cut = int(draw.integers(text.index(model.tokenizer.end) + 1)) if task == T2T else 0
        skip = cut // bl * bl if task == T2T and draw.random() < 0.5 else 0
        n = len(text)
        whole = {T2T: "C" * (n - bl) + "N" * (n - skip),
                 T2I: "C" * n + "I" * 16 + "N" * n * auxiliary,
                 IT2T: "P" * len(prompt) + "I" * 16 + "C" * (n - bl) + "N" * n}[task]
        alone = {T2T: "N" * (n - skip), T2I: "I" * 16, IT2T: "N" * n}[task]
        segments, mine = alone if dropped else whole, b.layout.sample == s
        assert "".join(masks.SEGMENTS[x] for x in b.layout.segment[mine]) == segments
        p = segments.count("P")
        index = [*range(segments.count("C")), *range(n - segments.count("N"), n)]
        assert tokens[mine[is_text]].tolist() == prompt[:p] + [text[i] for i in index]
        first = b.source[mine[is_text]][p:] - torch.tensor(index)
        assert len(first.unique()) <= 1                        # C and N share the latents
        rows = [*range(p), *(len(prompt) + i for i in index)]
        assert b.layout.row[mine & is_text].tolist() == rows
        seen |= {(dropped, auxiliary and not dropped)}
    assert len(seen) == (3 if task == T2I else 2)
    alone = made.prior([(task, s)])
    assert torch.equal(b.eps_text[mine[is_text]], alone.eps_text)
    assert torch.equal(b.eps_image[mine[~is_text]], alone.eps_image)
    torch.testing.assert_close(t[mine], alone.t[alone.t_index])
    text = dict.fromkeys(TASKS, 0) | {TASKS[task]: int(b.text_moves.sum()) * 16}
    assert b.counts() == text | {
        "positions": len(b.t_index), "image": int(b.image_moves.sum()) * 32, "tokens": len(b.ids),
        "masked": int(b.masked.sum())}


@pytest.mark.parametrize("task", [II, VID])
def test_images_in_sequence_against_their_turns(made, task):
    """Half of those without text are without images, too; each image has a time of its own."""
    made, seen = with_flags(made, "--cfg_drop", "0.4"), set()
    b, work = made.prior([(task, k) for k in range(40)]), range(40)
    segment, t, tokens = b.layout.segment, b.t[b.t_index], b.ids[b.source]
    is_image = masks.is_image(segment)
    assert torch.equal(t > 0, segment == J) and torch.equal((t > 0).nonzero()[:, 0], b.targets)
    assert torch.equal(b.image_moves, segment[is_image] == J) and not b.text_moves.any()
    bears_loss = int((t[b.layout.sample == 7] > 0).sum())
    assert made.prior([(task, 7)]).counts()["image"] == bears_loss * 32
    for k in work:
        turns = getattr(made.dataset, TASKS[task])(k)
        u = data.rng(0, k, Purpose.DROP).random()
        no_text, no_images = u < 0.4, u < 0.2
        mine = b.layout.sample == k
        for turn, (text, image, drawn) in enumerate(turns):
            here = mine & (b.layout.block == turn)
            found = {name: here & (segment == s) for name, s in (("P", P), ("I", I), ("J", J))}
            ids = [] if no_text or not text else made.model.ids(text, end=False)
            assert tokens[found["P"][~is_image]].tolist() == ids
            given = not no_images and turn < len(turns) - 1
            assert (int(found["J"].sum()), int(found["I"].sum())) == (16 * drawn, 16 * given)
            assert len(t[found["J"]].unique()) == drawn
            z = made.image_latents([image])
            for name in ("I", "J"):
                if found[name].any():
                    torch.testing.assert_close(b.z_image[found[name][is_image]], z)
        assert len(t[mine & (segment == J)].unique()) > 1 or sum(x.drawn for x in turns) == 1
        seen.add((no_text, no_images))
    assert len(seen) == 3 and b.eps_image[b.image_moves].std() > 0.9


@pytest.mark.parametrize("task", [II, VID])
def test_noise_of_an_image_is_near_the_image_before(made, task):
    """Where that is clean context, and at later times."""
    far = with_flags(made, model=replace(made.model, image_rho=0.0))
    made = with_flags(made, "--cfg_drop", "0.4")
    far.args = made.args
    (b, c), seen = ([x.prior([(task, k) for k in range(40)]) for x in (made, far)]), set()
    picture = b.layout.select(masks.is_image(b.layout.segment))
    of_image = [b.t[b.t_index], c.t[c.t_index]]
    of_image = [t[masks.is_image(b.layout.segment)] for t in of_image]
    for s, turn in {*zip(picture.sample.tolist(), picture.block.tolist())}:
        here = (picture.sample == s) & (picture.block == turn) & (picture.segment == J)
        before = (picture.sample == s) & (picture.block == turn - 1) & (picture.segment == I)
        eps, t = c.eps_image[here], of_image[1][here]
        if before.any():
            eps = flow.near(b.z_image[before], eps, 0.9) if here.any() else eps
            t = flow.shift_time(t, flow.near_shift(0.9))
        torch.testing.assert_close(b.eps_image[here], eps)
        torch.testing.assert_close(of_image[0][here], t)
        seen.add((bool(here.any()), bool(before.any())))
    assert {(True, True), (True, False)} <= seen
    torch.testing.assert_close(b.z_image, c.z_image)


def test_noise_is_far_from_an_image_of_another_size(made):
    """And times are not shifted there."""
    turns = [masks.Sample(II, image=(2, 3)), masks.Sample(II, image=(3, 2), turn=1, drawn=(3, 2)),
             masks.Sample(II, turn=2, drawn=(3, 2))]
    z, eps = torch.randn(2, 24, 32, generator=torch.Generator().manual_seed(0))
    noise, shift = made.first_noise([replace(made.ii(0), turns=turns)], z, eps)
    torch.testing.assert_close(noise, torch.cat([eps[:18], flow.near(z[12:18], eps[18:], 0.9)]))
    later = torch.tensor([flow.near_shift(0.9)], dtype=torch.float64)
    torch.testing.assert_close(shift, torch.cat([torch.ones(18, dtype=later.dtype),
                                                 later.expand(6)]))


@pytest.mark.parametrize("patch", (1, 2))
def test_filler_has_a_weight_of_its_own(made, patch):
    """From the latent behind the one with the first end token after the text; given ones have 0."""
    vae = TextVAE(replace(made.model.text_vae.config, patch_size=patch))
    model = replace(made.model, text_vae=vae, block_len=8)
    flags = "--w_filler 0.25 --cfg_drop 0 --aux_caption 1".split()
    made = with_flags(made, *flags, model=model)
    b = made.prior([(task, k) for task in (T2T, T2I, IT2T) for k in range(10)])
    is_text = b.layout.segment != I
    sample, segment = b.layout.sample[is_text], b.layout.segment[is_text]
    texts, seen = [made.t2t(k).texts[0] for k in range(10)], set()
    texts += [make(k).texts[-1] for make in (made.t2i, made.it2t) for k in range(10)]
    for s, text in enumerate(texts):
        noisy = (sample == s) & (segment == N)
        first_end = max(i for i, token in enumerate(text) if token != model.tokenizer.end) + 1
        want = [1.0 if i <= first_end // patch else 0.25 for i in range(len(text) // patch)]
        want = torch.tensor(want)[-int(noisy.sum()):] * b.text_moves[noisy]
        assert torch.equal(b.text_weight[noisy], want)
        seen |= {*want.tolist()}
    assert seen == {0.0, 0.25, 1.0} and not b.text_weight[segment != N].any()
    n = b.counts()
    for task, name in enumerate(TASKS):
        assert n[name] == 16 * float(b.text_weight[b.text_task == task].sum())


def test_a_text_cut_at_its_end_teaches_its_end_without_filler(made):
    """Padding at the cut, which sampling inserts as well, is not the end of the text."""
    model = replace(made.model, first_block="right", block_len=8)
    made, alone = with_flags(made, "--w_filler", "0", model=model), 0
    for k in range(150):
        b = made.prior([(T2T, k)])
        assert b.text_weight.any() == b.text_moves.any()
        alone += int(b.text_weight.sum() == 1)
    assert alone                                           # texts of which only the end is to come


def test_features_of_images(made, tmp_path):
    """Rows of the array by the number of the image; else the latents."""
    path, shape = tmp_path / "a.npy", (made.dataset.num_images, 16, 5)
    array = np.random.default_rng(0).standard_normal(shape).astype(np.float16)
    np.save(path, array)
    more = "--w_repa", "0.5", "--repa_layer", "1", "--repa_features", str(path)
    work = [(task, k) for task in (T2I, T2T, IT2T) for k in range(4)]
    ours = with_flags(made, *more)
    got = ours.prior(work).features
    images = [i for k in range(4) for i in ours.t2i(k).images]
    images += [i for k in range(4) for i in ours.it2t(k).images]
    assert ours.feature_channels == 5 and got.dtype == torch.float32
    assert torch.equal(got, torch.from_numpy(array[images]).flatten(0, 1).float())
    assert not ours.prior([(T2T, 0)]).features.numel()
    latents = with_flags(made, *more[:4])
    assert latents.prior(work).features is None and latents.feature_channels == made.cz
    for wrong in (array[1:], array[:, 1:], array[0], array.astype(int), np.array([{}] * 3)):
        np.save(path, wrong)
        with pytest.raises(ValueError, match="a.npy"):
            with_flags(made, *more)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="a.npy"):
        with_flags(made, *more)


@pytest.mark.parametrize("patch", (1, 2, 4))
@pytest.mark.parametrize("mode", FIRST_BLOCK)
def test_a_cut_text_is_what_sampling_makes_of_its_prefix(mode, patch, made):
    """Before the cut is what generate_text encodes, alone, as the VAE looks ahead in a block;
    padding stays clean and bears no loss."""
    vae = TextVAE(replace(made.model.text_vae.config, patch_size=patch, block_len=4))
    made = with_flags(made, model=replace(made.model, text_vae=vae, first_block=mode))
    model, end, seen, start = made.model, made.model.tokenizer.end, set(), 0
    b = made.prior([(T2T, k) for k in range(30)])
    for k in range(30):
        draw, again = (data.rng(0, k, Purpose.DROP) for _ in range(2))
        draw.random(), again.random()                          # is the condition dropped?
        ids, cut, stays = made.cut_text(made.dataset.t2t(k), draw)
        text = model.tokenizer.encode(made.dataset.t2t(k))
        at = int(again.integers(len(text) + 1))
        prefix, length, _ = model.align(text[:at], at)         # as in sampling
        assert ids[:cut * patch] == prefix and length == cut * patch
        assert ids[length:][:len(text) - at] == text[at:]
        assert {*ids[length + len(text) - at:]} == {end}
        assert made.t2t(k).texts == [ids] + [model.fill(prefix)] * (cut > 0)
        mine, n = b.layout.sample == k, len(ids) // patch
        row = b.layout.row[mine].numpy()
        assert np.array_equal(b.source[mine] - start, np.where(row < cut, n + row, row))
        start += sum(map(len, made.t2t(k).texts)) // patch
        noisy = mine & (b.layout.segment == N)
        index, t = b.layout.row[noisy].numpy(), b.t[b.t_index[noisy]]
        padded = {i // patch for i in range(length) if prefix[i] == end and mode != "repaint"}
        in_block = index // made.block_len == cut // made.block_len
        inside = (index < cut) & in_block & (mode != "repaint")
        assert set(stays) == {*padded}
        assert np.array_equal(t.numpy() == 0, np.isin(index, list(padded)) | inside)
        seen |= {word for word, there in (("padded", padded), ("inside", inside.any())) if there}
    assert ("padded" in seen) == (mode in ("left", "right") or mode == "clean" and patch > 1)
    assert ("inside" in seen) == (mode == "clean")


# ---- What a batch depends on -------------------------------------------------------------------

def test_tasks_of_a_step_follow_the_shares(made):
    shares = config.task_shares("t2t:1,t2i:2,it2t:0")
    picked = [batches.pick_task(shares, (m + 0.37) / 300) for m in range(300)]
    assert picked == [T2T] * 100 + [T2I] * 200 and batches.pick_task(shares, 1 - 2**-53) == T2I
    args = config.merge({"tasks": "t2t:1,t2i:2,it2t:3", "micro_steps": 6})
    steps = [batches.step_tasks(args, step) for step in range(20)]
    assert all(step == [T2T, T2I, T2I, IT2T, IT2T, IT2T] for step in steps)


def test_a_text_has_a_time_for_each_block_or_one(made):
    def times(*flags):
        b = with_flags(made, *flags).prior([(IT2T, k) for k in range(4)])
        noisy = b.layout.segment == N
        return [b.t[b.t_index][noisy & (b.layout.sample == s)].unique() for s in range(4)]
    assert all(len(t) > 1 for t in times())
    assert all(len(t) == 1 for t in times("--time_per", "sample"))
    normal = torch.cat(times("--text_loc", "0.5", "--time_scale", "2")).logit().sub(0.5).div(2)
    even = torch.tensor([statistics.NormalDist().cdf(x) for x in normal.tolist()])
    torch.testing.assert_close(torch.cat(times("--time_law", "uniform")), even, atol=1e-4, rtol=0)


def test_a_step_has_few_times_on_an_even_grid(made):
    """One offset for a step and another for the next; every cell of the grid is used. Images are on
    it, too."""
    size, offsets = ("--batch_size", "80", "--micro_steps", "2"), []
    usual = with_flags(made, *size, "--text_loc", "2")     # images have 1
    made = with_flags(made, *size, "--time_law", "uniform")
    for step in range(2):
        b = made.prior([(T2T, k) for k in range(160 * step, 160 * (step + 1))])
        assert b.t[0] == 0 and len(b.t) == 1 + batches.TIMES
        offset = b.t[1:] * batches.TIMES - torch.arange(batches.TIMES)
        torch.testing.assert_close(offset, offset[:1].expand(batches.TIMES), atol=1e-4, rtol=0)
        offsets.append(float(offset[0]))
        counts = b.t_index[b.t_index > 0].bincount()[1:] / (b.t_index > 0).sum()
        assert counts.min() > 0.4 / batches.TIMES and counts.max() < 2 / batches.TIMES
        images = made.prior([(T2I, k) for k in range(160 * step, 160 * (step + 1))]).t
        assert set(images.tolist()) <= set(b.t.tolist())               # t2i's captions stay clean
    assert 0 <= min(offsets) < max(offsets) - 0.01 and max(offsets) < 1
    work = [(task, k) for k in range(160) for task in (T2T, T2I, IT2T)]
    assert 65 < len(usual.prior(work).t) <= 1 + 2 * batches.TIMES


@pytest.fixture(scope="module")
def two_sizes(tmp_path_factory):
    """Pictures of two aspect ratios."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(6):
        pixels = rng.integers(0, 255, ((64, 32), (48, 48))[i % 2] + (3,), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"picture {i}")
    return batches_for("--data", str(folder), "--aspect", "--cfg_drop", "0")


def test_times_shift_with_the_size_of_each_image(two_sizes, monkeypatch):
    """Of each, not of the largest in the batch. Text is not shifted."""
    made = with_flags(two_sizes, "--cfg_drop", "0", "--aux_caption", "1")
    before, sizes = made.prior([(T2I, k) for k in range(6)]), set()
    monkeypatch.setattr(flow, "image_shift", lambda numbers: numbers / 500)
    after = made.prior([(T2I, k) for k in range(6)])
    plain, shifted = (b.t[b.t_index] for b in (before, after))
    text = before.layout.segment != I
    assert torch.equal(shifted[text], plain[text]) and plain[text].any()
    for s in range(6):
        image = (before.layout.sample == s) & ~text
        numbers = 32 * int(image.sum())
        torch.testing.assert_close(shifted[image], flow.shift_time(plain[image], numbers / 500))
        sizes.add(numbers)
    assert len(sizes) == 2


def test_image_latents_are_those_of_the_image_vae_as_it_is_now(two_sizes):
    """In the order of the samples. None is kept from before the statistics changed."""
    model = copy.deepcopy(two_sizes.model)
    made = with_flags(two_sizes, model=model)
    pixels = made.dataset.images([made.dataset.t2i(k)[1] for k in range(6)])
    for _ in range(2):
        latents = made.prior([(T2I, k) for k in range(6)]).z_image
        each = torch.cat([model.encode_images([x]) for x in pixels])
        torch.testing.assert_close(latents, each, atol=1e-5, rtol=1e-5)
        assert not latents.requires_grad
        model.image_vae.latent_mean += 1


def test_image_latents_as_posterior_samples(made):
    """The normalized mean, and noise of the posterior's size over that of the latents."""
    model = copy.deepcopy(made.model)
    model.image_vae.latent_std += 3
    sampled = with_flags(made, "--image_posterior", "sample", model=model)
    work = [(T2I, k) for k in range(20)]
    mean = with_flags(made, model=model).prior(work).z_image
    difference = sampled.prior(work).z_image - mean                            # (Li, Cz)
    assert difference.std().item() == pytest.approx(model.image_vae.config.posterior_std / 4,
                                                    rel=0.05)
    batch = sampled.prior(work)
    both = torch.stack([difference.flatten(), batch.eps_image.flatten()])
    assert abs(torch.corrcoef(both)[0, 1]) < 0.05                              # own noise
    assert len(batch.t) == len(batch.t_index.unique())                         # no unused times
    assert abs(difference.mean()) < 0.002                                      # of 10,240 numbers
    torch.testing.assert_close(sampled.prior(work[7:8]).z_image, (mean + difference)[112:128],
                               atol=1e-5, rtol=1e-5)

# ---- Stages 1 and 1b ---------------------------------------------------------------------------

def test_texts_of_stage_1_are_those_of_the_tasks(made):
    b, tasks = made.text(range(60)), []
    texts = iter(b.ids.split(b.lengths))                       # one token per latent
    for k in range(60):
        tasks.append(batches.pick_task(made.shares, data.rng(0, k, Purpose.TASK).random()))
        for text in texts_of(made, tasks[-1], k):
            assert made.model.tokenizer.decode(next(texts)) == text
    assert next(texts, None) is None and min(map(tasks.count, (T2T, T2I, IT2T))) > 10
    assert b.posterior_noise.shape == (sum(b.lengths), 16)
    assert 0.1 < b.masked.float().mean() < 0.2
    assert b.counts() == {"positions": sum(b.lengths), "tokens": len(b.ids),
                          "masked": int(b.masked.sum())}


def test_batches_without_images_or_conditions(made, tmp_path):
    (tmp_path / "a.txt").write_text("one two three four. " * 50)
    texts = batches_for("--text", str(tmp_path / "a.txt"), "--tasks", "t2t:1")
    b = texts.prior([(T2T, k) for k in range(4)])
    assert b.z_image.shape == (0, 32) and b.counts()["t2t"] > 0 == b.counts()["image"]
    dropped = with_flags(made, "--cfg_drop", "1", "--cfg_drop_text", "1")
    for task, segments in ((T2T, {N}), (T2I, {I}), (IT2T, {N})):
        b = dropped.prior([(task, k) for k in range(4)])
        assert {*b.layout.segment.tolist()} == segments and len(b.targets)
        assert len(b.z_image) == (64 if task == T2I else 0)


def test_a_long_text_is_cut_to_whole_blocks_and_does_not_end(made):
    short = with_flags(made, "--seq_len", "14")
    for ids in ([1] * 11, [1] * 12, [1] * 50):
        whole = short.whole_blocks(ids)
        assert len(whole) == 12 and whole.count(made.model.tokenizer.end) == (len(ids) < 12)


def test_images_of_stage_1b_come_by_size(two_sizes, made):
    by_size = two_sizes.images(range(20))
    assert len(by_size) == 2 and sum(b.counts()["images"] for b in by_size) == 20
    for b in by_size:
        assert b.x.abs().max() <= 1 and b.noise.shape[2:] == (b.x.shape[2] // 8, b.x.shape[3] // 8)
        assert b.counts()["positions"] == b.noise[:, 0].numel()
    pixels = list(made.pixels(range(40)))
    assert [len(x) for x in pixels] == [32, 8]
    assert torch.equal(torch.cat(pixels), made.images(range(40))[0].x)

# ---- Ahead of the device -----------------------------------------------------------------------

def test_a_batch_is_counted_before_it_moves(made, monkeypatch):
    """On a GPU, counting would wait for it; on "meta", a tensor has no values at all."""
    monkeypatch.setattr(cuda_attention.Plan, "build", lambda plan: None)
    for b in (made.prior([(T2T, 0), (T2I, 1)]), made.text(range(4)), *made.images(range(4))):
        moved = batches.to_device(b, torch.device("meta"))
        assert moved.counts() == b.counts()
        assert all(x.is_meta for x in vars(moved).values() if isinstance(x, torch.Tensor))
    b = made.prior([(T2I, 0)])
    moved = batches.to_device(b, CPU)
    assert moved.plan.q is moved.layout and moved.target_plan.k is moved.layout


def test_batches_come_in_order_and_one_step_ahead_and_errors_reach_the_loop():
    started = []

    def make(step):
        started.append(step)
        if step == 6:
            raise OSError("the disk is gone")
        return [batches.ImageBatch(torch.full((1,), float(step)), torch.zeros(1, 1, 1, 1))]
    coming = batches.ahead(make, range(3, 9), CPU)
    for expected in (3, 4, 5):
        step, (batch,), _ = next(coming)
        time.sleep(0.05)                                       # the step itself
        assert batch.x == step == expected and started == [*range(3, step + 2)]
    with pytest.raises(OSError, match="disk"):
        next(coming)
