"""Load: 100,000 pictures in tar shards and 1 GB of text; memory stays flat, and a shard that goes away is an error.

    python tests/load.py            (CPU, two cores, 15 minutes; 2 GB of disk in TMPDIR, 4 GB of memory)

A small model is trained for two and a half epochs of the pictures while the memory of all its processes is
watched: after the first epoch, in which latents are kept, it must not grow by 200 MB. Then the default model takes
some steps on the same data, and the share of its time that went into making batches is told. Last, shards are
removed under a run.
"""
from __future__ import annotations

import argparse
import io
import json
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import data
from conftest import TINY

SIZE, STEP = 64, 120                   # pixels a side; samples a step


def write_data(folder: Path, pictures: int, text_bytes: int) -> None:
    """100 shards of pictures with captions, and one text."""
    world = data.GeneratedScenes(0, SIZE, 1000)
    files = []
    for pixels in world.images(range(1000)):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        files.append(file.getvalue())
    (folder / "shards").mkdir()
    for shard in range(100):
        with tarfile.open(folder / "shards" / f"{shard:03d}.tar", "w") as tar:
            for number in range(shard * pictures // 100, (shard + 1) * pictures // 100):
                caption = f"picture {number}: {world.t2i(number)[0]}".encode()
                for ending, raw in (("png", files[number % 1000]), ("txt", caption)):
                    member = tarfile.TarInfo(f"{number}.{ending}")
                    member.size = len(raw)
                    tar.addfile(member, io.BytesIO(raw))
    with open(folder / "text.txt", "w") as file:
        while file.tell() < text_bytes:
            file.write("\n".join(world.t2t(k) for k in range(2000)) + "\n\n")


def start(folder: Path, out: Path, flags: list[str]) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "train.py"), *flags, "--data", str(folder / "shards"), "--text",
               str(folder / "text.txt"), "--save_every", "1000000", "--eval_samples", "0", "--procs", "2",
               "--out_dir", str(out)]
    with open(folder / "errors.txt", "w") as errors:
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)


def said(folder: Path) -> str:
    """The last that train.py had to say for itself."""
    return "".join(["train.py: ", *(folder / "errors.txt").read_text().rpartition("train.py: ")[2].splitlines()[:1]])


def resident(pid: int) -> int:
    """Bytes of memory of a process and its descendants that are theirs (anonymous)."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:                            # it has just ended
        return 0
    own = sum(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
    return own + sum(resident(int(child)) for child in children)


def steps_of(out: Path) -> list[dict]:
    """What the log says of stage 2 so far; its last line may be half written."""
    path = out / "log.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [entry for entry in map(json.loads, filter(None, lines)) if entry["stage"] == "mmdit"]


def watch(run: subprocess.Popen, out: Path) -> list[tuple[int, int]]:
    """(steps done, bytes) once in two seconds until the run ends. RuntimeError where it failed."""
    seen = []
    while run.poll() is None:
        seen.append((len(steps_of(out)), resident(run.pid)))
        time.sleep(2)
    if run.returncode:
        raise RuntimeError(said(out.parent))
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--pictures", type=int, default=100_000, help="in all shards")
    parser.add_argument("--text_bytes", type=int, default=10**9, help="of the text")
    args = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory() as name:
        folder, epoch = Path(name), -(-args.pictures // STEP)
        write_data(folder, args.pictures, args.text_bytes)

        def flags(steps: int) -> list[str]:
            return [*TINY, "--image_size", str(SIZE), "--batch_size", str(STEP // 3), "--steps", str(steps)]
        seen = watch(start(folder, folder / "small", flags(epoch * 5 // 2)), folder / "small")
        halves = [max((memory for step, memory in seen if at < 2 * step / epoch <= at + 1), default=0) / 1e6
                  for at in range(5)]
        print(f"{args.pictures} pictures, {args.text_bytes / 1e9:.2f} GB of text, 2 workers: at most "
              f"{', '.join(f'{memory:.0f}' for memory in halves)} MB in the halves of two and a half epochs (expect no "
              "200 more after the second)", flush=True)
        failed |= min(halves) == 0 or max(halves[2:]) - max(halves[:2]) > 200

        out = folder / "default"
        watch(start(folder, out, ["--text_vae_steps", "20", "--image_vae_steps", "20", "--steps", "200"]), out)
        shares = [e["data_seconds"] / e["seconds"] for e in steps_of(out)[20:]]
        print(f"default model: a step waits {statistics.median(shares):.1%} of its time for its batch, the worst of "
              f"180 {max(shares):.1%} (expect a median below 5 %)", flush=True)
        failed |= statistics.median(shares) > 0.05

        out = folder / "removed"
        run = start(folder, out, flags(10 * epoch))
        while run.poll() is None and not steps_of(out):
            time.sleep(0.2)
        for shard in sorted((folder / "shards").iterdir())[::2]:
            shard.unlink()
        began = time.monotonic()
        try:
            run.wait(timeout=120)
        except subprocess.TimeoutExpired:
            run.terminate()                    # and its workers
            run.wait()
        print(f"half of the shards removed: exit status {run.returncode} after {time.monotonic() - began:.0f} s "
              f"(expect 2): {said(folder)}")
        failed |= run.returncode != 2
    sys.exit(failed)


if __name__ == "__main__":
    main()
