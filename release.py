"""Release: read and write the folder of a public Cola DLM model, which has text alone.

    FOLDER/cola_vae/    config.json, model.safetensors      the text VAE
    FOLDER/cola_dit/    config.json, model.safetensors      the prior
    FOLDER/tokenizer.json                                   byte-level BPE

A .safetensors file is an 8-byte little-endian length, a JSON header of that length with {name:
{dtype, shape, data_offsets}}, and the raw bytes. Large models come in several files (shards), which
model.safetensors.index.json lists. Weights are mapped from the file, not copied. The parameters of
text_vae.py have the names of the release; NAMES translates those of mmdit.py. The format has no
place for an image side: `load` can add a fresh one for training, `save` leaves it out.

Run: python release.py OUT --checkpoint out/ckpt.pt   writes a model trained with --as_released
"""
from __future__ import annotations

import argparse
import json
import math
import mmap
import sys
from dataclasses import fields
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

import cola
from cola import END_TEXT, Cola, Tokenizer
from mmdit import MMDiT, MMDiTConfig
from text_vae import TextVAE, TextVAEConfig

# ---- Files -------------------------------------------------------------------------------------

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
          "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32}


def read_json(path: Path) -> dict:
    """ValueError, naming the file, if it is not JSON."""
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file ({error})") from None


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file. The mapping is private: writing to a tensor does not change the file.

    ValueError, one line, if the file is truncated or of another format."""
    try:
        with open(path, "rb") as file:
            raw = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        start = 8 + int.from_bytes(raw[:8], "little")
        header, tensors = json.loads(raw[8:start]), {}
        header.pop("__metadata__", None)
        for name, entry in header.items():
            dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
            first, last = entry["data_offsets"]
            if last - first != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{name} has {last - first} bytes for the shape {shape}")
            tensors[name] = torch.frombuffer(raw, dtype=dtype, count=math.prod(shape),
                                             offset=start + first).view(shape)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path}: truncated, or not a safetensors file ({error!r:.200})") from None
    return tensors


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of model.safetensors, or of the shards in its index, as float32."""
    path, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    shards = {path.name}
    if index.exists() and not path.exists():
        shards = set(read_json(index)["weight_map"].values())
    return {name: x.float() for shard in sorted(shards)
            for name, x in read_safetensors(folder / shard).items()}


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

# Settings: {name in our config: name in config.json}. The release always learns the variance.
VAE_KEYS = {f.name: f.name for f in fields(TextVAEConfig) if f.name != "logsnr"}
VAE_KEYS |= {"block_len": "block_size"}
DIT_KEYS = {"text_channels": "txt_in_channels", "width": "txt_dim", "layers": "num_layers",
            "block_len": "block_size"}
DIT_KEYS |= {name: name for name in ("heads", "head_dim", "expand_ratio", "emb_dim", "rope_dim",
                                     "qk_bias", "norm_eps")}

# Settings for which only one value is supported.
VAE_FIXED = {"model_type": "cola_text_vae", "act": "swiglu", "block_causal": True,
             "post_norm": True, "qk_norm": True, "qk_norm_affine": True, "layer_norm_affine": True,
             "layer_norm_type": "layer_norm"}
DIT_FIXED = {"model_type": "cola_dit", "patch_size": 1}

# Parameters of the prior: (part of a name in mmdit.py, in the release).
NAMES = [("time_embedding.", "emb_in."),
         (".ada_msa_in.", ".ada.msa_in.1."), (".ada_msa_out.", ".ada.msa_out.1."),
         (".ada_mlp_in.", ".ada.mlp_in.1."), (".ada_mlp_out.", ".ada.mlp_out.1."),
         ("text_in.", "txt_in.proj."), ("text_norm.", "txt_out_norm."),
         ("text_ada.", "txt_out_ada.out_in.1."), ("text_out.", "txt_out.proj.")]
FREQS = ".msa.rope.rope.freqs"                              # stored there, computed in mmdit.py
IMAGE = "image_"                                            # how names of the image side begin


def rename(name: str, pairs: list[tuple[str, str]]) -> str:
    """The name with the first of each pair replaced by the second."""
    for old, new in pairs:
        name = name.replace(old, new)
    return name


# ---- Reading -----------------------------------------------------------------------------------

def read_config(path: Path, keys: dict[str, str], fixed: dict) -> dict:
    """The settings of a config.json under our names."""
    config = read_json(path)
    for name, value in fixed.items():
        if config.get(name, value) != value:
            raise ValueError(f"{path}: {name} is {config[name]!r}; only {value!r} is supported")
    if missing := [name for name in keys.values() if name not in config]:
        raise ValueError(f"{path}: no {', '.join(missing)}; expected the config.json of a release")
    return {ours: config[theirs] for ours, theirs in keys.items()}


def set_weights(model: nn.Module, tensors: dict[str, Tensor], folder: Path) -> None:
    """Make the tensors the model's parameters. ValueError if names or shapes differ."""
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{folder}: weights and config.json do not fit: {reason}") from None


def load_text_vae(folder: Path) -> TextVAE:
    """The text VAE in a cola_vae folder. ValueError or OSError, one line, as in load_mmdit."""
    settings = read_config(folder / "config.json", VAE_KEYS, VAE_FIXED)
    with torch.device("meta"):                              # takes no memory
        vae = TextVAE(TextVAEConfig(logsnr=None, **settings))
    set_weights(vae, read_weights(folder), folder)
    return vae.eval()


def load_mmdit(folder: Path, image_channels: int = 0, dual_layers: int = 0) -> tuple[MMDiT, int]:
    """The prior in a cola_dit folder, and its block length. With image_channels it gets an image
    side of fresh weights, drawn from torch's generator."""
    settings = read_config(folder / "config.json", DIT_KEYS, DIT_FIXED)
    block_len = settings.pop("block_len")
    with torch.device("meta"):                              # takes no memory
        model = MMDiT(MMDiTConfig(image_channels=image_channels, dual_layers=dual_layers,
                                  as_released=True, **settings))
    to_ours = [(theirs, ours) for ours, theirs in NAMES]
    released = {rename(name, to_ours): x for name, x in read_weights(folder).items()
                if not name.endswith(FREQS)}
    fresh = {name: torch.empty(x.shape) for name, x in model.state_dict().items()
             if name.startswith(IMAGE)}
    set_weights(model, released | fresh, folder)
    model.reset_parameters(fresh)
    return model.eval(), block_len


def load(folder: str | Path, image_channels: int = 0, dual_layers: int = 0) -> Cola:
    """The system in a folder, without an image VAE. FileNotFoundError or ValueError, one line.

    image_channels, dual_layers: those of the image side to add to the prior; 0 adds none."""
    folder = Path(folder)
    for name in ("cola_vae", "cola_dit", "tokenizer.json"):
        if not (folder / name).exists():
            raise FileNotFoundError(f"{folder / name}: not there; expected the folder of a release")
    text_vae = load_text_vae(folder / "cola_vae")
    mmdit, block_len = load_mmdit(folder / "cola_dit", image_channels, dual_layers)
    tokenizer = read_tokenizer(folder / "tokenizer.json")
    return Cola(text_vae, None, mmdit, tokenizer, block_len, image_hw=(0, 0), image_loc=0.0,
                tasks=("t2t",))


def flags(folder: str | Path) -> dict:
    """The flags of config.py that the release in a folder settles."""
    model = load(folder)
    vae, prior = model.text_vae.config, model.mmdit.config
    return {"text_latent_dim": vae.latent_dim, "text_patch": vae.patch_size,
            "text_vae_width": vae.dim, "text_vae_layers": vae.encoder_num_blocks,
            "text_vae_heads": vae.num_heads, "vae_block_len": vae.block_len,
            "vae_logsnr": "learned", "width": prior.width, "layers": prior.layers,
            "heads": prior.heads, "as_released": True, "block_len": model.block_len,
            "vocab_size": model.tokenizer.n_vocab, "tokenizer": ""}


# ---- Writing -----------------------------------------------------------------------------------

def save(model: Cola, folder: str | Path) -> None:
    """Write text VAE, text side of the prior and tokenizer to a new folder.

    ValueError if the folder exists, or for a model that the format cannot describe."""
    folder, vae, prior = Path(folder), model.text_vae.config, model.mmdit.config
    if folder.exists():
        raise ValueError(f"{folder} exists; name a new folder")
    if not prior.as_released:
        raise ValueError("the prior has a position embedding; train with --as_released")
    if model.first_block != "clean":
        raise ValueError(f"the model has --first_block {model.first_block}; only clean is released")
    weights = dict(model.text_vae.state_dict())
    if vae.logsnr is not None:
        # A fixed logSNR becomes a constant of the head, whose second half of rows is logvar.
        for name, value in (("weight", 0.0), ("bias", -vae.logsnr)):
            mean = weights[f"encoder.final_layer.{name}"][:vae.latent_dim]
            weights[f"encoder.final_layer.{name}"] = torch.cat([mean, torch.full_like(mean, value)])
    settings = {theirs: getattr(vae, ours) for ours, theirs in VAE_KEYS.items()}
    write_part(folder / "cola_vae", weights, VAE_FIXED | settings)

    weights = {rename(name, NAMES): x for name, x in model.mmdit.state_dict().items()
               if not name.startswith(IMAGE)}
    freqs = 10000.0 ** (-torch.arange(0, prior.rope_dim, 2) / prior.rope_dim)
    weights |= {f"blocks.{i}{FREQS}": freqs for i in range(prior.layers)}
    settings = {DIT_KEYS[ours]: value for ours, value in vars(prior).items() if ours in DIT_KEYS}
    settings |= {"block_size": model.block_len, "txt_out_channels": prior.text_channels}
    write_part(folder / "cola_dit", weights, DIT_FIXED | settings)
    write_tokenizer(folder / "tokenizer.json", model.tokenizer)


def write_part(folder: Path, weights: dict[str, Tensor], config: dict) -> None:
    """Write cola_vae or cola_dit."""
    folder.mkdir(parents=True)
    write_safetensors(folder / "model.safetensors", weights)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


# ---- tokenizer.json ----------------------------------------------------------------------------

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# The file writes each byte as a letter: itself if it is visible, else one of those from 256 on.
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
LETTERS = {b: chr(b) for b in VISIBLE}
LETTERS |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in LETTERS)}


def read_tokenizer(path: Path) -> Tokenizer:
    """A byte-level BPE tokenizer.json. ValueError for any other, and where ids do not rise in the
    order of merges, because tiktoken merges in the order of ids."""
    state = read_json(path)
    try:
        model, pre = state["model"], state["pre_tokenizer"]
        *split, level = pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
        special = {token["content"]: token["id"] for token in state["added_tokens"]}
        vocab = {word: i for word, i in model["vocab"].items() if word not in special}
        words = sorted(vocab, key=vocab.get)
        merges = ["".join(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
        ids = [vocab[word] for word in merges if word in vocab]
        pattern = split[0]["pattern"]["Regex"] if split else GPT2_PATTERN
        kinds = [(s["type"], s["behavior"], s.get("invert", False)) for s in split]
        for wrong, why in (
                (model["type"] != "BPE" or level["type"] != "ByteLevel", "not a byte-level BPE"),
                (state.get("normalizer") or level["add_prefix_space"], "it changes texts"),
                (kinds not in ([], [("Split", "Isolated", False)], [("Split", "Removed", True)])
                 or level.get("use_regex", True) == bool(split), "it does not split by one regex"),
                (model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"),
                 "its tokens have affixes"),
                ([vocab[word] for word in words] != [*range(len(words))], "its ids have gaps"),
                (ids != sorted(ids), "its ids do not rise in the order of merges"),
                (END_TEXT not in special, f"it has no {END_TEXT}")):
            if wrong:
                raise ValueError(why)
        byte = {letter: b for b, letter in LETTERS.items()}
        tokens = [bytes(byte[letter] for letter in word) for word in words]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: a tokenizer that is not supported ({error!r:.200})") from None
    return Tokenizer(tokens, pattern, special)


def write_tokenizer(path: Path, tokenizer: Tokenizer) -> None:
    """Write a tokenizer.json that read_tokenizer and Hugging Face's tokenizers read."""
    rank = {token: i for i, token in enumerate(tokenizer.tokens)}
    words, merges = ["".join(LETTERS[b] for b in token) for token in tokenizer.tokens], []
    for i, token in enumerate(tokenizer.tokens):
        # Earlier tokens merge the bytes of a token to two parts, and its own merge joins these.
        parts = [token[j:j + 1] for j in range(len(token))]
        while len(parts) > 2:
            pairs = enumerate(zip(parts, parts[1:]))
            lowest, j = min((rank.get(a + b, i), j) for j, (a, b) in pairs)
            if lowest >= i:
                raise ValueError(f"token {token!r} is not the merge of two earlier tokens")
            parts[j:j + 2] = [parts[j] + parts[j + 1]]
        if len(parts) == 2:
            merges.append([words[rank[part]] for part in parts])
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
             "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": tokenizer.pattern}, "behavior": "Isolated",
             "invert": False}
    state = {"version": "1.0", "normalizer": None, "post_processor": None, "decoder": level,
             "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
             "added_tokens": [{"id": i, "content": name, "special": True} | plain
                              for name, i in tokenizer.special.items()],
             "model": {"type": "BPE", "merges": merges,
                       "vocab": {word: i for i, word in enumerate(words)}}}
    path.write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """The exit status: 0, or 2 for a user's mistake."""
    parser = argparse.ArgumentParser("release.py", description=__doc__.split("\n")[0],
                                     allow_abbrev=False)
    parser.add_argument("folder", help="the new folder to write")
    parser.add_argument("--checkpoint", default="out/ckpt.pt", help="what train.py wrote")
    args = parser.parse_args(argv)
    try:
        save(cola.load(args.checkpoint), args.folder)
    except (ValueError, OSError) as error:
        print(f"release.py: {error}", file=sys.stderr)
        return 2
    print(f"{args.folder}: cola_vae, cola_dit and tokenizer.json written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
