"""The paper's ablations on generated stories: trains what is missing, then prints every table.

    python tests/ablations.py --out DIR --jobs 2            all of them: 25 runs of two to six minutes a seed
    python tests/ablations.py --out DIR --tables 5 6 --seeds 0 1 2
    python tests/ablations.py --out DIR --show              only print what is there

One baseline, the paper's setting at the size of a CPU: stories alone, blocks of 16 latents of 16 channels, loc 1,
text VAE trained on at the prior's rate and held to its start by lambda_ref, without which its latents collapse.
Where there is no start to hold to, from scratch, beta is what keeps them apart. Each row of a table changes what
its flags say. Rates are t2t.consistent of `python train.py` with these flags, on scenes of seen and of held-out
compositions, pooled over the seeds; the interval is Wilson's, of all samples together, and the rates of the single
seeds stand behind it.
"""
from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from evaluate import wilson

BASE = ("--tasks t2t:1 --batch_size 24 --micro_steps 1 --steps 1000 --procs 1 --block_len 16 --text_loc 1 "
        "--vae_lr_ratio 1 --lambda_ref 0.01 --vae_logsnr learned")
SCRATCH = "--text_vae_steps 0 --lambda_ref 0 --beta 0.1"

# Of each table its title and rows: name, what training changes, what the evaluation alone changes.
TABLES: dict[str, tuple[str, list[tuple[str, str, str]]]] = {
    "5": ("Table 5: first block", [
        ("clean", "", ""), ("left padding", "--first_block left", ""), ("right padding", "--first_block right", ""),
        *((f"repaint, {cycles} cycle{'s' * (cycles > 1)}, m = {share}", "--first_block repaint",
           f"--repaint_share {share} --repaint_cycles {cycles}") for cycles in (1, 3) for share in (1.0, 0.7, 0.3))]),
    "3": ("Fig. 3, 16: fixed and evolving latents", [
        ("frozen", "--vae_lr_ratio 0", ""), ("joint x 0.01", "--vae_lr_ratio 0.01", ""), ("joint x 1", "", ""),
        ("interval, 2 on and 3 off", "--vae_interval 200 300", ""), ("all from scratch", SCRATCH, ""),
        ("all from scratch, beta of the others", SCRATCH.replace("--beta 0.1", "--beta 0.001"), ""),
        ("joint x 1, held by nothing", "--lambda_ref 0", "")]),
    "F5": ("Fig. 5: masking loss", [
        ("x 1, with it", "", ""), ("x 1, without", "--lambda_mask 0", ""),
        ("x 0.01, with it", "--vae_lr_ratio 0.01", ""),
        ("x 0.01, without", "--vae_lr_ratio 0.01 --lambda_mask 0", "")]),
    "F6": ("Fig. 6: block length", [
        (str(n), f"--block_len {n}" if n != 16 else "", "") for n in (1, 16, 64, 128)]),
    "F7": ("Fig. 7, 8: law of the times", [
        *((f"loc {loc}", f"--text_loc {loc}" if loc != 1 else "", "") for loc in (-1, 0, 1, 2)),
        ("uniform", "--time_law uniform", "")]),
    "F9": ("Fig. 9: steps and guidance", [
        *((f"{n} steps", "", f"--sample_steps {n}" if n != 16 else "") for n in (1, 2, 4, 8, 16, 32)),
        *((f"guidance {w}", "", f"--text_guidance {w}" if w != 1 else "") for w in (0, 1, 2, 3, 5, 7, 10))]),
    "2": ("Table 2: channels of a latent, all from scratch, loc 1", [
        (str(dz), f"{SCRATCH} --text_latent_dim {dz}" if dz != 16 else SCRATCH, "") for dz in (16, 64, 128)]),
    "T3": ("Table 3: logSNR of the latents", [
        *((x, f"--vae_logsnr {x}", "") for x in ("1.0", "1.5", "2.0")), ("learned", "", "")]),
    "6": ("Table 6: patch size, 128 channels, loc 1", [
        (str(p), f"--text_latent_dim 128 --text_patch {p}", "") for p in (1, 2, 4)]),
    "R": ("Prompts by what their length leaves over, 8,192 or more each", [
        (f"patch {p}", f"--text_latent_dim 128 --text_patch {p}", f"--eval_samples {4096 * p}") for p in (2, 4)]),
}


def folder(out: Path, flags: str, evaluated: str, seed: int) -> Path:
    """Where the run of these flags is, or will be."""
    words = "_".join(f"{flags} {evaluated}".replace("--", "").split()) or "base"
    return out / f"{words}_s{seed}"


def run(out: Path, flags: str, evaluated: str, seed: int, scale: float, samples: int) -> None:
    """Train, or evaluate a copy of what was trained; whatever is finished already stays."""
    place = folder(out, flags, evaluated, seed)
    if (place / "metrics.json").exists():
        return
    command = [sys.executable, str(ROOT / "train.py"), *BASE.split(), "--seed", str(seed), "--scale", str(scale),
               "--eval_samples", str(samples), "--out_dir", str(place), *flags.split(), *evaluated.split()]
    if evaluated:
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder(out, flags, "", seed) / "ckpt.pt", place)
        command.append("--eval_only")
    else:
        command += ["--resume", "auto"]
    place.mkdir(parents=True, exist_ok=True)
    with open(place / "log.txt", "a") as log:
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT,
                              env=os.environ | {"OMP_NUM_THREADS": "1"})
    print(f"{place.name}: exit status {done.returncode}", flush=True)


def rate(metrics: list[dict], path: str) -> tuple[str, float]:
    """The pooled rate of some seeds with its interval, for a row of Markdown; and the number."""
    values = []
    for m in metrics:
        for key in path.split("."):
            m = m.get(key, {})
        values += [m] if isinstance(m, float) else []
    if not values:
        return "-", 0.0
    mean = sum(values) / len(values)
    low, high = wilson(mean, len(values) * metrics[0]["n"])
    return f"{mean:.3f} [{low:.3f}, {high:.3f}] ({', '.join(f'{v:.3f}' for v in values)})", mean


def residues(metrics: list[dict]) -> str:
    """Rates by what the prefix has left over, seen and held-out, and the 95 % interval of the best minus the worst."""
    told = [(m[split]["t2t"], m["n"]) for m in metrics for split in ("seen", "heldout")]
    counts = {r: sum(t["share_of_residue"][r] * n for t, n in told) for r in told[0][0]["share_of_residue"]}
    rates = {r: sum(t["by_residue"].get(r, 0) * t["share_of_residue"][r] * n for t, n in told) / max(count, 1)
             for r, count in counts.items()}
    best, worst = max(rates, key=rates.get), min(rates, key=rates.get)
    spread = 1.96 * sum(rates[r] * (1 - rates[r]) / max(counts[r], 1) for r in (best, worst)) ** 0.5
    gap = rates[best] - rates[worst]
    return (", ".join(f"{r}: {rates[r]:.3f} (n = {counts[r]:.0f})" for r in sorted(rates))
            + f"; best - worst {gap:.3f} [{gap - spread:.3f}, {gap + spread:.3f}]")


def show(out: Path, tables: list[str], seeds: list[int]) -> None:
    for key in tables:
        title, rows = TABLES[key]
        print(f"\n**{title}**\n\n| | t2t consistent [95 %] (each seed) | held-out | ceiling.text | minutes |\n"
              "|---|---|---|---|---|")
        for name, flags, evaluated in rows:
            files = [folder(out, flags, evaluated, seed) / "metrics.json" for seed in seeds]
            metrics = [json.loads(f.read_text()) for f in files if f.exists()]
            if metrics:
                minutes = ", ".join(f"{m['seconds'] / 60:.1f}" for m in metrics)
                cells = [rate(metrics, path)[0] for path in ("seen.t2t.consistent", "heldout.t2t.consistent")]
                ceiling = rate(metrics, "ceiling.text")[1]
                print(f"| {name} | {cells[0]} | {cells[1]} | {ceiling:.3f} | {minutes} |")
                if "by_residue" in metrics[0]["seen"]["t2t"]:
                    print(f"| by residue of the prefix | {residues(metrics)} | | | |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--tables", nargs="+", default=list(TABLES), choices=TABLES, help="which of the tables")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="a run of each")
    parser.add_argument("--scale", type=float, default=1.0, help="of the steps")
    parser.add_argument("--samples", type=int, default=512, help="judged for a rate")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--show", action="store_true", help="only print")
    args = parser.parse_args()
    if not args.show:
        wanted = [(flags, evaluated, seed) for seed in args.seeds for key in args.tables
                  for _, flags, evaluated in TABLES[key][1]]
        wanted = list(dict.fromkeys(wanted))
        trained = list(dict.fromkeys((flags, "", seed) for flags, _, seed in wanted))
        for jobs in (trained, [w for w in wanted if w[1]]):        # evaluations need what was trained
            with ThreadPoolExecutor(args.jobs) as pool:
                list(pool.map(lambda job: run(args.out, *job, args.scale, args.samples), jobs))
    show(args.out, args.tables, args.seeds)


if __name__ == "__main__":
    main()
