"""The paper's ablations on generated stories: trains what is missing, then prints every table.

    python tests/ablations.py --out DIR --jobs 2            all of them: 29 runs of two to five minutes a seed
    python tests/ablations.py --out DIR --tables 5 6 --seeds 0 1 2
    python tests/ablations.py --out DIR --show              only print what is there

One baseline, the paper's setting at the size of a CPU: stories alone, blocks of 16 latents of 16 channels, loc 1,
text VAE trained on at the prior's rate and held to its start by lambda_ref, without which its latents collapse.
Where there is no start to hold to, from scratch, beta is what keeps them apart; with more channels it follows
16 / channels, so that it weighs the same against L_FM, a mean over channels.
Sampled as in the paper: temperature 1, no snapping, an even time grid; but guidance 1. A row of a table changes
what its flags say. Rates are t2t.consistent, on scenes of seen and of held-out compositions, pooled over the
seeds, with Wilson's interval of all samples and the rate of each seed behind it. What training itself scatters is
larger: it is told below the tables, where there are rows with several seeds, and what a difference must exceed.
"""
from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from evaluate import wilson

BASE = ("--tasks t2t:1 --batch_size 24 --micro_steps 1 --steps 1000 --procs 1 --bf16 off --block_len 16 --text_loc 1 "
        "--vae_lr_ratio 1 --lambda_ref 0.01 --vae_logsnr learned "
        "--text_temperature 1 --no-text_snap --text_shift 1 --text_guidance 1")
SCRATCH = "--text_vae_steps 0 --lambda_ref 0 --beta"


# Of each table its title and rows: name, what training changes, what the evaluation alone changes.
TABLES: dict[str, tuple[str, list[tuple[str, str, str]]]] = {
    "5": ("Table 5: first block", [
        ("clean", "", ""), ("left padding", "--first_block left", ""), ("right padding", "--first_block right", ""),
        *((f"{way}, frozen", f"{flags}--vae_lr_ratio 0", "") for way, flags in
          (("clean", ""), ("left padding", "--first_block left "), ("right padding", "--first_block right "))),
        *((f"repaint, {cycles} cycle{'s' * (cycles > 1)}, m = {share}", "--first_block repaint",
           f"--repaint_share {share} --repaint_cycles {cycles}") for cycles in (1, 3) for share in (1.0, 0.7, 0.3))]),
    "3": ("Fig. 3, 16: fixed and evolving latents", [
        ("frozen", "--vae_lr_ratio 0", ""), ("joint x 0.01", "--vae_lr_ratio 0.01", ""), ("joint x 1", "", ""),
        ("interval, 40 on and 60 off", "--vae_interval 40 60", ""), ("all from scratch", f"{SCRATCH} 0.1", ""),
        ("all from scratch, beta 0.001", f"{SCRATCH} 0.001", ""),
        ("joint x 1, held by nothing", "--lambda_ref 0", "")]),
    "F5": ("Fig. 5: masking loss, in both stages", [
        ("x 1, with it", "", ""), ("x 1, without", "--lambda_mask 0", ""),
        ("x 0.01, with it", "--vae_lr_ratio 0.01", ""),
        ("x 0.01, without", "--vae_lr_ratio 0.01 --lambda_mask 0", "")]),
    "F6": ("Fig. 6: block length (a story and its end fill 15 to 45 latents)", [
        (str(n), f"--block_len {n}" if n != 16 else "", "") for n in (1, 16, 64, 128)]),
    "F7": ("Fig. 7, 8: law of the times", [
        *((f"loc {loc}", f"--text_loc {loc}" if loc != 1 else "", "") for loc in (-1, 0, 1, 2)),
        ("uniform", "--time_law uniform", "")]),
    "F9": ("Fig. 9: steps and guidance (from the second block on, as the first has no context)", [
        *((f"{n} steps", "", f"--sample_steps {n}" if n != 16 else "") for n in (1, 2, 4, 8, 16, 32)),
        *((f"guidance {w}", "", f"--text_guidance {w}" if w != 1 else "") for w in (0, 1, 2, 3, 5, 7, 10)),
        ("temperature 0.3", "", "--text_temperature 0.3"), ("snapping", "", "--text_snap"),
        ("shift 3", "", "--text_shift 3"), ("all three", "", "--text_temperature 0.3 --text_snap --text_shift 3")]),
    "2": ("Table 2: channels of a latent, all from scratch, loc 1", [
        (str(dz), f"{SCRATCH} {1.6 / dz}" + f" --text_latent_dim {dz}" * (dz != 16), "") for dz in (16, 64, 128)]),
    "T3": ("Table 3: logSNR of the latents", [
        *((x, f"--vae_logsnr {x}", "") for x in ("1.0", "1.5", "2.0")), ("learned", "", "")]),
    "6": ("Table 6: patch size, 128 channels, loc 1; frozen, after twice the steps of stage 1", [
        (str(p), f"--vae_lr_ratio 0 --text_latent_dim 128 --text_patch {p} --text_vae_steps 400", "") for p in (1, 2, 4)]),
}


def folder(out: Path, flags: str, evaluated: str, seed: int) -> Path:
    """Where the run of these flags is, or will be."""
    words = "_".join(f"{flags} {evaluated}".replace("--", "").split()) or "base"
    return out / f"{words}_s{seed}"


def train(place: Path, words: list[str], how: list[str]) -> int:
    """Run train.py with these flags in a folder, if it has not finished there; returns its exit status. ValueError
    where the folder holds a run of other flags."""
    place.mkdir(parents=True, exist_ok=True)
    said = place / "flags.txt"
    if said.exists() and said.read_text() != " ".join(words):
        raise ValueError(f"{place} is a run of other flags; name another --out")
    if said.exists() and (place / "metrics.json").exists():
        return 0
    said.write_text(" ".join(words))
    with open(place / "log.txt", "a") as log:
        done = subprocess.run([sys.executable, str(ROOT / "train.py"), *words, *how, "--out_dir", str(place)],
                              stdout=log, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode and not (place / "ckpt.pt").exists():
        said.unlink()                                          # nothing came of these flags
    print(f"{place.name}: exit status {done.returncode}", flush=True)
    return done.returncode


def run(out: Path, flags: str, evaluated: str, seed: int, scale: float, samples: int) -> int:
    """Train, or evaluate a copy of what was trained; what is finished stays. Returns train.py's exit status.
    ValueError where the folder holds a run of other flags."""
    place, source = folder(out, flags, evaluated, seed), folder(out, flags, "", seed) / "ckpt.pt"
    words = [*BASE.split(), "--seed", str(seed), "--scale", str(scale), "--eval_samples", str(samples),
             *flags.split(), *evaluated.split()]
    if evaluated and not source.exists():
        return 1
    if evaluated and not (place / "ckpt.pt").exists():
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, place)
    return train(place, words, ["--eval_only"] if evaluated else ["--resume", "auto"])


def consistent(metrics: dict) -> float:
    """The rate of a run: seen and held-out together."""
    return (metrics["seen"]["t2t"]["consistent"] + metrics["heldout"]["t2t"]["consistent"]) / 2


def last(place: Path, name: str) -> str:
    """A term at the end of a run: the mean of its last 50 values in the log."""
    log = place / "log.jsonl"
    values = [e[name] for e in map(json.loads, log.read_text().splitlines()) if name in e] if log.exists() else []
    return f"{statistics.fmean(values[-50:]):.2f}" if values else "-"


def show(out: Path, tables: list[str], seeds: list[int]) -> None:
    """Print the tables of what is there, and how much training scatters."""
    rates_of: dict[str, list[float]] = {}                      # of each recipe that was trained, by seed
    for key in tables:
        title, rows = TABLES[key]
        print(f"\n**{title}**\n\n| | t2t consistent [95 %] (each seed) | logSNR | drift | ceiling |\n"
              "|---|---|---|---|---|")
        for name, flags, evaluated in rows:
            found = {seed: p for seed in seeds
                     if (p := folder(out, flags, evaluated, seed)).joinpath("metrics.json").exists()}
            places = list(found.values())
            metrics = [json.loads((p / "metrics.json").read_text()) for p in places]
            if not metrics:
                continue
            rates = [consistent(m) for m in metrics]
            mean = statistics.fmean(rates)
            low, high = wilson(mean, sum(2 * m["n"] for m in metrics))
            if not evaluated and len(rates) > 1 and 0.1 < mean < 0.95:
                rates_of[flags] = rates
            trained = [folder(out, flags, "", seed) for seed in found]
            cells = [f"{mean:.3f} [{low:.3f}, {high:.3f}] ({', '.join(f'{r:.3f}' for r in rates)})",
                     *(", ".join(last(p, term) for p in trained) for term in ("logsnr", "drift")),
                     f"{statistics.fmean(m['ceiling']['text'] for m in metrics):.3f}"]
            print(f"| {name} | {' | '.join(cells)} |")
    freedom = sum(len(rates) - 1 for rates in rates_of.values())
    if freedom >= 10:
        squares = sum(statistics.variance(rates) * (len(rates) - 1) for rates in rates_of.values())
        deviation = (squares / freedom) ** 0.5
        least = 2.2 * deviation * (2 / min(map(len, rates_of.values()))) ** 0.5          # 2.2: Student's t of ten or more
        print(f"\nOne recipe's seeds deviate by {deviation:.3f} ({len(rates_of)} recipes, {freedom} degrees of freedom): "
              f"rows that differ by less than {least:.3f} are not told apart.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--tables", nargs="+", default=list(TABLES), choices=TABLES, help="which of the tables")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="a run of each")
    parser.add_argument("--scale", type=float, default=1.0, help="of the steps")
    parser.add_argument("--samples", type=int, default=512, help="judged for a rate, of seen and held-out each")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--show", action="store_true", help="only print")
    args = parser.parse_args()
    if args.jobs < 1 or args.samples < 1 or not 0 < args.scale <= 1e6:
        parser.error("--jobs, --samples and --scale: expected numbers above 0")
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"--out {args.out}: expected a folder")
    failed = 0
    if not args.show:
        wanted = dict.fromkeys((flags, evaluated, seed) for seed in args.seeds for key in args.tables
                               for _, flags, evaluated in TABLES[key][1])
        trained = dict.fromkeys((flags, "", seed) for flags, _, seed in wanted)
        for jobs in (trained, [w for w in wanted if w[1]]):        # evaluations need what was trained
            with ThreadPoolExecutor(args.jobs) as pool:
                try:
                    failed += sum(map(bool, pool.map(lambda job: run(args.out, *job, args.scale, args.samples), jobs)))
                except (ValueError, OSError) as error:
                    parser.error(str(error))
    show(args.out, args.tables, args.seeds)
    if failed:
        sys.exit(f"{failed} runs failed; see log.txt in their folders")


if __name__ == "__main__":
    main()
