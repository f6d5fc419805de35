"""Masked attention over packed sequences: one public call, several backends.

    plan = make_plan(layout)                 # once per batch, shared by all layers, heads and both passes
    o = attention(q, k, v, plan)             # once per layer

    o_i = sum_j softmax_j(q_i . k_j / sqrt(hd)) v_j         over the keys j that query i may see

Who sees whom is in masks.py. Backends compute the same numbers up to rounding:

    reference   the whole L x L mask and a plain softmax in fp32: what the others are tested against
    padded      gather every sample into a row, scaled_dot_product_attention, scatter back: linear in samples

Shapes: Nq, Nk query and key positions, S samples, nh heads, hd head width.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import masks
from masks import Layout, Padded

SHORT = 256             # keys up to which, on a CPU, the plain products beat the fused kernel's backward
BACKENDS = ("auto", "reference", "padded")


@dataclass
class Plan:
    """Everything attention needs to know of a pair of layouts."""
    q: Layout
    k: Layout
    q_pad: Padded
    k_pad: Padded
    mask: Tensor            # bool (S, 1, Lq, Lk), rows as in masks.Padded; one that may see nothing sees all
    bias: Tensor            # the same as fp32 to add: 0 where mask, else -inf
    blind: Tensor | None    # bool (Nq,), queries that may see nothing: their output is 0; None if none
    rules: Tensor


def make_plan(q: Layout, k: Layout | None = None, rules: Tensor = masks.RULES) -> Plan:
    """The plan for queries laid out as q and keys as k (default: the same positions).

    ValueError for layouts of different numbers of samples: both must name the same ones."""
    k = q if k is None else k
    if q.task.numel() != k.task.numel():
        raise ValueError(f"q has {q.task.numel()} samples and k {k.task.numel()}: "
                         "layouts of one plan share their samples")
    q_pad = masks.pad(q)
    k_pad = q_pad if k is q else masks.pad(k)
    mask = masks.padded_mask(q, k, q_pad, k_pad, rules)
    empty = ~mask.any(-1)                                                            # (S, Lq)
    blind = empty.flatten()[q_pad.inverse]
    mask = (mask | empty[..., None])[:, None]                                        # (S, 1, Lq, Lk)
    bias = torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, float("-inf"))
    return Plan(q, k, q_pad, k_pad, mask, bias, blind if bool(blind.any()) else None, rules)


def attention(q: Tensor, k: Tensor, v: Tensor, plan: Plan, backend: str = "auto") -> Tensor:
    """Masked attention, scale 1 / sqrt(hd).

    q (Nq, nh, hd), k and v (Nk, nh, hd) -> (Nq, nh, hd). A query that may see nothing gives 0.
    ValueError for shapes that do not fit the plan and for an unknown backend.
    """
    if q.dim() != 3 or k.shape != v.shape or q.shape[1:] != k.shape[1:]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: "
                         "expected (N, heads, head width)")
    if q.shape[0] != len(plan.q) or k.shape[0] != len(plan.k):
        raise ValueError(f"q has {q.shape[0]} and k {k.shape[0]} positions, "
                         f"the plan {len(plan.q)} and {len(plan.k)}")
    if backend == "reference":
        return _reference(q, k, v, plan)
    if backend in ("auto", "padded"):
        return _padded(q, k, v, plan)
    raise ValueError(f"attention backend {backend!r}: choose one of {', '.join(BACKENDS)}")


def _reference(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
    mask = masks.dense(plan.q, plan.k, plan.rules)
    dtype = torch.promote_types(q.dtype, torch.float32)
    s = torch.einsum("ihd,jhd->hij", q.to(dtype), k.to(dtype)) * q.shape[-1] ** -0.5  # (nh, Nq, Nk)
    p = s.masked_fill(~mask, float("-inf")).softmax(-1).masked_fill(~mask, 0.0)       # empty row: 0, not NaN
    return torch.einsum("hij,jhd->ihd", p, v.to(dtype)).to(q.dtype)


def _padded(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
    def gather(x: Tensor, pad: Padded) -> Tensor:
        rows = x if pad.plain else x.index_select(0, pad.index.flatten())
        return rows.view(*pad.index.shape, *x.shape[1:]).transpose(1, 2)             # (S, nh, Lmax, hd)

    q, k, v = gather(q, plan.q_pad), gather(k, plan.k_pad), gather(v, plan.k_pad)
    if q.device.type == "cpu" and plan.mask.shape[-1] <= SHORT:
        s = (q * q.shape[-1] ** -0.5) @ k.mT + plan.bias.to(q.dtype)                 # (S, nh, Lq, Lk)
        o = s.softmax(-1) @ v
    else:
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=plan.mask)             # (S, nh, Lq, hd)
    o = o.transpose(1, 2).flatten(0, 1)                                              # (S * Lq, nh, hd)
    o = o if plan.q_pad.plain else o.index_select(0, plan.q_pad.inverse)
    return o if plan.blind is None else o.masked_fill(plan.blind[:, None, None], 0.0)
