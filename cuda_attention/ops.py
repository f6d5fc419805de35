"""The kernels as PyTorch operators: compiled by nvcc at first use, loaded through ctypes.

    o, lse = forward(q, k, v, *flat(tiles))                with gradients for q, k and v
    dq, dk, dv = backward(q, k, v, o, lse, do, *flat(tiles))

On a CPU the operators run blockwise.py, the same algorithm from the same tiles, in any floating type: so
torch.compile, checkpointing and autograd can be tested without a GPU. Shapes are those of blockwise.py.
"""
from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from cuda_attention import blockwise
from cuda_attention.tiles import Tiles, Visits

FOLDER = Path(__file__).parent
FLAGS = ["-O3", "-std=c++17", "-shared", "-Xcompiler", "-fPIC"]
WIDTHS = (64, 128)                         # heads that kernels are built for
HEADS = 65535                              # what a grid takes


class VisitsPointer(ctypes.Structure):
    """struct Visits of the source. The tensors must outlive the call."""
    _fields_ = [(name, ctypes.c_void_p) for name in ("start", "other", "bits", "order")]

    def __init__(self, *tensors: Tensor):
        super().__init__(*(x.data_ptr() for x in tensors))


@functools.cache
def library(capability: tuple[int, int], name: str = "") -> ctypes.CDLL:
    """The kernels for a GPU of this compute capability, 8.0 at least: hopper.cu for 9.0, else v0.cu, or what is named.
    RuntimeError, one line, where they cannot be built; OSError where they cannot be stored or loaded."""
    if capability < (8, 0):
        raise RuntimeError(f"the attention kernels need compute capability 8.0, this GPU has {capability}")
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if not nvcc:
        raise RuntimeError("no nvcc on the path to build the attention kernels with")
    source = FOLDER / f"{name or ('hopper' if capability == (9, 0) else 'v0')}.cu"
    arch = "".join(map(str, capability)) + "a" * (capability == (9, 0))
    command = [nvcc, *FLAGS, f"-gencode=arch=compute_{arch},code=sm_{arch}"]
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    texts = [f.read_text() for f in (source, FOLDER / "hopper.cuh", FOLDER / "entry.cuh")]
    key = hashlib.sha256("\0".join([*texts, version, *command]).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cola_attention"
    path = cache / f"{source.stem}_{key}.so"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:         # moved into place whole
            done = subprocess.run([*command, str(source), "-o", f"{folder}/out.so"], capture_output=True, text=True)
            if done.returncode:
                said = done.stderr.splitlines() or [f"exit status {done.returncode}"]
                raise RuntimeError(f"nvcc: {next((x for x in said if 'error' in x or 'fatal' in x), said[-1])}")
            os.replace(f"{folder}/out.so", path)
    return ctypes.CDLL(str(path))


def takes(q: Tensor, k: Tensor) -> bool:
    """Whether the kernels are built for such heads, and there is something to do; on a CPU any heads will do."""
    return min(len(q), len(k)) > 0 and (q.device.type == "cpu" or q.dtype == torch.bfloat16 and q.shape[2] in WIDTHS)


def check(tiles: tuple[Tensor, ...], **tensors: Tensor) -> None:
    """ValueError, naming the argument, for what the kernels cannot take. The first is q."""
    q = next(iter(tensors.values()))
    for x in tiles:
        if x.device != q.device or x.dtype != torch.int32:
            raise ValueError(f"the plan is of {x.dtype} on {x.device}; expected torch.int32, and on {q.device} as q")
    for name, x in tensors.items():
        if x.dtype != torch.bfloat16:
            raise ValueError(f"{name} is {x.dtype}; the kernels take bfloat16")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, q on {q.device}")
        if x.ndim != 3 or x.shape[2] not in WIDTHS or x.shape[1:] != q.shape[1:]:
            raise ValueError(f"{name} is {tuple(x.shape)}; expected (positions, heads, 64 or 128)")
        if not x.is_contiguous() or x.data_ptr() % 16:             # as copies in boxes want it
            raise ValueError(f"{name} is not contiguous, or does not begin at a multiple of 16 bytes")
        if not 0 < x.shape[1] <= HEADS or not len(x):
            raise ValueError(f"{name} is {tuple(x.shape)}; expected positions, and 1 to {HEADS} heads")


def flat(tiles: Tiles) -> list[Tensor]:
    """The tensors of a plan, as the operators take them."""
    return [x for v in (tiles.by_query, tiles.by_key) for x in (v.start, v.other, v.bits, v.order)] + \
        [tiles.bits, tiles.bits_t]


def unflat(tensors: tuple[Tensor, ...]) -> Tiles:
    return Tiles(Visits(*tensors[:4]), Visits(*tensors[4:8]), *tensors[8:], area=0)


def call(name: str, q: Tensor, k: Tensor, arguments: list) -> None:
    """Call a function of the library on the current stream: tensors by address, visits by struct."""
    given = [ctypes.c_void_p(x.data_ptr()) if isinstance(x, Tensor) else
             VisitsPointer(*x) for x in arguments]
    sizes = [len(q), len(k), q.shape[1], q.shape[2]]
    with torch.cuda.device(q.device):
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        code = getattr(library(torch.cuda.get_device_capability(q.device)), name)(
            *given, *sizes, ctypes.c_float(q.shape[2] ** -0.5), stream)
    if code:
        raise RuntimeError(f"{name}: CUDA error {code} for q {tuple(q.shape)}, k {tuple(k.shape)}")


def launch_forward(q: Tensor, k: Tensor, v: Tensor, tiles: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """o and lse by the kernels. ValueError as `check` says, RuntimeError for an error of CUDA."""
    check(tiles, q=q, k=k, v=v)
    o, lse = torch.empty_like(q), q.new_empty(q.shape[1], len(q), dtype=torch.float32)
    call("attention_forward", q, k, [q, k, v, o, lse, tiles[:4], tiles[8]])
    return o, lse


def launch_backward(q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, do: Tensor,
                    tiles: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv by the kernels. Errors as in launch_forward."""
    do = do.contiguous()
    check(tiles, q=q, k=k, v=v, do=do)
    delta = (do.float() * o.float()).sum(-1).T.contiguous()            # (nh, Nq)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    call("attention_backward", q, k, [q, k, v, do, lse, delta, dq, dk, dv, tiles[:4], tiles[4:8], *tiles[8:]])
    return dq, dk, dv


@torch.library.custom_op("cola_attention::forward", mutates_args=())
def forward(q: Tensor, k: Tensor, v: Tensor, q_start: Tensor, q_other: Tensor, q_bits: Tensor, q_order: Tensor,
            k_start: Tensor, k_other: Tensor, k_bits: Tensor, k_order: Tensor, bits: Tensor,
            bits_t: Tensor) -> tuple[Tensor, Tensor]:
    """o (Nq, nh, hd) and lse (nh, Nq) fp32, which has no gradient."""
    tiles = q_start, q_other, q_bits, q_order, k_start, k_other, k_bits, k_order, bits, bits_t
    return blockwise.forward(q, k, v, unflat(tiles)) if q.device.type == "cpu" else launch_forward(q, k, v, tiles)


@forward.register_fake
def _(q, k, v, *tiles):
    wide = torch.promote_types(q.dtype, torch.float32)
    return torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=wide)


@torch.library.custom_op("cola_attention::backward", mutates_args=())
def backward(q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, do: Tensor, q_start: Tensor,
             q_other: Tensor, q_bits: Tensor, q_order: Tensor, k_start: Tensor, k_other: Tensor, k_bits: Tensor,
             k_order: Tensor, bits: Tensor, bits_t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv."""
    tiles = q_start, q_other, q_bits, q_order, k_start, k_other, k_bits, k_order, bits, bits_t
    return blockwise.backward(q, k, v, o, lse, do, unflat(tiles)) if q.device.type == "cpu" else \
        launch_backward(q, k, v, o, lse, do, tiles)


@backward.register_fake
def _(q, k, v, *rest):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _keep(ctx, inputs, output):
    q, k, v, *tiles = inputs
    ctx.save_for_backward(q, k, v, *output, *tiles)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx, do, _):
    q, k, v, o, lse, *tiles = ctx.saved_tensors
    return *backward(q, k, v, o, lse, do, *tiles), *[None] * len(tiles)


forward.register_autograd(_gradients, setup_context=_keep)
