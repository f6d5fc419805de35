"""Fuzz: damaged and forged files give a clean error, or are read; nothing else.

    python tests/fuzz.py --inputs 10000          of each reader, of resumed runs a fiftieth (CPU, 20 minutes)

Each input is a valid file with some bytes flipped, cut out, repeated or inserted, or a number in it replaced by a
huge one; or a checkpoint or configuration written anew with other values in it. A reader may return, or raise
ValueError or OSError with a message of one line. Anything else is counted as a failure and printed, as is a single
input that takes more than 5 seconds, or is stopped after 60. The process may not take more than 3 GB beyond what it
has at the start.
"""
from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import re
import resource
import signal
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import data
import sample
import text_vae
import train
from conftest import TINY


def mutated(valid: bytes, draw: random.Random) -> bytes:
    """A few random changes."""
    x = bytearray(valid)
    for _ in range(draw.randint(1, 4)):
        at, size = draw.randrange(len(x) + 1), draw.choice((1, 2, 8, 100))
        kind = draw.randrange(6)
        if kind == 0 and x:
            x[min(at, len(x) - 1)] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del x[at:at + size]
        elif kind == 2:
            x[at:at] = x[at:at + size]
        elif kind == 3:
            x[at:at] = draw.randbytes(size)
        elif kind == 4:
            x[at:at + size] = draw.choice((b"\xff", b"\0", b"9", b"[", b"../", b"{")) * size
        elif numbers := list(re.finditer(rb"\d+", bytes(x[:5000]))):
            found = draw.choice(numbers)
            x[found.start():found.end()] = draw.choice((b"99999999999999999999", b"-1", b"1e999", b"0"))
    return bytes(x[:draw.randrange(len(x) + 1)]) if draw.random() < 0.1 else bytes(x)


def forge(state: dict, draw: random.Random, tensors: tuple = ()) -> None:
    """Change some values in a nested state."""
    for _ in range(draw.randint(1, 3)):
        at = state
        while True:
            key = draw.choice(list(at) if isinstance(at, dict) else range(len(at)))
            if not isinstance(at[key], (dict, list)) or not at[key] or draw.random() < 0.1:
                break
            at = at[key]
        at[key] = draw.choice((None, -1, 0, 0.5, 10 ** 8, 10 ** 30, 1e30, "x", "", [], {}, [1, 2], {"a": 1}, True, *tensors))


def forged(valid: bytes, draw: random.Random) -> bytes:
    """A checkpoint of which some values are others: whole to the zip reader, so that they reach what builds of them."""
    state = torch.load(io.BytesIO(valid), weights_only=True)
    forge(state, draw, (torch.zeros(2), torch.zeros(2).double(), torch.zeros(1).expand(2 * 10 ** 9)))
    out = io.BytesIO()
    torch.save(state, out)
    return out.getvalue()


def forged_json(valid: bytes, draw: random.Random) -> bytes:
    state = json.loads(valid)
    forge(state, draw)
    return json.dumps(state).encode()


def picture() -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.arange(768, dtype=np.uint8).reshape(16, 16, 3)).save(out, "PNG")
    return out.getvalue()


def shard() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, content in (("a.png", picture()), ("a.txt", b"a red circle"), ("b.png", picture()),
                              ("b.json", b'{"caption": "two"}')):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def read_pictures(source: Path) -> None:
    dataset = data.ImageText([str(source)], 0, 32)
    for k in range(2):
        dataset.images([dataset.t2i(k)[1]])


def start_from(path: Path) -> None:
    """What sample.py and train.py --init_from do with a checkpoint."""
    sample.build(sample.read_checkpoint(path))
    train.prepare(train.parse(["--init_from", str(path), "--out_dir", str(path.with_name("none"))]))


def resume(path: Path) -> None:
    """What train.py --resume auto does with a checkpoint. ValueError with what it says where it refuses."""
    path.with_name("ckpt.prev.pt").unlink(missing_ok=True)
    said = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        status = train.main([*TINY, "--steps", "5", "--scale", "1", "--eval_samples", "0", "--resume", "auto",
                             "--out_dir", str(path.parent)])
    if status == 2:
        raise ValueError("\n".join(line for line in said.getvalue().splitlines() if line.startswith("train.py: ")
                                   and "warning" not in line))
    if status:
        raise RuntimeError(f"exit status {status}")


def generate(path: Path) -> None:
    """What sample.py --official does with a release."""
    sample.generate_text(sample.load_official(path.parents[1]), ["a"], s=replace(sample.RELEASED, steps=1), max_tokens=2)


def readers(folder: Path) -> dict[str, tuple[Path, bytes, Callable[[Path], object], Callable]]:
    """Of each reader a place for its input, a valid input, how it is read and how it is changed."""
    run = folder / "run"
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        if train.main([*TINY, "--eval_samples", "0", "--out_dir", str(run)]):
            raise RuntimeError("the run to fuzz failed")
        released = folder / "plain"
        train.main([*TINY, "--as_released", "--tasks", "t2t:1", "--eval_samples", "0", "--out_dir", str(released)])
        for part in ("cola_vae", "cola_dit"):
            sample.main(["export", str(folder / f"of {part}"), "--checkpoint", str(released / "ckpt.pt")])
    vae, dit = (folder / f"of {part}" / part / "config.json" for part in ("cola_vae", "cola_dit"))
    part = folder / "resumed" / "ckpt.pt"
    part.parent.mkdir()
    text_vae.write_safetensors(folder / "x.safetensors", {"a": torch.ones(3, 4), "b": torch.ones(2).half(), "c": torch.ones(0, 5)})
    data.Tokenizer.train(["a bc bc"], 259).save(folder / "tokenizer.json")
    pictures = folder / "pictures"
    pictures.mkdir()
    (pictures / "a.png").write_bytes(picture())
    table = json.dumps({"file_name": "a.png", "text": "a red circle"}).encode() + b"\n"
    return {
        "safetensors": (folder / "y.safetensors", (folder / "x.safetensors").read_bytes(), text_vae.read_safetensors,
                        mutated),
        "tokenizer.json": (folder / "z.json", (folder / "tokenizer.json").read_bytes(), data.Tokenizer.from_file,
                           mutated),
        "metadata.jsonl": (pictures / "metadata.jsonl", table * 3, lambda path: read_pictures(path.parent), mutated),
        "tar": (folder / "shard.tar", shard(), read_pictures, mutated),
        "checkpoint": (folder / "c.pt", (run / "ckpt.pt").read_bytes(), start_from, mutated),
        "checkpoint's values": (folder / "d.pt", (run / "ckpt.pt").read_bytes(), start_from, forged),
        "resumed": (part, (run / "ckpt.pt").read_bytes(), resume, forged),
        "cola_vae": (vae, vae.read_bytes(), generate, forged_json),
        "cola_dit": (dit, dit.read_bytes(), generate, forged_json),
    }


class Stopped(Exception):
    """An input that took too long."""


def stopped(number: int, frame: object) -> None:
    raise Stopped


def fuzz(name: str, place: Path, valid: bytes, read: Callable[[Path], object],
         change: Callable[[bytes, random.Random], bytes], inputs: int, seed: int = 0) -> list[str]:
    """What went wrong."""
    draw, wrong, refused = random.Random(f"{name} {seed}"), [], 0
    signal.signal(signal.SIGALRM, stopped)
    place.write_bytes(valid)
    read(place)
    for number in range(inputs):
        place.write_bytes(change(valid, draw))
        began = time.monotonic()
        signal.alarm(60)
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                read(place)
        except (ValueError, OSError) as error:
            refused += 1
            if "\n" in str(error) or len(str(error)) < 10:
                wrong.append(f"{name} {number}: message {str(error)!r}")
        except KeyboardInterrupt:
            raise
        except BaseException as error:                         # tiktoken's panics are no Exceptions
            wrong.append(f"{name} {number}: {type(error).__name__} {str(error)[:200]!r}")
        finally:
            signal.alarm(0)
        if time.monotonic() - began > 5:
            wrong.append(f"{name} {number}: {time.monotonic() - began:.1f} s")
    print(f"{name}: {inputs} inputs, {refused} refused, {len(wrong)} failures", flush=True)
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--inputs", type=int, default=10000, help="of each reader")
    parser.add_argument("--readers", nargs="+", default=[], help="only these")
    args = parser.parse_args()
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        found = readers(Path(folder))
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + (3 << 30),) * 2)
        for name, reader in found.items():
            if not args.readers or name in args.readers:
                wrong += fuzz(name, *reader, args.inputs // (50 if name == "resumed" else 1))
    print("\n".join(wrong[:40]))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
