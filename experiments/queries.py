"""Visual queries: what an image should show is inferred before it is drawn (MMCORE, 2604.19902).

    python -m experiments.queries features FILE.npy CHECKPOINT ..       .. are flags of train.py
    python -m experiments.queries train K none|latents|FILE.npy --out_dir DIR ..
    python -m experiments.queries evaluate K both|text|queries --out_dir DIR

Behind each text P of an edit stand K x K queries Q, clean end tokens at places that are spread over
the image. Q sees its text and the images before:

    L_vis = 1 - cos(F(output of Q), features of the image of J, pooled to K x K) (MMCORE, Eq. 1)

F is linear. The features, one for each latent, are what a model that can describe images holds at
the image of J, or those of another encoder in such a file; "latents" are those of the image VAE.
"none" trains the queries by the flow alone. In a share of the samples J does not see the text: at
first a half, from the middle of the run on a tenth (MMCORE, Sec. 3.2, without numbers). J sees
text and queries, queries alone or, what is never trained, the text alone. Q stands as segment C and
a text that only Q sees as N; edits have neither.
"""
from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import batches
import cola
import config
import data
import evaluate
import masks
import sample
import train
from cuda_attention import make_plan
from data import Purpose
from masks import EQ, II, IT2T, LE, LT, C, I, J, Layout, N, P
from scenes import edits, pictures

DESCRIBE = "describe the image."

# ---- Layout ------------------------------------------------------------------------------------

def change_rules(only_text: bool = False) -> None:
    """The table of II with Q, and with texts that J does not see. only_text: J does not see Q."""
    queries = 0 if only_text else EQ
    #                                    P   C        I   N   J
    masks.RULES[II, C] = torch.tensor([EQ, EQ,      LT, EQ, 0], dtype=torch.uint8)
    masks.RULES[II, N] = torch.tensor([0,  0,       LT, LE, 0], dtype=torch.uint8)
    masks.RULES[II, J] = torch.tensor([EQ, queries, LT, 0,  EQ], dtype=torch.uint8)


def with_queries(layout: Layout, side: int, grid: tuple[int, int], hidden: Tensor | None = None
                 ) -> Layout:
    """The layout in which the last side^2 positions of each P of II are queries. hidden (S,) bool:
    samples whose other P only the queries see."""
    at = ((layout.segment == P) & (layout.task[layout.sample] == II)).nonzero()[:, 0]
    turn = layout.sample[at] * 4096 + layout.block[at]
    counts = turn.unique_consecutive(return_counts=True)[1]
    to_end = (counts.cumsum(0).repeat_interleave(counts) - torch.arange(len(at), device=at.device))
    is_query = to_end <= side * side
    number, query = side * side - to_end[is_query], at[is_query]
    segment, row, col = layout.segment.clone(), layout.row.clone(), layout.col.clone()
    if hidden is not None:
        segment[at[hidden.to(at.device)[layout.sample[at]]]] = N
    segment[query] = C
    row[query], col[query] = number // side * grid[0] // side, number % side * grid[1] // side
    return replace(layout, segment=segment, row=row, col=col)


@contextmanager
def asking(model: cola.Cola, side: int) -> Iterator[None]:
    """Instructions end with the tokens of the queries."""
    ids, queries = model.ids, [model.tokenizer.end] * side ** 2 * model.text_vae.config.patch_size
    model.ids = lambda text, end: ids(text, end) + (queries if text and not end else [])
    try:
        yield
    finally:
        del model.ids

# ---- Training and sampling with queries --------------------------------------------------------

def change_batches(side: int, target: str) -> None:
    init, ii, prior = (getattr(batches.Batches, name) for name in ("__init__", "ii", "prior"))
    file = None if target in ("none", "latents") else np.load(target, mmap_mode="r")

    def with_features(self, *given) -> None:
        init(self, *given)
        shape = 5 * self.dataset.num_images, self.grid(0)[0] * self.grid(0)[1]
        if file is not None and file.shape[:2] != shape:
            raise ValueError(f"{target}: {file.shape}, expected {shape} features")
        self.features = file
        self.feature_channels = self.cz if file is None else file.shape[-1]

    def with_asking(self, k: int, task: int = II) -> batches.Example:
        with asking(self.model, side if task == II else 0):
            return ii(self, k, task)

    def as_queries(self, work: list[tuple[int, int]]) -> batches.Batch:
        a = self.args
        step = work[0][1] // (a.batch_size * a.micro_steps)
        share = max(0.1, 0.5 - 0.8 * step / config.steps(a, "mmdit"))
        hidden = [self.rng(k, Purpose.DROP).random(3)[2] < share for _, k in work]
        batch = prior(self, work)
        layout = with_queries(batch.layout, side, self.grid(0), torch.tensor(hidden))
        parts = {f.name: getattr(batch, f.name) for f in fields(batch)}
        return QueryBatch(**parts | {"layout": layout})

    batches.Batches.__init__ = with_features
    batches.Batches.ii, batches.Batches.prior = with_asking, as_queries


class QueryBatch(batches.Batch):
    def counts(self) -> dict[str, float]:
        return super().counts() | {"queries": int(asked(self.layout)[0].sum())}


def asked(layout: Layout) -> tuple[Tensor, Tensor]:
    """The queries whose turn draws an image, bool (L,), and the image of each of them, as a number
    among those drawn in the batch."""
    turn = layout.sample * 4096 + layout.block
    drawn = turn[layout.segment == J].unique_consecutive()
    is_query = (layout.segment == C) & (layout.task[layout.sample] == II) & torch.isin(turn, drawn)
    return is_query, torch.searchsorted(drawn, turn[is_query])


class PriorStage(train.PriorStage):
    """Stage 2 with L_vis in the place of L_REPA."""
    side = 2                                               # K

    def repa_loss(self, b: batches.Batch, hidden: Tensor, counts: dict[str, float]) -> Tensor:
        is_query, image = asked(b.layout)
        predicted = self.repa(hidden[is_query].float())                            # (queries, F)
        if not len(image):
            return 0 * predicted.sum()
        picture = b.layout.select(masks.is_image(b.layout.segment))
        clean = (b.z_image if b.features is None else b.features)[picture.segment == J]
        clean = clean.view(-1, picture.row.max() + 1, picture.col.max() + 1, clean.shape[-1])
        pooled = F.adaptive_avg_pool2d(clean.permute(0, 3, 1, 2), self.side)       # (n, F, K, K)
        target = pooled.flatten(2).transpose(1, 2)[image[::self.side ** 2]].flatten(0, 1)
        return (1 - F.cosine_similarity(predicted, target, dim=-1)).sum() / counts["queries"]


def change_sampling(side: int, only_queries: bool = False) -> None:
    pack, generate = masks.pack, sample.generate_turns

    def with_asking(model: cola.Cola, given, texts, settings=sample.EDIT, task=II, first=0) -> list:
        if task != II:
            return generate(model, given, texts, settings, task, first)
        grid = [pixels // model.image_vae.downsample for pixels in model.image_hw]

        def pack_queries(samples: list, *rest) -> Layout:
            hidden = torch.full((len(samples),), only_queries)
            return with_queries(pack(samples, *rest), side, grid, hidden)
        sample.pack = pack_queries
        try:
            with asking(model, side):
                return generate(model, given, texts, settings, task, first)
        finally:
            sample.pack = pack
    sample.generate_turns = with_asking

# ---- Features of a captioner -------------------------------------------------------------------

@torch.inference_mode()
def describe(model: cola.Cola, images: list[np.ndarray]) -> Tensor:
    """What the model holds half-way at the latents of images it is to describe: (n, h w, D)."""
    layer = model.mmdit.config.layers // 2
    z, lengths = model.encode_text([model.ids(DESCRIBE, end=False)] * len(images))
    grid = tuple(side // model.image_vae.downsample for side in images[0].shape[:2])
    layout = masks.pack([masks.Sample(IT2T, prompt=n, image=grid) for n in lengths],
                        model.block_len)
    hidden = model.mmdit(z, model.encode_images(images), torch.zeros(1),
                         torch.zeros_like(layout.segment), layout, make_plan(layout), tap=layer)[2]
    return hidden[layout.segment == I].view(len(images), -1, hidden.shape[-1])


def probe(features: np.ndarray, scenes: list[pictures.Scene], side: int) -> dict[str, float]:
    """How well a linear map reads each quadrant from features (images, h w, F) pooled to 2 x 2: the
    rate of the last quarter of the scenes, of a map fitted to the others."""
    x = torch.tensor(np.asarray(features, np.float32)).unflatten(1, (side, -1)).permute(0, 3, 1, 2)
    x = F.adaptive_avg_pool2d(x, 2).flatten(2).transpose(1, 2)                     # (n, 4, F)
    x = torch.cat([x, torch.ones(len(x), 4, 1)], -1)
    cut, rates = len(x) * 3 // 4, {}
    for name in ("shape", "color", "size"):
        found = [{edits.quadrant(o): getattr(o, name) for o in s.objects} for s in scenes]
        told = [[f.get((r, c), "none") for r in (0, 1) for c in (0, 1)] for f in found]
        words = sorted({word for own in told for word in own})
        y = torch.tensor([[words.index(word) for word in own] for own in told])    # (n, 4)
        target = F.one_hot(y, len(words)).float()
        fit = x[:cut].flatten(0, 1), target[:cut].flatten(0, 1)
        weights = torch.linalg.lstsq(*fit, driver="gelsd").solution  # also of deficient rank
        rates[name] = ((x[cut:] @ weights).argmax(-1) == y[cut:]).float().mean().item()
    return rates


def write_features(path: str, checkpoint: str, flags: list[str]) -> None:
    """Features of the images of a run's edits, and what the probe reads from them."""
    args = config.merge(config.parse(flags, "experiments.queries"))
    if args.data:
        raise ValueError("features are for generated scenes; leave out --data")
    dataset, model = data.open_data(args), cola.load(checkpoint)
    numbers, features = range(5 * dataset.num_images), []  # scenes, three edits, references
    for start in tqdm(numbers[::256], "features"):
        images = dataset.images(numbers[start:start + 256])
        features.append(describe(model, images).half().numpy())
    features = np.concatenate(features)
    np.save(path, features)
    side = dataset.image_hw(0)[0] // model.image_vae.downsample
    scenes = [dataset.scene_of(i) for i in range(min(4000, dataset.num_images))]
    print("a linear map reads", probe(features[:len(scenes)], scenes, side))


def main(command: str = "", *rest: str) -> int:
    """The exit status."""
    try:
        if command == "features" and len(rest) > 1:
            write_features(rest[0], rest[1], list(rest[2:]))
            return 0
        side = PriorStage.side = int(rest[0]) if rest and rest[0].isdecimal() else 0
        if command == "train" and side and len(rest) > 1:
            change_batches(side, rest[1])
            change_sampling(side)
            change_rules()
            train.PriorStage = PriorStage
            weight = "0" if rest[1] == "none" else "0.5"
            return train.main([*rest[2:], "--w_repa", weight, "--repa_until", "1"])
        if command == "evaluate" and side and rest[1:2] in (("both",), ("text",), ("queries",)):
            change_sampling(side, rest[1] == "queries")
            change_rules(rest[1] == "text")
            return evaluate.main(list(rest[2:]))
        raise ValueError("expected features FILE CHECKPOINT, train K TARGET or evaluate K MODE")
    except (ValueError, OSError, EOFError) as error:
        print(f"experiments.queries: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
