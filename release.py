"""Release: read and write the folder of a public Cola DLM model, which has only text.

    FOLDER/cola_dlm/cola_vae/    config.json, model.safetensors      the text VAE
    FOLDER/cola_dlm/cola_dit/    config.json, model.safetensors      the prior
    FOLDER/tokenizer.json                                            byte-level BPE

A .safetensors file is an 8-byte little-endian length, a JSON header of that length with {name:
{dtype, shape, data_offsets}}, and the raw bytes; a large model has several (shards). The format has
no place for an image side: `load` can add a fresh one for training, `save` leaves it out.

Run: python release.py OUT --checkpoint out/ckpt.pt   writes a model trained with --as_released
"""
import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import cola
from cola import END_TEXT, Cola, NoInit, Tokenizer
from mmdit import MMDiT, MMDiTConfig
from text_vae import TextVAE, TextVAEConfig


@contextlib.contextmanager
def one_line_errors(path: Path) -> Iterator[None]:
    """Turn an error caused by wrong contents of a file or folder into one ValueError line."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError,
            ValueError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())    # without line breaks
        raise ValueError(f"{path}: damaged, or not supported ({reason:.300})") from None


DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file. The mapping is private: writing to a tensor does not change the file.
    ValueError, one line, if the file is truncated or of another format."""
    tensors = {}
    with one_line_errors(path):
        raw = np.memmap(path, mode="c")                     # (file size,) uint8
        start = 8 + int.from_bytes(raw[:8].tobytes(), "little")
        header = json.loads(raw[8:start].tobytes())
        header.pop("__metadata__", None)
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            x = torch.frombuffer(raw[start + first:start + last], dtype=DTYPES[entry["dtype"]])
            tensors[name] = x.view(entry["shape"])
    return tensors


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of all shards in a folder, as float32."""
    return {name: x.float() for path in sorted(folder.glob("*.safetensors"))
            for name, x in read_safetensors(path).items()}


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors of any device and strides, in this order and without gaps."""
    names, header, end = {dtype: name for name, dtype in DTYPES.items()}, {}, 0
    for name, x in tensors.items():
        header[name] = {"dtype": names[x.dtype], "shape": list(x.shape),
                        "data_offsets": [end, end + x.nbytes]}
        end += x.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)                         # the raw bytes begin at a multiple of 8
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for x in tensors.values():
            file.write(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())

# ---- Names -------------------------------------------------------------------------------------

# {name in our config: name in config.json}. logsnr is not stored: the release learns the variance.
VAE_KEYS = {f.name: f.name for f in fields(TextVAEConfig) if f.name != "logsnr"}
VAE_KEYS |= {"block_len": "block_size"}
DIT_KEYS = {f.name: f.name for f in fields(MMDiTConfig)
            if f.name not in ("image_channels", "dual_layers", "as_released")}
DIT_KEYS |= {"text_channels": "txt_in_channels", "width": "txt_dim", "layers": "num_layers",
             "block_len": "block_size"}
# Settings for which only one value is supported.
VAE_FIXED = {"model_type": "cola_text_vae", "act": "swiglu", "block_causal": True,
             "post_norm": True, "qk_norm": True, "qk_norm_affine": True, "layer_norm_affine": True,
             "layer_norm_type": "layer_norm"}
DIT_FIXED = {"model_type": "cola_dit", "patch_size": 1}

# Parameters of the prior: (part of a name in mmdit.py, in the release). The VAE has equal names.
NAMES = [("time_embedding.", "emb_in."),
         (".ada_msa_in.", ".ada.msa_in.1."), (".ada_msa_out.", ".ada.msa_out.1."),
         (".ada_mlp_in.", ".ada.mlp_in.1."), (".ada_mlp_out.", ".ada.mlp_out.1."),
         ("text_in.", "txt_in.proj."), ("text_norm.", "txt_out_norm."),
         ("text_ada.", "txt_out_ada.out_in.1."), ("text_out.", "txt_out.proj.")]
FREQS = ".msa.rope.rope.freqs"                              # stored there, computed in mmdit.py


def rename(name: str, pairs: list[tuple[str, str]]) -> str:
    """The name with the first of each pair replaced by the second."""
    for old, new in pairs:
        name = name.replace(old, new)
    return name

# ---- The folder --------------------------------------------------------------------------------

def parts(folder: str | Path) -> tuple[Path, Path, Path]:
    """The paths of cola_vae, cola_dit and tokenizer.json, which may also lie side by side."""
    folder = Path(folder)
    inner = folder / "cola_dlm" if (folder / "cola_dlm").is_dir() else folder
    return inner / "cola_vae", inner / "cola_dit", folder / "tokenizer.json"


def read_config(path: Path, keys: dict[str, str], fixed: dict) -> dict:
    """The settings of a config.json by our names. Each is a number, true or false."""
    with one_line_errors(path):
        config = json.loads(path.read_text("utf-8"))
        for name, value in fixed.items():
            if config.get(name, value) != value:
                raise ValueError(f"{name} is {config[name]!r}; only {value!r} is supported")
        for name in keys.values():
            if not isinstance(config[name], (int, float)):  # a bool is an int
                raise TypeError(f"{name} is {config[name]!r}; expected a number")
        return {ours: config[theirs] for ours, theirs in keys.items()}


def load_text_vae(folder: Path) -> TextVAE:
    settings = read_config(folder / "config.json", VAE_KEYS, VAE_FIXED)
    weights = read_weights(folder)
    with one_line_errors(folder), torch.device("meta"), NoInit():  # meta tensors take no memory
        vae = TextVAE(TextVAEConfig(logsnr=None, **settings))
        vae.load_state_dict(weights, assign=True)
    return vae.eval()


def load_mmdit(folder: Path, image_channels: int = 0, dual_layers: int = 0) -> tuple[MMDiT, int]:
    """The prior in a cola_dit folder, and its block length. With image_channels above 0 it gets an
    image side of fresh weights, drawn from torch's generator."""
    settings = read_config(folder / "config.json", DIT_KEYS, DIT_FIXED)
    block_len = settings.pop("block_len")
    to_ours = [(theirs, ours) for ours, theirs in NAMES]
    weights = {rename(name, to_ours): x for name, x in read_weights(folder).items()
               if not name.endswith(FREQS)}
    with one_line_errors(folder), torch.device("meta"), NoInit():
        model = MMDiT(MMDiTConfig(image_channels=image_channels, dual_layers=dual_layers,
                                  as_released=True, **settings))
        fresh = {name: torch.empty_like(x, device="cpu") for name, x in model.state_dict().items()
                 if name.startswith("image_")}
        model.load_state_dict(weights | fresh, assign=True)
    model.reset_parameters(set(fresh))
    return model.eval(), block_len


def load(folder: str | Path, image_channels: int = 0, dual_layers: int = 0) -> Cola:
    """The system in a folder, without an image VAE. image_channels, dual_layers: see load_mmdit.
    FileNotFoundError or ValueError, one line, for a missing or unsuitable file."""
    vae_folder, dit_folder, tokenizer_path = parts(folder)
    text_vae = load_text_vae(vae_folder)
    mmdit, block_len = load_mmdit(dit_folder, image_channels, dual_layers)
    tokenizer = read_tokenizer(tokenizer_path)
    with one_line_errors(Path(folder)):
        return Cola(text_vae, None, mmdit, tokenizer, block_len, (0, 0), 0.0, tasks=("t2t",))


def flags(folder: str | Path) -> dict:
    """The flags of config.py that the release in a folder settles. Reads no weights."""
    vae_folder, dit_folder, tokenizer_path = parts(folder)
    vae = read_config(vae_folder / "config.json", VAE_KEYS, VAE_FIXED)
    prior = read_config(dit_folder / "config.json", DIT_KEYS, DIT_FIXED)
    return {"text_latent_dim": vae["latent_dim"], "text_patch": vae["patch_size"],
            "text_vae_width": vae["dim"], "text_vae_layers": vae["encoder_num_blocks"],
            "text_vae_heads": vae["num_heads"], "vae_block_len": vae["block_len"],
            "vae_logsnr": "learned", "width": prior["width"], "layers": prior["layers"],
            "heads": prior["heads"], "as_released": True, "block_len": prior["block_len"],
            "vocab_size": read_tokenizer(tokenizer_path).n_vocab, "tokenizer": ""}


def save(model: Cola, folder: str | Path) -> None:
    """Write text VAE, text side of the prior and tokenizer to a new folder. FileExistsError if
    there is one; ValueError for a model that the format cannot describe."""
    folder, vae, prior = Path(folder), model.text_vae.config, model.mmdit.config
    if not prior.as_released:
        raise ValueError("the prior has a position embedding; train with --as_released")
    if model.first_block != "clean":
        raise ValueError(f"the model has --first_block {model.first_block}; only clean is released")
    folder.mkdir(parents=True)
    vae_weights = {name: x.clone() for name, x in model.text_vae.state_dict().items()}
    if vae.logsnr is not None:
        # A fixed logSNR becomes a constant of the head, whose second half of rows is logvar.
        vae_weights["encoder.final_layer.weight"][vae.latent_dim:] = 0.0
        vae_weights["encoder.final_layer.bias"][vae.latent_dim:] = -vae.logsnr
    weights = {rename(name, NAMES): x for name, x in model.mmdit.state_dict().items()
               if not name.startswith("image_")}
    freqs = 10000.0 ** (-torch.arange(0, prior.rope_dim, 2) / prior.rope_dim)
    weights |= {f"blocks.{i}{FREQS}": freqs for i in range(prior.layers)}
    vae_config = VAE_FIXED | {theirs: getattr(vae, ours) for ours, theirs in VAE_KEYS.items()}
    values = vars(prior) | {"block_len": model.block_len}
    config = DIT_FIXED | {theirs: values[ours] for ours, theirs in DIT_KEYS.items()}
    config |= {"txt_out_channels": prior.text_channels}
    for part, tensors, settings in (("cola_dlm/cola_vae", vae_weights, vae_config),
                                    ("cola_dlm/cola_dit", weights, config)):
        (folder / part).mkdir(parents=True)
        write_safetensors(folder / part / "model.safetensors", tensors)
        (folder / part / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    write_tokenizer(folder / "tokenizer.json", model.tokenizer)

# ---- tokenizer.json ----------------------------------------------------------------------------

# How a file without a pattern of its own splits texts into words: as GPT-2.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# The file writes each byte as a letter: itself if it is visible, else one of those from 256 on.
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
HIDDEN = [b for b in range(256) if b not in VISIBLE]
LETTERS = {b: chr(b) for b in VISIBLE} | {b: chr(256 + i) for i, b in enumerate(HIDDEN)}


def read_tokenizer(path: Path) -> Tokenizer:
    """A byte-level BPE tokenizer.json with END_TEXT. ValueError for any other, and where ids do not
    rise in the order of merges, because tiktoken merges in the order of ids."""
    with one_line_errors(path):
        state = json.loads(path.read_text("utf-8"))
        model, pre = state["model"], state["pre_tokenizer"]
        *splits, level = pre.get("pretokenizers", [pre])
        if level["type"] != "ByteLevel" or level["add_prefix_space"] or state.get("normalizer"):
            raise ValueError("it changes texts before it splits them into bytes")
        kinds = [(s["type"], s["behavior"], s.get("invert", False)) for s in splits]
        if kinds not in ([], [("Split", "Isolated", False)], [("Split", "Removed", True)]) \
                or level.get("use_regex", True) == bool(splits):
            raise ValueError("it does not split texts by one regex")
        pattern = splits[0]["pattern"]["Regex"] if splits else GPT2_PATTERN
        special = {token["content"]: token["id"] for token in state["added_tokens"]}
        if END_TEXT not in special:
            raise ValueError(f"it has no special token {END_TEXT}")
        vocab = {word: i for word, i in model["vocab"].items() if word not in special}
        merges = ["".join(pair).replace(" ", "") for pair in model["merges"]]    # "a b" or [a, b]
        ids = [vocab[word] for word in merges if word in vocab]
        last = max(vocab.values())
        used = sorted([*vocab.values(), *(i for i in special.values() if i <= last)])
        if used != [*range(len(used))] or ids != sorted(ids):
            raise ValueError("its ids do not count up in the order of merges")
        byte = {letter: b for b, letter in LETTERS.items()}
        word_of = {i: word for word, i in vocab.items()}
        tokens = [bytes(byte[letter] for letter in word_of.get(i, "")) for i in used]
        return Tokenizer(tokens, pattern, special)


def write_tokenizer(path: Path, tokenizer: Tokenizer) -> None:
    """Write a tokenizer.json that read_tokenizer and Hugging Face's tokenizers read."""
    rank = {token: i for i, token in enumerate(tokenizer.tokens)}
    words, merges = ["".join(LETTERS[b] for b in token) for token in tokenizer.tokens], []
    for i, token in enumerate(tokenizer.tokens):
        # Earlier tokens merge the bytes of a token into two parts, and its own merge joins these.
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:
            pairs = enumerate(zip(parts, parts[1:]))
            lowest, j = min((rank.get(a + b, i), j) for j, (a, b) in pairs)
            if lowest >= i:
                raise ValueError(f"token {token!r} is not the merge of two earlier tokens")
            parts[j:j + 2] = [parts[j] + parts[j + 1]]
        if len(parts) == 2:
            merges.append([words[rank[part]] for part in parts])
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
             "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": tokenizer.pattern}, "behavior": "Isolated",
             "invert": False}
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    state = {"version": "1.0", "normalizer": None, "post_processor": None, "decoder": level,
             "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
             "added_tokens": [{"id": i, "content": name, "special": True} | plain
                              for name, i in tokenizer.special.items()],
             "model": {"type": "BPE", "merges": merges,
                       "vocab": {word: i for i, word in enumerate(words) if word}
                       | tokenizer.special}}
    path.write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """The exit status: 0, or 2 for a user's mistake."""
    parser = argparse.ArgumentParser("release.py", description="Export a model", allow_abbrev=False)
    parser.add_argument("folder", help="the new folder to write")
    parser.add_argument("--checkpoint", default="out/ckpt.pt", help="what train.py wrote")
    args = parser.parse_args(argv)
    try:
        save(cola.load(args.checkpoint), args.folder)
    except (ValueError, OSError) as error:
        print(f"release.py: {error}", file=sys.stderr)
        return 2
    print(f"{args.folder}: cola_dlm/cola_vae, cola_dlm/cola_dit and tokenizer.json written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
