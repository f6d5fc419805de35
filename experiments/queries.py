"""Visual queries: what an image should show is inferred before it is drawn (MMCORE, 2604.19902).

    python -m experiments.queries features FILE.npy CHECKPOINT ..       .. are flags of train.py
    python -m experiments.queries train K none|latents|FILE.npy --out_dir DIR ..
    python -m experiments.queries evaluate K both|text|queries --out_dir DIR

Behind each text P of an edit stand K x K queries Q, clean end tokens at places that are spread over
the image. Q sees its text and the images before; the image J sees both, or one of the two:

    L_vis = 1 - cos(F(output of Q), features of the image of J, pooled to K x K)            (Eq. 1)

F is linear. The features, one for each latent, are what a model that can describe images holds at
the image of J, or those of another encoder in such a file; "latents" are those of the image VAE.
"none" trains the queries by the flow alone. In a share of the samples J does not see the text: at
first a half, from the middle of the run on a tenth (Sec. 3.2; the paper has no numbers). Q stands
as segment C and a text that only Q sees as N; edits have neither.
"""
from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

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

def change_rules(mode: str) -> None:
    """The table of II with Q and hidden texts. mode: what J sees, "both", "text" or "queries"."""
    text, queries = EQ * (mode != "queries"), EQ * (mode != "text")
    #                                    P     C   I   N   J
    masks.RULES[II, C] = torch.tensor([EQ,   EQ, LT, EQ, 0], dtype=torch.uint8)
    masks.RULES[II, N] = torch.tensor([0,    0,  LT, LE, 0], dtype=torch.uint8)
    masks.RULES[II, J] = torch.tensor([text, queries, LT, 0, EQ], dtype=torch.uint8)


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
        with asking(self.model, side):
            return ii(self, k, task)

    def as_queries(self, work: list[tuple[int, int]]) -> batches.Batch:
        a = self.args
        step = work[0][1] // (a.batch_size * a.micro_steps)
        share = max(0.1, 0.5 - 0.8 * step / config.steps(a, "mmdit"))
        hidden = [self.rng(k, Purpose.DROP).random(3)[2] < share for _, k in work]
        batch = prior(self, work)
        hw = [side // self.model.image_vae.downsample for side in self.model.image_hw]
        return replace(batch, layout=with_queries(batch.layout, side, hw, torch.tensor(hidden)))

    batches.Batches.__init__ = with_features
    batches.Batches.ii, batches.Batches.prior = with_asking, as_queries


class PriorStage(train.PriorStage):
    """Stage 2 with L_vis in the place of L_REPA."""
    def forward(self, b: batches.Batch, counts: dict) -> tuple[Tensor, dict]:
        a, inner, seen = self.args, self.mmdit.forward, []
        a.repa_until = 0.0                                 # no L_REPA
        tap = {"tap": a.repa_layer - 1}
        self.mmdit.forward = lambda *given, **named: seen.append(inner(*given, **named | tap)) \
            or seen[0]
        try:
            loss, terms = super().forward(b, counts)
        finally:
            del self.mmdit.forward
        if a.w_repa and counts["image"]:
            terms["vis"] = self.vis_loss(b, seen[0][2])
            loss = loss + a.lambda_fm * a.w_repa * terms["vis"]
            terms["vis"] = terms["vis"].detach()
        return loss, terms

    def vis_loss(self, b: batches.Batch, hidden: Tensor) -> Tensor:
        """The mean of L_vis over the queries whose turn has a J."""
        layout = b.layout
        is_query = (layout.segment == C) & (layout.task[layout.sample] == II)
        picture = layout.select(masks.is_image(layout.segment))
        drawn, turn = picture.segment == J, lambda x: x.sample * 4096 + x.block
        of_image, of_query = (turn(x).unique_consecutive(return_counts=True)
                              for x in (picture.select(drawn), layout.select(is_query)))
        if not len(of_query[0]):
            return 0 * self.repa.weight.sum()
        features = (b.z_image if b.features is None else b.features)[drawn]
        side, h, w = round(int(of_query[1][0]) ** 0.5), picture.row.max() + 1, picture.col.max() + 1
        features = features.view(-1, h, w, features.shape[-1]).permute(0, 3, 1, 2)
        pooled = F.adaptive_avg_pool2d(features, side).flatten(2).transpose(1, 2)  # (n, K K, F)
        index = torch.searchsorted(of_image[0], of_query[0]).clamp(max=len(pooled) - 1)
        has_image = of_image[0][index] == of_query[0]
        predicted = self.repa(hidden[is_query].float()).view(-1, side * side, features.shape[1])
        return (1 - F.cosine_similarity(predicted, pooled[index], dim=-1))[has_image].mean()


def change_sampling(side: int) -> None:
    pack, generate = masks.pack, sample.generate_turns

    def with_asking(model: cola.Cola, *given, **named) -> list:
        hw = [side // model.image_vae.downsample for side in model.image_hw]
        sample.pack = lambda *what: with_queries(pack(*what), side, hw)
        try:
            with asking(model, side):
                return generate(model, *given, **named)
        finally:
            sample.pack = pack
    sample.generate_turns = with_asking

# ---- Features of a captioner -------------------------------------------------------------------

@torch.inference_mode()
def describe(model: cola.Cola, images: list[np.ndarray]) -> Tensor:
    """What the model holds half-way at the latents of images it is to describe: (images, h w, D)."""
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
        if command == "features":
            write_features(rest[0], rest[1], list(rest[2:]))
            return 0
        side = int(rest[0])
        if command == "train":
            change_batches(side, rest[1])
            change_sampling(side)
            change_rules("both")
            train.PriorStage = PriorStage
            return train.main([*rest[2:], "--w_repa", "0" if rest[1] == "none" else "0.5"])
        if command == "evaluate" and rest[1] in ("both", "text", "queries"):
            change_sampling(side)
            change_rules(rest[1])
            return evaluate.main(list(rest[2:]))
    except (ValueError, OSError, IndexError) as error:
        print(f"experiments.queries: {error}", file=sys.stderr)
        return 2
    print("experiments.queries: expected features, train or evaluate", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
