"""Masked attention against its peers: builds, checks and times, prints tables and writes JSON.

    python cuda_attention/bench.py [--json out.json]         a GPU: 8 minutes at most; a CPU: one
    compute-sanitizer python cuda_attention/bench.py --check

On a GPU: products of integers (descriptors.cu); errors against fp64 and three runs bit for bit; the cuBLAS rate R of this
run; memory; times of our kernels, FlexAttention and SDPA with a dense mask (where all is visible without one, and
cuDNN's) on packed batches of the three tasks; and FlexAttention with max-autotune while there is time: PyTorch keeps what
it compiled, so a second run gets further. On a CPU: the padded path against dense SDPA.

FLOPs are 4 area heads width forward and 2.5 times that backward; area counts visible pairs (useful) or all pairs of the
tiles visited (tiles). Times are medians over random data, by the device's clock, the candidates taking turns both ways;
tiles and BlockMask, which Plan builds without compiling, are timed apart, by the host's.
"""
from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import masks
from cuda_attention import attention, make_plan, ops
from cuda_attention.tiles import TILE, make_tiles
from masks import IT2T, T2I, T2T, Layout, Sample, pack

FLEX = {"flex": "default", "flex tuned": "max-autotune-no-cudagraphs"}           # how it is compiled
LENGTHS = (8192, 16384, 32768)
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


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    rows = (x.transpose(0, 1)[None] for x in (q, k, v))                              # (1, nh, N, hd)
    return F.scaled_dot_product_attention(*rows, attn_mask=mask)[0].transpose(0, 1)


def milliseconds(calls: dict[str, Callable[[], object]], clock: str, rounds: int = 9) -> dict[str, float]:
    """Medians of the calls, taken in turn after two rounds of warm-up; of three rounds for those above 50 ms. By the
    device's clock (cuda), or the host's (cpu)."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(rounds + 2):
        for name, call in calls.items():
            if round_ > 4 and times[name][-1] > 50:
                continue
            if clock == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda._sleep(4_000_000)                   # two milliseconds, for the host to be ahead
                start.record()
                call()
                end.record()
                end.synchronize()
                took = start.elapsed_time(end)
            else:
                began = time.perf_counter()
                call()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                took = 1e3 * (time.perf_counter() - began)
            if round_ > 1:
                times[name].append(took)
    return {name: statistics.median(x) for name, x in times.items()}


def exact_products(library: ctypes.CDLL, width: int, rows: int, device: str) -> dict[str, bool]:
    """Whether descriptors.cu finds the very products of integers, by the form of the second operand; b has `rows` rows."""
    n, heads, head, exact = 300, 3, 1, {"K-major": True, "MN-major": True}
    g = torch.Generator().manual_seed(width + rows)
    x, p = (torch.randint(-4, 5, shape, generator=g) for shape in ((n, heads, width), (128, rows)))
    padded, given = F.pad(x[:, head], (0, 0, 0, 128)), [t.to(device, torch.bfloat16) for t in (x, p)]
    stream = torch.cuda.current_stream().cuda_stream if device == "cuda" else 0
    for row_a, row_b in ((0, 128), (37, n - 50), (n - 60, 5)):                       # the last two run over the end
        a, b = padded[row_a:row_a + 128], padded[row_b:row_b + rows]
        s, o = (torch.full((128, size), float("nan"), device=device) for size in (rows, width))
        code = library.descriptor_products(*(ctypes.c_void_p(t.data_ptr()) for t in (*given, s, o)), n, heads, width, rows,
                                           head, row_a, row_b, ctypes.c_void_p(stream))
        if code:
            raise RuntimeError(f"descriptor_products: CUDA error {code}")
        exact["K-major"] &= torch.equal(s.cpu(), (a @ b.T).float())
        exact["MN-major"] &= torch.equal(o.cpu(), (p @ b).float())
    return exact


def descriptors() -> dict[str, bool]:
    """exact_products for every size, on this GPU, which must be Hopper."""
    library = ops.library((9, 0), "descriptors")
    return {f"{width} x {rows} {form}": exact for width in ops.WIDTHS for rows in (64, 128)
            for form, exact in exact_products(library, width, rows, "cuda").items()}


def errors(width: int) -> dict[str, float]:
    """Largest errors of o, dq, dk, dv against fp64, divided by those of SDPA in bf16; and whether three runs agree
    bit for bit, the last two in memory full of NaN (`poisoned`: it was)."""
    layout = batch("it2t, 256 latents", 1500, "cuda")
    q, k, v, do = tensors(len(layout), 4, width, "cuda", torch.bfloat16)
    plan, mask, runs, poisoned = make_plan(layout), masks.dense(layout, layout), [], True
    candidates = {"ours": lambda *x: attention(*x, plan, "cuda"), "sdpa": lambda *x: dense(*x, mask)}
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    o = attention(*exact, plan, "reference")
    truth = [o.detach(), *torch.autograd.grad(o, exact, do.double())]
    worst: dict[str, list[float]] = {}
    for name in ("ours", "sdpa", "ours", "ours"):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        if runs:
            torch.cuda.empty_cache()
            like = (q, q, k, v, q[..., 0].float())                                 # o, dq, dk, dv, lse
            filled = [torch.full_like(x, float("nan")) for x in like for _ in range(4)]
            del filled
            poisoned &= all(bool(x.isnan().all()) for x in [torch.empty_like(x) for x in like])
        o = candidates[name](*inputs)
        got = [o.detach(), *torch.autograd.grad(o, inputs, do)]
        worst[name] = [(a.double() - b).abs().max().item() for a, b in zip(got, truth)]
        runs += [got] if name == "ours" else []
    ratios = [a / b for a, b in zip(worst["ours"], worst["sdpa"])]
    same = all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0]))
    return dict(zip(("o", "dq", "dk", "dv"), ratios)) | {"bitwise": float(same), "poisoned": float(poisoned)}


def memory(length: int) -> tuple[int, float]:
    """Positions, and MiB beyond the inputs at the peak of a plan, a forward and a backward pass of ours."""
    layout = batch("t2i, 256 latents", length, "cuda")
    q, k, v, do = tensors(len(layout), 16, 128, "cuda", torch.bfloat16)
    inputs, before = [x.requires_grad_() for x in (q, k, v)], torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.autograd.grad(attention(*inputs, make_plan(layout), "cuda"), inputs, do)
    return len(layout), (torch.cuda.max_memory_allocated() - before) / 2 ** 20


def compare(name: str, length: int, heads: int, width: int, device: str, mode: str = "flex") -> dict:
    """Times of all candidates and rates of ours; as "flex tuned", of ours and that one alone."""
    torch.compiler.reset()
    layout = batch(name, length, device)
    q, k, v, do = tensors(len(layout), heads, width, device, torch.bfloat16 if device == "cuda" else torch.float32)
    plan, tiles, ours = make_plan(layout), make_tiles(layout, layout), "cuda" if device == "cuda" else "padded"
    run: dict[str, Callable[..., Tensor]] = {ours: lambda *x: attention(*x, plan, ours)}
    if device == "cuda":
        flex = torch.compile(flex_attention, mode=FLEX[mode], dynamic=False)
        run[mode] = lambda *x: flex(*(y.transpose(0, 1)[None] for y in x),
                                    block_mask=plan.block_mask)[0].transpose(0, 1)
    if mode == "flex":
        mask = None if name == "full" else masks.dense(layout, layout)
        run["sdpa"] = lambda *x: dense(*x, mask)
        if device == "cuda" and name == "full":
            run["cudnn"] = sdpa_kernel(SDPBackend.CUDNN_ATTENTION)(run["sdpa"])
    calls, failed = {}, {}
    for b, f in run.items():
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        try:
            f(q, k, v)
            o = f(*inputs)
            torch.autograd.grad(o, inputs, do, retain_graph=True)
        except RuntimeError as error:                          # no memory, or no such kernel: a peer may
            if b == ours:
                raise
            failed[b] = str(error).strip().split("\n")[0]
            continue
        calls[b] = lambda f=f: f(q, k, v), lambda o=o, inputs=inputs: torch.autograd.grad(o, inputs, do, retain_graph=True)
    forward, backward = (milliseconds({b: c[i] for b, c in calls.items()}, device) for i in (0, 1))
    plans = {"tiles": lambda: make_tiles(layout, layout)}
    if "flex" in calls:
        plans["block_mask"] = lambda: make_plan(layout).block_mask
    areas = {"useful": tiles.area, "tiles": len(tiles.by_query.other) * TILE ** 2}
    rates = {x: [c * area * heads * width / 1e9 / t[ours] for c, t in ((4, forward), (10, backward))]
             for x, area in areas.items()}                     # GFLOP by ms: TFLOP/s
    return {"mask": name, "positions": len(layout), "width": width, "heads": heads, "areas": areas,
            "forward_ms": forward, "backward_ms": backward, "tflops": rates, "plan_ms": milliseconds(plans, "cpu", 3),
            "failed": failed}


def line(row: dict, rate: float) -> str:
    """A row of the table. rate: R, 0 on a CPU."""
    times = {b: (t, row["backward_ms"][b]) for b, t in row["forward_ms"].items()}
    ours, *peers = times
    pair = lambda x, digits=2: ", ".join(f"{y:.{digits}f}" for y in x)
    parts = [f"{ours} {pair(times[ours], 3)}"]
    parts += [f"{b} {pair(times[b], 3)} = {pair(x / y for x, y in zip(times[b], times[ours]))} x ours" for b in peers]
    parts += [f"{x} {pair(y)}" for x, y in row["tflops"].items()]
    parts += [f"of R {pair(x / rate for x in row['tflops']['useful'])}"] if rate else []
    parts += [f"plan: {', '.join(f'{x} {t:.1f}' for x, t in row['plan_ms'].items())}"]
    parts += [f"{b} not measured: {why}" for b, why in row["failed"].items()]
    return f"{row['mask']:18s} {row['positions']:9d} {row['width']:5d}   " + "; ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", default="", help="file for all the numbers")
    parser.add_argument("--check", action="store_true", help="nothing but the checks, on a GPU")
    parser.add_argument("--budget", type=float, default=410, help="seconds after which no further row is begun")
    args = parser.parse_args()
    device, began, rate = "cuda" if torch.cuda.is_available() else "cpu", time.monotonic(), 0.0
    torch.manual_seed(0)
    results: dict = {"device": torch.cuda.get_device_name() if device == "cuda" else "cpu", "rows": []}
    cases = [(name, length, 4, 32, device) for length in (1024, 2048, 4096) for name in BATCHES]
    if device == "cuda":
        print(f"{results['device']}, torch {torch.__version__}")
        if torch.cuda.get_device_capability() == (9, 0):
            results["descriptors"] = found = descriptors()
            print("descriptors:", ", ".join(x for x, exact in found.items() if not exact) or "all exact", flush=True)
        for width in ops.WIDTHS:
            results[f"errors_{width}"] = found = errors(width)
            print(f"width {width}: errors over those of bf16 SDPA", {x: round(y, 2) for x, y in found.items()}, flush=True)
        if args.check:
            return
        a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
        rate = results["R"] = 2 * 8192 ** 3 / 1e9 / milliseconds({"mm": lambda: a @ b}, "cuda", 21)["mm"]
        results["memory"] = [memory(length) for length in LENGTHS]
        print(f"R = {rate:.0f} TFLOP/s; peak memory of ours, 16 heads of 128:",
              ", ".join(f"{n} positions {mib:.0f} MiB, {1024 * mib / n:.1f} KiB each" for n, mib in results["memory"]))
        cases = [(name, length, 16, width, device) for width in (128, 64) for length in LENGTHS for name in BATCHES]
        cases += [(*case, "flex tuned") for case in cases]
    else:
        torch.set_num_threads(1)
    print(f"{'mask':18s} {'positions':>9s} {'width':>5s}   ms of each, forward and backward; TFLOP/s of ours; ms to plan")
    for case in cases:
        if time.monotonic() - began > args.budget:
            print(f"{case[0]:18s} {case[1]:9d} {case[3]:5d}   not measured: no time left", *case[5:])
            continue
        results["rows"].append(compare(*case))
        print(line(results["rows"][-1], rate), flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
