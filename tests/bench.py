"""Bench: how time and memory grow, and what the shortcuts save. Every result says what to expect.

    (a) seconds of a training step of the prior ~ samples ** exponent       linear: nothing is L x L
    (b) bytes kept for the backward pass ~ samples ** exponent              exact, the same on every machine
    (c) time to prepare the data / time of a default step, over a whole run
    (d) T2T generation with the KV cache / without it
    (e) T2T generation of a release / by a plain loop: no cache, two passes a guided step
    (f) masked attention by rows of samples / on the dense L x L mask

Default sizes, one process of one thread, fp32, fresh weights. Times are medians of processor time, which
other programs disturb less than time on the wall; an idle machine is still better.

Run: python tests/bench.py   (CPU, 3 minutes)
"""
from __future__ import annotations

import dataclasses
import itertools
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data
import flow
import masks
import sample
import train
from cuda_attention import attention, make_plan
from masks import T2I, T2T

CAPTION = "a large red circle above a small blue square on a gray background"
SIZES = (16, 32, 64, 128, 256)


class OneCaption(data.GeneratedScenes):
    """Every sample has the same lengths: the one caption, an image of the pool."""
    def t2i(self, k: int) -> tuple[str, int]:
        return CAPTION, k % self.num_images


def seconds(call, repeats: int = 5, warmup: int = 1) -> float:
    """Median time of call()."""
    times = []
    for _ in range(warmup + repeats):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return statistics.median(times[warmup:])


def exponent(sizes, values) -> float:
    """Slope of log value over log size, by least squares."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def kept_bytes(stage: train.PriorStage, batch: train.Batch) -> int:
    """Bytes that the forward pass keeps for the backward pass, and the plan's; the weights are left out."""
    weights = {p.untyped_storage().data_ptr() for p in stage.parameters()}
    kept: dict[int, int] = {}                                # by address: each storage counts once

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return x
    for x in (*batch.plan.rows.mask, *batch.plan.rows.bias):
        pack(x)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss, _ = stage(batch, batch.counts())               # alive until here: no address is used twice
    return sum(kept.values())


def step(stage: train.PriorStage, optimizers: list, batches: list[train.Batch]) -> None:
    """One step as train.py takes it: forward, backward, optimizer."""
    counts = np.sum([b.counts() for b in batches], 0).tolist()
    for batch in batches:
        loss, _ = stage(batch, counts)
        loss.backward()
    for o in optimizers:
        o.step()
        o.zero_grad(set_to_none=True)


def growth() -> None:
    """(a) and (b)"""
    args = train.parse(["--cfg_drop", "0"])
    dataset = OneCaption(0, 32, 64)
    model = train.new_model(args, dataset)
    stage, batches = train.PriorStage(model, args), train.Batches(args, dataset, model)
    optimizers = train.optimizers_for(args, stage, args.lr, True)
    times, sizes = [], []
    print("samples   positions   (a) step       (b) kept for backward")
    for n in SIZES:
        batch = batches.make([(T2I, k) for k in range(n)])
        sizes.append(kept_bytes(stage, batch))
        times.append(seconds(lambda: step(stage, optimizers, [batch])))
        took, kept = times[-1] * 1e3, sizes[-1] / 2 ** 20
        print(f"{n:7d}   {len(batch.layout):9d}   {took:7.1f} ms   {kept:10.1f} MiB")
    print(f"(a) time ~ samples ** {exponent(SIZES, times):.2f}   (expect <= 1.1)")
    print(f"(b) memory ~ samples ** {exponent(SIZES, sizes):.2f}   (expect <= 1.1)")


def preparation(steps: int = 45) -> None:
    """(c) One of two workers of the default run, in miniature: as many looks at each scene, the first of which
    costs most, against the passes and the optimizers (without clipping and averaging, which cost little).

    Data and work take turns, as in train.py: data alone, in a loop, would find its memory cached."""
    args = train.parse([])
    dataset = data.GeneratedScenes(args.seed, 32, args.pool * steps // args.steps)
    model = train.new_model(args, dataset)
    stage, batches = train.PriorStage(model, args), train.Batches(args, dataset, model)
    optimizers, times, B = train.optimizers_for(args, stage, args.lr, True), [], args.batch_size
    M = args.micro_steps
    for i in range(steps):
        times.append([time.process_time()])
        made = [batches.make([(train.pick_task(args, (m + 0.5) / M), (i * M + m) * B + j)
                              for m in range(M) for j in range(B // 2)])]
        times[-1].append(time.process_time())
        step(stage, optimizers, made)
        times[-1].append(time.process_time())
    prepared, work = 1e3 * np.diff(times).T                              # (steps,) each
    mean = prepared.mean()
    first, last, rest = prepared[:5].mean(), prepared[-5:].mean(), work.mean()
    print(f"(c) data {mean:.1f} ms a step, {first:.1f} in the first, {last:.1f} in the last; "
          f"the rest {rest:.1f} ms: {mean / (mean + rest):.1%} of the time   (expect < 5 %)")


def generation() -> None:
    """(d) 256 latents in 16 blocks of 16 steps. One text alone is mostly the overhead of small calls."""
    model = train.new_model(train.parse(["--block_len", "16"]), data.GeneratedScenes(0, 32, 64))
    model.tokenizer.end = -1                                 # no token ends the text
    for p in model.mmdit.parameters():
        p.data.add_(torch.randn_like(p), alpha=0.02)
    calls: list[bool] = []
    model.mmdit.register_forward_pre_hook(lambda module, a: calls.append(a[7]))
    for texts, repeats in ((1, 5), (8, 1)):
        with_cache, without = (dataclasses.replace(sample.TEXT, cached=c) for c in (True, False))
        times = []
        for settings in (with_cache, without):
            write = lambda: sample.generate_text(model, [""] * texts, s=settings, max_tokens=256)
            times.append(seconds(write, repeats, warmup=repeats > 1))
        print(f"(d) T2T of 256 latents, {texts} at a time: {times[0]:.2f} s with the KV cache, "
              f"{times[1]:.2f} s without, ratio {times[0] / times[1]:.2f}   (expect <= 0.33)")
    if sum(calls) != 15 * (6 + 1):                           # no one looks at the last
        raise RuntimeError(f"{sum(calls)} blocks joined the context in 7 runs, expected 15 in each")


@torch.no_grad()
def plain_loop(model: sample.Cola, blocks: int, s: sample.Settings) -> torch.Tensor:
    """One text's latents as one writes it down: every step sees all that was made, with the context and without."""
    generator, done = sample.noise(s.seed, 0, 1)[0], torch.zeros(0, model.text_vae.latent_dim)

    def velocity(context: torch.Tensor, z: torch.Tensor, t: float) -> torch.Tensor:
        n = len(done)
        layout = masks.pack([masks.Sample(T2T, clean=len(context), noisy=n + len(z), skip=n)], model.block_len)
        index = (layout.segment == masks.N).long()
        v, *_ = model.mmdit(torch.cat([context, z]), None, torch.tensor([0.0, t]), index, layout, make_plan(layout))
        return v[len(context):]

    for _ in range(blocks):
        z = torch.from_numpy(generator.standard_normal((model.block_len, done.shape[1]), np.float32))
        for t, after in itertools.pairwise(flow.time_grid(s.steps).tolist()):
            v = velocity(done, z, t)
            if len(done):
                v = flow.guided(v, velocity(done[:0], z, t), s.guidance)
            z = z + (after - t) * v
        done = torch.cat([done, z])
    return done


def released() -> None:
    """(e) 256 latents in 16 blocks of 8 steps, guided as released, by 8 layers of width 1024 and random weights."""
    model = train.new_model(train.parse("--as_released --width 1024 --heads 8 --layers 8 --block_len 16".split()),
                            data.GeneratedScenes(0, 32, 64))
    model.tokenizer.end = -1
    for p in model.mmdit.parameters():
        p.data.add_(torch.randn_like(p), alpha=0.005)
    settings, told = dataclasses.replace(sample.RELEASED, steps=8), {}

    def plain() -> None:
        tokens = model.text_vae.decode(plain_loop(model, 16, settings), [256]).argmax(-1)
        told["plain"] = model.tokenizer.decode(tokens.tolist())

    def ours() -> None:
        told["ours"] = sample.generate_text(model, [""], s=settings, max_tokens=256)[0]
    times = [seconds(write, repeats=1, warmup=0) for write in (ours, plain)]
    if told["ours"] != told["plain"]:
        raise RuntimeError("the plain loop writes another text")
    print(f"(e) T2T of 256 latents, 1 text, released arithmetic: {times[0]:.2f} s, by a plain loop {times[1]:.2f} s, "
          f"ratio {times[0] / times[1]:.2f}   (expect <= 0.33)")


def masked_attention() -> None:
    """(f) forward and backward, 4 heads of 32, T2I samples of 64 positions."""
    for samples in (16, 32, 64):
        layout = masks.pack([masks.Sample(T2I, clean=24, image=(4, 4), noisy=24)] * samples, 8)
        q, k, v = torch.randn(3, len(layout), 4, 32).requires_grad_().unbind()
        plan, mask = make_plan(layout), masks.dense(layout, layout)

        def dense() -> None:
            rows = (x.transpose(0, 1)[None] for x in (q, k, v))                      # (1, nh, L, hd)
            F.scaled_dot_product_attention(*rows, attn_mask=mask).sum().backward()
        samplewise = seconds(lambda: attention(q, k, v, plan, "padded").sum().backward())
        whole = seconds(dense)
        print(f"(f) attention over {len(layout)} positions: {samplewise * 1e3:.1f} ms sample by sample, "
              f"{whole * 1e3:.1f} ms dense, ratio {samplewise / whole:.3f}   "
              f"(expect < 0.33, and half at twice the positions)")


if __name__ == "__main__":
    # As train.py starts its workers: freed memory stays. The C library reads this when the process starts.
    kept = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 33)}
    if not kept.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | kept)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    growth()
    preparation()
    generation()
    released()
    masked_attention()
