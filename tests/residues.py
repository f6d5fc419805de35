"""Is a prompt continued as well when its length is no multiple of the text patch? (paper, Sec. 5.3)

    python tests/residues.py --out DIR --seeds 0 1                (CPU, one thread: an hour a seed)

Trains on stories alone with 1, 2 and 4 tokens a latent, 16 channels for each token, and judges what becomes of prompts
by what their length leaves over. Prompts of different lengths are of different words, so some are harder, whatever
the patch. Hence a Latin square: every scene is begun in four ways, whose lengths leave 0, 1, 2 and 3, each cut in four
places of one and the same next sentence. Of each residue these are four prompts, one of every beginning and one of
every cut, so that what a beginning or a cut makes easier falls on all alike. What only both together make easier
does not: it is the same for a model of patch 1, to which lengths mean nothing and whose rates are taken off.
"""
from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import data
import sample
import scenes
from ablations import train
from sample import Cola

RUN = "--tasks t2t:1 --batch_size 24 --micro_steps 1 --steps 6000 --procs 1 --bf16 off --eval_samples 512"


def trained(out: Path, patch: int, seed: int, scale: float) -> Path:
    """The checkpoint of a run, which is made or finished where it is not there. RuntimeError if that fails."""
    place = out / f"patch_{patch}_s{seed}"
    words = [*RUN.split(), "--text_patch", str(patch), "--text_latent_dim", str(16 * patch), "--text_vae_steps",
             str(200 * patch), "--seed", str(seed), "--scale", str(scale)]
    if train(place, words, ["--resume", "auto"]):
        raise RuntimeError(f"{place}: training failed; see its log.txt")
    return place / "ckpt.pt"


def prompts_of(model: Cola, scene: scenes.Scene) -> list[tuple[str, str]]:
    """16 prompts, four of each residue of the length mod 4 after another: whole sentences, and what is begun of the
    next. ValueError if this tokenizer's words do not make the square."""
    encode, o, number = model.tokenizer.encode, scene.objects[0], len(scene.objects)
    things = [scenes._a([*words, o.shape]) for words in ((), (o.color,), (o.size, o.color))]
    begun = [f"there is {thing}." for thing in things] + [f"there is {things[2]}. the background is {scene.background}."]
    rest = " there is one object." if number == 1 else f" there are {scenes.COUNTS[number - 1]} objects."
    prompts: list[list[tuple[str, str]]] = [[], [], [], []]
    for given in begun:
        n, ids = len(encode(given)), encode(given + rest)
        for cut in range(n, n + 4):
            prompt = model.tokenizer.decode(ids[:cut])
            prompts[cut % 4].append((given, prompt[len(given):]))
            if encode(prompt) != ids[:cut] or not prompt.startswith(given):
                raise ValueError(f"{given + rest!r} is not made of whole tokens")
    if len({len(encode(given)) % 4 for given in begun}) != 4:
        raise ValueError("the four beginnings leave no four residues")
    return [p for of in prompts for p in of]


@torch.no_grad()
def judge(model: Cola, stories: int, seed: int) -> list[list[bool]]:
    """(stories, 16): was the prompt continued consistently."""
    found: list[list[bool]] = []
    for k in range(0, stories, 16):                                    # 256 prompts at a time
        world = [scenes.sample_scene(data.rng(seed, i, data.EVAL), i % 2 > 0, 1 + i % 3) for i in range(k, k + 16)]
        prompts = [prompts_of(model, scene) for scene in world]
        told = iter(sample.generate_text(model, [given + begun for p in prompts for given, begun in p], first=16 * k))
        found += [[scenes.consistent(given, begun + next(told)) for given, begun in p] for p in prompts]
    return found[:stories]


def by_residue(found: list[list[bool]], modulus: int) -> list[torch.Tensor]:
    """Of each residue of a modulus of 2 or 4 the share of a scene's prompts that went right, (scenes,) each."""
    right = torch.tensor(found, dtype=torch.float64).view(-1, 4, 4)                    # (scenes, residue, 4)
    return [right[:, r::modulus].flatten(1).mean(1) for r in range(modulus)]


def table(of: list[torch.Tensor]) -> str:
    """Means by residue, and the best minus the worst, each with the 95 % interval of so many scenes; that of the
    difference is Tukey's, as of four residues the two are chosen by what is seen."""
    def told(x: torch.Tensor, z: float = 1.96) -> str:
        mean, spread = x.mean().item(), z * x.std().item() / len(x) ** 0.5
        return f"{mean:.3f} [{mean - spread:.3f}, {mean + spread:.3f}]"
    best, worst = (choose(of, key=lambda x: x.mean().item()) for choose in (max, min))
    return ", ".join(f"{r}: {told(x)}" for r, x in enumerate(of)) + \
        f"; best - worst {told(best - worst, {2: 1.96, 4: 2.57}[len(of)])}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--patches", nargs="+", type=int, default=[1, 2, 4], choices=(1, 2, 4), help="tokens a latent")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="a run of each")
    parser.add_argument("--stories", type=int, default=2048, help="scenes, of 16 prompts each")
    parser.add_argument("--scale", type=float, default=1.0, help="of the steps")
    args = parser.parse_args()
    for seed in args.seeds:
        judged = {}
        for patch in sorted(args.patches):
            path = trained(args.out, patch, seed, args.scale)
            told = path.with_name(f"residues_{args.stories}.json")
            if not told.exists():
                told.write_text(json.dumps(judge(sample.load(path), args.stories, data.SEEDS)))
            judged[patch] = json.loads(told.read_text())
            for modulus in sorted({max(patch, 2), 4}):
                of = by_residue(judged[patch], modulus)
                print(f"patch {patch}, seed {seed}, {args.stories} scenes, length mod {modulus}: {table(of)}", flush=True)
                if patch > 1 and 1 in judged:
                    less = [a - b for a, b in zip(of, by_residue(judged[1], modulus))]
                    print(f"    less the rates of patch 1: {table(less)}", flush=True)


if __name__ == "__main__":
    main()
