"""Fuzz: a damaged file is read, or refused with a ValueError or OSError of one line; nothing else.

An input is a valid file with up to four changes: a bit flipped, bytes cut out, repeated, inserted
or overwritten, a number replaced by a huge one; one in ten is also truncated. Any other exception,
a message of several lines, more than 5 seconds, or 3 GB of memory is a failure, and is printed.

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

import numpy as np
import torch
from PIL import Image

import cola
import data
import release
from image_vae import ImageVAE, ImageVAEConfig
from mmdit import MMDiT, MMDiTConfig
from text_vae import TextVAE, TextVAEConfig

# ---- Valid files and their readers -------------------------------------------------------------

def picture() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.arange(768, dtype=np.uint8).reshape(16, 16, 3)).save(file, "PNG")
    return file.getvalue()


def shard() -> bytes:
    """A tar of two pictures, the caption of one in a .txt, of the other in a .json."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in {"a.png": picture(), "a.txt": b"a red circle",
                              "b.png": picture(), "b.json": b'{"caption": "two"}'}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


def checkpoint() -> bytes:
    """A checkpoint of a small model with random weights."""
    tokenizer = cola.Tokenizer.train(["a red circle"] * 2, 260)
    model = cola.Cola(TextVAE(TextVAEConfig(tokenizer.n_vocab, 12, 24, 1, 1, 1, latent_dim=4)),
                      ImageVAE(ImageVAEConfig(4, width=8, blocks=1)),
                      MMDiT(MMDiTConfig(4, 4, 16, 1, 16, 1, emb_dim=16, rope_dim=16)),
                      tokenizer, block_len=1, image_hw=(32, 32), image_loc=1.0)
    found = {"format": cola.FORMAT, "config": model.config(), "tokenizer": tokenizer.to_dict(),
             "model": torch.nn.ModuleDict(model.parts()).state_dict(), "ema": {},
             "progress": {"mmdit": 1}}
    file = io.BytesIO()
    torch.save(found, file)
    return file.getvalue()


def read_pictures(path: Path) -> None:
    dataset = data.ImageText([str(path)], 0, 32)
    for k in range(2):
        dataset.images([dataset.t2i(k)[1]])


def readers(folder: Path) -> dict[str, tuple[Path, bytes, Callable[[Path], object]]]:
    """For each kind of file: where an input is written, a valid file, and its reader."""
    weights, tokens, images = folder / "w", folder / "t", folder / "images"
    release.write_safetensors(weights, {"a": torch.ones(3, 4), "b": torch.ones(2).half()})
    release.write_tokenizer(tokens, cola.Tokenizer.train(["a bc bc"], 259))
    images.mkdir()
    (images / "a.png").write_bytes(picture())
    row = b'{"file_name": "a.png", "text": "a red circle"}\n'
    text = gzip.compress(b"a red circle. " * 40 + b"<|endoftext|>" + b"two words", mtime=0)
    return {
        "picture": (folder / "x.png", picture(), lambda path: data.load_image(str(path), (32, 32))),
        "tar": (folder / "x.tar", shard(), read_pictures),
        "metadata.jsonl": (images / "metadata.jsonl", 3 * row, lambda path: read_pictures(images)),
        "text.gz": (folder / "x.txt.gz", text, lambda path: data.TextFiles([str(path)]).t2t(1)),
        "safetensors": (folder / "x.safetensors", weights.read_bytes(), release.read_safetensors),
        "tokenizer.json": (folder / "x.json", tokens.read_bytes(), release.read_tokenizer),
        "checkpoint": (folder / "x.pt", checkpoint(), cola.load),
    }


# ---- Damage ------------------------------------------------------------------------------------

def damaged(valid: bytes, rng: random.Random) -> bytes:
    """A file with one to four random changes."""
    x = bytearray(valid)
    for _ in range(rng.randint(1, 4)):
        at, size, kind = rng.randrange(len(x) + 1), rng.choice((1, 2, 8, 100)), rng.randrange(6)
        if kind == 0 and at < len(x):
            x[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del x[at:at + size]
        elif kind == 2:
            x[at:at] = x[at:at + size]
        elif kind == 3:
            x[at:at] = rng.randbytes(size)
        elif kind == 4:
            x[at:at + size] = rng.choice((b"\xff", b"\0", b"9", b"[", b"../", b"{")) * size
        elif numbers := list(re.finditer(rb"\d+", bytes(x[:5000]))):
            start, end = rng.choice(numbers).span()
            x[start:end] = rng.choice((b"99999999999999999999", b"-1", b"1e999", b"0"))
    return bytes(x[:rng.randrange(len(x) + 1)]) if rng.random() < 0.1 else bytes(x)


def fuzz(name: str, path: Path, valid: bytes, read: Callable[[Path], object],
         inputs: int) -> list[str]:
    """Reads a valid file, then damaged ones. Returns a line for each failure."""
    rng, failures, refused = random.Random(name), [], 0
    path.write_bytes(valid)
    read(path)
    for number in range(inputs):
        path.write_bytes(damaged(valid, rng))
        began, error = time.monotonic(), None
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                read(path)
        except BaseException as found:                  # tiktoken's panics are not Exceptions
            if isinstance(found, KeyboardInterrupt):
                raise
            error = found
        seconds = time.monotonic() - began
        refused += error is not None
        if not isinstance(error, (ValueError, OSError, type(None))) or "\n" in str(error) \
                or seconds > 5:
            failures.append(f"{name} {number}: {error!r:.200}, {seconds:.1f} s")
    print(f"{name}: {inputs} inputs, {refused} refused, {len(failures)} failures (expect 0)",
          *failures[:5], sep="\n    ", flush=True)
    return failures


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("fuzz.py", description=__doc__.split("\n")[0])
    parser.add_argument("--inputs", type=int, default=10000, help="of each reader")
    inputs = parser.parse_args(argv).inputs
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (3 << 30), resource.RLIM_INFINITY))
    with tempfile.TemporaryDirectory() as folder:
        failures = [fuzz(name, *reader, inputs) for name, reader in readers(Path(folder)).items()]
    return int(any(failures))


if __name__ == "__main__":
    sys.exit(main())
