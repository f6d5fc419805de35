"""Masked attention over packed sequences: one public call, several backends.

    plan = make_plan(layout)                 # once a batch, shared by all layers, heads and passes
    o = attention(q, k, v, plan)             # once a layer

    o_i = sum_j softmax_j(q_i . k_j / sqrt(hd)) v_j      over the keys j that query i may attend to

masks.py defines which keys these are. The backends agree up to rounding:

    reference   the whole L x L mask and a plain softmax in fp32; the others are tested against it
    padded      dense attention on groups of samples of about equal length (padded.py)
    flex        PyTorch's FlexAttention; compiled on a GPU, without gradients on a CPU
    cuda        the kernels of this folder over 128 x 128 tiles, in bfloat16 (tiles.py, ops.py);
                on a CPU their algorithm in PyTorch (blockwise.py), for tests
    auto        padded, the fastest on a CPU; in training on a GPU, the fastest there (choose.py)

Shapes: Nq, Nk query and key positions, nh heads, hd head width.
"""
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from cuda_attention import ops
from cuda_attention.padded import Rows, make_rows, padded_attention
from cuda_attention.tiles import make_tiles
from masks import RULES, Layout, allowed, dense

BACKENDS = ("auto", "reference", "padded", "flex", "cuda")
default_backend = "auto"       # of `attention`; set by set_backend (--attention) or choose.py


@functools.cache
def compiled_flex() -> Callable:
    """FlexAttention, compiled anew for each kind of inputs: more often than Dynamo allows."""
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(flex_attention)

# ---- Plans -------------------------------------------------------------------------------------

@dataclass
class Plan:
    """A pair of layouts, in the form of each backend, which is built when first needed."""
    q: Layout
    k: Layout
    rules: Tensor

    def build(self) -> None:
        """Builds the form that the default backend needs, ahead of the first call."""
        forms = {"cuda": "tiles", "flex": "block_mask"}
        empty = not len(self.q) or not len(self.k)             # only the padded backend accepts it
        form = "rows" if empty else forms.get(default_backend, "rows")
        getattr(self, form)                                    # reading the property builds it

    @functools.cached_property
    def rows(self) -> Rows:
        return make_rows(self.q, self.k, self.rules)

    @functools.cached_property
    def tiles(self) -> list[Tensor]:
        return ops.flat(make_tiles(self.q, self.k, self.rules))

    @functools.cached_property
    def block_mask(self) -> BlockMask:
        q, k, rules = self.q, self.k, self.rules.to(self.q.segment.device)

        def visible(batch, head, i, j):
            return allowed(q, i, k, j, rules)
        return create_block_mask(visible, None, None, len(q), len(k), device=q.segment.device)


def make_plan(q: Layout, k: Layout | None = None, rules: Tensor = RULES) -> Plan:
    """The plan for queries laid out as q and keys as k (default: the same positions).
    rules: (tasks, 5, 5) integers. Raises ValueError for layouts of different samples."""
    k = q if k is None else k
    if q.task is not k.task and not torch.equal(q.task, k.task):
        raise ValueError(f"q has samples of tasks {q.task.tolist()}, k of {k.task.tolist()}: "
                         "expected the same samples")
    return Plan(q, k, rules)

# ---- Attention ---------------------------------------------------------------------------------

def set_backend(name: str, device: torch.device) -> str:
    """Makes `name` the default backend, or padded where the kernels cannot be built for this
    device; returns a line for the user."""
    global default_backend
    default_backend = name
    if name == "cuda" and device.type == "cuda":
        try:
            ops.library(torch.cuda.get_device_capability(device))
        except (RuntimeError, OSError) as error:
            default_backend = "padded"
            return f"attention: padded, because the kernels cannot be built: {error}"
        return "attention: cuda for heads of 64 or 128 in bfloat16, padded for others"
    return f"attention: {'padded' if name == 'auto' else name}"


def attention(q: Tensor, k: Tensor, v: Tensor, plan: Plan, backend: str | None = None) -> Tensor:
    """q (Nq, nh, hd), k and v (Nk, nh, hd) -> (Nq, nh, hd). A query without visible keys gives 0.

    backend: one of BACKENDS; None takes the default, or padded where the kernels do not support
    these heads. Raises ValueError for shapes and types that do not fit each other, the plan or the
    backend, and for an unknown backend.
    """
    nq, nk = len(plan.q), len(plan.k)
    fits = q.dim() == 3 and len(q) == nq and k.shape == v.shape == (nk, *q.shape[1:])
    if not fits or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q {q.dtype} {tuple(q.shape)}, k {k.dtype} {tuple(k.shape)}, v {v.dtype} "
                         f"{tuple(v.shape)}: expected one type, q ({nq}, heads, width), k and v "
                         f"({nk}, heads, width)")
    if backend is None:
        use_padded = not nq or not nk or default_backend == "cuda" and not ops.supports(q, k)
        backend = "padded" if use_padded else default_backend
    if backend not in BACKENDS:
        raise ValueError(f"attention backend {backend!r}: expected one of {', '.join(BACKENDS)}")
    if backend == "reference":
        return reference_attention(q, k, v, plan)
    if backend == "flex":
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))               # (1, nh, N, hd)
        run = flex_attention if q.device.type == "cpu" else compiled_flex()
        return run(q, k, v, block_mask=plan.block_mask)[0].transpose(0, 1)
    if backend == "cuda":
        return ops.forward(*(x.contiguous() for x in (q, k, v)), plan.tiles)[0]
    return padded_attention(q, k, v, plan.rows)


def reference_attention(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
    """The definition: the whole mask and the whole softmax, in fp32 at least."""
    mask = dense(plan.q, plan.k, plan.rules)                                 # (Nq, Nk)
    dtype = torch.promote_types(q.dtype, torch.float32)
    s = torch.einsum("ihd,jhd->hij", q.to(dtype), k.to(dtype)) * q.shape[-1] ** -0.5
    p = s.masked_fill(~mask, float("-inf")).softmax(-1)                      # (nh, Nq, Nk)
    p = p.masked_fill(~mask, 0.0)                                            # no keys: 0, not NaN
    return torch.einsum("hij,jhd->ihd", p, v.to(dtype)).to(q.dtype)
