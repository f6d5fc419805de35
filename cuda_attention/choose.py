"""Choose: the backend that --attention auto takes on a GPU.

A candidate must agree with the reference on a small batch of all tasks, forward and backward. Of
those that do, the fastest in a step of the prior on the first batch is taken: the plan, and all
layers forward and backward. The text VAE, a small part of a step, is not timed.
"""
import statistics
import time

import torch
from torch import Tensor

import cuda_attention
from masks import IT2T, T2I, T2T, Layout, Sample, pack

CANDIDATES = ("cuda", "flex", "padded")
SMALL = [Sample(T2T, clean=30, noisy=32), Sample(T2I, clean=16, image=(8, 8), noisy=16),
         Sample(IT2T, prompt=7, image=(8, 8), clean=16, noisy=16, start=7)]
TOLERANCE = 0.02                       # of the largest number: bfloat16 has errors of 0.004


def forward_backward(backend: str, plan: cuda_attention.Plan, inputs: list[Tensor]) -> list[Tensor]:
    """o, dq, dk and dv for q, k, v and the gradient of o, (L, nh, hd) each."""
    *qkv, do = inputs
    qkv = [x.detach().requires_grad_() for x in qkv]
    o = cuda_attention.attention(*qkv, plan, backend)
    return [o.detach(), *torch.autograd.grad(o, qkv, do)]


def check(backend: str, heads: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
    """ValueError where the backend differs from the reference, or does not support such heads."""
    plan = cuda_attention.make_plan(pack(SMALL, 16, device))
    inputs = [torch.randn(len(plan.q), heads, width, device=device, dtype=dtype) for _ in range(4)]
    if backend == "cuda" and not cuda_attention.ops.supports(*inputs[:2]):
        raise ValueError(f"no kernels for heads of {width} in {dtype}")
    truth = forward_backward("reference", plan, [x.double() for x in inputs])
    for name, x, y in zip(("o", "dq", "dk", "dv"), forward_backward(backend, plan, inputs), truth):
        error = ((x - y).abs().max() / y.abs().max()).item()
        if not error <= TOLERANCE:
            raise ValueError(f"its {name} is wrong by {error:.2g}")


def milliseconds(backend: str, layout: Layout, inputs: list[Tensor], layers: int) -> float:
    """Median time of a plan and of all layers, forward and backward."""
    times = []
    for _ in range(8):
        began = time.perf_counter()
        plan = cuda_attention.make_plan(layout)
        for _ in range(layers):
            forward_backward(backend, plan, inputs)
        if inputs[0].is_cuda:
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times[3:])


def choose(layout: Layout, heads: int, width: int, layers: int, bf16: bool) -> tuple[str, str]:
    """The fastest right backend for this batch, and a line for the user."""
    device, times, words = layout.segment.device, {}, []
    dtype = torch.bfloat16 if bf16 else torch.float32
    inputs = [torch.randn(len(layout), heads, width, device=device, dtype=dtype) for _ in range(4)]
    for backend in CANDIDATES:
        try:
            check(backend, heads, width, dtype, device)
            times[backend] = milliseconds(backend, layout, inputs, layers)
            words.append(f"{backend} {times[backend]:.1f} ms")
        except Exception as error:         # compilers raise errors of any class
            words.append(f"{backend} left out ({str(error).strip().partition(chr(10))[0]:.80})")
    best = min(times, key=times.get, default="padded")
    return best, f"attention: {', '.join(words)}; taken: {best}"
