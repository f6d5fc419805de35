"""Checkpoint: what a run leaves in its folder, and how another run takes it up.

    ckpt.pt            the last checkpoint; ckpt.prev.pt the one before, where a disk has links
    log.jsonl          one line for every step

A checkpoint is one dict of plain types and tensors (cola.read opens it, cola.build makes a model):

    format, config, tokenizer    the architecture (Cola.config, Tokenizer.to_dict)
    model     all weights by name, "text_vae.encoder..", "image_vae..", "mmdit.blocks.0.."
    ema       averaged weights of stage 2 under the same names
    moments   the optimizers' tensors of the stage that was trained last, by parameter
    extra     weights that belong to the training alone: "ref.." and "repa.." of stage 2
    args      every flag of the run            progress  steps done of each stage
    seconds   of training                      closed    VAEs trained by another run

It is written to a temporary file first, which then takes the place of the old one: there is a whole
checkpoint at every moment after the first.

Run: python checkpoint.py   (CPU, 5 s)
"""
import contextlib
import json
import math
import os
import tempfile
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor
from tqdm import tqdm

import cola
import config
import data
import release
from cola import Cola, Tokenizer
from image_vae import ImageVAE, ImageVAEConfig
from mmdit import MMDiT, MMDiTConfig
from text_vae import TextVAE, TextVAEConfig
from workers import Worker, full, like

EXTRA = ("ref.", "repa.")              # weights of stage 2 that are not part of the model


@dataclass
class State:
    """What a run carries along besides the weights of the model."""
    progress: dict[str, int] = field(default_factory=lambda: dict.fromkeys(config.STAGES, 0))
    seconds: float = 0.0
    closed: list[str] = field(default_factory=list)
    ema: dict[str, Tensor] = field(default_factory=dict)
    moments: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    extra: dict[str, Tensor] = field(default_factory=dict)

    def trained(self) -> set[str]:
        """The VAEs that this run or another one has trained. A prior implies a text VAE."""
        done = self.progress
        return {name for name in config.STAGES[:2] if done[name] or name in self.closed
                or name == "text_vae" and done["mmdit"]}

    @classmethod
    def of(cls, found: dict | None) -> "State":
        return cls(**{name: found[name] for name in cls.__dataclass_fields__}) if found else cls()

# ---- Where a run begins ------------------------------------------------------------------------

def begin(given: dict) -> tuple[Namespace, dict | None]:
    """The flags of a run, and the checkpoint it starts from, or None. ValueError or
    FileNotFoundError, one line, if a run would be overwritten or flags contradict a checkpoint."""
    folder = Path(given.get("out_dir", config.DEFAULTS["out_dir"]))
    path = folder / "ckpt.pt"
    exists = any(folder.glob("ckpt*.pt"))
    if exists and given.get("resume") == "auto":
        found = latest(folder)
        return config.merge(given, found["args"], "resume", str(path)), found
    if exists and not given.get("dry_run"):
        raise ValueError(f"{path} exists; continue it with --resume auto, or choose another "
                         "--out_dir")
    if given.get("init_from"):
        found = cola.read(given["init_from"])
        args = config.merge(given, found["args"], "init", given["init_from"])
        new = State(closed=sorted(State.of(found).trained()))
        return args, found | vars(new) | {"model": found["model"] | found["ema"]}
    if given.get("init_official"):
        settled = release.flags(given["init_official"]) | {"text_vae_steps": 0}
        return config.merge(given, settled, "init", given["init_official"]), None
    return config.merge(given), None


def latest(folder: str | Path) -> dict:
    """The last checkpoint of a run, or the one before it if the last is damaged."""
    before = Path(folder, "ckpt.prev.pt")
    try:
        return cola.read(Path(folder, "ckpt.pt"))
    except (ValueError, FileNotFoundError):
        if before.exists():
            data.warn_once(f"{folder}: the last checkpoint is damaged; the one before is taken")
            return cola.read(before)
        raise


def new_model(args: Namespace, dataset) -> Cola:
    """A system with fresh weights, or with those of a public release and a fresh image side: the
    same on every worker, as all start from one seed."""
    a, hw, head_dim = args, config.image_hw(args), args.width // args.heads
    image_config = ImageVAEConfig(
        a.image_latent_dim, a.downsample, a.image_vae_width, tuple(a.image_vae_levels),
        a.image_vae_blocks, a.image_vae_patch)
    torch.manual_seed(a.seed)                              # fresh weights are drawn in this order
    if a.init_official:
        released = release.load(a.init_official, a.image_latent_dim, a.dual_layers)
        tokenizer, text_vae, mmdit = released.tokenizer, released.text_vae, released.mmdit
        image_vae = ImageVAE(image_config)
    else:
        tokenizer = Tokenizer.named(a.tokenizer) if a.tokenizer else \
            Tokenizer.train(dataset.corpus(4000), a.vocab_size)
        text_vae = TextVAE(TextVAEConfig(
            tokenizer.n_vocab, a.text_vae_width, 4 * a.text_vae_width, a.text_vae_heads,
            a.text_vae_layers, a.text_vae_layers, a.text_latent_dim, a.text_patch,
            a.vae_block_len, config.logsnr(a)))
        image_vae = ImageVAE(image_config)
        mmdit = MMDiT(MMDiTConfig(
            a.text_latent_dim, a.image_latent_dim, a.width, a.heads, head_dim, a.layers,
            a.dual_layers, emb_dim=a.width, rope_dim=head_dim, as_released=a.as_released))
    image_vae.check_size(*hw)
    return Cola(text_vae, image_vae, mmdit, tokenizer, a.block_len, hw, config.image_time_loc(a),
                a.first_block, tuple(config.task_shares(a.tasks)), image_rho=a.image_rho)


def build(found: dict, args: Namespace) -> Cola:
    """The system of a checkpoint, with its weights in training, and the flags of this run."""
    model = cola.build(found, "model")
    model.image_hw, model.block_len = config.image_hw(args), args.block_len
    model.image_loc, model.first_block = config.image_time_loc(args), args.first_block
    model.image_rho = args.image_rho
    model.tasks = tuple(dict.fromkeys([*model.tasks, *config.task_shares(args.tasks)]))
    model.image_vae.check_size(*model.image_hw)
    return model


def open_stages(args: Namespace, state: State) -> tuple[list[str], list[str]]:
    """The stages to train, and those with steps left that are finished, because a later stage has
    learned from them, or another run trained them and --stage does not name them. ValueError for
    a prior without trained VAEs."""
    done, open_, finished = state.progress, [], []
    for i, name in enumerate(config.STAGES):
        later = any(done[x] for x in config.STAGES[i + 1:])
        learned_from = later and done[name] or name == "text_vae" and done["mmdit"]
        foreign = name in state.closed and not done[name] and args.stage != name
        if name in config.stages(args) and config.steps(args, name) > done[name]:
            (finished if learned_from or foreign else open_).append(name)
    if open_ == ["mmdit"]:
        images = config.task_shares(args.tasks).keys() - {"t2t"}
        for name in ("text_vae", "image_vae") if images else ("text_vae",):
            if name not in state.trained() and config.steps(args, name):
                raise ValueError(f"--stage mmdit: the {name} is not trained; first --stage {name}, "
                                 "or start from a checkpoint with --init_from")
    return open_, finished

# ---- Saving ------------------------------------------------------------------------------------

def save(args: Namespace, model: Cola, stage: nn.Module, state: State, worker: Worker) -> None:
    """Worker 0 writes out_dir/ckpt.pt, whole or not at all, with an OSError if it cannot. All
    workers call it, as they put sharded weights together."""
    weights = {name: full(x).cpu() for name, x in nn.ModuleDict(model.parts()).state_dict().items()}
    state.extra = {name: full(x).cpu() for name, x in stage.state_dict().items()
                   if name.startswith(EXTRA)} or state.extra
    found = vars(state) | {
        "format": cola.FORMAT, "config": model.config(), "tokenizer": model.tokenizer.to_dict(),
        "args": vars(args), "model": weights,
        "ema": {name: full(x).cpu() for name, x in state.ema.items()}}
    if worker.rank:
        return
    path = Path(args.out_dir, "ckpt.pt")
    temporary, old = path.with_suffix(".pt.tmp"), path.with_suffix(".pt.old")
    try:
        with open(temporary, "wb") as file:
            torch.save(found, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:               # torch's writer has errors of its own
        temporary.unlink(missing_ok=True)
        reason = str(error).splitlines()[0][:80]
        raise OSError(f"{temporary}: cannot be written ({reason}); {path} is unchanged") from None
    with contextlib.suppress(OSError):                     # the first one, or a disk without links
        os.link(path, old)
    os.replace(temporary, path)
    with contextlib.suppress(OSError):
        os.replace(old, path.with_name("ckpt.prev.pt"))


def moments(optimizers: list[torch.optim.Optimizer], weights: dict[str, Tensor]) -> dict:
    """The optimizers' tensors, whole, by the name of their parameter, if it has had a gradient."""
    states = {p: state for o in optimizers for p, state in o.state.items()}
    return {name: {key: full(x).cpu() for key, x in states[p].items()}
            for name, p in weights.items() if p in states}


def restore_moments(optimizers: list[torch.optim.Optimizer], weights: dict[str, Tensor],
                    saved: dict) -> None:
    """The inverse of `moments`. A parameter begins anew if its tensors are missing, or are those
    of another optimizer or of another size."""
    for optimizer in optimizers:
        mine = {p for group in optimizer.param_groups for p in group["params"]}
        key = "exp_avg" if isinstance(optimizer, torch.optim.AdamW) else "momentum"
        for name, p in weights.items():
            moment = saved.get(name, {}).get(key)
            if p in mine and moment is not None and moment.shape == p.shape:
                optimizer.state[p] = {key: like(x, p) if x.shape == p.shape else
                                      x.to(p.device, copy=True) for key, x in saved[name].items()}

# ---- The log -----------------------------------------------------------------------------------

def read_log(path: str | Path) -> list[dict]:
    """The steps of a log.jsonl; a line that was cut off by a full disk is left out."""
    entries = []
    for line in Path(path).read_text().splitlines():
        with contextlib.suppress(ValueError):
            entries.append(json.loads(line))
    return [e for e in entries if isinstance(e, dict) and e.get("stage") in config.STAGES]


def trim_log(out_dir: str, progress: dict[str, int]) -> None:
    """Drops from log.jsonl the steps after the checkpoint, which will be taken again."""
    path = Path(out_dir, "log.jsonl")
    if path.exists():
        kept = [e for e in read_log(path) if e["step"] <= progress[e["stage"]]]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(e) + "\n" for e in kept))
        os.replace(temporary, path)


class Log:
    """log.jsonl and the progress bar of a stage; only those of worker 0 are kept and shown."""
    def __init__(self, out_dir: str, stage: str, start: int, steps: int, worker: Worker):
        self.stage, path = stage, os.devnull if worker.rank else f"{out_dir}/log.jsonl"
        self.file = open(path, "a", buffering=1)
        self.bar = tqdm(desc=stage, unit="step", total=steps, initial=start, mininterval=1,
                        disable=worker.rank > 0)

    def write(self, step: int, terms: dict[str, float], **more: float) -> None:
        """One line. A value that is not finite is null, as JSON has no word for it. "skipped"
        counts the steps in a row, up to this one, that were left out; 0 if it was taken."""
        entry = {name: x if math.isfinite(x) else None for name, x in (terms | more).items()}
        self.file.write(json.dumps({"stage": self.stage, "step": step, **entry}) + "\n")
        speed = more["positions"] / max(more["seconds"], 1e-9)
        shown = {name: f"{x:.4f}" for name, x in terms.items()} | {"positions/s": f"{speed:.0f}"}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()

    def close(self) -> None:
        self.file.close()
        self.bar.close()


if __name__ == "__main__":
    args = config.merge({"device": "cpu", "pool": 50})
    with tempfile.TemporaryDirectory() as args.out_dir:
        saved = new_model(args, data.open_data(args))
        save(args, saved, nn.Module(), State(progress=dict.fromkeys(config.STAGES, 7)), Worker())
        args, found = begin({"out_dir": args.out_dir, "resume": "auto", "lr": 0.001})
        print(f"resumed at {found['progress']} (expect 7 each)")
        print(f"lr {args.lr} (expect the given 0.001), width {args.width} (expect 128 as before)")
        same = torch.equal(build(found, args).mmdit.text_in.weight, saved.mmdit.text_in.weight)
        print(f"the same weights: {same} (expect True)")
