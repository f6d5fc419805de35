"""Masked attention: checks the kernels on a GPU, then times all backends on packed batches.

    python -m experiments.attention [--json out.json]      a GPU: at most 8 minutes; a CPU: 1 minute
    compute-sanitizer python -m experiments.attention --check

On a GPU, in this order: exact products of integers (tests/cuda/descriptors.cu); errors against fp64
and whether three runs agree bit for bit; R, the cuBLAS rate of this run; peak memory; times of our
kernels, FlexAttention and SDPA with a dense mask ("full": without a mask, and cuDNN's too); times
of FlexAttention with max-autotune. PyTorch caches compiled kernels, so a second run measures more
rows within its budget. On a CPU: the padded backend against dense SDPA.

A row counts 4 x pairs x heads x width FLOPs forward and 2.5 times that backward: "useful" with the
visible pairs, "tiles" with all pairs of the visited tiles. Times are medians on random data by the
device's clock, the candidates alternating; plans are timed by the host's clock.
"""
from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

import masks
from cuda_attention import attention, make_plan, ops
from cuda_attention.tiles import TILE, make_tiles
from masks import IT2T, T2I, T2T, Layout, Sample, pack

DESCRIPTORS = Path(__file__).resolve().parents[1] / "tests" / "cuda" / "descriptors.cu"
FLEX_MODES = {"flex": "default", "flex tuned": "max-autotune-no-cudagraphs"}
LENGTHS = (8192, 16384, 32768)
BATCHES = {                    # the samples of a batch, repeated while they fit
    "full": [],
    "t2i, 256 latents": [Sample(T2I, clean=n, image=(16, 16), noisy=n) for n in (32, 64, 128)],
    "t2i, 1600 latents": [Sample(T2I, clean=n, image=(40, 40)) for n in (32, 64, 128)],
    "it2t, 256 latents": [Sample(IT2T, prompt=16, image=(16, 16), clean=n, noisy=n, start=16)
                          for n in (32, 64, 128)],
    "t2t, 512 latents": [Sample(T2T, clean=512, noisy=512)],
}
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


# ---- Inputs ------------------------------------------------------------------------------------

def make_batch(name: str, length: int, device: str) -> Layout:
    """About `length` positions of a batch of BATCHES; "full" is one image without a mask."""
    if name == "full":
        return pack([Sample(T2I, image=(length // 64, 64))], 16, device)
    samples, left, kinds = [], length, BATCHES[name]
    while True:
        s = kinds[len(samples) % len(kinds)]
        size = s.prompt + s.image[0] * s.image[1] + s.clean + s.noisy
        if samples and size > left:
            return pack(samples, 16, device)
        samples, left = [*samples, s], left - size


def random_inputs(n: int, heads: int, width: int, device: str, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and the gradient of o, each (n, heads, width)."""
    return [torch.randn(n, heads, width, device=device, dtype=dtype) for _ in range(4)]


def dense_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    rows = (x.transpose(0, 1)[None] for x in (q, k, v))                      # (1, nh, N, hd)
    return F.scaled_dot_product_attention(*rows, attn_mask=mask)[0].transpose(0, 1)


# ---- Checks on a GPU ---------------------------------------------------------------------------

def exact_products(library: ctypes.CDLL, width: int, rows: int, device: str) -> dict[str, bool]:
    """Whether descriptors.cu computes products of integers exactly, for both forms of operand b.

    rows: of b. Raises RuntimeError for an error of CUDA. tests/cuda runs it on emulated threads.
    """
    n, heads, head = 300, 3, 1
    exact = {"K-major": True, "MN-major": True}
    g = torch.Generator().manual_seed(width + rows)
    x = torch.randint(-4, 5, (n, heads, width), generator=g)
    p = torch.randint(-4, 5, (128, rows), generator=g)
    padded = F.pad(x[:, head], (0, 0, 0, 128))
    inputs = [t.to(device, torch.bfloat16) for t in (x, p)]
    stream = torch.cuda.current_stream().cuda_stream if device == "cuda" else 0
    for row_a, row_b in ((0, 128), (37, n - 50), (n - 60, 5)):               # the last two pass n
        a, b = padded[row_a:row_a + 128], padded[row_b:row_b + rows]
        outputs = [torch.full((128, w), float("nan"), device=device) for w in (rows, width)]
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (*inputs, *outputs)]
        code = library.descriptor_products(*pointers, n, heads, width, rows, head, row_a, row_b,
                                           ctypes.c_void_p(stream))
        if code:
            raise RuntimeError(f"descriptor_products: CUDA error {code}")
        s, o = (x.cpu() for x in outputs)
        exact["K-major"] &= torch.equal(s, (a @ b.T).float())
        exact["MN-major"] &= torch.equal(o, (p @ b).float())
    return exact


def descriptors() -> dict[str, bool]:
    """exact_products of every size on this GPU, which must be Hopper."""
    library = ops.library((9, 0), DESCRIPTORS)
    return {f"{width} x {rows} {form}": exact for width in ops.WIDTHS for rows in (64, 128)
            for form, exact in exact_products(library, width, rows, "cuda").items()}


def fill_free_memory(like: list[Tensor]) -> bool:
    """Fills freed memory with NaN; returns whether new tensors of these shapes then hold NaN."""
    torch.cuda.empty_cache()
    filled = [torch.full_like(x, float("nan")) for x in like for _ in range(4)]
    del filled
    return all(bool(x.isnan().all()) for x in [torch.empty_like(x) for x in like])


def errors(width: int) -> dict[str, float]:
    """Largest errors of our o, dq, dk, dv against fp64, as a ratio to those of SDPA in bf16.

    "bitwise": 1 if three runs agree bit for bit. "poisoned": 1 if the last two ran in memory full
    of NaN, so that a read of unwritten memory would show.
    """
    layout = make_batch("it2t, 256 latents", 1500, "cuda")
    q, k, v, do = random_inputs(len(layout), 4, width, "cuda", torch.bfloat16)
    plan, mask = make_plan(layout), masks.dense(layout, layout)

    def run(function: Attention, inputs: list[Tensor], gradient: Tensor) -> list[Tensor]:
        inputs = [x.clone().requires_grad_() for x in inputs]
        o = function(*inputs)
        return [o.detach(), *torch.autograd.grad(o, inputs, gradient)]       # o, dq, dk, dv

    def largest_errors(result: list[Tensor]) -> list[float]:
        return [(a.double() - b).abs().max().item() for a, b in zip(result, truth)]

    def ours(*x: Tensor) -> Tensor:
        return attention(*x, plan, "cuda")

    truth = run(lambda *x: attention(*x, plan, "reference"), [x.double() for x in (q, k, v)],
                do.double())
    sdpa = run(lambda *x: dense_sdpa(*x, mask), [q, k, v], do)
    runs, poisoned = [run(ours, [q, k, v], do)], True
    for _ in range(2):
        poisoned &= fill_free_memory([q, q, k, v, q[..., 0].float()])        # o, dq, dk, dv, lse
        runs.append(run(ours, [q, k, v], do))
    ratios = [a / b for a, b in zip(largest_errors(runs[0]), largest_errors(sdpa))]
    bitwise = all(torch.equal(a, b) for x in runs[1:] for a, b in zip(x, runs[0]))
    return {**dict(zip(("o", "dq", "dk", "dv"), ratios)), "bitwise": float(bitwise),
            "poisoned": float(poisoned)}


def memory(length: int) -> tuple[int, float]:
    """Positions, and peak MiB of a plan, a forward and a backward pass, without the inputs."""
    layout = make_batch("t2i, 256 latents", length, "cuda")
    q, k, v, do = random_inputs(len(layout), 16, 128, "cuda", torch.bfloat16)
    inputs, before = [x.requires_grad_() for x in (q, k, v)], torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.autograd.grad(attention(*inputs, make_plan(layout), "cuda"), inputs, do)
    return len(layout), (torch.cuda.max_memory_allocated() - before) / 2 ** 20


# ---- Times -------------------------------------------------------------------------------------

def device_milliseconds(call: Callable[[], object]) -> float:
    """One call by the clock of the GPU."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(4_000_000)               # 2 ms, so that the host is ahead of the device
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def host_milliseconds(call: Callable[[], object]) -> float:
    """One call by the clock of the host, to the end of its work on a GPU."""
    began = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - began)


def medians(calls: dict[str, Callable[[], object]], on_device: bool,
            rounds: int = 9) -> dict[str, float]:
    """Median milliseconds of each call after two rounds of warm-up; three rounds above 50 ms."""
    clock = device_milliseconds if on_device else host_milliseconds
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 2):
        for name, call in calls.items():
            if i > 4 and times[name][-1] > 50:
                continue
            took = clock(call)
            if i > 1:
                times[name].append(took)
    return {name: statistics.median(x) for name, x in times.items()}


def candidates(name: str, layout: Layout, device: str, mode: str) -> dict[str, Attention]:
    """The functions to time, ours first. mode "flex tuned": ours and that one only."""
    plan, ours = make_plan(layout), "cuda" if device == "cuda" else "padded"
    functions: dict[str, Attention] = {ours: lambda *x: attention(*x, plan, ours)}
    if device == "cuda":
        compiled = torch.compile(flex_attention, mode=FLEX_MODES[mode], dynamic=False)

        def flex(*inputs: Tensor) -> Tensor:
            rows = (x.transpose(0, 1)[None] for x in inputs)                 # (1, nh, N, hd)
            return compiled(*rows, block_mask=plan.block_mask)[0].transpose(0, 1)
        functions[mode] = flex
    if mode == "flex":
        mask = None if name == "full" else masks.dense(layout, layout)
        functions["sdpa"] = lambda *x: dense_sdpa(*x, mask)
        if device == "cuda" and name == "full":
            functions["cudnn"] = sdpa_kernel(SDPBackend.CUDNN_ATTENTION)(functions["sdpa"])
    return functions


def measure(name: str, length: int, heads: int, width: int, device: str,
            mode: str = "flex") -> dict:
    """One row: times of all candidates, our rates, times of the plans, and what failed."""
    torch.compiler.reset()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    layout = make_batch(name, length, device)
    q, k, v, do = random_inputs(len(layout), heads, width, device, dtype)
    forward_calls, backward_calls, failed = {}, {}, {}
    functions = candidates(name, layout, device, mode)
    ours = next(iter(functions))
    for label, f in functions.items():
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        try:
            f(q, k, v)
            o = f(*inputs)
            torch.autograd.grad(o, inputs, do, retain_graph=True)
        except RuntimeError as error:          # another library has no memory or no such kernel
            if label == ours:
                raise
            failed[label] = str(error).strip().split("\n")[0]
            continue
        forward_calls[label] = lambda f=f: f(q, k, v)
        backward_calls[label] = lambda o=o, inputs=inputs: torch.autograd.grad(
            o, inputs, do, retain_graph=True)
    forward, backward = (medians(x, device == "cuda") for x in (forward_calls, backward_calls))
    plans = {"tiles": lambda: make_tiles(layout, layout)}
    if "flex" in forward:
        plans["block_mask"] = lambda: make_plan(layout).block_mask
    tiles = make_tiles(layout, layout)
    pairs = {"useful": tiles.visible_pairs, "tiles": len(tiles.row_tiles.bits) * TILE ** 2}
    tflops = {x: [4 * count * heads * width / 1e9 / forward[ours],           # GFLOP a ms
                  10 * count * heads * width / 1e9 / backward[ours]] for x, count in pairs.items()}
    return {"mask": name, "positions": len(layout), "width": width, "heads": heads, "pairs": pairs,
            "forward_ms": forward, "backward_ms": backward, "tflops": tflops,
            "plan_ms": medians(plans, False, 3), "failed": failed}


# ---- The command -------------------------------------------------------------------------------

def table_row(row: dict, rate: float) -> str:
    """A line of the table. rate: R in TFLOP/s, 0 on a CPU."""
    def pair(values, digits: int = 2) -> str:
        return ", ".join(f"{x:.{digits}f}" for x in values)

    times = {label: (t, row["backward_ms"][label]) for label, t in row["forward_ms"].items()}
    ours, *others = times
    parts = [f"{ours} {pair(times[ours], 3)}"]
    for label in others:
        ratio = pair(x / y for x, y in zip(times[label], times[ours]))
        parts.append(f"{label} {pair(times[label], 3)} = {ratio} x ours")
    parts += [f"{name} {pair(x)}" for name, x in row["tflops"].items()]
    if rate:
        parts.append("of R " + pair(x / rate for x in row["tflops"]["useful"]))
    parts.append("plan: " + ", ".join(f"{name} {t:.1f}" for name, t in row["plan_ms"].items()))
    parts += [f"{label} not measured: {why}" for label, why in row["failed"].items()]
    start = f"{row['mask']:18s} {row['positions']:9d} {row['width']:5d}   "
    return start + "; ".join(parts)


def check_gpu(results: dict) -> None:
    """Prints and stores the checks."""
    if torch.cuda.get_device_capability() == (9, 0):
        results["descriptors"] = descriptors()
        wrong = [x for x, exact in results["descriptors"].items() if not exact]
        print("descriptors:", ", ".join(wrong) or "all exact", flush=True)
    for width in ops.WIDTHS:
        results[f"errors_{width}"] = found = errors(width)
        print(f"width {width}: errors / errors of bf16 SDPA (expect 1; bitwise 1, poisoned 1)",
              {x: round(y, 2) for x, y in found.items()}, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--json", default="", help="file for all the numbers")
    parser.add_argument("--check", action="store_true", help="only the checks, on a GPU")
    parser.add_argument("--budget", type=float, default=410, help="seconds; no row starts later")
    args = parser.parse_args()
    began, rate = time.monotonic(), 0.0
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    results: dict = {"device": device, "rows": []}
    cases = [(name, length, 4, 32, device) for length in (1024, 2048, 4096) for name in BATCHES]
    if device == "cuda":
        results["device"] = torch.cuda.get_device_name()
        print(f"{results['device']}, torch {torch.__version__}")
        check_gpu(results)
        if args.check:
            return
        a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
        rate = results["R"] = 2 * 8192 ** 3 / 1e9 / medians({"mm": lambda: a @ b}, True, 21)["mm"]
        results["memory"] = [memory(length) for length in LENGTHS]
        print(f"R = {rate:.0f} TFLOP/s; peak memory of ours, 16 heads of 128: " + ", ".join(
            f"{n} positions {mib:.0f} MiB" for n, mib in results["memory"]))
        cases = [(name, length, 16, width, device)
                 for width in (128, 64) for length in LENGTHS for name in BATCHES]
        cases += [(*case, "flex tuned") for case in cases]
    else:
        torch.set_num_threads(1)
    print("mask, positions, head width; ms forward and backward; TFLOP/s of ours; ms of the plan")
    for case in cases:
        if time.monotonic() - began > args.budget:
            print(*case, "not measured: no time left")
            continue
        results["rows"].append(measure(*case))
        print(table_row(results["rows"][-1], rate), flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
