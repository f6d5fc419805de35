"""Edits: what a model of edits must beat, and what it owes to its masks and its turns.

    python -m experiments.edits baselines                    seconds; needs no model
    python -m experiments.edits NAME --out_dir DIR           train.py under a change, with its flags
    python -m experiments.edits table DIR ..                 the rates of such runs, seen scenes
    python -m experiments.edits guidance CHECKPOINT          rates by both guidances, seconds

Baselines, of the edits that evaluate.py asks for: the source returned as it is; and a perfect
drawer that knows a caption of the target alone, and so draws its objects at places of its own.

    text_alone     J and P see no image: below the drawer with a caption
    noisy_sources  I has a random time in training, without loss
    no_turns       the images of a sample have no numbers
    texts_so_far   J sees the texts of all turns, not of its own alone
    causal_texts   a token of P does not see those behind it in its text
    late_sources   I sees the text that asks for the image behind it; so no series in training
"""
from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections import defaultdict
from dataclasses import replace
from functools import reduce
from itertools import product
from pathlib import Path

import numpy as np
import torch

import batches
import evaluate
import masks
import mmdit
import sample
import train
from cuda_attention import padded
from data import SEEDS, Purpose, rng
from masks import GT, II, LE, I, J, P
from scenes import edits, language, pictures

# ---- Baselines without a model -----------------------------------------------------------------

def drawn_by_caption(target: pictures.Scene, words: np.random.Generator) -> pictures.Scene:
    """A scene at other places for which a caption of the target is exact."""
    told = language.read_caption(language.caption(target, words))
    while True:
        objects = pictures.reading_order(pictures.place(target.objects, words))
        scene = pictures.Scene(target.background, objects)
        if language.is_exact(told, scene):
            return scene


def baselines(n: int = 1536, seed: int = SEEDS) -> None:
    """Prints the rates of both, of n edits of seen scenes."""
    rates = defaultdict(list)
    for k in range(n):
        words = rng(seed, k, Purpose.EDIT)
        scene, e = edits.draw_edit(words, edits.KINDS[k % len(edits.KINDS)])
        for name, found in (("source", scene), ("caption", drawn_by_caption(e.target, words))):
            right = edits.judge(pictures.read_image(pictures.render(found)), scene, e)
            for rate in ("scene", "done") + ("kept",) * bool(e.kept):
                rates[name, rate].append(right[rate])
    for (name, rate), right in rates.items():
        print(f"{name:8} {rate:6} {np.mean(right):.3f} of {len(right)}")

# ---- Changes -----------------------------------------------------------------------------------

def change_rule(*cells: tuple[int, int, int]) -> None:
    """Other relations in the table of II: (query segment, key segment, relation)."""
    for query, key, relation in cells:
        masks.RULES[II, query, key] = relation


def noisy_sources() -> None:
    prior = batches.Batches.prior

    def with_noise(self, work: list[tuple[int, int]]) -> batches.Batch:
        batch = prior(self, work)
        task = batch.layout.task[batch.layout.sample]
        clean = (batch.layout.segment == I) & (task == II)
        number = batch.layout.sample * 16 + batch.layout.block        # of the image
        words = torch.Generator().manual_seed(int(batch.ids.sum()))   # the same when resumed
        times = torch.randint(1, len(batch.t), (int(number.max()) + 1,), generator=words)
        return replace(batch, t_index=torch.where(clean, times[number], batch.t_index))
    batches.Batches.prior = with_noise


def no_turns() -> None:
    embed = mmdit.PositionEmbedding.forward
    mmdit.PositionEmbedding.forward = lambda self, layout: embed(
        self, replace(layout, block=torch.zeros_like(layout.block)))


def causal_texts() -> None:
    mask = padded.padded_mask

    def causal(q, k, q_rows, k_rows, rules) -> torch.Tensor:
        i, j = q_rows.index[:, :, None], k_rows.index[:, None, :]
        in_text = (q.segment[i] == P) & (k.segment[j] == P) & (q.task[q.sample[i]] == II)
        later = (q.block[i] == k.block[j]) & (k.col[j] > q.col[i])
        return mask(q, k, q_rows, k_rows, rules) & ~(in_text & later)
    padded.padded_mask = causal


def late_sources() -> None:
    """In a series, P of turn 2 would be seen by I of turn 0, and so by J of turn 1."""
    draw, add = edits.Sequences.edits, sample.Context.add

    def without_series(self, i: int, words: np.random.Generator) -> list[edits.Turn]:
        while (turns := draw(self, i, words))[0].drawn:
            pass
        return turns

    def add_with_text(self, text, image, layout) -> None:
        """Images wait for the next text, and join the context with it."""
        waiting = getattr(self, "waiting", [])
        self.waiting = [*waiting, (text, image, layout)]
        if len(text):
            texts, images, layouts = zip(*self.waiting)
            self.waiting = []
            add(self, torch.cat(texts), torch.cat(images), reduce(masks.concat, layouts))
    edits.Sequences.edits, sample.Context.add = without_series, add_with_text
    change_rule((I, P, GT))


CHANGES = {
    "text_alone": lambda: change_rule((J, I, 0), (P, I, 0)), "noisy_sources": noisy_sources,
    "no_turns": no_turns, "texts_so_far": lambda: change_rule((J, P, LE)),
    "causal_texts": causal_texts, "late_sources": late_sources,
}

# ---- Table -------------------------------------------------------------------------------------

RATES = ("ii.scene", "ii.done", "ii.kept", "ii.reference", "ii.both_orders", "ii.turns.3",
         "ii.true_history.3", "ii.put_back", "t2i.scene", "it2t.exact", "it2t.vqa",
         "t2t.consistent")


def table(*folders: str) -> None:
    """Prints a line of Markdown for each run: rates on seen scenes, those left out by its tasks as
    spaces."""
    lines = [["run", *RATES], ["---"] * (1 + len(RATES))]
    for file in (Path(folder) / "metrics.json" for folder in folders):
        try:
            metrics = json.loads(file.read_text())
            lines.append([file.parent.name, *(
                f"{reduce(dict.__getitem__, ('seen.' + rate).split('.'), metrics):.3f}"
                if "seen." + rate in metrics["samples"] else " " for rate in RATES)])
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{file}: not the rates of a run") from None
    print(*(f"| {' | '.join(line)} |" for line in lines), sep="\n")


def guidance(checkpoint: str, n: int = 256) -> None:
    """Prints the rates of single edits of seen scenes, by the guidances of text and images."""
    model = sample.open_model(Namespace(checkpoint=checkpoint, official=None, device="cpu"), "ii")
    group = evaluate.draw_scenes(SEEDS, range(n), heldout=False)
    for text, image in product((1.0, 2.0, 3.0), (1.0, 1.5)):
        settings = replace(sample.EDIT, seed=SEEDS, guidance=text, image_guidance=image)
        rates = defaultdict(list)
        for rate, right in evaluate.judge_edits(model, group, settings):
            rates[rate].append(right)
        print(f"text {text:g}, images {image:g}:", *(
            f"{rate} {np.mean(rates['ii.' + rate]):.3f}" for rate in ("scene", "done", "kept")))


def main() -> int:
    """The exit status of train.py; 2 for a user's mistake."""
    name, *given = sys.argv[1:] or [""]
    if (name, len(given)) in (("baselines", 0), ("guidance", 1)) or name == "table" and given:
        try:
            {"baselines": baselines, "guidance": guidance, "table": table}[name](*given)
            return 0
        except (ValueError, OSError) as error:
            print(f"edits.py: {error}", file=sys.stderr)
            return 2
    if name not in CHANGES:
        print("edits.py: expected baselines, guidance CHECKPOINT, table DIR .. or one of "
              + ", ".join(CHANGES), file=sys.stderr)
        return 2
    CHANGES[name]()
    # Noise near a hidden image would show it.
    return train.main([*given, *["--image_rho", "0"] * (name in ("text_alone", "noisy_sources"))])


if __name__ == "__main__":
    sys.exit(main())
