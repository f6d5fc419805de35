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
from masks import IT2T, T2I, T2T, Sample, pack

HERE = Path(__file__).resolve().parent
SOURCES = {"plain": ops.FOLDER / "plain.cu", "hopper": ops.FOLDER / "hopper.cu",
           "descriptors": HERE / "descriptors.cu"}
TEXT = -1        # a text longer than the ring of stages
FULL = -2        # tiles that are wholly visible, and rows and columns without any visible pair


def random_samples(g, count, most=90):
    """Samples of every task and length, some segments empty."""
    draw = lambda high: int(torch.randint(0, high, (), generator=g))
    out = []
    for _ in range(count):
        task, clean, image = draw(3), draw(most), (draw(8), draw(9))
        noisy, prompt = draw(2) * clean, draw(20) if task == IT2T else 0
        image = (0, 0) if task == T2T else image
        skip = draw(2) * (noisy // 2)
        out.append(Sample(task, prompt, image, clean, noisy, prompt, skip=skip))
    return out


def layouts(seed, most=90):
    """Queries and keys: the same positions, or, as with a cache, queries at half of the keys."""
    if seed == TEXT:
        return [pack([Sample(T2T, clean=690, noisy=40)], 16)] * 2
    if seed == FULL:
        both = pack([Sample(T2I, clean=256, image=(16, 17), noisy=160), Sample(T2T, clean=200)], 16)
        return both.select(both.segment != masks.N), both.select(both.sample == 0)
    g = torch.Generator().manual_seed(seed)
    k = pack(random_samples(g, 1 + seed % 9, most), [1, 4, 16, 5][seed % 4])
    if len(k) < 2 or seed % 3:
        return k, k
    index = torch.randperm(len(k), generator=g)[:len(k) // 2].sort().values
    return k.select(index), k

# ---- Tiles -------------------------------------------------------------------------------------

MADE_UP = torch.zeros(4, 4, 4, dtype=torch.uint8)      # the three tasks, and one that looks ahead
MADE_UP[:3] = masks.RULES
MADE_UP[3] = torch.tensor([[7, 4, 0, 2], [1, 6, 7, 5], [2, 3, 4, 1], [5, 0, 2, 7]])


@pytest.mark.parametrize("seed", range(FULL, 24))
def test_tiles_are_the_mask(seed):
    """Kinds, schedule, transpose and bits against the whole mask, pair by pair."""
    (q, k), rules = layouts(seed), masks.RULES
    if not len(q) or not len(k):
        pytest.skip("nothing packed")
    if seed >= 0 and seed % 4 == 0:
        q.task, k.task, rules = q.task * 0 + 3, k.task * 0 + 3, MADE_UP
    plan, want = T.make_tiles(q, k, rules), masks.dense(q, k, rules)
    assert plan.visible_pairs == int(want.sum())
    n, m = (-(-len(x) // T.TILE) * T.TILE for x in (q, k))
    padded = torch.zeros(n, m, dtype=torch.bool)
    padded[:len(q), :len(k)] = want
    square = padded.view(n // T.TILE, T.TILE, m // T.TILE, T.TILE).transpose(1, 2)   # (Tq, Tk, ..)
    for visits, bits, x in ((plan.row_tiles, plan.bits, square),
                            (plan.column_tiles, plan.bits_t, square.permute(1, 0, 3, 2))):
        assert sorted(visits.schedule.tolist()) == list(range(x.shape[0]))
        sizes = torch.diff(visits.start.long())[visits.schedule.long()]
        assert (sizes[1:] <= sizes[:-1]).all()
        assert visits.start[-1] == len(visits.tile_index) == len(visits.bits)
        got = torch.zeros_like(x)
        for tile in range(x.shape[0]):
            for i in range(int(visits.start[tile]), int(visits.start[tile + 1])):
                number, other = int(visits.bits[i]), int(visits.tile_index[i])
                full = bool(x[tile, other].all())
                assert (number < 0) == full and x[tile, other].any()
                got[tile, other] = True if full else T.unpack_bits(bits[number][None])[0]
        assert torch.equal(got, x)
        if seed == FULL:                                       # this case has tiles of every kind
            assert (visits.bits < 0).sum() > 3 and (visits.bits >= 0).any()
            assert not x.flatten(1).any(1).all()
    assert seed != FULL or not want.any(1).all() and not want.any(0).all()


def test_bits_lie_as_in_the_accumulator():
    """Every pair at the thread, word and bit of the fragment of m64nNk16 (PTX ISA, 9.7.15)."""
    g = torch.Generator().manual_seed(0)
    for row, column in torch.randint(0, 128, (300, 2), generator=g).tolist():
        tile = torch.zeros(1, 128, 128, dtype=torch.bool)
        tile[0, row, column] = True
        group, warp, lane = row // 64, row % 64 // 16, (row % 8) * 4 + (column % 8) // 2
        element = column // 8 * 4 + (row % 16 >= 8) * 2 + column % 2     # of the thread's 64
        bits = T.pack_bits(tile)
        word = bits[0, 128 * group + 32 * warp + lane, element // 32].item() & 0xffffffff
        assert word == 1 << element % 32 and (bits != 0).sum() == 1
        assert torch.equal(T.unpack_bits(bits), tile)


def test_an_empty_layout_is_an_error():
    empty = pack([Sample(T2T)], 4)
    with pytest.raises(ValueError, match="0 queries"):
        T.make_tiles(empty, empty)

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
    g = torch.Generator().manual_seed(100 + seed)
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


@pytest.fixture(scope="module")
def descriptors(tmp_path_factory):
    return emulation("descriptors", tmp_path_factory.mktemp("emulated"))


def pointers(*tensors):
    return [ctypes.c_void_p(x.data_ptr()) for x in tensors]


@pytest.mark.parametrize("seed, heads, d", [
    (1, 2, 64), (3, 1, 128), (4, 1, 64), (9, 2, 64), (TEXT, 1, 64), (TEXT, 1, 128), (FULL, 1, 64),
    (FULL, 1, 128)])
def test_kernels_on_emulated_threads(emulated, seed, heads, d):
    """Forward and backward in bf16, to the rounding of bf16 outputs.

    The cases have rows without keys, and rows that visit more tiles than the ring has stages.
    """
    if emulated._name.endswith("plain.so") and (seed == TEXT or (seed, d) == (FULL, 128)):
        pytest.skip("plain.cu has no ring, and is slow here")
    q, k, v, do, plan, (o, lse, *truth) = case(seed, heads, d, torch.bfloat16, most=60)
    n, m, poison = len(q), len(k), float("nan")
    got, got_lse = torch.full_like(q, poison), torch.full((heads, n), poison)
    sizes, rest = (n, m, heads, d), (ctypes.c_float(d ** -0.5), ctypes.c_void_p())
    tensors = ops.flat(plan)
    row_tiles, column_tiles = ops.VisitsPointer(*tensors[:4]), ops.VisitsPointer(*tensors[4:8])
    forward = [*pointers(q, k, v, got, got_lse), row_tiles, *pointers(plan.bits)]
    assert emulated.attention_forward(*forward, *sizes, *rest) == 0
    torch.testing.assert_close(got.double(), o, atol=2e-2, rtol=1e-2)
    torch.testing.assert_close(got_lse.double(), lse, atol=1e-4, rtol=1e-4)
    delta = (do.float() * got.float()).sum(-1).T.contiguous()
    grads = [torch.full_like(x, poison) for x in (q, k, v)]
    backward = [*pointers(q, k, v, do, got_lse, delta, *grads), row_tiles, column_tiles,
                *pointers(plan.bits, plan.bits_t)]
    assert emulated.attention_backward(*backward, *sizes, *rest) == 0
    for x, want in zip(grads, truth):
        torch.testing.assert_close(x.double(), want, atol=4e-2, rtol=2e-2)
    assert emulated.attention_forward(*forward, n, m, heads, 32, *rest) == -1    # no such width


@pytest.mark.parametrize("rows", (64, 128))
@pytest.mark.parametrize("width", ops.WIDTHS)
def test_products_are_exact(descriptors, width, rows):
    """K-major, register and MN-major operands, from boxes at any row, some past the end."""
    got = experiment.exact_products(descriptors, width, rows, "cpu")
    assert got == {"K-major": True, "MN-major": True}


def test_products_of_other_sizes_are_an_error(descriptors):
    with pytest.raises(RuntimeError, match="CUDA error -1"):
        experiment.exact_products(descriptors, 32, 64, "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("name, archs, kernels", [
    ("plain", ("80", "90"), 12), ("hopper", ("90a",), 6), ("descriptors", ("90a",), 4)])
def test_kernels_compile_without_spills(name, archs, kernels, tmp_path):
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
    assert len(used) == kernels and set(used) == {("0", "0", "0")}
    assert "C75" not in done.stderr and "warning" not in done.stderr, done.stderr
    library = ctypes.CDLL(str(tmp_path / "out.so"))
    attention = ["attention_forward", "attention_backward"]
    entries = ["descriptor_products"] if name == "descriptors" else attention
    assert all(getattr(library, entry) for entry in entries)

# ---- The operators -----------------------------------------------------------------------------

def test_operators_satisfy_pytorch():
    q, k, v, do, plan, (o, lse, *_) = case(6, 2, 8)
    tiles = ops.flat(plan)
    grad = [x.clone().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(ops.forward, (*grad, tiles))
    torch.library.opcheck(ops.backward, (q, k, v, o, lse, do, tiles))
    few = [x[:, :1, :3].clone().requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(lambda *x: ops.forward(*x, tiles)[0], few, fast_mode=True)
    assert not ops.forward(*grad, tiles)[1].requires_grad


@pytest.mark.parametrize("backend", ("auto", "padded", "cuda"))
def test_attention_compiles_without_graph_breaks(backend, monkeypatch):
    """Once its plan is built; with the types of autocast too."""
    monkeypatch.setattr(cuda_attention, "default_backend", backend)
    layout = pack(random_samples(torch.Generator().manual_seed(2), 4), 4)
    plan = cuda_attention.make_plan(layout)
    plan.build()
    x, w = torch.randn(len(layout), 2, 8, generator=torch.Generator().manual_seed(0)), torch.eye(8)
    attend = torch.compile(lambda x: cuda_attention.attention(x @ w, x @ w, x @ w, plan),
                           fullgraph=True, backend="aot_eager")
    for dtype, off in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = x @ w
            want = cuda_attention.attention(y, y, y, plan, "reference")
            got = attend(x)
            assert got.dtype == want.dtype == dtype
            torch.testing.assert_close(got, want, atol=off, rtol=off)


def test_operators_under_compile_and_checkpointing():
    q, k, v, do, plan, (o, _, *truth) = case(4, 2, 8)
    tiles = ops.flat(plan)
    attend = lambda q, k, v: ops.forward(q, k, v, tiles)[0]
    for call in (torch.compile(attend, fullgraph=True, backend="aot_eager"),
                 lambda *x: torch.utils.checkpoint.checkpoint(attend, *x, use_reentrant=False)):
        grad = [x.clone().requires_grad_() for x in (q, k, v)]
        out = call(*grad)
        torch.testing.assert_close(out, o)
        for x, want in zip(torch.autograd.grad(out, grad, do), truth):
            torch.testing.assert_close(x, want)


@pytest.mark.parametrize("change, word", [
    (lambda q, k, v: (q.float(), k, v), "q is torch.float32"),
    (lambda q, k, v: (q, k[:, :, :32], v), "k is"),
    (lambda q, k, v: (q, k, v[:, ::2]), "v is"),
    (lambda q, k, v: (q, k.transpose(0, 1).contiguous().transpose(0, 1), v), "k is not contiguous"),
    (lambda q, k, v: (q[:0], k, v), "q is torch.bfloat16 (0,"),
    (lambda q, k, v: [x.new_zeros(1, 70000, 64) for x in (q, k, v)], "q is torch.bfloat16 (1, 70000, 64)"),
    (lambda q, k, v: (q, k.new_zeros(641)[1:].view(5, 2, 64), v), "k is not contiguous"),
    (lambda q, k, v: (q, k, v.to("meta")), "on meta"),
    (lambda q, k, v: [x.to("meta") for x in (q, k, v)], "the plan is torch.int32 on cpu"),
])
def test_unsupported_inputs_are_named(change, word):
    q = torch.zeros(5, 2, 64, dtype=torch.bfloat16)
    layout = pack([Sample(T2T, clean=5)], 1)
    with pytest.raises(ValueError, match=re.escape(word)):
        ops.launch_forward(*change(q, q.clone(), q.clone()), ops.flat(T.make_tiles(layout, layout)))


def test_launches_pass_their_arguments(emulated, monkeypatch):
    """The path of a GPU with emulated kernels in its place, and the error of a launch."""
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: argparse.Namespace(cuda_stream=0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(ops, "library", lambda capability: emulated)
    q, k, v, do, plan, (o, lse, *grads) = case(3, 2, 64, torch.bfloat16, most=60)
    assert len(q) != len(k)
    tiles = ops.flat(plan)
    got, got_lse = ops.launch_forward(q, k, v, tiles)
    torch.testing.assert_close(got.double(), o, atol=2e-2, rtol=1e-2)
    torch.testing.assert_close(got_lse.double(), lse, atol=1e-4, rtol=1e-4)
    for x, want in zip(ops.launch_backward(q, k, v, got, got_lse, do, tiles), grads):
        torch.testing.assert_close(x.double(), want, atol=4e-2, rtol=2e-2)
    failing = argparse.Namespace(attention_forward=lambda *x: 700)
    monkeypatch.setattr(ops, "library", lambda capability: failing)
    with pytest.raises(RuntimeError, match="attention_forward: CUDA error 700"):
        ops.launch_forward(q, k, v, tiles)


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
