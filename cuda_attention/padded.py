"""Padded attention: the samples of a packed sequence as rows of about equal length, group by group.

Samples whose keys round up to one multiple of GROUP_STEP form a group, a padded batch for one dense
attention. Time and memory are linear in the number of samples. This is the backend of CPUs.

Shapes: Nq, Nk query and key positions of the packed sequence, S samples, n samples of a group, Wq
and Wk their slots, nh heads, hd head width.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from masks import Layout, relation_allows

GROUP_STEP = 32         # keys; fastest on a CPU
SHORT = 256             # keys up to which plain products beat the fused kernel's backward on a CPU

# ---- Padding -----------------------------------------------------------------------------------

@dataclass
class Padded:
    """Some samples of a packed sequence as n rows of W slots, one row a sample."""
    index: Tensor       # (n, W) the position in each slot
    valid: Tensor       # (n, W) bool, False: padding with an arbitrary position


def pad(layout: Layout, groups: list[Tensor]) -> list[Padded]:
    """The rows of each group (n,) of sample numbers, as wide as its longest, from 8 on rounded up
    to a multiple of 8. The positions of a sample need not be contiguous: a KV cache appends to all
    samples."""
    counts = torch.bincount(layout.sample, minlength=layout.task.numel())    # (S,)
    starts = counts.cumsum(0) - counts
    order = torch.argsort(layout.sample, stable=True)
    rows = []
    for group in groups:
        width = int(counts[group].max()) if len(group) else 0                # W
        width = width if width < 8 else -(-width // 8) * 8
        slot = torch.arange(width, device=order.device)
        valid = slot < counts[group, None]
        rows.append(Padded(order[torch.where(valid, starts[group, None] + slot, 0)], valid))
    return rows


def padded_mask(q: Layout, k: Layout, q_rows: Padded, k_rows: Padded, rules: Tensor) -> Tensor:
    """The mask of every sample of a group: bool (n, Wq, Wk), False at padding."""
    s_i, b_i = q.segment[q_rows.index], q.block[q_rows.index].int()          # (n, Wq)
    s_j, b_j = k.segment[k_rows.index], k.block[k_rows.index].int()
    rule = rules.to(s_i.device)[q.task[q.sample[q_rows.index]], s_i]         # (n, Wq, 5)
    relation = rule.gather(2, s_j[:, None].expand(-1, s_i.shape[1], -1))     # (n, Wq, Wk)
    mask = relation_allows(relation, b_i[:, :, None], b_j[:, None, :])
    return mask & q_rows.valid[:, :, None] & k_rows.valid[:, None, :]

# ---- Attention ---------------------------------------------------------------------------------

@dataclass
class Rows:
    """All groups of a pair of layouts; the slots of the groups lie one after another."""
    q_index: Tensor                 # (sum of n Wq,) the query in each slot
    k_index: Tensor                 # (sum of n Wk,) the key in each slot
    inverse: Tensor                 # (Nq,) the slot of each query
    mask: list[Tensor]              # bool (n, 1, Wq, Wk) a group; a query without keys sees all
    bias: list[Tensor]              # the mask as 0 and -inf in fp32, for short rows on a CPU; or []
    no_key: Tensor | None           # bool (Nq,), queries whose output is 0; None if there are none


def make_rows(q: Layout, k: Layout, rules: Tensor) -> Rows:
    """The groups for queries laid out as q and keys as k, and their masks by the rules. A sample
    without queries is left out."""
    queries, keys = (torch.bincount(x.sample, minlength=k.task.numel()) for x in (q, k))    # (S,)
    step = torch.where(queries > 0, -(-keys // GROUP_STEP), -1)
    groups = [(step == x).nonzero()[:, 0] for x in step.unique().tolist() if x >= 0]
    groups = groups or [step[:0]]                            # no queries: one empty group
    q_rows = pad(q, groups)
    k_rows = q_rows if k is q else pad(k, groups)
    mask = [padded_mask(q, k, *rows, rules) for rows in zip(q_rows, k_rows)]
    empty = [~m.any(-1) for m in mask]                                       # (n, Wq)
    mask = [(m | e[..., None])[:, None] for m, e in zip(mask, empty)]        # (n, 1, Wq, Wk)

    def flat(parts: list[Tensor]) -> Tensor:
        return torch.cat([x.flatten() for x in parts])

    q_index = flat([r.index for r in q_rows])
    k_index = q_index if k is q else flat([r.index for r in k_rows])
    slot = flat([r.valid for r in q_rows]).nonzero()[:, 0]                   # (Nq,)
    inverse = torch.empty_like(slot)
    inverse[q_index[slot]] = slot
    no_key = flat(empty)[inverse]
    short = slot.device.type == "cpu" and all(m.shape[3] <= SHORT for m in mask)
    bias = [torch.zeros(m.shape).masked_fill_(~m, float("-inf")) for m in mask] if short else []
    return Rows(q_index, k_index, inverse, mask, bias, no_key if bool(no_key.any()) else None)


def split(x: Tensor, index: Tensor, shapes: list[tuple[int, int]]) -> list[Tensor]:
    """x (N, nh, hd) in the slots `index` of groups of n rows of W -> a list of (n, nh, W, hd)."""
    groups = x.index_select(0, index).split([n * w for n, w in shapes])
    return [g.unflatten(0, shape).transpose(1, 2) for g, shape in zip(groups, shapes)]


def padded_attention(q: Tensor, k: Tensor, v: Tensor, rows: Rows) -> Tensor:
    """q (Nq, nh, hd), k and v (Nk, nh, hd) -> (Nq, nh, hd)."""
    q_shapes, k_shapes = ([(m.shape[0], m.shape[side]) for m in rows.mask] for side in (2, 3))
    outputs = []
    for group, (q, k, v) in enumerate(zip(split(q, rows.q_index, q_shapes),
                                          split(k, rows.k_index, k_shapes),
                                          split(v, rows.k_index, k_shapes))):
        if rows.bias:
            s = (q * q.shape[-1] ** -0.5) @ k.mT + rows.bias[group]          # fp32 (n, nh, Wq, Wk)
            o = s.softmax(-1).to(v.dtype) @ v
        else:
            o = F.scaled_dot_product_attention(q, k, v, attn_mask=rows.mask[group])
        outputs.append(o.transpose(1, 2).flatten(0, 1))                      # (n Wq, nh, hd)
    o = torch.cat(outputs).index_select(0, rows.inverse)
    return o if rows.no_key is None else o.masked_fill(rows.no_key[:, None, None], 0.0)
