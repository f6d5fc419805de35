"""Growth: how time and memory grow with the size of the work, each with its fitted exponent.

    python -m experiments.growth --out growth.png     two idle cores: 15 minutes

step        forward and backward of a batch, over its packed positions: seconds, added MiB
cached      the prior generates a text with its KV cache, over tokens
uncached    the same with the whole text as input of every solver step
text        sample.generate_text, with the text VAE: it decodes and encodes the text at every token
intake      opening a folder of captioned pictures, over their number

The exponent a of size^a is a least-squares fit of the logarithms. Every size runs in a process of
its own, on one thread. The first and the last should grow linearly. A text cannot: its attention
reads all tokens before.
"""
from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

import config
import data
import sample
from checkpoint import new_model
from cuda_attention import make_plan
from masks import T2T, Sample, pack
from workers import Worker

from experiments.speed import Step

STEPS = 4                                          # solver steps a token
SETTINGS = sample.Settings(steps=STEPS, temperature=1.0)


def peak() -> float:
    """The largest memory of this process so far, in MiB."""
    unit = 2 ** 20 if sys.platform == "darwin" else 2 ** 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def system(**flags):
    """Flags, dataset and untrained model."""
    torch.set_num_threads(1)
    args = config.merge({"device": "cpu", "bf16": "off", "pool": 500} | flags)
    dataset = data.open_data(args)
    return args, dataset, new_model(args, dataset)

# ---- What is measured: size -> {curve: (size as it came out, number)} ---------------------------

def step(size: int) -> dict[str, tuple[float, float]]:
    args, dataset, model = system(batch_size=max(1, size // 216))      # about 36 positions a sample
    run, times = Step(args, Worker(), model, dataset), []
    [batch] = run.make(0)
    counts, before = Counter(batch.counts()), peak()
    for _ in range(4):                             # the first is a warm-up
        began = time.perf_counter()
        run.stage(batch, counts)[0].backward()
        times.append(time.perf_counter() - began)
    length = len(batch.layout)
    return {"step, s": (length, sorted(times[1:])[1]), "step, MiB": (length, peak() - before)}


def text(size: int) -> dict[str, tuple[float, float]]:
    _, _, model = system(seq_len=4096)
    model.tokenizer.end = -1                       # an untrained model must not end by chance
    began = time.perf_counter()
    sample.generate_text(model, [""], settings=SETTINGS, max_tokens=size)
    return {"text, s": (size, time.perf_counter() - began)}


@torch.inference_mode()
def cached(size: int) -> dict[str, tuple[float, float]]:
    _, _, model = system()
    context, rngs = sample.Context(model), sample.make_rngs(0, 0, 1)
    began = time.perf_counter()
    for i in range(size):
        noisy, clean = (pack([Sample(T2T, first=i, **{kind: 1})], 1) for kind in ("noisy", "clean"))
        z = sample.generate_block(context, noisy, [torch.zeros(0, 16)], rngs, SETTINGS, False)
        context.add(z[0], context.no_image, clean)
    return {"cached, s": (size, time.perf_counter() - began)}


@torch.inference_mode()
def uncached(size: int) -> dict[str, tuple[float, float]]:
    _, _, model = system()
    z, began = torch.randn(size, 16), time.perf_counter()
    for i in range(size):
        layout = pack([Sample(T2T, clean=i, noisy=i + 1, skip=i)], 1)
        t_index = torch.zeros(i + 1, dtype=torch.long)
        t_index[-1] = 1
        for t in np.linspace(1, 1 / STEPS, STEPS):
            model.mmdit(z[:i + 1], z[:0, :1].expand(0, 32), torch.tensor([0.0, t]).float(), t_index,
                        layout, make_plan(layout))
    return {"uncached, s": (size, time.perf_counter() - began)}


def intake(size: int) -> dict[str, tuple[float, float]]:
    with tempfile.TemporaryDirectory() as folder:
        Image.new("RGB", (32, 32)).save(f"{folder}/0.png")
        for i in range(1, size):
            shutil.copyfile(f"{folder}/0.png", f"{folder}/{i}.png")
        with open(f"{folder}/metadata.jsonl", "w") as file:
            file.writelines(json.dumps({"file_name": f"{i}.png", "text": f"picture {i}"}) + "\n"
                            for i in range(size))
        began = time.perf_counter()
        data.open_data(config.merge({"data": [folder]}))
        return {"intake, s": (size, time.perf_counter() - began)}


SIZES = {step: [1000, 2000, 4000, 8000, 16000, 32000], cached: [64, 128, 256, 512, 1024, 2048],
         uncached: [64, 128, 256, 512], text: [64, 128, 256, 512, 1024],
         intake: [1000, 3000, 10000, 30000, 100000]}

# ---- Fit and picture ---------------------------------------------------------------------------

def exponent(points: list[tuple[float, float]]) -> float:
    """a of y ~ x^a, for points (x, y)."""
    x, y = np.log(np.array(points)).T
    return float(np.polyfit(x, y, 1)[0])


def draw(curves: dict[str, list[tuple[float, float]]]) -> Image.Image:
    """All curves in one picture with logarithmic axes."""
    canvas = Image.new("RGB", (760, 480), "white")
    pen = ImageDraw.Draw(canvas)
    points = np.log10(np.array([point for curve in curves.values() for point in curve]))
    low, high = np.floor(points.min(0)), np.ceil(points.max(0))
    place = lambda p: tuple(np.array([60, 440]) + (np.log10(p) - low) / (high - low) * [480, -420])
    for axis in (0, 1):
        for power in range(int(low[axis]), int(high[axis]) + 1):
            ends = [10.0 ** low, 10.0 ** high]
            for end in ends:
                end[axis] = 10.0 ** power
            pen.line([place(end) for end in ends], fill="lightgray")
            x, y = place(ends[0])
            pen.text((x - 8, y + 6) if axis == 0 else (x - 36, y - 6), f"{10.0 ** power:g}",
                     fill="black")
    for i, (name, curve) in enumerate(curves.items()):
        color = ("red", "orange", "blue", "green", "purple", "brown")[i]
        pen.line([place(point) for point in curve], fill=color, width=2)
        pen.text((560, 30 + 20 * i), f"{name}: exponent {exponent(curve):.2f}", fill=color)
    return canvas


def measure(function: Callable, size: int) -> dict[str, tuple[float, float]]:
    """function(size) in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, size).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default="growth.png", help="the PNG file to write")
    parser.add_argument("--most", type=float, default=math.inf, help="leave out larger sizes")
    args = parser.parse_args()
    if args.out.suffix != ".png" or not args.out.parent.is_dir():
        parser.exit(2, f"growth.py: --out {args.out}: expected a .png in a folder that exists\n")
    if not args.most >= 3000:              # two sizes of everything
        parser.exit(2, f"growth.py: --most {args.most}: expected at least 3000\n")
    curves: dict[str, list[tuple[float, float]]] = {}
    for function, sizes in SIZES.items():
        for size in sizes:
            if size <= args.most:
                for name, point in measure(function, size).items():
                    curves.setdefault(name, []).append(point)
                    print(f"{name:12} {point[0]:8.0f} {point[1]:10.3f}", flush=True)
    for name, curve in curves.items():
        print(f"{name:12} exponent {exponent(curve):.2f}")
    draw(curves).save(args.out)


if __name__ == "__main__":
    main()
