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
    bias: list[Tensor]      # the same as fp32 to add, 0 or -inf, on a CPU where rows are short; else none
    blind: Tensor | None    # bool (Nq,), queries that may see nothing: their output is 0; None if none


@dataclass
class Plan:
    """What attention needs to know of a pair of layouts, in the form of each backend, built when first asked for."""
    q: Layout
    k: Layout
    rules: Tensor

    def build(self) -> None:
        """Build what the chosen backend will ask for, ahead of its first call."""
        empty = not len(self.q) or not len(self.k)             # which only padded takes
        getattr(self, "rows" if empty else {"cuda": "tiles", "flex": "block_mask"}.get(chosen, "rows"))

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

    ValueError for layouts that do not name the same samples, and for rules that are no tables of every task."""
    k = q if k is None else k
    if q.task.device != k.task.device:
        raise ValueError(f"q is laid out on {q.task.device}, k on {k.task.device}")
    if q.task is not k.task and not torch.equal(q.task, k.task):
        raise ValueError(f"q has {q.task.numel()} samples and k {k.task.numel()}, or of other tasks: "
                         "layouts of one plan share their samples")
    if rules.is_floating_point() or rules.shape[1:] != masks.RULES.shape[1:]:
        raise ValueError(f"rules {tuple(rules.shape)} of {rules.dtype}: expected a table {tuple(masks.RULES.shape[1:])} of "
                         "integers for every task")
    if q.task.numel() and int(q.task.max()) >= len(rules):
        raise ValueError(f"q has samples of task {int(q.task.max())}; rules are of {len(rules)} tasks, counted from 0")
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
    short = slot.device.type == "cpu" and all(m.shape[3] <= SHORT for m in mask)
    bias = [torch.zeros(m.shape).masked_fill_(~m, float("-inf")) for m in mask] if short else []
    return Rows(q_index, k_index, inverse, mask, bias, blind if bool(blind.any()) else None)


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
    ValueError for shapes, types and devices that do not fit each other or the plan, for an unknown backend, and for what
    the kernels cannot take.
    """
    if q.dim() != 3 or k.shape != v.shape or q.shape[1:] != k.shape[1:] or not q.shape[1] * q.shape[2]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: "
                         "expected (N, heads, head width)")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype != q.dtype or not x.is_floating_point():
            raise ValueError(f"{name} is {x.dtype}, q {q.dtype}: expected one floating type")
        if x.device != plan.q.segment.device:
            raise ValueError(f"{name} is on {x.device}, the plan on {plan.q.segment.device}")
    if backend is None:
        backend = chosen if ops.takes(q, k) or chosen != "cuda" else "padded"
    if backend not in BACKENDS:
        raise ValueError(f"attention backend {backend!r}: choose one of {', '.join(BACKENDS)}")
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
    return ops.forward(*(x.contiguous() for x in (q, k, v)), *plan.tiles)[0]


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
    out = []
    for g, (q, k, v) in enumerate(zip(split(q, rows.q_index, at_q), split(k, rows.k_index, at_k),
                                      split(v, rows.k_index, at_k))):
        if rows.bias:
            s = (q * q.shape[-1] ** -0.5) @ k.mT + rows.bias[g]                     # (n, nh, Wq, Wk), >= fp32
            o = s.softmax(-1).to(v.dtype) @ v
        else:
            o = F.scaled_dot_product_attention(q, k, v, attn_mask=rows.mask[g])      # (n, nh, Wq, hd)
        out.append(o.transpose(1, 2).flatten(0, 1))                                  # (n Wq, nh, hd)
    o = torch.cat(out).index_select(0, rows.inverse)
    return o if rows.blind is None else o.masked_fill(rows.blind[:, None, None], 0.0)
