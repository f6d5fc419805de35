"""Data: sample k of a run is a function of (seed, k), from scenes, captioned pictures or texts.

    sample k = f(seed, k)            rng(seed, k, purpose) is the only source of random numbers
    item of sample k = permutation(seed, k // n)[k % n]        every one of n items once an epoch

So a resumed run, or one with another number of workers, reads the same samples. Every dataset has
these methods; `tasks` are the first three that it serves, an image is an index below num_images:

    t2t(k) -> text               it2t(k) -> prompt, image, answer    image_hw(image) -> (H, W)
    t2i(k) -> caption, image     images([image, ...]) -> pixels, uint8 (H, W, 3) each
    corpus(n) -> texts to train a tokenizer on    captions() -> (name for messages, caption) of all

Shapes: H, W height and width in pixels, n items.    Run: python data.py   (CPU, 2 s)
"""

import codecs
import functools
import gzip
import io
import json
import math
import mmap
import os
import re
import sys
import tarfile
import tempfile
import warnings
import zlib
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from enum import IntEnum
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageOps
from PIL.ContainerIO import ContainerIO
from tqdm import tqdm

from scenes import language, pictures

# ---- Randomness --------------------------------------------------------------------------------

SEEDS = 1 << 56     # a run's seed is below SEEDS; its evaluation uses seed + SEEDS


class Purpose(IntEnum):
    """What a random number is for. Append new ones: another number for one changes every run."""
    TASK, ORDER, SCENE, PICK, CAPTION, WINDOW, CORPUS, DROP = range(8)
    TIME, NOISE, POSTERIOR, MASK, INIT, EVAL, SAMPLE = range(8, 15)


def rng(seed: int, k: int, purpose: int) -> np.random.Generator:
    """Generator of (seed, k, purpose). Philox counts: sample k needs none of those before it."""
    return np.random.Generator(np.random.Philox(key=[seed * 64 + purpose, k]))


@functools.lru_cache(maxsize=4)     # two datasets, each in two epochs when a batch crosses epochs
def permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order of n items in an epoch, int32 (n,)."""
    return rng(seed, epoch, Purpose.ORDER).permutation(np.arange(n, dtype=np.int32))


def order(seed: int, k: int, n: int) -> int:
    """Which of n items sample k is: each item once in an epoch of n samples."""
    return int(permutation(seed, k // n, n)[k % n])


# ---- Generated scenes --------------------------------------------------------------------------

DESCRIBE = ("describe the image.", "describe the picture.",
            "what does the image show?", "what is pictured?")


class Scenes:
    """A pool of generated scenes; scene i is a function of (seed, i), made when first used.

    size        side of the pictures in pixels, or (H, W)
    heldout     True: every scene has a held-out composition; False: none has
    questions   share of IT2T samples that ask for one fact; the others ask for a caption
    """
    tasks = {"t2t", "t2i", "it2t"}

    def __init__(self, seed: int, size: int | tuple[int, int] = 32, pool: int = 20000,
                 heldout: bool = False, questions: float = 0.5):
        self.seed, self.num_images, self.questions = seed, pool, questions
        self.hw = height_and_width(size)
        self.scene_of = functools.cache(
            lambda i: pictures.sample_scene(rng(seed, i, Purpose.SCENE), heldout=heldout))
        self._pixels = functools.cache(lambda i: pictures.render(self.scene_of(i), self.hw))
        # One story a scene: to write a new one takes longer than all else about a sample.
        self._story = functools.cache(
            lambda i: language.story(self.scene_of(i), rng(seed, i, Purpose.CAPTION)))

    def image_hw(self, index: int) -> tuple[int, int]:
        return self.hw

    def images(self, indices: Iterable[int]) -> list[np.ndarray]:
        return [self._pixels(int(index)) for index in indices]

    def _pick(self, k: int) -> tuple[int, np.random.Generator]:
        """The scene of sample k, and the generator that chooses the sample's words."""
        words = rng(self.seed, k, Purpose.PICK)
        return int(words.integers(self.num_images)), words

    def t2t(self, k: int) -> str:
        return self._story(self._pick(k)[0])

    def t2i(self, k: int) -> tuple[str, int]:
        index, words = self._pick(k)
        return language.caption(self.scene_of(index), words), index

    def it2t(self, k: int) -> tuple[str, int, str]:
        index, words = self._pick(k)
        if words.random() < self.questions:
            prompt, answer = language.question(self.scene_of(index), words)
        else:
            style = int(words.integers(len(DESCRIBE)))      # the prompt sets the caption's wording
            prompt = DESCRIBE[style]
            answer = language.caption(self.scene_of(index), words, wording=style)
        return prompt, index, answer

    def corpus(self, n: int) -> list[str]:
        return [*DESCRIBE, *language.corpus(rng(self.seed, 0, Purpose.CORPUS), n)]

    def captions(self) -> Iterator[tuple[str, str]]:
        return (("a generated scene", self.t2i(k)[0]) for k in range(256))


# ---- Reading files -----------------------------------------------------------------------------

@functools.cache
def warn_once(line: str) -> None:
    """Print a line for the user to stderr: once, and in the first of several workers only."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr)


def path_inside(root: str, name: str) -> str:
    """Real path of `name` in the real folder `root`. ValueError when .. or a link leads out."""
    real = os.path.realpath(os.path.join(root, name))
    if os.path.isabs(name) or not real.startswith(os.path.join(root, "")):
        raise ValueError(f"{name!r} leads out of the folder {root}; copy the file into it")
    return real


def clean_text(raw: bytes | str, where: str) -> str:
    """The stripped text. ValueError, naming `where`, if it is no text, not UTF-8, or empty."""
    try:
        text = (raw.decode("utf-8-sig") if isinstance(raw, bytes) else raw).strip()
        text.encode()                           # JSON can write half a surrogate pair
    except (UnicodeError, AttributeError):
        raise ValueError(f"{where}: expected a text in UTF-8") from None
    if not text:
        raise ValueError(f"{where}: the text is empty; write one or take it out")
    return text


def json_rows(lines: Iterable[bytes], name: str) -> Iterator[tuple[dict, str]]:
    """(JSON object, its field "text" or "caption") of each line that is not blank."""
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = dict(json.loads(line))
            except (ValueError, TypeError):
                raise ValueError(f"{name}:{number}: expected a JSON object, in UTF-8") from None
            yield row, clean_text(row.get("text", row.get("caption")), f"{name}:{number}, text")


# ---- Pixels ------------------------------------------------------------------------------------

CACHE_BYTES = 1 << 28       # of decoded pixels in memory
MAX_PIXELS = 50_000_000     # of one stored picture: 200 MB once decoded to RGBA
# EPS is left out: Pillow would have Ghostscript run it as a program.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
IMAGE_NAMES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm",
               ".jp2")
ORIENTATION = 0x0112        # EXIF tag; values 5 to 8 exchange height and width
warnings.filterwarnings("ignore", module="PIL")     # of damage that Pillow can repair


def height_and_width(size: int | tuple[int, int]) -> tuple[int, int]:
    """(H, W) of a size that is one side or both."""
    return (size, size) if isinstance(size, int) else size


def buckets(size: int, multiple: int) -> list[tuple[int, int]]:
    """Shapes (H, W) of areas up to size^2 and aspect ratios from 1:2 to 2:1, whose sides are
    multiples; each long side is the largest that the area allows."""
    if size % multiple:
        raise ValueError(f"got image size {size}, expected a multiple of {multiple} for aspect")
    short = [side for side in range(size, 0, -multiple) if size**2 <= 2 * side**2]
    flat = [(side, size**2 // side // multiple * multiple) for side in short]
    return sorted({*flat, *((width, height) for height, width in flat)})


def decode(file: BinaryIO, shapes: Sequence[tuple[int, int]], header_only: bool = False
           ) -> np.ndarray | tuple[int, int]:
    """Stored picture -> RGB, uint8 (H, W, 3): its first frame, turned as EXIF says, over white.

    It is scaled, and cropped at the centre, to the (H, W) of `shapes` nearest in aspect ratio;
    header_only returns this (H, W) without decoding.
    ValueError when the file is no picture, damaged, or larger than MAX_PIXELS.
    """
    try:
        image = Image.open(file, formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise Image.DecompressionBombError
        # A PNG may have EXIF behind its pixels, but getexif() would decode them to look for it.
        exif = image.getexif() if image.format != "PNG" or "exif" in image.info else {}
        turned = exif.get(ORIENTATION) in (5, 6, 7, 8)
        aspect = image.height / image.width if turned else image.width / image.height
        height, width = min(shapes, key=lambda hw: abs(math.log(hw[1] / hw[0] / aspect)))
        if header_only:
            return height, width
        image.draft(None, (2 * max(height, width),) * 2)    # lets JPEG decode at a lower resolution
        image = to_rgb(ImageOps.exif_transpose(image))
        return np.asarray(ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS))
    except Exception as error:                  # Pillow raises nearly every type on a damaged file
        raise ValueError(f"not a whole picture of at most {MAX_PIXELS // 10**6} megapixels: "
                         f"{type(error).__name__}") from None


def load_image(path: str, hw: tuple[int, int]) -> np.ndarray:
    """One picture file -> uint8 (H, W, 3). Errors: OSError, and those of decode."""
    with open(path, "rb") as file:
        return decode(file, [hw])


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode -> RGB: alpha over white; 16-bit and float gray scaled, where Pillow would clip."""
    if image.mode[0] in "IF":                           # I;16, I;16B, I (with 16 bits in it), F
        gray = np.nan_to_num(np.asarray(image).astype(np.float32))                 # (H, W)
        white = 65535 if image.mode[0] == "I" else 1 if gray.max() <= 1 else 255
        gray = np.where(gray == image.info.get("transparency"), white, gray) * (255 / white)
        return Image.fromarray(gray.clip(0, 255).round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:                     # an alpha channel, or a transparent colour
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


# ---- Captioned pictures ------------------------------------------------------------------------

class Part(NamedTuple):
    """A stored file, or a member of a shard: bytes [start, start + size) of the file `path`."""
    name: str       # for messages: of the file in its folder, or shard:member
    path: str
    start: int
    size: int


def read(part: Part) -> bytes:
    with open(part.path, "rb") as file:
        file.seek(part.start)
        return file.read(part.size)


def find_pictures(path: str) -> Iterator[tuple[Part, str]]:
    """(picture, caption) of a .jsonl, a .tar or a folder, always in the same order.

    .jsonl      rows {"file_name" or "file": name in its folder, "text" or "caption": text}
    .tar        a shard of WebDataset, uncompressed: 7.jpg and 7.txt or 7.json are a sample
    folder      read by its metadata.jsonl or captions.jsonl; without one, as its .tar shards;
                without those, as pictures with a .txt of the same name, in all subfolders
    """
    if path.endswith(".jsonl"):
        root = os.path.realpath(os.path.dirname(path))
        with open(path, "rb") as file:
            for row, text in json_rows(file, path):
                name = str(row.get("file_name", row.get("file")))
                real = path_inside(root, name)
                yield Part(name, real, 0, os.path.getsize(real)), text
    elif path.endswith(".tar"):
        yield from with_captions(tar_parts(path))
    elif os.path.isdir(path):
        root, names = os.path.realpath(path), sorted(os.listdir(path))
        tables = [name for name in ("metadata.jsonl", "captions.jsonl") if name in names]
        shards = [name for name in names if name.endswith(".tar")]
        for name in tables[:1] or shards:
            yield from find_pictures(path_inside(root, name))
        if not tables and not shards:
            yield from with_captions(folder_parts(root))
    else:
        raise ValueError(f"{path} is no folder, no .jsonl and no uncompressed .tar")


def with_captions(parts: Iterable[Part]) -> Iterator[tuple[Part, str]]:
    """Each picture with the text of the .txt or .json of the same name, "" if there is none."""
    images, texts = [], {}
    for part in parts:
        stem, ending = os.path.splitext(part.name)
        if ending.lower() in IMAGE_NAMES:
            images.append((stem, part))
        elif ending in (".txt", ".json"):
            texts[stem] = part
    for stem, image in images:
        caption = ""
        if text := texts.get(stem):
            caption = clean_text(read(text), text.name)
            if text.name.endswith(".json"):
                ((_, caption),) = json_rows([caption.encode()], text.name)
        yield image, caption


def folder_parts(root: str) -> Iterator[Part]:
    """The pictures and .txt files of a folder and its subfolders."""
    for folder, subfolders, names in os.walk(root):
        subfolders.sort()                               # os.walk visits them in this order
        for name in sorted(names):
            if name.lower().endswith((*IMAGE_NAMES, ".txt")):
                name = os.path.relpath(os.path.join(folder, name), root)
                real = path_inside(root, name)
                yield Part(name, real, 0, os.path.getsize(real))


class Member(tarfile.TarInfo):
    """A tar header. ReadError for a long one that extends the next (pax, GNU names): tarfile would
    read all that it claims to have, and search it in a time that grows with its square."""
    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> "Member":
        raw = tar.fileobj.read(tarfile.BLOCKSIZE)
        tar.fileobj.seek(-len(raw), os.SEEK_CUR)
        if raw[156:157] in (b"x", b"g", b"X", b"L", b"K") and tarfile.nti(raw[124:136]) > 1 << 14:
            raise tarfile.ReadError("a header of more than 16 KiB")
        return super().fromtarfile(tar)


def tar_parts(path: str) -> Iterator[Part]:
    """The members of an uncompressed tar. Nothing is unpacked: a name in it is only a label."""
    try:
        with tarfile.open(path, "r:", tarinfo=Member) as tar:
            while member := tar.next():
                if member.isreg():                      # not a folder, a link, a device
                    name = f"{path}:{member.name}"
                    yield Part(name, path, member.offset_data, member.size)
                tar.members.clear()                     # tarfile would keep 1 KB for each
            tar.fileobj.seek(tar.offset)
            if any(tar.fileobj.read(tarfile.BLOCKSIZE)):    # tarfile takes a bad header for the end
                raise tarfile.ReadError(f"no header at byte {tar.offset}")
    except tarfile.TarError as error:
        raise ValueError(f"{path} is no whole uncompressed tar ({error}); copy it again") from None


class ImageText:
    """Captioned pictures on disk, from the paths that find_pictures reads.

    size        side in pixels, or (H, W)
    aspect      sort the pictures into buckets(size, multiple); else crop all to one shape

    Headers are read at the start, and pictures that cannot be used are left out. Damage in the
    pixels is found later: the next picture of the same shape that decodes then takes the place of
    the damaged one, with its own caption. ValueError when no picture can be used.
    """
    tasks = {"t2t", "t2i", "it2t"}

    def __init__(self, paths: Sequence[str], seed: int = 0, size: int | tuple[int, int] = 32,
                 aspect: bool = False, multiple: int = 8):
        height, width = height_and_width(size)
        shapes = buckets(height, multiple) if aspect else [(height, width)]
        self.seed, self._parts, self._texts, self._hw, left_out = seed, [], [], [], []
        found = (pair for path in paths for pair in find_pictures(str(path)))
        for part, text in tqdm(found, "indexing images", leave=False, delay=2):
            try:
                with open(part.path, "rb") as file:
                    content = ContainerIO(file, part.start, part.size)
                    hw = decode(content, shapes, header_only=True)
                if not text:
                    raise ValueError("no caption")
            except ValueError as error:
                left_out.append(f"{part.name!r} ({error})")
                continue
            self._parts.append(part)
            self._texts.append(text)
            self._hw.append(hw)
        self.num_images = len(self._parts)
        if left_out:
            warn_once(f"left out: {len(left_out)} images of {len(left_out) + self.num_images}: "
                      + ", ".join(left_out[:3]) + ", ..." * (len(left_out) > 3))
        if not self._parts:
            raise ValueError(f"no captioned image that can be used in {', '.join(map(str, paths))}")
        capacity = CACHE_BYTES // max(3 * height * width for height, width in shapes)
        self._pixels = functools.lru_cache(max(capacity, 1))(self._load)

    def _load(self, index: int) -> np.ndarray | None:
        """Pixels (H, W, 3); None for a damaged picture."""
        part = self._parts[index]
        try:
            return decode(io.BytesIO(read(part)), [self._hw[index]])
        except ValueError as error:
            warn_once(f"left out from now on: {part.name!r} ({error})")

    def _usable(self, index: int) -> int:
        """The image itself, or, if it is damaged, the next of its shape that decodes."""
        for other in ((index + step) % self.num_images for step in range(self.num_images)):
            if self._hw[other] == self._hw[index] and self._pixels(other) is not None:
                return other
        raise ValueError("no picture of this shape can be decoded any more; check the files")

    def image_hw(self, index: int) -> tuple[int, int]:
        return self._hw[index]

    def images(self, indices: Iterable[int]) -> list[np.ndarray]:
        return [self._pixels(self._usable(int(index))) for index in indices]

    def t2t(self, k: int) -> str:
        return self._texts[order(self.seed, k, self.num_images)]

    def t2i(self, k: int) -> tuple[str, int]:
        index = self._usable(order(self.seed, k, self.num_images))
        return self._texts[index], index

    def it2t(self, k: int) -> tuple[str, int, str]:
        caption, index = self.t2i(k)
        return DESCRIBE[0], index, caption

    def corpus(self, n: int) -> list[str]:
        return [DESCRIBE[0], *(self.t2t(k) for k in range(min(n, self.num_images)))]

    def captions(self) -> Iterator[tuple[str, str]]:
        return ((part.name, text) for part, text in zip(self._parts, self._texts))


# ---- Texts -------------------------------------------------------------------------------------

END_TEXT = b"<|endoftext|>"     # between documents; a file without it is one document


def open_text(path: str) -> BinaryIO:
    """A .txt; or an unnamed file in TMPDIR with the texts of a .jsonl, a .txt.gz or a .jsonl.gz."""
    kind = path.removesuffix(".gz")
    if not kind.endswith((".txt", ".jsonl")):
        raise ValueError(f"got the text file {path}, expected .txt or .jsonl, also as .gz")
    file = gzip.open(path) if path.endswith(".gz") else open(path, "rb")
    if path.endswith(".txt"):
        return file
    unpacked = tempfile.TemporaryFile()
    texts = (text.encode() + END_TEXT for _, text in json_rows(file, path))
    try:
        unpacked.writelines(file if kind.endswith(".txt") else texts)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file ({error}); copy it again") from None
    unpacked.flush()
    return unpacked


def find_documents(file: BinaryIO, name: str) -> Iterator[tuple[int, int]]:
    """Byte ranges [start, end) of the documents in a file, without blank borders.

    The file is mapped into memory, not read. ValueError naming the line that is not UTF-8.
    """
    if not os.fstat(file.fileno()).st_size:
        return                                          # an empty file cannot be mapped
    text = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    for number, line in enumerate(iter(text.readline, b""), 1):
        try:
            line.decode()
        except UnicodeDecodeError:
            raise ValueError(f"{name}:{number}: not UTF-8; convert it, as with iconv") from None
    start = 3 * (text[:3] == codecs.BOM_UTF8)
    separators = [match.span() for match in re.finditer(re.escape(END_TEXT), text)]
    for stop, after in [*separators, (len(text), None)]:
        end = stop
        while start < end and text[start:start + 1].isspace():
            start += 1
        while start < end and text[end - 1:end].isspace():
            end -= 1
        if start < end:
            yield start, end
        start = after


class TextFiles:
    """Texts on disk: .txt, or .jsonl with a field "text", each also as .gz.

    A document has a window for every 4 seq_len bytes, about seq_len tokens of English. Sample k
    starts near the beginning of its window, at the next paragraph, sentence or word, and is up to
    four windows long, so that it fills seq_len tokens unless its document ends.
    """
    tasks, num_images = {"t2t"}, 0

    def __init__(self, paths: Sequence[str], seed: int = 0, seq_len: int = 256):
        self.seed, self.stride = seed, 4 * seq_len
        self._files = [open_text(str(path)) for path in paths]
        found = [(number, start, end) for number, file in enumerate(self._files)
                 for start, end in find_documents(file, str(paths[number]))]
        if not found:
            raise ValueError(f"no text in {', '.join(map(str, paths))}")
        self._docs = np.array(found)                    # (n, 3): file number, start, end
        windows = -(-(self._docs[:, 2] - self._docs[:, 1]) // self.stride)         # (n,)
        self._first = np.concatenate([[0], np.cumsum(windows)])                    # (n + 1,)
        self.num_windows = int(self._first[-1])

    def t2t(self, k: int) -> str:
        window = order(self.seed, k, self.num_windows)
        doc = int(np.searchsorted(self._first, window, side="right")) - 1
        number, start, end = map(int, self._docs[doc])
        offset = window - int(self._first[doc])         # in windows
        if offset:                                      # the first begins with the document
            offset += rng(self.seed, k, Purpose.WINDOW).random() - 0.5
        at = max(start, min(start + int(offset * self.stride), end - self.stride))
        size = min(end - at, 4 * self.stride)
        raw = os.pread(self._files[number].fileno(), size, at)
        text = raw.decode("utf-8", errors="ignore")     # without characters that the borders cut
        if at > start:
            for border in (r"\n\s*", r"[.!?][\"')\]]*\s+", r"\s+"):
                found = re.search(border, text[:self.stride])
                if found and found.end() < len(text):
                    return text[found.end():]
        return text

    def corpus(self, n: int) -> list[str]:
        return [self.t2t(k) for k in range(min(n, self.num_windows))]

    def captions(self) -> Iterator[tuple[str, str]]:
        return iter(())


# ---- Together ----------------------------------------------------------------------------------

class Mixture:
    """The captioned pictures of one dataset, with the texts of another as T2T."""

    def __init__(self, pairs: ImageText, texts: TextFiles):
        self.pairs, self.texts, self.t2t = pairs, texts, texts.t2t

    def __getattr__(self, name: str):
        return getattr(self.pairs, name)                # all else is the pictures'

    def corpus(self, n: int) -> list[str]:
        return self.pairs.corpus(n // 2) + self.texts.corpus(n - n // 2)


def open_data(args: Namespace) -> Scenes | ImageText | TextFiles | Mixture:
    """The dataset of the flags --data and --text; generated scenes when both are empty.

    Pictures without texts serve their captions as T2T; texts without pictures serve T2T only.
    """
    size = args.image_size[0], args.image_size[-1]
    if not args.data and not args.text:
        return Scenes(args.seed, size, args.pool, questions=args.questions)
    texts = args.text and TextFiles(args.text, args.seed, args.seq_len)
    pairs = args.data and ImageText(args.data, args.seed, size, args.aspect, args.downsample)
    return Mixture(pairs, texts) if pairs and texts else pairs or texts


if __name__ == "__main__":
    world = Scenes(seed=0)
    for task in ("t2t", "t2i", "it2t"):
        print(f"sample 7 of {task} (expect the same in every run):", getattr(world, task)(7))
    with tempfile.TemporaryDirectory() as folder:
        for i, pixels in enumerate(world.images(range(5))):
            Image.fromarray(pixels).save(f"{folder}/{i}.png")
            Path(folder, f"{i}.txt").write_text(f"picture {i}")
        os.truncate(f"{folder}/3.png", 20)
        pairs = ImageText([folder])
        print("a folder of 5 pictures, one of them cut off; an epoch (expect 4 captions):",
              [pairs.t2i(k)[0] for k in range(pairs.num_images)])
        Path(folder, "long.txt").write_text(" ".join(map(world.t2t, range(300))))
        print("a window of a text (expect it to begin with a sentence):",
              TextFiles([f"{folder}/long.txt"], seq_len=8).t2t(0)[:50])
    print("shapes with the area of 64 x 64 (expect at most 4096 pixels each):", buckets(64, 16))
