"""Masked attention over packed sequences: one public call, several backends.

    plan = make_plan(layout)                 # once per batch, shared by all layers, heads and both passes
    o = attention(q, k, v, plan)             # once per layer

    o_i = sum_j softmax_j(q_i . k_j / sqrt(hd)) v_j         over the keys j that query i may see

Who sees whom is in masks.py. Backends compute the same numbers up to rounding:

    reference   the whole L x L mask and a plain softmax in fp32: what the others are tested against
    padded      gather every sample into a row, rows of about one length into a group, attend group by group:
                time and memory are linear in the number of samples
    flex        PyTorch's FlexAttention with the same rules; compiled on a GPU, on a CPU for tests alone
    cuda        the kernels of this folder over 128 x 128 tiles (tiles.py, ops.py), in bfloat16; on a CPU their
                algorithm in PyTorch (blockwise.py), for tests alone
    auto        padded

Shapes: Nq, Nk query and key positions, S samples, nh heads, hd head width.
"""
from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

import masks
from cuda_attention import ops
from cuda_attention.tiles import make_tiles
from masks import Layout

BACKENDS = ("auto", "reference", "padded", "flex", "cuda")
chosen = "auto"         # what `attention` takes where it is not told: --attention
SHORT = 256             # keys up to which, on a CPU, the plain products beat the fused kernel's backward
ROW = 32               # samples whose keys round up to the same multiple of this form a group (best on a CPU)


@dataclass
class Rows:
    """A packed sequence as rows, one a sample. Samples of about the same length form a group of n rows, with Wq
    slots for queries and Wk for keys; the slots of all groups lie one after another."""
    q_index: Tensor         # (all n Wq,) the query in each slot
    k_index: Tensor         # (all n Wk,) the key in each slot
    inverse: Tensor         # (Nq,) the slot of each query
    mask: list[Tensor]      # of each group, bool (n, 1, Wq, Wk); a query that may see nothing sees all
    blind: Tensor | None    # bool (Nq,), queries that may see nothing: their output is 0; None if none

    @functools.cached_property
    def bias(self) -> list[Tensor]:
        """The masks as fp32 to add: 0 where True, else -inf."""
        return [torch.zeros(m.shape, device=m.device).masked_fill_(~m, float("-inf")) for m in self.mask]


@dataclass
class Plan:
    """What attention needs to know of a pair of layouts, in the form of each backend, built when first asked for."""
    q: Layout
    k: Layout
    rules: Tensor

    def build(self) -> None:
        """Build what the chosen backend will ask for, ahead of its first call."""
        getattr(self, {"cuda": "tiles", "flex": "block_mask"}.get(chosen, "rows"))

    @functools.cached_property
    def rows(self) -> Rows:
        """For padded."""
        return make_rows(self.q, self.k, self.rules)

    @functools.cached_property
    def tiles(self) -> list[Tensor]:
        """For the kernels' operators."""
        return ops.flat(make_tiles(self.q, self.k, self.rules))

    @functools.cached_property
    def block_mask(self) -> BlockMask:
        """For FlexAttention."""
        q, k, rules = self.q, self.k, self.rules.to(self.q.segment.device)

        def visible(b, h, i, j):
            return masks.sees(q, i, k, j, rules)
        return create_block_mask(visible, None, None, len(q), len(k), device=q.segment.device)


def make_plan(q: Layout, k: Layout | None = None, rules: Tensor = masks.RULES) -> Plan:
    """The plan for queries laid out as q and keys as k (default: the same positions).

    ValueError for layouts of different numbers of samples: both must name the same ones."""
    k = q if k is None else k
    if q.task.numel() != k.task.numel():
        raise ValueError(f"q has {q.task.numel()} samples and k {k.task.numel()}: "
                         "layouts of one plan share their samples")
    return Plan(q, k, rules)


def make_rows(q: Layout, k: Layout, rules: Tensor) -> Rows:
    """The rows of every sample, grouped by length, with the mask of each group."""
    width = -(-torch.bincount(k.sample, minlength=k.task.numel()) // ROW)            # (S,)
    groups = [(width == w).nonzero()[:, 0] for w in width.unique().tolist()] or [width]
    q_rows = masks.pad(q, groups)
    k_rows = q_rows if k is q else masks.pad(k, groups)
    mask = [masks.padded_mask(q, k, *rows, rules) for rows in zip(q_rows, k_rows)]
    empty = [~m.any(-1) for m in mask]                                               # each (n, Wq)
    mask = [(m | e[..., None])[:, None] for m, e in zip(mask, empty)]                # each (n, 1, Wq, Wk)

    def flat(parts: list[Tensor]) -> Tensor:
        return torch.cat([x.flatten() for x in parts])

    q_index = flat([r.index for r in q_rows])
    k_index = q_index if k is q else flat([r.index for r in k_rows])
    slot = flat([r.valid for r in q_rows]).nonzero()[:, 0]
    inverse = torch.empty_like(slot)
    inverse[q_index[slot]] = slot
    blind = flat(empty)[inverse]
    return Rows(q_index, k_index, inverse, mask, blind if bool(blind.any()) else None)


def choose(name: str, device: torch.device) -> str:
    """Let `attention` take this backend on this device. Returns a line: what it takes, and why."""
    global chosen
    chosen = name
    if name == "cuda" and device.type == "cuda":
        try:
            ops.library(torch.cuda.get_device_capability(device))
        except (RuntimeError, OSError) as error:
            chosen = "padded"
            return f"attention: padded, as the kernels cannot be had: {error}"
        return "attention: cuda for heads of 64 or 128 in bfloat16, padded for others"
    if name != "auto":
        return f"attention: {name}, as asked for"
    return "attention: padded; " + ("the fastest on a CPU" if device.type == "cpu" else
                                    "no measurement on a GPU has yet shown another to be faster")


def attention(q: Tensor, k: Tensor, v: Tensor, plan: Plan, backend: str | None = None) -> Tensor:
    """Masked attention, scale 1 / sqrt(hd).

    q (Nq, nh, hd), k and v (Nk, nh, hd) -> (Nq, nh, hd). A query that may see nothing gives 0.
    backend: one of BACKENDS; by default the one chosen, or padded where the kernels do not take such heads.
    ValueError for shapes that do not fit the plan, for an unknown backend, and for what the kernels cannot take.
    """
    if backend is None:
        backend = chosen if chosen != "cuda" or ops.takes(q) else "padded"
    if q.dim() != 3 or k.shape != v.shape or q.shape[1:] != k.shape[1:]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: "
                         "expected (N, heads, head width)")
    if q.shape[0] != len(plan.q) or k.shape[0] != len(plan.k):
        raise ValueError(f"q has {q.shape[0]} and k {k.shape[0]} positions, "
                         f"the plan {len(plan.q)} and {len(plan.k)}")
    if backend == "reference":
        return _reference(q, k, v, plan)
    if backend in ("auto", "padded"):
        return _padded(q, k, v, plan.rows)
    if backend == "flex":
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))                       # (1, nh, N, hd)
        run = flex_attention if q.device.type == "cpu" else _compiled()
        return run(q, k, v, block_mask=plan.block_mask)[0].transpose(0, 1)
    if backend == "cuda":
        return ops.forward(*(x.contiguous() for x in (q, k, v)), *plan.tiles)[0]
    raise ValueError(f"attention backend {backend!r}: choose one of {', '.join(BACKENDS)}")


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(flex_attention)


def _reference(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
    mask = masks.dense(plan.q, plan.k, plan.rules)
    dtype = torch.promote_types(q.dtype, torch.float32)
    s = torch.einsum("ihd,jhd->hij", q.to(dtype), k.to(dtype)) * q.shape[-1] ** -0.5  # (nh, Nq, Nk)
    p = s.masked_fill(~mask, float("-inf")).softmax(-1).masked_fill(~mask, 0.0)       # empty row: 0, not NaN
    return torch.einsum("hij,jhd->ihd", p, v.to(dtype)).to(q.dtype)


def _padded(q: Tensor, k: Tensor, v: Tensor, rows: Rows) -> Tensor:
    def split(x: Tensor, index: Tensor, shapes: list[tuple[int, int]]) -> list[Tensor]:
        groups = x.index_select(0, index).split([n * w for n, w in shapes])
        return [g.unflatten(0, shape).transpose(1, 2) for g, shape in zip(groups, shapes)]   # (n, nh, W, hd)

    at_q, at_k = ([(m.shape[0], m.shape[side]) for m in rows.mask] for side in (2, 3))
    short = q.device.type == "cpu" and all(w <= SHORT for _, w in at_k)
    out = []
    for g, (q, k, v) in enumerate(zip(split(q, rows.q_index, at_q), split(k, rows.k_index, at_k),
                                      split(v, rows.k_index, at_k))):
        if short:
            s = (q * q.shape[-1] ** -0.5) @ k.mT + rows.bias[g]                     # (n, nh, Wq, Wk), >= fp32
            o = s.softmax(-1).to(v.dtype) @ v
        else:
            o = F.scaled_dot_product_attention(q, k, v, attn_mask=rows.mask[g])      # (n, nh, Wq, hd)
        out.append(o.transpose(1, 2).flatten(0, 1))                                  # (n Wq, nh, hd)
    o = torch.cat(out).index_select(0, rows.inverse)
    return o if rows.blind is None else o.masked_fill(rows.blind[:, None, None], 0.0)
