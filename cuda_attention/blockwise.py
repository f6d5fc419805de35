"""Blockwise attention in PyTorch: the algorithm of the kernels, step by step, on the same tiles.

    forward    per query tile, over its key tiles:   s = q k^T scale log2(e); online softmax, base 2
    backward   D = rowsum(dO O);  p = 2^(s - lse);  dS = p (dO v^T - D)
               per key tile, over its query tiles:   dV = p^T dO,   dK = scale dS^T q
               per query tile, over its key tiles:   dQ = scale dS k

lse is the base-2 logarithm of a row's sum. A row without keys gives o = 0 and lse = +inf: p is 0.

Shapes: q (Nq, nh, hd), k and v (Nk, nh, hd), lse and D (nh, Nq). Products are in fp32 at least.
"""
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from cuda_attention.tiles import TILE, Tiles, Visits, unpack_bits


def steps(visits: Visits, bits: Tensor, n: int, m: int
          ) -> Iterator[tuple[slice, slice, Tensor | None]]:
    """The n positions of a tile, those of a tile it visits, of m, and their mask, None if full."""
    for tile in visits.schedule.tolist():
        for i in range(int(visits.start[tile]), int(visits.start[tile + 1])):
            other, number = int(visits.tile_index[i]), int(visits.bits[i])
            rows = slice(TILE * tile, min(TILE * (tile + 1), n))
            columns = slice(TILE * other, min(TILE * (other + 1), m))
            mask = None
            if number >= 0:
                mask = unpack_bits(bits[number:number + 1])[0]        # (128, 128)
                mask = mask[:rows.stop - rows.start, :columns.stop - columns.start]
            yield rows, columns, mask


def scores(q: Tensor, k: Tensor) -> Tensor:
    """q k^T scale log2(e), (nh, queries, keys)."""
    return torch.einsum("ihd,jhd->hij", q, k) * (q.shape[-1] ** -0.5 * math.log2(math.e))


def forward(q: Tensor, k: Tensor, v: Tensor, tiles: Tiles) -> tuple[Tensor, Tensor]:
    """o (Nq, nh, hd) in q's dtype, and lse (nh, Nq)."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    qf, kf, vf = (x.to(dtype) for x in (q, k, v))
    o = torch.zeros_like(qf)
    row_max = torch.full((q.shape[1], q.shape[0]), -math.inf, dtype=dtype, device=q.device)
    row_sum = torch.zeros_like(row_max)                               # (nh, Nq)
    for i, j, mask in steps(tiles.row_tiles, tiles.bits, len(q), len(k)):
        s = scores(qf[i], kf[j])                                      # (nh, i, j)
        s = s if mask is None else s.masked_fill(~mask, -math.inf)
        new_max = torch.maximum(row_max[:, i], s.amax(-1))
        base = new_max.masked_fill(new_max == -math.inf, 0.0)         # -inf minus -inf would be NaN
        p, rescale = torch.exp2(s - base[..., None]), torch.exp2(row_max[:, i] - base)
        row_sum[:, i] = row_sum[:, i] * rescale + p.sum(-1)
        o[i] = o[i] * rescale.T[..., None] + torch.einsum("hij,jhd->ihd", p, vf[j])
        row_max[:, i] = new_max
    no_key = row_sum == 0
    o = o / row_sum.masked_fill(no_key, 1.0).T[..., None]
    return o.to(q.dtype), (row_max + row_sum.log2()).masked_fill(no_key, math.inf)


def backward(q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, do: Tensor,
             tiles: Tiles) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in the dtypes of q, k, v."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    qf, kf, vf, dof = (x.to(dtype) for x in (q, k, v, do))
    delta, scale = (dof * o.to(dtype)).sum(-1).T, q.shape[-1] ** -0.5         # (nh, Nq): D
    dq, dk, dv = torch.zeros_like(qf), torch.zeros_like(kf), torch.zeros_like(vf)

    def p_and_ds(i: slice, j: slice, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        p = torch.exp2(scores(qf[i], kf[j]) - lse[:, i, None])                # (nh, i, j)
        p = p if mask is None else p.masked_fill(~mask, 0.0)
        return p, p * (torch.einsum("ihd,jhd->hij", dof[i], vf[j]) - delta[:, i, None])

    for j, i, mask in steps(tiles.column_tiles, tiles.bits_t, len(k), len(q)):
        p, ds = p_and_ds(i, j, None if mask is None else mask.T)
        dv[j] += torch.einsum("hij,ihd->jhd", p, dof[i])
        dk[j] += scale * torch.einsum("hij,ihd->jhd", ds, qf[i])
    for i, j, mask in steps(tiles.row_tiles, tiles.bits, len(q), len(k)):
        _, ds = p_and_ds(i, j, mask)
        dq[i] += scale * torch.einsum("hij,jhd->ihd", ds, kf[j])
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
