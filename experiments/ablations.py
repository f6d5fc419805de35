"""Ablations: the paper's tables and figures on generated stories; one setting at a time.

Trains and evaluates what is missing in the folder --out, then prints the tables in Markdown.

    python -m experiments.ablations --out DIR --jobs 2       39 runs for each seed: hours on a CPU
    python -m experiments.ablations --out DIR --tables 5 6 --seeds 0 1 2
    python -m experiments.ablations --out DIR --show         only prints what is there

The paper's ablations share a baseline of the paper's setting at the size of a CPU: stories alone,
blocks of 16 latents of 16 channels, loc 1. The text VAE trains on at the prior's rate and is held
to its start by lambda_ref, because its latents collapse otherwise. From scratch there is no start
to hold to, so beta keeps the latents apart: beta = 1.6 / channels, which has the same weight
relative to L_FM (a mean over channels) at every width. Stories are sampled as in the paper:
temperature 1, no snapping, an even time grid; but guidance 1. Table "D" changes one setting at a
time for all tasks: 1,000 steps of 60 samples, half the default's steps of the image VAE, fp32, one
dual layer, fewer stories; images sampled at temperature 1, texts at 0.3 with shift 3, both in 8
steps. All runs average their weights (--ema 0.9999).

A rate is the mean over seen and held-out compositions and over the seeds, with Wilson's 95 %
interval of all samples. Training itself varies more: the last line says by how much two rows must
differ. The paper's numbers are percentages on its own benchmarks: compare the order of the rows.
"""
from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from evaluate import NO_INTERVAL, wilson

ROOT = Path(__file__).resolve().parents[1]
# Of each baseline: the flags of training, and the flags of sampling.
BASES = {
    "stories": ("--tasks t2t:1 --batch_size 24 --micro_steps 1 --steps 1000 --bf16 off "
                "--muon_lr 0.02 --block_len 16 --w_filler 1 --text_loc 1 --vae_lr_ratio 1 "
                "--lambda_ref 0.01 --vae_logsnr learned --cfg_drop_text 0.1 --ema 0.9999",
                "--procs 1 --text_steps 16 --text_temperature 1 --no-text_snap --text_shift 1 "
                "--text_guidance 1"),
    "tasks": ("--batch_size 10 --steps 1000 --image_vae_steps 600 --bf16 off --muon_lr 0.02 "
              "--ema 0.9999 --dual_layers 1 --tasks t2t:3,t2i:4,it2t:5 --questions 0.75",
              "--procs 1 --image_temperature 1 --image_steps 8 --text_steps 8 --text_shift 3 "
              "--text_temperature 0.3"),
}
SCRATCH = "--text_vae_steps 0 --lambda_ref 0 --beta"


# ---- The tables --------------------------------------------------------------------------------

class Row(NamedTuple):
    name: str
    train: str = ""                        # flags of training that differ from the baseline's
    sample: str = ""                       # flags of sampling that differ from the baseline's
    paper: str = ""                        # the paper's number


class Table(NamedTuple):
    title: str
    rows: list[Row]
    paper: str = ""                        # what a figure of the paper shows
    base: str = "stories"
    rates: tuple[str, ...] = ("t2t.consistent", "t2t.sentence", "t2t.length")


TABLES = {
    "5": Table("Table 5: first block", [
        Row("clean", paper="24.6"), Row("left padding", "--first_block left", paper="16.0"),
        Row("right padding", "--first_block right", paper="16.7"),
        Row("clean, frozen", "--vae_lr_ratio 0"),
        Row("left padding, frozen", "--first_block left --vae_lr_ratio 0"),
        Row("right padding, frozen", "--first_block right --vae_lr_ratio 0"),
        *(Row(f"repaint, cycles {n}, m = {m}", "--first_block repaint",
              f"--repaint_share {m} --repaint_cycles {n}", "7.5 to 9.3")
          for n in (1, 3) for m in (1.0, 0.7, 0.3))]),
    "3": Table("Fig. 3, 16: fixed and evolving latents", [
        Row("frozen", "--vae_lr_ratio 0"), Row("joint x 0.01", "--vae_lr_ratio 0.01"),
        Row("joint x 0.01, lambda_ref 0", "--vae_lr_ratio 0.01 --lambda_ref 0"),
        Row("joint x 1"), Row("joint x 1, lambda_ref 0", "--lambda_ref 0"),
        Row("interval, 40 on and 60 off", "--vae_interval 40 60"),
        Row("all from scratch", f"{SCRATCH} 0.1"),
        Row("all from scratch, beta 0.001", f"{SCRATCH} 0.001")],
        "joint x 1 is best in the long run, from scratch far behind"),
    "F5": Table("Fig. 5: masking loss, in both stages", [
        Row("x 1, with it"), Row("x 1, without", "--lambda_mask 0"),
        Row("x 0.01, with it", "--vae_lr_ratio 0.01"),
        Row("x 0.01, without", "--vae_lr_ratio 0.01 --lambda_mask 0")],
        "little at x 0.01, a clear gain at x 1"),
    "F6": Table("Fig. 6: block length", [
        *(Row(f"{n}", f"--block_len {n}" if n != 16 else "") for n in (1, 16, 64, 128))],
        "16 is best, then 1; 64 and 128 are worse"),
    "F7": Table("Fig. 7, 8: law of the times", [
        *(Row(f"loc {x}", f"--text_loc {x}" if x != 1 else "") for x in (-1, 0, 1, 2)),
        Row("uniform", "--time_law uniform")], "loc 1 is best"),
    "F9": Table("Fig. 9: steps and guidance; the first block has no context to be guided by", [
        *(Row(f"{n} steps", sample=f"--text_steps {n}") for n in (1, 2, 4, 8, 16, 32)),
        *(Row(f"guidance {w}", sample=f"--text_guidance {w}") for w in (0, 1, 2, 3, 5, 7, 10)),
        Row("temperature 0.3", sample="--text_temperature 0.3"),
        Row("snapping", sample="--text_snap"), Row("shift 3", sample="--text_shift 3"),
        Row("all three", sample="--text_temperature 0.3 --text_snap --text_shift 3")],
        "flat from 16 steps on; guidance is best at 3 to 6"),
    "2": Table("Table 2: channels of a latent, all from scratch", [
        Row("16", f"{SCRATCH} 0.1", paper="8.7"),
        Row("64", f"{SCRATCH} 0.025 --text_latent_dim 64", paper="11.3"),
        Row("128", f"{SCRATCH} 0.0125 --text_latent_dim 128", paper="11.8")]),
    "T3": Table("Table 3: logSNR of the latents", [
        *(Row(x, f"--vae_logsnr {x}", paper=number)
          for x, number in (("1.0", "18.8"), ("1.5", "21.8"), ("2.0", "20.6"))),
        Row("learned", paper="22.1")]),
    "6": Table("Table 6: patch size, 128 channels, frozen, twice the steps of stage 1", [
        Row(f"{p}", f"--vae_lr_ratio 0 --text_latent_dim 128 --text_patch {p} --text_vae_steps 400",
            paper=number) for p, number in ((1, "17.31; odd lengths 14.41"),
                                            (2, "18.12; odd lengths 0.26"), (4, ""))]),
    "D": Table("All tasks, and one setting at a time", [
        Row("1 dual layer of 4", paper="a third of the layers"),
        *(Row(f"{n} dual layers", f"--dual_layers {n}") for n in (0, 2, 4)),
        *(Row(f"blocks of 16, filler {w}", f"--block_len 16 --w_filler {w}", paper="16")
          for w in (0.2, 1)),
        Row("blocks of 16, filler 0.3, loc 2", "--block_len 16 --w_filler 0.3 --text_loc 2"),
        *(Row(f"blocks of 16, filler 0.2, temperature {x}", "--block_len 16 --w_filler 0.2",
              f"--text_temperature {x}") for x in (0, 1)),
        Row("L_REPA, features", "--w_repa 0.5 --repa_features FEATURES", paper="optional"),
        Row("posterior samples of images", "--image_posterior sample", paper="samples"),
        Row("no averaged weights", sample="--ema 0", paper="none"),
        Row("no snapping", sample="--no-text_snap", paper="none"),
        Row("temperature 1", sample="--text_temperature 1", paper="1"),
        Row("even time grid", sample="--text_shift 1", paper="even")], base="tasks",
        rates=("t2i.scene", "it2t.exact", "it2t.vqa", "t2t.consistent", "t2t.sentence",
               "t2t.length")),
}


# ---- Runs --------------------------------------------------------------------------------------

class Job(NamedTuple):
    """A run of train.py or, if it has flags of sampling, of evaluate.py on what was trained."""
    base: str
    train: str
    sample: str
    seed: int

    def folder(self, out: Path) -> Path:
        words = f"{self.base} {self.train} {self.sample}".replace("--", "").split()
        return out / "_".join([*words, f"s{self.seed}"])


def call(program: str, folder: Path, flags: list[str], more: tuple[str, ...] = ()) -> int:
    """Runs a program with these flags in a folder until it has written metrics.json. Returns its
    exit status. ValueError if the folder has a run of other flags; `more` may differ."""
    folder.mkdir(parents=True, exist_ok=True)
    flags_file = folder / "flags.txt"
    if flags_file.exists() and flags_file.read_text() != " ".join(flags):
        raise ValueError(f"{folder} is a run of other flags; name another --out")
    if flags_file.exists() and (folder / "metrics.json").exists():
        return 0
    flags_file.write_text(" ".join(flags))
    command = [sys.executable, str(ROOT / program), *flags, *more, "--out_dir", str(folder)]
    with open(folder / "log.txt", "a") as log:
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT,
                              env=os.environ | {"OMP_NUM_THREADS": "1"})
    print(f"{folder.name}: exit status {done.returncode}", flush=True)
    return done.returncode


def run(job: Job, out: Path, scale: float, samples: int) -> int:
    """Trains, or evaluates a copy of what was trained. Returns the exit status."""
    train, sample = BASES[job.base]
    features = str(out.resolve() / f"features_{job.seed}.npy")
    if "FEATURES" in job.train and not Path(features).exists():
        command = [sys.executable, "-m", "experiments.features", features, "--seed", str(job.seed)]
        if subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode:
            return 1
    sample = [*sample.split(), *job.sample.split(), "--eval_samples", str(samples)]
    if not job.sample:
        own = [features if word == "FEATURES" else word for word in job.train.split()]
        train = [*train.split(), *own, "--seed", str(job.seed), "--scale", str(scale)]
        return call("train.py", job.folder(out), train + sample, ("--resume", "auto"))
    source, target = job._replace(sample="").folder(out) / "ckpt.pt", job.folder(out) / "ckpt.pt"
    if not source.exists():
        return 1                           # its training has failed
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
    return call("evaluate.py", job.folder(out), sample)


# ---- Printing ----------------------------------------------------------------------------------

def pooled(metrics: dict, name: str) -> float | None:
    """A rate such as "t2i.scene": the mean of seen and held-out compositions. None if it is
    missing, as that of sentences is where no story says any."""
    task, name = name.split(".")
    rates = [metrics[split][task].get(name) for split in ("seen", "heldout")]
    return None if None in rates else sum(rates) / 2


def show(out: Path, keys: list[str], seeds: list[int]) -> None:
    """Prints the tables of what is there."""
    by_recipe: dict[str, list[float]] = {}                     # the rates of each seed
    for key in keys:
        table = TABLES[key]
        print(f"\n**{table.title}**" + f" (paper: {table.paper})" * bool(table.paper) + "\n")
        print("| | " + " | ".join(table.rates) + " | paper |")
        print("|---" * (len(table.rates) + 2) + "|")
        for row in table.rows:
            paths = [Job(table.base, row.train, row.sample, seed).folder(out) / "metrics.json"
                     for seed in seeds]
            found = [json.loads(path.read_text()) for path in paths if path.exists()]
            if not found:
                continue
            cells = []
            for name in table.rates:
                rates = [rate for metrics in found if (rate := pooled(metrics, name)) is not None]
                mean = statistics.fmean(rates) if rates else math.nan
                n = sum(metrics["samples"].get(f"{split}.{name}", 0) for metrics in found
                        for split in ("seen", "heldout"))
                cells.append(f"{mean:.3f}")
                if name in NO_INTERVAL or not n:
                    continue
                cells[-1] += " [{:.3f}, {:.3f}]".format(*wilson(mean, n))
                if not row.sample and len(rates) > 1 and 0.1 < mean < 0.95:
                    by_recipe[f"{table.base} {row.train} {name}"] = rates
            print(f"| {row.name} | {' | '.join(cells)} | {row.paper} |")
    freedom = sum(len(rates) - 1 for rates in by_recipe.values())
    if freedom >= 10:                      # then Student's t is about 2.2
        squares = sum(statistics.variance(x) * (len(x) - 1) for x in by_recipe.values())
        deviation, seeds_each = (squares / freedom) ** 0.5, min(map(len, by_recipe.values()))
        print(f"\nSeeds of one row have a standard deviation of {deviation:.3f} ({freedom} degrees "
              f"of freedom): rows that differ by less than "
              f"{2.2 * deviation * (2 / seeds_each) ** 0.5:.3f} may differ by chance.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--tables", nargs="+", default=list(TABLES), choices=TABLES, metavar="KEY",
                        help=f"of {' '.join(TABLES)} (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="a run of each")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the steps")
    parser.add_argument("--samples", type=int, default=512, help="judged for each rate and split")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--show", action="store_true", help="only print")
    args = parser.parse_args()
    failed = 0
    if not args.show:
        jobs = [Job(TABLES[key].base, row.train, row.sample, seed)
                for seed in args.seeds for key in args.tables for row in TABLES[key].rows]
        trained = dict.fromkeys(job._replace(sample="") for job in jobs)
        evaluated = dict.fromkeys(job for job in jobs if job.sample)
        try:
            with ThreadPoolExecutor(args.jobs) as pool:
                for batch in (trained, evaluated):             # evaluations need what was trained
                    failed += sum(map(bool, pool.map(
                        lambda job: run(job, args.out, args.scale, args.samples), batch)))
        except (ValueError, OSError) as error:
            parser.error(str(error))
    show(args.out, args.tables, args.seeds)
    if failed:
        sys.exit(f"{failed} runs failed; see log.txt in their folders")


if __name__ == "__main__":
    main()
