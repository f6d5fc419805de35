"""Cola: the whole system: a tokenizer, two VAEs and the prior over their latents.

    text   --tokenizer-->  ids  --text VAE-->  z (L, Dz)  --+
                                                            +-->  one packed sequence  --MMDiT-->  v
    pixels                 --image VAE------>  z (L, Cz)  --+

Text becomes one latent for every `patch_size` tokens; an image becomes a grid of latents, read row
by row. The prior generates text in blocks of `block_len` latents.
Shapes: L packed latents, B images, H, W pixels, h, w = H, W / downsample, Dz and Cz channels of a
text and an image latent.    Run: python cola.py   (CPU, 3 s)
"""
import heapq
import itertools
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import regex                    # comes with tiktoken; the standard `re` has no \p{L}
import tiktoken
import torch
import torch.nn as nn
from torch import Tensor
from torch.overrides import TorchFunctionMode

import masks
from image_vae import ImageVAE, ImageVAEConfig
from masks import TASKS
from mmdit import MMDiT, MMDiTConfig
from text_vae import TextVAE, TextVAEConfig

FORMAT = "unified-cola-6"       # the "format" entry of a checkpoint

# What happens to a prefix that ends inside a block (paper, Sec. 5.2 and Table 5):
#   clean     the prefix keeps its part of the block: latents at t = 0, never predicted
#   repaint   the whole block is predicted; while sampling, the prefix is put back at every step
#   left      end tokens before the text move the end of the prefix to the end of a block
#   right     end tokens between prefix and continuation fill the block
FIRST_BLOCK = ("clean", "repaint", "left", "right")

# ---- Tokenizer ---------------------------------------------------------------------------------

END_TEXT = "<|endoftext|>"
# Tokens are merged only inside words. A word includes the space before it, as in GPT-2, so " red"
# can be one token. Every repetition is bounded, so any text is split in linear time.
PATTERN = (r"'(?:[sdmt]|ll|ve|re)| ?[\p{L}\p{M}]{1,32}| ?\p{N}{1,3}| ?[^\s\p{L}\p{M}\p{N}]{1,16}"
           r"|\s{1,16}(?!\S)|\s")


class Tokenizer:
    """Byte-level BPE: any text <-> ids. `end` both ends and pads a text; no text encodes to it.
    tokens: the bytes of each id, b"" for a special one; lower ids are merged first.
    pattern: the regex of a word.
    special: {name: id} of the other ids; one name is END_TEXT. The last of them fills prefixes."""
    def __init__(self, tokens: list[bytes], pattern: str, special: dict[str, int]):
        self.tokens, self.pattern, self.special = tokens, pattern, special
        ranks = {token: i for i, token in enumerate(tokens) if token}
        self.encoding = tiktoken.Encoding("bpe", pat_str=pattern, mergeable_ranks=ranks,
                                          special_tokens=special)
        self.end, self.n_vocab = special[END_TEXT], self.encoding.n_vocab
        self.pad = max(special.values())
        self.spelling = dict(enumerate(tokens)) | {i: name.encode() for name, i in special.items()}

    def encode(self, text: str) -> list[int]:
        return self.encoding.encode(text, disallowed_special=())

    def decode(self, ids: Iterable[int], stop: int | None = None) -> str:
        """Text up to the first end token, or to the token `stop`. Invalid UTF-8 and unused ids come
        out as U+FFFD."""
        ids = itertools.takewhile(lambda i: i not in (self.end, stop), map(int, ids))
        text = b"".join(self.spelling.get(i, "\ufffd".encode()) for i in ids)
        return text.decode("utf-8", errors="replace")

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Merge the most frequent pair of tokens until there are vocab_size ids, `end` included, or
        no pair occurs twice. Of equally frequent pairs, the one with the lowest ids comes first."""
        if vocab_size < 257:
            raise ValueError(f"vocabulary of {vocab_size}: expected at least 257, bytes and end")
        counts = Counter(word for text in texts for word in regex.findall(PATTERN, text))
        ids = {word: list(word.encode("utf-8", "replace")) for word in counts}
        tokens = [bytes([i]) for i in range(256)]
        id_of = {token: i for i, token in enumerate(tokens)}
        pairs, words_with = Counter(), defaultdict(set)     # pair -> its count, the words with it

        def count(word: str, sign: int) -> None:  # sign 1 adds the pairs, -1 removes them
            for pair in itertools.pairwise(ids[word]):
                pairs[pair] += sign * counts[word]
                words_with[pair].add(word)

        for word in counts:
            count(word, 1)
        # For 6 MB of text and 4,096 tokens, a heap takes 3 s where max(pairs) takes 56 s.
        heap = sorted((-n, pair) for pair, n in pairs.items())    # a sorted list is a heap
        while heap and len(tokens) < vocab_size - 1:
            n, pair = heapq.heappop(heap)
            if pairs[pair] != -n:                           # the count has changed: put it back
                heapq.heappush(heap, (-pairs[pair], pair))
                continue
            if pairs[pair] < 2:
                break
            token = tokens[pair[0]] + tokens[pair[1]]
            new = id_of.setdefault(token, len(tokens))      # a + bc and ab + c are one token
            if new == len(tokens):
                tokens.append(token)
            affected = words_with.pop(pair)
            for word in affected:
                count(word, -1)
                ids[word] = merge(ids[word], pair, new)
                count(word, 1)
            for other in {p for w in affected for p in itertools.pairwise(ids[w]) if new in p}:
                heapq.heappush(heap, (-pairs[other], other))
        return cls(tokens, PATTERN, {END_TEXT: len(tokens)})

    @classmethod
    def named(cls, name: str) -> "Tokenizer":
        """One of tiktoken's encodings, such as cl100k_base; the first use downloads it."""
        try:
            encoding = tiktoken.get_encoding(name)
        except (ValueError, OSError):                       # an unknown name, or offline
            raise ValueError(f"tokenizer {name}: expected one of {tiktoken.list_encoding_names()}; "
                             "the first use needs to be online") from None
        token_of = {i: token for token, i in encoding._mergeable_ranks.items()}
        tokens = [token_of.get(i, b"") for i in range(max(token_of) + 1)]
        return cls(tokens, encoding._pat_str, encoding._special_tokens)

    def to_dict(self) -> dict:
        """Plain types for a checkpoint. A string of "tokens" has one character for every byte."""
        return {"tokens": [token.decode("latin-1") for token in self.tokens],
                "pattern": self.pattern, "special": self.special}

    @classmethod
    def from_dict(cls, state: dict) -> "Tokenizer":
        tokens = [token.encode("latin-1") for token in state["tokens"]]
        return cls(tokens, state["pattern"], state["special"])


def merge(ids: list[int], pair: tuple[int, int], new: int) -> list[int]:
    """ids with every occurrence of the pair, from the left, replaced by the id `new`."""
    out, i = [], 0
    while i < len(ids):
        found = ids[i] == pair[0] and i + 1 < len(ids) and ids[i + 1] == pair[1]
        out.append(new if found else ids[i])
        i += 2 if found else 1
    return out


def pad_to_multiple(ids: Sequence[int], multiple: int, end: int, ended: bool = True) -> list[int]:
    """ids, then end tokens until their number is a multiple. ended: at least one end token."""
    return [*ids, *[end] * (ended + -(len(ids) + ended) % multiple)]

# ---- The system --------------------------------------------------------------------------------

@dataclass
class Cola:
    """The parts, and the settings they were trained with. ValueError if the parts do not fit."""
    text_vae: TextVAE
    image_vae: ImageVAE | None          # None: the public release has only text
    mmdit: MMDiT
    tokenizer: Tokenizer
    block_len: int                      # text latents generated together
    image_hw: tuple[int, int]           # height and width in pixels of the images trained on
    image_loc: float                    # mean of the logit time of images in training
    first_block: str = "clean"
    tasks: tuple[str, ...] = TASKS      # those it was trained for
    unconditional: tuple[str, ...] = TASKS    # of these, those that can be guided
    image_rho: float = 0.0              # correlation of an image's noise with the image before it

    def __post_init__(self) -> None:
        vae, channels = self.text_vae.config, self.mmdit.config.text_channels
        # A VAE block in two blocks of the prior would leak the second into the first.
        if self.block_len < 1 or self.block_len % vae.block_len:
            raise ValueError(f"blocks of {self.block_len}: expected a multiple of {vae.block_len}")
        if channels != vae.latent_dim:
            raise ValueError(f"{vae.latent_dim} channels in the text VAE, {channels} in the prior")
        if self.tokenizer.n_vocab > vae.vocab_size:
            raise ValueError(f"{self.tokenizer.n_vocab} tokens, {vae.vocab_size} in the text VAE")

    def parts(self) -> dict[str, nn.Module]:
        """The modules by the names they have in a checkpoint."""
        parts = {"text_vae": self.text_vae, "image_vae": self.image_vae, "mmdit": self.mmdit}
        return {name: part for name, part in parts.items() if part is not None}

    def to(self, device: str | torch.device) -> "Cola":
        nn.ModuleDict(self.parts()).to(device)
        return self

    @property
    def device(self) -> torch.device:
        return next(self.mmdit.parameters()).device

    def config(self) -> dict:
        """All that `build` needs besides weights and tokenizer, in plain types."""
        return {name: asdict(part.config) for name, part in self.parts().items()} | {
            "block_len": self.block_len, "image_hw": list(self.image_hw),
            "image_loc": self.image_loc, "image_rho": self.image_rho,
            "first_block": self.first_block, "tasks": list(self.tasks)}

    def ids(self, text: str, end: bool) -> list[int]:
        """Ids padded to a whole latent. end: with an end token, and padded to a whole block."""
        multiple = self.text_vae.config.patch_size * (self.block_len if end else 1)
        return pad_to_multiple(self.tokenizer.encode(text), multiple, self.tokenizer.end, ended=end)

    def fill(self, ids: list[int]) -> list[int]:
        """A prefix, filled to whole blocks of the text VAE to be encoded, as the release does; the
        latents of the filling are not kept."""
        multiple = self.text_vae.config.patch_size * self.text_vae.config.block_len
        return pad_to_multiple(ids, multiple, self.tokenizer.pad, ended=False)

    def encode_text(self, ids: list[list[int]]) -> tuple[Tensor, list[int]]:
        """Posterior means of texts, packed (L, Dz), and the number of latents of each text."""
        lengths = [len(text) // self.text_vae.config.patch_size for text in ids]
        flat = torch.tensor([i for text in ids for i in text], dtype=torch.long, device=self.device)
        return self.text_vae.scale_latents(self.text_vae.encode(flat, lengths)[0]), lengths

    def encode_images(self, images: list[np.ndarray]) -> Tensor:
        """Images uint8 (H, W, 3) of one size -> normalized posterior means, packed (B h w, Cz)."""
        x = to_float(np.stack(images)).to(self.device)                          # (B, 3, H, W)
        z = self.image_vae.normalize(self.image_vae.encode(x)[0])               # (B, Cz, h, w)
        return z.flatten(2).transpose(1, 2).flatten(0, 1)                       # (B h w, Cz)

    def decode_images(self, z: Tensor, grid: tuple[int, int]) -> list[np.ndarray]:
        """Packed latents (B h w, Cz) of grids (h, w) -> images uint8 (H, W, 3)."""
        z = z.view(-1, *grid, z.shape[-1]).permute(0, 3, 1, 2)                  # (B, Cz, h, w)
        return list(to_uint8(self.image_vae.decode(self.image_vae.denormalize(z))))

    def align(self, ids: list[int], cut: int) -> tuple[list[int], int, range]:
        """Inserts end tokens so that a prefix of `cut` tokens fills whole latents (left, right:
        whole blocks). Returns the ids, the new cut, and the latents with inserted tokens, which
        stay clean (repaint: none do)."""
        p = self.text_vae.config.patch_size
        multiple = p * self.block_len if self.first_block in ("left", "right") else p
        count = -cut % multiple                             # end tokens to insert
        at = cut if self.first_block == "right" else 0      # before this token
        ids = [*ids[:at], *[self.tokenizer.end] * count, *ids[at:]]
        padded = range(at // p, -(-(at + count) // p))
        return ids, cut + count, range(0) if self.first_block == "repaint" else padded

    def stays_clean(self, index: np.ndarray, cut: int, padded: range) -> np.ndarray:
        """Which latents of a text stay at t = 0 in its noisy copy and have no loss: bool (n,).
        index (n,): their places in the text.   cut: latents in the prefix.   padded: from align."""
        clean = (padded.start <= index) & (index < padded.stop)
        if self.first_block != "repaint":
            clean |= (index < cut) & (index // self.block_len == cut // self.block_len)
        return clean


def to_float(images: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) -> (B, 3, H, W) in [-1, 1]"""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(x: Tensor) -> np.ndarray:
    """(B, 3, H, W), clamped to [-1, 1] -> uint8 (B, H, W, 3)"""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()

# ---- From a checkpoint -------------------------------------------------------------------------

def before_turns(state: dict[str, Tensor]) -> None:
    """Completes weights from before there were sequences of images, whose segments are P, C, I, N:
    the embedding of J becomes that of I, and turns change nothing."""
    place = "mmdit.position.segment.weight"
    rows = state.get(place)
    if rows is not None and len(rows) == 4:
        state[place] = torch.cat([rows, rows[masks.I][None]])
        state["mmdit.position.turn.weight"] = rows.new_zeros(rows.shape[1], 32)


def read(path: str | Path) -> dict:
    """The dict of a checkpoint, its tensors mapped from the file. Loading runs no code of the file.
    FileNotFoundError or ValueError, one line, for a missing, damaged or foreign file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint; `python train.py` writes out/ckpt.pt")
    try:
        with zipfile.ZipFile(path) as file:
            if damaged := file.testzip():                   # torch.load compares no checksums
                raise ValueError(f"{damaged} has a wrong checksum")
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        before_turns(found["model"])
        before_turns(found["ema"])
        for settings in (found["config"], found["args"]):   # from before there was image_rho
            settings.setdefault("image_rho", 0.0)
    except Exception as error:                              # torch.load raises errors of any class
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{path}: not a checkpoint of this program, or damaged ({reason:.80}); "
                         "take an earlier copy, or make one with train.py") from None
    return found


class NoInit(TorchFunctionMode):
    """Leaves out the initializers of torch.nn.init that a mode can replace. On the meta device,
    random numbers would import PyTorch's compiler, which takes seconds."""
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"]
        return function(*args, **kwargs or {})


def build(found: dict, weights: str = "ema") -> Cola:
    """The system of a checkpoint in eval mode, with copies of the weights: "model" are those in
    training, "ema" their averages if there are any. ValueError, one line, if they do not fit."""
    try:
        c, flags = found["config"], found["args"]
        state = found["model"] | (found["ema"] if weights == "ema" else {})
        with torch.device("meta"), NoInit():                # takes no memory and no random numbers
            text_vae = TextVAE(TextVAEConfig(**c["text_vae"]))
            image_vae = ImageVAE(ImageVAEConfig(**c["image_vae"])) if "image_vae" in c else None
            mmdit = MMDiT(MMDiTConfig(**c["mmdit"]))
        # Without position embedding, an answer without its condition is a first block of T2T.
        text = flags["cfg_drop_text"] or mmdit.config.as_released and "t2t" in c["tasks"]
        image = flags["cfg_drop"]
        learned = {"t2t": text, "t2i": image, "it2t": text, "ii": image, "vid": image}
        model = Cola(text_vae, image_vae, mmdit, Tokenizer.from_dict(found["tokenizer"]),
                     c["block_len"], tuple(c["image_hw"]), c["image_loc"], c["first_block"],
                     tuple(c["tasks"]), tuple(task for task in c["tasks"] if learned[task]),
                     c["image_rho"])
        modules = nn.ModuleDict(model.parts()).eval()
        modules.load_state_dict({name: x.clone() for name, x in state.items()}, assign=True)
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"the checkpoint is of another architecture ({error!r:.200})") from None
    return model


def load(path: str | Path, device: str = "cpu") -> Cola:
    """The system of a checkpoint file, to sample. ValueError if its prior was never trained."""
    found = read(path)
    if not found["progress"]["mmdit"]:
        raise ValueError(f"{path}: its prior was never trained; go on with train.py --resume auto")
    return build(found).to(device)


if __name__ == "__main__":
    caption = "a large red circle above a small blue square on a gray background"
    tokenizer = Tokenizer.train([caption] * 2, 400)
    vae = TextVAE(TextVAEConfig(tokenizer.n_vocab, patch_size=2))
    model = Cola(vae, ImageVAE(ImageVAEConfig()), MMDiT(MMDiTConfig()), tokenizer, 4, (32, 32), 1.0)
    ids = tokenizer.encode(caption)
    print(f"{caption!r}: {len(ids)} tokens (expect 13, one a word)")
    z, _ = model.encode_text([model.ids(caption, end=True)])
    print(f"2 tokens a latent, 4 latents a block: z {tuple(z.shape)} (expect 8 latents of 16)")
    for model.first_block, expected in zip(FIRST_BLOCK, (6, 6, 8, 8)):
        print(f"{model.first_block}: 5 tokens become {model.align(ids, 5)[1]} (expect {expected})")
