"""Speed: where the time of a training step of stage 2 goes, and what masked attention costs.

    python -m experiments.speed                                   (CPU, one thread: 80 s)
    python -m experiments.speed --device cuda --batch_size 64     any flags of train.py

One process, fresh weights, the batches of the run, learning rates of 0. Every number is a median
after a warm-up, by the clock on the wall. The parts of a step are timed one after another, with the
device idle before and after each. The whole step is timed as in training: batches are made one step
ahead in a thread, and losses are read once a step.
"""
from __future__ import annotations

import contextlib
import statistics
import sys
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn as nn

import batches
import checkpoint
import config
import cuda_attention
import data
import train
import workers
from batches import Batch, Batches
from cola import Cola
from cuda_attention import attention, make_plan, ops
from masks import Layout
from workers import Worker

WARMUP, STEPS = 5, 20            # of training; attention is timed a fifth as often


class Clock:
    """Seconds of named parts, added up until the times are taken."""
    def __init__(self, device: torch.device):
        self.device, self.times = device, Counter()

    @contextlib.contextmanager
    def part(self, name: str = "") -> Iterator[None]:
        """Times what happens inside, until the device has done its work."""
        self.wait()
        began = time.perf_counter()
        yield
        self.wait()
        self.times[name] += time.perf_counter() - began

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def take(self) -> Counter[str]:
        times, self.times = self.times, Counter()
        return times


class Step:
    """The steps of stage 2 of a run."""
    def __init__(self, args: Namespace, worker: Worker, model: Cola, dataset):
        self.args, self.worker = args, worker
        self.batches = Batches(args, dataset, model)
        self.stage = train.PriorStage(model, args, 0).to(worker.device)
        self.optimizers = train.make_optimizers(args, self.stage, args.lr, args.optimizer == "muon")
        for group in (group for o in self.optimizers for group in o.param_groups):
            group["lr"] = 0.0              # the same work, and weights that stay finite
        self.weights = {name: p for name, p in self.stage.named_parameters() if p.requires_grad}
        self.autocast = workers.autocast(self.stage, args.bf16 == "on", worker.device.type)

    def make(self, step: int) -> list[Batch]:
        """The batches of a step, as train.py makes them."""
        work = batches.step_samples(self.args, step)
        passes = self.args.micro_steps if self.args.accumulate else 1
        return [self.batches.prior(work[i::passes]) for i in range(passes)]

    def parts(self, step: int, clock: Clock) -> Counter[str]:
        """Seconds of each part of one step."""
        with clock.part("making a batch"):
            made = self.make(step)
        with clock.part("copying it, attention plan"):
            micro = [batches.to_device(batch, self.worker.device) for batch in made]
        counts = Counter()
        for batch in micro:
            counts.update(batch.counts())
        for batch in micro:
            with clock.part("forward"), self.autocast:
                loss, _ = self.stage(batch, counts)
            with clock.part("backward"):
                loss.backward()
        with clock.part("clipping"):
            nn.utils.clip_grad_norm_(self.weights.values(), self.args.clip)
        for optimizer in self.optimizers:
            with clock.part(f"optimizer {type(optimizer).__name__}"):
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return clock.take()

    def whole(self) -> float:
        """Median seconds of a step as in training."""
        times, began = [], time.perf_counter()
        steps = range(WARMUP + STEPS)
        for step, micro, _ in batches.ahead(self.make, steps, self.worker.device):
            terms, _ = train.forward_backward(self.stage, micro, self.worker, self.autocast)
            nn.utils.clip_grad_norm_(self.weights.values(), self.args.clip)
            self.worker.sum(terms)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            times.append(time.perf_counter() - began)
            began = time.perf_counter()
        return statistics.median(times[WARMUP:])


def time_steps(run: Step, clock: Clock) -> None:
    """Prints a line for each part of a step, and for the whole step."""
    steps = [run.parts(step, clock) for step in range(WARMUP + STEPS)][WARMUP:]
    for name in steps[0]:
        print(f"{name:28}{1e3 * statistics.median(x[name] for x in steps):9.2f} ms")
    took, samples = run.whole(), run.args.batch_size * run.args.micro_steps
    print(f"{'whole step':28}{1e3 * took:9.2f} ms, {samples / took:.0f} samples per second")


def time_attention(args: Namespace, layout: Layout, clock: Clock) -> None:
    """Prints forward and backward of the attention backends on one batch. On a GPU also with heads
    of 64, which the kernels are built for."""
    device, dtype = clock.device, torch.bfloat16 if args.bf16 == "on" else torch.float32
    plan, width = make_plan(layout.to(device)), args.width // args.heads
    for hd in (width, 64) if device.type == "cuda" else (width,):
        q, k, v = (torch.randn(len(layout), args.heads, hd, dtype=dtype, device=device,
                               requires_grad=True) for _ in range(3))
        backends = ["reference", "padded"] + ["flex"] * (device.type == "cuda")
        backends += ["cuda"] * (device.type == "cuda" and ops.supports(q, k))
        for backend in backends:
            times = []
            for _ in range((WARMUP + STEPS) // 5):
                with clock.part():
                    attention(q, k, v, plan, backend).sum().backward()
                times.append(clock.take().total())
            title = f"attention {backend}, heads of {hd}"
            print(f"{title:28}{1e3 * statistics.median(times[WARMUP // 5:]):9.2f} ms")


def main() -> int:
    """The exit status: 0, or 2 for a user's mistake."""
    try:
        args = config.merge({"procs": 1} | config.parse(sys.argv[1:], "speed.py"))
        worker = workers.join(args)
        print(cuda_attention.set_backend(args.attention, worker.device))
        dataset = data.open_data(args)
        model = checkpoint.new_model(args, dataset).to(worker.device)
        model.image_vae.eval().requires_grad_(False)
    except (ValueError, OSError) as error:
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        return 2
    if args.compile:
        workers.compile_blocks(model.mmdit)
    run = Step(args, worker, model, dataset)
    layout = run.make(0)[0].layout
    print(f"flags: {config.show(args)}\n{worker.device.type}, bf16 {args.bf16}, "
          f"{len(layout)} positions in the first batch; medians of {STEPS}:")
    clock = Clock(worker.device)
    time_steps(run, clock)
    time_attention(args, layout, clock)
    return 0


if __name__ == "__main__":
    sys.exit(main())
