"""Evaluate: rates on generated scenes, a grid of samples, and the curves of the losses.

Images, captions, answers, stories, edits and clips are generated for scenes that training never
drew, of seen and of held-out compositions. The hand-written readers of scenes/ judge them, without
a network.

    metrics.json  {"n", "seen": {"t2i": {"scene": rate}}, "heldout", "ceiling", "samples", ..}
                  "ceiling": what the VAEs alone keep; "samples": how many are behind a rate;
                  by_kind, by_count, by_sentences: a rate by the kind of question or of edit, the
                  number of objects, the sentences said; wrong: the share of sentences with an
                  error; ranked: --rank_samples; the functions judge_.. explain the others; also
                  "seconds" of training, "config", all flags
    samples.png   images drawn for captions; captions and answers given to images; sequences, each
                  image with its text
    loss.png      every loss in log.jsonl

Run: python evaluate.py --out_dir out   (CPU, a minute for the default model; train.py ends with it)
"""
import json
import math
import os
import sys
import textwrap
from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from functools import partial, reduce
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

import cola
import config
import cuda_attention
import likelihood
import sample
import workers
from checkpoint import latest, read_log
from cola import Cola
from data import SEEDS, Purpose, open_data, rng
from masks import TASKS, VID
from scenes import edits, language, pictures
from workers import Worker

GROUP_SIZE = 128                                # scenes that are sampled together
RANK_STEPS = 4                                  # rk4 steps of a log p
NO_INTERVAL = ("t2t.length", "t2t.sentence")    # a ratio; sentences that depend on each other
Verdicts = Iterator[tuple[str, bool | float]]   # name of a rate, is this sample right?
Cells = list[tuple[np.ndarray, str]]       # images uint8 (H, W, 3) with their texts


class Group(NamedTuple):
    """Scenes with the seed and the numbers of their random choices."""
    scenes: list[pictures.Scene]
    seed: int
    numbers: range
    heldout: bool

    def rngs(self, purpose: Purpose) -> list[np.random.Generator]:
        return [rng(self.seed, k, purpose) for k in self.numbers]

    def captions(self) -> list[str]:
        return list(map(language.caption, self.scenes, self.rngs(Purpose.CAPTION)))


def draw_scenes(seed: int, numbers: range, heldout: bool) -> Group:
    """Scenes of one, two and three objects in turn, of seen or of held-out compositions."""
    return Group([pictures.sample_scene(rng(seed, k, Purpose.EVAL), heldout, 1 + k % 3)
                  for k in numbers], seed, numbers, heldout)

# ---- Judges: a verdict for each rate and sample ------------------------------------------------

def judge_images(model: Cola, group: Group, settings: sample.Settings) -> Verdicts:
    """T2I: whether the image drawn for a caption shows what the caption says."""
    captions = group.captions()
    images = sample.generate_images(model, captions, settings, first=group.numbers[0])
    for caption, image, scene in zip(captions, images, group.scenes):
        found = language.matches(pictures.read_image(image), language.read_caption(caption))
        for name, right in found.items():
            if name != "relation" or len(scene.objects) > 1:
                yield f"t2i.{name}", right
        yield f"t2i.by_count.{len(scene.objects)}", found["scene"]


def judge_answers(model: Cola, group: Group, settings: sample.Settings) -> Verdicts:
    """IT2T: whether a description is exact, whether it is true, and whether an answer is true, also
    by the kind of its question."""
    images = [pictures.render(scene, model.image_hw) for scene in group.scenes]
    ask = partial(sample.generate_text, model, [""] * len(images), images=images,
                  settings=settings, first=group.numbers[0])
    for scene, caption in zip(group.scenes, ask(["describe the image."] * len(images))):
        description = language.read_caption(caption)
        yield "it2t.exact", language.is_exact(description, scene)
        yield "it2t.true", language.is_true(description, scene)
    questions, _ = zip(*map(language.question, group.scenes, group.rngs(Purpose.CAPTION)))
    for scene, question, answer in zip(group.scenes, questions, ask(questions)):
        right = answer in language.answers(scene, question)
        yield "it2t.vqa", right
        yield f"it2t.by_kind.{language.question_kind(question)}", right


def judge_stories(model: Cola, group: Group, settings: sample.Settings) -> Verdicts:
    """T2T: whether what follows the first sentences of a story is right (language.is_right), also
    by the number of sentences said; whether each sentence is right, or what is wrong with it.
    length: sentences said, over those that the data have after such prefixes."""
    prefixes, rest = [], []
    for scene, words in zip(group.scenes, group.rngs(Purpose.WINDOW)):
        sentences = language.story(scene, words).split(". ")           # three or more
        cut = int(words.integers(1, 3))
        prefixes.append(". ".join(sentences[:cut]) + ".")
        rest.append(len(sentences) - cut)
    texts = sample.generate_text(model, prefixes, settings=settings, first=group.numbers[0])
    for prefix, text in zip(prefixes, texts):
        facts = language.Facts()
        language.tell(facts, prefix)
        said = language.tell(facts, text)
        right = language.is_right(said)
        yield "t2t.consistent", right
        yield f"t2t.by_sentences.{min(len(said), 4)}", right           # 4: or more
        for verdict in said:
            yield "t2t.sentence", verdict not in language.WRONG
            yield from ((f"t2t.wrong.{name}", verdict == name) for name in language.WRONG)
        yield "t2t.length", len(said) * len(rest) / sum(rest)


def judge_edits(model: Cola, group: Group, settings: sample.Settings) -> Verdicts:
    """II: whether one edit of a picture is right (edits.judge), also by its kind."""
    kinds = [edits.KINDS[k % len(edits.KINDS)] for k in group.numbers]
    work = [(kind, *edits.draw_edit(words, kind, group.heldout))
            for kind, words in zip(kinds, group.rngs(Purpose.EDIT))]
    results = sample.generate_turns(
        model, [[pictures.render(scene, model.image_hw)] for _, scene, _ in work],
        [["", edit.instruction] for _, _, edit in work], settings, first=group.numbers[0])
    for (kind, scene, edit), (image,) in zip(work, results):
        right = edits.judge(pictures.read_image(image), scene, edit)
        for name in ("scene", "done") + ("kept",) * bool(edit.kept):
            yield f"ii.{name}", right[name]
        yield f"ii.by_kind.{kind}", right["scene"]


def judge_references(model: Cola, group: Group, settings: sample.Settings) -> Verdicts:
    """II: whether an object of one picture is put into another one as asked. both_orders: whether
    two pictures of one object are combined rightly in either order, by the same instruction."""
    scene = lambda words, count=None: pictures.sample_scene(words, group.heldout, count)
    pairs = []
    for words in group.rngs(Purpose.EDIT):
        found = first = second = None
        while not found:
            a, b = scene(words), scene(words)
            found = edits.reference(a, b, words, group.heldout)
        while not (first and second):
            c, d, rel = scene(words, 1), scene(words, 1), pictures.pick(words, pictures.INVERSE)
            said = f"put the object of image 1 {rel} the object of image 2."
            first, second = (edits.follow(said, *two, group.heldout) for two in ((c, d), (d, c)))
        pairs += [(a, b, found), (c, d, first), (d, c, second)]
    results = sample.generate_turns(
        model, [[pictures.render(scene, model.image_hw) for scene in (a, b)] for a, b, _ in pairs],
        [["", "", edit.instruction] for _, _, edit in pairs], settings, first=3 * group.numbers[0])
    right = [edits.judge(pictures.read_image(image), b, edit)["scene"]
             for (_, b, edit), (image,) in zip(pairs, results)]
    yield from (("ii.reference", x) for x in right[::3])
    yield from (("ii.both_orders", x and y) for x, y in zip(right[1::3], right[2::3]))


def judge_series(model: Cola, group: Group, settings: sample.Settings) -> Verdicts:
    """II: an image drawn for a caption, and three edits in turn, each asked for by what the reader
    sees in the image that the model has drawn last: whether all is right up to a turn. The model
    gets the images before as pictures."""
    rngs, texts = group.rngs(Purpose.EDIT), [[caption] for caption in group.captions()]
    images, read, right = [[] for _ in rngs], [[] for _ in rngs], [True] * len(rngs)
    asked: list = [None] * len(rngs)
    for turn in range(4):
        first = group.numbers[0] + (turn << 32)            # noise of its own
        drawn = sample.generate_turns(model, images, texts, settings, first=first)
        for i, (image,) in enumerate(drawn):
            found = pictures.read_image(image)
            if turn == 0:
                told = language.read_caption(texts[i][0])
                right[i] = language.matches(found, told)["scene"]
            elif right[i]:
                right[i] = edits.judge(found, read[i][-1], asked[i])["scene"]
            yield f"ii.turns.{turn}", right[i]
            if right[i]:
                before = read[i][-1] if turn else None
                asked[i] = edits.next_edit(before, found, rngs[i], group.heldout)
                read[i].append(found)
            images[i].append(image)
            texts[i].append(asked[i].instruction if right[i] else "")


def judge_true_history(model: Cola, group: Group, settings: sample.Settings) -> Verdicts:
    """II: whether edit 1, 2 and 3 of such a series is right if all images before it are true."""
    series = [[edits.Edit(caption, scene, ()), *edits.episode(scene, words, group.heldout)]
              for caption, scene, words in
              zip(group.captions(), group.scenes, group.rngs(Purpose.EDIT))]
    for turn in range(1, 4):
        drawn = sample.generate_turns(
            model, [[pictures.render(e.target, model.image_hw) for e in s[:turn]] for s in series],
            [[e.instruction for e in s[:turn + 1]] for s in series], settings,
            first=group.numbers[0] + (turn << 32))
        for s, (image,) in zip(series, drawn):
            right = edits.judge(pictures.read_image(image), s[turn - 1].target, s[turn])["scene"]
            yield f"ii.true_history.{turn}", right
            if s[turn].instruction == edits.PUT_BACK:
                yield "ii.put_back", right


def judge_clips(model: Cola, group: Group, settings: sample.Settings) -> Verdicts:
    """VID: whether the frames of a clip are right (edits.judge_clip), drawn for its caption; and
    whether its end is right if its first two frames are given."""
    clips = [edits.clip(words, group.heldout) for words in group.rngs(Purpose.EDIT)]
    frames = [[pictures.render(scene, model.image_hw) for scene in clip.frames] for clip in clips]
    texts = [[clip.caption, *[""] * (edits.FRAMES - 1)] for clip in clips]
    for given in (0, 2):
        start = [images[:given] for images in frames]
        drawn = sample.generate_turns(model, start, texts, settings, VID, group.numbers[0])
        for clip, images in zip(clips, map(list.__add__, start, drawn)):
            right = edits.judge_clip(list(map(pictures.read_image, images)), clip, given)
            for name in ("prediction",) if given else right:
                yield f"vid.{name}", right[name]


def judge_likelihoods(model: Cola, group: Group) -> Verdicts:
    """IT2T: whether the answer to a question is likelier than every wrong one of its kind, and the
    caption of an image likelier than seven that differ in one attribute: by a draw of the ELBO."""
    for scene, words in zip(group.scenes, group.rngs(Purpose.CAPTION)):
        asked, answer = language.question(scene, words)
        wording = int(words.integers(len(language.WORDINGS[len(scene.objects)])))
        told = language.caption(scene, words, wording)
        for name, prompt, texts in (
                ("answer", asked, [answer, *language.wrong_answers(scene, asked)]),
                ("caption", "describe the image.",
                 [told, *language.wrong_captions(scene, words, wording, 7)])):
            image = pictures.render(scene, model.image_hw)
            log_p = likelihood.log_answers(model, prompt, image, texts, RANK_STEPS)
            yield f"it2t.ranked.{name}", log_p[0] > max(log_p[1:])


def judge_vaes(model: Cola, group: Group, tasks: set[str]) -> Verdicts:
    """Upper bounds: whether every token of a caption, or of a story, comes back from the text VAE,
    and whether the scene is still read right after the image VAE."""
    captions = group.captions() if tasks - {"t2t"} else []
    stories = map(language.story, group.scenes, group.rngs(Purpose.WINDOW))
    texts = [*captions, *stories] if "t2t" in tasks else captions
    ids = [model.ids(text, end=True) for text in texts]
    logits = model.text_vae.decode(*model.encode_text(ids))                          # (T, V)
    for own, decoded in zip(ids, logits.argmax(-1).split([len(x) for x in ids])):
        yield "text", decoded.tolist() == own
    if captions:
        h, w = (side // model.image_vae.downsample for side in model.image_hw)
        z = model.encode_images([pictures.render(scene, model.image_hw) for scene in group.scenes])
        for caption, image in zip(captions, model.decode_images(z, (h, w))):
            found = language.matches(pictures.read_image(image), language.read_caption(caption))
            yield "image", found["scene"]

# ---- Rates -------------------------------------------------------------------------------------

def wilson(rate: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a rate observed in n samples."""
    z2 = 1.96 ** 2
    middle = (rate + z2 / (2 * n)) / (1 + z2 / n)
    spread = math.sqrt(z2 * (rate * (1 - rate) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    return max(0.0, middle - spread), min(1.0, middle + spread)


def settings(args: Namespace, seed: int = 0) -> tuple[sample.Settings, sample.Settings]:
    """How images and how texts are generated, by the flags of the run."""
    image = replace(sample.IMAGE, steps=args.image_steps, seed=seed, guidance=args.guidance,
                    temperature=args.image_temperature)
    text = replace(sample.TEXT, steps=args.text_steps, seed=seed, guidance=args.text_guidance,
                   shift=args.text_shift, temperature=args.text_temperature, snap=args.text_snap,
                   repaint_share=args.repaint_share, repaint_cycles=args.repaint_cycles)
    return image, text


@torch.no_grad()
def rates(model: Cola, args: Namespace, tasks: set[str], worker: Worker) -> dict:
    """Rates of the tasks. A rate has n = --eval_samples scenes; for T2I, n of every number of
    objects; for likelihoods, --rank_samples. The workers share the samples; all of them return the
    same result."""
    seed, n = SEEDS + args.seed, args.eval_samples             # a seed that no run can have
    image, text = settings(args, seed)
    edit = replace(sample.EDIT, seed=seed)
    judges = {"t2i": [(judge_images, image, 3 * n)], "it2t": [(judge_answers, text, n)],
              "t2t": [(judge_stories, text, n)], "vid": [(judge_clips, edit, n)],
              "ii": [(judge_edits, edit, 3 * n), *((judge, edit, n) for judge in (
                  judge_references, judge_series, judge_true_history))]}     # number of scenes
    work = [(split, partial(judge, settings=s), count) for split in ("seen", "heldout")
            for task in sorted(tasks) for judge, s, count in judges[task]]
    if "it2t" in tasks:
        work += [(split, judge_likelihoods, args.rank_samples) for split in ("seen", "heldout")]
    work.append(("ceiling", partial(judge_vaes, tasks=tasks), n))
    # A group has successive numbers, because sampling numbers its noise from the first one on.
    groups = [(split, judge, range(count)[first:first + GROUP_SIZE])
              for split, judge, count in work for first in range(0, count, GROUP_SIZE)]
    verdicts = []
    for split, judge, numbers in tqdm(worker.share(groups), "evaluate", disable=worker.rank > 0):
        group = draw_scenes(seed, numbers, heldout=split == "heldout")
        verdicts += [(f"{split}.{name}", float(right)) for name, right in judge(model, group)]
    samples = defaultdict(list)
    for name, right in worker.gather(verdicts):
        samples[name].append(right)
    metrics: dict = {"n": n, "samples": {name: len(values) for name, values in samples.items()}}
    for name, values in samples.items():   # "seen.t2i.scene" -> metrics["seen"]["t2i"]["scene"]
        *path, leaf = name.split(".")
        at = metrics
        for key in path:
            at = at.setdefault(key, {})
        at[leaf] = math.fsum(values) / len(values)         # whatever the order of the workers
    return metrics


def table(metrics: dict) -> str:
    """Lines of text: every rate, most with their interval. What is wrong with sentences is in
    metrics.json alone."""
    def cell(path: str) -> str:
        if path not in metrics["samples"]:
            return ""
        rate = reduce(dict.__getitem__, path.split("."), metrics)
        if path.endswith(NO_INTERVAL):
            return f"{rate:.3f}"
        low, high = wilson(rate, metrics["samples"][path])
        return f"{rate:.3f} [{low:.3f}, {high:.3f}]"

    lines = [f"{'rate [95 % interval]':26s}{'seen':24s}held-out"]
    names = {path.removeprefix("seen.").removeprefix("heldout.") for path in metrics["samples"]
             if ".wrong." not in path}
    for name in sorted(names, key=lambda name: (name.startswith("ceiling"), name)):
        seen = cell(name if name.startswith("ceiling") else f"seen.{name}")
        lines.append(f"{name.replace('.', ' '):26s}{seen:24s}{cell(f'heldout.{name}')}".rstrip())
    return "\n".join(lines)

# ---- Pictures ----------------------------------------------------------------------------------

def captioned_grid(cells: Cells) -> Image.Image:
    """Rows of six images, each scaled to fit into 160 x 160 pixels, above five lines of text."""
    canvas = Image.new("RGB", (6 * 168, math.ceil(len(cells) / 6) * 240), "white")
    pen = ImageDraw.Draw(canvas)
    for i, (image, text) in enumerate(cells):
        x, y = i % 6 * 168, i // 6 * 240
        picture = ImageOps.contain(Image.fromarray(image), (160, 160), Image.Resampling.NEAREST)
        canvas.paste(picture, (x, y))
        pen.multiline_text((x, y + 164), "\n".join(textwrap.wrap(text, 26)[:5]), fill="black")
    return canvas


def loss_plot(stage: str, entries: list[dict]) -> Image.Image:
    """Every loss in the log of a stage against its step, on a log scale."""
    not_losses = {"stage", "step", "skipped", "lr", "norm", "seconds", "data_seconds", "positions",
                  "logsnr", "log_q"}
    curves = {}                            # name: (n, 2) steps and losses
    for name in sorted(set().union(*entries) - not_losses):
        if points := [(e["step"], e[name]) for e in entries if (e.get(name) or 0) > 0]:
            parts = np.array_split(points, min(50, len(points)))       # each becomes its mean
            curves[name] = np.array([part.mean(0) for part in parts])
    values = [value for curve in curves.values() for value in curve[:, 1]]
    low, high = min(values, default=1.0), 1.01 * max(values, default=1.0)
    last, colors = entries[-1]["step"], ("red", "blue", "green", "purple", "orange", "brown")
    canvas = Image.new("RGB", (420, 320), "white")
    pen = ImageDraw.Draw(canvas)
    pen.text((10, 6), f"{stage}: losses from {low:.2g} to {high:.2g}, {last} steps", fill="black")
    pen.rectangle((10, 24, 410, 310), outline="gray")
    for i, (name, curve) in enumerate(curves.items()):
        x = 10 + 400 * curve[:, 0] / last
        y = 310 - 286 * np.log(curve[:, 1] / low) / math.log(high / low)
        pen.line(list(zip(x, y)), fill=colors[i % 6], width=2)
        pen.text((320, 30 + 12 * i), f"{name} {curve[-1, 1]:.3g}", fill=colors[i % 6])
    return canvas

# ---- The report of a run -----------------------------------------------------------------------

def report(args: Namespace, worker: Worker, found: dict, dataset=None) -> None:
    """Evaluates the weights of the checkpoint `found`, or with --ema above 0 their averages. All
    workers call it and share the samples; worker 0 writes what there is to write into out_dir, and
    prints the rates. ValueError if there are no averages."""
    out, tasks = Path(args.out_dir), set(config.task_shares(args.tasks))
    metrics, cells, lines = {}, [], []
    if found["progress"]["mmdit"]:
        if args.ema and not found["ema"]:
            raise ValueError(f"--ema {args.ema}: the checkpoint has no averaged weights; give 0")
        model = cola.build(found, "ema" if args.ema else "model").to(worker.device)
        if (args.eval_samples or args.rank_samples) and not (args.data or args.text):
            metrics = rates(model, args, tasks, worker)
            metrics |= {"seconds": round(found["seconds"], 1), "config": vars(args)}
        if worker.rank == 0:
            if not (args.data or args.text):               # scenes that training never drew
                dataset = open_data(Namespace(**vars(args) | {"seed": SEEDS + args.seed}))
            cells, lines = draw(model, args, tasks, dataset or open_data(args))
    if worker.rank == 0:
        if args.eval_samples and metrics:    # a ranking alone does not replace the rates
            (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        if cells:
            captioned_grid(cells).save(out / "samples.png")
        stages = defaultdict(list)
        for entry in read_log(out / "log.jsonl") if (out / "log.jsonl").exists() else []:
            stages[entry["stage"]].append(entry)
        if stages:
            plots = [loss_plot(stage, entries) for stage, entries in stages.items()]
            Image.fromarray(np.hstack(plots)).save(out / "loss.png")
        print(table(metrics) if metrics.get("samples") else "no rates: they need a trained prior, "
              "generated scenes and --eval_samples or --rank_samples")
        print(*lines, f"{found['seconds'] / 60:.1f} minutes of training; see {out}", sep="\n")
        print(f"next: python sample.py --help; its flag: --checkpoint {out}/ckpt.pt")


def draw(model: Cola, args: Namespace, tasks: set[str], dataset) -> tuple[Cells, list[str]]:
    """Images with texts, and lines to print: continued texts."""
    (image, text), cells, lines = settings(args), [], []
    numbers = range(10**9, 10**9 + 6)      # samples that training does not reach
    if "t2i" in tasks:
        captions = [dataset.t2i(k)[0] for k in numbers]
        cells += zip(sample.generate_images(model, captions, image), captions)
    if "it2t" in tasks:
        for prompt, index, _ in map(dataset.it2t, numbers):
            picture = dataset.images([index])[0]
            answer = sample.generate_text(model, [""], [prompt], [picture], text)[0]
            cells.append((picture, f"{prompt} {answer}"))
    for task in sorted(tasks & {"ii", "vid"}):
        for turns in map(getattr(dataset, task), numbers[:3]):
            given = dataset.images(turn.image for turn in turns if not turn.drawn)
            texts = [turn.text for turn in turns]
            if task == "vid":                              # it may be a first frame alone
                texts += [""] * (edits.FRAMES - len(texts))
            edit = replace(sample.EDIT, seed=image.seed)
            drawn = sample.generate_turns(model, [given], [texts], edit, TASKS.index(task))[0]
            cells += zip([*given, *drawn], texts)
            cells += [(np.full((8, 8, 3), 255, np.uint8), "")] * (-len(cells) % 6)
    if "t2t" in tasks:
        for prefix in (" ".join(dataset.t2t(k).split()[:6]) for k in numbers[:3]):
            continuation = sample.generate_text(model, [prefix], settings=text)[0]
            lines.append(f"{prefix} |{continuation}")
    return cells, lines


def main(argv: list[str] | None = None) -> int:
    """The exit status: 0, 2 for a user's mistake, 130 when interrupted."""
    worker = Worker(int(os.environ.get("RANK", 0)))
    try:
        given = config.parse(sys.argv[1:] if argv is None else argv, "evaluate.py", config.EVALUATE)
        found = latest(given.get("out_dir", config.DEFAULTS["out_dir"]))
        args = config.merge(given, found["args"], "resume", "the checkpoint")
        worker = workers.join(args)
        line = cuda_attention.set_backend(args.attention, worker.device)
        if worker.rank == 0:
            print(line)
        report(args, worker, found)
        return worker.leave()
    except (ValueError, OSError, RuntimeError, KeyboardInterrupt) as error:
        return worker.leave(error)


if __name__ == "__main__":
    sys.exit(main())
