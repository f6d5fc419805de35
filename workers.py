"""Workers: one process per device, with the same weights and a share of the samples each.

torchrun starts the workers of several GPUs. On a CPU the first process starts the others itself,
one thread each: on small matrices two such processes are faster than two threads of one process.
Gradients are averaged by DDP. With --fsdp the weights of stage 2, their gradients and moments are
sharded over the workers (FSDP2): a block of the prior is whole only while it computes.

Run: python workers.py   (CPU, 5 s: two workers share a sum)
"""
import contextlib
import fcntl
import functools
import os
import signal
import socket
import subprocess
import sys
import timeit
import warnings
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (MixedPrecisionPolicy, fully_shard,
                                    register_fsdp_forward_method)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import config


@dataclass
class Worker:
    """This process among the others."""
    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")
    stop: float = 0.0              # 1.0 after a signal, to be summed
    training: bool = False         # it has begun: an error may be of this worker alone
    started: list[subprocess.Popen] = field(default_factory=list)      # workers of this process

    def share(self, numbers: range | list) -> range | list:
        """This worker's samples of all; shares of a task differ by at most one sample."""
        return numbers[self.rank::self.world]

    def gather(self, items: list) -> list:
        """The lists of all workers, joined."""
        if self.world == 1:
            return items
        parts: list = [None] * self.world
        dist.all_gather_object(parts, items)
        return [x for part in parts for x in part]

    def sum(self, values: dict[str, Tensor | float]) -> dict[str, float]:
        """The sums of named numbers over the workers, who all have the same names. The host waits
        for the device if the numbers are on it."""
        x = torch.stack([torch.as_tensor(value, dtype=torch.float64) for value in values.values()])
        if self.world > 1:
            dist.all_reduce(x := x.to(self.device))
        return dict(zip(values, x.tolist()))

    def leave(self, error: BaseException | None = None, stopped: str = "stopped") -> int:
        """Ends this worker, with a line for the user if there is an error. Returns the status: 0,
        2 for a ValueError or OSError, 130 and the line `stopped` for a KeyboardInterrupt, 1 or its
        own status where another worker has ended. Any other RuntimeError is raised.

        Errors come to all workers of a machine alike, and its first one prints them; but an OSError
        after the set-up, such as a full disk, may be of this worker alone. A RuntimeError about a
        connection says that another worker has ended, which prints its own reason."""
        line, own = str(error or ""), self.training and isinstance(error, OSError)
        status = 2 if error else 0
        if isinstance(error, KeyboardInterrupt):
            status, line = 130, stopped
        if isinstance(error, RuntimeError):
            if not dist.is_initialized() or "onnection" not in str(error):   # Connection .. or c..
                raise error
            status, line = 1, ""
            for process in self.started:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=3)
        codes = [process.poll() or 0 for process in self.started]      # < 0: by a signal
        if min(codes, default=0) < 0 and not self.stop:
            line = "a worker was killed; continue with --resume auto"
        elif status == 1:                                  # the other worker has printed why
            status = max(codes, default=0) or 1
        if line and (os.environ.get("LOCAL_RANK", "0") == "0" or own):
            print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
        for process in self.started:
            if status:
                process.kill()                             # it may wait for this one in a sum
            process.wait()
        if dist.is_initialized():
            if status:                                     # without waiting for the group
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
            dist.destroy_process_group()
        return status

# ---- Starting ----------------------------------------------------------------------------------

def join(args: Namespace) -> Worker:
    """This process's place among the workers; on a CPU it starts the others first. Sets
    args.device and args.bf16. ValueError where there are fewer samples or GPUs than workers."""
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.bf16 == "auto":
        args.bf16 = "on" if args.device == "cuda" or bf16_is_faster() else "off"
    on_cpu, started = args.device == "cpu", []
    world = int(os.environ.get("WORLD_SIZE", 1))
    # Every worker needs a sample in every pass of the stages of --stage.
    prior = args.batch_size * (1 if args.accumulate else args.micro_steps)
    samples = {"text_vae": args.text_vae_batch, "image_vae": args.image_vae_batch, "mmdit": prior}
    most = min(samples[stage] for stage in config.stages(args))
    if on_cpu and "RANK" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        world = args.procs or min(cores, most)
    if world > most:
        raise ValueError(f"{world} workers, but a step has samples for {most}: raise --batch_size, "
                         "--text_vae_batch and --image_vae_batch")
    if on_cpu and "RANK" not in os.environ and world > 1:
        started = start_workers(world)
    device = join_group(args.device) if world > 1 else torch.device(args.device)
    if on_cpu:
        torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")             # TF32 where bfloat16 is not used
    worker = Worker(int(os.environ.get("RANK", 0)), world, device, started=started)
    args.bf16 = worker.gather([args.bf16])[0]
    return worker


def bf16_is_faster() -> bool:
    """Whether this CPU's products are 1.5 times as fast in bfloat16; many CPUs emulate it."""
    matrices = torch.ones(256, 256), torch.ones(256, 256, dtype=torch.bfloat16)
    fp32, bf16 = (min(timeit.repeat(lambda: x @ x, number=1, repeat=10)) for x in matrices)
    return 1.5 * bf16 < fp32


def start_workers(world: int) -> list[subprocess.Popen]:
    """Starts workers 1 .. world - 1 as copies of this command; this process becomes worker 0."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
                      LOCAL_WORLD_SIZE=str(world), MASTER_PORT=str(port))
    command = [sys.executable, *sys.orig_argv[1:]]
    # In sessions of their own they hear of Ctrl-C through worker 0 alone.
    return [subprocess.Popen(command, start_new_session=True,
                             env=os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank),
                                               "OMP_NUM_THREADS": "1"})
            for rank in range(1, world)]


def join_group(device: str) -> torch.device:
    """Joins the process group that torchrun or `start_workers` describes in the environment."""
    local, here = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if device == "cuda":
        if here > (gpus := torch.cuda.device_count()):
            raise ValueError(f"{here} workers for {gpus} GPUs; lower --nproc_per_node")
        device = f"cuda:{local}"
        torch.cuda.set_device(device)
    store, rank, world = next(dist.rendezvous("env://"))
    if here == world:              # torchrun's store keeps the addresses of workers that have died
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    # The timeout is long because all wait while the first worker writes a checkpoint.
    dist.init_process_group("gloo" if device == "cpu" else "nccl", store=store, rank=rank,
                            world_size=world, timeout=timedelta(hours=2))
    return torch.device(device)

# ---- Training together -------------------------------------------------------------------------

def wrap(stage: nn.Module, worker: Worker, args: Namespace) -> nn.Module:
    """The stage with gradients averaged over the workers; alone, the stage itself."""
    if worker.world == 1:
        return stage
    if args.fsdp and hasattr(stage, "mmdit"):
        return shard(stage, worker, args)
    # In stage 2 a step may leave weights without a gradient; the optimizers leave these alone.
    return DistributedDataParallel(stage, find_unused_parameters=hasattr(stage, "mmdit"))


def shard(stage: nn.Module, worker: Worker, args: Namespace) -> nn.Module:
    """Stage 2 under FSDP2: each block of the prior is a group of its own, the rest one more.
    A weight that no sample of a step uses gets a gradient of 0 here, and with DDP none."""
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")      # about views a block returns
    mesh = init_device_mesh(worker.device.type, (worker.world,))
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False) \
        if args.bf16 == "on" else MixedPrecisionPolicy()
    for block in (*stage.mmdit.blocks, *stage.mmdit.image_blocks):
        fully_shard(block, mesh=mesh, mp_policy=policy)
        for method in ("pre_attention", "post_attention"):
            register_fsdp_forward_method(block, method)
    return fully_shard(stage, mesh=mesh)


def compile_blocks(mmdit: nn.Module) -> None:
    """torch.compile for what lies on both sides of the attention, for any number of positions."""
    for block in (*mmdit.blocks, *mmdit.image_blocks):
        block.pre_attention = torch.compile(block.pre_attention, dynamic=True)
        block.post_attention = torch.compile(block.post_attention, dynamic=True)


class BF16Linear(torch.autograd.Function):
    """A linear map with products in bfloat16. It converts and pads in one copy, autocast in two."""
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x (n, in), weight (out, in), bias (out,) or None -> (n, out) fp32"""
        x16, w16 = padded_bf16(x), weight.bfloat16()
        ctx.save_for_backward(x16, w16)
        return F.linear(x16, w16, None if bias is None else bias.bfloat16())[:len(x)].float()

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        """g (n, out) -> gradients of x, weight and bias, which autograd casts to their types."""
        (x16, w16), g16 = ctx.saved_tensors, padded_bf16(g)
        need_x, need_weight, need_bias = ctx.needs_input_grad
        return ((g16 @ w16)[:len(g)] if need_x else None, g16.mT @ x16 if need_weight else None,
                g.sum(0) if need_bias else None)


def bf16_linear(module: nn.Linear, x: Tensor) -> Tensor:
    """The forward method of a linear map with products in bfloat16."""
    return BF16Linear.apply(x, module.weight, module.bias)


def padded_bf16(x: Tensor) -> Tensor:
    """x (n, d) in bfloat16, with n padded by zeros to a multiple of 64: oneDNN compiles a kernel,
    which takes milliseconds, for each new shape."""
    out = torch.empty(len(x) + -len(x) % 64, x.shape[1], dtype=torch.bfloat16)
    out[:len(x)], out[len(x):] = x, 0
    return out


def autocast(stage: nn.Module, bf16: bool, device: str) -> torch.autocast:
    """The autocast context of a stage. On a CPU it would slow attention down: there the linear maps
    of the stage are replaced by bf16_linear, for good, and the context does nothing."""
    if bf16 and device == "cpu":
        for module in stage.modules():
            if isinstance(module, nn.Linear):
                module.forward = functools.partial(bf16_linear, module)
    return torch.autocast(device, torch.bfloat16, enabled=bf16 and device != "cpu")


def full(x: Tensor) -> Tensor:
    """A tensor that is sharded, put together on every worker. All must call it."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def like(x: Tensor, p: Tensor) -> Tensor:
    """A whole tensor x, copied to p's device and sharded as p is."""
    x = x.to(p.device, copy=True)
    if not isinstance(p, DTensor):
        return x
    return distribute_tensor(x, p.device_mesh, p.placements, src_data_rank=None)

# ---- Signals and the folder --------------------------------------------------------------------

@contextlib.contextmanager
def signals(worker: Worker) -> Iterator[None]:
    """While training, SIGTERM and SIGINT ask for a checkpoint and the end after the current step.
    Any number of SIGTERMs leads to one whole checkpoint; a second SIGINT breaks off at once."""
    def ask(number: int, frame: object) -> None:
        worker.stop = 1.0
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)

    old = {n: signal.signal(n, ask) for n in (signal.SIGINT, signal.SIGTERM)}
    worker.training = True
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def claimed(folder: str, worker: Worker) -> Iterator[None]:
    """The folder is this run's alone. ValueError where another run is writing there."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with open(Path(folder, ".lock"), "a") as lock:
        if worker.rank == 0:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"{folder}: another run is writing there; choose another "
                                 "--out_dir") from None
            except OSError:
                pass                                       # a disk without locks
        yield


if __name__ == "__main__":
    me = join(config.merge({"device": "cpu", "procs": 2}))
    mine = list(me.share(range(7)))
    total = me.sum({"numbers": sum(mine)})["numbers"]
    lines = me.gather([f"worker {me.rank} of {me.world} has {mine}"])
    if me.rank == 0:
        print(*lines, f"the sum of all their numbers is {total:.0f} (expect 21)", sep="\n")
    sys.exit(me.leave())
