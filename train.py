"""Train: tokens and pixels in, one model that writes, draws and describes out.

    stage 1    text VAE      -E log p(x|z) + beta KL + lambda_mask L_mask       (paper, Eq. 3.16)
    stage 1b   image VAE     reconstruction + 0.001 KL; then frozen
    stage 2    MMDiT prior   lambda_fm (L_image + w_text L_text + w_repa L_REPA)  (blog, section 3)
                             + lambda_vae L_vae + lambda_ref KL(q || q_ref)     (paper, Eq. 3.18)

A step of stage 2 has `micro_steps` x `batch_size` samples, each `batch_size` of them of one task.
The workers share them, and every loss is divided by the count of its positions in the whole step:
so the number of workers changes nothing but rounding.

Shapes: T tokens and Lv latents of all texts of a batch; L positions of the prior, Lt of them text
and Li image; Dz and Cz channels of a text and an image latent.
"""
import os

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")      # else DDP warns if all weights are used

import copy
import math
import sys
import time
from argparse import Namespace
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

import batches
import checkpoint
import config
import cuda_attention
import data
import evaluate
import flow
import masks
import workers
from batches import Batch, Batches, ImageBatch, TextBatch
from checkpoint import State
from cola import Cola
from cuda_attention.choose import choose
from image_vae import ImageVAE, image_vae_loss
from masks import TASKS
from text_vae import TextVAE, kl, text_vae_loss
from workers import Worker

PATIENCE = 20              # steps in a row without a finite gradient, after which the run gives up
Terms = dict[str, Tensor]  # the terms of a loss before their weights, or weights by name

# ---- Losses: one module a stage. forward(batch, counts of the whole step) -> loss and its terms --

def vae_loss(vae: TextVAE, b: TextBatch, counts: dict[str, float], args: Namespace,
             **more) -> tuple[Tensor, Terms]:
    """The text VAE's loss of a batch, as its share of the step; terms in nats per token."""
    return text_vae_loss(vae, b.ids, b.lengths, b.posterior_noise,
                         b.masked if args.lambda_mask else None, beta=args.beta,
                         lambda_mask=args.lambda_mask, count=max(counts["tokens"], 1),
                         mask_count=max(counts["masked"], 1), **more)


class TextStage(nn.Module):
    """Stage 1."""
    def __init__(self, vae: TextVAE, args: Namespace):
        super().__init__()
        self.text_vae, self.args = vae, args

    def forward(self, b: TextBatch, counts: dict[str, float]) -> tuple[Tensor, Terms]:
        return vae_loss(self.text_vae, b, counts, self.args)


class ImageStage(nn.Module):
    """Stage 1b."""
    def __init__(self, vae: ImageVAE):
        super().__init__()
        self.image_vae = vae

    def forward(self, b: ImageBatch, counts: dict[str, float]) -> tuple[Tensor, Terms]:
        loss, terms = image_vae_loss(self.image_vae, b.x, b.noise)
        share = len(b.x) / counts["images"]                # the batch may hold one of several sizes
        return share * loss, {name: share * term for name, term in terms.items()}


class PriorStage(nn.Module):
    """Stage 2: the prior, jointly with the text VAE if that has a learning rate."""
    def __init__(self, model: Cola, args: Namespace, feature_channels: int):
        super().__init__()
        self.args, self.mmdit, self.text_vae = args, model.mmdit, model.text_vae
        self.step, self.steps = 0, 1                       # steps done, and in all
        self.text_vae.requires_grad_(args.vae_lr_ratio > 0)
        self.ref = None
        if args.vae_lr_ratio and args.lambda_ref:          # q_ref: the VAE as it is before training
            self.ref = copy.deepcopy(model.text_vae).requires_grad_(False)
        if args.w_repa:                                    # predicts features of clean images
            self.repa = nn.Linear(args.width, feature_channels)

    def vae_trains(self) -> bool:
        """The text VAE trains in the first steps of each interval, then rests (paper, Sec. 4.3)."""
        train, rest = self.args.vae_interval
        return self.args.vae_lr_ratio > 0 and self.step % (train + rest) < train

    def forward(self, b: Batch, counts: dict[str, float]) -> tuple[Tensor, Terms]:
        a, vae = self.args, self.text_vae
        plan = vae.make_plan(b.lengths)
        with torch.set_grad_enabled(self.vae_trains() and torch.is_grad_enabled()):
            mean, logvar = vae.encode(b.ids, b.lengths, plan)                      # (Lv, Dz) each
        loss, terms = 0.0, {}
        if self.vae_trains():
            loss, terms = self.joint_loss(b, counts, mean, logvar, plan)

        # L_FM reaches the encoder through the noisy text (z_t and v); clean context is detached.
        z0 = vae.scale_latents(mean, logvar, b.posterior_noise).index_select(0, b.source)
        is_image, t = masks.is_image(b.layout.segment), b.t[b.t_index]             # (L,) each
        z_t = flow.interpolate(z0, b.eps_text, t[~is_image])                       # (Lt, Dz)
        text = torch.where(b.text_moves[:, None], z_t, z0.detach())
        image = flow.interpolate(b.z_image, b.eps_image, t[is_image])              # (Li, Cz)
        w_repa = a.w_repa if self.step < a.repa_until * self.steps and counts["image"] else 0.0
        v_text, v_image, hidden = self.mmdit(
            text, image, b.t, b.t_index, b.layout, b.plan, targets=(b.targets, b.target_plan),
            tap=a.repa_layer - 1 if w_repa else -1)

        v = flow.velocity(z0, b.eps_text)[b.text_moves]                            # (targets, Dz)
        text_loss = self.text_loss(v_text, v, b, counts, terms)
        loss = loss + a.lambda_fm * a.w_text * text_loss
        if counts["image"]:
            v = flow.velocity(b.z_image, b.eps_image)[b.image_moves]               # (targets, Cz)
            v_image = v if v_image is None else v_image    # without an image here, its share is 0
            terms["image"] = flow.flow_matching_loss(v_image, v, counts["image"])
            loss = loss + a.lambda_fm * terms["image"]
        if w_repa:
            terms["repa"] = self.repa_loss(b, hidden, counts)
            loss = loss + a.lambda_fm * w_repa * terms["repa"]
        if a.fsdp:         # weights outside the blocks, no DTensors here, may have no gradient: 0
            used = (p for name, p in self.named_parameters() if p.requires_grad and
                    (self.vae_trains() or not name.startswith("text_vae.")))
            loss = loss + 0 * sum(p.sum() for p in used if not isinstance(p, DTensor))
        return loss, {name: term.detach() for name, term in terms.items()}

    def repa_loss(self, b: Batch, hidden: Tensor, counts: dict[str, float]) -> Tensor:
        """L_REPA: the mean distance of features predicted from `hidden` (L, D) to those of the
        clean image."""
        predicted = self.repa(hidden[masks.is_image(b.layout.segment)].float())    # (Li, F)
        clean = b.z_image if b.features is None else b.features
        distance = 1 - F.cosine_similarity(predicted, clean, dim=-1)               # (Li,)
        return distance[b.image_moves].sum() / (counts["image"] / b.z_image.shape[1])

    def text_loss(self, v_text: Tensor, v: Tensor, b: Batch, counts: dict[str, float],
                  terms: Terms) -> Tensor:
        """L_text: the mean over all noisy text, in which filler weighs w_filler, and an answer
        w_answer. Adds the mean of each task to the terms."""
        weight = {name: counts[name] * (self.args.w_answer if name == "it2t" else 1.0)
                  for name in TASKS if counts[name]}
        for name in weight:
            of_task = b.text_weight * (b.text_task == TASKS.index(name))           # (Lt,)
            terms[f"text_{name}"] = flow.flow_matching_loss(
                v_text, v, counts[name], of_task[b.text_moves])
        if not weight:                                     # no text bears loss
            return 0 * v_text.sum()
        terms["text"] = sum(terms[f"text_{name}"] * w for name, w in weight.items()) \
            / sum(weight.values())
        return terms["text"]

    def joint_loss(self, b: Batch, counts: dict[str, float], mean: Tensor, logvar: Tensor,
                   plan: cuda_attention.Plan) -> tuple[Tensor, Terms]:
        """L_vae of Eq. 3.18, and KL(q || q_ref), which holds the posterior to that of the reference
        encoder."""
        a = self.args
        loss, terms = vae_loss(self.text_vae, b, counts, a, learned_prior=True,
                               posterior=(mean, logvar), plan=plan)
        loss = a.lambda_vae * loss
        if self.ref is not None:
            with torch.no_grad():
                reference = self.ref.encode(b.ids, b.lengths, plan)
            terms["ref"] = kl(mean, logvar, *reference).sum() / max(counts["tokens"], 1)
            loss = loss + a.lambda_ref * terms["ref"]
        return loss, terms

# ---- Optimizers, learning rate, average --------------------------------------------------------

class Muon(torch.optim.Optimizer):
    """Momentum with orthogonal updates, for matrices (K. Jordan 2024; Liu et al. 2502.16982).

        M = mu M + (1 - mu) G,   U = NS(mu M + (1 - mu) G)
        W = (1 - lr wd) W - lr sqrt(max(1, rows / columns)) U
        NS: X / |X|, then `steps` times X = a X + (b XX^T + c (XX^T)^2) X

    NS brings large singular values near 1; small ones grow by the factor a in every step. Matrices
    of one shape are iterated together, in the precision dtype; each worker does a share of them."""
    def __init__(self, params: list[Tensor], lr: float, weight_decay: float, momentum: float = 0.95,
                 steps: int = 3, dtype: torch.dtype = torch.float32):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.steps, self.dtype = steps, dtype

    @torch.no_grad()
    def step(self) -> None:
        """One step of all matrices that have a gradient."""
        for group in self.param_groups:
            lr, mu, same_shape = group["lr"], group["momentum"], defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    if not state:
                        state["momentum"] = torch.zeros_like(p)
                    state["momentum"].lerp_(p.grad, 1 - mu)
                    same_shape[min(p.shape), max(p.shape)].append(p)
            for ps in same_shape.values():                 # a tall matrix is iterated transposed
                updates = [workers.full(p.grad.lerp(self.state[p]["momentum"], mu)) for p in ps]
                wide = torch.stack([u.mT if u.shape[0] > u.shape[1] else u for u in updates])
                for p, u in zip(ps, self.orthogonal(wide)):
                    u = workers.like(u.mT if p.shape[0] > p.shape[1] else u, p)
                    p.mul_(1 - lr * group["weight_decay"])
                    p.add_(u, alpha=-lr * max(1, p.shape[0] / p.shape[1]) ** 0.5)

    def orthogonal(self, matrices: Tensor) -> Tensor:
        """NS of (n, rows, columns), rows <= columns, every worker its share of the n."""
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        a, b, c = 3.4445, -4.7750, 2.0315
        x = matrices[rank::world].to(self.dtype)
        x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
        for _ in range(self.steps):
            gram = x @ x.mT                                                    # (n, rows, rows)
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        out = torch.zeros_like(matrices)
        out[rank::world] = x
        if world > 1:
            dist.all_reduce(out)                           # the others add zeros
        return out


def make_optimizers(args: Namespace, stage: nn.Module, lr: float,
                    muon: bool) -> list[torch.optim.Optimizer]:
    """AdamW, and with `muon` Muon for the matrices inside the blocks. In stage 2 the text VAE has a
    learning rate of its own."""
    hidden, rest, vae = [], [], []
    for name, p in stage.named_parameters():
        if p.requires_grad:
            for_muon = muon and "blocks." in name and p.dim() == 2 and ".ada_" not in name
            in_vae = hasattr(stage, "mmdit") and name.startswith("text_vae.")
            (vae if in_vae else hidden if for_muon else rest).append(p)
    groups = [{"params": rest, "lr": lr}]
    groups += [{"params": vae, "lr": lr * args.vae_lr_ratio}] if vae else []
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=args.weight_decay, fused=True)
    dtype = torch.bfloat16 if args.bf16 == "on" else torch.float32
    muons = [Muon(hidden, args.muon_lr, args.weight_decay, dtype=dtype)] if hidden else []
    return [adamw, *muons]


def schedule(args: Namespace, step: int, steps: int) -> float:
    """Share of the peak learning rate. linear: it rises, stays, and falls towards 0. cosine: it
    rises, and falls along a cosine to a 15th of the peak (paper, Table 8, which begins at 1e-6)."""
    rise = (step + 1) / (args.warmup * steps + 1)
    if args.schedule == "linear":
        return min(1.0, rise, (steps - step) / (args.cooldown * steps + 1))
    done = max(0.0, step / steps - args.warmup) / max(1.0 - args.warmup, 1e-9)
    return min(rise, (8 + 7 * math.cos(math.pi * done)) / 15)


@torch.no_grad()
def update_average(average: Terms, weights: Terms, ema: float, step: int) -> None:
    """The average follows the weights with the decay `ema`, and faster in the first steps."""
    decay = min(ema, (1 + step) / (10 + step))
    here = lambda x: x.to_local() if isinstance(x, DTensor) else x         # this worker's part
    torch._foreach_lerp_([here(x) for x in average.values()],
                         [here(weights[name]) for name in average], 1 - decay)

# ---- The loop ----------------------------------------------------------------------------------

@dataclass
class Run:
    """All that the stages share."""
    args: Namespace
    worker: Worker
    model: Cola
    batches: Batches
    state: State


def forward_backward(wrapped: nn.Module, micro_batches: list, worker: Worker,
                     autocast: torch.autocast) -> tuple[Terms, dict[str, float]]:
    """The gradients of a step -> this worker's share of each term; counts of the whole step."""
    counts, sums = Counter(), Counter()
    for batch in micro_batches:
        counts.update(batch.counts())
    counts = worker.sum(counts)
    for i, batch in enumerate(micro_batches):
        last = i == len(micro_batches) - 1                         # DDP sums over workers only then
        with nullcontext() if last or not hasattr(wrapped, "no_sync") else wrapped.no_sync():
            with autocast:
                loss, terms = wrapped(batch, counts)
            (loss * worker.world).backward()               # the wrapper takes the mean of workers
        sums.update(terms)
    return dict(sums), counts


def fit(run: Run, name: str, stage: nn.Module, steps: int, make: Callable[[int], list], lr: float,
        muon: bool = False, average: bool = False, at_end: Callable = lambda: None) -> None:
    """Trains one stage from where it stands, and saves. make(step) -> this worker's micro-batches;
    average: keep an EMA; at_end is called before the last save. KeyboardInterrupt after saving, if
    a signal has asked for the end."""
    a, worker, state = run.args, run.worker, run.state
    start, lost = state.progress[name], 0
    wrapped = workers.wrap(stage, worker, a)               # DDP, FSDP2, or the stage itself
    weights = {n: p for n, p in stage.named_parameters() if p.requires_grad}
    optimizers = make_optimizers(a, stage, lr, muon)
    groups = [(group, group["lr"]) for o in optimizers for group in o.param_groups]
    if start:
        checkpoint.restore_moments(optimizers, weights, state.moments)
    if average:
        state.ema = {n: workers.like(state.ema.get(n, workers.full(p.detach())), p)
                     for n, p in weights.items() if n.startswith(("mmdit.", "text_vae."))}
    bf16 = a.bf16 == "on" and name != "text_vae"           # stage 1 is too small to gain
    autocast = workers.autocast(stage, bf16, worker.device.type)
    log = checkpoint.Log(a.out_dir, name, start, steps, worker)
    clock = time.perf_counter()
    for step, micro_batches, waited in batches.ahead(make, range(start, steps), worker.device):
        stage.step, stage.steps = step, steps              # L_REPA and the VAE's rests go by them
        for group, peak in groups:
            group["lr"] = peak * schedule(a, step, steps)

        terms, counts = forward_backward(wrapped, micro_batches, worker, autocast)
        norm = workers.full(nn.utils.clip_grad_norm_(weights.values(), a.clip))
        # Every worker has the same norm: a share of it, so that the sum is the norm.
        values = worker.sum(terms | {"norm": norm / worker.world,
                                     "stop": norm.new_tensor(worker.stop)})
        stop = values.pop("stop")
        lost = 0 if math.isfinite(values["norm"]) else lost + 1
        for optimizer in optimizers:
            if not lost:                                   # a step without a number is not taken
                optimizer.step()                           # a weight without a gradient stays
            optimizer.zero_grad(set_to_none=True)
        if lost == PATIENCE:
            raise ValueError(f"{name}: no finite gradient in {PATIENCE} steps up to {step + 1}")
        if average:
            update_average(state.ema, weights, a.ema, step)

        state.progress[name] = step + 1
        took = time.perf_counter() - clock
        state.seconds += took
        log.write(step + 1, values, lr=groups[0][0]["lr"], positions=counts["positions"],
                  skipped=lost, seconds=round(took, 4), data_seconds=round(waited, 4))
        done = step + 1 == steps
        if done:
            at_end()
        if done or stop or (step + 1) % a.save_every == 0:
            state.moments = checkpoint.moments(optimizers, weights)
            checkpoint.save(a, run.model, stage, state, worker)
        if stop:
            log.close()                                    # the bar, before any other line
            raise KeyboardInterrupt
        clock = time.perf_counter()                        # saving is not training
    log.close()

# ---- The three stages --------------------------------------------------------------------------

@contextmanager
def attention_of(run: Run, make_step: Callable[[int], list[Batch]]) -> Iterator[None]:
    """The backend of stage 2: where --attention auto has a GPU, the fastest on the first batch, for
    all workers that of worker 0. Afterwards, the backend of before."""
    before, c, worker = cuda_attention.default_backend, run.model.mmdit.config, run.worker
    if run.args.attention == "auto" and worker.device.type == "cuda":
        layout = make_step(0)[0].layout.to(worker.device)
        best, line = choose(layout, c.heads, c.head_dim, c.layers, run.args.bf16 == "on")
        cuda_attention.default_backend = worker.gather([best])[0]
        if worker.rank == 0:
            print(line)
    try:
        yield
    finally:
        cuda_attention.default_backend = before


def train(run: Run) -> None:
    """Stage 1, 1b and 2, as far as they are open."""
    a, worker, model, make = run.args, run.worker, run.model, run.batches
    (open_, finished), muon = checkpoint.open_stages(a, run.state), a.optimizer == "muon"
    mine = lambda step, size: worker.share(range(step * size, (step + 1) * size))
    if finished and worker.rank == 0:
        print(f"not trained further, as later stages build on them: {', '.join(finished)}")

    if "text_vae" in open_:
        fit(run, "text_vae", TextStage(model.text_vae, a), config.steps(a, "text_vae"),
            lambda step: [make.text(mine(step, a.text_vae_batch))], a.text_vae_lr)

    if "image_vae" in open_:
        fit(run, "image_vae", ImageStage(model.image_vae), config.steps(a, "image_vae"),
            lambda step: make.images(mine(step, a.image_vae_batch)),
            a.image_vae_lr, muon,
            at_end=lambda: model.image_vae.set_statistics(make.pixels(range(1024))))
    model.image_vae.requires_grad_(False)

    if "mmdit" in open_:
        run.state.ema = run.state.ema if a.ema else {}
        torch.manual_seed(a.seed)                          # for the head of L_REPA
        stage = PriorStage(model, a, make.feature_channels).to(worker.device)
        try:
            stage.load_state_dict(run.state.extra, strict=False)   # if this stage has begun
        except RuntimeError:
            raise ValueError("--repa_features: the run began with other channels") from None
        if a.compile:
            workers.compile_blocks(model.mmdit)

        def make_step(step: int) -> list[Batch]:
            work = worker.share(batches.step_samples(a, step))
            passes = a.micro_steps if a.accumulate else 1
            return [make.prior(work[i::passes]) for i in range(passes)]
        with attention_of(run, make_step):
            fit(run, "mmdit", stage, config.steps(a, "mmdit"), make_step, a.lr, muon, a.ema > 0)

# ---- Main --------------------------------------------------------------------------------------

def check_data(args: Namespace, dataset, model: Cola) -> None:
    """ValueError, one line, where the data lack a task, images, or room for a caption."""
    if missing := sorted(config.task_shares(args.tasks).keys() - dataset.tasks):
        served = ",".join(f"{name}:1" for name in sorted(dataset.tasks))
        raise ValueError(f"--tasks asks for {', '.join(missing)}, which these data do not have; "
                         f"say --tasks {served}")
    if args.stage == "image_vae" and not dataset.num_images:
        raise ValueError("--stage image_vae: these data have no images")
    block = model.block_len * model.text_vae.config.patch_size
    for name, caption in dataset.captions():
        if (n := len(model.tokenizer.encode(caption)) + 1) > args.seq_len // block * block:
            raise ValueError(f"{name}: its caption has {n} tokens; raise --seq_len {args.seq_len} "
                             f"to {math.ceil(n / block) * block}")


def describe(run: Run) -> None:
    """--dry_run: the sizes of the parts, and a sample of each task."""
    for name, part in run.model.parts().items():
        print(f"{name}: {sum(p.numel() for p in part.parameters()):,} parameters")
    for name, share in config.task_shares(run.args.tasks).items():
        sample = run.batches.prior([(TASKS.index(name), 0)]).layout.segment.tolist()
        print(f"{share:.2f} of the samples are {name}, the first of them "
              + "".join(masks.SEGMENTS[i] for i in sample))
    print("nothing was written")


def main(argv: list[str] | None = None) -> int:
    """The exit status: 0, 2 for a user's mistake, 130 for a run that was stopped."""
    worker = Worker(int(os.environ.get("RANK", 0)))
    try:
        given = config.parse(sys.argv[1:] if argv is None else argv)
        args, found = checkpoint.begin(given)              # all flags; the checkpoint, or None
        worker = workers.join(args)                        # starts the others on a CPU
        backend = cuda_attention.set_backend(args.attention, worker.device)
        dataset = data.open_data(args)
        model = checkpoint.build(found, args) if found else checkpoint.new_model(args, dataset)
        check_data(args, dataset, model)
        state = State.of(found)
        if len(set(worker.gather([str(state.progress)]))) > 1:
            raise ValueError(f"{args.out_dir}: not the same on all machines; name a common disk")
        run = Run(args, worker, model, Batches(args, dataset, model.to(worker.device)), state)
        if worker.rank == 0:
            print("flags:", config.show(args), backend, sep="\n")
            for change in config.changes(given, found["args"]) if found else []:
                print("changed:", change)
            if args.dry_run:
                describe(run)
        if args.dry_run:
            return worker.leave()
        with workers.claimed(args.out_dir, worker), workers.signals(worker):
            if worker.rank == 0:
                checkpoint.trim_log(args.out_dir, state.progress)
            train(run)
            if worker.sum({"stop": worker.stop})["stop"]:              # since the last step
                raise KeyboardInterrupt
        evaluate.report(args, worker, checkpoint.latest(args.out_dir), dataset)
        return worker.leave()
    except (ValueError, OSError, RuntimeError, KeyboardInterrupt) as error:
        return worker.leave(error, "stopped; continue with --resume auto")


if __name__ == "__main__":
    sys.exit(main())
