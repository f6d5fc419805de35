"""Data: sample k of a run is a function of (seed, k), from scenes, captioned pictures or texts.

    rng(seed, k, purpose)                  the only source of random numbers
    permutation(seed, k // n, n)[k % n]    the item of sample k of files: each in n successive k

So a resumed run, or one with another number of workers, reads the same samples. A dataset has the
methods below, but of those named as a task only those in `tasks`. An image is an index.

    t2t(k) -> text               it2t(k) -> prompt, image, answer    image_hw(image) -> (H, W)
    t2i(k) -> caption, image     images([image, ...]) -> pixels, uint8 (H, W, 3) each
    ii(k), vid(k) -> turns: images in sequence, each with its text
    corpus(n) -> texts to train a tokenizer on    captions() -> (name, caption), to be checked

Run: python data.py   (CPU, 2 s)
"""
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
from functools import cache, lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps
from PIL.ContainerIO import ContainerIO
from tqdm import tqdm

from scenes import edits, language, pictures

# ---- Randomness --------------------------------------------------------------------------------

SEEDS = 1 << 56     # a run's seed is below SEEDS; its evaluation uses seed + SEEDS


class Purpose(IntEnum):
    """What a random number is for. Append new ones: another value changes every run."""
    TASK, ORDER, SCENE, PICK, CAPTION, WINDOW, CORPUS, DROP = range(8)
    TIME, NOISE, POSTERIOR, MASK = range(8, 12)
    EVAL, SAMPLE, GRID, EDIT = range(13, 17)


class Key(tuple, np.random.bit_generator.ISeedSequence):
    """Philox(Key((a, b))) is Philox(key=[a, b]), without its call for entropy: 4 times as fast."""
    def generate_state(self, n_words: int, dtype) -> np.ndarray:
        return np.array(self, dtype)


def rng(seed: int, k: int, purpose: int) -> np.random.Generator:
    """The generator of (seed, k, purpose), independent of all others."""
    return np.random.Generator(np.random.Philox(Key((seed * 64 + purpose, k))))


@lru_cache(maxsize=4)     # two datasets, each in two epochs when a batch crosses epochs
def permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order of n items in an epoch, int32 (n,)."""
    return rng(seed, epoch, Purpose.ORDER).permutation(np.arange(n, dtype=np.int32))


def order(seed: int, k: int, n: int) -> int:
    """Which of n items sample k is."""
    return int(permutation(seed, k // n, n)[k % n])

# ---- Generated scenes --------------------------------------------------------------------------

Shape = tuple[int, int]     # (H, W): height and width in pixels
CACHE_BYTES = 1 << 28       # of decoded pixels in memory
DESCRIBE = ("describe the image.", "describe the picture.",
            "what does the image show?", "what is pictured?")


class Scenes:
    """Generated scenes, none held out, drawn with replacement; (seed, i) determines scene i < pool.
    Images from `pool` on are those of edits.Sequences. questions: share in IT2T; else captions."""
    tasks = {"t2t", "t2i", "it2t", "ii", "vid"}

    def __init__(self, seed: int, hw: Shape = (32, 32), pool: int = 20000, questions: float = 0.75):
        self.seed, self.hw, self.num_images, self.questions = seed, hw, pool, questions
        self._scene = cache(lambda i: pictures.sample_scene(rng(seed, i, Purpose.SCENE)))
        self._pixels = lru_cache(CACHE_BYTES // (3 * math.prod(hw)))(
            lambda i: pictures.render(self.scene_of(i), self.hw))
        self._sequences = edits.Sequences(pool, self._scene, lambda i: rng(seed, i, Purpose.EDIT))
        # One story per scene: writing a new one takes longer than the rest of a sample.
        self._story = cache(
            lambda i: language.story(self.scene_of(i), rng(seed, i, Purpose.CAPTION)))

    def scene_of(self, index: int) -> pictures.Scene:
        return self._scene(index) if index < self.num_images else self._sequences.scene(index)

    def image_hw(self, index: int) -> Shape:
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
            return prompt, index, answer
        style = int(words.integers(len(DESCRIBE)))          # the prompt sets the caption's wording
        return DESCRIBE[style], index, language.caption(self.scene_of(index), words, style)

    def ii(self, k: int) -> list[edits.Turn]:
        return self._sequences.edits(*self._pick(k))

    def vid(self, k: int) -> list[edits.Turn]:
        return self._sequences.clip(*self._pick(k))

    def corpus(self, n: int) -> list[str]:
        words = rng(self.seed, 0, Purpose.CORPUS)
        return [*DESCRIBE, *language.corpus(words, n), *edits.corpus(words, n // 4)]

    def captions(self) -> Iterator[tuple[str, str]]:
        return (("a generated scene", self.t2i(k)[0]) for k in range(256))    # lengths vary little

# ---- Texts -------------------------------------------------------------------------------------

END_TEXT = b"<|endoftext|>"     # between documents; a file without it is one document
DOCUMENT = re.compile(rb"(?:\A\xef\xbb\xbf)?+\s*+(.*\S)", re.DOTALL)    # without BOM and blanks


def clean_text(raw: bytes | str, where: str) -> str:
    """The text without blanks around it. ValueError, naming `where`, unless it is UTF-8."""
    try:
        text = (raw.decode("utf-8-sig") if isinstance(raw, bytes) else raw).strip()
        text.encode()                           # JSON can write half a surrogate pair
    except (UnicodeError, AttributeError):
        text = ""
    if not text:
        raise ValueError(f"{where}: expected a text in UTF-8 that is not empty")
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


def open_text(path: str) -> BinaryIO:
    """The .txt itself, or the texts of .jsonl, .txt.gz, .jsonl.gz as an unnamed .txt in TMPDIR."""
    if path.endswith(".txt"):
        return open(path, "rb")
    if not path.endswith((".jsonl", ".txt.gz", ".jsonl.gz")):
        raise ValueError(f"got the text file {path}, expected .txt or .jsonl, also as .gz")
    copy = tempfile.TemporaryFile()
    with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
        texts = (text.encode() + END_TEXT for _, text in json_rows(file, path))
        try:
            copy.writelines(file if path.endswith(".txt.gz") else texts)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is not a whole gzip file ({error}); copy it again") from None
    copy.flush()
    return copy


def find_documents(file: BinaryIO, name: str) -> Iterator[tuple[int, int]]:
    """Byte ranges [start, end) of documents. ValueError naming the line that is not UTF-8."""
    if not os.fstat(file.fileno()).st_size:
        return                                          # an empty file cannot be mapped
    text = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)     # takes no memory, unlike read()
    for number, line in enumerate(iter(text.readline, b""), 1):
        if line.decode(errors="ignore").encode() != line:
            raise ValueError(f"{name}:{number}: not UTF-8; convert it, as with iconv")
    start = 0
    for end in [*(match.start() for match in re.finditer(re.escape(END_TEXT), text)), len(text)]:
        if found := DOCUMENT.match(text, start, end):
            yield found.span(1)
        start = end + len(END_TEXT)


class TextFiles:
    """Texts on disk: .txt, or .jsonl with a field "text", each also as .gz. A document has a window
    for every 4 seq_len bytes, about seq_len tokens of English. Sample k starts near the beginning
    of its window, at the next paragraph, sentence or word. It is up to four windows long, so that
    it fills seq_len tokens unless its document ends."""
    tasks, num_images = {"t2t"}, 0

    def __init__(self, paths: Sequence[str], seed: int = 0, seq_len: int = 128):
        self.seed, self.stride = seed, 4 * seq_len
        self._files = [open_text(str(path)) for path in paths]
        windows = ((number, start, end, at) for number, file in enumerate(self._files)
                   for start, end in find_documents(file, str(paths[number]))
                   for at in range(start, end, self.stride))
        self._windows = np.fromiter(windows, (np.int64, 4))     # (n, 4)
        self.num_windows = len(self._windows)
        if not self.num_windows:
            raise ValueError(f"no text in {', '.join(map(str, paths))}")

    def t2t(self, k: int) -> str:
        number, start, end, at = self._windows[order(self.seed, k, self.num_windows)].tolist()
        if at > start:                                  # the first begins with the document
            at += math.floor((rng(self.seed, k, Purpose.WINDOW).random() - 0.5) * self.stride)
            at = max(start, min(at, end - self.stride))
        raw = os.pread(self._files[number].fileno(), min(end - at, 4 * self.stride), at)
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

# ---- Pixels ------------------------------------------------------------------------------------

# EPS is left out: Pillow would have Ghostscript run it as a program.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
IMAGE_NAMES = tuple(".png .jpg .jpeg .webp .gif .bmp .tif .tiff .ppm .pgm .jp2".split())
Image.MAX_IMAGE_PIXELS = 25_000_000                 # Pillow refuses more than twice as many
warnings.filterwarnings("ignore", module="PIL")     # of damage that Pillow can repair


def buckets(size: int, multiple: int) -> list[Shape]:
    """Shapes (H, W) with aspect ratios from 1:2 to 2:1. Each side is a multiple of `multiple`, and
    the long side is the largest for which H W <= size^2. size: a multiple, too."""
    short = [side for side in range(size, 0, -multiple) if size**2 <= 2 * side**2]
    flat = [(side, size**2 // side // multiple * multiple) for side in short]
    return sorted({*flat, *((width, height) for height, width in flat)})


def decode_picture(file: BinaryIO, shapes: list[Shape], header_only=False) -> np.ndarray | Shape:
    """Stored picture -> RGB, uint8 (H, W, 3): its first frame, turned as EXIF says, over white,
    scaled and cropped at the center to the (H, W) of `shapes` nearest in aspect ratio.
    header_only returns this (H, W) without decoding. ValueError for a damaged picture."""
    try:
        image = Image.open(file, formats=FORMATS)
        # A PNG may have EXIF behind its pixels, but getexif() would decode them to look for it.
        exif = image.getexif() if image.format != "PNG" or "exif" in image.info else {}
        turned = exif.get(ExifTags.Base.Orientation) in (5, 6, 7, 8)    # by 90 degrees
        aspect = image.height / image.width if turned else image.width / image.height
        height, width = min(shapes, key=lambda hw: abs(math.log(hw[1] / hw[0] / aspect)))
        if header_only:
            return height, width
        image.draft(None, (2 * max(height, width),) * 2)    # lets JPEG decode at a lower resolution
        image = to_rgb(ImageOps.exif_transpose(image))
        return np.asarray(ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS))
    except Exception as error:                  # Pillow raises nearly every type on a damaged file
        raise ValueError(f"no whole picture up to 50 megapixels: {type(error).__name__}") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode -> RGB: alpha over white; 16-bit and float gray scaled, where Pillow would clip."""
    if image.mode[0] in "IF":                           # I;16, I;16B, I (with 16 bits in it), F
        gray = np.nan_to_num(np.asarray(image).astype(np.float32))                 # (H, W)
        white = 65535 if image.mode[0] == "I" else 1 if gray.max() <= 1 else 255
        gray = np.where(gray == image.info.get("transparency"), white, gray) * (255 / white)
        return Image.fromarray(gray.clip(0, 255).round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:                     # an alpha channel, or a transparent color
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")

# ---- Captioned pictures ------------------------------------------------------------------------

class Part(NamedTuple):
    """A stored file, or a member of a shard: bytes [start, start + size) of the file `path`."""
    name: str       # for messages: of the file in its folder, or shard:member
    path: str
    start: int
    size: int

    def read(self) -> bytes:
        with open(self.path, "rb") as file:
            return os.pread(file.fileno(), self.size, self.start)


def file_part(root: str, name: str) -> Part:
    """The file `name` in the real folder `root`. ValueError when .. or a link leads out of it."""
    real = os.path.realpath(os.path.join(root, name))
    if os.path.isabs(name) or not real.startswith(os.path.join(root, "")):
        raise ValueError(f"{name!r} leads out of the folder {root}; copy the file into it")
    return Part(name, real, 0, os.path.getsize(real))


class Row(NamedTuple):
    task: str           # t2i; ii: the last picture is made of those before it; vid: a clip
    pictures: list      # a Part each; later their numbers
    text: str           # a caption, or for ii an instruction


def find_pictures(path: str) -> Iterator[Row]:
    """The rows of a .jsonl, a .tar or a folder, always in the same order.
    .jsonl   rows {"file_name" or "file": name in its folder, "text" or "caption": text}, for ii
             with "source": a name or a list of names; a folder as file_name has a clip's frames
    .tar     a shard of WebDataset, uncompressed: 7.jpg and 7.txt or 7.json are a sample
    folder   its metadata.jsonl or captions.jsonl; without one, its .tar shards; without those,
             pictures with a .txt of the same name, also in subfolders"""
    if path.endswith(".jsonl"):
        root = os.path.realpath(os.path.dirname(path))
        with open(path, "rb") as file:
            for row, text in json_rows(file, path):
                name = str(row.get("file_name", row.get("file", "")))
                source, folder = row.get("source") or [], file_part(root, name).path
                names = [*(source if isinstance(source, list) else [source]), name]
                task = "vid" if os.path.isdir(folder) else "ii" if source else "t2i"
                if task == "vid":                          # 2.png comes before 10.png
                    files = sorted(os.listdir(folder), key=lambda x: (len(x), x))
                    names = [f"{name}/{x}" for x in files if x.lower().endswith(IMAGE_NAMES)]
                if source and task == "vid" or not names:
                    raise ValueError(f"{folder}: expected pictures, and no source for a folder")
                yield Row(task, [file_part(root, str(name)) for name in names], text)
    elif path.endswith(".tar"):
        yield from with_captions(tar_parts(path))
    elif os.path.isdir(path):
        root, names = os.path.realpath(path), sorted(os.listdir(path))
        tables = [name for name in ("metadata.jsonl", "captions.jsonl") if name in names]
        shards = [name for name in names if name.endswith(".tar")]
        for name in tables[:1] or shards:
            yield from find_pictures(file_part(root, name).path)
        if not tables and not shards:
            files = sorted(Path(root).rglob("*"), key=lambda file: (file.parent, file.name))
            yield from with_captions(file_part(root, str(file.relative_to(root))) for file in files
                                     if file.name.lower().endswith((*IMAGE_NAMES, ".txt")))
    else:
        raise ValueError(f"{path} is no folder, no .jsonl and no uncompressed .tar")


def with_captions(parts: Iterable[Part]) -> Iterator[Row]:
    """Each picture with the text of the .txt or .json of the same name, "" if there is none."""
    named = {part.name: part for part in parts}
    for name, part in named.items():
        stem = os.path.splitext(name)[0]
        if name.lower().endswith(IMAGE_NAMES):
            text = named.get(stem + ".txt") or named.get(stem + ".json")
            caption = clean_text(text.read(), text.name) if text else ""
            if text and text.name.endswith(".json"):
                [(_, caption)] = json_rows([caption.encode()], text.name)
            yield Row("t2i", [part], caption)


def tar_parts(path: str) -> Iterator[Part]:
    """The files in an uncompressed tar, without links. Nothing is unpacked: a name is only a label.
    A name with two dots, such as 7.seg.png, is neither the picture nor the caption of sample 7."""
    try:
        with tarfile.open(path, "r:") as tar:
            while member := tar.next():
                if member.isreg() and os.path.basename(member.name).count(".") == 1:
                    yield Part(f"{path}:{member.name}", path, member.offset_data, member.size)
                tar.members.clear()                     # tarfile would keep 1 KB for each
            tar.fileobj.seek(tar.offset)
            if any(tar.fileobj.read(tarfile.BLOCKSIZE)):    # tarfile takes a bad header for the end
                raise tarfile.ReadError(f"no header at byte {tar.offset}")
    except tarfile.TarError as error:
        raise ValueError(f"{path}: not a whole uncompressed tar ({error}); copy it") from None


@cache
def warn_once(line: str) -> None:
    """Print a line for the user to stderr: once, and in the first of several workers only."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(line, file=sys.stderr)


class ImageText:
    """Captioned pictures on disk, from the paths that find_pictures reads. They have the shape hw
    or, with aspect, the nearest of buckets(H, multiple). T2T has the captions, or `texts`.
    Pictures without a header, or without a file for the caption, are left out; ValueError if none
    is left. If a picture is found damaged later, another row is taken."""
    def __init__(self, paths: Sequence[str], seed: int = 0, hw: Shape = (32, 32),
                 aspect: bool = False, multiple: int = 8, texts: TextFiles | None = None):
        shapes = buckets(hw[0], multiple) if aspect else [hw]
        self.seed, self._texts = seed, texts
        self._parts, self._hw, left_out = [], [], []
        self._rows: dict[str, list[Row]] = {"t2i": [], "ii": [], "vid": []}
        found = (row for path in paths for row in find_pictures(str(path)))
        for task, parts, caption in tqdm(found, "indexing images", leave=False, delay=2):
            try:
                hws = [self._shape(part, shapes) for part in parts]
                if not caption:
                    raise ValueError("no caption")
                if len({*hws}) > 1:
                    raise ValueError("its pictures have different shapes")
                numbers = range(len(self._parts), len(self._parts) + len(parts))
                self._rows[task].append(Row(task, [*numbers], caption))
                self._parts += parts
                self._hw += hws
            except ValueError as error:
                left_out.append(f"{parts[-1].name!r} ({error})")
        rows, self.num_images = sum(map(len, self._rows.values())), len(self._parts)
        if left_out:
            warn_once(f"left out: {len(left_out)} of {len(left_out) + rows} rows: "
                      + ", ".join(left_out[:3]) + ", ..." * (len(left_out) > 3))
        if not self._parts:
            raise ValueError(f"no captioned image that can be used in {', '.join(map(str, paths))}")
        self.tasks = {task for task, found in self._rows.items() if found}
        self.tasks |= {"t2t", "it2t"} if "t2i" in self.tasks else {"t2t"} if texts else set()
        self._picture = lru_cache(CACHE_BYTES // (3 * math.prod(hw)))(self._load)

    def _shape(self, part: Part, shapes: list[Shape]) -> Shape:
        with open(part.path, "rb") as file:
            content = ContainerIO(file, part.start, part.size)
            return decode_picture(content, shapes, header_only=True)

    def _load(self, index: int) -> tuple[int, np.ndarray]:
        """The image or, if its pixels are damaged, the next of its shape: index, (H, W, 3)."""
        for other in ((index + step) % self.num_images for step in range(self.num_images)):
            if self._hw[other] == self._hw[index]:
                content = io.BytesIO(self._parts[other].read())
                try:
                    return other, decode_picture(content, [self._hw[other]])
                except ValueError as error:
                    warn_once(f"left out from now on: {self._parts[other].name!r} ({error})")
        raise OSError("no picture of this shape can be decoded any more; check the files")

    def image_hw(self, index: int) -> Shape:
        return self._hw[index]

    def images(self, indices: Iterable[int]) -> list[np.ndarray]:
        return [self._picture(int(index))[1] for index in indices]

    def t2t(self, k: int) -> str:
        if self._texts:
            return self._texts.t2t(k)
        rows = self._rows["t2i"]
        return rows[order(self.seed, k, len(rows))].text

    def t2i(self, k: int) -> tuple[str, int]:
        _, (index,), caption = self._whole("t2i", k)
        return caption, index

    def ii(self, k: int) -> list[edits.Turn]:
        _, (*sources, last), text = self._whole("ii", k)
        return [*(edits.Turn("", i, False) for i in sources), edits.Turn(text, last, True)]

    def vid(self, k: int) -> list[edits.Turn]:
        _, frames, text = self._whole("vid", k)
        return [edits.Turn(text * (i == 0), image, True) for i, image in enumerate(frames)]

    def _whole(self, task: str, k: int) -> Row:
        """The row of sample k of a task, or the nearest before it without a damaged picture."""
        rows, i = self._rows[task], order(self.seed, k, len(self._rows[task]))
        is_whole = lambda row: all(self._picture(p)[0] == p for p in row.pictures)
        return next(filter(is_whole, (rows[i - step] for step in range(len(rows)))), rows[i])

    def it2t(self, k: int) -> tuple[str, int, str]:
        caption, index = self.t2i(k)
        return DESCRIBE[0], index, caption

    def corpus(self, n: int) -> list[str]:
        count = n // 2 if self._texts else n            # of captions
        rows = sum(self._rows.values(), [])
        captions = [rows[i].text for i in permutation(self.seed, 0, len(rows))[:count]]
        return [DESCRIBE[0], *captions, *(self._texts.corpus(n - count) if self._texts else [])]

    def captions(self) -> Iterator[tuple[str, str]]:
        return ((self._parts[row.pictures[-1]].name, row.text)
                for rows in self._rows.values() for row in rows)


def open_data(args: Namespace) -> Scenes | ImageText | TextFiles:
    """The dataset of the flags --data and --text; generated scenes when both are empty."""
    hw = args.image_size[0], args.image_size[-1]
    texts = TextFiles(args.text, args.seed, args.seq_len) if args.text else None
    if args.data:
        return ImageText(args.data, args.seed, hw, args.aspect, args.downsample, texts)
    return texts or Scenes(args.seed, hw, args.pool, args.questions)


if __name__ == "__main__":
    world = Scenes(seed=0)
    for task in ("t2t", "t2i", "it2t"):
        print(f"sample 7 of {task} (expect the same in every run):", getattr(world, task)(7))
    print("samples 0 to 9 (expect items 0 to 4, twice):", *(order(0, k, 5) for k in range(10)))
