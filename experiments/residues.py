"""Residues: are prompts continued as well if their length is no multiple of the text patch?

    python -m experiments.residues --out DIR --seeds 0 1       (CPU, one thread: an hour a seed)

The paper's model with patch 2 fails on prompts of odd length (Sec. 5.3: 0.26 against 18.12). This
trains on stories alone with 1, 2 and 4 tokens a latent, 16 channels for each token, and prints the
rate of consistent continuations by the length of the prompt modulo 2 and 4.

Prompts of different lengths have different words, and some words are harder with any patch. So the
prompts of a scene form a Latin square: four beginnings, whose lengths have the residues 0, 1, 2 and
3 modulo 4, each cut at four places in the same next sentence. Every residue has four prompts, one
of each beginning and one of each cut. What remains of the words is the same for a model of patch 1,
to which lengths mean nothing: its rates are subtracted.
"""
from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

import cola
import data
import sample
from cola import Cola
from experiments.ablations import call
from scenes import language, pictures
from scenes.pictures import Scene

RUN = ("--tasks t2t:1 --batch_size 24 --micro_steps 1 --steps 6000 --muon_lr 0.02 --procs 1 "
       "--bf16 off")


def checkpoint_of(out: Path, patch: int, seed: int, scale: float) -> Path:
    """Trains a model unless it is there. OSError if that fails."""
    folder = out / f"patch_{patch}_s{seed}"
    flags = [*RUN.split(), "--text_patch", str(patch), "--text_latent_dim", str(16 * patch),
             "--text_vae_steps", str(200 * patch), "--seed", str(seed), "--scale", str(scale)]
    if call("train.py", folder, flags, ("--resume", "auto")):
        raise OSError(f"{folder}: training failed; see its log.txt")
    return folder / "ckpt.pt"


def prompts_of(model: Cola, scene: Scene) -> list[tuple[str, str]]:
    """16 prompts, the four of residue 0 first: (whole sentences, the begun next sentence).

    ValueError if the tokens of this tokenizer do not give the Latin square."""
    encode, o, number = model.tokenizer.encode, scene.objects[0], len(scene.objects)
    first, second, third = (language.with_article([*words, o.shape])
                            for words in ((), (o.color,), (o.size, o.color)))
    beginnings = [*(f"there is {thing}." for thing in (first, second, third)),
                  f"there is {third}. the background is {scene.background}."]
    sentence = " there is one object." if number == 1 else \
        f" there are {pictures.COUNTS[number - 1]} objects."
    if {len(encode(beginning)) % 4 for beginning in beginnings} != {0, 1, 2, 3}:
        raise ValueError("the lengths of the four beginnings have not all residues modulo 4")
    by_residue: list[list[tuple[str, str]]] = [[], [], [], []]
    for beginning in beginnings:
        n, ids = len(encode(beginning)), encode(beginning + sentence)
        for cut in range(n, n + 4):
            prompt = model.tokenizer.decode(ids[:cut])
            if encode(prompt) != ids[:cut] or not prompt.startswith(beginning):
                raise ValueError(f"{beginning + sentence!r} is not made of whole tokens")
            by_residue[cut % 4].append((beginning, prompt[len(beginning):]))
    return [prompt for prompts in by_residue for prompt in prompts]


@torch.no_grad()
def judge(model: Cola, scenes: int) -> list[list[bool]]:
    """(scenes, 16) for each prompt of prompts_of, whether its continuation is consistent."""
    right: list[list[bool]] = []
    for k in range(0, scenes, 16):                                     # 256 prompts at a time
        drawn = [pictures.sample_scene(data.rng(data.SEEDS, i, data.Purpose.EVAL), i % 2 > 0,
                                       1 + i % 3) for i in range(k, min(k + 16, scenes))]
        prompts = [prompt for scene in drawn for prompt in prompts_of(model, scene)]
        texts = sample.generate_text(model, [whole + begun for whole, begun in prompts],
                                     first=16 * k)
        flat = [language.consistent(whole, begun + text)
                for (whole, begun), text in zip(prompts, texts)]
        right += [flat[i:i + 16] for i in range(0, len(flat), 16)]
    return right


def by_residue(right: list[list[bool]], modulus: int) -> list[Tensor]:
    """For each residue of a modulus of 2 or 4 the rate of every scene, (scenes,)."""
    square = torch.tensor(right, dtype=torch.float64).view(-1, 4, 4)   # (scenes, residue, prompt)
    return [square[:, r::modulus].flatten(1).mean(1) for r in range(modulus)]


def line(rates: list[Tensor]) -> str:
    """Means by residue and the best minus the worst, with 95 % intervals over the scenes. The
    interval of the difference is Tukey's, because the two of four are chosen by what is seen."""
    def cell(x: Tensor, z: float = 1.96) -> str:
        mean, spread = x.mean().item(), z * x.std().item() / len(x) ** 0.5
        return f"{mean:.3f} [{mean - spread:.3f}, {mean + spread:.3f}]"

    best, worst = (choose(rates, key=lambda x: x.mean().item()) for choose in (max, min))
    cells = [f"{residue}: {cell(x)}" for residue, x in enumerate(rates)]
    return f"{', '.join(cells)}; best - worst {cell(best - worst, {2: 1.96, 4: 2.57}[len(rates)])}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--patches", nargs="+", type=int, default=[1, 2, 4], choices=(1, 2, 4),
                        help="tokens a latent")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="a run of each")
    parser.add_argument("--scenes", type=int, default=2048, help="scenes, of 16 prompts each")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the steps")
    args = parser.parse_args()
    for seed in args.seeds:
        right = {}
        for patch in sorted(args.patches):
            path = checkpoint_of(args.out, patch, seed, args.scale)
            saved = path.with_name(f"residues_{args.scenes}.json")
            if not saved.exists():
                saved.write_text(json.dumps(judge(cola.load(path), args.scenes)))
            right[patch] = json.loads(saved.read_text())
            for modulus in sorted({max(patch, 2), 4}):
                rates = by_residue(right[patch], modulus)
                print(f"patch {patch}, seed {seed}, length mod {modulus}: {line(rates)}",
                      flush=True)
                if patch > 1 and 1 in right:
                    less = [a - b for a, b in zip(rates, by_residue(right[1], modulus))]
                    print(f"    minus the rates of patch 1: {line(less)}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"residues.py: {error}")
