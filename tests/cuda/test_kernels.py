"""pytest tests/cuda/test_kernels.py: tiles, their algorithm in PyTorch, and emulated kernels."""
import argparse
import contextlib
import ctypes
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.utils.checkpoint

import cuda_attention
import masks
from cuda_attention import blockwise, ops
from cuda_attention import tiles as T
from experiments import attention as experiment
from masks import T2I, T2T, Sample, pack
from test_masks import generator, random_samples

HERE = Path(__file__).resolve().parent
SOURCES = {"plain": ops.FOLDER / "plain.cu", "hopper": ops.FOLDER / "hopper.cu",
           "descriptors": HERE / "descriptors.cu"}
TEXT = -1        # a text longer than the ring of stages
FULL = -2        # tiles that are wholly visible, and rows and columns without any visible pair


def layouts(seed, most=90):
    """Queries and keys: the same positions, or, as with a cache, queries at half of the keys."""
    if seed == TEXT:
        return [pack([Sample(T2T, clean=690, noisy=40)], 16)] * 2
    if seed == FULL:
        both = pack([Sample(T2I, clean=256, image=(16, 17), noisy=160), Sample(T2T, clean=200)], 16)
        return both.select(both.segment != masks.N), both.select(both.sample == 0)
    g = generator(seed)
    k = pack(random_samples(g, 1 + seed % 9, most, side=8), [1, 4, 16, 5][seed % 4])
    if len(k) < 2 or seed % 3:
        return k, k
    index = torch.randperm(len(k), generator=g)[:len(k) // 2].sort().values
    return k.select(index), k

# ---- Tiles -------------------------------------------------------------------------------------

LOOKS_AHEAD = torch.zeros(1, 5, 5, dtype=torch.uint8)      # a made-up task
LOOKS_AHEAD[0, :4, :4] = torch.tensor([[7, 4, 0, 2], [1, 6, 7, 5], [2, 3, 4, 1], [5, 0, 2, 7]])
MADE_UP = torch.cat([masks.RULES, LOOKS_AHEAD])


@pytest.mark.parametrize("seed", range(FULL, 24))
def test_tiles_are_the_mask(seed):
    """Kinds, schedule, transpose and bits against the whole mask, tile by tile."""
    (q, k), rules = layouts(seed), masks.RULES
    if seed >= 0 and seed % 4 == 0:
        q.task, k.task, rules = q.task * 0 + 5, k.task * 0 + 5, MADE_UP
    plan, want = T.make_tiles(q, k, rules), masks.dense(q, k, rules)
    assert plan.visible_pairs == int(want.sum())
    for visits, bits, x in ((plan.row_tiles, plan.bits, want),
                            (plan.column_tiles, plan.bits_t, want.T)):
        assert sorted(visits.schedule.tolist()) == list(range(-(-len(x) // T.TILE)))
        sizes = torch.diff(visits.start.long())[visits.schedule.long()]
        assert (sizes[1:] <= sizes[:-1]).all()
        assert visits.start[-1] == len(visits.tile_index) == len(visits.bits)
        got, full = torch.zeros_like(x), 0
        for i, j, mask in blockwise.steps(visits, bits, *x.shape):
            is_full = int(x[i, j].sum()) == T.TILE ** 2
            assert is_full == (mask is None) and x[i, j].any()
            got[i, j] = True if is_full else mask
            full += is_full
        assert torch.equal(got, x)                             # and no bits beyond the edges:
        assert T.unpack_bits(bits).sum() + full * T.TILE ** 2 == plan.visible_pairs
        if seed == FULL:                                       # this case has tiles of every kind
            assert full > 3 and len(bits) and (sizes == 0).any() and not x.any(1).all()

# ---- The algorithm in PyTorch ------------------------------------------------------------------

def whole_softmax(q, k, v, mask):
    """o and lse with the whole mask in fp64; a query without keys gives 0 and +inf."""
    s = torch.einsum("ihd,jhd->hij", q, k) * q.shape[-1] ** -0.5
    s = s.masked_fill(~mask, -math.inf)
    p, lse = s.softmax(-1).masked_fill(~mask, 0.0), s.logsumexp(-1) / math.log(2)
    return torch.einsum("hij,jhd->ihd", p, v), lse.masked_fill(~mask.any(-1), math.inf)


def case(seed, heads, d, dtype=torch.float64, most=90):
    """q, k, v, the gradient of o, tiles, and the truth in fp64: o, lse, dq, dk, dv."""
    q_layout, k_layout = layouts(seed, most)
    g = generator(100 + seed)
    q, do = (torch.randn(len(q_layout), heads, d, generator=g).to(dtype) for _ in range(2))
    k, v = (torch.randn(len(k_layout), heads, d, generator=g).to(dtype) for _ in range(2))
    mask, plan = masks.dense(q_layout, k_layout), T.make_tiles(q_layout, k_layout)
    exact = [x.double().clone().requires_grad_() for x in (q, k, v)]
    o, lse = whole_softmax(*exact, mask)
    truth = o.detach(), lse.detach(), *torch.autograd.grad(o, exact, do.double())
    return q, k, v, do, plan, truth


@pytest.mark.parametrize("seed", (FULL, 1, 3, 4, 6, 9, 14))
def test_blockwise_against_the_whole_mask(seed):
    q, k, v, do, plan, (o, lse, *grads) = case(seed, 2, 16)
    got, got_lse = blockwise.forward(q, k, v, plan)
    torch.testing.assert_close(got, o)
    torch.testing.assert_close(got_lse, lse)
    for x, want in zip(blockwise.backward(q, k, v, got, got_lse, do, plan), grads):
        torch.testing.assert_close(x, want)

# ---- The CUDA sources, each thread a fiber on the CPU (emulate.h) ------------------------------

def emulation(name, folder):
    """A CUDA source as a library for this CPU."""
    if not shutil.which("g++"):
        pytest.skip("no g++")
    path = folder / f"{name}.so"
    subprocess.run(["g++", "-O2", "-std=c++17", "-DEMULATED", "-I", str(HERE), "-x", "c++",
                    "-shared", "-fPIC", str(SOURCES[name]), "-o", str(path)], check=True)
    return ctypes.CDLL(str(path))


@pytest.fixture(scope="module", params=["plain", "hopper"])
def emulated(request, tmp_path_factory):
    return emulation(request.param, tmp_path_factory.mktemp("emulated"))


@pytest.fixture
def launches(emulated, monkeypatch):
    """The path of a GPU, with emulated kernels in its place and new tensors full of NaN."""
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: argparse.Namespace(cuda_stream=0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(ops, "library", lambda capability: emulated)
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield Path(emulated._name).stem
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("seed, heads, d", [
    (1, 2, 64), (3, 1, 128), (4, 1, 64), (9, 2, 64), (TEXT, 1, 64), (TEXT, 1, 128), (FULL, 1, 64),
    (FULL, 1, 128)])
def test_kernels_on_emulated_threads(launches, seed, heads, d):
    """Forward and backward in bf16, to the rounding of bf16 outputs.

    The cases have rows without keys, and rows that visit more tiles than the ring has stages.
    """
    if launches == "plain" and (seed == TEXT or (seed, d) == (FULL, 128)):
        pytest.skip("plain.cu has no ring, and is slow here")
    q, k, v, do, plan, (o, lse, *grads) = case(seed, heads, d, torch.bfloat16, most=60)
    tiles = ops.flat(plan)
    got, got_lse = ops.launch_forward(q, k, v, tiles)
    torch.testing.assert_close(got.double(), o, atol=2e-2, rtol=1e-2)
    torch.testing.assert_close(got_lse.double(), lse, atol=1e-4, rtol=1e-4)
    for x, want in zip(ops.launch_backward(q, k, v, got, got_lse, do, tiles), grads):
        torch.testing.assert_close(x.double(), want, atol=4e-2, rtol=2e-2)


def test_errors_of_a_launch_are_raised(launches, monkeypatch):
    monkeypatch.setattr(ops, "WIDTHS", (32,))              # the kernels have no such width
    q, k, v, do, plan, (o, lse, *_) = case(3, 1, 32, torch.bfloat16)
    with pytest.raises(RuntimeError, match="attention_forward: CUDA error -1"):
        ops.launch_forward(q, k, v, ops.flat(plan))
    with pytest.raises(RuntimeError, match="attention_backward: CUDA error -1"):
        ops.launch_backward(q, k, v, o, lse.float(), do, ops.flat(plan))


def test_products_are_exact(tmp_path):
    """K-major, register and MN-major operands, from boxes at any row, some past the end."""
    descriptors = emulation("descriptors", tmp_path)
    for width in ops.WIDTHS:
        for rows in (64, 128):
            got = experiment.exact_products(descriptors, width, rows, "cpu")
            assert got == {"K-major": True, "MN-major": True}, (width, rows)
    with pytest.raises(RuntimeError, match="CUDA error -1"):
        experiment.exact_products(descriptors, 32, 64, "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("name, archs", [
    ("plain", ("80", "90")), ("hopper", ("90a",)), ("descriptors", ("90a",))])
def test_kernels_compile_without_spills(name, archs, tmp_path):
    """No spill, no stack frame, no warning, such as C75xx about serialised instructions."""
    if not shutil.which("nvcc"):
        pytest.skip("no nvcc")
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    command = ["nvcc", *ops.FLAGS, "-Xptxas", "-v", *targets, str(SOURCES[name]), "-o",
               str(tmp_path / "out.so")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    used = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads",
                      done.stderr)
    assert set(used) == {("0", "0", "0")}
    assert "C75" not in done.stderr and "warning" not in done.stderr, done.stderr

# ---- The operators -----------------------------------------------------------------------------

def test_operators_satisfy_pytorch():
    """torch.compile, autograd and checkpointing."""
    q, k, v, do, plan, (o, lse, *truth) = case(6, 2, 8)
    tiles = ops.flat(plan)
    grad = [x.clone().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(ops.forward, (*grad, tiles))
    torch.library.opcheck(ops.backward, (q, k, v, o, lse, do, tiles))
    out, lse = torch.utils.checkpoint.checkpoint(ops.forward, *grad, tiles, use_reentrant=False)
    torch.testing.assert_close(out, o)
    assert not lse.requires_grad
    for x, want in zip(torch.autograd.grad(out, grad, do), truth):
        torch.testing.assert_close(x, want)


@pytest.mark.parametrize("backend", ("auto", "padded", "cuda"))
def test_attention_compiles_without_graph_breaks(backend, monkeypatch):
    """Once its plan is built; with the types of autocast too."""
    monkeypatch.setattr(cuda_attention, "default_backend", backend)
    layout = pack(random_samples(generator(2), 4), 4)
    plan = cuda_attention.make_plan(layout)
    plan.build()
    x, w = torch.randn(len(layout), 2, 8, generator=generator(0)), torch.eye(8)
    attend = torch.compile(lambda x: cuda_attention.attention(x @ w, x @ w, x @ w, plan),
                           fullgraph=True, backend="aot_eager")
    for dtype, off in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = x @ w
            want = cuda_attention.attention(y, y, y, plan, "reference")
            got = attend(x)
            assert got.dtype == want.dtype == dtype
            torch.testing.assert_close(got, want, atol=off, rtol=off)


@pytest.mark.parametrize("change, word", [
    (lambda q, k, v: (q.float(), k, v), "q is torch.float32"),
    (lambda q, k, v: (q, k[:, :, :32], v), "k is"),
    (lambda q, k, v: (q, k, v[:, ::2]), "v is"),
    (lambda q, k, v: (q, k.transpose(0, 1).contiguous().transpose(0, 1), v), "k is not contiguous"),
    (lambda q, k, v: (q[:0], k, v), "q is torch.bfloat16 (0,"),
    (lambda q, k, v: [x.new_zeros(1, 70000, 64) for x in (q, k, v)], "q is"),
    (lambda q, k, v: (q, k.new_zeros(641)[1:].view(5, 2, 64), v), "k is not contiguous"),
    (lambda q, k, v: (q, k, v.to("meta")), "on meta"),
    (lambda q, k, v: [x.to("meta") for x in (q, k, v)], "the plan is torch.int32 on cpu"),
    (lambda q, k, v: T.make_tiles(pack([], 1), pack([], 1)), "0 queries"),
])
def test_unsupported_inputs_are_named(change, word):
    q = torch.zeros(5, 2, 64, dtype=torch.bfloat16)
    layout = pack([Sample(T2T, clean=5)], 1)
    with pytest.raises(ValueError, match=re.escape(word)):
        ops.launch_forward(*change(q, q.clone(), q.clone()), ops.flat(T.make_tiles(layout, layout)))


def test_errors_of_the_build_are_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(ops.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="nvcc"):
        ops.library((8, 0))
    with pytest.raises(RuntimeError, match="8.0"):
        ops.library((7, 5))
    fake = tmp_path / "nvcc"
    fake.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\n'
                    'echo "x.cu(3): error: no such thing" >&2\nexit 1\n')
    fake.chmod(0o755)
    monkeypatch.setattr(ops.shutil, "which", lambda name: str(fake))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"nvcc: x.cu\(3\): error: no such thing"):
        ops.library((9, 0))
    assert list((tmp_path / "cola_attention").iterdir()) == []
