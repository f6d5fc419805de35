"""Faults: kill a run that saves at every step again and again, and see that nothing is lost.

    python tests/faults.py --kills 50            (CPU, 8 minutes)

Each time the run is killed (SIGKILL) at a random moment after its start, and continued by --resume auto. There must
always be a whole checkpoint, and what comes out at the end must equal, bit for bit, what an undisturbed run made.
Then one of two workers is killed again and again, and torchrun starts both anew.
"""
from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import sample
from conftest import TINY


def started(out: Path, steps: int, joint: bool, log) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "train.py"), *TINY, "--steps", str(steps), "--save_every", "1",
               "--eval_samples", "0", "--vae_lr_ratio", str(int(joint)), "--resume", "auto", "--out_dir", str(out)]
    return subprocess.Popen(command, stdout=log, stderr=log)


def differing(a: Path, b: Path) -> list[str]:
    """Names of weights, averages and places that are not the same in two checkpoints, to the last bit."""
    one, two = (sample.read_checkpoint(path / "ckpt.pt") for path in (a, b))
    found = [f"{kind}.{part}.{name}" for kind in ("model", "ema") for part, state in one[kind].items()
             for name, value in state.items() if not torch.equal(value, two[kind][part][name])]
    return found + ["progress"] * (one["progress"] != two["progress"])


def kill_and_resume(folder: Path, kills: int, steps: int, joint: bool, seed: int = 0) -> dict[str, int]:
    """Counts: kills, checkpoints found whole after one, runs that were over before their kill, differences. joint:
    the text VAE learns on in stage 2. RuntimeError where a checkpoint is gone that was there."""
    draw, counts = random.Random(seed), dict.fromkeys(("kills", "whole", "too late", "different"), 0)
    with open(folder / "log.txt", "w") as log:
        began = time.monotonic()
        if started(folder / "calm", steps, joint, log).wait():
            raise RuntimeError(f"the undisturbed run failed; see {folder}/log.txt")
        longest, at, seen = time.monotonic() - began, folder / "killed", False
        while counts["kills"] < kills:
            run = started(at, steps, joint, log)
            try:
                run.wait(draw.uniform(0.3, 1.0) * longest)
                counts["too late"] += 1            # done: begin anew
                counts["different"] += len(differing(folder / "calm", at))
                for file in at.iterdir():
                    file.unlink()
                seen = False
            except subprocess.TimeoutExpired:
                run.kill()
                run.wait()
                counts["kills"] += 1
                if seen and not (at / "ckpt.pt").exists():
                    raise RuntimeError("the checkpoint is gone")
                if seen := (at / "ckpt.pt").exists():
                    sample.read_checkpoint(at / "ckpt.pt")         # raises if anything is missing or changed
                    counts["whole"] += 1
        if started(at, steps, joint, log).wait():
            raise RuntimeError(f"the killed run does not go on; see {folder}/log.txt")
        counts["different"] += len(differing(folder / "calm", at))
    return counts


def kill_a_worker(folder: Path, kills: int, steps: int, seed: int = 0) -> dict[str, int]:
    """Counts: kills of one of two workers under torchrun, differences from two undisturbed ones. RuntimeError where
    torchrun gives up."""
    draw, counts, places = random.Random(seed), {"kills": 0, "different": 0}, [folder / "calm", folder / "killed"]

    def torchrun(out: Path, log) -> subprocess.Popen:
        flags = [*TINY, "--steps", str(steps), "--save_every", "1", "--eval_samples", "0", "--resume", "auto"]
        return subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
             f"--max-restarts={2 * kills}", str(ROOT / "train.py"), *flags, "--out_dir", str(out)],
            stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
    with open(folder / "log.txt", "w") as log:
        if torchrun(places[0], log).wait():
            raise RuntimeError(f"the undisturbed run failed; see {folder}/log.txt")
        run, before = torchrun(places[1], log), 0
        while run.poll() is None:
            time.sleep(draw.uniform(0.1, 0.5))
            path = places[1] / "ckpt.pt"
            workers = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split() if run.poll() is None else []
            if counts["kills"] < kills and workers and path.exists() and path.stat().st_mtime_ns > before:
                before = path.stat().st_mtime_ns           # it has come on since the last time
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(draw.choice(workers)), signal.SIGKILL)
                    counts["kills"] += 1
                time.sleep(3)                              # until torchrun has begun anew
        if run.returncode:
            raise RuntimeError(f"torchrun ended with status {run.returncode}; see {folder}/log.txt")
    counts["different"] = len(differing(*places))
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="how often")
    parser.add_argument("--steps", type=int, default=40, help="of stage 2 in the run")
    args = parser.parse_args()
    different = 0
    for joint in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            counts = kill_and_resume(Path(folder), args.kills // 2, args.steps, joint)
        print("text VAE " + ("joint: " if joint else "frozen: "), end="")
        print(", ".join(f"{name} {count}" for name, count in counts.items()), "(expect different 0)", flush=True)
        different += counts["different"]
    with tempfile.TemporaryDirectory() as folder:
        wanted = max(1, args.kills // 10)
        counts = kill_a_worker(Path(folder), wanted, 5 * args.steps)
    print(f"one of two workers: kills {counts['kills']}, different {counts['different']} (expect {wanted}, 0)")
    sys.exit(different + counts["different"] > 0 or counts["kills"] < wanted)


if __name__ == "__main__":
    main()
