"""Evaluate: rates on generated scenes, a grid of samples, and the curves of the losses.

Images, captions, answers and stories are generated for scenes that training never drew: of
compositions it has seen, and of compositions that were held out. The exact readers of scenes/ judge
them, without a network. Every rate has its Wilson interval (95 %).

    metrics.json   {"n", "seen": {"t2i": {"scene": rate, ..}, ..}, "heldout": .., "ceiling": ..,
                    "seconds" of training, "config": all flags}
    samples.png    images drawn for captions; captions and answers given to images
    loss.png       every loss in log.jsonl

train.py ends with the same evaluation. Networks compute in the float32 of their weights, as
sample.py's do, so that the rates are those of what it draws.

Run: python evaluate.py --out_dir out   (a CPU with 2 cores: about a minute for the default model)
"""
from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import textwrap
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

import cola
import config
import cuda_attention
import data
import sample
import workers
from checkpoint import read_log
from cola import Cola
from data import Purpose, rng
from sample import Settings
from scenes import language, pictures
from scenes.pictures import Scene
from workers import Worker

GROUP = 64                                 # scenes that are sampled together
Verdicts = Iterator[tuple[str, bool]]      # name of a rate, whether this sample is right


class Group(NamedTuple):
    """Scenes that are sampled together. All random choices follow from seed and number."""
    scenes: list[Scene]
    seed: int
    numbers: range

    def rngs(self, purpose: Purpose) -> list[np.random.Generator]:
        return [rng(self.seed, k, purpose) for k in self.numbers]

    def captions(self) -> list[str]:
        return list(map(language.caption, self.scenes, self.rngs(Purpose.CAPTION)))


def draw_scenes(seed: int, numbers: range, heldout: bool) -> Group:
    """Scenes of one to three objects, of compositions seen in training or of held-out ones."""
    return Group([pictures.sample_scene(rng(seed, k, Purpose.EVAL), heldout, 1 + k % 3)
                  for k in numbers], seed, numbers)


# ---- Judges: a verdict for each rate and sample ------------------------------------------------

def judge_images(model: Cola, group: Group, settings: Settings) -> Verdicts:
    """T2I: whether the image drawn for a caption shows what the caption says."""
    captions = group.captions()
    images = sample.generate_images(model, captions, settings, first=group.numbers[0])
    for caption, image, scene in zip(captions, images, group.scenes):
        objects = len(scene.objects)
        found = language.matches(pictures.read_image(image), language.read_caption(caption))
        for name, right in found.items():
            if name != "relation" or objects > 1:
                yield f"t2i.{name}", right
        yield f"t2i.by_count.{objects}", found["scene"]


def judge_answers(model: Cola, group: Group, settings: Settings) -> Verdicts:
    """IT2T: whether a description is exact, whether it is true, and whether an answer is true."""
    images = [pictures.render(scene, model.image_hw) for scene in group.scenes]

    def ask(prompts: list[str]) -> list[str]:
        return sample.generate_text(model, [""] * len(prompts), prompts, images, settings,
                                    first=group.numbers[0])

    for scene, caption in zip(group.scenes, ask(["describe the image."] * len(images))):
        description = language.read_caption(caption)
        yield "it2t.exact", language.is_exact(description, scene)
        yield "it2t.true", language.is_true(description, scene)
    questions = [language.question(scene, words)[0]
                 for scene, words in zip(group.scenes, group.rngs(Purpose.CAPTION))]
    for scene, question, answer in zip(group.scenes, questions, ask(questions)):
        yield "it2t.vqa", answer in language.answers(scene, question)


def judge_stories(model: Cola, group: Group, settings: Settings) -> Verdicts:
    """T2T: whether the continuation of the first one or two sentences of a story contradicts
    nothing. Every story has at least three."""
    prefixes = []
    for scene, words in zip(group.scenes, group.rngs(Purpose.WINDOW)):
        sentences = language.story(scene, words).split(". ")
        prefixes.append(". ".join(sentences[:int(words.integers(1, 3))]) + ".")
    texts = sample.generate_text(model, prefixes, settings=settings, first=group.numbers[0])
    for prefix, text in zip(prefixes, texts):
        yield "t2t.consistent", language.consistent(prefix, text)


def judge_image_vae(model: Cola, group: Group) -> Verdicts:
    """An upper bound for T2I: whether the scene is still read right after the image VAE."""
    h, w = (side // model.image_vae.downsample for side in model.image_hw)
    z = model.encode_images([pictures.render(scene, model.image_hw) for scene in group.scenes])
    for caption, image in zip(group.captions(), model.decode_images(z, (h, w))):
        found = language.matches(pictures.read_image(image), language.read_caption(caption))
        yield "image", found["scene"]


def judge_text_vae(model: Cola, group: Group, tasks: set[str]) -> Verdicts:
    """An upper bound for text: whether every token of a caption, and of a story, comes back."""
    texts = group.captions() if tasks - {"t2t"} else []
    if "t2t" in tasks:
        texts += map(language.story, group.scenes, group.rngs(Purpose.WINDOW))
    ids = [model.ids(text, end=True) for text in texts]
    logits = model.text_vae.decode(*model.encode_text(ids))                          # (T, V)
    for own, decoded in zip(ids, logits.argmax(-1).split([len(x) for x in ids])):
        yield "text", decoded.tolist() == own


# ---- Rates -------------------------------------------------------------------------------------

def wilson(rate: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a rate observed in n samples."""
    z2 = 1.96 ** 2
    middle = (rate + z2 / (2 * n)) / (1 + z2 / n)
    spread = math.sqrt(z2 * (rate * (1 - rate) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    return max(0.0, middle - spread), min(1.0, middle + spread)


def settings(args: argparse.Namespace, seed: int = 0) -> tuple[Settings, Settings]:
    """How images and how texts are generated, by the flags of the run."""
    image = replace(sample.IMAGE, steps=args.sample_steps, seed=seed, guidance=args.guidance)
    text = replace(sample.TEXT, steps=args.sample_steps, seed=seed, guidance=args.text_guidance,
                   shift=args.text_shift, temperature=args.text_temperature, snap=args.text_snap,
                   repaint_share=args.repaint_share, repaint_cycles=args.repaint_cycles)
    return image, text


@torch.no_grad()
def rates(model: Cola, args: argparse.Namespace, tasks: set[str], worker: Worker) -> dict:
    """Rates in [0, 1] of the tasks, on scenes that training never drew: "seen", "heldout" and, for
    the VAEs alone, "ceiling". n = --eval_samples scenes for each rate, but n of every number of
    objects for T2I. The workers share the samples; all of them return the same result."""
    seed, n = data.SEEDS + args.seed, args.eval_samples        # a seed that no run can have
    image, text = settings(args, seed)
    judges = [(judge_images, (image,), 3 * n)] if "t2i" in tasks else []
    judges += [(judge_answers, (text,), n)] if "it2t" in tasks else []
    judges += [(judge_stories, (text,), n)] if "t2t" in tasks else []
    work = [(split, *judge) for split in ("seen", "heldout") for judge in judges]
    work += [("ceiling", judge_text_vae, (tasks,), n)]
    work += [("ceiling", judge_image_vae, (), n)] if tasks - {"t2t"} else []
    # A group has successive numbers, because sampling numbers its noise from the first one on.
    groups = [(split, judge, more, range(first, min(first + GROUP, count)))
              for split, judge, more, count in work for first in range(0, count, GROUP)]
    verdicts = []
    for split, judge, more, numbers in tqdm(worker.share(groups), "evaluate",
                                            disable=worker.rank > 0):
        group = draw_scenes(seed, numbers, heldout=split == "heldout")
        verdicts += [(f"{split}.{name}", bool(right))
                     for name, right in judge(model, group, *more)]

    samples = defaultdict(list)
    for name, right in worker.gather(verdicts):
        samples[name].append(right)
    metrics: dict = {"n": n}
    for name, values in samples.items():   # "seen.t2i.scene" -> metrics["seen"]["t2i"]["scene"]
        *path, leaf = name.split(".")
        at = metrics
        for key in path:
            at = at.setdefault(key, {})
        at[leaf] = sum(values) / len(values)
    return metrics


def table(metrics: dict) -> str:
    """The rates with their intervals as lines of text: seen compositions and held-out ones."""
    n, tasks = metrics["n"], metrics["seen"].keys()
    rows = [("t2i scene, 1-3 objects", "t2i.scene", 3 * n)]    # title, place in metrics, samples
    rows += [(f"t2i scene, {c} object{'s' if c > 1 else ''}", f"t2i.by_count.{c}", n)
             for c in (1, 2, 3)]
    rows += [(f"t2i {name}", f"t2i.{name}", (2 if name == "relation" else 3) * n)
             for name in ("count", "color", "shape", "size", "relation", "background")]
    rows += [(name.replace(".", " "), name, n)
             for name in ("it2t.exact", "it2t.true", "it2t.vqa", "t2t.consistent")]
    kinds = ("t2t" in tasks) + bool(tasks - {"t2t"})           # of texts: stories, captions
    rows += [("ceiling image", "image", n), ("ceiling text", "text", kinds * n)]

    def cell(split: str, place: str, count: int) -> str:
        rate = metrics.get(split, {})
        for key in place.split("."):
            rate = rate.get(key, {})
        if rate == {}:
            return ""
        low, high = wilson(rate, count)
        return f"{rate:.3f} [{low:.3f}, {high:.3f}]"

    lines = [f"{'rate [95 % interval]':26s}{'seen':24s}held-out"]
    for title, place, count in rows:
        seen = cell("seen", place, count) or cell("ceiling", place, count)
        if seen:
            lines.append(f"{title:26s}{seen:24s}{cell('heldout', place, count)}")
    return "\n".join(lines)


# ---- Pictures ----------------------------------------------------------------------------------

def sample_grid(model: Cola, args: argparse.Namespace, tasks: set[str], dataset,
                path: Path) -> None:
    """A picture of images for captions and of texts for images; prints continued texts."""
    (image, text), cells = settings(args), []
    numbers = range(10**9, 10**9 + 6)      # samples that training does not reach
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
            print(f"{prefix} |{sample.generate_text(model, [prefix], settings=text)[0]}")
    if cells:
        captioned_grid(cells).save(path)


def captioned_grid(cells: list[tuple[np.ndarray, str]], columns: int = 6,
                   tile: int = 160) -> Image.Image:
    """Images uint8 (H, W, 3), scaled to fit into tiles, each above its text."""
    gap, room = 8, 72                      # pixels between tiles, and for the text of each
    rows = -(-len(cells) // columns)
    canvas = Image.new("RGB", (columns * (tile + gap) + gap, rows * (tile + room) + gap), "white")
    pen = ImageDraw.Draw(canvas)
    for i, (image, text) in enumerate(cells):
        x, y = gap + i % columns * (tile + gap), gap + i // columns * (tile + room)
        scale = tile / max(image.shape[:2])
        width, height = round(image.shape[1] * scale), round(image.shape[0] * scale)
        canvas.paste(Image.fromarray(image).resize((width, height), Image.NEAREST), (x, y))
        pen.rectangle((x, y, x + width - 1, y + height - 1), outline="lightgray")
        lines = textwrap.wrap(text, tile // 6)                 # a letter is about 6 pixels wide
        pen.multiline_text((x, y + tile + 4), "\n".join(lines[:5]), fill="black")
    return canvas


def curves_of(entries: list[dict]) -> dict[str, np.ndarray]:
    """Name of a loss -> its curve (n, 2) of steps and values, means over 2 % of the entries."""
    other = {"stage", "step", "skipped", "lr", "norm", "seconds", "data_seconds", "positions",
             "logsnr", "log_q", "drift"}
    curves = {}
    for name in sorted({name for entry in entries for name in entry} - other):
        points = np.array([(entry["step"], entry[name]) for entry in entries
                           if (entry.get(name) or 0) > 0])                           # (n, 2)
        if len(points):
            width = max(1, len(points) // 50)
            curves[name] = np.array([points[i:i + width].mean(0)
                                     for i in range(0, len(points), width)])
    return curves


def loss_plot(entries: list[dict], path: Path) -> None:
    """Every loss of a log against its step, on a log scale, with a panel for each stage."""
    colors = ("#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b")
    width, top, bottom = 350, 24, 290      # pixels of a panel's frame
    stages = list(dict.fromkeys(entry["stage"] for entry in entries))
    canvas = Image.new("RGB", (max(len(stages), 1) * (width + 70), bottom + 30), "white")
    pen = ImageDraw.Draw(canvas)
    for panel, stage in enumerate(stages):
        left = panel * (width + 70) + 50
        pen.text((left, 6), stage, fill="black")
        pen.rectangle((left, top, left + width, bottom), outline="gray")
        own = [entry for entry in entries if entry["stage"] == stage]
        last, curves = own[-1]["step"], curves_of(own)
        if not curves:
            continue
        values = np.log10(np.concatenate([curve[:, 1] for curve in curves.values()]))
        low, high = values.min(), values.max() + 1e-6
        for i, (name, curve) in enumerate(curves.items()):
            x = left + width * curve[:, 0] / last
            y = bottom - (bottom - top) * (np.log10(curve[:, 1]) - low) / (high - low)
            pen.line(list(zip(x, y)), fill=colors[i % 6], width=2)
            pen.text((left + 260, 30 + 12 * i), f"{name} {curve[-1, 1]:.3g}", fill=colors[i % 6])
        pen.text((left - 45, top - 4), f"{10 ** high:.2g}", fill="gray")
        pen.text((left - 45, bottom - 10), f"{10 ** low:.2g}", fill="gray")
        pen.text((left + width - 50, bottom + 4), f"step {last}", fill="gray")
    canvas.save(path)


# ---- The report of a run -----------------------------------------------------------------------

def report(args: argparse.Namespace, worker: Worker, dataset=None) -> None:
    """Evaluates out_dir/ckpt.pt with its averaged weights. All workers call it, and share the
    samples; worker 0 writes metrics.json, samples.png and loss.png, and prints the table."""
    out = Path(args.out_dir)
    found, tasks = cola.read(out / "ckpt.pt"), set(config.task_shares(args.tasks))
    generated, trained = not (args.data or args.text), found["progress"]["mmdit"] > 0
    model = cola.build(found).to(worker.device) if trained else None
    judged = trained and generated and args.eval_samples
    metrics = rates(model, args, tasks, worker) if judged else None
    if worker.rank > 0:
        return
    if (out / "log.jsonl").exists():
        loss_plot(read_log(out / "log.jsonl"), out / "loss.png")
    if metrics:
        metrics |= {"seconds": round(found["seconds"], 1), "config": vars(args)}
        (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        print(table(metrics))
    elif not generated:
        print("no metrics.json: only generated scenes can be judged")
    if trained:
        dataset = dataset or data.open_data(args)
        sample_grid(model, args, tasks, dataset, out / "samples.png")
        print_commands(args, tasks, dataset)
    print(f"{found['seconds'] / 60:.1f} minutes of training; see "
          f"{', '.join(str(path) for path in sorted(out.glob('[!.]*')) if path.is_file())}")


def print_commands(args: argparse.Namespace, tasks: set[str], dataset) -> None:
    """Prints a command to try for every task that was trained."""
    caption = "a large red circle above a small blue square on a gray background"
    prefix = "there is a red circle."
    if args.data or args.text:
        caption = dataset.t2i(0)[0] if "t2i" in tasks else ""
        prefix = " ".join(dataset.t2t(0).split()[:6]) if "t2t" in tasks else ""
    image = "a.png" if "t2i" in tasks else "YOUR.png"
    for task, words in (("t2i", [caption, "--out", "a.png"]),
                        ("it2t", [image, "describe the image."]), ("t2t", [prefix])):
        if task in tasks:
            words = [task, *words, "--checkpoint", f"{args.out_dir}/ckpt.pt"]
            print(f"try: python sample.py {shlex.join(words)}")


def main(argv: list[str] | None = None) -> int:
    """The exit status: 0, 2 for a user's mistake, 130 when interrupted."""
    worker = Worker()
    try:
        given = config.parse(sys.argv[1:] if argv is None else argv, "evaluate.py", config.EVALUATE)
        path = Path(given.get("out_dir", config.DEFAULTS["out_dir"]), "ckpt.pt")
        args = config.merge(given, cola.read(path)["args"], "resume", str(path))
        worker = workers.join(args)
        line = cuda_attention.set_backend(args.attention, worker.device)
        if worker.rank == 0:
            print(line)
        report(args, worker)
        return worker.leave(0)
    except (ValueError, OSError) as error:
        return worker.leave(2, str(error))
    except KeyboardInterrupt:
        return worker.leave(130, "stopped")


if __name__ == "__main__":
    sys.exit(main())
