"""Data: scenes drawn on the fly, folders and shards of captioned images, text files; and their tokenizer.

    sample k of a run = f(seed, k)        rng(seed, k, purpose) is the only source of randomness

Every dataset answers the same calls, so that resuming, or another number of workers, changes nothing:
    t2t(k) -> text    t2i(k) -> (caption, image)    it2t(k) -> (prompt, image, answer)    images([image, ...]) -> pixels
`image` is an index below num_images. Real data is read in epochs: sample k is item permutation(k // n)[k % n].
Files are hostile until checked: nothing outside the given folder is opened, nothing is unpacked to a named file,
sizes are compared with limits before memory is taken, and no format that can run a program is accepted.
Captions and offsets stay in memory; pixels up to CACHE_BYTES; of texts only where the documents begin and end.

Shapes: H, W pixels of a bucket, n items.    Run: python data.py   (CPU, 4 s)
"""
import codecs
import functools
import gzip
import heapq
import io
import json
import os
import re
import stat
import sys
import tarfile
import tempfile
import zlib
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import regex                                    # comes with tiktoken: the re module has no \p{L}
import tiktoken
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

import scenes

# ---------------------------------------------------------------------------------------------- randomness
# What a random number is for. Appending is safe; changing a number changes every run.
TASK, ORDER, SCENE, PICK, CAPTION, WINDOW, CUT, DROP, TIME, NOISE, POSTERIOR, MASK, CORPUS, INIT, EVAL = range(15)


def rng(seed: int, k: int, purpose: int) -> np.random.Generator:
    """Generator of (seed, k, purpose) alone: counter-based, so sample k needs none of those before it."""
    if seed < 0 or k < 0:
        raise ValueError(f"got seed {seed} and sample number {k}, expected both to be >= 0")
    return np.random.Generator(np.random.Philox(key=[seed * 64 + purpose, k]))


@functools.lru_cache(maxsize=4)                 # two datasets, each at the border of two epochs
def permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    return rng(seed, epoch, ORDER).permutation(np.arange(n, dtype=np.int32))                # (n,)


def order(seed: int, k: int, n: int) -> int:
    """Which of n items sample k is: every item once per epoch of n samples."""
    return int(permutation(seed, k // n, n)[k % n])


# ----------------------------------------------------------------------------------------------- tokenizer
# GPT-2's idea: a word takes the space before it, so " red" can be one token. Every run is bounded, which keeps
# the time linear for any input. The last two lines leave one space to the word that follows.
PATTERN = (r"'(?:[sdmt]|ll|ve|re)| ?[\p{L}\p{M}]{1,32}| ?\p{N}{1,3}| ?[^\s\p{L}\p{M}\p{N}]{1,16}"
           r"|\s{1,16}(?!\S)|\s")


class Tokenizer:
    """Byte-level BPE: any text <-> ids. `end` both ends and fills a text; no text can spell it."""

    def __init__(self, encoding: tiktoken.Encoding):
        self.encoding = encoding
        self.end = encoding.eot_token
        self.n_vocab = encoding.n_vocab         # end included; named encodings leave a few numbers unused

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without an end token."""
        return self.encoding.encode_ordinary(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Text up to the first end token. Bytes that are not UTF-8, and unused ids, come out as U+FFFD."""
        out = b""
        for i in map(int, ids):
            if i == self.end:
                break
            try:
                out += self.encoding.decode_single_token_bytes(i)
            except KeyError:
                out += "\ufffd".encode()
        return out.decode("utf-8", errors="replace")

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Merge the most frequent pair of tokens again and again, up to vocab_size ids with the end token; fewer
        when no pair occurs twice. Ties go to the older tokens, so equal texts give equal tokenizers."""
        if vocab_size < 257:
            raise ValueError(f"got a vocabulary of {vocab_size}, expected at least 257 (256 bytes and the end token)")
        words = Counter(word for text in texts for word in regex.findall(PATTERN, text))
        spelled = [list(word.encode("utf-8", "replace")) for word in words]
        count = list(words.values())
        tokens = [bytes([i]) for i in range(256)]
        number = {token: i for i, token in enumerate(tokens)}
        pairs, where = Counter(), defaultdict(set)          # how often a pair occurs, and in which words
        for w, ids in enumerate(spelled):
            for pair in zip(ids, ids[1:]):
                pairs[pair] += count[w]
                where[pair].add(w)
        heap = [(-times, pair) for pair, times in pairs.items()]
        heapq.heapify(heap)
        while heap and len(tokens) < vocab_size - 1:
            times, pair = heapq.heappop(heap)
            if -times != pairs[pair]:                       # counts fall as neighbours merge: look again later
                if pairs[pair] > 1:
                    heapq.heappush(heap, (-pairs[pair], pair))
                continue
            if -times < 2:
                break
            merged = tokens[pair[0]] + tokens[pair[1]]
            new = number.setdefault(merged, len(tokens))    # a+bc and ab+c are one token
            if new == len(tokens):
                tokens.append(merged)
            touched = set()
            for w in where.pop(pair):
                old, ids, i = spelled[w], [], 0
                while i < len(old):
                    if old[i] == pair[0] and old[i + 1:i + 2] == [pair[1]]:
                        ids.append(new)
                        i += 2
                    else:
                        ids.append(old[i])
                        i += 1
                for neighbours in zip(old, old[1:]):
                    pairs[neighbours] -= count[w]
                for neighbours in zip(ids, ids[1:]):
                    pairs[neighbours] += count[w]
                    if new in neighbours:
                        where[neighbours].add(w)
                        touched.add(neighbours)
                spelled[w] = ids
            for neighbours in touched:
                heapq.heappush(heap, (-pairs[neighbours], neighbours))
        return cls._of_tokens(tokens)

    @classmethod
    def _of_tokens(cls, tokens: list[bytes]) -> "Tokenizer":
        return cls(tiktoken.Encoding("bpe", pat_str=PATTERN, special_tokens={"<|endoftext|>": len(tokens)},
                                     mergeable_ranks={token: i for i, token in enumerate(tokens)}))

    @classmethod
    def named(cls, name: str) -> "Tokenizer":
        """One of tiktoken's own encodings, such as cl100k_base; the first use downloads it."""
        if name not in tiktoken.list_encoding_names():
            raise ValueError(f"got tokenizer {name!r}, expected one of {', '.join(tiktoken.list_encoding_names())}")
        try:
            return cls(tiktoken.get_encoding(name))
        except OSError as error:                # requests' errors are OSErrors, and many lines long
            raise OSError(f"cannot fetch the encoding {name} ({type(error).__name__}): connect to the network once, "
                          "set TIKTOKEN_CACHE_DIR to a folder that has it, or train a tokenizer") from None

    def to_dict(self) -> dict:
        """Plain types for a checkpoint; a byte is the character of its number."""
        if self.encoding.name != "bpe":
            return {"name": self.encoding.name}
        tokens = [self.encoding.decode_single_token_bytes(i) for i in range(self.end)]
        return {"name": "bpe", "tokens": [token.decode("latin-1") for token in tokens]}

    @classmethod
    def from_dict(cls, state: dict) -> "Tokenizer":
        """Inverse of to_dict. ValueError for anything to_dict cannot have written."""
        name = state.get("name") if isinstance(state, dict) else None
        if isinstance(name, str) and name != "bpe":
            return cls.named(name)
        tokens = state.get("tokens") if name == "bpe" else None
        if not isinstance(tokens, list) or not all(isinstance(token, str) and token.isascii() | (max(token) < "\u0100")
                                                   for token in tokens if token != ""):
            raise ValueError("the tokenizer's state is not one written by Tokenizer.to_dict; use another checkpoint")
        tokens = [token.encode("latin-1") for token in tokens]
        if tokens[:256] != [bytes([i]) for i in range(256)] or len(set(tokens)) < len(tokens) or b"" in tokens:
            raise ValueError("the tokenizer's state lacks a byte or repeats a token; use another checkpoint")
        return cls._of_tokens(tokens)


def pad_to_multiple(ids: Sequence[int], multiple: int, end: int, ended: bool = True) -> list[int]:
    """ids, then end tokens up to a multiple. `ended` asks for at least one: a text that exactly fills its last
    block would otherwise never learn to stop. A prompt (P) and a cut-off text take ended=False."""
    length = len(ids) + ended
    return list(ids) + [end] * (ended + -length % multiple)


# ---------------------------------------------------------------------------------------- generated scenes
DESCRIBE = ("describe the image.", "what does the image show?", "what is in the picture?", "describe the picture.")


class GeneratedScenes:
    """A pool of scenes; scene i is f(seed, i), its picture is rendered when first asked for and then kept.

    size        side in pixels, or (H, W)
    heldout     every scene has a held-out composition, instead of none
    any_order   share of T2I captions that name the objects in another than reading order
    questions   share of IT2T samples that ask about one fact; the others ask for a caption
    """
    tasks = {"t2t", "t2i", "it2t"}

    def __init__(self, seed: int, size: int | tuple[int, int] = 32, pool: int = 20000, heldout: bool = False,
                 any_order: float = 0.0, questions: float = 0.5):
        if pool < 1:
            raise ValueError(f"got a pool of {pool} scenes, expected at least 1")
        self.seed, self.num_images, self.heldout = seed, pool, heldout
        self.any_order, self.questions = any_order, questions
        self.hw = sides(size)
        self._scenes: list[scenes.Scene | None] = [None] * pool
        self._pixels = np.zeros((pool, *self.hw, 3), np.uint8)                              # (n, H, W, 3)
        self._rendered = np.zeros(pool, bool)                                               # (n,)

    def scene_of(self, index: int) -> scenes.Scene:
        """The scene graph of a picture."""
        if self._scenes[index] is None:
            self._scenes[index] = scenes.sample_scene(rng(self.seed, index, SCENE), heldout=self.heldout)
        return self._scenes[index]

    def image_hw(self, index: int) -> tuple[int, int]:
        return self.hw

    def images(self, indices: Iterable[int]) -> list[np.ndarray]:
        """uint8 (H, W, 3) each."""
        indices = [int(i) for i in indices]
        for i in indices:
            if not self._rendered[i]:
                self._pixels[i] = scenes.render(self.scene_of(i), self.hw)
                self._rendered[i] = True
        return [self._pixels[i] for i in indices]

    def _pick(self, k: int) -> int:
        return int(rng(self.seed, k, PICK).integers(self.num_images))

    def t2t(self, k: int) -> str:
        return scenes.story(self.scene_of(self._pick(k)), rng(self.seed, k, CAPTION))

    def t2i(self, k: int) -> tuple[str, int]:
        index, words = self._pick(k), rng(self.seed, k, CAPTION)
        return scenes.caption(self.scene_of(index), words, any_order=words.random() < self.any_order), index

    def it2t(self, k: int) -> tuple[str, int, str]:
        index, words = self._pick(k), rng(self.seed, k, CAPTION)
        if words.random() < self.questions:
            prompt, answer = scenes.question(self.scene_of(index), words)
        else:
            prompt, answer = str(words.choice(DESCRIBE)), scenes.caption(self.scene_of(index), words)
        return prompt, index, answer

    def corpus(self, n: int) -> list[str]:
        return [*DESCRIBE, *scenes.corpus(rng(self.seed, 0, CORPUS), n)]


# ------------------------------------------------------------------------------------------ checked reading
MAX_PIXELS = 50_000_000         # of one picture as stored: 200 MB as RGBA
MAX_FILE = 1 << 28              # bytes of one picture as stored
MAX_LINE = 1 << 24              # bytes of one caption, or of one line of a .jsonl
MAX_UNPACKED = 1 << 34          # bytes of text out of .gz and .jsonl; they lie in an unnamed temporary file
CACHE_BYTES = 1 << 28           # decoded pixels kept in memory
# No EPS (Pillow hands it to Ghostscript, which runs programs) and nothing exotic.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
IMAGE_NAMES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2")


def note(line: str) -> None:
    """One line for the user, from the first worker only."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr)


def clean_text(raw: bytes | str | None, where: str) -> str:
    """The stripped text. ValueError when it is not UTF-8, empty, or longer than MAX_LINE."""
    if not isinstance(raw, (bytes, str)):
        raise ValueError(f"{where}: got {type(raw).__name__}, expected a text; give the row a string")
    if len(raw) > MAX_LINE:
        raise ValueError(f"{where}: a text of more than {MAX_LINE >> 20} MiB; split it, or check that it is one")
    try:
        text = (raw.decode("utf-8-sig") if isinstance(raw, bytes) else raw).strip()
        text.encode()                           # JSON can spell half a surrogate pair, which no file can hold
    except UnicodeError as error:
        raise ValueError(f"{where}: not UTF-8 at byte {error.start}; convert it, e.g. with iconv -t utf-8") from None
    if not text:
        raise ValueError(f"{where}: the text is empty; write one or take the row out")
    return text


def parse_json(raw: bytes, where: str) -> dict:
    try:
        row = json.loads(raw)
    except (ValueError, RecursionError) as error:           # UnicodeDecodeError is a ValueError
        reason = f"not UTF-8 at byte {error.start}" if isinstance(error, UnicodeError) else "not valid JSON"
        raise ValueError(f"{where}: {reason}; expected one JSON object in UTF-8") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: got a JSON {type(row).__name__}, expected an object like {{\"text\": \"...\"}}")
    return row


def json_lines(file: BinaryIO, name: str) -> Iterator[tuple[str, dict]]:
    """(where, row) of each line that is not blank; `where` is for messages."""
    number = 0
    while line := file.readline(MAX_LINE + 1):
        number += 1
        if len(line) > MAX_LINE:
            raise ValueError(f"{name}:{number}: a line of more than {MAX_LINE >> 20} MiB; expected one row a line")
        if line.strip():
            yield f"{name}:{number}", parse_json(line, f"{name}:{number}")


def caption_of(row: dict, where: str) -> str:
    return clean_text(row.get("text", row.get("caption")), f'{where}, field "text"')


def inside(root: str, name: str) -> str:
    """Real path of `name` in the folder `root` (itself a real path). ValueError when it leads out of it."""
    real = os.path.realpath(os.path.join(root, name))
    if os.path.isabs(name) or not real.startswith(root.rstrip(os.sep) + os.sep):
        raise ValueError(f"{name!r} leads out of the folder {root}; copy the file into it and name it relative to it")
    return real


# -------------------------------------------------------------------------------------------------- pixels
def sides(size: int | tuple[int, int]) -> tuple[int, int]:
    """(H, W) of a size given as one side or as both."""
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 1:
        raise ValueError(f"got image size {height} x {width}, expected sides >= 1")
    return height, width


def buckets(size: int, multiple: int, max_ratio: float = 2.0) -> list[tuple[int, int]]:
    """(H, W) of the aspect ratios up to max_ratio, both sides multiples, H W as near size^2 as fits below it."""
    if size % multiple:
        raise ValueError(f"got image size {size}, expected a multiple of {multiple}; "
                         f"nearest: {max(size // multiple, 1) * multiple} or {(size // multiple + 1) * multiple}")
    low = range(size, 0, -multiple)
    flat = [(side, size * size // side // multiple * multiple) for side in low if size**2 <= max_ratio * side**2]
    return sorted({hw for height, width in flat for hw in ((height, width), (width, height))})


def open_image(raw: bytes, shapes: list[tuple[int, int]]) -> tuple[Image.Image, tuple[int, int]]:
    """The picture, header read and not yet decoded, and the (H, W) among `shapes` nearest to its aspect ratio."""
    try:
        image = Image.open(io.BytesIO(raw), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise Image.DecompressionBombError
        turned = image.getexif().get(0x0112) in (5, 6, 7, 8)            # EXIF orientation: lying on its side
    except UnidentifiedImageError:
        raise ValueError("not an image of a known format") from None
    except Image.DecompressionBombError:
        raise ValueError(f"more than {MAX_PIXELS // 10**6} megapixels; scale it down") from None
    except Exception as error:                  # Pillow's parsers raise nearly every type on a damaged file
        raise ValueError(f"damaged ({type(error).__name__}: {error})") from None
    ratio = image.height / image.width if turned else image.width / image.height
    return image, min(shapes, key=lambda hw: abs(np.log(hw[1] / hw[0] / ratio)))


def decode(raw: bytes, shapes: list[tuple[int, int]]) -> np.ndarray:
    """Encoded picture -> uint8 (H, W, 3), scaled and centre-cropped to the nearest of `shapes`.

    The first frame, turned as EXIF says, in RGB over white. ValueError when it is no picture, damaged or too large."""
    image, (height, width) = open_image(raw, shapes)
    try:
        image.draft(None, (2 * max(height, width),) * 2)                # lets JPEG skip detail it would lose anyway
        image = to_rgb(ImageOps.exif_transpose(image))
        return np.asarray(ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS))   # (H, W, 3)
    except Exception as error:                  # see open_image
        raise ValueError(f"damaged ({type(error).__name__}: {error})") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode -> RGB: alpha over white; 16-bit, 32-bit and float gray are scaled, where Pillow would clip."""
    if image.mode[0] in "IF":                                           # I;16, I;16B, I, F
        gray = np.nan_to_num(np.asarray(image).astype(np.float32))
        white = 65535 if image.mode[0] == "I" else 1 if gray.max() <= 1 else 255
        gray = np.where(gray == image.info.get("transparency"), white, gray) * (255 / white)
        return Image.fromarray(gray.clip(0, 255).round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:             # an alpha channel, or a colour declared transparent
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


# ------------------------------------------------------------------------------------------ image-text data
class Item(NamedTuple):
    """One captioned picture: bytes [offset, offset + size) of the file `path`."""
    name: str                   # for messages: the file, or shard:member
    path: str
    offset: int
    size: int
    text: str


def find_items(path: str, left_out: list[str]) -> Iterator[Item]:
    """Items of a folder, a .jsonl or a .tar, in a fixed order; what has no caption or a bad name goes to left_out."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path} does not exist; expected a folder of images, a .jsonl or a .tar")
    if os.path.isfile(path) and path.endswith(".tar"):
        yield from tar_items(path, left_out)
    elif os.path.isfile(path) and path.endswith(".jsonl"):
        yield from jsonl_items(path, os.path.realpath(os.path.dirname(path) or "."))
    elif os.path.isdir(path):
        root = os.path.realpath(path)
        tables = [name for name in ("metadata.jsonl", "captions.jsonl") if os.path.lexists(os.path.join(root, name))]
        shards = sorted(name for name in os.listdir(root) if name.endswith(".tar"))
        if tables:
            yield from jsonl_items(inside(root, tables[0]), root)
        elif shards:
            for name in shards:
                yield from tar_items(inside(root, name), left_out)
        else:
            yield from pair_items(root, left_out)
    else:
        raise ValueError(f"{path} is neither a folder nor a .jsonl nor an uncompressed .tar; give one of these")


def jsonl_items(path: str, root: str) -> Iterator[Item]:
    """Rows {"file_name" or "file": name relative to root, "text": caption}."""
    with open(path, "rb") as file:
        for where, row in json_lines(file, path):
            name = row.get("file_name", row.get("file"))
            if not isinstance(name, str) or not name or "\0" in name:
                raise ValueError(f'{where}: got no file name, expected {{"file_name": "a.png", "text": "..."}}')
            real = inside(root, name)
            if not os.path.isfile(real):
                raise FileNotFoundError(f"{where}: there is no file {name!r} in {root}; add it or take the row out")
            yield Item(name, real, 0, os.path.getsize(real), caption_of(row, where))


def pair_items(root: str, left_out: list[str]) -> Iterator[Item]:
    """a.png with a.txt beside it, in all subfolders."""
    for folder, subfolders, names in os.walk(root):
        subfolders.sort()
        for name in sorted(names):
            stem, ending = os.path.splitext(os.path.join(folder, name))
            shown = os.path.relpath(stem + ending, root)
            if ending.lower() not in IMAGE_NAMES:
                continue
            if not os.path.isfile(stem + ".txt"):
                left_out.append(f"{shown} (no .txt beside it)")
                continue
            with open(inside(root, os.path.relpath(stem, root) + ".txt"), "rb") as file:
                text = clean_text(file.read(MAX_LINE + 1), stem + ".txt")
            real = inside(root, shown)
            yield Item(shown, real, 0, os.path.getsize(real), text)


def tar_items(path: str, left_out: list[str]) -> Iterator[Item]:
    """WebDataset: members of one name up to the first dot are one sample, 0007.jpg with 0007.txt or 0007.json."""
    pictures, texts = {}, {}                    # key -> (name, offset, size), key -> caption
    total = os.path.getsize(path)
    with open(path, "rb") as file:
        for member in tar_members(file, path):
            name = f"{path}:{member.name}"
            folder, _, base = member.name.rpartition("/")
            key, _, ending = base.partition(".")
            key = f"{folder}/{key}"
            if member.isdir():
                continue
            if not member.isreg() or member.issparse() or member.name.startswith("/") or ".." in member.name.split("/"):
                left_out.append(f"{name} (a link, a special file, or a name that leads out)")
            elif member.offset_data + member.size > total:
                raise ValueError(f"{path} is truncated: {member.name!r} should end at byte "
                                 f"{member.offset_data + member.size} of {total}; copy the shard again")
            elif f".{ending.lower()}" in IMAGE_NAMES:
                pictures[key] = (name, member.offset_data, member.size)
            elif ending in ("txt", "json"):
                position = file.tell()
                file.seek(member.offset_data)
                raw = file.read(min(member.size, MAX_LINE + 1))
                file.seek(position)
                texts[key] = clean_text(raw, name) if ending == "txt" else caption_of(parse_json(raw, name), name)
    for key, (name, offset, size) in pictures.items():
        if key in texts:
            yield Item(name, path, offset, size, texts[key])
        else:
            left_out.append(f"{name} (no .txt or .json of that name)")


def tar_members(file: BinaryIO, path: str) -> Iterator[tarfile.TarInfo]:
    """Headers of an uncompressed tar. ValueError when it is damaged: tarfile alone would take that for its end."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                if member.size < 0:
                    raise tarfile.TarError("a negative size")
                yield member
                tar.members.clear()             # tarfile would keep 1 KB for each
            file.seek(tar.offset)
            if any(file.read(512)):
                raise tarfile.TarError(f"no header at byte {tar.offset}")
    except (tarfile.TarError, EOFError, OverflowError, MemoryError, RecursionError) as error:
        raise ValueError(f"{path} is not a complete uncompressed tar ({error}); copy or pack the shard again") from None


class ImageText:
    """Captioned pictures on disk: imagefolder, captions.jsonl, same-named .txt, WebDataset shards, or lists of them.

    size        side in pixels, or (H, W)
    aspect      sort the pictures into buckets(size, multiple) instead of cropping all to one shape
    strict      a picture that cannot be used is an error, not left out
    Errors (ValueError, OSError): see find_items; no usable picture at all. Sets that fit CACHE_BYTES are decoded at
    the start; of larger ones the headers are checked, and a picture found damaged later is replaced by the next of
    its bucket, with its own caption.
    """
    tasks = {"t2t", "t2i", "it2t"}

    def __init__(self, paths: str | Path | Sequence[str | Path], seed: int = 0, size: int | tuple[int, int] = 32,
                 aspect: bool = False, multiple: int = 8, strict: bool = False):
        paths = [str(path) for path in ([paths] if isinstance(paths, (str, Path)) else paths)]
        self.seed, self.strict, self.shapes = seed, strict, [sides(size)]
        if aspect:
            if not isinstance(size, int):
                raise ValueError(f"got image size {size} with aspect buckets, expected one side: the buckets vary it")
            self.shapes = buckets(size, multiple)
        self.left_out: list[str] = []
        items = [item for path in paths for item in find_items(path, self.left_out)]
        fits = CACHE_BYTES // max(3 * height * width for height, width in self.shapes)
        self._pixels = functools.lru_cache(max(fits, 64))(self._load)
        check = self._pixels if len(items) <= fits else self._header
        with ThreadPoolExecutor(4) as threads:  # Pillow decodes outside the interpreter's lock
            found = list(tqdm(threads.map(check, items), "checking images", len(items), leave=False, delay=2))
        self.items = [item for item, got in zip(items, found) if not isinstance(got, str)]
        self._hw = [got.shape[:2] if isinstance(got, np.ndarray) else got for got in found if not isinstance(got, str)]
        self.num_images = len(self.items)
        self.left_out += [f"{item.name} ({got})" for item, got in zip(items, found) if isinstance(got, str)]
        if self.left_out:
            some = ", ".join(self.left_out[:3]) + (", ..." if len(self.left_out) > 3 else "")
            line = f"{len(self.left_out)} of {len(self.left_out) + self.num_images} images cannot be used: {some}"
            if strict or not self.items:
                raise ValueError(f"{line}; repair or remove them" + (", or drop --strict_data" if self.items else ""))
            note(f"left out: {line}")
        if not self.items:
            raise ValueError(f"no captioned image in {', '.join(paths)}; expected metadata.jsonl or captions.jsonl, "
                             "same-named .txt files, or .tar shards")

    @staticmethod
    def _read(item: Item, limit: int) -> bytes:
        try:
            with open(item.path, "rb") as file:
                file.seek(item.offset)
                raw = file.read(min(item.size, limit))
        except OSError as error:
            raise OSError(f"{item.path} can no longer be read ({error.strerror}); restore it and resume") from None
        if len(raw) < min(item.size, limit):
            raise OSError(f"{item.path} is shorter than when it was indexed; restore it and resume")
        return raw

    def _load(self, item: Item) -> np.ndarray | str:
        """Pixels (H, W, 3), or why there are none."""
        try:
            if item.size > MAX_FILE:
                raise ValueError(f"a file of more than {MAX_FILE >> 20} MiB")
            return decode(self._read(item, MAX_FILE), self.shapes)
        except ValueError as error:
            return str(error)

    def _header(self, item: Item) -> tuple[int, int] | str:
        """The bucket (H, W), or why there is none. Most formats tell within the first 64 KiB."""
        for limit in (1 << 16, MAX_FILE):
            try:
                return open_image(self._read(item, limit), self.shapes)[1]
            except ValueError as error:
                reason = str(error)
                if item.size <= limit:
                    break
        return reason

    def _usable(self, index: int) -> int:
        """index, or the next of the same bucket whose picture is whole."""
        for step in range(self.num_images):
            other = (index + step) % self.num_images
            if self._hw[other] == self._hw[index]:
                pixels = self._pixels(self.items[other])
                if isinstance(pixels, np.ndarray) and pixels.shape[:2] == self._hw[index]:
                    return other
                self._damaged(self.items[other], pixels)
        raise ValueError("no picture of this shape can be decoded any more; check the disk and the files")

    def _damaged(self, item: Item, reason: np.ndarray | str) -> None:
        line = f"{item.name} ({reason if isinstance(reason, str) else 'changed since it was indexed'})"
        if self.strict:
            raise ValueError(f"{line}; repair or remove it, or drop --strict_data")
        if line not in self.left_out:
            self.left_out.append(line)
            note(f"left out from now on: {line}, {len(self.left_out)} in all")

    def image_hw(self, index: int) -> tuple[int, int]:
        return self._hw[index]

    def images(self, indices: Iterable[int]) -> list[np.ndarray]:
        """uint8 (H, W, 3) each, read-only."""
        return [self._pixels(self.items[self._usable(int(index))]) for index in indices]

    def t2t(self, k: int) -> str:
        return self.items[order(self.seed, k, self.num_images)].text

    def t2i(self, k: int) -> tuple[str, int]:
        index = self._usable(order(self.seed, k, self.num_images))
        return self.items[index].text, index

    def it2t(self, k: int) -> tuple[str, int, str]:
        caption, index = self.t2i(k)
        return DESCRIBE[0], index, caption

    def corpus(self, n: int) -> list[str]:
        return [DESCRIBE[0], *(self.t2t(k) for k in range(min(n, self.num_images)))]


# --------------------------------------------------------------------------------------------------- texts
END_TEXT = b"<|endoftext|>"     # between documents; a file without it is one document


def find_documents(file: BinaryIO, name: str, begin: int = 0) -> Iterator[tuple[int, int]]:
    """Byte ranges [start, end) of the documents from `begin` on, blank borders cut off; 1 MiB is held at a time.

    ValueError naming the byte when the text is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    file.seek(begin)
    at, rest, start, end = begin, b"", None, None       # rest = bytes from position `at` on, not yet looked at
    while True:
        chunk = file.read(1 << 20)
        pending = len(decoder.getstate()[0])
        try:
            decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            raise ValueError(f"{name}: not UTF-8 at byte {at + len(rest) - pending + error.start - begin}; "
                             "convert it, e.g. with iconv -t utf-8") from None
        *closed, rest = (rest + chunk).split(END_TEXT)
        keep = len(END_TEXT) - 1 if chunk else 0        # the separator may lie across two chunks
        closed.append(rest[:len(rest) - keep] if keep else rest)
        rest = rest[len(rest) - keep:] if keep else b""
        for number, piece in enumerate(closed):
            if piece.strip():
                start = at + len(piece) - len(piece.lstrip()) if start is None else start
                end = at + len(piece.rstrip())
            at += len(piece)
            if number < len(closed) - 1:
                at += len(END_TEXT)
            if start is not None and (number < len(closed) - 1 or not chunk):
                yield start, end
                start = None
        if not chunk:
            return


class TextFiles:
    """Texts on disk: .txt, or .jsonl with a field "text", each also as .gz.

    Sample k is a window that begins at a paragraph, sentence or word and holds, where its document does, enough
    for seq_len tokens (12 bytes a token; English takes 4 to 5). Windows move by half a stride at random; an epoch
    covers the text once. .txt is read in place, the others are unpacked once to an unnamed temporary file (TMPDIR).
    """
    tasks, num_images = {"t2t"}, 0

    def __init__(self, paths: str | Path | Sequence[str | Path], seed: int = 0, seq_len: int = 256):
        self.paths = [str(path) for path in ([paths] if isinstance(paths, (str, Path)) else paths)]
        self.seed, self.stride = seed, 4 * seq_len
        self._unpacked = tempfile.TemporaryFile()
        found = array("q")                              # file, start, end of each document; file -1: unpacked
        for number, path in enumerate(self.paths):
            before = len(found)
            for start, end in self._documents(path):
                found.extend((number if path.endswith(".txt") else -1, start, end))
            if len(found) == before:
                raise ValueError(f"{path} holds no text; give another file")
        if not found:
            raise ValueError("got no text file, expected at least one")
        self._docs = np.frombuffer(found, np.int64).reshape(-1, 3)                          # (n, 3)
        windows = -(-(self._docs[:, 2] - self._docs[:, 1]) // self.stride)                  # (n,)
        self._first = np.concatenate([[0], np.cumsum(windows)])                             # (n + 1,)
        self.num_windows = int(self._first[-1])

    def _documents(self, path: str) -> Iterator[tuple[int, int]]:
        plain = path.removesuffix(".gz")
        if not plain.endswith((".txt", ".jsonl")):
            raise ValueError(f"got the text file {path}, expected .txt, .txt.gz, .jsonl or .jsonl.gz")
        if not os.path.isfile(path):
            raise FileNotFoundError(f"the text file {path} does not exist or is no regular file; check the path")
        with open(path, "rb") as file:
            if path.endswith(".txt"):
                yield from find_documents(file, path, 3 if file.read(3) == codecs.BOM_UTF8 else 0)
                return
            begin = self._unpacked.seek(0, os.SEEK_END)
            try:
                source = gzip.GzipFile(fileobj=file) if plain != path else file
                if plain.endswith(".txt"):
                    pieces = iter(lambda: source.read(1 << 20), b"")
                else:
                    pieces = (caption_of(row, where).encode() + END_TEXT for where, row in json_lines(source, path))
                for piece in pieces:
                    if self._unpacked.tell() + len(piece) > MAX_UNPACKED:
                        raise ValueError(f"{path} unpacks to more than {MAX_UNPACKED >> 30} GiB; give plain .txt files")
                    self._unpacked.write(piece)
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                raise ValueError(f"{path} is not a complete gzip file ({error}); copy it again") from None
            self._unpacked.flush()
            yield from find_documents(self._unpacked, path, begin)

    def _text(self, file: int, start: int, end: int) -> str:
        if file < 0:
            raw = os.pread(self._unpacked.fileno(), end - start, start)
        else:
            with open(self.paths[file], "rb") as source:
                raw = os.pread(source.fileno(), end - start, start)
        if len(raw) < end - start:
            raise OSError(f"{self.paths[file]} is shorter than when it was indexed; restore it and resume")
        return raw.decode("utf-8", errors="ignore")     # only characters cut by the window's borders are lost

    def t2t(self, k: int) -> str:
        window = order(self.seed, k, self.num_windows)
        doc = int(np.searchsorted(self._first, window, side="right")) - 1
        file, start, end = map(int, self._docs[doc])
        shift = window - int(self._first[doc]) + rng(self.seed, k, WINDOW).random() - 0.5
        at = max(start, min(start + int(shift * self.stride), end - self.stride))
        text = self._text(file, at, min(end, at + 4 * self.stride))
        if at > start:
            head = text[:self.stride]
            for border in (r"\n\s*", r"[.!?][\"')\]]*\s+", r"\s+"):
                if (found := re.search(border, head)) and text[found.end():]:
                    text = text[found.end():]
                    break
        return text

    def corpus(self, n: int) -> list[str]:
        return [self.t2t(k) for k in range(min(n, self.num_windows))]


# ------------------------------------------------------------------------------------------------- mixture
class Mixture:
    """Pictures and captions from one dataset, texts (t2t) from another."""

    def __init__(self, pictures: ImageText | GeneratedScenes, texts: TextFiles):
        self.pictures, self.texts = pictures, texts
        self.tasks, self.num_images = pictures.tasks | texts.tasks, pictures.num_images
        self.t2t = texts.t2t
        self.t2i, self.it2t = pictures.t2i, pictures.it2t
        self.images, self.image_hw = pictures.images, pictures.image_hw

    def corpus(self, n: int) -> list[str]:
        return self.pictures.corpus(n // 2) + self.texts.corpus(n - n // 2)


def open_data(seed: int, data: Sequence[str] = (), text: Sequence[str] = (), size: int | tuple[int, int] = 32,
              seq_len: int = 256, aspect: bool = False, multiple: int = 8, strict: bool = False, **generated
              ) -> GeneratedScenes | ImageText | TextFiles | Mixture:
    """What --data and --text ask for; generated scenes when they ask for nothing (`generated`: their settings).

    Captions serve as texts when there are no others; texts alone serve t2t alone."""
    if not data and not text:
        return GeneratedScenes(seed, size, **generated)
    pictures = ImageText(data, seed, size, aspect, multiple, strict) if data else None
    texts = TextFiles(text, seed, seq_len) if text else None
    return Mixture(pictures, texts) if pictures and texts else pictures or texts
