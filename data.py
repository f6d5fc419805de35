"""Data: generated scenes, folders and shards of captioned pictures, text files, and the tokenizer.

    sample k of a run = f(seed, k)        rng(seed, k, purpose) is the only source of randomness

Every dataset answers the same calls, so that resuming, or another number of workers, changes nothing:
    t2t(k) -> text                it2t(k) -> (prompt, image, answer)    image_hw(image) -> (H, W)
    t2i(k) -> (caption, image)    images([image, ...]) -> pixels        corpus(n) -> texts for a tokenizer
`image` is an index below num_images; `tasks` names what a dataset can serve. Real data is read in epochs:
sample k is item permutation(k // n)[k % n]. Files are hostile until checked: nothing outside the given folder
is opened, nothing is unpacked to a named file, sizes meet a limit before memory is taken, and no format that
can run a program is accepted. Memory holds captions and offsets, pixels up to CACHE_BYTES, and no texts.

Shapes: H, W sides of a picture in pixels, n items.    Run: python data.py   (CPU, 2 s)
"""
import codecs
import functools
import gzip
import heapq
import io
import itertools
import json
import math
import os
import re
import sys
import tarfile
import tempfile
import warnings
import zlib
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import regex                                    # comes with tiktoken; the standard re has no \p{L}
import tiktoken
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

import scenes

# ---------------------------------------------------------------------------------------------- randomness
# What a random number is for. Appending is safe; changing a number changes every run.
(TASK, ORDER, SCENE, PICK, CAPTION, WINDOW, CORPUS, DROP, TIME, NOISE, POSTERIOR, MASK, INIT, EVAL,
 SAMPLE) = range(15)


SEEDS = 1 << 56                 # a run's seed lies below, that of its evaluation as far above it; a key is
                                # seed * 64 + purpose, of at most 63 bits


class Key(np.random.bit_generator.ISeedSequence):
    """Two words that are the key of a Philox generator. Given as Philox(key=..), numpy would first gather, and
    then not use, entropy from the system: three times the time, and a step makes hundreds of generators."""
    def __init__(self, *words: int):
        self.words = words

    def generate_state(self, n_words: int, dtype: type) -> np.ndarray:
        return np.array(self.words, dtype)             # Philox asks for two of 64 bits


def rng(seed: int, k: int, purpose: int) -> np.random.Generator:
    """Generator of (seed, k, purpose) alone: counter-based, so sample k needs none of those before it."""
    if not 0 <= seed < 2 * SEEDS or k < 0:
        raise ValueError(f"got seed {seed} and sample number {k}, expected both >= 0, the seed below 2^57")
    return np.random.Generator(np.random.Philox(Key(seed * 64 + purpose, k)))


@functools.lru_cache(maxsize=4)                 # two datasets, each at the border of two epochs
def permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    return rng(seed, epoch, ORDER).permutation(np.arange(n, dtype=np.int32))                # (n,)


def order(seed: int, k: int, n: int) -> int:
    """Which of n items sample k is: every item once in an epoch of n samples."""
    return int(permutation(seed, k // n, n)[k % n])


# ----------------------------------------------------------------------------------------------- tokenizer
# GPT-2's idea: a word takes the space before it, so " red" can be one token; of more spaces the last is left
# to the word. Every run is bounded, which keeps the time linear for any input.
PATTERN = (r"'(?:[sdmt]|ll|ve|re)| ?[\p{L}\p{M}]{1,32}| ?\p{N}{1,3}| ?[^\s\p{L}\p{M}\p{N}]{1,16}"
           r"|\s{1,16}(?!\S)|\s")


ALL_KINDS = (["ByteLevel"], ["Split", "ByteLevel"])      # how a tokenizer.json that is read here splits
SPLITS = (("Isolated", False), ("Removed", True))        # behavior and invert: each match is a piece
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def byte_letters() -> dict[int, str]:
    """The letter by which a tokenizer.json writes each byte: itself if it can be seen, else one from 256 on."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    unseen = [b for b in range(256) if b not in seen]
    return {b: chr(b) for b in seen} | {b: chr(256 + i) for i, b in enumerate(unseen)}


class Tokenizer:
    """Byte-level BPE: any text <-> ids. `end` both ends and fills a text; no text can spell it."""

    def __init__(self, encoding: tiktoken.Encoding):
        self.encoding = encoding
        self.end = encoding.eot_token
        self.n_vocab = encoding.n_vocab         # with the end; named encodings leave some ids unused

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without an end token. ValueError where the pattern of a forged tokenizer fails on it."""
        try:
            return self.encoding.encode(text, disallowed_special=())
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:          # tiktoken's panics are no Exceptions
            raise ValueError(f"the tokenizer's pattern fails on {text[:20]!r} ({type(error).__name__})") from None

    def decode(self, ids: Iterable[int]) -> str:
        """Text up to the first end token. Bytes that are not UTF-8, and unused ids, come out as U+FFFD."""
        out = []
        for i in itertools.takewhile(lambda i: i != self.end, map(int, ids)):
            try:
                out.append(self.encoding.decode_single_token_bytes(i))
            except KeyError:
                out.append("\ufffd".encode())
        return b"".join(out).decode("utf-8", errors="replace")

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Merge the most frequent pair of tokens again and again, up to vocab_size ids with the end token;
        fewer when no pair occurs twice. Ties go to the older tokens: equal texts give equal tokenizers."""
        if vocab_size < 257:
            raise ValueError(f"got a vocabulary of {vocab_size}, expected >= 257: all bytes and the end")
        words = Counter(word for text in texts for word in regex.findall(PATTERN, text))
        spelled, count = [list(word.encode("utf-8", "replace")) for word in words], list(words.values())
        tokens = [bytes([i]) for i in range(256)]
        number = {token: i for i, token in enumerate(tokens)}
        pairs, where = Counter(), defaultdict(set)              # how often a pair occurs, and in which words
        for w, ids in enumerate(spelled):
            for pair in zip(ids, ids[1:]):
                pairs[pair] += count[w]
                where[pair].add(w)
        heap = [(-times, pair) for pair, times in pairs.items()]
        heapq.heapify(heap)
        while heap and len(tokens) < vocab_size - 1:
            times, pair = heapq.heappop(heap)
            if pairs[pair] < 2:
                continue
            if pairs[pair] != -times:                           # it fell when a neighbour merged: queue again
                heapq.heappush(heap, (-pairs[pair], pair))
                continue
            token = tokens[pair[0]] + tokens[pair[1]]
            new = number.setdefault(token, len(tokens))         # a+bc and ab+c are one token
            tokens += [token] * (new == len(tokens))
            risen = set()
            for w in where.pop(pair):
                old, spelled[w] = spelled[w], _merge(spelled[w], pair, new)
                for other in zip(old, old[1:]):
                    pairs[other] -= count[w]
                for other in zip(spelled[w], spelled[w][1:]):
                    pairs[other] += count[w]
                    if new in other:
                        where[other].add(w)
                        risen.add(other)
            for other in risen:
                heapq.heappush(heap, (-pairs[other], other))
        return cls._of_tokens(tokens, PATTERN, {END_TEXT.decode(): len(tokens)})

    @classmethod
    def _of_tokens(cls, tokens: list[bytes], pattern: str, special: dict[str, int]) -> "Tokenizer":
        ranks = {token: i for i, token in enumerate(tokens)}
        return cls(tiktoken.Encoding("bpe", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special))

    @classmethod
    def named(cls, name: str) -> "Tokenizer":
        """One of tiktoken's own encodings, such as cl100k_base; the first use downloads it."""
        if name not in tiktoken.list_encoding_names():
            raise ValueError(f"got tokenizer {name!r}, expected one of {tiktoken.list_encoding_names()}")
        try:
            return cls(tiktoken.get_encoding(name))
        except OSError as error:                # requests' errors are OSErrors with many lines
            raise OSError(f"cannot fetch the encoding {name} ({type(error).__name__}); go online once, point "
                          "TIKTOKEN_CACHE_DIR at a folder that has it, or train a tokenizer") from None

    def to_dict(self) -> dict:
        """Plain types for a checkpoint; in the strings each character is one byte."""
        if self.encoding.name != "bpe":
            return {"name": self.encoding.name}
        return {"name": "bpe", "tokens": [token.decode("latin-1") for token in self.tokens()],
                "pattern": self.encoding._pat_str, "special": dict(self.encoding._special_tokens)}

    def tokens(self) -> list[bytes]:
        """All that merging makes, by id; special tokens come behind."""
        return [self.encoding.decode_single_token_bytes(i) for i in range(len(self.encoding._mergeable_ranks))]

    @classmethod
    def from_dict(cls, state: dict) -> "Tokenizer":
        """Inverse of to_dict. ValueError for anything it cannot have written."""
        name = state.get("name") if isinstance(state, dict) else None
        if isinstance(name, str) and name != "bpe":
            return cls.named(name)
        try:
            special = state["special"]          # a forged tensor may claim to have as many values as it likes
            if not isinstance(state["tokens"], list) or not isinstance(state["pattern"], str) or \
                    not isinstance(special, dict) or not all(type(i) is int for i in special.values()):
                raise ValueError("other types")
            tokens = [token.encode("latin-1") for token in state["tokens"]]
            if not {bytes([i]) for i in range(256)} <= {*tokens} or len({b"", *tokens}) != len(tokens) + 1:
                raise ValueError("not all bytes, or a token twice")
            if END_TEXT.decode() not in special or min(special.values()) < len(tokens):
                raise ValueError("no end token behind the others")
            if regex.search(state["pattern"], "", timeout=1):
                raise ValueError("a pattern that matches nothing at all")
            return cls._of_tokens(tokens, state["pattern"], special)
        except Exception as error:             # a pattern that tiktoken refuses is a plain exception
            raise ValueError(f"the tokenizer is not one that Tokenizer.to_dict wrote ({error!r:.80}); use another "
                             "checkpoint") from None

    @classmethod
    def from_file(cls, path: str | Path) -> "Tokenizer":
        """A byte-level BPE tokenizer.json, as tiktoken has it. ValueError, naming the file, for anything else,
        and where ids do not rise in the order of merges, which is how tiktoken ranks them."""
        try:
            state = read_json(path, 1 << 25)
            model, pre = state["model"], state["pre_tokenizer"]
            added = {token["content"]: token["id"] for token in state["added_tokens"]}
            vocab = {word: i for word, i in model["vocab"].items() if word not in added}
            merges = ["".join(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]
            steps = pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
            kinds, last = [step["type"] for step in steps], steps[-1]
            byte = {letter: b for b, letter in byte_letters().items()}
            words = sorted(vocab, key=vocab.get)
            tokens = [bytes(byte[letter] for letter in word) for word in words]
            if model["type"] != "BPE" or state.get("normalizer") or kinds not in ALL_KINDS:
                raise ValueError(f"{model['type']} with normalizer {state.get('normalizer')} behind {kinds}; only "
                                 "a byte-level BPE that splits by one pattern, or by GPT-2's, is read here")
            if len(steps) == 2 and (steps[0]["behavior"], steps[0].get("invert", False)) not in SPLITS or \
                    model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
                raise ValueError("text between matches is dropped, or tokens have affixes")
            if last["add_prefix_space"] or last.get("use_regex", True) != (len(steps) == 1):
                raise ValueError("a space before the text, or two patterns")
            if [vocab[word] for word in words] != list(range(len(words))):
                raise ValueError("its ids have gaps")
            ranks = [vocab[word] for word in merges if word in vocab]
            if ranks != sorted(ranks):
                raise ValueError("its ids do not rise in the order of merges")
            pattern = steps[0]["pattern"]["Regex"] if len(steps) == 2 else GPT2_PATTERN
        except OSError:
            raise
        except Exception as error:
            raise ValueError(f"{path}: not a byte-level BPE tokenizer.json ({error!r:.200})") from None
        return cls.from_dict({"name": "bpe", "tokens": [token.decode("latin-1") for token in tokens],
                              "pattern": pattern, "special": added})

    def save(self, path: str | Path) -> None:
        """Write a tokenizer.json that from_file reads back."""
        letters, tokens = byte_letters(), self.tokens()
        ranks = {token: i for i, token in enumerate(tokens)}
        word = ["".join(letters[b] for b in token) for token in tokens]
        merges = []
        for i, token in enumerate(tokens):      # a token is the pair that merging it without itself ends with
            if len(token) > 1:
                parts = [token[j:j + 1] for j in range(len(token))]
                while len(parts) > 2:
                    pairs = [a + b for a, b in zip(parts, parts[1:])]
                    rank, j = min((ranks.get(pair, i), j) for j, pair in enumerate(pairs))
                    if rank >= i:
                        raise ValueError(f"token {token!r} cannot be merged from earlier ones")
                    parts[j:j + 2] = [parts[j] + parts[j + 1]]
                merges.append([word[ranks[part]] for part in parts])
        special = [{"id": i, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
                    "normalized": False, "special": True} for name, i in self.encoding._special_tokens.items()]
        split = {"type": "Split", "pattern": {"Regex": self.encoding._pat_str}, "behavior": "Isolated",
                 "invert": False}
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        bpe = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
               "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
               "vocab": {w: i for i, w in enumerate(word)}, "merges": merges}
        state = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": special,
                 "normalizer": None, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
                 "post_processor": None, "decoder": level, "model": bpe}
        Path(path).write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")


def _merge(ids: list[int], pair: tuple[int, int], new: int) -> list[int]:
    out, i = [], 0
    while i < len(ids):
        both = ids[i] == pair[0] and i + 1 < len(ids) and ids[i + 1] == pair[1]
        out.append(new if both else ids[i])
        i += 1 + both
    return out


def pad_to_multiple(ids: Sequence[int], multiple: int, end: int, ended: bool = True) -> list[int]:
    """ids, then end tokens up to a multiple. `ended` asks for at least one: a text that exactly fills its
    last block would otherwise never show where it stops. Prompts (P) and cut-off texts take ended=False."""
    return [*ids, *[end] * (ended + -(len(ids) + ended) % multiple)]


# ---------------------------------------------------------------------------------------- generated scenes
DESCRIBE = ("describe the image.", "describe the picture.", "what does the image show?", "what is pictured?")


class GeneratedScenes:
    """A pool of scenes; scene i is f(seed, i), drawn when it is first asked for and then kept.

    size        side in pixels, or (H, W)
    heldout     every scene has a held-out composition; otherwise none has
    any_order   share of T2I captions that may name the objects in another than reading order
    questions   share of IT2T samples that ask for one fact; the others ask for a caption
    """
    tasks = {"t2t", "t2i", "it2t"}

    def __init__(self, seed: int, size: int | tuple[int, int] = 32, pool: int = 20000, heldout: bool = False,
                 any_order: float = 0.0, questions: float = 0.5):
        if pool < 1:
            raise ValueError(f"got a pool of {pool} scenes, expected at least 1")
        self.seed, self.num_images, self.hw = seed, pool, sides(size)
        self.any_order, self.questions = any_order, questions
        # The scene graph of a picture, and its pixels, uint8 (H, W, 3).
        self.scene_of = functools.cache(lambda i: scenes.sample_scene(rng(seed, i, SCENE), heldout=heldout))
        self._pixels = functools.cache(lambda i: scenes.render(self.scene_of(i), self.hw))
        self._story = functools.cache(lambda i: scenes.story(self.scene_of(i), rng(seed, i, CAPTION)))

    def image_hw(self, index: int) -> tuple[int, int]:
        return self.hw

    def images(self, indices: Iterable[int]) -> list[np.ndarray]:
        """uint8 (H, W, 3) each."""
        return [self._pixels(int(index)) for index in indices]

    def _pick(self, k: int) -> tuple[int, np.random.Generator]:
        words = rng(self.seed, k, PICK)
        return int(words.integers(self.num_images)), words

    def t2t(self, k: int) -> str:
        """One story a scene: telling a new one takes longer than everything else about a sample."""
        return self._story(self._pick(k)[0])

    def t2i(self, k: int) -> tuple[str, int]:
        index, words = self._pick(k)
        return scenes.caption(self.scene_of(index), words, any_order=words.random() < self.any_order), index

    def it2t(self, k: int) -> tuple[str, int, str]:
        index, words = self._pick(k)
        if words.random() < self.questions:
            prompt, answer = scenes.question(self.scene_of(index), words)
        else:
            wording = int(words.integers(len(DESCRIBE)))       # the instruction sets the style of the answer
            prompt, answer = DESCRIBE[wording], scenes.caption(self.scene_of(index), words, wording=wording)
        return prompt, index, answer

    def corpus(self, n: int) -> list[str]:
        return [*DESCRIBE, *scenes.corpus(rng(self.seed, 0, CORPUS), n)]


# ------------------------------------------------------------------------------------------ checked reading
MAX_PIXELS = 50_000_000         # of one stored picture: 200 MB as RGBA
MAX_FILE = 1 << 28              # bytes of one stored picture
MAX_LINE = 1 << 24              # bytes of one caption, or of one line of a .jsonl
MAX_UNPACKED = 1 << 34          # bytes of text out of .gz and .jsonl; they lie in an unnamed temporary file
CACHE_BYTES = 1 << 28           # decoded pixels kept in memory
END_TEXT = b"<|endoftext|>"     # between documents of a text file; a file without it is one document


def note(line: str) -> None:
    """One line for the user, from the first worker only."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr)


def as_list(paths: str | os.PathLike | Sequence) -> list[str]:
    return [os.fspath(path) for path in ([paths] if isinstance(paths, (str, os.PathLike)) else paths)]


def clean_text(raw: object, where: str) -> str:
    """The stripped text of bytes or a string. ValueError when it is not UTF-8, empty, or over MAX_LINE."""
    if not isinstance(raw, (bytes, str)):
        raise ValueError(f"{where}: got {type(raw).__name__}, expected a text; give the row a string")
    if len(raw) > MAX_LINE:
        raise ValueError(f"{where}: a text of over {MAX_LINE >> 20} MiB; split it, or check that it is one")
    try:
        text = (raw.decode("utf-8-sig") if isinstance(raw, bytes) else raw).strip()
        text.encode()                           # JSON can spell half a surrogate pair, which no file can hold
    except UnicodeError as error:
        raise ValueError(f"{where}: not UTF-8 at byte {error.start}; convert it, as with iconv") from None
    if not text:
        raise ValueError(f"{where}: the text is empty; write one or take the row out")
    return text


def parse_json(raw: bytes, where: str) -> dict:
    try:
        row = json.loads(raw)
    except (ValueError, RecursionError) as error:
        reason = f"not UTF-8 at byte {error.start}" if isinstance(error, UnicodeError) else "not valid JSON"
        raise ValueError(f"{where}: {reason}; expected one JSON object, in UTF-8") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: got a JSON {type(row).__name__}, expected an object")
    return row


def read_json(path: str | Path, limit: int = 1 << 20) -> dict:
    """The JSON object in a file of at most `limit` bytes. FileNotFoundError or ValueError, naming it."""
    if not os.path.isfile(path):                # a pipe or a device may have no end
        raise FileNotFoundError(f"{path}: no such file")
    with open(path, "rb") as file:
        raw = file.read(limit + 1)
    if len(raw) > limit:
        raise ValueError(f"{path}: more than {limit >> 20} MiB")
    return parse_json(raw, str(path))


def json_lines(file: BinaryIO, name: str) -> Iterator[tuple[str, dict]]:
    """(where, row) of each line that is not blank; `where` is for messages."""
    for number in itertools.count(1):
        line, where = file.readline(MAX_LINE + 1), f"{name}:{number}"
        if not line:
            return
        if len(line) > MAX_LINE:
            raise ValueError(f"{where}: a line of over {MAX_LINE >> 20} MiB; expected one row a line")
        if line.strip():
            yield where, parse_json(line, where)


def caption_of(row: dict, where: str) -> str:
    return clean_text(row.get("text", row.get("caption")), f'{where}, field "text"')


def inside(root: str, name: str) -> str:
    """Real path of `name` in the real folder `root`. ValueError when it leads out (.., absolute, a link)."""
    real = os.path.realpath(os.path.join(root, name))
    if os.path.isabs(name) or not real.startswith(os.path.join(root, "")):
        raise ValueError(f"{name!r} leads out of the folder {root}; copy the file into it, not a link")
    return real


# -------------------------------------------------------------------------------------------------- pixels
# No EPS, which Pillow hands to Ghostscript to run, and nothing exotic.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
IMAGE_NAMES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2")
warnings.filterwarnings("ignore", module="PIL")     # damage also raises, and MAX_PIXELS is the lower limit


def sides(size: int | tuple[int, int]) -> tuple[int, int]:
    """(H, W) of a size given as one side or as both."""
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 1:
        raise ValueError(f"got image size {height} x {width}, expected sides >= 1")
    return height, width


def buckets(size: int, multiple: int, max_ratio: float = 2.0) -> list[tuple[int, int]]:
    """(H, W) of the aspect ratios up to max_ratio: sides that are multiples, areas just below size^2."""
    if size < 1 or size % multiple:
        low = max(size // multiple, 1) * multiple
        raise ValueError(f"got image size {size}, expected a multiple of {multiple}; use {low} "
                         f"or {low + multiple}")
    short = [side for side in range(size, 0, -multiple) if size**2 <= max_ratio * side**2]
    flat = [(side, size**2 // side // multiple * multiple) for side in short]
    return sorted({*flat, *(hw[::-1] for hw in flat)})


def decode(raw: bytes, shapes: list[tuple[int, int]], header_only: bool = False
           ) -> np.ndarray | tuple[int, int]:
    """Stored picture -> uint8 (H, W, 3), scaled and centre-cropped to the one of `shapes` nearest in aspect.

    The first frame, turned as EXIF says, in RGB over white. header_only: the (H, W) alone, without decoding.
    ValueError when it is no picture, damaged, or larger than MAX_PIXELS."""
    try:
        image = Image.open(io.BytesIO(raw), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise Image.DecompressionBombError
        # Orientations 5 to 8 lie on their side. On a PNG getexif might decode all of it to find a late chunk.
        exif = image.getexif() if image.format != "PNG" or "exif" in image.info else {}
        lying = exif.get(0x0112) in (5, 6, 7, 8)
        aspect = image.height / image.width if lying else image.width / image.height
        height, width = min(shapes, key=lambda hw: abs(math.log(hw[1] / hw[0] / aspect)))
        if header_only:
            return height, width
        image.draft(None, (2 * max(height, width),) * 2)        # JPEG skips detail that scaling would drop
        image = to_rgb(ImageOps.exif_transpose(image))
        return np.asarray(ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS))   # (H, W, 3)
    except UnidentifiedImageError:
        raise ValueError("not an image of a known format") from None
    except Image.DecompressionBombError:
        raise ValueError(f"over {MAX_PIXELS // 10**6} megapixels, scale it down") from None
    except Exception as error:                  # Pillow's decoders raise nearly every type on a damaged file
        raise ValueError(f"damaged, {type(error).__name__}: {error}") from None


def load_image(path: str, hw: tuple[int, int]) -> np.ndarray:
    """One picture file -> uint8 (H, W, 3). FileNotFoundError, or ValueError naming what is wrong with it."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"the image {path} does not exist or is no file; check the path")
    try:
        if os.path.getsize(path) > MAX_FILE:
            raise ValueError(f"a file of over {MAX_FILE >> 20} MiB")
        with open(path, "rb") as file:
            return decode(file.read(MAX_FILE), [hw])
    except ValueError as error:
        raise ValueError(f"the image {path} cannot be used ({error}); give another") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode -> RGB: alpha over white; 16-bit, 32-bit and float gray scaled, where Pillow would clip."""
    if image.mode[0] in "IF":                                   # I;16, I;16B, I (16 bits in it), F
        gray = np.nan_to_num(np.asarray(image).astype(np.float32))
        white = 65535 if image.mode[0] == "I" else 1 if gray.max() <= 1 else 255
        gray = np.where(gray == image.info.get("transparency"), white, gray) * (255 / white)
        return Image.fromarray(gray.clip(0, 255).round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:             # an alpha channel, or a colour declared transparent
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


# ------------------------------------------------------------------------------------- captioned pictures
class Item(NamedTuple):
    """One captioned picture: bytes [offset, offset + size) of the file `path`."""
    name: str                   # for messages, as a repr: the file, or shard:member
    path: str
    offset: int
    size: int
    text: str


def find_items(path: str, left_out: list[str]) -> Iterator[Item]:
    """Items of a folder, a .jsonl or a .tar, in a fixed order; `left_out` receives what has no caption."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path} does not exist; expected a folder of images, a .jsonl or a .tar")
    root = os.path.realpath(path)
    if os.path.isfile(path) and path.endswith(".tar"):
        yield from tar_items(path, left_out)
    elif os.path.isfile(path) and path.endswith(".jsonl"):
        yield from jsonl_items(path, os.path.realpath(os.path.dirname(path)))
    elif not os.path.isdir(path):
        raise ValueError(f"{path} is neither a folder nor a .jsonl nor an uncompressed .tar; give one")
    elif tables := [name for name in ("metadata.jsonl", "captions.jsonl") if name in os.listdir(root)]:
        yield from jsonl_items(inside(root, tables[0]), root)
    elif shards := sorted(name for name in os.listdir(root)
                          if name.endswith(".tar") and os.path.isfile(inside(root, name))):
        for name in shards:
            yield from tar_items(inside(root, name), left_out)
    else:
        yield from pair_items(root, left_out)


def jsonl_items(path: str, root: str) -> Iterator[Item]:
    """Rows {"file_name" or "file": name from root, "text": caption}."""
    if not os.path.isfile(path):
        raise ValueError(f"{path}: not a file")
    with open(path, "rb") as file:
        for where, row in json_lines(file, path):
            name = row.get("file_name", row.get("file"))
            if not isinstance(name, str) or not name or "\0" in name:
                raise ValueError(f'{where}: no file name, expected {{"file_name": "a.png", "text": "..."}}')
            real = inside(root, name)
            if not os.path.isfile(real):
                raise FileNotFoundError(f"{where}: {root} has no file {name!r}; add it or take the row out")
            yield Item(name, real, 0, os.path.getsize(real), caption_of(row, where))


def pair_items(root: str, left_out: list[str]) -> Iterator[Item]:
    """a.png with a.txt beside it, in all subfolders."""
    for folder, subfolders, names in os.walk(root):
        subfolders.sort()
        for name in sorted(names):
            stem, ending = os.path.splitext(os.path.relpath(os.path.join(folder, name), root))
            if ending.lower() not in IMAGE_NAMES:
                continue
            real, text = inside(root, stem + ending), inside(root, stem + ".txt")
            if not os.path.isfile(real) or not os.path.isfile(text):
                left_out.append(f"{stem + ending!r} (no .txt beside it)")
                continue
            with open(text, "rb") as file:
                caption = clean_text(file.read(MAX_LINE + 1), text)
            yield Item(stem + ending, real, 0, os.path.getsize(real), caption)


def tar_items(path: str, left_out: list[str]) -> Iterator[Item]:
    """WebDataset: members of one name up to the first dot are one sample, 7.jpg with 7.txt or 7.json."""
    pictures, texts = {}, {}                    # name without ending -> (name, offset, size); -> caption
    with open(path, "rb") as file:
        for member in tar_members(file, path):
            name = f"{path}:{member.name}"
            stem, ending = re.fullmatch(r"((?:.*/)?[^./]*)(.*)", member.name, re.DOTALL).groups()
            if member.isdir():
                continue
            if not member.isreg() or member.issparse() or ".." in stem.split("/") or stem.startswith("/"):
                left_out.append(f"{name!r} (a link, a special file, or a name that leads out)")
            elif ending.lower() in IMAGE_NAMES:
                pictures[stem] = name, member.offset_data, member.size
            elif ending in (".txt", ".json"):
                file.seek(member.offset_data)
                raw = file.read(min(member.size, MAX_LINE + 1))
                texts[stem] = (clean_text(raw, repr(name)) if ending == ".txt" else
                               caption_of(parse_json(raw, repr(name)), repr(name)))
    for stem, (name, offset, size) in pictures.items():
        if stem in texts:
            yield Item(name, path, offset, size, texts[stem])
        else:
            left_out.append(f"{name!r} (no .txt or .json of that name)")


class Member(tarfile.TarInfo):
    """A tar header. ReadError for one that extends the next (pax, GNU names) by more than a name may need: tarfile
    would read all that it claims to have, and search it in a time that grows with the square of it."""
    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> "Member":
        at = tar.fileobj.tell()
        raw = tar.fileobj.read(tarfile.BLOCKSIZE)
        tar.fileobj.seek(at)
        if raw[156:157] in (b"x", b"g", b"X", b"L", b"K") and tarfile.nti(raw[124:136]) > 1 << 14:
            raise tarfile.ReadError("a header of more than 16 KiB")
        return super().fromtarfile(tar)


def tar_members(file: BinaryIO, path: str) -> Iterator[tarfile.TarInfo]:
    """Headers of an uncompressed tar. ValueError when it is damaged, which tarfile may take for its end."""
    total = os.path.getsize(path)
    try:
        with tarfile.open(fileobj=file, mode="r:", tarinfo=Member) as tar:
            while (member := tar.next()) is not None:
                if member.size < 0 or member.offset_data + member.size > total:
                    raise tarfile.TarError(f"{member.name!r} does not end within its {total} bytes")
                yield member
                tar.members.clear()             # tarfile would keep 1 KB for each
            file.seek(tar.offset)
            if any(file.read(512)):
                raise tarfile.TarError(f"no header at byte {tar.offset}")
    except (tarfile.TarError, ValueError, EOFError, OverflowError, MemoryError, RecursionError) as error:
        raise ValueError(f"{path} is no whole uncompressed tar ({str(error) or type(error).__name__}); "
                         "copy or pack it again") from None


class ImageText:
    """Captioned pictures on disk: imagefolder, captions.jsonl, same-named .txt, WebDataset .tar, or several.

    size        side in pixels, or (H, W)
    aspect      sort the pictures into buckets(side, multiple) instead of cropping all to one shape
    strict      a picture that cannot be used is an error; otherwise it is left out, and `left_out` says why
    ValueError or OSError in one line: see find_items, and when no picture can be used. A set that fits into
    CACHE_BYTES is decoded at the start. Of a larger one only the headers are read, the last pictures alone are
    kept (order is random, so the share of them met again is small, and memory that changes hands all the time
    breaks up), and one found damaged later gives way to the next of its shape, with that one's caption.
    """
    tasks = {"t2t", "t2i", "it2t"}

    def __init__(self, paths: str | os.PathLike | Sequence, seed: int = 0, size: int | tuple[int, int] = 32,
                 aspect: bool = False, multiple: int = 8, strict: bool = False):
        height, width = sides(size)
        if aspect and height != width:
            raise ValueError(f"got image size {height} x {width} with aspect buckets, expected equal sides")
        self.shapes = buckets(height, multiple) if aspect else [(height, width)]
        self.seed, self.strict, self.left_out = seed, strict, []
        found = (item for path in as_list(paths) for item in find_items(path, self.left_out))
        items = list(tqdm(found, "indexing images", leave=False, delay=2))
        fits = CACHE_BYTES // max(3 * height * width for height, width in self.shapes)
        whole = len(items) <= fits
        self._pixels = functools.lru_cache(fits if whole else max(fits // 8, 64))(self._load)
        check = self._pixels if whole else self._header
        found = [check(item) for item in tqdm(items, "checking images", leave=False, delay=2)]
        self.left_out += [f"{item.name!r} ({got})" for item, got in zip(items, found) if isinstance(got, str)]
        good = [(item, got) for item, got in zip(items, found) if not isinstance(got, str)]
        self.items = [item for item, _ in good]
        self._hw = [got if isinstance(got, tuple) else got.shape[:2] for _, got in good]
        self.num_images = len(good)
        self._whole = bytearray(len(good))      # 1: has been decoded once, so that its caption can be relied on
        if self.left_out:
            line = f"{len(self.left_out)} of {len(self.left_out) + len(good)} images cannot be used: "
            line += ", ".join(self.left_out[:3]) + ", ..." * (len(self.left_out) > 3)
            if strict or not good:
                raise ValueError(f"{line}; repair or remove them" + ", or drop --strict_data" * bool(good))
            note(f"left out: {line}")
        if not good:
            raise ValueError(f"no captioned image in {', '.join(as_list(paths))}; expected metadata.jsonl or "
                             "captions.jsonl, same-named .txt files, or .tar shards")

    @staticmethod
    def _read(item: Item, limit: int) -> bytes:
        try:
            with open(item.path, "rb") as file:
                file.seek(item.offset)
                raw = file.read(min(item.size, limit))
        except OSError as error:
            raise OSError(f"{item.path} cannot be read ({error.strerror}); restore it, resume") from None
        if len(raw) < min(item.size, limit):
            raise OSError(f"{item.path} is shorter than when it was indexed; restore it and resume")
        return raw

    def _load(self, item: Item) -> np.ndarray | str:
        """Pixels (H, W, 3), or why there are none."""
        if item.size > MAX_FILE:
            return f"a file of over {MAX_FILE >> 20} MiB"
        try:
            return decode(self._read(item, MAX_FILE), self.shapes)
        except ValueError as error:
            return str(error)

    def _header(self, item: Item) -> tuple[int, int] | str:
        """Shape (H, W) of the pixels, or why there is none."""
        for limit in (1 << 16, MAX_FILE):       # most formats tell within the first 64 KiB
            try:
                return decode(self._read(item, limit), self.shapes, header_only=True)
            except ValueError as error:
                reason = str(error)
        return reason

    def _usable(self, index: int, trusted: bool = False) -> int:
        """index, or the next of the same shape whose picture is whole; trusted: or was so when last decoded."""
        for other in itertools.chain(range(index, self.num_images), range(index)):
            if self._hw[other] != self._hw[index]:
                continue
            if trusted and self._whole[other]:
                return other
            reason = self._pixels(self.items[other])
            if not isinstance(reason, str):
                self._whole[other] = 1
                return other
            line = f"{self.items[other].name!r} ({reason})"
            if self.strict:
                raise ValueError(f"{line}; repair or remove it, or drop --strict_data")
            if line not in self.left_out:
                self.left_out.append(line)
                note(f"left out from now on: {line}, {len(self.left_out)} in all")
        raise ValueError("no picture of this shape can be decoded any more; check the files and the disk")

    def image_hw(self, index: int) -> tuple[int, int]:
        return self._hw[index]

    def images(self, indices: Iterable[int]) -> list[np.ndarray]:
        """uint8 (H, W, 3) each, read-only."""
        return [self._pixels(self.items[self._usable(int(index))]) for index in indices]

    def t2t(self, k: int) -> str:
        return self.items[order(self.seed, k, self.num_images)].text

    def t2i(self, k: int) -> tuple[str, int]:
        index = self._usable(order(self.seed, k, self.num_images), trusted=True)
        return self.items[index].text, index

    def it2t(self, k: int) -> tuple[str, int, str]:
        caption, index = self.t2i(k)
        return DESCRIBE[0], index, caption

    def corpus(self, n: int) -> list[str]:
        return [DESCRIBE[0], *(self.t2t(k) for k in range(min(n, self.num_images)))]


# --------------------------------------------------------------------------------------------------- texts
def find_documents(file: BinaryIO, name: str, begin: int = 0) -> Iterator[tuple[int, int]]:
    """Byte ranges [start, end) of the documents from `begin` on, blank borders cut off; 1 MiB in memory.

    ValueError naming the byte when the text is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    file.seek(begin)
    at, rest, start, end, chunk = begin, b"", None, None, b"-"     # rest: bytes from `at` on, unseen
    while chunk:
        chunk = file.read(1 << 20)
        known = at + len(rest) - len(decoder.getstate()[0])     # a character may lie across two chunks ...
        try:
            decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            raise ValueError(f"{name}: not UTF-8 at byte {known - begin + error.start}; "
                             "convert it, as with iconv") from None
        *pieces, rest = (rest + chunk).split(END_TEXT)
        cut = max(0, len(rest) - len(END_TEXT) + 1) if chunk else len(rest)     # ... and a separator, too
        rest, pieces = rest[cut:], [*pieces, rest[:cut]]
        for remaining, piece in zip(reversed(range(len(pieces))), pieces):
            if piece.strip():
                start = at + len(piece) - len(piece.lstrip()) if start is None else start
                end = at + len(piece.rstrip())
            at += len(piece) + (len(END_TEXT) if remaining else 0)
            if start is not None and (remaining or not chunk):
                yield start, end
                start = None


class TextFiles:
    """Texts on disk: .txt, or .jsonl with a field "text", each also as .gz.

    Sample k is a window that begins at a paragraph, sentence or word and holds, where its document does,
    enough for seq_len tokens (12 bytes for each; English takes 4 to 5). The windows of an epoch cover the
    text, at random offsets. .txt is read in place, the rest unpacked once, to an unnamed file in TMPDIR.
    """
    tasks, num_images = {"t2t"}, 0

    def __init__(self, paths: str | os.PathLike | Sequence, seed: int = 0, seq_len: int = 256):
        self.paths, self.seed, self.stride = as_list(paths), seed, 4 * seq_len
        self._unpacked = tempfile.TemporaryFile()
        found = array("q")                                      # file, start, end of each document, in turn
        for number, path in enumerate(self.paths):
            before = len(found)
            for start, end in self._documents(path):
                found.extend((number, start, end))
            if len(found) == before:
                raise ValueError(f"{path} holds no text; give another file")
        if not found:
            raise ValueError("got no text file, expected at least one")
        self._docs = np.frombuffer(found, np.int64).reshape(-1, 3)                          # (n, 3)
        windows = -(-(self._docs[:, 2] - self._docs[:, 1]) // self.stride)                  # (n,)
        self._first = np.concatenate([[0], np.cumsum(windows)])                             # (n + 1,)
        self.num_windows = int(self._first[-1])

    def _documents(self, path: str) -> Iterator[tuple[int, int]]:
        kind, packed = path.removesuffix(".gz"), path.endswith(".gz")
        if not kind.endswith((".txt", ".jsonl")):
            raise ValueError(f"got the text file {path}, expected .txt, .txt.gz, .jsonl or .jsonl.gz")
        if not os.path.isfile(path):
            raise FileNotFoundError(f"the text file {path} does not exist or is no file; check the path")
        with open(path, "rb") as file:
            if path.endswith(".txt"):
                yield from find_documents(file, path, 3 if file.read(3) == codecs.BOM_UTF8 else 0)
                return
            begin = self._unpacked.seek(0, os.SEEK_END)
            source = gzip.GzipFile(fileobj=file) if packed else file
            pieces = (caption_of(row, where).encode() + END_TEXT for where, row in json_lines(source, path))
            if kind.endswith(".txt"):
                pieces = iter(lambda: source.read(1 << 20), b"")
            try:
                for piece in pieces:
                    if self._unpacked.tell() + len(piece) > MAX_UNPACKED:
                        raise ValueError(f"{path} unpacks to over {MAX_UNPACKED >> 30} GiB; give .txt files")
                    self._unpacked.write(piece)
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                raise ValueError(f"{path} is not a whole gzip file ({error}); copy it again") from None
            self._unpacked.flush()
            yield from find_documents(self._unpacked, path, begin)

    def _read(self, file: int, start: int, end: int) -> str:
        path = self.paths[file]
        with open(path if path.endswith(".txt") else os.dup(self._unpacked.fileno()), "rb") as source:
            raw = os.pread(source.fileno(), end - start, start)
        if len(raw) < end - start:
            raise OSError(f"{path} is shorter than when it was indexed; restore it and resume")
        return raw.decode("utf-8", errors="ignore")             # drops only characters that the borders cut

    def t2t(self, k: int) -> str:
        window = order(self.seed, k, self.num_windows)
        doc = int(np.searchsorted(self._first, window, side="right")) - 1
        file, start, end = map(int, self._docs[doc])
        offset = window - int(self._first[doc])                 # in strides
        if offset:                                              # the first window begins with the document
            offset += rng(self.seed, k, WINDOW).random() - 0.5
        at = max(start, min(start + int(offset * self.stride), end - self.stride))
        text = self._read(file, at, min(end, at + 4 * self.stride))
        if at > start:
            for border in (r"\n\s*", r"[.!?][\"')\]]*\s+", r"\s+"):
                found = re.search(border, text[:self.stride])
                if found and found.end() < len(text):
                    return text[found.end():]
        return text

    def corpus(self, n: int) -> list[str]:
        return [self.t2t(k) for k in range(min(n, self.num_windows))]


# ------------------------------------------------------------------------------------------------- mixture
class Mixture:
    """Pictures and captions from one dataset, texts from another."""

    def __init__(self, pictures: ImageText | GeneratedScenes, texts: TextFiles):
        self.pictures, self.texts = pictures, texts
        self.tasks, self.num_images = pictures.tasks | texts.tasks, pictures.num_images
        self.t2i, self.it2t, self.t2t = pictures.t2i, pictures.it2t, texts.t2t
        self.images, self.image_hw = pictures.images, pictures.image_hw

    def corpus(self, n: int) -> list[str]:
        return self.pictures.corpus(n // 2) + self.texts.corpus(n - n // 2)


def open_data(seed: int, data: Sequence[str] = (), text: Sequence[str] = (), size: int | tuple[int, int] = 32,
              seq_len: int = 256, aspect: bool = False, multiple: int = 8, strict: bool = False, **generated
              ) -> GeneratedScenes | ImageText | TextFiles | Mixture:
    """What --data and --text ask for; generated scenes, with the settings `generated`, when that is nothing.

    Captions are the texts of T2T when there are no others; texts alone serve T2T alone."""
    if not data and not text:
        return GeneratedScenes(seed, size, **generated)
    pictures = ImageText(data, seed, size, aspect, multiple, strict) if data else None
    texts = TextFiles(text, seed, seq_len) if text else None
    return Mixture(pictures, texts) if pictures and texts else pictures or texts


if __name__ == "__main__":
    world = GeneratedScenes(seed=0)
    tokenizer = Tokenizer.train(world.corpus(2000), 512)
    caption = "a large red circle above a small blue square on a gray background"
    ids = tokenizer.encode(caption)
    back = tokenizer.decode(pad_to_multiple(ids, 8, tokenizer.end))
    print(f"{len(caption)} characters -> {len(ids)} tokens (expect 13, one a word); back: {back == caption}")
    print("sample 7 of each task, the same in every run:")
    for task in ("t2t", "t2i", "it2t"):
        print(f"  {task:4s}", getattr(world, task)(7))
    with tempfile.TemporaryDirectory() as folder:
        for i, pixels in enumerate(world.images(range(5))):
            Image.fromarray(pixels).save(f"{folder}/{i}.png")
            with open(f"{folder}/{i}.txt", "w") as file:
                file.write(f"picture {i}")
        os.truncate(f"{folder}/3.png", 200)
        pairs = ImageText(folder)
        print(f"a folder of 5, one truncated: {pairs.num_images} are used (expect 4), an epoch shows",
              [pairs.t2i(k)[0] for k in range(4)])
        with open(f"{folder}/long.txt", "w") as file:
            file.write(" ".join(map(world.t2t, range(300))))
        print("a window of a text (expect it to begin with a sentence):",
              TextFiles(file.name, seq_len=8).t2t(0)[:50])
    print("shapes of the area of 64 x 64 (expect at most 4096 pixels each):", buckets(64, 16))
