"""Masked attention against its peers: builds, checks and times, prints tables and writes JSON.

    python cuda_attention/bench.py [--json out.json]         a GPU: 8 minutes at most; a CPU: one

On a GPU: the cuBLAS rate R of this run, errors against fp64, three runs bit for bit, then times of our kernels,
FlexAttention (compiled) and SDPA with a dense mask, forward and backward, on packed batches of the three tasks.
FLOPs are 4 area heads width forward and 2.5 times that backward; area counts visible pairs, not tiles. Times are
medians of CUDA events over random data, the candidates taking turns. On a CPU: the padded path against dense SDPA.
"""
from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import masks
from cuda_attention import attention, make_plan, ops
from cuda_attention.tiles import make_tiles
from masks import IT2T, T2I, T2T, Layout, Sample, pack

BATCHES = {                    # samples in turn, as many as fit
    "full": [],
    "t2i, 256 latents": [Sample(T2I, clean=n, image=(16, 16), noisy=n) for n in (32, 64, 128)],
    "t2i, 1600 latents": [Sample(T2I, clean=n, image=(40, 40)) for n in (32, 64, 128)],
    "it2t, 256 latents": [Sample(IT2T, prompt=16, image=(16, 16), clean=n, noisy=n, start=16)
                          for n in (32, 64, 128)],
    "t2t, 512 latents": [Sample(T2T, clean=512, noisy=512)],
}


def batch(name: str, length: int, device: str) -> Layout:
    """About `length` positions of a batch of BATCHES; "full" is one image, which sees all of itself."""
    if name == "full":
        return pack([Sample(T2I, image=(length // 64, 64))], 16, device)
    samples, left, kinds = [], length, BATCHES[name]
    while True:
        s = kinds[len(samples) % len(kinds)]
        size = s.prompt + s.image[0] * s.image[1] + s.clean + s.noisy
        if samples and size > left:
            return pack(samples, 16, device)
        samples, left = [*samples, s], left - size


def tensors(n: int, heads: int, width: int, device: str, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and the gradient of o."""
    return [torch.randn(n, heads, width, device=device, dtype=dtype) for _ in range(4)]


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    rows = (x.transpose(0, 1)[None] for x in (q, k, v))                              # (1, nh, N, hd)
    return F.scaled_dot_product_attention(*rows, attn_mask=mask)[0].transpose(0, 1)


def milliseconds(calls: dict[str, Callable[[], None]], device: str, rounds: int = 9) -> dict[str, float]:
    """Medians of the calls, taken in turn after two rounds of warm-up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(rounds + 2):
        for name, call in calls.items():
            if device == "cuda":
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                call()
                end.record()
                end.synchronize()
                took = start.elapsed_time(end)
            else:
                began = time.perf_counter()
                call()
                took = 1e3 * (time.perf_counter() - began)
            if round_ > 1:
                times[name].append(took)
    return {name: statistics.median(x) for name, x in times.items()}


def cublas_rate() -> float:
    """TFLOP/s of a bf16 product of 8192 x 8192 matrices."""
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    return 2 * 8192 ** 3 / milliseconds({"mm": lambda: a @ b}, "cuda", 21)["mm"] / 1e9


def errors(width: int) -> dict[str, float]:
    """Largest errors of o, dq, dk, dv against fp64, divided by those of SDPA in bf16; and whether three runs agree
    bit for bit, with other memory in between."""
    layout = batch("it2t, 256 latents", 1500, "cuda")
    q, k, v, do = tensors(len(layout), 4, width, "cuda", torch.bfloat16)
    plan, mask, runs = make_plan(layout), masks.dense(layout, layout), []
    candidates = {"ours": lambda *x: attention(*x, plan, "cuda"), "sdpa": lambda *x: dense(*x, mask)}
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    o = attention(*exact, plan, "reference")
    truth = [o, *torch.autograd.grad(o, exact, do.double())]
    worst: dict[str, list[float]] = {}
    for name in ("ours", "sdpa", "ours", "ours"):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        o = candidates[name](*inputs)
        got = [o.detach(), *torch.autograd.grad(o, inputs, do)]
        worst[name] = [(a.double() - b).abs().max().item() for a, b in zip(got, truth)]
        runs += [got] if name == "ours" else []
        torch.full((1 << 28,), float("nan"), device="cuda")                        # poison what was freed
    ratios = [a / b for a, b in zip(worst["ours"], worst["sdpa"])]
    same = all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0]))
    return dict(zip(("o", "dq", "dk", "dv"), ratios)) | {"bitwise": float(same)}


def compare(name: str, length: int, heads: int, width: int, device: str) -> dict:
    """Times of all candidates, forward and backward, and rates of ours."""
    layout = batch(name, length, device)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q, k, v, do = tensors(len(layout), heads, width, device, dtype)
    plan, few = make_plan(layout), len(layout) <= 16500 and length <= 16384
    backends = ("cuda", "flex") if device == "cuda" else ("padded",)
    run = {b: (lambda b: lambda *x: attention(*x, plan, b))(b) for b in backends}
    if few:
        mask = masks.dense(layout, layout)
        run["sdpa"] = lambda *x: dense(*x, mask)
    forward = milliseconds({b: (lambda f: lambda: f(q, k, v))(f) for b, f in run.items()}, device)
    backward = {}
    for b, f in run.items():                                   # one graph at a time: they keep much
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        o = f(*inputs)
        backward |= milliseconds({b: lambda: torch.autograd.grad(o, inputs, do, retain_graph=True)}, device)
    area = int(make_tiles(layout, layout).area)
    flops = 4 * area * heads * width / 1e9                     # GFLOP: with ms, TFLOP/s
    ours = backends[0]
    return {"mask": name, "positions": len(layout), "width": width, "heads": heads, "area": area,
            "forward_ms": forward, "backward_ms": backward, "forward_tflops": flops / forward[ours],
            "backward_tflops": 2.5 * flops / backward[ours]}


def plan_time(length: int) -> dict[str, float]:
    """Milliseconds to build the tiles of a batch, once for all layers and heads."""
    layout = batch("t2i, 256 latents", length, "cuda")
    return milliseconds({"plan": lambda: make_tiles(layout, layout)}, "cuda")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", default="", help="file for all the numbers")
    parser.add_argument("--budget", type=float, default=450, help="seconds after which no further row is begun")
    args = parser.parse_args()
    device, began = "cuda" if torch.cuda.is_available() else "cpu", time.monotonic()
    torch.manual_seed(0)
    results: dict = {"device": torch.cuda.get_device_name() if device == "cuda" else "cpu", "rows": []}
    if device == "cuda":
        torch._dynamo.config.recompile_limit = 256             # each mask is another closure
        rate = results["R"] = cublas_rate()
        print(f"{results['device']}, torch {torch.__version__}; R = {rate:.0f} TFLOP/s")
        for width in ops.WIDTHS:
            results[f"errors_{width}"] = found = errors(width)
            print(f"width {width}: errors over those of bf16 SDPA", {x: round(y, 2) for x, y in found.items()})
        results["plan_ms"] = plan_time(32768)
        print(f"plan of 32768 positions: {results['plan_ms']['plan']:.2f} ms")
        cases = [(n, length, 16, width) for length in (8192, 16384, 32768) for width in (128, 64) for n in BATCHES]
    else:
        torch.set_num_threads(1)
        cases = [(n, length, 4, 32) for length in (1024, 2048, 4096) for n in BATCHES]
    print(f"{'mask':18s} {'positions':>9s} {'width':>5s}   forward ms, backward ms of each; ours TFLOP/s" +
          (", of R" if device == "cuda" else ""))
    for case in cases:
        if time.monotonic() - began > args.budget:
            print(f"{case[0]:18s} {case[1]:9d} {case[3]:5d}   not measured: no time left")
            continue
        row = compare(*case, device)
        results["rows"].append(row)
        times = "; ".join(f"{b} {row['forward_ms'][b]:.3f}, {row['backward_ms'][b]:.3f}" for b in row["forward_ms"])
        rates = f"{row['forward_tflops']:.2f}, {row['backward_tflops']:.2f}"
        if device == "cuda":
            rates += f"; {row['forward_tflops'] / rate:.2f}, {row['backward_tflops'] / rate:.2f} R"
        print(f"{row['mask']:18s} {row['positions']:9d} {row['width']:5d}   {times}; {rates}", flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
