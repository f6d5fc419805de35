"""Train: tokens and pixels in, one model that writes, draws and describes out.

    stage 1    text VAE      -E log p(x|z) + beta KL + lambda_mask L_mask                              (paper, Eq. 3.16)
    stage 1b   image VAE     reconstruction + beta KL; then frozen
    stage 2    MMDiT prior   lambda_vae L_vae + lambda_fm (L_image + w_text L_text) + lambda_ref KL(q || q_ref)
                                                                                     (paper, Eq. 3.18; blog, section 3)

A step has `micro_steps` micro-steps; each has one task and a fixed range of sample numbers, which the workers share. Whatever
is random about sample k comes from (seed, k, purpose), and every loss is divided by the count of its positions in the whole
step: so the number of workers, accumulation and resuming change nothing but rounding.

    python train.py                                         everything, on generated scenes; on a CPU one worker per core
    torchrun --nproc_per_node=8 train.py --data DIR --text FILE
"""
from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
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


# ---- flags ----------------------------------------------------------------------------------------------------------

def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = sample.Parser(prog="train.py", description=__doc__.split("\n\n")[0])

    def group(title: str):
        g = parser.add_argument_group(title)

        def flag(name: str, default, why: str, **more) -> None:
            more = more or {"type": type(default)}
            g.add_argument(f"--{name}", default=default, help=why, **more)
        return flag

    flag = group("run")
    flag("out_dir", "out", "folder for ckpt.pt, log.jsonl, metrics.json, samples.png, loss.png")
    flag("stage", "all", "train one stage alone", choices=(*STAGES, "all"))
    flag("resume", "never", "auto continues from out_dir/ckpt.pt", choices=("never", "auto"))
    flag("init_from", "", "start from the weights of a checkpoint, at another --image_size or on other data")
    flag("eval_only", False, "evaluate out_dir/ckpt.pt and write metrics.json", action="store_true")
    flag("seed", 0, "same seed, same run")
    flag("scale", 1.0, "multiplies the steps of every stage: 5 takes five times as long")
    flag("device", "cuda" if torch.cuda.is_available() else "cpu", "cuda or cpu", choices=("cuda", "cpu"))
    flag("procs", 0, "workers on a CPU, one thread each; 0 is one per core")
    flag("bf16", "auto", "matrix products in bfloat16; auto times one product of each kind and takes the faster",
         choices=("auto", "on", "off"))
    flag("save_every", 500, "steps between checkpoints")

    flag = group("data")
    flag("data", [], "folders, .jsonl or .tar files of captioned images; none: generated scenes", nargs="+")
    flag("text", [], ".txt, .txt.gz or .jsonl files for t2t; none: captions or stories", nargs="+")
    flag("strict_data", False, "a damaged image among good ones is an error", action="store_true")
    flag("tasks", "t2t:1,t2i:1,it2t:1", "ratios of the tasks")
    flag("image_size", [32], "pixels: one number, or height and width", nargs="+", type=int)
    flag("aspect", False, "keep aspect ratios, in buckets of the same area", action="store_true")
    flag("seq_len", 128, "longest text or caption in tokens")
    flag("vocab_size", 512, "byte-level BPE trained on the corpus")
    flag("tokenizer", "", "a tiktoken encoding instead, such as cl100k_base")
    flag("pool", 20000, "generated scenes in all")
    flag("any_order", 0.0, "share of T2I captions that name the objects in any order: harder")
    flag("questions", 0.5, "share of IT2T samples that ask instead of describe")

    flag = group("text VAE (stage 1)")
    flag("text_latent_dim", 16, "channels of a text latent")
    flag("text_patch", 1, "tokens per latent")
    flag("text_vae_width", 96, "width; the paper has 1536")
    flag("text_vae_layers", 2, "blocks of the encoder and of the decoder; the paper has 4")
    flag("text_vae_heads", 3, "attention heads; the paper has 12")
    flag("vae_block_len", 1, "1 is strictly causal, as in the paper; the release has 16")
    flag("vae_logsnr", "2.5", "'learned', or a fixed log(mu^2 / sigma^2): lower is noisier and more robust")
    flag("beta", 1e-3, "weight of KL(q || N(0, I)), and of E log q in stage 2")
    flag("lambda_mask", 0.1, "weight of the masking loss; 0 saves a pass")
    flag("text_vae_steps", 220, "steps of stage 1")
    flag("text_vae_batch", 48, "texts a step")
    flag("text_vae_lr", 4e-3, "peak learning rate of AdamW")

    flag = group("image VAE (stage 1b)")
    flag("image_latent_dim", 32, "channels of an image latent; 64 at 256 pixels")
    flag("downsample", 8, "pixels per latent along a side; 16 at 256 pixels")
    flag("image_vae_width", 64, "channels of the first level")
    flag("image_vae_steps", 1800, "steps of stage 1b")
    flag("image_vae_batch", 32, "images a step")
    flag("image_vae_lr", 4e-3, "peak learning rate of AdamW")

    flag = group("prior (stage 2)")
    flag("width", 128, "width D; the release has 2048")
    flag("layers", 4, "blocks; the release has 24")
    flag("heads", 4, "attention heads; the release has 16")
    flag("streams", 1, "2 gives text and image their own weights, joined in attention")
    flag("block_len", 16, "text latents generated together")
    flag("steps", 2300, "steps of stage 2")
    flag("batch_size", 96, "samples a micro-step, over all workers")
    flag("micro_steps", 1, "micro-steps a step, each of one task: more accumulate, for large batches in little memory")
    flag("optimizer", "muon", "for the matrices inside the blocks of the prior and the image VAE",
         choices=("muon", "adamw"))
    flag("muon_lr", 0.02, "peak learning rate of Muon")
    flag("lr", 2e-3, "peak learning rate of AdamW")
    flag("weight_decay", 0.01, "decoupled, all optimizers")
    flag("warmup", 0.03, "share of the steps of linear warm-up; then cosine to 0")
    flag("clip", 1.0, "largest gradient norm")
    flag("ema", 0.9999, "limit of the decay min(ema, (1 + n) / (10 + n)) of the averaged weights")
    flag("vae_lr_ratio", 0.0, "text VAE's learning rate / --lr: 0 frozen, 1 joint (the paper's best)")
    flag("lambda_vae", 1.0, "weight of the text VAE's own loss in stage 2")
    flag("lambda_fm", 1.0, "weight of the flow-matching losses")
    flag("lambda_ref", 0.0, "weight of KL(q || q_ref) to the encoder of stage 1")
    flag("w_text", 1.0, "weight of L_text against L_image")
    flag("w_repa", 0.0, "weight of L_REPA (0.5 in the literature); 0 is off")
    flag("repa_layer", 2, "layer that L_REPA reads, before the last")
    flag("repa_until", 0.5, "share of the steps after which L_REPA stops")
    flag("cfg_drop", 0.1, "share of samples trained without their condition, for guidance")
    flag("text_loc", None, "mean of the text's logit time (default 1 + ln(text_latent_dim / 16) / 2)", type=float)
    flag("image_loc", 0.0, "mean of the image's logit time, before the shift by size")
    flag("time_scale", 1.0, "deviation of the logit time")
    flag("time_law", "logit_normal", "law of the times", choices=("logit_normal", "uniform"))
    flag("time_per", "block", "one time per text block, or per sample", choices=("block", "sample"))

    flag = group("evaluation")
    flag("eval_samples", 512, "samples per number; 0 skips the evaluation")
    flag("guidance", sample.IMAGE.guidance, "guidance for images")
    flag("text_guidance", sample.TEXT.guidance, "guidance for text")
    flag("sample_steps", 16, "solver steps")
    args = parser.parse_args(argv)
    args.given = {a.dest for a in parser._actions for o in a.option_strings
                  if any(w == o or w.startswith(o + "=") for w in (sys.argv[1:] if argv is None else argv))}
    check(args)
    return args


def check(args: argparse.Namespace) -> None:
    """Refuse impossible values before any work. ValueError, one line."""
    for name in ("steps", "text_vae_steps", "image_vae_steps", "batch_size", "micro_steps", "text_vae_batch",
                 "image_vae_batch", "block_len", "seq_len", "pool", "save_every", "sample_steps"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: expected at least 1")
    if not 1 <= len(args.image_size) <= 2 or min(args.image_size) < 1:
        raise ValueError(f"--image_size {args.image_size}: expected one number of pixels, or height and width")
    if args.scale <= 0 or args.seed < 0 or args.eval_samples < 0:
        raise ValueError(f"--scale {args.scale} must be above 0, --seed {args.seed} and --eval_samples at least 0")
    if args.seq_len < args.block_len * args.text_patch:
        raise ValueError(f"--seq_len {args.seq_len} is less than a block: --block_len {args.block_len} x --text_patch "
                         f"{args.text_patch} tokens")
    if args.vae_logsnr != "learned":
        try:
            float(args.vae_logsnr)
        except ValueError:
            raise ValueError(f"--vae_logsnr {args.vae_logsnr}: expected 'learned' or a number such as 1.5") from None
    task_ratios(args.tasks)


def task_ratios(text: str) -> dict[str, float]:
    """"t2t:1,t2i:2" -> shares that sum to 1."""
    try:
        ratios = {name: float(value) for name, value in (item.split(":") for item in text.split(","))}
    except ValueError:
        raise ValueError(f"--tasks {text!r}: expected names and ratios such as t2t:1,t2i:1,it2t:1") from None
    unknown = set(ratios) - set(TASKS)
    if unknown:
        raise ValueError(f"--tasks names {', '.join(sorted(unknown))}; the tasks are {', '.join(TASKS)}")
    if min(ratios.values()) < 0 or not 0 < sum(ratios.values()) < math.inf:
        raise ValueError(f"--tasks {text!r}: ratios must be at least 0 and not all 0")
    return {name: value / sum(ratios.values()) for name, value in ratios.items()}


def pick_task(args: argparse.Namespace, u: float) -> int:
    """The task at place u in [0, 1) of the ratios laid side by side."""
    ratios = task_ratios(args.tasks)
    ends = np.cumsum([ratios.get(name, 0.0) for name in TASKS])
    return min(int(np.searchsorted(ends, u, side="right")), max(i for i, n in enumerate(TASKS) if ratios.get(n)))


# ---- workers --------------------------------------------------------------------------------------------------------

@dataclass
class Worker:
    """This process among the others."""
    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")
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

    def share(self, start: int, count: int) -> range:
        """This worker's part of `count` sample numbers from `start`."""
        return range(start + count * self.rank // self.world, start + count * (self.rank + 1) // self.world)


def launch(argv: list[str], procs: int) -> int:
    """Run this script as `procs` single-threaded workers on this machine: on small matrices two processes of one thread
    are faster than two threads of one process. Freed memory stays with the process, for fewer page faults."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = os.environ | {"WORLD_SIZE": str(procs), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
                        "MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 33)}
    command = [sys.executable, os.path.abspath(__file__), *argv]
    workers = [subprocess.Popen(command, env=env | {"RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(procs)]
    signal.signal(signal.SIGTERM, lambda *_: [w.terminate() for w in workers])
    signal.signal(signal.SIGINT, signal.SIG_IGN)               # a terminal's Ctrl-C reaches the workers by itself
    while any(w.poll() is None for w in workers) and not any(w.returncode for w in workers):
        time.sleep(0.1)
    for w in workers:                                          # one has failed, or all are done
        try:
            w.wait(timeout=10)
        except subprocess.TimeoutExpired:
            w.kill()
            w.wait()
    return max((w.returncode for w in workers), key=abs)


def bf16_is_faster() -> bool:
    """Whether this CPU multiplies matrices in bfloat16 at least 1.5 times faster than in float32."""
    def seconds(x: Tensor) -> float:
        times = []
        for _ in range(9):
            start = time.perf_counter()
            x @ x
            times.append(time.perf_counter() - start)
        return min(times)
    x = torch.ones(512, 512)
    return seconds(x) > 1.5 * seconds(x.bfloat16())


# ---- batches --------------------------------------------------------------------------------------------------------

@dataclass
class Batch:
    """One micro-step's samples for the prior, packed; everything random is in here already.

    T tokens and Lv latents of all texts for the text VAE; L positions of the MMDiT, Lt of text and Li of images."""
    task: int
    ids: Tensor             # (T,)
    lengths: list[int]      # latents of each text
    posterior: Tensor       # (Lv, Dz) noise of the posterior sample
    hidden: Tensor          # (T,) bool, tokens masked for L_mask
    layout: Layout
    plan: Plan
    targets: Tensor         # (n,) positions with t > 0, the only ones whose velocity matters
    target_plan: Plan
    source: Tensor          # (Lt,) which VAE latent each text position holds
    noisy: Tensor           # (Lt,) bool, t > 0
    loss_text: Tensor       # (Lt,) bool, bears L_text
    eps_text: Tensor        # (Lt, Dz)
    z_image: Tensor         # (Li, Cz) clean
    loss_image: Tensor      # (Li,) bool, bears L_image
    eps_image: Tensor       # (Li, Cz)
    t: Tensor               # (U,) distinct times; t[0] = 0
    t_index: Tensor         # (L,)
    numbers: list[int]

    def counts(self) -> list[float]:
        """Loss positions x channels of L_image and of L_text in each task; tokens, masked tokens."""
        text = int(self.loss_text.sum()) * self.eps_text.shape[1]
        return [int(self.loss_image.sum()) * self.eps_image.shape[1], *(text * (task == self.task) for task in range(len(TASKS))),
                self.ids.numel(), int(self.hidden.sum())]

    def to(self, device) -> Batch:
        return self if device.type == "cpu" else Batch(*(
            x.to(device, non_blocking=True) if isinstance(x, (Tensor, Layout)) else x
            for x in (getattr(self, f.name) for f in dataclasses.fields(self))))


@dataclass
class TextBatch:
    """Texts for stage 1."""
    ids: Tensor             # (T,)
    lengths: list[int]      # latents of each text
    noise: Tensor           # (Lv, Dz)
    hidden: Tensor          # (T,) bool

    def counts(self) -> list[float]:
        return [self.ids.numel(), int(self.hidden.sum())]

    def to(self, device) -> TextBatch:
        return TextBatch(self.ids.to(device), self.lengths, self.noise.to(device), self.hidden.to(device))


@dataclass
class ImageBatch:
    """Images of one size for stage 1b."""
    x: Tensor               # (B, 3, H, W) in [-1, 1]
    noise: Tensor           # (B, Cz, h, w)

    def counts(self) -> list[float]:
        return [len(self.x)]

    def to(self, device) -> ImageBatch:
        return ImageBatch(self.x.to(device), self.noise.to(device))


class Batches:
    """Sample numbers -> packed batches, for one dataset and one system."""
    def __init__(self, args: argparse.Namespace, dataset, model: Cola):
        self.args, self.dataset, self.model = args, dataset, model
        self.masking = args.vae_lr_ratio > 0 and args.lambda_mask > 0
        self.images: dict[int, Tensor] = {}                    # image number -> clean latents (h, w, Cz): the VAE is frozen
        self.loc = flow.default_loc(args.text_latent_dim) if args.text_loc is None else args.text_loc

    @torch.no_grad()
    def image_latents(self, index: list[int]) -> list[Tensor]:
        """Normalised mean latents of images, (h, w, Cz) each; computed once, up to a gigabyte of them."""
        new, latents = sorted(set(index) - self.images.keys()), {}
        for hw in {self.dataset.image_hw(i) for i in new}:
            group = [i for i in new if self.dataset.image_hw(i) == hw]
            x = sample.to_float(np.stack(self.dataset.images(group))).to(self.model.device)                # (n, 3, H, W)
            z = self.model.image_vae.normalize(self.model.image_vae.encode(x)[0]).permute(0, 2, 3, 1).cpu()
            latents |= dict(zip(group, z))
        if latents and len(self.images) * next(iter(latents.values())).nbytes < 1 << 30:
            self.images |= latents
        return [latents[i] if i in latents else self.images[i] for i in index]

    def text_ids(self, text: str) -> list[int]:
        """A text that ends, filled up to whole blocks; a longer one than seq_len is cut, to whole blocks, and does not end."""
        a, m = self.args, self.model
        ids = m.tokenizer.encode(text)
        block = m.block_len * m.text_vae.patch_size
        return m.ids(text, end=True) if len(ids) < a.seq_len else ids[:a.seq_len // block * block]

    def texts(self, numbers: range) -> list[TextBatch]:
        """Whatever the tasks would have the text VAE encode: texts, captions, instructions, answers."""
        a, m, dz = self.args, self.model, self.args.text_latent_dim
        ids, lengths, noise, hidden = [], [], [], []
        for k in numbers:
            task = pick_task(a, data.rng(a.seed, k, data.TASK).random())
            item = getattr(self.dataset, TASKS[task])(k)
            new = [self.text_ids(item if task == T2T else item[-1] if task == IT2T else item[0])]
            new += [m.ids(item[0], end=False)] if task == IT2T else []
            ids += [i for x in new for i in x]
            lengths += [len(x) // a.text_patch for x in new]
            count = sum(map(len, new))
            noise.append(data.rng(a.seed, k, data.POSTERIOR).standard_normal((count // a.text_patch, dz), np.float32))
            hidden.append(data.rng(a.seed, k, data.MASK).random(count) < 0.15)
        return [TextBatch(torch.tensor(ids), lengths, torch.from_numpy(np.concatenate(noise)),
                          torch.from_numpy(np.concatenate(hidden)))]

    def pixels(self, numbers: range) -> list[ImageBatch]:
        """Images for stage 1b, in one batch per size."""
        vae, batches = self.model.image_vae, []
        chosen = [(int(data.rng(self.args.seed, k, data.PICK).integers(self.dataset.num_images)), k) for k in numbers]
        for hw in sorted({self.dataset.image_hw(i) for i, _ in chosen}):
            group = [(i, k) for i, k in chosen if self.dataset.image_hw(i) == hw]
            x = sample.to_float(np.stack(self.dataset.images([i for i, _ in group])))
            shape = (vae.channels, hw[0] // vae.downsample, hw[1] // vae.downsample)
            noise = [data.rng(self.args.seed, k, data.POSTERIOR).standard_normal(shape, np.float32) for _, k in group]
            batches.append(ImageBatch(x, torch.from_numpy(np.stack(noise))))
        return batches

    def make(self, task: int, numbers: range) -> Batch:
        """The micro-batch of these sample numbers, all of one task."""
        a, m, S = self.args, self.model, len(numbers)
        p, bl, dz, cz = m.text_vae.patch_size, m.block_len, m.text_vae.latent_dim, m.image_vae.channels
        items = [getattr(self.dataset, TASKS[task])(k) for k in numbers]
        pictures = self.image_latents([item[1] for item in items]) if task != T2T else [None] * S
        samples, texts, normals, eps_text, eps_image, posterior, hidden, z_image = [], [], [], [], [], [], [], []
        start, prompt_at, text_at, prefix_at, cut, before, slot = np.zeros((7, S), int)          # one number per sample

        def add(tokens: list[int]) -> int:
            """Queue a text for the VAE; returns where its latents will begin."""
            texts.append(tokens)
            return sum(map(len, texts[:-1])) // p

        for s, (k, item, picture) in enumerate(zip(numbers, items, pictures)):
            draw = data.rng(a.seed, k, data.DROP)
            drop = draw.random() < a.cfg_drop
            first_text = len(texts)
            prompt = m.ids(item[0], end=False) if task == IT2T else []
            text = [] if drop and task == T2I else self.text_ids(item if task == T2T else item[-1] if task == IT2T else item[0])
            n, start[s] = len(text) // p, len(prompt) // p                 # a dropped prompt still moves the answer
            hw = (0, 0) if task == T2T or drop and task == IT2T else tuple(picture.shape[:2])
            samples.append(Sample(task, 0 if drop else start[s], hw, 0 if drop else n, n, start[s]))
            prompt_at[s], text_at[s] = add([] if drop else prompt), add(text)
            prefix_at[s] = text_at[s]
            if task == T2T:                                                # what comes before the cut is given, later on
                cut[s] = draw.integers(text.index(m.tokenizer.end) if m.tokenizer.end in text else len(text)) // p
                before[s] = draw.random() < 0.5
                if cut[s] and m.text_vae.config["block_len"] > 1:          # and is encoded alone
                    prefix_at[s] = add(text[:cut[s] * p])
            latents = sum(map(len, texts[first_text:])) // p
            posterior.append(data.rng(a.seed, k, data.POSTERIOR).standard_normal((latents, dz), np.float32))
            hidden.append(data.rng(a.seed, k, data.MASK).random(latents * p) < 0.15 if self.masking else np.zeros(latents * p, bool))
            noise, pixels = data.rng(a.seed, k, data.NOISE), hw[0] * hw[1]
            eps_image.append(noise.standard_normal((pixels, cz), np.float32))
            eps_text.append(noise.standard_normal((n, dz), np.float32))
            slot[s] = 1 + sum(map(len, normals))                           # times: 0 clean, then image, block, block, ...
            draws = data.rng(a.seed, k, data.TIME).standard_normal(1 + n // bl)
            normals.append(draws if a.time_per == "block" else np.append(draws[0], np.full(n // bl, draws[-1])))
            if pixels:
                z_image.append(picture.reshape(pixels, cz))

        layout = masks.pack(samples, bl)
        who, segment, block = layout.sample.numpy(), layout.segment.numpy(), layout.block.numpy()            # (L,) each
        is_image, is_noisy = segment == masks.I, segment == masks.N
        index = layout.col.numpy() - np.where(segment == masks.P, 0, start[who])                             # in its text
        given = index < cut[who]
        moving = is_noisy & ~(given & (block == cut[who] // bl)) | is_image & (task == T2I)                  # t > 0
        source = np.where(segment == masks.P, prompt_at[who], np.where(given, prefix_at[who], text_at[who])) + index
        eps = np.zeros((len(who), dz), np.float32)
        eps[is_noisy] = np.concatenate(eps_text)
        targets = torch.from_numpy(moving.nonzero()[0])
        is_block = torch.ones(sum(map(len, normals)), dtype=torch.bool)
        is_block[slot - 1] = False
        z = torch.from_numpy(np.concatenate(normals)).float()
        shift = flow.image_shift(max(map(len, eps_image)) * cz)
        t = torch.where(is_block, flow.sample_time(z, a.time_law, self.loc, a.time_scale),
                        flow.sample_time(z, a.time_law, a.image_loc, a.time_scale, shift))
        tensor = torch.from_numpy
        return Batch(
            task, torch.tensor([i for x in texts for i in x]), [len(x) // p for x in texts if x],
            tensor(np.concatenate(posterior)), tensor(np.concatenate(hidden)), layout, make_plan(layout),
            targets, make_plan(layout.select(targets), layout),
            tensor(source[~is_image]), tensor(moving[~is_image]),
            tensor((moving & (~given | (before[who] == 1)))[~is_image]), tensor(eps[~is_image]),
            torch.cat(z_image) if z_image else torch.zeros(0, cz), tensor(moving[is_image]),
            tensor(np.concatenate(eps_image)), torch.cat([torch.zeros(1), t]),
            tensor(np.where(moving, slot[who] + np.where(is_image, 0, 1 + block), 0)), numbers)


# ---- losses: one module per stage, whose forward takes a batch and the counts of the whole step ---------------------

class TextStage(nn.Module):
    """Stage 1."""
    def __init__(self, vae: TextVAE, args: argparse.Namespace):
        super().__init__()
        self.vae, self.args = vae, args

    def forward(self, b: TextBatch, counts: list[float]) -> tuple[Tensor, dict[str, Tensor]]:
        loss, terms = text_vae_loss(self.vae, b.ids, b.lengths, b.noise, b.hidden if self.args.lambda_mask else None,
                                    beta=self.args.beta, lambda_mask=self.args.lambda_mask, count=counts[0],
                                    mask_count=counts[1])
        return loss, terms | {"logsnr": terms["logsnr"] * b.ids.numel() / counts[0]}


class ImageStage(nn.Module):
    """Stage 1b."""
    def __init__(self, vae: ImageVAE):
        super().__init__()
        self.vae = vae

    def forward(self, b: ImageBatch, counts: list[float]) -> tuple[Tensor, dict[str, Tensor]]:
        loss, terms = image_vae_loss(self.vae, b.x, b.noise)
        share = len(b.x) / counts[0]
        return loss * share, {k: v * share for k, v in terms.items()}


class PriorStage(nn.Module):
    """Stage 2: the prior, jointly with the text VAE when that has a learning rate."""
    def __init__(self, model: Cola, args: argparse.Namespace):
        super().__init__()
        self.args, self.mmdit, self.text_vae = args, model.mmdit, model.text_vae
        self.joint, self.progress = args.vae_lr_ratio > 0, 0.0                       # progress: share of the steps done
        self.text_vae.requires_grad_(self.joint)
        if args.lambda_ref:
            self.ref = copy.deepcopy(model.text_vae).requires_grad_(False)
        if args.w_repa:                                        # features: the clean image latents (SRA-2, 2601.17830)
            self.repa = nn.Linear(args.width, model.image_vae.channels)

    def forward(self, b: Batch, counts: list[float]) -> tuple[Tensor, dict[str, Tensor]]:
        """counts: Batch.counts of the whole step, over all workers. Terms come before their weights."""
        image_count, *text_counts, token_count, mask_count = counts
        a, vae = self.args, self.text_vae
        terms, loss = {}, 0.0
        plan = vae.make_plan(b.lengths)
        with torch.set_grad_enabled(self.joint and torch.is_grad_enabled()):
            mean, logvar = vae.encode(b.ids, b.lengths, plan)                        # (Lv, Dz)
        if self.joint:
            loss, terms = text_vae_loss(vae, b.ids, b.lengths, b.posterior, b.hidden if a.lambda_mask else None, beta=a.beta,
                                        lambda_mask=a.lambda_mask, learned_prior=True, posterior=(mean, logvar),
                                        count=token_count, mask_count=mask_count, plan=plan)
            loss, terms["logsnr"] = a.lambda_vae * loss, terms["logsnr"] * b.ids.numel() / token_count
        if a.lambda_ref:
            with torch.no_grad():
                mean_ref, logvar_ref = self.ref.encode(b.ids, b.lengths, plan)
            terms["ref"] = kl(mean, logvar, mean_ref, logvar_ref).sum() / token_count
            loss = loss + a.lambda_ref * terms["ref"]
        z0 = vae.latents(mean, logvar, b.posterior).index_select(0, b.source)        # (Lt, Dz)
        is_image = b.layout.segment == masks.I
        t = b.t[b.t_index]
        # Clean latents are detached where they enter; N is not: L_FM reaches the encoder through z_t and through v.
        zt = torch.where(b.noisy[:, None], flow.interpolate(z0, b.eps_text, t[~is_image]), z0.detach())
        zt_image = flow.interpolate(b.z_image, b.eps_image, t[is_image])             # (Li, Cz)
        repa = a.w_repa if self.progress < a.repa_until and b.loss_image.any() else 0.0
        v_text, v_image, hidden = self.mmdit(zt, zt_image, b.t, b.t_index, b.layout, b.plan, tap=a.repa_layer - 1 if repa else -1,
                                             targets=(b.targets, b.target_plan))
        v = flow.velocity(z0, b.eps_text)[b.noisy]                                   # (targets of text, Dz)
        terms["text"] = flow.fm_loss(v_text, v, sum(text_counts), b.loss_text[b.noisy])
        if text_counts[b.task]:                                # the same by task, for the log
            terms[f"text_{TASKS[b.task]}"] = terms["text"] * sum(text_counts) / text_counts[b.task]
        loss = loss + a.lambda_fm * a.w_text * terms["text"]
        if v_image is not None:
            v = flow.velocity(b.z_image, b.eps_image)[b.loss_image]                  # (targets of images, Cz)
            terms["image"] = flow.fm_loss(v_image, v, image_count)
            loss = loss + a.lambda_fm * terms["image"]
        if repa:
            cosine = F.cosine_similarity(self.repa(hidden[is_image].float()), b.z_image, dim=-1)                # (Li,)
            terms["repa"] = (1 - cosine)[b.loss_image].sum() * b.z_image.shape[1] / image_count
            loss = loss + a.lambda_fm * repa * terms["repa"]
        unused = sum(p.view(-1)[0] * 0.0 for p in self.parameters() if p.requires_grad)      # DDP: every parameter, every task
        return loss + unused, {k: v.detach() for k, v in terms.items()}


# ---- the run --------------------------------------------------------------------------------------------------------

RUN_FLAGS = {"out_dir", "stage", "resume", "init_from", "eval_only", "device", "procs", "given", "eval_samples", "save_every",
             "guidance", "text_guidance", "sample_steps", "scale", "data", "text", "strict_data"}
ARCHITECTURE = {"text_latent_dim", "text_patch", "text_vae_width", "text_vae_layers", "text_vae_heads", "vae_block_len",
                "vae_logsnr", "vocab_size", "tokenizer", "image_latent_dim", "downsample", "image_vae_width", "width", "layers",
                "heads", "streams"}


def new_model(args: argparse.Namespace, dataset) -> Cola:
    """A system with fresh weights: the same on every worker, as all start from one seed."""
    tokenizer = data.Tokenizer.named(args.tokenizer) if args.tokenizer else \
        data.Tokenizer.train(dataset.corpus(4000), args.vocab_size)
    torch.manual_seed(args.seed)
    vae = TextVAE(tokenizer.n_vocab, args.text_vae_width, 4 * args.text_vae_width, args.text_vae_heads, args.text_vae_layers,
                  args.text_vae_layers, args.text_latent_dim, args.text_patch, args.vae_block_len,
                  None if args.vae_logsnr == "learned" else float(args.vae_logsnr))
    image_vae = ImageVAE(width=args.image_vae_width, latent_channels=args.image_latent_dim, downsample=args.downsample)
    head_dim = args.width // args.heads
    if args.width % (2 * args.heads):
        raise ValueError(f"--width {args.width} does not split into --heads {args.heads} of even width")
    config = MMDiTConfig(args.text_latent_dim, args.image_latent_dim, args.width, args.heads, head_dim, args.layers,
                         emb_dim=args.width, rope_dim=head_dim, streams=args.streams)
    hw = (args.image_size[0], args.image_size[-1])
    image_vae.check_size(*hw)
    return Cola(vae, image_vae, MMDiT(config), tokenizer, args.block_len, hw)


class Run:
    """Everything a run carries along: the system, its average, where it stands, and its log."""
    def __init__(self, args: argparse.Namespace, worker: Worker, model: Cola, dataset):
        self.args, self.worker, self.model, self.dataset = args, worker, model, dataset
        self.batches = Batches(args, dataset, model)
        self.progress = dict.fromkeys(STAGES, 0)
        self.seconds = 0.0
        self.ema: dict[str, dict[str, Tensor]] = {}
        self.optimizer_state: list[dict] = []
        self.stop = 0                                          # the signal that asked us to leave
        self.out = Path(args.out_dir)

    def modules(self) -> dict[str, nn.Module]:
        return {"text_vae": self.model.text_vae, "image_vae": self.model.image_vae, "mmdit": self.model.mmdit}

    def state(self) -> dict:
        m = self.model
        weights = {name: module.state_dict() for name, module in self.modules().items()}
        return {"format": sample.FORMAT, "tokenizer": m.tokenizer.to_dict(), "model": weights, "ema": weights | self.ema,
                "config": {"text_vae": m.text_vae.config, "image_vae": m.image_vae.config,
                           "mmdit": dataclasses.asdict(m.mmdit.config), "block_len": m.block_len, "image_hw": list(m.image_hw)},
                "args": {k: v for k, v in vars(self.args).items() if k != "given"}, "progress": self.progress,
                "optimizers": self.optimizer_state, "seconds": self.seconds}

    def save(self) -> None:
        """Write out/ckpt.pt whole or not at all."""
        if self.worker.rank:
            return
        temporary = self.out / "ckpt.pt.tmp"
        with open(temporary, "wb") as file:
            torch.save(self.state(), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.out / "ckpt.pt")

    def restore(self, checkpoint: dict) -> None:
        """Weights, average, optimizers and place of a checkpoint of the same architecture."""
        for name, module in self.modules().items():
            module.load_state_dict(checkpoint["model"][name])
        self.ema = {k: v for k, v in checkpoint["ema"].items() if k != "image_vae"}
        self.progress, self.seconds = dict(checkpoint["progress"]), checkpoint["seconds"]
        self.optimizer_state = checkpoint["optimizers"]

    def fit(self, stage: str, module: nn.Module, optimizers: list[torch.optim.Optimizer], steps: int, make, average=(),
            at_end=lambda: None) -> None:
        """Train one stage. make(step) -> this worker's micro-batches of a step; average: parts kept as EMA, by name;
        at_end is called before the last save."""
        a, worker, start = self.args, self.worker, self.progress[stage]
        if start >= steps:
            return
        for o, state in zip(optimizers, self.optimizer_state if start else []):
            o.load_state_dict(state)
        peak = [[g["lr"] for g in o.param_groups] for o in optimizers] if not start else \
            [[g["peak"] for g in o.param_groups] for o in optimizers]
        for o, lrs in zip(optimizers, peak):
            for group, lr in zip(o.param_groups, lrs):
                group["peak"] = lr
        parameters = [p for p in module.parameters() if p.requires_grad]
        if not start:
            self.ema |= {name: {k: v.clone() for k, v in self.modules()[name].state_dict().items()} for name in average}
        wrapped = DistributedDataParallel(module) if worker.world > 1 else module
        amp = torch.autocast(worker.device.type, torch.bfloat16, enabled=a.bf16 == "on" and stage != "text_vae")
        bar = tqdm(total=steps, initial=start, desc=stage, unit="step", disable=worker.rank > 0, mininterval=1.0)
        log = open(self.out / "log.jsonl", "a") if worker.rank == 0 else None
        last = time.perf_counter()
        for step in range(start, steps):
            rate = min(1.0, (step + 1) / (a.warmup * steps + 1)) * 0.5 * (1 + math.cos(math.pi * step / steps))
            for o in optimizers:
                for group in o.param_groups:
                    group["lr"] = group["peak"] * rate
            module.progress, began = step / steps, time.perf_counter()
            batches = [b.to(worker.device) for b in make(step)]
            prepared = time.perf_counter() - began
            counts = worker.sum(np.sum([b.counts() for b in batches], 0).tolist())
            sums: dict[str, float] = {}
            for i, batch in enumerate(batches):
                last_one = i == len(batches) - 1
                with contextlib.nullcontext() if last_one or worker.world == 1 else wrapped.no_sync():
                    with amp:
                        loss, terms = wrapped(batch, counts)
                    (loss * worker.world).backward()           # the wrapper averages over workers; the loss is a share of a sum
                for name, value in terms.items():
                    sums[name] = sums.get(name, 0.0) + value.item()
            norm = nn.utils.clip_grad_norm_(parameters, a.clip)
            for o in optimizers:
                o.step()
                o.zero_grad(set_to_none=True)
            decay = min(a.ema, (1 + step) / (10 + step))
            for name in average:
                now = self.modules()[name].state_dict()
                floats = [k for k, v in now.items() if v.is_floating_point()]
                torch._foreach_lerp_([self.ema[name][k] for k in floats], [now[k] for k in floats], 1 - decay)
            names = sorted(sums)
            signal_seen, *values = worker.sum([float(self.stop), *(sums[n] for n in names)])
            now = time.perf_counter()
            took, last = now - last, now
            self.seconds += took
            self.progress[stage] = step + 1
            if log:
                entry = {"stage": stage, "step": step + 1, **dict(zip(names, values)), "lr": optimizers[0].param_groups[0]["lr"],
                         "norm": float(norm), "seconds": round(took, 4), "data_seconds": round(prepared, 4),
                         "positions": int(sum(len(b.layout) for b in batches)) * worker.world if stage == "mmdit" else None}
                log.write(json.dumps({k: v for k, v in entry.items() if v is not None}) + "\n")
                bar.set_postfix({n: f"{v:.4f}" for n, v in zip(names, values)}, refresh=False)
                bar.update()
            if (step + 1) % a.save_every == 0 or step + 1 == steps or signal_seen:
                self.optimizer_state = [o.state_dict() for o in optimizers] if step + 1 < steps else []
                if step + 1 == steps:
                    at_end()
                if log:
                    log.flush()
                self.save()
                last = time.perf_counter()
            if signal_seen:
                raise KeyboardInterrupt
        bar.close()


def optimizers_for(args: argparse.Namespace, stage: nn.Module, lr: float, muon: bool) -> list[torch.optim.Optimizer]:
    """AdamW, and where `muon` says so Muon for the matrices inside the blocks; in stage 2 the text VAE at its own rate."""
    hidden, rest, vae = [], [], []
    for name, p in stage.named_parameters():
        if p.requires_grad:
            is_hidden = muon and "blocks." in name and p.dim() == 2 and ".ada." not in name
            (vae if name.startswith("text_vae.") else hidden if is_hidden else rest).append(p)
    groups = [{"params": rest, "lr": lr}] + ([{"params": vae, "lr": lr * args.vae_lr_ratio}] if vae else [])
    optimizers = [torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=args.weight_decay, fused=True)]
    if hidden:
        optimizers.append(torch.optim.Muon(hidden, lr=args.muon_lr, weight_decay=args.weight_decay))
    return optimizers


def train_stages(run: Run) -> None:
    """Stage 1, stage 1b, stage 2, as far as --stage says."""
    a, w, model = run.args, run.worker, run.model
    w.training = True
    wanted = STAGES if a.stage == "all" else (a.stage,)
    scaled = lambda steps: max(1, round(steps * a.scale))
    muon = a.optimizer == "muon"
    if "text_vae" in wanted:
        stage = TextStage(model.text_vae, a)
        run.fit("text_vae", stage, optimizers_for(a, stage, a.text_vae_lr, False), scaled(a.text_vae_steps),
                lambda step: run.batches.texts(w.share(step * a.text_vae_batch, a.text_vae_batch)))
    if "image_vae" in wanted and run.dataset.num_images:
        model.image_vae.train()
        stage = ImageStage(model.image_vae)
        steps = scaled(a.image_vae_steps)
        shown = [b.x.to(w.device) for b in run.batches.pixels(range(1024))]
        run.fit("image_vae", stage, optimizers_for(a, stage, a.image_vae_lr, muon), steps,
                lambda step: run.batches.pixels(w.share(step * a.image_vae_batch, a.image_vae_batch)),
                at_end=lambda: model.image_vae.set_statistics(shown))
        model.image_vae.eval().requires_grad_(False)
    if "mmdit" in wanted:
        model.image_vae.eval().requires_grad_(False)
        prior = PriorStage(model, a)
        steps = scaled(a.steps)

        def make(step: int) -> list[Batch]:
            place = data.rng(a.seed, step, data.TASK).random()
            batches = []
            for micro in range(a.micro_steps):                 # the tasks of a step lie evenly spread over the ratios
                first = (step * a.micro_steps + micro) * a.batch_size
                batches.append(run.batches.make(pick_task(a, (micro + place) / a.micro_steps), w.share(first, a.batch_size)))
            return batches
        run.fit("mmdit", prior, optimizers_for(a, prior, a.lr, muon), steps, make,
                average=("mmdit", "text_vae") if prior.joint else ("mmdit",))


# ---- evaluation: generated images and texts are judged by the exact reader alone ------------------------------------

def wilson(rate: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a rate seen in n samples."""
    z = 1.96
    middle, spread = (rate + z * z / (2 * n)) / (1 + z * z / n), math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return max(0.0, middle - spread * z / (1 + z * z / n)), min(1.0, middle + spread * z / (1 + z * z / n))


def chunks(numbers: range, size: int = 64):
    return (list(numbers[i:i + size]) for i in range(0, len(numbers), size))


@torch.no_grad()
def evaluate(model: Cola, args: argparse.Namespace, worker: Worker) -> dict:
    """Rates of DESIGN's metrics.json on scenes the training never drew: seen compositions and held-out ones."""
    image, text = [dataclasses.replace(s, steps=args.sample_steps, guidance=g, seed=args.seed)
                   for s, g in ((sample.IMAGE, args.guidance), (sample.TEXT, args.text_guidance))]
    seed, n = args.seed + 1_000_003, args.eval_samples
    metrics: dict = {"n": n}
    work = [(split, k) for split in ("seen", "heldout") for k in range(0, 3 * n, 64)]
    bar = tqdm(total=len(work), desc="evaluate", disable=worker.rank > 0)
    for split in ("seen", "heldout"):
        rows: list[tuple[str, bool]] = []
        draw = lambda k, count: scenes.sample_scene(data.rng(seed, k, data.EVAL), heldout=split == "heldout", count=count)
        for numbers in chunks(worker.share(0, 3 * n)):         # n scenes of each count
            world = [draw(k, 1 + k % 3) for k in numbers]
            captions = [scenes.caption(s, data.rng(seed, k, data.CAPTION)) for s, k in zip(world, numbers)]
            pictures = sample.generate_images(model, captions, image, first=numbers[0])
            for caption, picture, s in zip(captions, pictures, world):
                found = scenes.matches(scenes.read_image(picture), scenes.read_caption(caption))
                rows += [(f"t2i.{name}", value) for name, value in found.items() if name != "relation" or len(s.objects) > 1]
                rows.append((f"t2i.by_count.{len(s.objects)}", found["scene"]))
            bar.update(worker.world)
        for numbers in chunks(worker.share(0, n)):
            world = [draw(k, 1 + k % 3) for k in numbers]
            pictures = [scenes.render(s, model.image_hw) for s in world]
            captions = sample.generate_text(model, [""] * len(world), ["describe the image."] * len(world), pictures, text,
                                            first=numbers[0])
            for s, caption in zip(world, captions):
                told = scenes.read_caption(caption)
                rows += [("it2t.exact", scenes.is_exact(told, s)), ("it2t.true", scenes.is_true(told, s))]
            asked = [scenes.question(s, data.rng(seed, k, data.CAPTION))[0] for s, k in zip(world, numbers)]
            replies = sample.generate_text(model, [""] * len(world), asked, pictures, text, first=numbers[0])
            rows += [("it2t.vqa", scenes.check_answer(s, q, r)) for s, q, r in zip(world, asked, replies)]
            stories, prefixes = [], []
            for s, k in zip(world, numbers):
                words = data.rng(seed, k, data.WINDOW)
                sentences = scenes.story(s, words).split(". ")
                cut = int(words.integers(1, max(len(sentences), 2)))
                prefixes.append(". ".join(sentences[:cut]).rstrip(".") + ".")
                stories.append(". ".join(sentences))
            rest = sample.generate_text(model, prefixes, s=text, first=numbers[0])
            rows += [("t2t.consistent", scenes.consistent(p, r)) for p, r in zip(prefixes, rest)]
            if split == "seen":
                z = model.encode_images(pictures)
                h, w = (side // model.image_vae.downsample for side in model.image_hw)
                again = model.decode_images(z, (h, w))
                rows += [("ceiling.image", scenes.matches(scenes.read_image(x), scenes.read_caption(scenes.caption(
                    s, data.rng(seed, 0, data.CAPTION))))["scene"]) for x, s in zip(again, world)]
                for texts in (captions_of(world, seed, numbers), stories):
                    ids = [model.ids(x, end=True) for x in texts]
                    z_text, lengths = model.encode_text(ids)
                    back = model.text_vae.decode(z_text, lengths).argmax(-1).split([len(i) for i in ids])
                    rows += [("ceiling.text", b.tolist() == i) for b, i in zip(back, ids)]
        rates: dict[str, list[bool]] = {}
        for name, value in worker.gather(rows):
            rates.setdefault(name, []).append(bool(value))
        for name, values in rates.items():
            *path, leaf = (name if name.startswith("ceiling") else f"{split}.{name}").split(".")
            at = metrics
            for key in path:
                at = at.setdefault(key, {})
            at[leaf] = sum(values) / len(values)
    bar.close()
    return metrics


def captions_of(world: list, seed: int, numbers: list[int]) -> list[str]:
    return [scenes.caption(s, data.rng(seed, k, data.CAPTION)) for s, k in zip(world, numbers)]


def table(metrics: dict) -> str:
    """The rates with their intervals, seen beside held-out."""
    n, lines = metrics["n"], []

    def cell(rate: float | None, count: int) -> str:
        if rate is None:
            return " " * 20
        low, high = wilson(rate, count)
        return f"{rate:.3f} [{low:.3f}, {high:.3f}]"
    rows = [("t2i scene, 1-3 objects", ("t2i", "scene"), 3 * n)]
    rows += [(f"t2i scene, {c} object{'s' if c > 1 else ''}", ("t2i", "by_count", str(c)), n) for c in (1, 2, 3)]
    rows += [(f"t2i {x}", ("t2i", x), 3 * n) for x in ("count", "color", "shape", "size", "relation", "background")]
    rows += [(f"it2t {x}", ("it2t", x), n) for x in ("exact", "true", "vqa")] + [("t2t consistent", ("t2t", "consistent"), n)]
    for title, path, count in rows:
        cells = []
        for split in ("seen", "heldout"):
            value = metrics[split]
            for key in path:
                value = value.get(key) if value else None
            cells.append(cell(value, count))
        lines.append(f"{title:26s}{cells[0]:24s}{cells[1]}")
    lines += [f"ceiling {x:18s}{cell(metrics['ceiling'][x], n)}" for x in ("image", "text")]
    return "\n".join([f"{'rate [95 % interval]':26s}{'seen':24s}held-out", *lines])


# ---- pictures of the run --------------------------------------------------------------------------------------------

def sample_grid(model: Cola, run: Run, path: Path) -> None:
    """Images drawn for captions, and captions or answers given to images; texts are continued on the terminal."""
    args, tile, cells, numbers = run.args, 160, [], range(10 ** 9, 10 ** 9 + 6)       # far from any sample of training
    text = dataclasses.replace(sample.TEXT, guidance=args.text_guidance, steps=args.sample_steps)
    tasks = {name for name, ratio in task_ratios(args.tasks).items() if ratio}
    if "t2i" in tasks:
        captions = [run.dataset.t2i(k)[0] for k in numbers]
        cells += zip(sample.generate_images(model, captions, dataclasses.replace(
            sample.IMAGE, guidance=args.guidance, steps=args.sample_steps)), captions)
    if "it2t" in tasks:
        for prompt, index, _ in map(run.dataset.it2t, numbers):
            picture = run.dataset.images([index])[0]
            cells.append((picture, f"{prompt} {sample.generate_text(model, [''], [prompt], [picture], text)[0]}"))
    if "t2t" in tasks:
        for k in numbers[:3]:
            prefix = " ".join(run.dataset.t2t(k).split()[:6])
            print(f"{prefix} |{sample.generate_text(model, [prefix], s=text)[0]}")
    if not cells:
        return
    canvas = Image.new("RGB", (6 * (tile + 8) + 8, -(-len(cells) // 6) * (tile + 72) + 8), "white")
    pen = ImageDraw.Draw(canvas)
    for i, (picture, words) in enumerate(cells):
        x, y = 8 + (i % 6) * (tile + 8), 8 + (i // 6) * (tile + 72)
        scale = tile / max(picture.shape[:2])
        size = (round(picture.shape[1] * scale), round(picture.shape[0] * scale))
        canvas.paste(Image.fromarray(picture).resize(size, Image.NEAREST), (x, y))
        pen.rectangle((x, y, x + size[0] - 1, y + size[1] - 1), outline="lightgray")
        lines, line = [], ""
        for word in words.split():
            if pen.textlength(f"{line} {word}") > tile and line:
                lines.append(line)
                line = ""
            line = f"{line} {word}".strip()
        pen.multiline_text((x, y + tile + 4), "\n".join([*lines, line][:5]), fill="black")
    canvas.save(path)


def loss_plot(log: Path, path: Path) -> None:
    """Every loss of log.jsonl against its step, one panel a stage, on a log scale, smoothed over 2 % of the steps."""
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    colors = ("#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b")
    canvas = Image.new("RGB", (3 * 420, 320), "white")
    pen = ImageDraw.Draw(canvas)
    skip = {"stage", "step", "lr", "norm", "seconds", "data_seconds", "positions", "logsnr", "log_q", "psnr"}
    for panel, stage in enumerate(STAGES):
        mine, x0 = [e for e in entries if e["stage"] == stage], panel * 420 + 50
        pen.text((x0, 6), stage, fill="black")
        pen.rectangle((x0, 24, x0 + 350, 290), outline="gray")
        names = sorted({k for e in mine for k, v in e.items() if k not in skip})
        curves = {}
        for name in names:
            points = [(e["step"], e[name]) for e in mine if e.get(name, 0) > 0]
            width = max(1, len(points) // 50)
            curves[name] = [(points[min(i + width // 2, len(points) - 1)][0],
                             sum(v for _, v in points[i:i + width]) / len(points[i:i + width]))
                            for i in range(0, len(points), width)]
        values = [v for c in curves.values() for _, v in c]
        if not values:
            continue
        low, high, last = math.log10(min(values)), math.log10(max(values)) + 1e-6, max(e["step"] for e in mine)
        for i, (name, curve) in enumerate(curves.items()):
            line = [(x0 + 350 * s / last, 290 - 266 * (math.log10(v) - low) / (high - low)) for s, v in curve]
            pen.line(line, fill=colors[i % 6], width=2)
            pen.text((x0 + 260, 30 + 12 * i), f"{name} {curve[-1][1]:.3g}", fill=colors[i % 6])
        pen.text((x0 - 45, 20), f"{10 ** high:.2g}", fill="gray")
        pen.text((x0 - 45, 280), f"{10 ** low:.2g}", fill="gray")
        pen.text((x0 + 300, 294), f"step {last}", fill="gray")
    canvas.save(path)


# ---- main -----------------------------------------------------------------------------------------------------------

def prepare(args: argparse.Namespace) -> tuple[dict | None, argparse.Namespace]:
    """Settle what to start from: the checkpoint to continue, or None; its flags become the defaults. Before any work."""
    path = Path(args.out_dir) / "ckpt.pt"
    source = None
    if args.eval_only or args.resume == "auto" and path.exists():
        source = path
    elif path.exists():
        raise ValueError(f"{path} exists; continue it with --resume auto, or choose another --out_dir")
    elif args.init_from:
        source = Path(args.init_from)
    if source is None:
        return None, args
    checkpoint = sample.read_checkpoint(source)
    for name, value in checkpoint["args"].items():
        keep = name in args.given or name in RUN_FLAGS and not (source == path and name in ("data", "text", "scale", "stage"))
        if name in ARCHITECTURE and name in args.given and getattr(args, name) != value:
            raise ValueError(f"--{name} {getattr(args, name)}: {source} has {value}; leave the flag out, or train from nothing")
        if not keep and hasattr(args, name):
            setattr(args, name, value)
    return checkpoint, args


def work(args: argparse.Namespace, checkpoint: dict | None, worker: Worker) -> None:
    """One worker's run, from data to metrics."""
    out = Path(args.out_dir)
    hw = (args.image_size[0], args.image_size[-1])
    dataset = data.open_data(args.seed, args.data, args.text, hw, args.seq_len, args.aspect, args.downsample,
                             args.strict_data, **({} if args.data or args.text else
                                                  dict(pool=args.pool, any_order=args.any_order, questions=args.questions)))
    missing = [n for n, r in task_ratios(args.tasks).items() if r and n not in dataset.tasks]
    if missing and not args.eval_only:
        raise ValueError(f"--tasks asks for {', '.join(missing)}, but this data serves {', '.join(sorted(dataset.tasks))} only")
    if checkpoint is None:
        model = new_model(args, dataset)
    else:
        model = sample.build(checkpoint, "model")
        model.image_hw, model.block_len = hw, args.block_len
        model.image_vae.check_size(*hw)
    for item in getattr(getattr(dataset, "pictures", dataset), "items", ()):
        if (n := len(model.tokenizer.encode(item.text))) >= args.seq_len:
            raise ValueError(f"{item.name}: its caption has {n} tokens, which with the end token is more than "
                             f"--seq_len {args.seq_len}; raise it to {n + 1} or shorten the caption")
    for module in (model.text_vae, model.image_vae, model.mmdit):
        module.to(worker.device)
    run = Run(args, worker, model, dataset)
    if checkpoint is not None:
        run.restore(checkpoint)
        if args.init_from and not (args.resume == "auto" and (out / "ckpt.pt").exists()) and not args.eval_only:
            run.progress, run.optimizer_state, run.seconds = dict.fromkeys(STAGES, 0), [], 0.0
    if not args.eval_only:
        out.mkdir(parents=True, exist_ok=True)
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, lambda number, frame: setattr(run, "stop", number))
        train_stages(run)
    finish(run)


def finish(run: Run) -> None:
    """Evaluate the averaged weights; write metrics.json, samples.png, loss.png; say what to try next."""
    args, out, worker = run.args, run.out, run.worker
    model = sample.build(run.state())
    for module in (model.text_vae, model.image_vae, model.mmdit):
        module.to(worker.device)
    generated = not args.data and not args.text
    amp = torch.autocast(worker.device.type, torch.bfloat16, enabled=args.bf16 == "on")
    if worker.rank == 0:
        if (out / "log.jsonl").exists():
            loss_plot(out / "log.jsonl", out / "loss.png")
        with amp:
            sample_grid(model, run, out / "samples.png")
    if generated and args.eval_samples and args.stage in ("all", "mmdit"):
        with amp:
            metrics = evaluate(model, args, worker)
        if worker.rank == 0:
            metrics |= {"seconds": round(run.seconds, 1), "config": {k: v for k, v in vars(args).items() if k != "given"}}
            (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
            print(table(metrics))
    if worker.rank == 0:
        print(f"{run.seconds / 60:.1f} minutes of training; {out}/ckpt.pt, samples.png, loss.png, log.jsonl. Try:\n"
              f'  python sample.py t2i "a large red circle above a small blue square on a gray background" --checkpoint {out}/ckpt.pt --out a.png\n'
              f'  python sample.py it2t a.png "describe the image." --checkpoint {out}/ckpt.pt\n'
              f'  python sample.py t2t "there is a red circle." --checkpoint {out}/ckpt.pt')


def main(argv: list[str] | None = None) -> int:
    worker = Worker()
    try:
        args = parse(argv)
        checkpoint, args = prepare(args)
        if "RANK" not in os.environ and args.device == "cpu":
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
            if (args.procs or cores) > 1:
                return launch(sys.argv[1:] if argv is None else argv, args.procs or cores)
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            device = torch.device(args.device, int(os.environ["LOCAL_RANK"])) if args.device == "cuda" else torch.device("cpu")
            dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
            worker = Worker(rank, world, device)
        elif args.device != "cpu":
            worker = Worker(device=torch.device(args.device))
        if args.device == "cpu":
            torch.set_num_threads(1)
        if args.bf16 == "auto":
            args.bf16 = "on" if args.device != "cpu" or bf16_is_faster() else "off"
        work(args, checkpoint, worker)
    except (ValueError, OSError) as error:                     # the same on every worker until training starts
        if worker.rank == 0 or worker.training:
            print(f"train.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if worker.rank == 0:
            print("train.py: stopped; continue with --resume auto", file=sys.stderr)
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
