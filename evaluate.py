"""What becomes of a run: its rates on generated scenes, samples.png, loss.png.

Images, captions, answers and stories are generated for scenes that training never drew, of compositions it has seen
and of such as were held out, and judged by the exact reader of scenes.py alone. Every rate stands with its interval.

    python train.py --eval_only --out_dir out          rates of out/ckpt.pt

Shapes: B images of H x W pixels, h x w latents; T tokens.
"""
from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

import data
import sample
import scenes
from sample import Cola

if TYPE_CHECKING:
    from train import Worker

Rows = Iterator[tuple[str, bool]]          # the name of a rate, and whether this sample counts towards it


def wilson(rate: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a rate seen in n samples."""
    z2 = 1.96 ** 2
    middle = (rate + z2 / (2 * n)) / (1 + z2 / n)
    spread = math.sqrt(z2 * (rate * (1 - rate) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    return max(0.0, middle - spread), min(1.0, middle + spread)


def draw_scenes(split: str, seed: int, numbers: range) -> Iterator[tuple[list, int, list[int]]]:
    """Scenes of these numbers, 64 at a time: (scenes, seed, numbers), as the judges take them."""
    for i in range(0, len(numbers), 64):
        some = list(numbers[i:i + 64])
        yield [scenes.sample_scene(data.rng(seed, k, data.EVAL), split == "heldout", 1 + k % 3)
               for k in some], seed, some


def captions_of(world: list, seed: int, numbers: list[int]) -> list[str]:
    return [scenes.caption(s, data.rng(seed, k, data.CAPTION)) for s, k in zip(world, numbers)]


def judge_images(model: Cola, world: list, seed: int, numbers: list[int], s: sample.Settings) -> Rows:
    """T2I: what the image drawn for a caption shows of it."""
    captions = captions_of(world, seed, numbers)
    pictures = sample.generate_images(model, captions, s, first=numbers[0])
    for caption, picture, scene in zip(captions, pictures, world):
        n = len(scene.objects)
        found = scenes.matches(scenes.read_image(picture), scenes.read_caption(caption))
        yield from ((f"t2i.{name}", ok) for name, ok in found.items() if name != "relation" or n > 1)
        yield f"t2i.by_count.{n}", found["scene"]


def judge_answers(model: Cola, world: list, seed: int, numbers: list[int], s: sample.Settings) -> Rows:
    """IT2T: descriptions of pictures, and answers to questions about them."""
    pictures, blank = [scenes.render(scene, model.image_hw) for scene in world], [""] * len(world)
    ask = lambda prompts: sample.generate_text(model, blank, prompts, pictures, s, first=numbers[0])
    for scene, caption in zip(world, ask(["describe the image."] * len(world))):
        told = scenes.read_caption(caption)
        yield "it2t.exact", scenes.is_exact(told, scene)
        yield "it2t.true", scenes.is_true(told, scene)
    asked = [scenes.question(scene, data.rng(seed, k, data.CAPTION))[0] for scene, k in zip(world, numbers)]
    for scene, question, reply in zip(world, asked, ask(asked)):
        yield "it2t.vqa", scenes.check_answer(scene, question, reply)


def begun_story(scene: scenes.Scene, words: np.random.Generator) -> tuple[str, str]:
    """A story, and its first sentence or its first two."""
    story = scenes.story(scene, words)
    return story, ". ".join(story.split(". ")[:int(words.integers(1, 3))]) + "."


def judge_stories(model: Cola, world: list, seed: int, numbers: list[int], s: sample.Settings) -> Rows:
    """T2T: continuations of stories after the first or the second sentence; none ends before the third."""
    prefixes = [begun_story(scene, data.rng(seed, k, data.WINDOW))[1] for scene, k in zip(world, numbers)]
    for prefix, rest in zip(prefixes, sample.generate_text(model, prefixes, s=s, first=numbers[0])):
        yield "t2t.consistent", scenes.consistent(prefix, rest)


def judge_image_vae(model: Cola, world: list, seed: int, numbers: list[int]) -> Rows:
    """What the image VAE alone keeps: scenes that are still read right."""
    grid = tuple(side // model.image_vae.downsample for side in model.image_hw)
    z = model.encode_images([scenes.render(scene, model.image_hw) for scene in world])           # (B h w, Cz)
    for scene, picture in zip(world, model.decode_images(z, grid)):
        told = scenes.read_caption(scenes.caption(scene, data.rng(seed, 0, data.CAPTION)))
        yield "ceiling.image", scenes.matches(scenes.read_image(picture), told)["scene"]


def judge_text_vae(model: Cola, world: list, seed: int, numbers: list[int], tasks: set[str]) -> Rows:
    """What the text VAE alone keeps: captions and stories, as the tasks have them, whose every token comes back."""
    kinds = [captions_of(world, seed, numbers)] if tasks - {"t2t"} else []
    if "t2t" in tasks:
        kinds.append([scenes.story(scene, data.rng(seed, k, data.WINDOW)) for scene, k in zip(world, numbers)])
    for texts in kinds:
        ids = [model.ids(text, end=True) for text in texts]
        logits = model.text_vae.decode(*model.encode_text(ids))                                  # (T, V)
        for i, back in zip(ids, logits.argmax(-1).split([len(i) for i in ids])):
            yield "ceiling.text", back.tolist() == i


def settings(args: argparse.Namespace, seed: int = 0) -> tuple[sample.Settings, sample.Settings]:
    """How images and texts are generated."""
    more = {"steps": args.sample_steps, "seed": seed}
    return (dataclasses.replace(sample.IMAGE, guidance=args.guidance, **more),
            dataclasses.replace(sample.TEXT, guidance=args.text_guidance, shift=args.text_shift,
                                temperature=args.text_temperature, snap=args.text_snap,
                                repaint_share=args.repaint_share, repaint_cycles=args.repaint_cycles, **more))


@torch.no_grad()
def evaluate(model: Cola, args: argparse.Namespace, tasks: set[str], worker: Worker) -> dict:
    """Rates in [0, 1] on scenes the training never drew, of seen compositions and of held-out ones.

    Each is a mean over n = --eval_samples scenes, those of T2I over n of each number of objects, for the tasks
    that were trained; the samples are split among the workers, and all of them get the result."""
    seed, n = data.SEEDS + args.seed, args.eval_samples        # no run's own
    image, text = settings(args, seed)
    rows: list[tuple[str, bool]] = []
    judges = [(judge, s, count) for task, judge, s, count in
              (("t2i", judge_images, image, 3 * n), ("it2t", judge_answers, text, n),
               ("t2t", judge_stories, text, n)) if task in tasks]
    bar = tqdm(total=2 * sum(math.ceil(count / 64) for *_, count in judges), desc="evaluate",
               disable=worker.rank > 0)
    for split in ("seen", "heldout"):
        for judge, s, count in judges:
            for drawn in draw_scenes(split, seed, worker.share(0, count)):
                rows += [(f"{split}.{name}", ok) for name, ok in judge(model, *drawn, s)]
                bar.update(worker.world)
    bar.close()
    for drawn in draw_scenes("seen", seed, worker.share(0, n)):
        rows += judge_text_vae(model, *drawn, tasks)
        rows += judge_image_vae(model, *drawn) if tasks - {"t2t"} else []
    rates: dict[str, list[bool]] = {}
    for name, ok in worker.gather(rows):
        rates.setdefault(name, []).append(bool(ok))
    metrics: dict = {"n": n}
    for name, values in rates.items():         # "seen.t2i.scene" -> metrics["seen"]["t2i"]["scene"]
        *path, leaf = name.split(".")
        at = metrics
        for key in path:
            at = at.setdefault(key, {})
        at[leaf] = sum(values) / len(values)
    return metrics


def table(metrics: dict) -> str:
    """The rates with their intervals, seen beside held-out."""
    n = metrics["n"]

    def cell(path: str, count: int) -> str:
        rate = metrics
        for key in path.split("."):
            rate = rate.get(key) if rate else None
        if rate is None:
            return ""
        low, high = wilson(rate, count)
        return f"{rate:.3f} [{low:.3f}, {high:.3f}]"
    rows = [("t2i scene, 1-3 objects", "t2i.scene", 3 * n)]
    rows += [(f"t2i scene, {c} object{'s' if c > 1 else ''}", f"t2i.by_count.{c}", n) for c in (1, 2, 3)]
    attributes = ("count", "color", "shape", "size", "relation", "background")
    rows += [(f"t2i {x}", f"t2i.{x}", (2 if x == "relation" else 3) * n) for x in attributes]
    rows += [(x.replace(".", " "), x, n) for x in ("it2t.exact", "it2t.true", "it2t.vqa", "t2t.consistent")]
    kinds = ("t2t" in metrics["seen"]) + bool(metrics["seen"].keys() - {"t2t"})        # of texts: stories, captions
    rows += [("ceiling image", "image", n), ("ceiling text", "text", kinds * n)]
    lines = [f"{'rate [95 % interval]':26s}{'seen':24s}held-out"]
    for title, x, count in rows:
        seen, heldout = cell(f"seen.{x}", count) or cell(f"ceiling.{x}", count), cell(f"heldout.{x}", count)
        lines += [f"{title:26s}{seen:24s}{heldout}"] if seen else []
    return "\n".join(lines)


# ---- pictures ----------------------------------------------------------------------------------------------

def sample_grid(model: Cola, args: argparse.Namespace, tasks: set[str], dataset, path: Path) -> None:
    """Images drawn for captions, captions or answers given to images; texts are continued on the terminal."""
    (image, text), cells = settings(args), []
    numbers = range(10 ** 9, 10 ** 9 + 6)                      # in other words than in training
    if "t2i" in tasks:
        captions = [dataset.t2i(k)[0] for k in numbers]
        cells += zip(sample.generate_images(model, captions, image), captions)
    if "it2t" in tasks:
        for prompt, index, _ in map(dataset.it2t, numbers):
            picture = dataset.images([index])[0]
            answer = sample.generate_text(model, [""], [prompt], [picture], text)[0]
            cells.append((picture, f"{prompt} {answer}"))
    if "t2t" in tasks:
        for k in numbers[:3]:
            prefix = " ".join(dataset.t2t(k).split()[:6])
            print(f"{prefix} |{sample.generate_text(model, [prefix], s=text)[0]}")
    if cells:
        captioned_grid(cells).save(path)


def captioned_grid(cells: list[tuple[np.ndarray, str]], columns: int = 6, tile: int = 160) -> Image.Image:
    """Pictures uint8 (H, W, 3), each scaled to fit a tile, above their words."""
    rows = -(-len(cells) // columns)
    canvas = Image.new("RGB", (columns * (tile + 8) + 8, rows * (tile + 72) + 8), "white")
    pen = ImageDraw.Draw(canvas)
    for i, (picture, words) in enumerate(cells):
        x, y = 8 + i % columns * (tile + 8), 8 + i // columns * (tile + 72)
        scale = tile / max(picture.shape[:2])
        size = (round(picture.shape[1] * scale), round(picture.shape[0] * scale))
        canvas.paste(Image.fromarray(picture).resize(size, Image.NEAREST), (x, y))
        pen.rectangle((x, y, x + size[0] - 1, y + size[1] - 1), outline="lightgray")
        lines = [""]
        for word in words.split():
            longer = f"{lines[-1]} {word}".strip()
            if lines[-1] and pen.textlength(longer) > tile:
                lines.append(word)
            else:
                lines[-1] = longer
        pen.multiline_text((x, y + tile + 4), "\n".join(lines[:5]), fill="black")
    return canvas


def loss_plot(entries: list[dict], path: Path) -> None:
    """Every loss of a log against its step, a panel a stage, on a log scale, smoothed over 2 %."""
    colors = ("#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b")
    skip = {"stage", "step", "skipped", "lr", "norm", "seconds", "data_seconds", "positions", "logsnr", "log_q",
            "drift"}
    stages = list(dict.fromkeys(e["stage"] for e in entries))
    canvas = Image.new("RGB", (max(len(stages), 1) * 420, 320), "white")
    pen = ImageDraw.Draw(canvas)
    for panel, stage in enumerate(stages):
        mine, x0 = [e for e in entries if e["stage"] == stage], panel * 420 + 50
        pen.text((x0, 6), stage, fill="black")
        pen.rectangle((x0, 24, x0 + 350, 290), outline="gray")
        curves = {}
        for name in sorted({k for e in mine for k in e} - skip):
            points = np.array([(e["step"], e[name]) for e in mine if e.get(name, 0) > 0])        # (n, 2)
            width, last = max(1, len(points) // 50), len(points) - 1
            if len(points):
                curves[name] = [(points[min(i + width // 2, last), 0], points[i:i + width, 1].mean())
                                for i in range(0, len(points), width)]
        if not curves:
            continue
        values = [v for curve in curves.values() for _, v in curve]
        low, high = math.log10(min(values)), math.log10(max(values)) + 1e-6
        last = max(e["step"] for e in mine)
        for i, (name, curve) in enumerate(curves.items()):
            line = [(x0 + 350 * s / last, 290 - 266 * (math.log10(v) - low) / (high - low)) for s, v in curve]
            pen.line(line, fill=colors[i % 6], width=2)
            pen.text((x0 + 260, 30 + 12 * i), f"{name} {curve[-1][1]:.3g}", fill=colors[i % 6])
        pen.text((x0 - 45, 20), f"{10 ** high:.2g}", fill="gray")
        pen.text((x0 - 45, 280), f"{10 ** low:.2g}", fill="gray")
        pen.text((x0 + 300, 294), f"step {last}", fill="gray")
    canvas.save(path)
