"""pytest tests/test_batches.py"""
import copy
import dataclasses
import statistics
import time

import numpy as np
import pytest
import torch
from PIL import Image

import batches
import checkpoint
import config
import data
import flow
import masks
from batches import Batches
from cola import FIRST_BLOCK
from conftest import TINY
from data import Purpose
from masks import C, I, IT2T, N, P, T2I, T2T, TASKS
from text_vae import TextVAE

CPU = torch.device("cpu")


def batches_for(*flags):
    args = config.merge(config.parse([*TINY, *flags]))
    dataset = data.open_data(args)
    return Batches(args, dataset, checkpoint.new_model(args, dataset))


@pytest.fixture(scope="module")
def made():
    return batches_for()


def with_flags(made, *flags, model=None):
    """The same data and system, or another one, under other flags."""
    return Batches(config.merge(config.parse([*TINY, *flags])), made.dataset, model or made.model)


def with_vae(made, first_block="clean", **changed):
    """The same system, but for its first block and settings of its text VAE."""
    vae = TextVAE(dataclasses.replace(made.model.text_vae.config, **changed))
    return dataclasses.replace(made.model, text_vae=vae, first_block=first_block)


def equal(a, b):
    """Whether two batches have the same bits."""
    def parts(x):
        return [getattr(x, f.name) for f in dataclasses.fields(x) if f.init]
    return all(equal(x, y) if dataclasses.is_dataclass(x) else torch.equal(x, y)
               if isinstance(x, torch.Tensor) else x == y for x, y in zip(parts(a), parts(b)))


# ---- A batch against its samples ---------------------------------------------------------------

@pytest.mark.parametrize("task", [T2T, T2I, IT2T], ids=TASKS)
def test_batch_against_its_samples(made, task):
    """Every position, one by one, from the sample's own tokens, cut and draws."""
    args, model, dataset, bl = made.args, made.model, made.dataset, made.args.block_len
    b, seen, text_at, image_at = made.prior([(task, k) for k in range(40)]), set(), 0, 0
    starts = np.cumsum([0, *b.lengths])
    for s in range(40):
        item, draw = getattr(dataset, TASKS[task])(s), data.rng(0, s, Purpose.DROP)
        text = model.ids(item if task == T2T else item[0] if task == T2I else item[2], end=True)
        prompt = model.ids(item[0], end=False) if task == IT2T else []
        dropped = draw.random() < args.cfg_drop
        auxiliary = task == T2I and draw.random() < args.aux_caption
        cut = int(draw.integers(text.index(model.tokenizer.end) + 1)) if task == T2T else 0
        skip = cut // bl * bl if task == T2T and draw.random() < 0.5 else 0
        n = len(text)
        whole = {T2T: "C" * (n - bl) + "N" * (n - skip),
                 T2I: "C" * n + "I" * 16 + "N" * n * auxiliary,
                 IT2T: "P" * len(prompt) + "I" * 16 + "C" * (n - bl) + "N" * n}
        alone = {T2T: "N" * (n - skip), T2I: "I" * 16, IT2T: "N" * n}
        mine = (b.layout.sample == s).nonzero()[:, 0]
        segments = "".join(masks.SEGMENTS[x] for x in b.layout.segment[mine])
        assert segments == (alone if dropped else whole)[task]
        seen |= {"dropped"} if dropped else {"auxiliary"} if auxiliary else set()
        for position in mine.tolist():
            segment, t = int(b.layout.segment[position]), float(b.t[b.t_index[position]])
            assert (position in b.targets) == (t > 0)
            if segment == I:
                assert bool(b.image_moves[image_at]) == (t > 0) == (task == T2I)
                image_at += 1
                continue
            source, index = int(b.source[text_at]), int(b.layout.row[position])
            owner = int(np.searchsorted(starts, source, side="right")) - 1
            encoded = b.ids[starts[owner]:starts[owner + 1]].tolist()      # one token per latent
            index -= 0 if segment == P else len(prompt)
            assert encoded == (prompt if segment == P else text)
            assert source - starts[owner] == index and b.text_task[text_at] == task
            given = index < cut and index // bl == cut // bl
            assert bool(b.text_moves[text_at]) == (t > 0) == (segment == N and not given)
            assert bool(b.eps_text[text_at].any()) == (segment == N)
            seen |= {"given"} if given else set()
            text_at += 1
    assert "dropped" in seen and ("given" in seen or task != T2T)
    assert "auxiliary" in seen or task != T2I
    assert text_at == len(b.source) and image_at == len(b.z_image) and b.positions == len(b.t_index)
    text = dict.fromkeys(TASKS, 0) | {TASKS[task]: int(b.text_moves.sum()) * 16}
    assert b.counts() == text | {"image": int(b.image_moves.sum()) * 32, "tokens": len(b.ids),
                                 "masked": 0}


@pytest.mark.parametrize("patch", (1, 2, 4))
@pytest.mark.parametrize("mode", FIRST_BLOCK)
def test_a_cut_text_is_what_sampling_makes_of_its_prefix(mode, patch, made):
    """What is before the cut is what generate_text encodes; padding stays clean and bears no loss;
    behind the cut the text goes on."""
    made = with_flags(made, "--cfg_drop", "0", model=with_vae(made, mode, patch_size=patch))
    model, end, seen = made.model, made.model.tokenizer.end, set()
    b = made.prior([(T2T, k) for k in range(30)])
    for k in range(30):
        draw, again = (data.rng(0, k, Purpose.DROP) for _ in range(2))
        draw.random(), again.random()                          # is the condition dropped?
        ids, cut, filled = made.cut_text(made.dataset.t2t(k), draw)
        text = model.tokenizer.encode(made.dataset.t2t(k))
        at = int(again.integers(len(text) + 1))
        prefix, length, _ = model.align(text[:at], at)         # as in sampling
        assert ids[:cut * patch] == prefix and length == cut * patch
        assert ids[length:][:len(text) - at] == text[at:]
        assert {*ids[length + len(text) - at:]} == {end}
        noisy = (b.layout.sample == k) & (b.layout.segment == N)
        index, t = b.layout.row[noisy].numpy(), b.t[b.t_index[noisy]]
        padded = {i // patch for i in range(length) if prefix[i] == end and mode != "repaint"}
        inside = (index < cut) & (index // made.block == cut // made.block) & (mode != "repaint")
        assert set(filled) == {*padded}
        assert np.array_equal(t.numpy() == 0, np.isin(index, list(padded)) | inside)
        seen |= {word for word, there in (("padded", padded), ("inside", inside.any())) if there}
    assert ("padded" in seen) == (mode in ("left", "right") or mode == "clean" and patch > 1)
    assert ("inside" in seen) == (mode == "clean")


def test_a_prefix_is_encoded_alone_where_the_vae_looks_ahead(made):
    """As in sampling, where the rest of its VAE block is not there yet."""
    made = with_flags(made, "--cfg_drop", "0", model=with_vae(made, block_len=4))
    for k in range(10):
        example = made.example(T2T, k)
        b, n = made.prior([(T2T, k)]), len(example.texts[0])
        if len(example.texts) == 1:
            continue
        cut = len(example.texts[1])
        assert example.texts[1] == example.texts[0][:cut] and b.lengths == [n, cut]
        index = b.layout.row.numpy()
        assert np.array_equal(b.source.numpy(), np.where(index < cut, n + index, index))


# ---- What a batch depends on -------------------------------------------------------------------

def test_sample_k_does_not_depend_on_its_batch(made):
    for task in (T2T, T2I, IT2T):
        six, tail = made.prior([(task, k) for k in range(6)]), made.prior([(task, 4), (task, 5)])
        mine, is_image = six.layout.sample >= 4, six.layout.segment == I
        assert torch.equal(six.eps_text[mine[~is_image]], tail.eps_text)
        assert torch.equal(six.eps_image[mine[is_image]], tail.eps_image)
        torch.testing.assert_close(six.t[six.t_index[mine]], tail.t[tail.t_index])
        torch.testing.assert_close(six.z_image[mine[is_image]], tail.z_image)


def test_image_latents_are_those_of_the_image_vae_as_it_is_now(made):
    """No latent is kept from a batch made before its statistics changed."""
    model = dataclasses.replace(made.model, image_vae=copy.deepcopy(made.model.image_vae))
    made = with_flags(made, model=model)
    before = made.prior([(T2I, k) for k in range(4)])
    pixels = made.dataset.images([made.dataset.t2i(k)[1] for k in range(4)])
    torch.testing.assert_close(before.z_image, made.model.encode_images(pixels))
    made.model.image_vae.latent_mean += 1
    after = made.prior([(T2I, k) for k in range(4)])
    torch.testing.assert_close(after.z_image, before.z_image - 1, atol=1e-5, rtol=0)
    assert not after.z_image.requires_grad


def test_tasks_of_a_step_follow_the_shares(made):
    shares = config.task_shares("t2t:1,t2i:2,it2t:0")
    picked = [batches.pick_task(shares, (m + 0.37) / 300) for m in range(300)]
    assert picked.count(T2T) == 100 and picked.count(T2I) == 200
    assert batches.pick_task(shares, 1 - 2**-53) == T2I
    args = config.merge({"tasks": "t2t:1,t2i:2,it2t:3", "micro_steps": 6})
    steps = [batches.step_tasks(args, step) for step in range(20)]
    assert all(step == [T2T, T2I, T2I, IT2T, IT2T, IT2T] for step in steps)


def test_a_text_has_a_time_for_each_block_or_one(made):
    def times(*flags):
        b = with_flags(made, "--cfg_drop", "0", *flags).prior([(IT2T, k) for k in range(4)])
        noisy = b.layout.segment == N
        return [b.t[b.t_index][noisy & (b.layout.sample == s)].unique() for s in range(4)]
    assert all(len(t) > 1 for t in times())
    assert all(len(t) == 1 for t in times("--time_per", "sample"))
    normal = torch.cat(times("--text_loc", "0.5", "--time_scale", "2")).logit().sub(0.5).div(2)
    even = torch.tensor([statistics.NormalDist().cdf(x) for x in normal.tolist()])
    torch.testing.assert_close(torch.cat(times("--time_law", "uniform")), even, atol=1e-4, rtol=0)


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
    """Of each, not of the largest in the batch."""
    work = [(T2I, k) for k in range(6)]
    plain = two_sizes.prior(work)
    numbers = {s: 32 * int((plain.layout.segment[plain.layout.sample == s] == I).sum())
               for s in range(6)}
    small, large = sorted({*numbers.values()})
    monkeypatch.setattr(flow, "image_shift", lambda n: 2.0 if n == large else 1.0)
    shifted = two_sizes.prior(work)
    big = torch.tensor([numbers[int(s)] == large for s in plain.layout.sample])
    big &= plain.layout.segment == I
    t, moved = (b.t[b.t_index] for b in (plain, shifted))
    torch.testing.assert_close(moved[big], flow.shift_time(t[big], 2.0))
    assert torch.equal(moved[~big], t[~big]) and big.any() and not big.all() and small < large


def test_packed_image_latents_are_in_the_order_of_the_samples(two_sizes):
    numbers = [4, 1, 3, 0, 2, 5]
    together = two_sizes.image_latents(numbers)
    each = torch.cat([two_sizes.image_latents([i]) for i in numbers])
    torch.testing.assert_close(together, each, atol=1e-5, rtol=1e-5)


# ---- Stages 1 and 1b ---------------------------------------------------------------------------

def test_texts_of_stage_1_are_those_of_the_tasks(made):
    b, tasks = made.text(range(60)), []
    texts = iter(b.ids.split(b.lengths))                       # one token per latent
    for k in range(60):
        tasks.append(batches.pick_task(made.shares, data.rng(0, k, Purpose.TASK).random()))
        item = getattr(made.dataset, TASKS[tasks[-1]])(k)
        text = item if tasks[-1] == T2T else item[0] if tasks[-1] == T2I else item[2]
        assert made.model.tokenizer.decode(next(texts)) == text
        if tasks[-1] == IT2T:
            assert made.model.tokenizer.decode(next(texts)) == item[0]
    assert next(texts, None) is None and min(map(tasks.count, (T2T, T2I, IT2T))) > 10
    assert b.noise.shape == (b.positions, 16) and 0.1 < b.masked.float().mean() < 0.2
    assert b.counts() == {"tokens": len(b.ids), "masked": int(b.masked.sum())}
    assert equal(made.text(range(60)), b)


def test_texts_alone(tmp_path):
    """A dataset without images."""
    (tmp_path / "a.txt").write_text("one two three four. " * 50)
    texts = batches_for("--text", str(tmp_path / "a.txt"), "--tasks", "t2t:1")
    b = texts.prior([(T2T, k) for k in range(4)])
    assert b.z_image.shape == (0, 32) and b.counts()["t2t"] > 0 == b.counts()["image"]


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
        assert b.positions == b.noise[:, 0].numel()
    pixels = list(made.pixels(range(40)))
    assert [len(x) for x in pixels] == [32, 8]
    assert torch.equal(torch.cat(pixels), made.images(range(40))[0].x)


# ---- Ahead of the device -----------------------------------------------------------------------

@pytest.mark.parametrize("task", [T2T, T2I, IT2T], ids=TASKS)
def test_a_batch_whose_conditions_are_all_dropped(made, task):
    b = with_flags(made, "--cfg_drop", "1").prior([(task, k) for k in range(4)])
    assert not ((b.layout.segment == C) | (b.layout.segment == P)).any()
    assert len(b.z_image) == (64 if task == T2I else 0) and len(b.targets)
    moved = batches.to_device(b, CPU)
    assert equal(moved, b) and moved.plan.q is moved.layout and moved.target_plan.k is moved.layout


def test_batches_come_in_order_and_one_step_ahead():
    started = []

    def make(step):
        started.append(step)
        return [batches.ImageBatch(torch.full((1,), float(step)), torch.zeros(1, 1, 1, 1))]
    assert list(batches.ahead(make, range(0), CPU)) == [] and not started
    coming = batches.ahead(make, range(3, 6), CPU)
    for step, micro, waited in coming:
        time.sleep(0.05)                                       # the step itself
        assert micro[0].x == step and waited >= 0 and started == [*range(3, min(step + 2, 6))]
    assert started == [3, 4, 5]


def test_an_error_in_the_thread_reaches_the_loop():
    def make(step):
        if step == 1:
            raise OSError("the disk is gone")
        return []
    coming = batches.ahead(make, range(3), CPU)
    assert next(coming)[0] == 0
    with pytest.raises(OSError, match="disk"):
        next(coming)
