"""Train: tokens and pixels in, one model that writes, draws and describes out.

    stage 1    text VAE      -E log p(x|z) + beta KL + lambda_mask L_mask                    (paper, Eq. 3.16)
    stage 1b   image VAE     reconstruction + beta KL; then frozen
    stage 2    MMDiT prior   lambda_vae L_vae + lambda_fm (L_image + w_text L_text)
                             L_text a mean in which positions of answers weigh w_answer
                             + lambda_ref KL(q || q_ref)                   (paper, Eq. 3.18; blog, section 3)

A step has `micro_steps` micro-steps; each has one task and a fixed range of sample numbers, which the workers
share. Whatever is random about sample k comes from (seed, k, purpose), and every loss is divided by the count
or weight of its positions in the whole step: so the number of workers, accumulation and resuming change
nothing but rounding.

    python train.py                             everything, on generated scenes; on a CPU one worker per core
    torchrun --nproc_per_node=8 train.py --data DIR --text FILE

Shapes: T tokens and Lv latents of all texts of a batch; L positions of the prior, Lt of text, Li of images;
U distinct times; Dz and Cz channels of a text and an image latent; B images of H x W pixels, h x w latents.
"""
from __future__ import annotations

import signal

if __name__ == "__main__":                 # Ctrl-C while torch is imported, which takes seconds
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import contextlib
import copy
import ctypes
import dataclasses
import fcntl
import json
import math
import os
import shlex
import shutil
import socket
import statistics
import subprocess
import sys
import time
import timeit
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import cuda_attention
import data
import evaluate
import flow
import masks
import sample
import scenes
from cuda_attention import Plan, make_plan
from image_vae import ImageVAE, image_vae_loss
from masks import IT2T, T2I, T2T, TASKS, Layout, Sample
from mmdit import MMDiT, MMDiTConfig
from sample import Cola
from text_vae import TextVAE, kl, text_vae_loss

STAGES = ("text_vae", "image_vae", "mmdit")
LATENT_BYTES = 96 << 20    # of image latents a worker keeps in memory
LOST = 20                  # steps in a row whose gradient is no number: then there is no going on
STOP = (signal.SIGINT, signal.SIGTERM)


# ---- flags -------------------------------------------------------------------------------------------------

def parser() -> sample.Parser:
    """All flags, with their defaults and reasons."""
    flags = sample.Parser(prog="train.py", description=__doc__.split("\n\n")[0])

    def group(title: str):
        g = flags.add_argument_group(title)

        def flag(name: str, default, why: str, **more) -> None:
            more = more or {"type": type(default)}
            g.add_argument(f"--{name}", default=default, help=why, **more)
        return flag

    flag = group("run")
    flag("out_dir", "out", "folder for ckpt.pt, log.jsonl, metrics.json, samples.png, loss.png")
    flag("stage", "all", "train one stage alone", choices=(*STAGES, "all"))
    flag("resume", "never", "auto continues from out_dir/ckpt.pt", choices=("never", "auto"))
    flag("init_from", "", "start from the weights of a checkpoint, at another --image_size or on other data")
    flag("init_official", "", "start from a public Cola DLM release, a folder with cola_vae, cola_dit and "
         "tokenizer.json: its text VAE and text stream, a fresh image side")
    flag("dry_run", False, "say what would be trained, on what and in how much memory, and write nothing",
         action="store_true")
    flag("eval_only", False, "evaluate out_dir/ckpt.pt and write metrics.json", action="store_true")
    flag("seed", 0, "same seed, same run")
    flag("scale", 1.0, "multiplies the steps of every stage: 5 takes five times as long")
    flag("device", "cuda" if torch.cuda.is_available() else "cpu", "cuda or cpu", choices=("cuda", "cpu"))
    flag("procs", 0, "workers on a CPU, one thread each; 0 is one per core")
    flag("fsdp", False, "stage 2 with weights, gradients, moments and average sharded over the workers (FSDP2); "
         "needs --optimizer adamw", action="store_true")
    flag("compile", False, "torch.compile for the blocks of the prior; the first steps take a minute",
         action="store_true")
    flag("attention", "auto", "backend of the masked attention; auto says what it takes",
         choices=cuda_attention.BACKENDS)
    flag("bf16", "auto", "matrix products in bfloat16; auto: if it takes a layer 1.5 times faster, which differs by machine",
         choices=("auto", "on", "off"))
    flag("save_every", 500, "steps between checkpoints")

    flag = group("data")
    flag("data", [], "folders, .jsonl or .tar files of captioned images; none: generated scenes", nargs="+")
    flag("text", [], ".txt, .txt.gz or .jsonl files for t2t; none: captions or stories", nargs="+")
    flag("strict_data", False, "a damaged image among good ones is an error", action="store_true")
    flag("tasks", "t2t:1,t2i:2,it2t:3", "ratios of the tasks")
    flag("image_size", [32], "pixels: one number, or height and width", nargs="+", type=int)
    flag("aspect", False, "keep aspect ratios, in buckets of the same area", action="store_true")
    flag("seq_len", 128, "longest text or caption in tokens")
    flag("vocab_size", 512, "byte-level BPE trained on the corpus")
    flag("tokenizer", "", "a tiktoken encoding instead, such as cl100k_base")
    flag("pool", 20000, "generated scenes in all")
    flag("any_order", 0.0, "share of T2I captions that name the objects in any order: harder")
    flag("questions", 0.75, "share of IT2T samples that ask instead of describe")

    flag = group("text VAE (stage 1)")
    flag("text_latent_dim", 16, "channels of a text latent")
    flag("text_patch", 1, "tokens per latent")
    flag("text_vae_width", 96, "width; the paper has 1536")
    flag("text_vae_layers", 2, "blocks of the encoder and of the decoder; the paper has 4")
    flag("text_vae_heads", 3, "attention heads; the paper has 12")
    flag("vae_block_len", 1, "1 is strictly causal, as in the paper; the release has 16")
    flag("vae_logsnr", "2.5", "'learned', or a fixed log(mu^2 / sigma^2): lower is noisier and more robust")
    flag("beta", 1e-3, "weight of KL(q || N(0, I)), and of E log q in stage 2; both are constant at a fixed logSNR")
    flag("lambda_mask", 0.1, "weight of the masking loss; 0 saves a pass")
    flag("text_vae_steps", 200, "steps of stage 1; 0 begins stage 2 from scratch, with a --vae_lr_ratio")
    flag("text_vae_batch", 48, "texts a step")
    flag("text_vae_lr", 4e-3, "peak learning rate of AdamW")

    flag = group("image VAE (stage 1b)")
    flag("image_latent_dim", 32, "channels of an image latent; 64 at 256 pixels")
    flag("downsample", 8, "pixels per latent along a side; 16 at 256 pixels")
    flag("image_vae_width", 64, "channels of the first level")
    flag("image_vae_levels", [1], "width of each level in units of the first; 1 2 4 4 at 256 pixels",
         nargs="+", type=int)
    flag("image_vae_blocks", 2, "residual blocks a level; 3 at 256 pixels")
    flag("image_vae_patch", 4, "pixels a side folded into channels at once; 2 at 256 pixels")
    flag("image_vae_steps", 1200, "steps of stage 1b")
    flag("image_vae_batch", 32, "images a step")
    flag("image_vae_lr", 4e-3, "peak learning rate of AdamW")

    flag = group("prior (stage 2)")
    flag("width", 128, "width D; the release has 2048")
    flag("layers", 4, "blocks; the release has 24")
    flag("heads", 8, "attention heads; the release has 16")
    flag("as_released", False, "the release's arithmetic, for `sample.py export`: no place of a position at the "
         "entrance, no norm of the time embedding", action="store_true")
    flag("streams", 2, "1 shares the weights of text and image, 2 gives each their own, joined in attention",
         type=int, choices=(1, 2))
    flag("block_len", 1, "text latents generated together; 16 in the release, 1 learns fastest")
    flag("steps", 3200, "steps of stage 2; many small ones learn faster than few large ones")
    flag("batch_size", 10, "samples a micro-step, over all workers")
    flag("micro_steps", 6, "micro-steps a step, each of one task")
    flag("accumulate", False, "a pass for each micro-step, not one for all: less memory, the same result",
         action="store_true")
    flag("optimizer", "muon", "for the matrices inside the blocks of the prior and the image VAE",
         choices=("muon", "adamw"))
    flag("muon_lr", 0.02, "peak learning rate of Muon")
    flag("lr", 5e-3, "peak learning rate of AdamW")
    flag("weight_decay", 0.01, "decoupled, all optimizers")
    flag("warmup", 0.03, "share of the steps in which the learning rates rise to their peaks")
    flag("cooldown", 0.5, "share of the steps, the last ones, in which they fall to 0; between, they stay")
    flag("clip", 1.0, "largest gradient norm")
    flag("ema", 0.9999, "limit of the decay min(ema, (1 + n) / (10 + n)) of the averaged weights")
    flag("vae_lr_ratio", 0.0, "text VAE's learning rate / --lr: 0 frozen, 1 joint (the paper's best)")
    flag("vae_interval", [1, 0], "steps that the text VAE trains and then rests, in turn; the paper compares "
         "22000 33000", nargs=2, type=int, metavar=("TRAIN", "REST"))
    flag("lambda_vae", 1.0, "weight of the text VAE's own loss in stage 2; this and lambda_ref where it learns on")
    flag("lambda_fm", 1.0, "weight of the flow-matching losses")
    flag("lambda_ref", 0.0, "weight of KL(q || q_ref) to the encoder of stage 1")
    flag("w_text", 1.0, "weight of L_text against L_image")
    flag("w_answer", 4.0, "weight of a position of an IT2T answer in the mean L_text, against one of other "
         "text: answers are short")
    flag("w_repa", 0.0, "weight of L_REPA (0.5 in the literature); 0 is off")
    flag("repa_layer", 2, "layer that L_REPA reads, before the last")
    flag("repa_until", 0.5, "share of the steps after which L_REPA stops")
    flag("aux_caption", 0.1, "share of T2I samples that also predict their caption: more disturbs IT2T")
    flag("cfg_drop", 0.1, "share of samples trained without their condition, for guidance")
    flag("text_loc", None, "mean of the text's logit time (default 1 + ln(text_latent_dim / 16) / 2, and 1 "
         "more at block_len 1)", type=float)
    flag("image_loc", 1.0, "mean of the image's logit time, before the shift by size")
    flag("time_scale", 1.0, "deviation of the logit time")
    flag("time_law", "logit_normal", "law of the times; uniform has no loc and no scale", choices=("logit_normal", "uniform"))
    flag("first_block", "clean", "a prefix that ends inside a block: its latents stay clean there, are "
         "repainted, or padding on its left or right fills the block; clean is the paper's best",
         choices=sample.FIRST_BLOCK)
    flag("time_per", "block", "one time per text block, or per sample", choices=("block", "sample"))

    flag = group("evaluation")
    flag("eval_samples", 512, "samples per number; 0 skips the evaluation")
    flag("guidance", sample.IMAGE.guidance, "guidance for images")
    flag("text_guidance", sample.TEXT.guidance, "guidance for text")
    flag("text_temperature", sample.TEXT.temperature, "scale of the noise that text starts from; 1 is what "
         "was trained, 0 the surest text")
    flag("text_shift", sample.TEXT.shift, "shift of text's time grid: more spends more steps near noise")
    flag("text_snap", sample.TEXT.snap, "text goes on from the tokens that its latents so far decode to; off, as in "
         "the paper, from these latents", action=argparse.BooleanOptionalAction)
    flag("sample_steps", 16, "solver steps")
    flag("repaint_share", sample.TEXT.repaint_share, "with --first_block repaint, by Euler steps: share of them in "
         "which the prefix leads its block")
    flag("repaint_cycles", sample.TEXT.repaint_cycles, "how often each of these steps is taken")
    return flags


def parse(argv: list[str]) -> argparse.Namespace:
    """The flags, not checked yet (`prepare`); `given` holds the names of those in argv."""
    args = parser().parse_args(argv)
    args.given = {word[2:].split("=")[0] for word in argv if word.startswith("--")}
    return args


def check(args: argparse.Namespace) -> None:
    """Refuse impossible values before any work; None stands for a default. ValueError, one line."""
    for low, high, expected, names in (
            (1, 1e9, "1 to a thousand million",
             "steps image_vae_steps save_every sample_steps repaint_cycles pool vocab_size"),
            (1, sample.MAX_BLOCK, f"1 to {sample.MAX_BLOCK}", "block_len vae_block_len"),
            (1, 1 << 16, "1 to 65,536",
             "batch_size micro_steps text_vae_batch image_vae_batch seq_len width "
             "heads text_vae_width text_vae_heads text_latent_dim text_patch downsample image_latent_dim "
             "image_vae_width image_vae_levels image_vae_patch"),
            (1, 1 << 10, "1 to 1024", "layers text_vae_layers image_vae_blocks repa_layer"),
            (8, math.inf, "at least 8 pixels, which the loss of stage 1b halves thrice", "image_size"),
            (0, 1, "a share between 0 and 1",
             "any_order questions aux_caption cfg_drop warmup cooldown repa_until ema repaint_share"),
            (math.ulp(0), 1e6, "a number above 0, at most 1e6",        # from the smallest such number
             "w_answer scale time_scale clip lr muon_lr text_vae_lr image_vae_lr text_shift"),
            (0, 1e6, "a number from 0 to 1e6",
             "weight_decay beta lambda_mask lambda_vae lambda_fm lambda_ref w_text w_repa vae_lr_ratio "
             "text_temperature"),
            (0, 1e9, "0 to a thousand million", "eval_samples procs text_vae_steps vae_interval"),
            (-1e6, 1e6, "a number from -1e6 to 1e6", "guidance text_guidance"),
            (-100, 100, "a number from -100 to 100", "image_loc text_loc")):
        for name in names.split():
            value = getattr(args, name)
            for x in value if isinstance(value, list) else [value]:
                if x is not None and not low <= x <= high:
                    raise ValueError(f"--{name} {x}: expected {expected}")
    if len(args.image_size) > 2:
        raise ValueError(f"--image_size {args.image_size}: expected one number of pixels, or height and width")
    if args.image_size[0] * args.image_size[-1] > data.MAX_PIXELS:
        raise ValueError(f"--image_size {args.image_size}: more than {data.MAX_PIXELS:,} pixels")
    if not 0 <= args.seed < data.SEEDS:
        raise ValueError(f"--seed {args.seed}: expected at least 0 and below 2^56")
    if args.width % (2 * args.heads):
        raise ValueError(f"--width {args.width} does not split into --heads {args.heads} of even width")
    if not args.vae_interval[0]:
        raise ValueError("--vae_interval 0 ..: the text VAE would always rest; say --vae_lr_ratio 0")
    if args.w_repa and args.repa_layer >= args.layers:
        raise ValueError(f"--repa_layer {args.repa_layer}: expected one before the last "
                         f"of --layers {args.layers}")
    if args.aspect and not args.data:
        raise ValueError("--aspect is for --data; generated scenes are all of one shape")
    if not args.data and not args.text:
        scenes.check_size(args.image_size[0], args.image_size[-1])
    if not args.out_dir or Path(args.out_dir).exists() and not Path(args.out_dir).is_dir():
        raise ValueError(f"--out_dir {args.out_dir!r}: expected a folder, which may be new")
    if args.fsdp and args.optimizer != "adamw":
        raise ValueError("--fsdp cuts matrices up, and Muon needs them whole; add --optimizer adamw")
    if args.attention == "flex" and args.device == "cpu":
        raise ValueError("--attention flex: PyTorch's FlexAttention has no backward pass on a CPU; use padded")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch finds no CUDA device here; use --device cpu")
    blocks = 1 + (args.first_block in ("left", "right") and "t2t" in args.tasks)       # the text is in the next
    if args.seq_len < blocks * args.block_len * args.text_patch:
        raise ValueError(f"--seq_len {args.seq_len} is less than {('a block', 'two blocks')[blocks - 1]}: --block_len "
                         f"{args.block_len} x --text_patch {args.text_patch} tokens")
    if args.block_len % args.vae_block_len:
        raise ValueError(f"--vae_block_len {args.vae_block_len} does not divide --block_len {args.block_len}: "
                         "a block's context would have been encoded with the block in view")
    if args.vae_logsnr != "learned":
        try:
            finite = abs(float(args.vae_logsnr)) <= 30
        except ValueError:
            finite = False
        if not finite:
            raise ValueError(f"--vae_logsnr {args.vae_logsnr}: expected 'learned' or a number from -30 to 30")
    task_ratios(args.tasks)


def plain(args: argparse.Namespace) -> dict:
    """The flags, as a checkpoint and metrics.json hold them."""
    return {k: v for k, v in vars(args).items() if k not in ("given", "found")}


def task_ratios(text: str) -> dict[str, float]:
    """"t2t:1,t2i:2" -> shares that sum to 1."""
    try:
        items = [item.split(":") for item in text.replace(" ", "").split(",")]
        ratios = {name: float(value) for name, value in items}
    except ValueError:
        raise ValueError(f"--tasks {text!r}: expected names and ratios such as t2t:1,t2i:1,it2t:1") from None
    unknown = set(ratios) - set(TASKS)
    if len(ratios) < len(items):
        raise ValueError(f"--tasks {text!r}: a task is named twice")
    if unknown:
        raise ValueError(f"--tasks names {', '.join(sorted(unknown))}; the tasks are {', '.join(TASKS)}")
    if min(ratios.values()) < 0 or not 0 < sum(ratios.values()) < math.inf:
        raise ValueError(f"--tasks {text!r}: ratios must be at least 0 and not all 0")
    return {name: value / sum(ratios.values()) for name, value in ratios.items()}


def tasks_of(args: argparse.Namespace) -> set[str]:
    """The tasks with a share of the steps."""
    return {name for name, share in task_ratios(args.tasks).items() if share}


def stages_of(args: argparse.Namespace) -> list[str]:
    """What --stage asks for; with all, no image VAE where no task has images."""
    return [stage for stage in STAGES if args.stage == stage or
            args.stage == "all" and (stage != "image_vae" or tasks_of(args) - {"t2t"})]


def pick_task(args: argparse.Namespace, u: float) -> int:
    """The task at place u in [0, 1) of the ratios laid side by side."""
    ratios = task_ratios(args.tasks)
    ends = np.cumsum([ratios.get(name, 0.0) for name in TASKS])
    last = max(i for i, name in enumerate(TASKS) if ratios.get(name))  # rounding may leave u beyond the ends
    return min(int(np.searchsorted(ends, u, side="right")), last)


def step_tasks(args: argparse.Namespace, step: int) -> list[int]:
    """The task of each micro-step of a step of stage 2: they lie evenly spread over the ratios."""
    place = data.rng(args.seed, step, data.TASK).random()
    return [pick_task(args, (m + place) / args.micro_steps) for m in range(args.micro_steps)]


# ---- workers -----------------------------------------------------------------------------------------------

class Agreed(OSError):
    """An error that all workers have heard of."""


@dataclass
class Worker:
    """This process among the others."""
    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")
    speaks: bool = True                    # of what all workers of a machine find out, the first tells
    training: bool = False                 # set-up is over

    def sum(self, values: list[float]) -> list[float]:
        """Sums over all workers."""
        if self.world == 1:
            return values
        x = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(x)
        return x.tolist()

    def gather(self, items: list) -> list:
        """Lists of all workers, joined."""
        if self.world == 1:
            return items
        parts: list = [None] * self.world
        dist.all_gather_object(parts, items)
        return [x for part in parts for x in part]

    def agree(self, error: str) -> None:
        """Agreed on every worker if one of them has an error to tell: else the others would wait for it."""
        if errors := [e for e in self.gather([error]) if e]:
            raise Agreed(errors[0])

    def share(self, start: int, count: int) -> range:
        """This worker's part of `count` sample numbers from `start`."""
        return range(start + count * self.rank // self.world, start + count * (self.rank + 1) // self.world)


def on_signals(handler: Callable) -> None:
    for number in STOP:
        signal.signal(number, handler)


def join(device: str) -> Worker:
    """This process's place among those that `launch` or torchrun started; alone where nobody did."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return Worker(device=torch.device(device))
    place = int(os.environ.get("LOCAL_RANK", 0))
    if device == "cuda":
        if (here := int(os.environ["LOCAL_WORLD_SIZE"])) > torch.cuda.device_count():
            raise ValueError(f"{here} workers on this machine, which has {torch.cuda.device_count()} GPUs; lower "
                             "--nproc_per_node")
        device = f"cuda:{place}"
        torch.cuda.set_device(device)
    # torchrun's store outlives a restart, with the addresses of those that died; hence a prefix for each attempt on
    # one machine (several may count differently). All wait while the first writes a checkpoint, which may take long.
    store, rank, world = next(dist.rendezvous("env://"))
    if os.environ.get("LOCAL_WORLD_SIZE") == str(world):
        store = dist.PrefixStore("attempt " + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group("gloo" if device == "cpu" else "nccl", store=store, rank=rank, world_size=world,
                            timeout=timedelta(hours=2))
    return Worker(rank, world, torch.device(device), place == 0)


def launch(argv: list[str], procs: int) -> int:
    """Run this script as `procs` single-threaded workers on this machine; returns the exit status.

    On small matrices two processes of one thread are faster than two threads of one process. Freed memory
    stays with the process, for fewer page faults."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = os.environ | {"WORLD_SIZE": str(procs), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                        "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
                        "MALLOC_TRIM_THRESHOLD_": str(1 << 33)}
    command = [sys.executable, os.path.abspath(__file__), *argv]
    ranks = [{"RANK": str(r), "LOCAL_RANK": str(r)} for r in range(procs)]
    # In a session of their own they hear of Ctrl-C from here alone; and they are asked to end when this process does.
    workers = [subprocess.Popen(command, env=env | rank, start_new_session=True, preexec_fn=end_with_parent)
               for rank in ranks]
    asked = []

    def pass_on(number: int, frame: object) -> None:
        asked.append(number)
        for w in workers:
            # SIGTERM also ends one that is still importing, without a traceback. Who asks twice will not wait.
            w.terminate() if len(asked) == 1 else w.kill()
    on_signals(pass_on)
    while any(w.poll() is None for w in workers) and not any(w.returncode for w in workers):
        time.sleep(0.1)
    first = [(r, w.returncode) for r, w in enumerate(workers) if w.poll()]
    for w in workers:                                  # one has failed, or all are done
        try:
            w.wait(timeout=10)
        except subprocess.TimeoutExpired:
            w.kill()
            w.wait()
    for r, code in first:
        if code < 0 and not asked:                     # it could not say so itself
            print(f"train.py: worker {r} was ended by {signal.Signals(-code).name}; continue with --resume auto",
                  file=sys.stderr)
    codes = [w.returncode for w in workers]
    if asked and all(code < 0 for code in codes):      # before there was anything to save
        print("train.py: stopped", file=sys.stderr)
        return 130
    return next((code for code in (2, 130) if code in codes), int(any(codes)))


def end_with_parent() -> None:
    """Have the system send this process SIGTERM when its parent ends, however that comes about (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)             # PR_SET_PDEATHSIG


def bf16_is_faster(width: int) -> bool:
    """Whether this CPU takes a batch through a linear map of the model and back at least 1.5 times faster in bfloat16
    than in float32. Every packed batch has another number of rows, for which some CPUs (AMX) build code anew: with
    them bfloat16 can win on a matrix three times over and lose a step of a narrow model."""
    layer = nn.Linear(width, 4 * width)

    def seconds(rows: int, on: bool) -> float:
        x = torch.randn(rows, width, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            return timeit.timeit(lambda: layer(x).sum().backward(), number=1)

    fp32, bf16 = (statistics.median(seconds(640 + 24 * i, on) for i in range(12)) for on in (False, True))
    return fp32 > 1.5 * bf16


# ---- batches -----------------------------------------------------------------------------------------------

@dataclass
class TextBatch:
    """Texts for stage 1."""
    ids: Tensor             # (T,)
    lengths: list[int]      # latents of each text
    noise: Tensor           # (Lv, Dz) of the posterior sample
    hidden: Tensor          # (T,) bool, tokens masked for L_mask

    @property
    def positions(self) -> int:
        return sum(self.lengths)

    def counts(self) -> list[float]:
        """Tokens, masked tokens."""
        return [self.ids.numel(), int(self.hidden.sum())]


@dataclass
class ImageBatch:
    """Images of one size for stage 1b."""
    x: Tensor               # (B, 3, H, W) in [-1, 1]
    noise: Tensor           # (B, Cz, h, w) of the posterior sample

    @property
    def positions(self) -> int:
        return self.noise[:, 0].numel()

    def counts(self) -> list[float]:
        """Images."""
        return [len(self.x)]


@dataclass
class Batch:
    """Samples for the prior, packed, of any tasks; everything random is in here already."""
    ids: Tensor             # (T,)
    lengths: list[int]      # latents of each text
    posterior: Tensor       # (Lv, Dz) noise of the posterior sample
    hidden: Tensor          # (T,) bool, tokens masked for L_mask
    layout: Layout
    plan: Plan
    targets: Tensor         # (n,) positions with t > 0, the only ones whose velocity matters
    target_plan: Plan
    source: Tensor          # (Lt,) which VAE latent each text position holds
    noisy: Tensor           # (Lt,) bool, t > 0: bears L_text
    eps_text: Tensor        # (Lt, Dz)
    z_image: Tensor         # (Li, Cz) clean
    loss_image: Tensor      # (Li,) bool, bears L_image
    eps_image: Tensor       # (Li, Cz)
    t: Tensor               # (U,) distinct times; t[0] = 0
    t_index: Tensor         # (L,)

    @property
    def positions(self) -> int:
        return len(self.layout)

    def counts(self) -> list[float]:
        """Loss positions x channels of L_image and of L_text in each task; tokens, masked tokens."""
        image = int(self.loss_image.sum()) * self.eps_image.shape[1]
        text = torch.bincount(self.text_task()[self.noisy], minlength=len(TASKS)) * self.eps_text.shape[1]
        return [image, *text.tolist(), self.ids.numel(), int(self.hidden.sum())]

    def text_task(self) -> Tensor:
        """(Lt,) the task of each text position."""
        return self.layout.task[self.layout.sample[self.layout.segment != masks.I]]


def moved(x, device: torch.device, seen: dict | None = None):
    """A batch with every tensor in it on the device; what is there twice, moved once."""
    seen = {} if seen is None else seen
    if device.type == "cpu":
        return x
    if id(x) not in seen:
        if isinstance(x, Tensor):
            new = x.to(device, non_blocking=True)
        elif dataclasses.is_dataclass(x):
            new = type(x)(*(moved(getattr(x, f.name), device, seen) for f in dataclasses.fields(x)))
        else:
            new = [moved(y, device, seen) for y in x] if isinstance(x, list) else x
        seen[id(x)] = new, x                                   # x itself, so that no other takes its id
    return seen[id(x)][0]


class Batches:
    """Sample numbers -> packed batches, for one dataset and one system."""
    def __init__(self, args: argparse.Namespace, dataset, model: Cola):
        self.args, self.dataset, self.model = args, dataset, model
        self.loc = (flow.default_loc(args.text_latent_dim, args.block_len) if args.text_loc is None
                    else args.text_loc)
        self.masking = args.vae_lr_ratio > 0 and args.lambda_mask > 0
        self.images: dict[int, Tensor] = {}    # image number -> clean latents (h, w, Cz): the VAE is frozen

    def rng(self, k: int, purpose: int) -> np.random.Generator:
        return data.rng(self.args.seed, k, purpose)

    def item(self, task: int, k: int) -> tuple[str, int, str]:
        """Sample k of a task: its instruction ("" where the task has none), image (-1: none) and text."""
        item = getattr(self.dataset, TASKS[task])(k)
        return item if task == IT2T else ("", item[1], item[0]) if task == T2I else ("", -1, item)

    def whole(self, ids: list[int]) -> list[int]:
        """Tokens of a text, ended and filled up to whole blocks; one longer than seq_len is cut, to whole
        blocks, and does not end."""
        block = self.model.block_len * self.model.text_vae.patch_size
        n = self.args.seq_len // block * block
        return data.pad_to_multiple(ids, block, self.model.tokenizer.end) if len(ids) < n else ids[:n]

    def text_ids(self, text: str) -> list[int]:
        """The tokens of a whole text."""
        return self.whole(self.model.tokenizer.encode(text))

    def cut_text(self, text: str, draw: np.random.Generator) -> tuple[list[int], int, range]:
        """A text of which all before a cut is given, nothing to all of it, as sampling has it: tokens, latents
        before the cut, latents that are filled up (Cola.align)."""
        ids = self.model.tokenizer.encode(text)
        ids, cut, filling = self.model.align(ids, int(draw.integers(min(len(ids) + 1, len(self.whole(ids))))))
        ids = self.whole(ids)
        return ids, min(cut, len(ids)) // self.model.text_vae.patch_size, filling

    def vae_noise(self, k: int, latents: int, masking: bool) -> tuple[np.ndarray, np.ndarray]:
        """Of sample k: noise of the posterior sample (latents, Dz), and which tokens L_mask hides, bool."""
        vae = self.model.text_vae
        tokens = latents * vae.patch_size
        noise = self.rng(k, data.POSTERIOR).standard_normal((latents, vae.latent_dim), np.float32)
        return noise, self.rng(k, data.MASK).random(tokens) < 0.15 if masking else np.zeros(tokens, bool)

    @torch.no_grad()
    def image_latents(self, index: list[int]) -> list[Tensor]:
        """Normalised mean latents of images, (h, w, Cz) each; computed once, up to LATENT_BYTES of them, and always
        8 at a time: how products round depends on their sizes, and a resumed run must find the same numbers."""
        new, latents, vae = sorted(set(index) - self.images.keys()), {}, self.model.image_vae
        for hw in {self.dataset.image_hw(i) for i in new}:
            group = [i for i in new if self.dataset.image_hw(i) == hw]
            for eight in (group[at:at + 8] for at in range(0, len(group), 8)):
                x = np.stack(self.dataset.images([*eight, *eight[-1:] * (8 - len(eight))]))
                x = sample.to_float(x).to(self.model.device)                                 # (8, 3, H, W)
                z = vae.normalize(vae.encode(x)[0]).permute(0, 2, 3, 1).cpu()                # (8, h, w, Cz)
                latents |= {i: one.clone() for i, one in zip(eight, z)}             # a view would keep all 8
        if latents and len(self.images) * next(iter(latents.values())).nbytes < LATENT_BYTES:
            self.images |= latents
        return [latents[i] if i in latents else self.images[i] for i in index]

    def texts(self, numbers: range) -> list[TextBatch]:
        """Whatever the tasks would have the text VAE encode: texts, captions, instructions, answers."""
        ids, lengths, noise = [], [], []
        for k in numbers:
            task = pick_task(self.args, self.rng(k, data.TASK).random())
            prompt, _, text = self.item(task, k)
            text = self.cut_text(text, self.rng(k, data.DROP))[0] if task == T2T else self.text_ids(text)
            new = [text, self.model.ids(prompt, end=False)]
            ids += new[0] + new[1]
            latents = [len(x) // self.args.text_patch for x in new if x]
            lengths += latents
            noise.append(self.vae_noise(k, sum(latents), True))
        normal, hidden = (torch.from_numpy(np.concatenate(x)) for x in zip(*noise))
        return [TextBatch(torch.tensor(ids), lengths, normal, hidden)]

    def pixels(self, numbers: range) -> list[ImageBatch]:
        """Images for stage 1b, in one batch per size."""
        vae, batches, n = self.model.image_vae, [], self.dataset.num_images
        chosen = [(int(self.rng(k, data.PICK).integers(n)), k) for k in numbers]
        for hw in sorted({self.dataset.image_hw(i) for i, _ in chosen}):
            group = [(i, k) for i, k in chosen if self.dataset.image_hw(i) == hw]
            x = sample.to_float(np.stack(self.dataset.images([i for i, _ in group])))        # (B, 3, H, W)
            shape = (vae.channels, hw[0] // vae.downsample, hw[1] // vae.downsample)
            noise = [self.rng(k, data.POSTERIOR).standard_normal(shape, np.float32) for _, k in group]
            batches.append(ImageBatch(x, torch.from_numpy(np.stack(noise))))
        return batches

    def make(self, work: list[tuple[int, int]]) -> Batch:
        """The packed batch of these samples, each a task and a number."""
        a, m, S = self.args, self.model, len(work)
        p, bl, dz, cz = m.text_vae.patch_size, m.block_len, m.text_vae.latent_dim, m.image_vae.channels
        items = [self.item(task, k) for task, k in work]
        pictures = iter(self.image_latents([index for _, index, _ in items if index >= 0]))
        ids, lengths, samples, vae_noise, normals, shifts, eps_text, eps_image, z_image = ([] for _ in range(9))
        start, prompt_at, text_at, prefix_at, cut, fill, filled, slot = np.zeros((8, S), int)  # of each sample

        def add(tokens: list[int]) -> int:
            """Queue a text for the VAE; returns where its latents will begin."""
            ids.extend(tokens)
            lengths.extend([len(tokens) // p] if tokens else [])
            return (len(ids) - len(tokens)) // p

        for s, ((task, k), (prompt, _, text)) in enumerate(zip(work, items)):
            picture = None if task == T2T else next(pictures)
            draw, begin = self.rng(k, data.DROP), len(ids)
            drop = draw.random() < a.cfg_drop
            prompt = m.ids(prompt, end=False)
            if task == T2T:                                        # what comes before the cut is given
                text, cut[s], filling = self.cut_text(text, draw)
                fill[s], filled[s] = filling.start, filling.stop
            else:
                text = [] if drop and task == T2I else self.text_ids(text)
            n, start[s] = len(text) // p, len(prompt) // p         # a dropped prompt still moves the answer
            hw = (0, 0) if task == T2T or drop and task == IT2T else tuple(picture.shape[:2])
            noisy = 0 if task == T2I and draw.random() >= a.aux_caption else n
            clean = 0 if drop else n if task == T2I else n - bl    # no one looks at an answer's last block
            prompt_at[s], text_at[s] = add([] if drop else prompt), add(text)
            prefix_at[s], skip = text_at[s], 0
            if task == T2T:
                if draw.random() < 0.5:                            # in half it bears no loss
                    skip = cut[s] // bl * bl
                if cut[s] and m.text_vae.config["block_len"] > 1:  # and it is encoded alone
                    prefix_at[s] = add(text[:cut[s] * p])
            samples.append(Sample(task, 0 if drop else start[s], hw, clean, noisy, start[s], skip=skip))
            vae_noise.append(self.vae_noise(k, (len(ids) - begin) // p, self.masking))
            noise, pixels = self.rng(k, data.NOISE), hw[0] * hw[1]
            eps_image.append(noise.standard_normal((pixels, cz), np.float32))
            eps_text.append(noise.standard_normal((noisy, dz), np.float32)[skip:])
            slot[s] = 1 + sum(map(len, normals))               # times: 0 clean, then image, block, block, ...
            draws = self.rng(k, data.TIME).standard_normal(1 + n // bl)
            if a.time_per == "sample":
                draws[1:] = draws[-1]
            normals.append(draws)
            shifts.append(flow.image_shift(pixels * cz))
            if pixels:
                z_image.append(picture.reshape(pixels, cz))

        layout = masks.pack(samples, bl)
        who, segment, block = layout.sample.numpy(), layout.segment.numpy(), layout.block.numpy()  # (L,) each
        task = layout.task.numpy()[who]
        is_image, is_noisy, is_prompt = segment == masks.I, segment == masks.N, segment == masks.P
        index = layout.col.numpy() - np.where(is_prompt, 0, start[who])                      # in its text
        given, clean = index < cut[who], (fill[who] <= index) & (index < filled[who])        # of N
        if m.first_block != "repaint":
            clean |= given & (block == cut[who] // bl)
        moving = is_noisy & ~clean | is_image & (task == T2I)                                # t > 0
        source = np.where(is_prompt, prompt_at[who], np.where(given, prefix_at[who], text_at[who])) + index
        eps = np.zeros((len(who), dz), np.float32)
        eps[is_noisy] = np.concatenate(eps_text)
        z = torch.from_numpy(np.concatenate(normals)).float()                                # (U - 1,)
        loc, shift = torch.full_like(z, self.loc), torch.ones_like(z)
        loc[slot - 1], shift[slot - 1] = m.image_loc, torch.tensor(shifts)
        t = flow.sample_time(z, a.time_law, loc, a.time_scale, shift)                        # (U - 1,)
        tensor, is_text = torch.from_numpy, ~is_image
        targets, (posterior, hidden) = tensor(moving.nonzero()[0]), map(np.concatenate, zip(*vae_noise))
        return Batch(
            torch.tensor(ids, dtype=torch.long), lengths, tensor(posterior), tensor(hidden),
            layout, make_plan(layout), targets, make_plan(layout.select(targets), layout),
            source=tensor(source[is_text]), noisy=tensor(moving[is_text]),
            eps_text=tensor(eps[is_text]),
            z_image=torch.cat(z_image) if z_image else torch.zeros(0, cz),
            loss_image=tensor(moving[is_image]), eps_image=tensor(np.concatenate(eps_image)),
            t=torch.cat([torch.zeros(1), t]),
            t_index=tensor(np.where(moving, slot[who] + np.where(is_image, 0, 1 + block), 0)))


# ---- losses: one module per stage, whose forward takes a batch and the counts of the whole step ------------

class TextStage(nn.Module):
    """Stage 1."""
    def __init__(self, vae: TextVAE, args: argparse.Namespace):
        super().__init__()
        self.vae, self.args = vae, args

    def forward(self, b: TextBatch, counts: list[float]) -> tuple[Tensor, dict[str, Tensor]]:
        """counts: TextBatch.counts of the whole step. The loss and its terms, in nats per token."""
        a = self.args
        loss, terms = text_vae_loss(self.vae, b.ids, b.lengths, b.noise, b.hidden if a.lambda_mask else None,
                                    beta=a.beta, lambda_mask=a.lambda_mask, count=counts[0],
                                    mask_count=counts[1])
        return loss, terms | {"logsnr": terms["logsnr"] * b.ids.numel() / counts[0]}


class ImageStage(nn.Module):
    """Stage 1b."""
    def __init__(self, vae: ImageVAE):
        super().__init__()
        self.vae = vae

    def forward(self, b: ImageBatch, counts: list[float]) -> tuple[Tensor, dict[str, Tensor]]:
        """counts: ImageBatch.counts of the whole step."""
        loss, terms = image_vae_loss(self.vae, b.x, b.noise)
        share = len(b.x) / counts[0]
        return loss * share, {k: v * share for k, v in terms.items()}


class Touch(torch.autograd.Function):
    """A zero to add to a loss, because DDP waits for every parameter: with it the backward pass reaches them
    all, whatever the tasks of a batch, and adds nothing."""
    @staticmethod
    def forward(ctx, *parameters: Tensor) -> Tensor:
        ctx.number = len(parameters)
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[None, ...]:
        return (None,) * ctx.number


def trains_now(interval: list[int], step: int) -> bool:
    """Whether this step is one of the first of its cycle of steps on and steps off (paper, Sec. 4.3)."""
    return step % sum(interval) < interval[0]


class PriorStage(nn.Module):
    """Stage 2: the prior, jointly with the text VAE when that has a learning rate."""
    def __init__(self, model: Cola, args: argparse.Namespace):
        super().__init__()
        self.args, self.mmdit, self.text_vae = args, model.mmdit, model.text_vae
        self.joint, self.step, self.steps = args.vae_lr_ratio > 0, 0, 1    # steps done, and in all
        self.text_vae.requires_grad_(self.joint)
        if self.joint:                     # where the encoder was when the stage began
            self.ref = copy.deepcopy(model.text_vae).requires_grad_(False)
        if args.w_repa:                    # features: the clean image latents (SRA-2, 2601.17830)
            self.repa = nn.Linear(args.width, model.image_vae.channels)

    def forward(self, b: Batch, counts: list[float]) -> tuple[Tensor, dict[str, Tensor]]:
        """counts: Batch.counts of the whole step, over all workers. Terms come before their weights in the
        loss; w_answer is inside "text"."""
        a, vae, terms, loss = self.args, self.text_vae, {}, 0.0
        joint = self.joint and trains_now(a.vae_interval, self.step)
        image_count, *text_counts, token_count, mask_count = counts
        token_count, mask_count = max(token_count, 1), max(mask_count, 1)    # a step may have no text at all

        plan = vae.make_plan(b.lengths)
        with torch.set_grad_enabled(joint and torch.is_grad_enabled()):
            mean, logvar = vae.encode(b.ids, b.lengths, plan)                        # (Lv, Dz)
        if joint:
            loss, terms = text_vae_loss(
                vae, b.ids, b.lengths, b.posterior, b.hidden if a.lambda_mask else None, beta=a.beta,
                lambda_mask=a.lambda_mask, learned_prior=True, posterior=(mean, logvar), count=token_count,
                mask_count=mask_count, plan=plan)
            loss, share = a.lambda_vae * loss, b.ids.numel() / token_count
            terms["logsnr"] = terms["logsnr"] * share if share else mean.new_zeros(())   # a worker without text
        if self.joint:
            with torch.no_grad():
                mean_ref, logvar_ref = self.ref.encode(b.ids, b.lengths, plan)
            numbers = token_count * vae.latent_dim / vae.patch_size
            terms["drift"] = (mean - mean_ref).square().sum() / numbers    # of means whose mean square is 1
            terms["ref"] = kl(mean, logvar, mean_ref, logvar_ref).sum() / token_count
            if a.lambda_ref:
                loss = loss + a.lambda_ref * terms["ref"]

        z0 = vae.latents(mean, logvar, b.posterior).index_select(0, b.source)        # (Lt, Dz)
        is_image, t = b.layout.segment == masks.I, b.t[b.t_index]                    # (L,) each
        # Clean latents are detached where they enter; N is not: L_FM reaches the encoder through z_t and v.
        zt = torch.where(b.noisy[:, None], flow.interpolate(z0, b.eps_text, t[~is_image]), z0.detach())
        zt_image = flow.interpolate(b.z_image, b.eps_image, t[is_image])             # (Li, Cz)
        repa = a.w_repa if self.step < a.repa_until * self.steps and image_count else 0.0
        v_text, v_image, hidden = self.mmdit(
            zt, zt_image, b.t, b.t_index, b.layout, b.plan,
            tap=a.repa_layer - 1 if repa else -1, targets=(b.targets, b.target_plan))

        v = flow.velocity(z0, b.eps_text)[b.noisy]                                   # (targets of text, Dz)
        task = b.text_task()[b.noisy]
        share = [n * (a.w_answer if i == IT2T else 1.0) for i, n in enumerate(text_counts)]
        if any(share):                                         # over all workers: each logs the same terms
            for i, name in enumerate(TASKS):
                if text_counts[i]:
                    terms[f"text_{name}"] = flow.fm_loss(v_text, v, text_counts[i], task == i)
            terms["text"] = sum(terms[f"text_{name}"] * n / sum(share) for name, n in zip(TASKS, share) if n)
            loss = loss + a.lambda_fm * a.w_text * terms["text"]
        if image_count:
            v = flow.velocity(b.z_image, b.eps_image)[b.loss_image]                  # (targets of images, Cz)
            terms["image"] = flow.fm_loss(v if v_image is None else v_image, v, image_count)
            loss = loss + a.lambda_fm * terms["image"]
        if repa:
            cosine = F.cosine_similarity(self.repa(hidden[is_image].float()), b.z_image, dim=-1)     # (Li,)
            terms["repa"] = (1 - cosine)[b.loss_image].sum() * b.z_image.shape[1] / image_count
            loss = loss + a.lambda_fm * repa * terms["repa"]
        trained = [p for p in self.parameters() if p.requires_grad]
        if a.fsdp:                         # those that are whole now, outside the blocks: a gradient on each worker
            loss = loss + 0 * sum(p.sum() for p in trained if not isinstance(p, DTensor))
        else:
            loss = loss + Touch.apply(*trained)
        return loss, {k: v.detach() for k, v in terms.items()}


# ---- the run -----------------------------------------------------------------------------------------------

def new_model(args: argparse.Namespace, dataset) -> Cola:
    """A system with fresh weights, but for those of a public release: the same on every worker, as all start
    from one seed."""
    if not args.init_official:
        tokenizer = data.Tokenizer.named(args.tokenizer) if args.tokenizer else \
            data.Tokenizer.train(dataset.corpus(4000), args.vocab_size)
    torch.manual_seed(args.seed)
    if args.init_official:
        released = sample.load_official(args.init_official, args.image_latent_dim, args.streams)
        tokenizer, text_vae, mmdit = released.tokenizer, released.text_vae, released.mmdit
    else:
        width, layers = args.text_vae_width, args.text_vae_layers
        text_vae = TextVAE(tokenizer.n_vocab, width, 4 * width, args.text_vae_heads, layers, layers,
                           args.text_latent_dim, args.text_patch, args.vae_block_len,
                           None if args.vae_logsnr == "learned" else float(args.vae_logsnr))
    image_vae = ImageVAE(args.image_latent_dim, args.downsample, args.image_vae_width,
                         tuple(args.image_vae_levels), args.image_vae_blocks, args.image_vae_patch)
    hw, head_dim = (args.image_size[0], args.image_size[-1]), args.width // args.heads
    image_vae.check_size(*hw)
    if not args.init_official:
        mmdit = MMDiT(MMDiTConfig(args.text_latent_dim, args.image_latent_dim, args.width, args.heads,
                                  head_dim, args.layers, emb_dim=args.width, rope_dim=head_dim,
                                  streams=args.streams, as_released=args.as_released))
    return Cola(text_vae, image_vae, mmdit, tokenizer, args.block_len, hw, sample.image_loc(vars(args)), args.first_block)


def sharded(stage: PriorStage) -> PriorStage:
    """The stage under FSDP2: every block of the prior a group of its own, whose weights are whole only while it
    works, and all the rest one more."""
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")         # a block's output is a view of what it shares
    stage.mmdit.both_streams = True        # all workers gather the same blocks, whatever their samples are
    mesh = init_device_mesh("cuda" if dist.get_backend() == "nccl" else "cpu", (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False) if stage.args.bf16 == "on" \
        else MixedPrecisionPolicy()
    for block in (*stage.mmdit.blocks, *stage.mmdit.image_blocks):
        fully_shard(block, mesh=mesh, mp_policy=policy)
        for method in ("before", "after"):
            register_fsdp_forward_method(block, method)
    return fully_shard(stage, mesh=mesh)


def whole(x, keep: bool = True):
    """A nested state with every sharded tensor put together on the CPU: all workers must ask for it. None for these
    tensors where it is not kept."""
    if isinstance(x, dict):
        return {k: whole(v, keep) for k, v in x.items()}
    if isinstance(x, list):
        return [whole(v, keep) for v in x]
    if not isinstance(x, DTensor):
        return x
    x = x.full_tensor()
    return x.cpu() if keep else None


def like(x: Tensor, p: Tensor) -> Tensor:
    """x, on p's device and sharded as p is."""
    x = x.to(p.device)
    return distribute_tensor(x, p.device_mesh, p.placements) \
        if isinstance(p, DTensor) and not isinstance(x, DTensor) else x


def parts(model: Cola) -> dict[str, nn.Module]:
    return {"text_vae": model.text_vae, "image_vae": model.image_vae, "mmdit": model.mmdit}


def read_log(path: Path) -> list[dict]:
    """The steps of a log.jsonl; a line that was cut off, by a full disk or a power failure, is left out."""
    entries = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            entries += [entry] * (isinstance(entry, dict) and entry.get("stage") in STAGES and
                                  type(entry.get("step")) is int)
    return entries


def check_optimizers(optimizers: list[torch.optim.Optimizer], states: list[dict]) -> None:
    """ValueError unless a checkpoint's states are of these optimizers and their parameters."""
    if not isinstance(states, list) or len(states) != len(optimizers):
        raise ValueError("other optimizers")
    for o, state in zip(optimizers, states):
        held = [p for g in o.param_groups for p in g["params"]]
        moments = state.get("state") if isinstance(state, dict) else None
        if not isinstance(moments, dict) or {*moments} != {*range(len(held))}:
            raise ValueError("other numbers of parameters")
        for i, p in enumerate(held):
            muon = isinstance(o, torch.optim.Muon)
            want = {"momentum_buffer": p} if muon else {"step": torch.zeros(()), "exp_avg": p, "exp_avg_sq": p}
            if not isinstance(moments[i], dict):
                raise ValueError("no moments")
            sample.check_state(moments[i], want)


class Run:
    """Everything a run carries along: the system, its average, where it stands, and its log."""
    def __init__(self, args: argparse.Namespace, worker: Worker, model: Cola, dataset):
        self.args, self.worker, self.model, self.dataset = args, worker, model, dataset
        self.batches, self.out = Batches(args, dataset, model), Path(args.out_dir)
        self.progress = dict.fromkeys(STAGES, 0)               # steps done
        self.seconds = 0.0                                     # of training
        self.ema: dict[str, dict[str, Tensor]] = {}            # averaged weights, by part
        self.optimizer_state: dict = {}                        # of the stage that is under way: its name, the states
        self.reference: dict[str, Tensor] | nn.Module = {}     # the text VAE when a joint stage 2 began
        self.repa: nn.Module | None = None                     # the head of L_REPA, trained beside the model
        self.repa_state: dict[str, Tensor] = {}
        self.damaged = False                                   # ckpt.pt is, and the one before was taken
        self.stop = 0                                          # the signal that asked us to leave

    def state(self, keep: bool = True) -> dict:
        """The checkpoint: plain types and tensors, whole. All workers must ask for it, and may keep it or not."""
        m = self.model
        weights = {name: module.state_dict() for name, module in parts(m).items()}
        config = {"text_vae": m.text_vae.config, "image_vae": m.image_vae.config,
                  "mmdit": dataclasses.asdict(m.mmdit.config),
                  "block_len": m.block_len, "image_hw": list(m.image_hw),
                  "tasks": sorted(tasks_of(self.args))}
        repa = self.repa.state_dict() if self.repa else self.repa_state
        return whole({"format": sample.FORMAT, "config": config, "args": plain(self.args),
                      "tokenizer": m.tokenizer.to_dict(), "model": weights | {"repa": repa}, "ema": weights | self.ema,
                      "progress": self.progress, "optimizers": self.optimizer_state, "seconds": self.seconds,
                      "reference": self.reference if isinstance(self.reference, dict) else self.reference.state_dict()}, keep)

    def save(self) -> None:
        """Write out/ckpt.pt whole or not at all; the one before becomes ckpt.prev.pt. Agreed if it cannot be written."""
        state, error = self.state(keep=not self.worker.rank), ""
        if not self.worker.rank:
            try:
                self.write(state)
            except OSError as reason:
                error = str(reason)
        self.worker.agree(error)

    def write(self, state: dict) -> None:
        temporary, path, before = (self.out / name for name in ("ckpt.pt.tmp", "ckpt.pt", "ckpt.prev.pt"))
        try:
            with open(temporary, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:               # torch's zip writer has errors of its own
            temporary.unlink(missing_ok=True)
            raise OSError(f"{temporary}: cannot be written ({str(error).partition(chr(10))[0]:.80}); "
                          f"{path} is as it was") from None
        if path.exists() and not self.damaged:
            spare = self.out / "ckpt.prev.tmp"                 # there are a whole ckpt.pt and, after the first save,
            spare.unlink(missing_ok=True)                      # a whole ckpt.prev.pt at every moment
            try:
                os.link(path, spare)
            except OSError:                                    # a file system without links
                shutil.copyfile(path, spare)
            os.replace(spare, before)
        os.replace(temporary, path)
        self.damaged = False

    def restore(self, checkpoint: dict) -> None:
        """Average, optimizers and place of the checkpoint that the model was built of."""
        self.progress, self.seconds = dict(checkpoint["progress"]), checkpoint["seconds"]
        if self.progress["mmdit"]:                             # before, weights and average are one
            self.ema = {name: checkpoint["ema"].get(name) for name in ("text_vae", "mmdit")}
        self.repa_state = checkpoint["model"].get("repa", {})
        averages = [(state, parts(self.model)[name]) for name, state in self.ema.items()]
        averages += [(checkpoint["reference"], self.model.text_vae)] * bool(checkpoint["reference"])
        if not all(isinstance(state, dict) for state in (self.repa_state, *(state for state, _ in averages))):
            raise ValueError(f"{self.out}: a checkpoint without its averages; take an earlier copy")
        for state, module in averages:
            sample.check_state(state, module.state_dict())
        self.damaged = "damaged" in checkpoint
        self.optimizer_state, self.reference = checkpoint["optimizers"], checkpoint["reference"]

    @contextlib.contextmanager
    def claim(self) -> Iterator[None]:
        """The folder is this run's alone. Agreed where another run writes there, or has done so since the checkpoint
        was read."""
        self.out.mkdir(parents=True, exist_ok=True)
        with open(self.out / ".lock", "a") as lock:
            error = ""
            if not self.worker.rank:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if written(self.out) != self.args.found:
                        error = f"{self.out}: another run wrote there just now; start again"
                except BlockingIOError:
                    error = f"{self.out}: another run is writing there; choose another --out_dir"
            self.worker.agree(error)
            yield

    def trim_log(self) -> None:
        """Drop from log.jsonl the steps behind the checkpoint, which will be taken again."""
        path = self.out / "log.jsonl"
        if path.exists() and not self.worker.rank:
            kept = [e for e in read_log(path) if e["step"] <= self.progress[e["stage"]]]
            temporary = path.with_suffix(".tmp")
            try:
                temporary.write_text("".join(json.dumps(e) + "\n" for e in kept))
            except OSError as error:
                raise OSError(f"{temporary}: cannot be written ({error.strerror}); nothing was changed") from None
            os.replace(temporary, path)

    def asked_to_stop(self, number: int, frame: object) -> None:
        """A signal: leave after this step. A second one has its usual effect."""
        self.stop = number
        on_signals(signal.default_int_handler)

    def step(self, wrapped: nn.Module, optimizers: list[torch.optim.Optimizer], batches: list,
             amp: torch.autocast) -> tuple[dict[str, float], float]:
        """One step on this worker's micro-batches: its share of each loss term, and the gradient's norm."""
        world, sums = self.worker.world, {}
        counts = self.worker.sum(np.sum([b.counts() for b in batches], 0).tolist())
        for i, batch in enumerate(batches):
            last = i == len(batches) - 1
            ddp = isinstance(wrapped, DistributedDataParallel)
            with wrapped.no_sync() if ddp and not last else contextlib.nullcontext():
                with amp:
                    loss, terms = wrapped(batch, counts)
                (loss * world).backward()  # the wrapper averages over workers; the loss is a share of a sum
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + value.item()
        for p in wrapped.parameters():                         # unused by all samples: gradient 0, as by DDP
            if p.requires_grad and p.grad is None:
                p.grad = torch.zeros_like(p)
        norm = float(whole(nn.utils.clip_grad_norm_(wrapped.parameters(), self.args.clip)))
        for o in optimizers:
            if math.isfinite(norm):                            # else the step is not taken, on no worker
                o.step()
            o.zero_grad(set_to_none=True)
        return sums, norm

    def average(self, names: tuple[str, ...], step: int) -> None:
        """Let the averaged weights of these parts follow, faster in the first steps."""
        decay = min(self.args.ema, (1 + step) / (10 + step))
        for name in names:
            now, ema = parts(self.model)[name].state_dict(), self.ema[name]
            floats = [k for k, v in now.items() if v.is_floating_point()]
            here = lambda x: x.to_local() if isinstance(x, DTensor) else x         # this worker's part
            torch._foreach_lerp_([here(ema[k]) for k in floats], [here(now[k]) for k in floats], 1 - decay)

    def fit(self, stage: str, module: nn.Module, make_optimizers: Callable[[], list], steps: int,
            make: Callable[[int], list], about: Callable[[int], str], averaged: tuple[str, ...] = (),
            at_end=lambda: None) -> None:
        """Train one stage. make(step) -> this worker's micro-batches of a step, about(step) what is in them, of
        all workers; averaged: parts kept as EMA; at_end is called before the last save. KeyboardInterrupt when a
        signal asks, after saving."""
        a, worker, start = self.args, self.worker, self.progress[stage]
        if start >= steps:
            return
        wrapped = module if worker.world == 1 else sharded(module) if a.fsdp and stage == "mmdit" else \
            DistributedDataParallel(module, gradient_as_bucket_view=True)
        optimizers = make_optimizers()                         # of what is now the module's parameters
        groups = [g for o in optimizers for g in o.param_groups]
        peaks = [g["lr"] for g in groups]
        if stage not in averaged:
            self.ema.pop(stage, None)                          # its weights are about to change
        for name in averaged:
            now = parts(self.model)[name].state_dict()
            begun = start and name in self.ema
            self.ema[name] = {k: like(self.ema[name][k], v) if begun else v.clone() for k, v in now.items()}
        if start and self.optimizer_state.get("stage") == stage:
            states = self.optimizer_state.get("states")
            try:
                check_optimizers(optimizers, states)
            except ValueError as error:
                raise Agreed(f"{self.out}: the optimizers of its checkpoint are of other parameters, or damaged ({error}); "
                             "resume with the flags it had (--optimizer, --vae_lr_ratio, --w_repa), or start anew with "
                             "--init_from") from None
            for o, state in zip(optimizers, states):           # each moment is sharded before the next one is
                held = [p for g in o.param_groups for p in g["params"]]
                for i, moments in state["state"].items():
                    moments |= {k: like(v, held[i]) for k, v in moments.items() if v.shape == held[i].shape}
                o.load_state_dict({"state": state["state"], "param_groups": o.state_dict()["param_groups"]})
            groups = [g for o in optimizers for g in o.param_groups]
        bf16 = a.bf16 == "on" and stage != "text_vae"
        amp = torch.autocast(worker.device.type, torch.bfloat16, enabled=bf16)
        log = open(self.out / "log.jsonl", "a") if worker.rank == 0 else None
        bar = tqdm(desc=stage, unit="step", total=steps, initial=start, mininterval=1, disable=log is None)
        last, lost = time.perf_counter(), 0

        def prepared(step: int) -> list:
            batches = moved(make(step), worker.device)
            for batch in batches if stage == "mmdit" else []:
                batch.plan.build()
                batch.target_plan.build()
            return batches
        with bar, log or contextlib.nullcontext(), ThreadPoolExecutor(1) as ahead:     # batches are made one step ahead
            coming = ahead.submit(prepared, start)
            for step in range(start, steps):
                rise, fall = (step + 1) / (a.warmup * steps + 1), (steps - step) / (a.cooldown * steps + 1)
                for g, peak in zip(groups, peaks):
                    g["lr"] = peak * min(1.0, rise, fall)
                    if g.get("rests"):
                        g["lr"] *= trains_now(a.vae_interval, step)
                module.step, module.steps, began = step, steps, time.perf_counter()
                batches = coming.result()
                waited, done = time.perf_counter() - began, step + 1 == steps
                coming = None if done else ahead.submit(prepared, step + 1)
                sums, norm = self.step(wrapped, optimizers, batches, amp)
                lost = 0 if math.isfinite(norm) else lost + 1
                if lost == LOST:
                    kept = f"the last good checkpoint is {self.out}/ckpt.pt" if written(self.out) else "none was saved yet"
                    raise Agreed(f"{stage}: the gradient was no number in {LOST} steps in a row, up to step "
                                 f"{step + 1}, {about(step)}; {kept}")
                self.average(averaged, step)
                names = sorted(sums)
                positions = sum(b.positions for b in batches)
                signal_seen, positions, *values = worker.sum(
                    [float(self.stop), positions, *(sums[n] for n in names)])
                now = time.perf_counter()
                took, last = now - last, now
                self.seconds += took
                self.progress[stage] = step + 1
                if log:
                    terms = dict(zip(names, values))
                    entry = {"stage": stage, "step": step + 1, **terms, "lr": groups[0]["lr"], "norm": norm,
                             "positions": int(positions), "skipped": lost, "seconds": round(took, 4),
                             "data_seconds": round(waited, 4)}
                    log.write(json.dumps(entry) + "\n")
                    shown = {n: f"{v:.4f}" for n, v in terms.items()} | {"positions/s": f"{positions / took:.0f}"}
                    bar.set_postfix(shown, refresh=False)
                    bar.update()
                if (step + 1) % a.save_every == 0 or done or signal_seen:
                    states = [o.state_dict() for o in optimizers]
                    self.optimizer_state = {} if done else {"stage": stage, "states": states}
                    if done:
                        at_end()
                    if log:
                        log.flush()
                    self.save()
                    last = time.perf_counter()
                if signal_seen:
                    raise KeyboardInterrupt


def optimizers_for(args: argparse.Namespace, stage: nn.Module, lr: float,
                   muon: bool) -> list[torch.optim.Optimizer]:
    """AdamW, and where `muon` says so Muon for the matrices inside the blocks; in stage 2 the text VAE at its
    own rate."""
    hidden, rest, vae = [], [], []
    for name, p in stage.named_parameters():
        if p.requires_grad:
            is_hidden = muon and "blocks." in name and p.dim() == 2 and ".ada." not in name
            (vae if name.startswith("text_vae.") else hidden if is_hidden else rest).append(p)
    groups = [{"params": rest, "lr": lr}]
    if vae:
        groups.append({"params": vae, "lr": lr * args.vae_lr_ratio, "rests": True})
    optimizers = [torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=args.weight_decay, fused=True)]
    if hidden:
        optimizers.append(torch.optim.Muon(hidden, lr=args.muon_lr, weight_decay=args.weight_decay,
                                           ns_steps=3))       # 5 reached no more, for a tenth of a step
    return optimizers


def train_stages(run: Run) -> None:
    """Stage 1, stage 1b, stage 2, as far as --stage says."""
    a, w, model, batches = run.args, run.worker, run.model, run.batches
    w.training = True
    wanted, muon = stages_of(a), a.optimizer == "muon"
    scaled = lambda steps: max(1, round(steps * a.scale)) if steps else 0
    if "text_vae" in wanted:
        stage = TextStage(model.text_vae, a)
        run.fit("text_vae", stage, lambda: optimizers_for(a, stage, a.text_vae_lr, False),
                scaled(a.text_vae_steps),
                lambda step: batches.texts(w.share(step * a.text_vae_batch, a.text_vae_batch)),
                lambda step: f"texts {step * a.text_vae_batch} to {(step + 1) * a.text_vae_batch - 1}")
    if "image_vae" in wanted:
        model.image_vae.train()
        stage = ImageStage(model.image_vae)
        shown = (b.x.to(w.device) for k in range(0, 1024, 32) for b in batches.pixels(range(k, k + 32)))
        run.fit("image_vae", stage, lambda: optimizers_for(a, stage, a.image_vae_lr, muon),
                scaled(a.image_vae_steps),
                lambda step: batches.pixels(w.share(step * a.image_vae_batch, a.image_vae_batch)),
                lambda step: f"images {step * a.image_vae_batch} to {(step + 1) * a.image_vae_batch - 1}",
                at_end=lambda: model.image_vae.set_statistics(shown))
    model.image_vae.eval().requires_grad_(False)
    if "mmdit" in wanted:
        torch.manual_seed(a.seed)                              # for the head of L_REPA, in a resumed run too
        stage, M, n = PriorStage(model, a), a.micro_steps, a.batch_size
        if a.w_repa:
            run.repa = stage.repa
            if run.repa_state:
                try:
                    sample.check_state(run.repa_state, stage.repa.state_dict())
                except ValueError as error:
                    raise Agreed(f"{a.out_dir}: the head of L_REPA in its checkpoint is another ({error})") from None
                stage.repa.load_state_dict(run.repa_state)
        if a.compile:                                          # before any wrapper
            model.mmdit.compile_blocks()
        if stage.joint:
            stage.ref.load_state_dict(run.reference or model.text_vae.state_dict())
            run.reference = stage.ref

        def make(step: int) -> list[Batch]:
            micro = [[(task, k) for k in w.share((step * M + m) * n, n)]
                     for m, task in enumerate(step_tasks(a, step))]
            return [batches.make(work) for work in (micro if a.accumulate else [sum(micro, [])])]

        def about(step: int) -> str:
            return ", ".join(f"{TASKS[task]} samples {(step * M + m) * n} to {(step * M + m + 1) * n - 1}"
                             for m, task in enumerate(step_tasks(a, step)))
        run.fit("mmdit", stage, lambda: optimizers_for(a, stage, a.lr, muon), scaled(a.steps), make, about,
                averaged=("mmdit", "text_vae") if stage.joint else ("mmdit",))


# ---- main --------------------------------------------------------------------------------------------------

RUN_FLAGS = {"out_dir", "resume", "init_from", "init_official", "dry_run", "eval_only", "device", "procs", "fsdp",
             "attention", "compile", "save_every", "strict_data", "eval_samples", "guidance", "text_guidance",
             "text_temperature", "text_shift", "text_snap", "sample_steps", "repaint_share",
             "repaint_cycles"}                                 # never a checkpoint's
GOAL_FLAGS = {"stage", "scale", "data", "text", "aspect"}      # a checkpoint's only where its own run goes on
ARCHITECTURE = {"text_latent_dim", "text_patch", "text_vae_width", "text_vae_layers", "text_vae_heads",
                "vae_block_len", "vae_logsnr", "vocab_size", "tokenizer", "image_latent_dim", "downsample",
                "image_vae_width", "image_vae_levels", "image_vae_blocks", "image_vae_patch",
                "width", "layers", "heads", "streams", "as_released"}
RELEASED = {"text_latent_dim": "latent_dim", "text_patch": "patch_size", "text_vae_width": "dim",
            "text_vae_layers": "encoder_num_blocks", "text_vae_heads": "num_heads", "vae_block_len": "block_len"}


def written(folder: Path) -> int:
    """When the checkpoint in it was last written, in ns; 0 if there is none."""
    path = folder / "ckpt.pt"
    return path.stat().st_mtime_ns if path.exists() else 0


def prepare(args: argparse.Namespace) -> tuple[dict | None, argparse.Namespace]:
    """Settle what to start from, before any work: the checkpoint to continue, or None; its flags become the
    defaults. ValueError for a run that would be overwritten and for flags that contradict the checkpoint."""
    path, before = (Path(args.out_dir) / name for name in ("ckpt.pt", "ckpt.prev.pt"))
    args.found, exists = written(path.parent), path.exists() or before.exists()
    goes_on = args.eval_only or args.resume == "auto" and exists
    if exists and not goes_on:
        raise ValueError(f"{path if path.exists() else before} exists; continue it with --resume auto, or choose another "
                         "--out_dir")
    if not goes_on and args.init_official:
        if args.init_from:
            raise ValueError("--init_from and --init_official: name one of them")
        follow_release(args)
    if not goes_on and not args.init_from:
        check(args)
        if not (args.text_vae_steps or args.vae_lr_ratio and args.lambda_vae or args.init_official):
            raise ValueError("--text_vae_steps 0: the text VAE would never be trained; add --vae_lr_ratio 1, and a "
                             "--lambda_vae above 0")
        return None, args
    source = path if goes_on else Path(args.init_from)
    try:
        checkpoint = sample.read_checkpoint(source)
    except (ValueError, FileNotFoundError) as error:
        if not goes_on or not before.exists():
            raise
        checkpoint = sample.read_checkpoint(before)
        checkpoint["damaged"] = f"{error}; going on from {before}"
    kept = args.given | RUN_FLAGS | (set() if goes_on else GOAL_FLAGS)
    held = stored(checkpoint["args"], source)
    changed = {name: f"--{name} {getattr(args, name)} (was {held[name]})" for name in sorted(args.given & held.keys())
               if name not in RUN_FLAGS | ARCHITECTURE | {"stage", "scale"} and getattr(args, name) not in (held[name], "auto")}
    if {*args.image_size} == {*held.get("image_size", [])} and len({*args.image_size}) == 1:
        changed.pop("image_size", None)                        # 32 is 32 x 32
    for name in ("block_len", "first_block", "image_loc", "image_size", "time_law"):
        if args.eval_only and name in changed:
            raise ValueError(f"{changed[name]}: --eval_only judges the model as it was trained; leave the flag out")
    if changed and goes_on and not args.eval_only:
        checkpoint["changed"] = f"goes on with {', '.join(changed.values())}"
    for name, value in held.items():
        if name in ARCHITECTURE & args.given and getattr(args, name) != value:
            raise ValueError(f"--{name} {getattr(args, name)}: {source} has {value!r}; leave the flag out, "
                             f"or train from nothing")
        if name not in kept:
            setattr(args, name, value)
    check(args)                                        # what was given, together with what was not
    if not goes_on:                                    # its weights alone
        checkpoint["model"]["repa"] = {}
        checkpoint |= {"progress": dict.fromkeys(STAGES, 0), "optimizers": {}, "seconds": 0.0,
                       "reference": {}}
    return checkpoint, args


def stored(flags: dict, source: Path) -> dict:
    """The flags of a checkpoint, every one of a type that the command line could have given. ValueError if not."""
    held = {}
    for action in parser()._actions:
        if action.dest not in flags:
            continue
        value, usual = flags[action.dest], action.default
        kind = bool if isinstance(usual, bool) else action.type or str
        items = value if isinstance(value, list) else [value]
        of_kind = all(type(x) in (kind, int if kind is float else kind) and x in (action.choices or [x]) for x in items)
        if not (value is usual is None or of_kind and isinstance(value, list) == isinstance(usual, list)):
            raise ValueError(f"{source}: damaged in its flag --{action.dest}; take an earlier copy")
        held[action.dest] = value
    return held


def follow_release(args: argparse.Namespace) -> None:
    """Set the flags that a public release settles. ValueError where they were given otherwise."""
    model = sample.load_official(args.init_official)           # mapped: nothing is read yet
    vae, prior = model.text_vae.config, model.mmdit.config
    settled = {ours: vae[theirs] for ours, theirs in RELEASED.items()}
    settled |= {"vae_logsnr": "learned", "width": prior.width, "layers": prior.layers, "heads": prior.heads,
                "block_len": model.block_len, "vocab_size": model.tokenizer.n_vocab, "tokenizer": "",
                "as_released": True}
    for name, value in settled.items():
        if name in args.given and getattr(args, name) != value:
            raise ValueError(f"--{name} {getattr(args, name)}: {args.init_official} has {value}; leave the "
                             "flag out")
        setattr(args, name, value)
    if "text_vae_steps" not in args.given:                     # it is trained
        args.text_vae_steps = 0


def work(args: argparse.Namespace, checkpoint: dict | None, worker: Worker) -> None:
    """One worker's run, from data to metrics. ValueError or OSError where flags and data do not fit."""
    found = checkpoint and ([checkpoint["progress"][stage] for stage in STAGES], checkpoint["seconds"],
                            checkpoint.get("damaged"))
    if len(set(worker.gather([repr(found)]))) > 1:
        raise ValueError(f"{args.out_dir}: workers found different checkpoints; it must be a disk that all of them see")
    attention_taken = cuda_attention.choose(args.attention, worker.device)
    hw, usual = (args.image_size[0], args.image_size[-1]), plain(parse([]))
    if not worker.rank:
        words = [f"--{k} {' '.join(map(str, v)) if isinstance(v, list) else v}"
                 for k, v in plain(args).items() if v != usual[k]]
        print("flags:", " ".join(words) or "all as by default")
        print(attention_taken)
        for warning in (checkpoint.get(name) for name in ("damaged", "changed") if checkpoint):
            if warning:
                print(f"train.py: warning: {warning}", file=sys.stderr)
    world = {} if args.data or args.text else \
        {"pool": args.pool, "any_order": args.any_order, "questions": args.questions}
    dataset = data.open_data(args.seed, args.data, args.text, hw, args.seq_len, args.aspect, args.downsample,
                             args.strict_data, **world)
    missing = sorted(tasks_of(args) - dataset.tasks)
    if missing:
        raise ValueError(f"--tasks asks for {', '.join(missing)}, but this data serves "
                         f"{', '.join(sorted(dataset.tasks))} only; say --tasks "
                         f"{','.join(f'{name}:1' for name in sorted(dataset.tasks))}")
    if checkpoint is None:
        model = new_model(args, dataset)
    else:
        model = sample.build(checkpoint, "model")
        model.image_hw, model.block_len = hw, args.block_len
        model.image_loc, model.first_block = sample.image_loc(vars(args)), args.first_block
        model.image_vae.check_size(*hw)
    block = model.block_len * model.text_vae.patch_size
    pictures = getattr(dataset, "pictures", dataset)
    captions = [(item.name, item.text) for item in getattr(pictures, "items", ())]
    if dataset.num_images and not captions:
        captions = [("a generated scene", dataset.t2i(k)[0]) for k in range(256)]
    for name, text in captions:
        if (n := len(model.tokenizer.encode(text)) + 1) > args.seq_len // block * block:
            raise ValueError(f"{name}: its caption has {n} tokens with the end token, more than whole blocks "
                             f"in --seq_len {args.seq_len}; raise it to {-(-n // block) * block} or shorten the "
                             "caption")
    model.to(worker.device)
    run = Run(args, worker, model, dataset)
    if checkpoint is not None:
        run.restore(checkpoint)
    if args.dry_run:
        if not worker.rank:
            describe(run)
        return
    if args.stage == "image_vae" and not dataset.num_images:
        raise ValueError("--stage image_vae: this data has no images")
    if args.stage == "mmdit" and not args.init_from and not run.progress["mmdit"]:
        for stage in STAGES[:2 if tasks_of(args) - {"t2t"} else 1]:
            if not run.progress[stage] and (stage == "image_vae" or args.text_vae_steps):
                raise ValueError(f"--stage mmdit: the {stage} is not trained; first --stage {stage}, from the "
                                 "second stage on with --resume auto, or name a checkpoint by --init_from")
    if not args.eval_only:
        before = dict(run.progress)
        with run.claim():
            run.trim_log()
            on_signals(run.asked_to_stop)
            train_stages(run)
            if worker.sum([float(run.stop)])[0]:     # a signal since the last step; and the last save is over
                raise KeyboardInterrupt
        if run.progress == before and not worker.rank:
            print(f"{run.out}/ckpt.pt has all the steps asked for: nothing was trained")
    on_signals(signal.default_int_handler)             # nothing is left to save: leave at once
    finish(run)


def describe(run: Run) -> None:
    """--dry_run: parameters, samples and positions of a step of stage 2, its memory, and its first batch."""
    a, w, m = run.args, run.worker, run.model
    print("\n".join(f"  --{name} {value}" for name, value in sorted(plain(a).items())))
    sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in parts(m).items()}
    print("parameters: " + ", ".join(f"{name} {n:,}" for name, n in sizes.items()))
    stage = PriorStage(m, a)
    trained = [p for p in stage.parameters() if p.requires_grad]
    everything = {p for module in (stage, *parts(m).values()) for p in module.parameters()}
    optimizers = optimizers_for(a, stage, a.lr, a.optimizer == "muon")
    muon = {id(p) for o in optimizers if isinstance(o, torch.optim.Muon) for g in o.param_groups
            for p in g["params"]}
    held = sum(p.numel() * (16 if id(p) in muon else 20) for p in trained)   # weight, gradient, moments, average
    held = held / w.world if a.fsdp else held
    work = [(task, i * a.batch_size + k) for i, task in enumerate(step_tasks(a, 0))
            for k in w.share(0, a.batch_size)]
    batch = run.batches.make(work)
    passes = a.micro_steps if a.accumulate else 1
    # 29 numbers of a position, a layer and a unit of width are kept for the backward pass (tests/bench.py).
    kept = 29 * len(batch.layout) / passes * a.layers * a.width * (2 if a.bf16 == "on" else 4)
    print(f"a step: {a.micro_steps} micro-steps of {a.batch_size} samples, {w.world} workers; "
          f"about {len(batch.layout) * w.world:,} positions")
    print("shares of the samples: " + ", ".join(
        f"{name} {share:.2f}" for name, share in task_ratios(a.tasks).items() if share))
    print(f"memory of a worker in stage 2, estimated: {held / 1e9:.2f} GB for what is trained, "
          f"{4 * sum(p.numel() for p in everything - {*trained}) / 1e9:.2f} GB for other weights, "
          f"{kept / 1e9:.2f} GB for the backward pass")
    print("the first batch of this worker, a line a sample:")
    layout = batch.layout
    for s, (task, k) in enumerate(work[:12]):
        segments = layout.segment[layout.sample == s]
        counts = ", ".join(f"{int((segments == i).sum())} {name}" for i, name in enumerate(masks.SEGMENTS)
                           if (segments == i).any())
        print(f"  {TASKS[task]:4s} sample {k}: {counts}")
    print(f"  and {max(0, len(work) - 12)} more; nothing was written")


def finish(run: Run) -> None:
    """Evaluate the averaged weights; write metrics.json, samples.png, loss.png; say what to try next."""
    args, out, worker, metrics = run.args, run.out, run.worker, None
    tasks, generated = tasks_of(args), not args.data and not args.text
    trained = run.progress["mmdit"] and args.stage in ("all", "mmdit")
    judged = generated and args.eval_samples and trained
    state = run.state(keep=not worker.rank or judged)
    if not worker.rank and (out / "log.jsonl").exists():
        evaluate.loss_plot(read_log(out / "log.jsonl"), out / "loss.png")
    if trained and (not worker.rank or judged):
        model = sample.build(state).to(worker.device)
        with torch.autocast(worker.device.type, torch.bfloat16, enabled=args.bf16 == "on"):
            if not worker.rank:
                evaluate.sample_grid(model, args, tasks, run.dataset, out / "samples.png")
            if judged:
                metrics = evaluate.evaluate(model, args, tasks, worker)
    if worker.rank:
        return
    if metrics:
        metrics |= {"seconds": round(run.seconds, 1), "config": plain(args)}
        (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        print(evaluate.table(metrics))
    if not generated:
        print("No rates and no metrics.json: only generated scenes have a reader to judge what is made.")
    wrote = [name for name in ("samples.png", "loss.png", "log.jsonl") if (out / name).exists()]
    caption = "a large red circle above a small blue square on a gray background"
    prefix = "there is a red circle."
    if not generated:
        caption = run.dataset.t2i(0)[0] if "t2i" in tasks else ""
        prefix = " ".join(run.dataset.t2t(0).split()[:6])
    tries = {"t2i": [caption, "--out", "a.png"],
             "it2t": ["a.png" if "t2i" in tasks else "YOUR.png", "describe the image."], "t2t": [prefix]}
    print(f"{run.seconds / 60:.1f} minutes of training; {', '.join([f'{out}/ckpt.pt', *wrote])}.")
    for task in [name for name in tries if name in tasks and run.progress["mmdit"]]:
        words = shlex.join([task, *tries[task], "--checkpoint", f"{out}/ckpt.pt"])
        print(f"try: python sample.py {words}")


def main(argv: list[str] | None = None) -> int:
    """The exit status: 0, 2 for a user's mistake, 130 for a run that was stopped."""
    argv, status = sys.argv[1:] if argv is None else argv, 0
    worker = Worker(int(os.environ.get("RANK", 0)), speaks=os.environ.get("LOCAL_RANK", "0") == "0")
    handlers = {number: signal.getsignal(number) for number in STOP}
    try:
        on_signals(signal.default_int_handler)
        checkpoint, args = prepare(parse(argv))
        batch = {"text_vae": "text_vae_batch", "image_vae": "image_vae_batch", "mmdit": "batch_size"}
        least = min((batch[stage] for stage in stages_of(args)), key=vars(args).get)
        samples = getattr(args, least)
        alone, procs = "RANK" not in os.environ, int(os.environ.get("WORLD_SIZE", 1))
        if alone and args.device == "cpu":
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
            procs = args.procs or min(cores, samples)
        if procs > samples and not args.eval_only:
            raise ValueError(f"--{least} {samples}: fewer samples than the {procs} workers; say --{least} {procs} or "
                             f"more, or take at most {samples} workers")
        if alone and args.device == "cpu" and procs > 1:
            return launch(argv, procs)
        worker = join(args.device)
        if args.device == "cpu":
            torch.set_num_threads(1)
        if args.bf16 == "auto":
            faster = args.device != "cpu" or bf16_is_faster(args.width)
            args.bf16 = "on" if worker.sum([float(faster)]) == [worker.world] else "off"      # all agree
        work(args, checkpoint, worker)
    except (ValueError, OSError) as error:             # the same on every worker until training starts
        if worker.speaks or worker.training and not isinstance(error, Agreed):
            print(f"train.py: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        if worker.rank == 0:
            print("train.py: stopped" + "; continue with --resume auto" * worker.training, file=sys.stderr)
        status = 130
    except Exception as error:
        if os.environ.get("WORLD_SIZE", "1") == "1":
            raise
        if "onnection" not in str(error):              # else another worker has left, and has told why
            traceback.print_exc()
        status = 1
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if dist.is_initialized():
        if status:                                     # others may wait for this one: it does not wait for them
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)
        dist.destroy_process_group()
    return status


if __name__ == "__main__":
    sys.exit(main())
