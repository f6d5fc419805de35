"""Is a prompt continued as well when its length is no multiple of the text patch? (paper, Sec. 5.3)

    python tests/residues.py --out DIR --seeds 0 1                (CPU, one thread: 20 minutes a seed)

Trains on stories alone with 1, 2 and 4 tokens a latent, 16 channels for each, and judges what becomes of prompts
by what their length leaves over. Prompts differ in how hard they are: after one sentence more is open than after
two, and how many tokens that takes is no accident. So every story is given eight times, up to the end of its first or
second sentence and with 1 to 7 tokens more, which makes each residue of 4 twice; and as many stories are taken whose
sentence leaves 0, 1, 2 and 3. Every residue then has the same stories and the same cuts inside a sentence; a model of
patch 1, to which lengths are all alike, is the control.
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
import evaluate
import sample
import scenes
from ablations import train
from sample import Cola

CUTS = 8                                   # of a story: prompts that are longer by a token each
RUN = "--tasks t2t:1 --batch_size 24 --micro_steps 1 --steps 3000 --procs 1 --eval_samples 512"


def trained(out: Path, patch: int, seed: int) -> Path:
    """The checkpoint of a run, which is made or finished where it is not there. RuntimeError if that fails."""
    place = out / f"patch_{patch}_s{seed}"
    words = [*RUN.split(), "--text_patch", str(patch), "--text_latent_dim", str(16 * patch), "--text_vae_steps",
             str(200 * patch), "--seed", str(seed)]
    if train(place, words, ["--resume", "auto"]):
        raise RuntimeError(f"{place}: training failed; see its log.txt")
    return place / "ckpt.pt"


def prompts_of(model: Cola, seed: int, k: int) -> tuple[str, list[str]]:
    """Of story k the sentences given, and prompts of them and 0 to 7 tokens more; none if the story is too short, or
    one of these is not what the tokenizer makes of it."""
    scene = scenes.sample_scene(data.rng(seed, k, data.EVAL), k % 2 > 0, 1 + k % 3)
    story, given = evaluate.begun_story(scene, data.rng(seed, k, data.WINDOW))
    encode, n = model.tokenizer.encode, len(model.tokenizer.encode(given))
    ids = [encode(story)[:n + more] for more in range(CUTS)]
    prompts = [model.tokenizer.decode(i) for i in ids]
    whole = len(ids[-1]) == n + CUTS - 1 and prompts[0] == given and [encode(p) for p in prompts] == ids
    return given, prompts if whole else []


@torch.no_grad()
def judge(model: Cola, stories: int, seed: int) -> list[list[list[bool]]]:
    """(4, stories / 4, CUTS): was the prompt of so many tokens more continued consistently, of stories whose given
    sentences leave 0, 1, 2 and 3."""
    found: list[list[list[bool]]] = [[], [], [], []]
    k = 0
    while min(map(len, found)) < stories // 4:
        some = []
        while len(some) < 8:
            given, prompts = prompts_of(model, seed, k)
            residue = len(model.tokenizer.encode(given)) % 4
            taken = len(found[residue]) + sum(residue == other for other, *_ in some)
            some += [(residue, given, prompts)] * bool(prompts and taken < stories // 4)
            k += 1
            if sum(map(len, found)) + len(some) == 4 * (stories // 4):
                break
        flat = [p for *_, prompts in some for p in prompts]
        rest = iter(sample.generate_text(model, flat, first=CUTS * k))
        for residue, given, prompts in some:
            found[residue].append([scenes.consistent(given, p[len(given):] + next(rest)) for p in prompts])
    return found


def table(found: list[list[list[bool]]], modulus: int) -> str:
    """Rates by what a length leaves of a modulus of 2 or 4, and the 95 % interval of the best minus the worst, paired
    by story: Tukey's, as of four the two are chosen by what is seen."""
    right = torch.tensor(found, dtype=torch.float64)                                   # (4, n, CUTS)
    length = torch.arange(4)[:, None] + torch.arange(CUTS)                             # (4, CUTS), up to a multiple of 4
    of = [torch.cat([right[b][:, length[b] % modulus == r].mean(1) for b in range(4)]) for r in range(modulus)]
    rates, told = [x.mean().item() for x in of], []                                    # of: (4 n,) each
    for r, rate in enumerate(rates):
        low, high = evaluate.wilson(rate, len(of[r]) * CUTS // modulus)
        told.append(f"{r}: {rate:.3f} [{low:.3f}, {high:.3f}]")
    gaps = of[rates.index(max(rates))] - of[rates.index(min(rates))]
    gap, spread = gaps.mean().item(), {2: 1.96, 4: 2.57}[modulus] * gaps.std().item() / len(gaps) ** 0.5
    return f"{', '.join(told)}; best - worst {gap:.3f} [{gap - spread:.3f}, {gap + spread:.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--patches", nargs="+", type=int, default=[1, 2, 4], choices=(1, 2, 4), help="tokens a latent")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="a run of each")
    parser.add_argument("--stories", type=int, default=2048, help="each given eight times; a multiple of 4")
    args = parser.parse_args()
    for seed in args.seeds:
        for patch in args.patches:
            path = trained(args.out, patch, seed)
            told = path.with_name(f"residues_{args.stories}.json")
            if not told.exists():
                told.write_text(json.dumps(judge(sample.load(path), args.stories, data.SEEDS)))
            found = json.loads(told.read_text())
            for modulus in sorted({patch, 4} - {1}):
                print(f"patch {patch}, seed {seed}, {args.stories} stories, length mod {modulus}: {table(found, modulus)}",
                      flush=True)


if __name__ == "__main__":
    main()
