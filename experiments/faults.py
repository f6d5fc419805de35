"""Faults: kill runs, fill their disk, damage their checkpoint; nothing may be lost.

    python -m experiments.faults --kills 50            (CPU, 10 minutes)

A tiny run saves after every step. It is

    killed (SIGKILL) again and again at a random moment, and resumed
    one of two workers of torchrun, killed again and again; torchrun restarts both
    stopped by a disk on which its checkpoints no longer fit, and resumed on a larger one
    resumed from a checkpoint that has lost its second half

There must be a whole checkpoint at every moment after the first one, and the weights, the averages
and the progress at the end must equal those of an undisturbed run bit for bit.
"""
from __future__ import annotations

import argparse
import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TextIO

import torch

import cola

ROOT = Path(__file__).resolve().parents[1]
TRAIN = str(ROOT / "train.py")
SMALL = ("--text_vae_width 24 --text_vae_heads 2 --text_vae_layers 1 --text_vae_steps 3 "
         "--text_vae_batch 8 --image_vae_width 16 --image_vae_steps 3 --image_vae_batch 8 "
         "--width 32 --heads 2 --layers 2 --block_len 4 --batch_size 4 --micro_steps 3 --pool 64 "
         "--procs 1 --device cpu --vocab_size 300 --bf16 off --muon_lr 0.002 --eval_samples 0 "
         "--save_every 1 --resume auto --ema 0.9999").split()


def start(out: Path, steps: int, log: TextIO, *flags: str, launcher: tuple[str, ...] = (),
          file_size: int = resource.RLIM_INFINITY) -> subprocess.Popen:
    """Starts or resumes a run. file_size: bytes that a file may have, as on a disk that is full."""
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, resource.RLIM_INFINITY))
    command = [sys.executable, *launcher, TRAIN, *SMALL, "--steps", str(steps), *flags,
               "--out_dir", str(out)]
    return subprocess.Popen(command, stdout=log, stderr=log, preexec_fn=limit,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})


def finish(out: Path, steps: int, log: TextIO, *flags: str, **options) -> None:
    """Runs to the end. RuntimeError if the run fails."""
    if status := start(out, steps, log, *flags, **options).wait():
        raise RuntimeError(f"the run in {out} ended with status {status}; see {log.name}")


def differences(a: Path, b: Path) -> int:
    """How many tensors, and the progress, differ between the checkpoints of two runs."""
    one, two = (cola.read(folder / "ckpt.pt") for folder in (a, b))
    pairs = [(x, two[kind][name]) for kind in ("model", "ema") for name, x in one[kind].items()]
    return sum(not torch.equal(x, y) for x, y in pairs) + (one["progress"] != two["progress"])


# ---- Processes ---------------------------------------------------------------------------------

def kill_and_resume(folder: Path, kills: int, steps: int, joint: bool, seed: int = 0
                    ) -> dict[str, int]:
    """Counts of kills, of whole checkpoints found after them, and of differences at the end.

    joint: the text VAE trains in stage 2 as well. RuntimeError if a checkpoint disappears."""
    draw, counts = random.Random(seed), dict.fromkeys(("kills", "whole", "different"), 0)
    calm, killed, flags = folder / "calm", folder / "killed", ("--vae_lr_ratio", str(int(joint)))
    with open(folder / "log.txt", "w") as log:
        began = time.monotonic()
        finish(calm, steps, log, *flags)
        longest, seen = time.monotonic() - began, False
        while counts["kills"] < kills:
            run = start(killed, steps, log, *flags)
            try:
                run.wait(draw.uniform(0.3, 1.0) * longest)
                if run.returncode:
                    raise RuntimeError(f"a killed run cannot be resumed; see {log.name}")
                counts["different"] += differences(calm, killed)
                shutil.rmtree(killed)                          # it is done: begin again
                seen = False
            except subprocess.TimeoutExpired:
                run.kill()
                run.wait()
                counts["kills"] += 1
                exists = (killed / "ckpt.pt").exists()
                if seen and not exists:
                    raise RuntimeError("the checkpoint has disappeared") from None
                if seen := exists:
                    cola.read(killed / "ckpt.pt")              # ValueError if it is not whole
                    counts["whole"] += 1
        finish(killed, steps, log, *flags)
    counts["different"] += differences(calm, killed)
    return counts


def kill_a_worker(folder: Path, kills: int, steps: int, seed: int = 0) -> dict[str, int]:
    """Counts of kills of one of two workers, and of differences to two undisturbed workers.

    RuntimeError if torchrun gives up."""
    draw, counts = random.Random(seed), 0
    calm, killed = folder / "calm", folder / "killed"
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                f"--max-restarts={2 * kills}")
    with open(folder / "log.txt", "w") as log:
        finish(calm, steps, log, launcher=torchrun)
        run, path, last = start(killed, steps, log, launcher=torchrun), killed / "ckpt.pt", 0
        while run.poll() is None:
            time.sleep(draw.uniform(0.1, 0.5))
            with contextlib.suppress(OSError):                 # the run has just ended
                children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
                saved = path.stat().st_mtime_ns
                if counts < kills and children and saved > last:
                    last = saved                               # it has saved since the last kill
                    os.kill(int(draw.choice(children)), signal.SIGKILL)
                    counts += 1
                    time.sleep(3)                              # until torchrun has restarted both
        if run.returncode:
            raise RuntimeError(f"torchrun ended with status {run.returncode}; see {log.name}")
    return {"kills": counts, "different": differences(calm, killed)}


# ---- Disks -------------------------------------------------------------------------------------

def fill_the_disk(folder: Path, steps: int) -> dict[str, int]:
    """A checkpoint no longer fits: the run must end with status 2 and leave the last one whole.
    Then the run is resumed without the limit. Counts of refusals (1) and of differences."""
    calm, full = folder / "calm", folder / "full"
    with open(folder / "log.txt", "w") as log:
        finish(calm, steps, log)
        # The last checkpoint of stage 2 does not fit; those of stage 1, without averages, do.
        limit = (calm / "ckpt.pt").stat().st_size - 1
        status = start(full, steps, log, file_size=limit).wait()
        cola.read(full / "ckpt.pt")                            # ValueError if it is not whole
        left = list(full.glob("*.tmp"))
        finish(full, steps, log)
    return {"refused": int(status == 2 and not left), "different": differences(calm, full)}


def damage_the_checkpoint(folder: Path, steps: int) -> dict[str, int]:
    """The last checkpoint loses its second half: the run must go on from the one before it. Counts
    of damaged checkpoints that were noticed (1) and of differences."""
    calm, damaged = folder / "calm", folder / "damaged"
    with open(folder / "log.txt", "w") as log:
        finish(calm, steps, log)
        shutil.copytree(calm, damaged)
        path = damaged / "ckpt.pt"
        os.truncate(path, path.stat().st_size // 2)
        try:
            cola.read(path)
            noticed = 0
        except ValueError:
            noticed = 1
        finish(damaged, steps, log)
    return {"noticed": noticed, "different": differences(calm, damaged)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="of whole runs; a tenth of workers")
    parser.add_argument("--steps", type=int, default=40, help="of stage 2 in the runs")
    args = parser.parse_args()
    workers = max(1, args.kills // 10)
    half = args.kills // 2
    faults = {
        "killed, text VAE frozen": lambda at: kill_and_resume(at, half, args.steps, joint=False),
        "killed, text VAE joint": lambda at: kill_and_resume(at, half, args.steps, joint=True),
        f"one of two workers killed (expect {workers} kills)":
            lambda at: kill_a_worker(at, workers, 5 * args.steps),
        "full disk (expect refused 1)": lambda at: fill_the_disk(at, args.steps),
        "damaged checkpoint (expect noticed 1)": lambda at: damage_the_checkpoint(at, args.steps)}
    failed = 0
    for name, fault in faults.items():
        with tempfile.TemporaryDirectory() as folder:
            counts = fault(Path(folder))
        line = ", ".join(f"{what} {count}" for what, count in counts.items())
        print(f"{name}: {line} (expect different 0)", flush=True)
        failed += counts["different"] > 0 or 0 in (counts.get("refused"), counts.get("noticed"))
    sys.exit(failed)


if __name__ == "__main__":
    main()
