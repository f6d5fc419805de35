"""Load: training on 100,000 pictures in tar shards and 1 GB of text, in flat memory.

1. A small model trains for two and a half epochs of the pictures. The memory of its processes must
   not grow by 200 MB after the first epoch.
2. The default model takes 200 steps. The median step must wait less than 5 % of its time for data.
3. Half of the shards are removed during a run, which must then end with exit status 2.

Run: python -m experiments.load     (two cores, 15 minutes; 2 GB of disk in TMPDIR, 4 GB of memory)
"""

import argparse
import io
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from PIL import Image

import data
from checkpoint import read_log
from tests.conftest import TINY

SIZE = 64                     # pixels a side
STEP = 120                    # samples of a step


def write_data(folder: Path, pictures: int, text_bytes: int) -> None:
    """100 shards of captioned pictures (1000 different ones), and a text."""
    scenes, files = data.Scenes(0, (SIZE, SIZE), 1000), []
    for pixels in scenes.images(range(1000)):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        files.append(file.getvalue())
    (folder / "shards").mkdir()
    for shard in range(100):
        with tarfile.open(folder / "shards" / f"{shard:03d}.tar", "w") as tar:
            for number in range(shard * pictures // 100, (shard + 1) * pictures // 100):
                caption = f"picture {number}: {scenes.t2i(number)[0]}".encode()
                for ending, raw in (("png", files[number % 1000]), ("txt", caption)):
                    member = tarfile.TarInfo(f"{number}.{ending}")
                    member.size = len(raw)
                    tar.addfile(member, io.BytesIO(raw))
    with open(folder / "text.txt", "w") as file:
        while file.tell() < text_bytes:
            file.write("\n".join(scenes.t2t(k) for k in range(2000)) + "\n\n")


def start(out: Path, *flags: str) -> subprocess.Popen:
    """Begin a run on the data in the folder above `out`; its errors go to OUT.txt."""
    folder = out.parent
    command = [sys.executable, "train.py", *flags, "--data", str(folder / "shards"),
               "--text", str(folder / "text.txt"), "--save_every", "1000000",
               "--eval_samples", "0", "--procs", "2", "--device", "cpu", "--out_dir", str(out)]
    with open(f"{out}.txt", "w") as errors:
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors,
                                cwd=Path(data.__file__).parent)


def steps_of(out: Path) -> list[dict]:
    """The logged steps of stage 2 so far."""
    path = out / "log.jsonl"
    return [e for e in read_log(path) if e["stage"] == "mmdit"] if path.exists() else []


def memory_of(pid: int) -> int:
    """Bytes of anonymous memory of a process and its descendants (mapped files do not count)."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:                                      # it has just ended
        return 0
    own = sum(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
    return own + sum(memory_of(int(child)) for child in children)


def watch(run: subprocess.Popen, out: Path) -> list[tuple[int, int]]:
    """(steps done, bytes), every two seconds until a run ends. RuntimeError if it failed."""
    seen = []
    while run.poll() is None:
        seen.append((len(steps_of(out)), memory_of(run.pid)))
        time.sleep(2)
    if run.returncode:
        raise RuntimeError(Path(f"{out}.txt").read_text()[-500:])
    return seen


def main() -> int:
    parser = argparse.ArgumentParser("load.py", description=__doc__.split("\n")[0])
    parser.add_argument("--pictures", type=int, default=100_000, help="in all shards")
    parser.add_argument("--text_bytes", type=int, default=10**9, help="of the text")
    args = parser.parse_args()
    epoch = -(-args.pictures // STEP)                    # steps
    small = [*TINY, "--image_size", str(SIZE), "--batch_size", str(STEP // 3), "--steps"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder, args.pictures, args.text_bytes)

        out = folder / "small"
        seen = watch(start(out, *small, str(epoch * 5 // 2)), out)
        halves = [max((memory / 1e6 for step, memory in seen if 2 * step // epoch == half),
                      default=0) for half in range(5)]
        flat = min(halves) > 0 and max(halves[2:]) - max(halves[:2]) < 200
        print("largest memory in each half of an epoch (expect no 200 MB more after the second):",
              *(f"{memory:.0f} MB" for memory in halves), flush=True)

        out = folder / "default"
        steps = ("--text_vae_steps", "20", "--image_vae_steps", "20", "--steps", "200")
        watch(start(out, *steps), out)
        waits = [e["data_seconds"] / e["seconds"] for e in steps_of(out)[20:]]
        fast = statistics.median(waits) < 0.05
        print(f"default model: the median step waits {statistics.median(waits):.1%} of its time "
              f"for data (expect less than 5 %), the slowest {max(waits):.1%}", flush=True)

        out = folder / "removed"
        run = start(out, *small, str(10 * epoch))
        while run.poll() is None and not steps_of(out):
            time.sleep(0.2)
        for shard in sorted((folder / "shards").iterdir())[::2]:
            shard.unlink()
        began = time.monotonic()
        try:
            run.wait(timeout=120)
        except subprocess.TimeoutExpired:
            run.terminate()                              # and its workers
            run.wait()
        print(f"half of the shards removed: exit status {run.returncode} after "
              f"{time.monotonic() - began:.0f} s (expect 2):",
              Path(f"{out}.txt").read_text().strip().split("\n")[-1])
    return int(not (flat and fast and run.returncode == 2))


if __name__ == "__main__":
    sys.exit(main())
