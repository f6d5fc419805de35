"""Is a prompt continued as well when its length is no multiple of the text patch? (paper, Sec. 5.3)

    python tests/residues.py --out DIR --seeds 0 1                (CPU, one thread: 20 minutes a seed)

Trains on stories alone with 1, 2 and 4 tokens a latent, 16 channels for each, and judges what becomes of prompts
by what their length leaves over. Prompts differ in how hard they are: after one sentence more is open than after two, and how many tokens that takes
is no accident. So every story is given four times, up to the end of its first or second sentence and with 1, 2 and 3
tokens more, which makes each residue of 4 once; and as many stories are taken whose sentence leaves 0, 1, 2 and 3.
Every residue then has the same stories and the same share of cuts inside a sentence; a model of patch 1, to which
lengths are all alike, is the control.
"""
from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import data
import evaluate
import sample
import scenes
from sample import Cola


RUN = "--tasks t2t:1 --batch_size 24 --micro_steps 1 --steps 3000 --procs 1 --eval_samples 512"


def trained(out: Path, patch: int, seed: int) -> Path:
    """The checkpoint of a run, which is made or finished where it is not there. RuntimeError if that fails."""
    place = out / f"patch_{patch}_s{seed}"
    place.mkdir(parents=True, exist_ok=True)
    words = [*RUN.split(), "--text_patch", str(patch), "--text_latent_dim", str(16 * patch), "--text_vae_steps",
             str(200 * patch), "--seed", str(seed), "--resume", "auto", "--out_dir", str(place)]
    if not (place / "metrics.json").exists():
        with open(place / "log.txt", "a") as log:
            if subprocess.run([sys.executable, str(ROOT / "train.py"), *words], stdout=log, stderr=subprocess.STDOUT,
                              env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode:
                raise RuntimeError(f"{place}: training failed; see its log.txt")
    return place / "ckpt.pt"


def prompts_of(model: Cola, seed: int, k: int) -> tuple[str, list[str]]:
    """Of story k the sentences given, and four prompts of them and 0 to 3 tokens more; none if one of these is
    not what the tokenizer makes of it."""
    heldout, words = k % 2 > 0, data.rng(seed, k, data.WINDOW)
    story = scenes.story(scenes.sample_scene(data.rng(seed, k, data.EVAL), heldout, 1 + k % 3), words)
    given = ". ".join(story.split(". ")[:int(words.integers(1, 3))]) + "."
    encode, n = model.tokenizer.encode, len(model.tokenizer.encode(given))
    ids = [encode(story)[:n + more] for more in range(4)]
    prompts = [model.tokenizer.decode(i) for i in ids]
    return given, prompts if prompts[0] == given and [encode(p) for p in prompts] == ids else []


@torch.no_grad()
def judge(model: Cola, stories: int, seed: int) -> list[list[bool]]:
    """(stories, 4): was the prompt whose length leaves r of 4 continued consistently?"""
    kept: list[list[tuple[str, list[str]]]] = [[], [], [], []]
    k = 0
    while min(map(len, kept)) < stories // 4:
        given, prompts = prompts_of(model, seed, k)
        of_residue = kept[len(model.tokenizer.encode(given)) % 4]
        if prompts and len(of_residue) < stories // 4:
            of_residue.append((given, prompts))
        k += 1
    found, todo = [], [item for four in zip(*kept) for item in four]
    for at in range(0, len(todo), 16):
        some = todo[at:at + 16]
        flat = [p for _, prompts in some for p in prompts]
        rest = iter(sample.generate_text(model, flat, first=4 * at))
        for given, prompts in some:
            right = [False] * 4
            for prompt in prompts:
                told = prompt[len(given):] + next(rest)
                right[len(model.tokenizer.encode(prompt)) % 4] = scenes.consistent(given, told)
            found.append(right)
    return found


def table(found: list[list[bool]], patch: int) -> str:
    """Rates by the residues of a patch, and the 95 % interval of the best minus the worst, paired by story."""
    right = torch.tensor(found, dtype=torch.float64).view(len(found), -1, patch)          # (stories, 4 / patch, patch)
    rates, told = right.mean((0, 1)), []
    for r, rate in enumerate(rates.tolist()):
        low, high = evaluate.wilson(rate, right[..., r].numel())
        told.append(f"{r}: {rate:.3f} [{low:.3f}, {high:.3f}]")
    gaps = (right[..., rates.argmax()] - right[..., rates.argmin()]).mean(1)              # (stories,)
    spread = 1.96 * float(gaps.std()) / len(gaps) ** 0.5
    gap = float(gaps.mean())
    return f"{', '.join(told)}; best - worst {gap:.3f} [{gap - spread:.3f}, {gap + spread:.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--patches", nargs="+", type=int, default=[1, 2, 4], choices=(1, 2, 4), help="tokens a latent")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="a run of each")
    parser.add_argument("--stories", type=int, default=4096, help="each given four times; a multiple of 4")
    args = parser.parse_args()
    for seed in args.seeds:
        for patch in args.patches:
            path = trained(args.out, patch, seed)
            told = path.with_name(f"residues_{args.stories}.json")
            if not told.exists():
                told.write_text(json.dumps(judge(sample.load(path), args.stories, data.SEEDS)))
            found = json.loads(told.read_text())
            for modulus in sorted({patch, 4} - {1}):
                print(f"patch {patch}, seed {seed}, {len(found)} stories, length mod {modulus}: {table(found, modulus)}",
                      flush=True)


if __name__ == "__main__":
    main()
