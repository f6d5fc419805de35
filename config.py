"""Config: every flag of a run in one table, one row each.

`kind` decides whose value a flag has if a run starts from a checkpoint (--scale, --bf16 are DATA):

    kind      --resume auto                      --init_from FILE, --init_official DIR
    MODEL     the checkpoint's; others refused   the checkpoint's; others refused
    RECIPE    the checkpoint's, unless given     the checkpoint's, unless given
    DATA      the checkpoint's, unless given     the command line's
    RUN       the command line's                 the command line's

    flags of a run = defaults | flags of the checkpoint, if their kind says so | flags given

Run: python config.py --help
"""
import argparse
import math
import shlex
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cola import FIRST_BLOCK
from cuda_attention import BACKENDS
from data import SEEDS
from masks import TASKS
from scenes.pictures import check_size

MODEL, RECIPE, DATA, RUN = "model", "recipe", "data", "run"
INHERITED = {"resume": (MODEL, RECIPE, DATA), "init": (MODEL, RECIPE)}  # kinds a checkpoint sets
STAGES = ("text_vae", "image_vae", "mmdit")        # in the order in which they are trained
ALL_TASKS = "t2t:3,t2i:2,it2t:3,ii:7,vid:2"        # --tasks all


class Flag(NamedTuple):
    name: str
    default: Any              # None: depends on other flags
    allowed: tuple | None     # lowest and highest number, or all words; None: no limits
    kind: str                 # MODEL, RECIPE, DATA or RUN
    why: str                  # what the flag does and why one would change it

# ---- Ranges that several flags share -----------------------------------------------------------

COUNT = (1, 10**9)                                 # samples, steps: at least 1
STEPS = (0, 10**9)                                 # 0: none
SIZE = (1, 1 << 16)                                # widths, lengths, batches
SHARE = (0.0, 1.0)                                 # fractions of a whole
WEIGHT = (0.0, 1e6)                                # 0 switches a term of the loss off
RATE = (1e-12, 1e6)                                # above 0
REAL = (-100.0, 100.0)                             # of either sign

# ---- The table ---------------------------------------------------------------------------------

FLAGS: dict[str, list[Flag]] = {
    "run": [
        Flag("out_dir", "out", None, RUN, "folder for ckpt.pt, log.jsonl, metrics.json and plots"),
        Flag("stage", "all", (*STAGES, "all"), RUN, "train one stage alone, to tune it"),
        Flag("resume", "never", ("never", "auto"), RUN, "auto continues the run in --out_dir"),
        Flag("init_from", "", None, RUN, "start from this checkpoint (averages, if it has them)"),
        Flag("init_official", "", None, RUN, "start from the folder of a public Cola DLM release"),
        Flag("dry_run", False, None, RUN, "print what would be trained, and write nothing"),
        Flag("seed", 0, (0, SEEDS - 1), RECIPE, "of all random numbers: another shows what varies"),
        Flag("device", "auto", ("auto", "cuda", "cpu"), RUN, "auto takes a GPU if there is one"),
        Flag("procs", 0, (0, 4096), RUN, "workers on a CPU, one thread each; 0 is one per core"),
        Flag("fsdp", False, None, RUN, "shard stage 2 over GPUs (FSDP2) if one cannot hold it"),
        Flag("compile", False, None, RUN, "torch.compile the prior: slow to start, then faster"),
        Flag("attention", "auto", BACKENDS, RUN, "auto: padded; in training on a GPU, the fastest"),
        Flag("bf16", "auto", ("auto", "on", "off"), DATA, "bfloat16 products; auto: where faster"),
        Flag("save_every", 250, COUNT, RUN, "steps between checkpoints: what a crash can lose"),
    ],
    "data": [
        Flag("data", [], None, DATA, "folders, .jsonl, .tar of captioned images; else scenes"),
        Flag("text", [], None, DATA, "files for T2T: .txt or .jsonl, also .gz; else captions"),
        Flag("tasks", "t2t:5,t2i:4,it2t:5", None, RECIPE, "task:ratio of samples, for any of t2t, "
             f"t2i, it2t, ii (edits), vid (clips); all stands for {ALL_TASKS}"),
        Flag("image_size", [32], (8, 1 << 12), RECIPE, "pixels: one number, or height and width"),
        Flag("aspect", False, None, DATA, "keep aspect ratios from 1:2 to 2:1 instead of cropping"),
        Flag("seq_len", 128, SIZE, RECIPE, "longest text in tokens; longer captions are refused"),
        Flag("vocab_size", 512, COUNT, MODEL, "tokens of the trained BPE; more shorten sequences"),
        Flag("tokenizer", "", None, MODEL, "a tiktoken encoding instead, such as cl100k_base"),
        Flag("pool", 20000, COUNT, RECIPE, "different scenes; a small pool is memorized"),
        Flag("questions", 0.75, SHARE, RECIPE, "share of questions in IT2T; others: descriptions"),
    ],
    "text VAE (stage 1)": [
        Flag("text_latent_dim", 16, SIZE, MODEL, "channels: more keep more detail of the text"),
        Flag("text_patch", 1, SIZE, MODEL, "tokens per text latent: more shorten the sequence"),
        Flag("text_vae_width", 96, SIZE, MODEL, "width; the paper has 1536"),
        Flag("text_vae_layers", 2, SIZE, MODEL, "blocks of encoder and of decoder; paper: 4"),
        Flag("text_vae_heads", 3, SIZE, MODEL, "attention heads; 12 at the paper's width"),
        Flag("vae_block_len", 1, SIZE, MODEL, "latents per VAE block; paper: 1, release: 16"),
        Flag("vae_logsnr", "2.5", None, MODEL, "'learned', or fixed: a lower one is noisier"),
        Flag("beta", 1e-3, WEIGHT, RECIPE, "weight of the text VAE's KL or E log q"),
        Flag("lambda_mask", 0.1, WEIGHT, RECIPE, "weight of L_mask; 0 saves a forward pass"),
        Flag("text_vae_steps", 200, STEPS, RECIPE, "steps of stage 1; 0 needs --vae_lr_ratio 1"),
        Flag("text_vae_batch", 48, SIZE, RECIPE, "texts per step"),
        Flag("text_vae_lr", 4e-3, RATE, RECIPE, "peak learning rate of AdamW"),
    ],
    "image VAE (stage 1b)": [
        Flag("image_latent_dim", 32, SIZE, MODEL, "channels of an image latent; 64 at 256 pixels"),
        Flag("downsample", 8, SIZE, MODEL, "pixels per latent along a side; 16 at 256 pixels"),
        Flag("image_vae_width", 64, SIZE, MODEL, "channels of the first level"),
        Flag("image_vae_levels", [1], SIZE, MODEL, "relative level widths; 1 2 4 4 at 256 pixels"),
        Flag("image_vae_blocks", 2, SIZE, MODEL, "residual blocks per level; 3 at 256 pixels"),
        Flag("image_vae_patch", 4, SIZE, MODEL, "patch side in pixels; 2 at 256 pixels"),
        Flag("image_vae_steps", 1200, COUNT, RECIPE, "steps of stage 1b"),
        Flag("image_vae_batch", 32, SIZE, RECIPE, "images per step"),
        Flag("image_vae_lr", 4e-3, RATE, RECIPE, "peak learning rate of AdamW"),
        Flag("image_posterior", "mean", ("mean", "sample"), RECIPE, "what the prior "
             "learns from: the posterior's mean or, as in the paper, a sample"),
    ],
    "prior (stage 2)": [
        Flag("width", 128, SIZE, MODEL, "width D; the release has 2048"),
        Flag("layers", 4, SIZE, MODEL, "blocks; the release has 24"),
        Flag("heads", 8, SIZE, MODEL, "attention heads; the release has 16"),
        Flag("dual_layers", 4, (0, 1 << 16), MODEL, "layers, from the first, with separate "
             "weights for images (at most all layers): fewer save memory"),
        Flag("as_released", False, None, MODEL, "the architecture of the release, to export to it: "
             "no position embedding, no norm of the time embedding, tanh GELU"),
        Flag("block_len", 1, SIZE, RECIPE, "text latents generated together; release: 16"),
        Flag("steps", 1850, COUNT, RECIPE, "steps of stage 2"),
        Flag("scale", 1.0, RATE, DATA, "multiplies the steps of every stage, to train longer"),
        Flag("batch_size", 20, SIZE, RECIPE, "samples of a group, over all workers"),
        Flag("micro_steps", 6, SIZE, RECIPE, "groups of samples in a step, each of one task"),
        Flag("accumulate", False, None, RECIPE, "as many passes as groups: slower, less memory"),
        Flag("optimizer", "muon", ("muon", "adamw"), RECIPE, "for the matrices inside the blocks"),
        Flag("muon_lr", 0.026, RATE, RECIPE, "peak learning rate of Muon, also in stage 1b"),
        Flag("lr", 5e-3, RATE, RECIPE, "peak learning rate of AdamW; lower it for a wide prior"),
        Flag("weight_decay", 0.01, WEIGHT, RECIPE, "decoupled; a larger one limits overfitting"),
        Flag("schedule", "linear", ("linear", "cosine"), RECIPE, "how learning rates fall: in the "
             "last share --cooldown of the steps, or along the paper's cosine in all of them"),
        Flag("warmup", 0.03, SHARE, RECIPE, "first share of steps, with rising learning rates"),
        Flag("cooldown", 0.5, SHARE, RECIPE, "last share of steps, in which the linear ones fall"),
        Flag("clip", 1.0, RATE, RECIPE, "largest gradient norm: lower it if losses jump"),
        Flag("ema", 0.0, SHARE, RECIPE, "above 0, such as 0.9999: weights are averaged with this "
             "largest decay, and evaluate.py takes the averages"),
        Flag("vae_lr_ratio", 0.0, WEIGHT, RECIPE, "text VAE's rate in stage 2 / --lr; 0: frozen"),
        Flag("vae_interval", [1, 0], STEPS, RECIPE, "steps that the text VAE trains, then rests"),
        Flag("lambda_vae", 1.0, WEIGHT, RECIPE, "weight of the text VAE's own loss in stage 2"),
        Flag("lambda_fm", 1.0, WEIGHT, RECIPE, "weight of the flow-matching losses"),
        Flag("lambda_ref", 0.01, WEIGHT, RECIPE, "weight of KL(q || q_ref): holds a text VAE that "
             "trains in stage 2 to the encoder it began with"),
        Flag("w_text", 1.0, WEIGHT, RECIPE, "weight of L_text relative to L_image"),
        Flag("w_filler", 0.3, WEIGHT, RECIPE, "weight in L_text of the latents behind the first "
             "end token of a text, which fill its last block; at 0, likelihoods mean nothing"),
        Flag("w_answer", 3.5, RATE, RECIPE, "weight of an answer's few tokens in L_text"),
        Flag("w_repa", 0.0, WEIGHT, DATA, "weight of L_REPA: 0.5 in the literature, 0 is off"),
        Flag("repa_features", "", None, DATA, ".npy that L_REPA aligns images with, in the order "
             "of the data: (images, latents of an image, channels); else with their latents"),
        Flag("repa_layer", 2, SIZE, RECIPE, "layer that L_REPA reads, before the last"),
        Flag("repa_until", 0.5, SHARE, RECIPE, "share of the steps after which L_REPA stops"),
        Flag("aux_caption", 0.1, SHARE, RECIPE, "share of T2I samples with a loss on the caption"),
        Flag("cfg_drop", 0.1, SHARE, RECIPE, "share of images without their text, for guidance"),
        Flag("cfg_drop_text", 0.0, SHARE, RECIPE, "the same for T2T, IT2T: for --text_guidance"),
        Flag("image_rho", 0.9, (0.0, 0.999), RECIPE, "correlation of an image's noise with the "
             "image before it in a sequence: a path from near that image keeps what is not edited"),
        Flag("text_loc", None, REAL, RECIPE, "mean of the text's logit time; more trains at higher "
             "noise (default: 1 + ln(text_latent_dim / 16) / 2, and 1 more at block_len 1)"),
        Flag("image_loc", 1.0, REAL, RECIPE, "mean of images' logit time, before shift by size"),
        Flag("time_scale", 1.0, RATE, RECIPE, "standard deviation of the logit time"),
        Flag("time_law", "logit_normal", ("logit_normal", "uniform"), RECIPE, "distribution of t"),
        Flag("first_block", "clean", FIRST_BLOCK, RECIPE, "whether a prefix that ends inside a "
             "block stays clean there, is repainted, or is padded on its left or right"),
        Flag("time_per", "block", ("block", "sample"), RECIPE, "a time per text block, or one"),
    ],
    "evaluation": [
        Flag("eval_samples", 512, STEPS, RUN, "samples per rate; 0: none of these rates"),
        Flag("rank_samples", 0, STEPS, RUN, "scenes in which the right answer and caption are "
             "ranked among wrong ones by likelihood; seconds each"),
        Flag("guidance", 2.0, REAL, RUN, "for T2I: more follows captions, varies less"),
        Flag("image_temperature", 0.7, WEIGHT, RUN, "for T2I: less first noise is cleaner"),
        Flag("image_steps", 8, COUNT, RUN, "for T2I: more solver steps are slower"),
        Flag("text_guidance", 1.0, REAL, RUN, "for text; 1: none; others need --cfg_drop_text"),
        Flag("text_temperature", 0.4, WEIGHT, RUN, "scale of text's first noise: less, likelier"),
        Flag("text_shift", 1.0, RATE, RUN, "larger: more of text's solver steps are near noise"),
        Flag("text_snap", True, None, RUN, "condition on re-encoded tokens: errors do not add up"),
        Flag("text_steps", 4, COUNT, RUN, "solver steps of a block of text; blocks of 16: 16"),
        Flag("repaint_share", 1.0, SHARE, RUN, "for repaint: share of steps that reset the prefix"),
        Flag("repaint_cycles", 1, COUNT, RUN, "how often each of these steps is repeated"),
    ],
}
FLAG = {flag.name: flag for group in FLAGS.values() for flag in group}
DEFAULTS = {flag.name: flag.default for flag in FLAG.values()}
EVALUATE = {f.name for f in FLAGS["evaluation"]} | {"out_dir", "device", "procs", "attention",
                                                    "ema"}

# ---- From the command line to the flags of a run -----------------------------------------------

def parse(argv: list[str], prog: str = "train.py", only: set[str] | None = None) -> dict[str, Any]:
    """The flags that the command line gives, and no others: @file stands for the flags in a file,
    and of two values the last one counts. only: the flags that this program has. An unknown flag,
    or a value of another type, ends the program with status 2."""
    parser = argparse.ArgumentParser(prog, f"{prog} [@file] [--flag value ..]", allow_abbrev=False,
                                     argument_default=argparse.SUPPRESS, fromfile_prefix_chars="@")
    parser.error = lambda message: parser.exit(2, f"{prog}: {message}\n")    # one line
    # A line of a file may hold several flags, and a comment.
    parser.convert_arg_line_to_args = lambda line: shlex.split(line, comments=True)
    for title, flags in FLAGS.items():
        group = parser.add_argument_group(title)            # not shown if it stays empty
        for flag in flags:
            if only is None or flag.name in only:
                group.add_argument(f"--{flag.name}", **as_argparse(flag))
    try:
        return vars(parser.parse_args(argv))
    except RecursionError:
        parser.error("a file of flags names itself")


def as_argparse(flag: Flag) -> dict[str, Any]:
    """The arguments of argparse's add_argument for a row of the table."""
    many = isinstance(flag.default, list)
    shown = " ".join(map(str, flag.default)) if many else flag.default
    words = {"help": flag.why if shown in (None, "") else f"{flag.why} (default: {shown})"}
    if isinstance(flag.default, bool):
        return words | {"action": argparse.BooleanOptionalAction}     # --no-x undoes a stored x
    kind = type(flag.allowed[0]) if flag.allowed else str
    if many:
        words["nargs"] = 2 if len(flag.default) == 2 else "+"
    return words | {"type": kind, "choices": flag.allowed if kind is str else None}


def merge(given: dict[str, Any], found: dict[str, Any] | None = None, start: str = "resume",
          source: str = "") -> Namespace:
    """All flags of a run, checked. found: the flags of the checkpoint `source` that it starts from.
    start: how it starts, "resume" or "init". ValueError, one line, for a flag that is out of range
    or contradicts the checkpoint."""
    found = {name: value for name, value in (found or {}).items()
             if name in FLAG and FLAG[name].kind in INHERITED[start]}
    for name, value in found.items():
        if FLAG[name].kind == MODEL and given.get(name, value) != value:
            raise ValueError(f"{in_words(name, given[name])}: {source} has {value}; leave it out")
    a = Namespace(**DEFAULTS | found | given)
    check(a)
    if not found and not a.text_vae_steps and (not a.vae_lr_ratio * a.lambda_vae or a.lambda_ref):
        # The text VAE would never be trained, or would be held to where it began, untrained.
        raise ValueError("--text_vae_steps 0 needs --vae_lr_ratio 1, --lambda_ref 0 and a "
                         "--lambda_vae above 0")
    return a


def changes(given: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """The flags that a resumed run changes, in words, to be printed."""
    return [f"{in_words(name, value)} (was {found[name]})" for name, value in given.items()
            if name in found and FLAG[name].kind != RUN and value != found[name]]


def check(a: Namespace) -> None:
    """ValueError, one line, for a value out of range or for values that do not go together."""
    for flag in FLAG.values():
        value = getattr(a, flag.name)
        for x in value if isinstance(value, list) else [value]:
            if flag.allowed and isinstance(x, (int, float)):
                low, high = flag.allowed
                if not low <= x <= high:            # written so that NaN fails, too
                    raise ValueError(f"--{flag.name} {x}: expected {low:g} to {high:g}")
    gpu = a.device != "cpu" and torch.cuda.is_available()
    # Padding at the cut of a T2T text can fill a block: then its own tokens need a second one.
    blocks = 2 if "t2t" in task_shares(a.tasks) and a.first_block in ("left", "right") else 1
    for wrong, why in (
            (not a.out_dir or Path(a.out_dir).is_file(), f"--out_dir {a.out_dir!r}: not a folder"),
            (a.init_from and a.init_official, "--init_from and --init_official: name one of them"),
            (a.device == "cuda" and not gpu, "--device cuda: there is no CUDA device here"),
            (a.attention == "flex" and not gpu, "--attention flex trains on GPUs only"),
            (len(a.image_size) > 2, "--image_size takes one number, or height and width"),
            (a.aspect and (not a.data or len({*a.image_size}) > 1),
             "--aspect is for --data, and needs one number as --image_size"),
            (a.width % (2 * a.heads), f"--width {a.width}: expected a multiple of 2 x --heads"),
            (a.text_vae_width % (2 * a.text_vae_heads),
             f"--text_vae_width {a.text_vae_width}: expected a multiple of 2 x --text_vae_heads"),
            (a.block_len % a.vae_block_len,
             f"--vae_block_len {a.vae_block_len}: expected a divisor of --block_len {a.block_len}"),
            (a.seq_len < blocks * a.block_len * a.text_patch, f"--seq_len {a.seq_len}: expected "
             f"at least {blocks} x --block_len x --text_patch tokens"),
            (a.w_repa and "t2i" not in task_shares(a.tasks),
             f"--w_repa {a.w_repa}: it needs the task t2i; give 0 without it"),
            (a.w_repa and a.repa_layer >= a.layers,
             f"--repa_layer {a.repa_layer}: expected a layer before the last"),
            (a.repa_features and a.aspect, "--repa_features is for images of one size"),
            (a.repa_features and not a.data and {"ii", "vid"} & task_shares(a.tasks).keys(),
             "--repa_features: edited scenes have none; leave out the tasks ii and vid"),
            (not a.vae_interval[0], "--vae_interval 0: it never trains; use --vae_lr_ratio 0")):
        if wrong:
            raise ValueError(why)
    logsnr(a)
    if not a.data and not a.text:
        check_size(*image_hw(a))

# ---- Flags that hold more than one number ------------------------------------------------------

def task_shares(text: str) -> dict[str, float]:
    """"t2t:1,t2i:3" -> {"t2t": 0.25, "t2i": 0.75}; a task of ratio 0 is left out."""
    text = ALL_TASKS if text == "all" else text
    try:
        pairs = [pair.split(":") for pair in text.replace(" ", "").split(",")]
        ratios = {name: float(ratio) for name, ratio in pairs}
    except ValueError:
        pairs, ratios = [], {}
    total = sum(ratios.values())
    known = ratios.keys() <= {*TASKS} and len(ratios) == len(pairs)
    if not known or not 0 < total < math.inf or min(ratios.values()) < 0:
        raise ValueError(f"--tasks {text!r}: expected a ratio for each of some tasks of "
                         f"{', '.join(TASKS)}, such as t2t:1,t2i:2")
    return {name: ratio / total for name, ratio in ratios.items() if ratio}


def image_hw(a: Namespace) -> tuple[int, int]:
    """Height and width in pixels."""
    return a.image_size[0], a.image_size[-1]


def logsnr(a: Namespace) -> float | None:
    """The text VAE's fixed logSNR; None if it is learned."""
    try:
        value = None if a.vae_logsnr == "learned" else float(a.vae_logsnr)
    except ValueError:
        value = math.nan
    if value is not None and not -30 <= value <= 30:
        raise ValueError(f"--vae_logsnr {a.vae_logsnr}: expected 'learned', or -30 to 30")
    return value


def image_time_loc(a: Namespace) -> float:
    """Mean of the logit time of images, which sampling shifts its grid by; 0 for uniform times."""
    return a.image_loc if a.time_law == "logit_normal" else 0.0


def stages(a: Namespace) -> list[str]:
    """The stages that --stage asks for; no image VAE if no task has images."""
    images = task_shares(a.tasks).keys() - {"t2t"}
    return [a.stage] if a.stage != "all" else [s for s in STAGES if s != "image_vae" or images]


def steps(a: Namespace, stage: str) -> int:
    """The steps of a stage, scaled; a stage that has steps keeps at least 1."""
    number = getattr(a, "steps" if stage == "mmdit" else f"{stage}_steps")
    return max(1, round(number * a.scale)) if number else 0


def in_words(name: str, value: Any) -> str:
    """A flag as the command line gives it: "--aspect", "--no-aspect", "--image_size 32 64"."""
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {' '.join(map(str, value)) if isinstance(value, list) else value}"


def show(a: Namespace) -> str:
    """The flags that differ from their defaults, as the command line gives them."""
    return " ".join(in_words(name, value) for name, value in vars(a).items()
                    if value != DEFAULTS[name]) or "all as by default"


if __name__ == "__main__":
    parse(sys.argv[1:], "config.py")                   # --help lists the flags
    before = vars(merge({"width": 64, "steps": 500, "lr": 0.01, "data": ["photos"]}))
    print("resumed with --lr 0.001 (expect all else as before: width, steps, data):",
          show(merge({"lr": 0.001}, before, "resume")))
    print("changed flags (expect lr alone):", *changes({"lr": 0.001}, before))
    print("another run from its checkpoint (expect no data):", show(merge({}, before, "init")))
