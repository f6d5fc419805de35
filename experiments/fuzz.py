"""Fuzz: a damaged file is read, or refused with a ValueError or OSError of one line; nothing else.

An input is a valid file with one to four changes: bytes are cut out, repeated, inserted or
overwritten, a bit of each is flipped, or a number is replaced; one input in ten is also truncated.
Any other exception, a message of several lines, or more than 5 seconds is a failure, and is
printed; so is a reader that needs more than 3 GB of memory.

Run: python -m experiments.fuzz --inputs 10000     of each reader (CPU, 20 minutes)
"""

import argparse
import contextlib
import gzip
import io
import random
import re
import resource
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

import cola
import data
import release
import train
from tests.conftest import TINY


def read_pictures(path: Path) -> None:
    """Decode all captioned pictures of a folder or a tar."""
    dataset = data.ImageText([str(path)])
    dataset.images(range(dataset.num_images))


def readers(folder: Path) -> dict[Path, Callable[[Path], object]]:
    """Write a valid file of each kind -> its path and its reader."""
    images, run = folder / "images", folder / "run"
    images.mkdir()
    Image.linear_gradient("L").resize((16, 16)).save(images / "a.png")
    (images / "metadata.jsonl").write_text(3 * '{"file_name": "a.png", "text": "a red circle"}\n')
    picture = (images / "a.png").read_bytes()
    with tarfile.open(folder / "x.tar", "w") as tar:
        for name, content in {"a.png": picture, "a.txt": b"a red circle",
                              "b.png": picture, "b.json": b'{"caption": "two"}'}.items():
            member = tarfile.TarInfo(name)                 # has no time: inputs can be made again
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    text = b"a red circle. " * 40 + b"<|endoftext|>" + b"two words"
    (folder / "x.txt.gz").write_bytes(gzip.compress(text, mtime=0))
    release.write_safetensors(folder / "x.safetensors", {"a": torch.ones(3, 4), "b": torch.ones(2)})
    release.write_tokenizer(folder / "x.json", cola.Tokenizer.train(["a bc bc"], 259))
    with contextlib.redirect_stdout(io.StringIO()):
        train.main([*TINY, "--out_dir", str(run)])
    return {images / "a.png": lambda path: data.decode_picture(open(path, "rb"), [(32, 32)]),
            images / "metadata.jsonl": lambda path: read_pictures(images),
            folder / "x.tar": read_pictures,
            folder / "x.txt.gz": lambda path: data.TextFiles([str(path)]).t2t(1),
            folder / "x.safetensors": release.read_safetensors,
            folder / "x.json": release.read_tokenizer,
            run / "ckpt.pt": cola.load}


def damaged(x: bytes, rng: random.Random) -> bytes:
    """The bytes of a file with one to four random changes."""
    for _ in range(rng.randint(1, 4)):
        start, size = rng.randrange(len(x) + 1), rng.choice((1, 1, 2, 8, 100))
        end = start + size
        old = x[start:end]
        junk = rng.choice((rng.randbytes(size), size * b"\xff", size * b"\0", size * b"["))
        flipped = bytes(byte ^ 1 << rng.randrange(8) for byte in old)
        new = rng.choice((b"", 2 * old, flipped, junk, junk + old))
        numbers = list(re.finditer(rb"\d+", x[:5000]))
        if numbers and rng.random() < 0.2:
            start, end = rng.choice(numbers).span()
            new = rng.choice((b"99999999999999999999", b"-1", b"1e999", b"0"))
        x = x[:start] + new + x[end:]
    return x[:rng.randrange(len(x) + 1)] if rng.random() < 0.1 else x


def fuzz(path: Path, read: Callable[[Path], object], inputs: int) -> int:
    """Read a valid file, then damaged ones -> the number of failures."""
    rng, valid, failures, refused = random.Random(path.name), path.read_bytes(), [], 0
    read(path)
    for number in range(inputs):
        path.write_bytes(damaged(valid, rng))
        began, error = time.monotonic(), None
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                read(path)
        except Exception as found:
            error = found
        seconds = time.monotonic() - began
        refused += error is not None
        is_clean = isinstance(error, (ValueError, OSError, type(None))) and "\n" not in str(error)
        if not is_clean or seconds > 5:
            failures.append(f"input {number}: {error!r:.200}, {seconds:.1f} s")
    path.write_bytes(valid)                             # the next reader may use this file, too
    print(f"{path.name}: {inputs} inputs, {refused} refused, {len(failures)} failures (expect 0)",
          *failures[:5], sep="\n    ", flush=True)
    return len(failures)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("fuzz.py", description=__doc__.split("\n")[0])
    parser.add_argument("--inputs", type=int, default=10000, help="of each reader")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        found = readers(Path(name))
        # torch alone reserves many GB of addresses, so the limit is on what is added from here on.
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (3 << 30), resource.RLIM_INFINITY))
        failures = sum(fuzz(path, read, args.inputs) for path, read in found.items())
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
