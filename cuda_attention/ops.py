"""The kernels as PyTorch operators: nvcc compiles them at first use, ctypes loads them.

    o, lse = forward(q, k, v, flat(tiles))                       with gradients for q, k and v
    dq, dk, dv = backward(q, k, v, o, lse, do, flat(tiles))

On a CPU the operators run blockwise.py, so that torch.compile, checkpointing and autograd are
tested without a GPU.

Shapes: q, o, do (Nq, nh, hd), k and v (Nk, nh, hd), lse (nh, Nq) fp32.
"""
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from cuda_attention import blockwise
from cuda_attention.tiles import Tiles, Visits

FOLDER = Path(__file__).parent
FLAGS = ["-O3", "-std=c++17", "-shared", "-Xcompiler", "-fPIC", f"-I{FOLDER}"]
WIDTHS = (64, 128)                         # head widths that kernels are built for
MAX_HEADS = 65535                          # the second dimension of a grid

# ---- The library -------------------------------------------------------------------------------

@functools.cache
def library(capability: tuple[int, int], source: Path | None = None) -> ctypes.CDLL:
    """The kernels for a GPU of this compute capability: hopper.cu for 9.0, plain.cu for others, or
    `source`. Raises RuntimeError, one line, if they cannot be built, OSError if not stored."""
    if capability < (8, 0):
        raise RuntimeError(f"the attention kernels need compute capability 8.0, got {capability}")
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if not nvcc:
        raise RuntimeError("the attention kernels need nvcc, which is not on the path")
    is_hopper = capability == (9, 0)
    source = source or FOLDER / ("hopper.cu" if is_hopper else "plain.cu")
    arch = f"{capability[0]}{capability[1]}" + "a" * is_hopper
    command = [nvcc, *FLAGS, f"-gencode=arch=compute_{arch},code=sm_{arch}", str(source)]
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    texts = [f.read_text() for f in (source, FOLDER / "hopper.cuh", FOLDER / "entry.cuh")]
    key = hashlib.sha256("\0".join([*texts, version, *command]).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cola_attention"
    path = cache / f"{source.stem}_{key}.so"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:    # so that no one loads half a file
            built = f"{folder}/out.so"
            done = subprocess.run([*command, "-o", built], capture_output=True, text=True)
            if done.returncode:
                errors = (x for x in done.stderr.splitlines() if "error" in x or "fatal" in x)
                raise RuntimeError(f"nvcc: {next(errors, f'exit status {done.returncode}')}")
            os.replace(built, path)
    return ctypes.CDLL(str(path))


def supports(q: Tensor, k: Tensor) -> bool:
    """Whether the operators accept such heads; on a CPU they accept any that are not empty."""
    built = q.dtype == torch.bfloat16 and q.shape[2] in WIDTHS
    return min(len(q), len(k)) > 0 and (built or q.device.type == "cpu")


def check(tiles: Sequence[Tensor], **tensors: Tensor) -> None:
    """Raises ValueError, naming the argument, for what the kernels do not support."""
    q = tensors["q"]
    for x in tiles:
        if x.device != q.device or x.dtype != torch.int32:
            raise ValueError(f"the plan is {x.dtype} on {x.device}: expected int32 on {q.device}")
    for name, x in tensors.items():
        fits = x.ndim == 3 and x.shape[1:] == q.shape[1:] and x.shape[2] in WIDTHS
        fits = fits and x.dtype == torch.bfloat16 and x.device == q.device
        if not fits or not len(x) or not 0 < x.shape[1] <= MAX_HEADS:
            raise ValueError(f"{name} is {x.dtype} {tuple(x.shape)} on {x.device}: expected bf16 "
                             f"(positions, up to {MAX_HEADS} heads, 64 or 128) on {q.device}")
        if not x.is_contiguous() or x.data_ptr() % 16:            # TMA copies need both
            raise ValueError(f"{name} is not contiguous, or not aligned to 16 bytes")

# ---- Calls into the library --------------------------------------------------------------------

class VisitsPointer(ctypes.Structure):
    """struct Visits of the sources. The tensors must outlive the call."""
    _fields_ = [(name, ctypes.c_void_p) for name in Visits._fields]

    def __init__(self, *tensors: Tensor):
        super().__init__(*(x.data_ptr() for x in tensors))


def flat(tiles: Tiles) -> list[Tensor]:
    """The ten tensors of a plan, in the order in which the operators take them."""
    return [*tiles.row_tiles, *tiles.column_tiles, tiles.bits, tiles.bits_t]


def unflat(tensors: Sequence[Tensor]) -> Tiles:
    """The inverse of flat, but for the number of visible pairs, which kernels do not need."""
    return Tiles(Visits(*tensors[:4]), Visits(*tensors[4:8]), *tensors[8:], visible_pairs=0)


def call(name: str, q: Tensor, k: Tensor, arguments: list) -> None:
    """Calls a function of the library on the current stream; RuntimeError for an error of CUDA.
    arguments: tensors, passed by address, and lists of four tensors, passed as struct Visits."""
    pointers = [ctypes.c_void_p(x.data_ptr()) if isinstance(x, Tensor) else VisitsPointer(*x)
                for x in arguments]
    sizes, scale = [len(q), len(k), q.shape[1], q.shape[2]], ctypes.c_float(q.shape[2] ** -0.5)
    with torch.cuda.device(q.device):
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        function = getattr(library(torch.cuda.get_device_capability(q.device)), name)
        code = function(*pointers, *sizes, scale, stream)
    if code:
        raise RuntimeError(f"{name}: CUDA error {code} for q {tuple(q.shape)}, k {tuple(k.shape)}")


def launch_forward(q: Tensor, k: Tensor, v: Tensor, tiles: Sequence[Tensor]
                   ) -> tuple[Tensor, Tensor]:
    """o and lse by the kernels. Raises ValueError as `check`, RuntimeError as `call`."""
    check(tiles, q=q, k=k, v=v)
    o, lse = torch.empty_like(q), q.new_empty(q.shape[1], len(q), dtype=torch.float32)
    call("attention_forward", q, k, [q, k, v, o, lse, tiles[:4], tiles[8]])
    return o, lse


def launch_backward(q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, do: Tensor,
                    tiles: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv by the kernels. Errors as in launch_forward."""
    do = do.contiguous()
    check(tiles, q=q, k=k, v=v, do=do)
    delta = (do.float() * o.float()).sum(-1).T.contiguous()            # (nh, Nq)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    call("attention_backward", q, k, [q, k, v, do, lse, delta, dq, dk, dv,
                                      tiles[:4], tiles[4:8], tiles[8], tiles[9]])
    return dq, dk, dv

# ---- Operators ---------------------------------------------------------------------------------

@torch.library.custom_op("cola_attention::forward", mutates_args=())
def forward(q: Tensor, k: Tensor, v: Tensor, tiles: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """o (Nq, nh, hd), and lse (nh, Nq), which has no gradient."""
    if q.device.type == "cpu":
        return blockwise.forward(q, k, v, unflat(tiles))
    return launch_forward(q, k, v, tiles)


@torch.library.custom_op("cola_attention::backward", mutates_args=())
def backward(q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, do: Tensor,
             tiles: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv."""
    if q.device.type == "cpu":
        return blockwise.backward(q, k, v, o, lse, do, unflat(tiles))
    return launch_backward(q, k, v, o, lse, do, tiles)


@forward.register_fake
def _(q, k, v, tiles):
    dtype = torch.promote_types(q.dtype, torch.float32)
    return torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=dtype)


@backward.register_fake
def _(q, k, v, o, lse, do, tiles):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def save_context(ctx, inputs, output):
    q, k, v, tiles = inputs
    ctx.save_for_backward(q, k, v, *output, *tiles)
    ctx.mark_non_differentiable(output[1])


def gradients(ctx, do, _):
    q, k, v, o, lse, *tiles = ctx.saved_tensors
    return *backward(q, k, v, o, lse, do, tiles), [None] * len(tiles)


forward.register_autograd(gradients, setup_context=save_context)
