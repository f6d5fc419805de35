"""Tiles: which 128 x 128 tiles of the mask are empty, full or partial, and the bits of the partial ones.

The rules see sample, segment and block alone, so the positions of a tile collapse into runs of equal ones, and
visibility is constant on a rectangle run x run. Summed over the pairs of runs of each sample, the areas of the
visible rectangles are the exact numbers of visible pairs of every tile. Kernels visit what is not empty and look at
bits only where a tile is not full.

    bits   one per pair of a partial tile, in the order in which a WGMMA accumulator lies in registers: of a
           128 x 128 tile, thread 128 h + 32 w + 4 u + x holds rows 64 h + 16 w + 8 r + u and columns
           8 i + 2 x + c, as bit 4 (i % 8) + 2 r + c of its word i / 8.          (8 warps, 256 threads, 2 KiB)

Shapes: Nq, Nk queries and keys, Tq, Tk tiles of them, n visited tiles, P partial ones.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import masks
from masks import Layout

TILE = 128


@dataclass
class Visits:
    """The tiles that each tile of one side visits, in CSR form. All int32."""
    start: Tensor       # (T + 1,) where the visits of a tile begin
    other: Tensor       # (n,) the tile visited
    bits: Tensor        # (n,) its number among the partial tiles, -1 if it is full
    order: Tensor       # (T,) the tiles, those with most visits first


@dataclass
class Tiles:
    """The mask of a pair of layouts, as the kernels read it."""
    by_query: Visits
    by_key: Visits      # the transpose
    bits: Tensor        # (P, 256, 2) int32
    bits_t: Tensor      # (P, 256, 2) int32, of the transposed tiles
    area: int           # visible pairs


def runs(layout: Layout) -> tuple[Tensor, Tensor]:
    """First position and length of every run (R,), none of which crosses the edge of a tile."""
    where = torch.stack([layout.sample, layout.segment, layout.block])
    at = torch.arange(len(layout), device=where.device)
    new = at % TILE == 0
    new[1:] |= (where[:, 1:] != where[:, :-1]).any(0)
    start = at[new]
    return start, torch.diff(start, append=start.new_tensor([len(layout)]))


def within_samples(q: Tensor, k: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """All pairs (a, b) with q[a] == k[b], both (n,), of sample numbers q (Rq,) and k (Rk,)."""
    count = torch.bincount(k, minlength=samples)                                                   # (S,)
    first, each = count.cumsum(0) - count, count[q]
    a = torch.repeat_interleave(each)                                                              # (n,)
    nth = torch.arange(len(a), device=a.device) - (each.cumsum(0) - each)[a]
    return a, k.argsort(stable=True)[first[q[a]] + nth]


def pack_bits(tiles: Tensor) -> Tensor:
    """bool (P, 128, 128) -> (P, 256, 2) int32, in the order of the accumulator."""
    x = tiles.view(-1, 2, 4, 2, 8, 2, 8, 4, 2)                        # h, w, r, u;  word, i % 8, x, c
    x = x.permute(0, 1, 2, 4, 7, 5, 6, 3, 8).reshape(-1, 256, 2, 32)  # h, w, u, x;  word;  i % 8, r, c
    words = (x.long() << torch.arange(32, device=x.device)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def unpack_bits(bits: Tensor) -> Tensor:
    """The inverse: (P, 256, 2) int32 -> bool (P, 128, 128)."""
    x = (bits[..., None] >> torch.arange(32, device=bits.device) & 1).bool()
    x = x.view(-1, 2, 4, 8, 4, 2, 8, 2, 2)                            # h, w, u, x, word, i % 8, r, c
    return x.permute(0, 1, 2, 7, 3, 5, 6, 4, 8).reshape(-1, TILE, TILE)


def visits(kind: Tensor, number: Tensor) -> Visits:
    """kind (T, T') bool, whether a tile is visited; number (T, T') its bits."""
    count = kind.sum(1)
    start = torch.cat([count.new_zeros(1), count.cumsum(0)])
    return Visits(start.int(), kind.nonzero()[:, 1].int(), number[kind].int(),
                  count.argsort(descending=True, stable=True).int())


def make_tiles(q: Layout, k: Layout, rules: Tensor = masks.RULES) -> Tiles:
    """The tiles for queries laid out as q and keys as k, on their device. ValueError where one has no position."""
    if not len(q) or not len(k):
        raise ValueError(f"{len(q)} queries and {len(k)} keys: expected at least one of each")
    (q_start, q_length), (k_start, k_length) = runs(q), runs(k)
    a, b = within_samples(q.sample[q_start], k.sample[k_start], q.task.numel())
    seen = masks.sees(q, q_start[a], k, k_start[b], rules)
    a, b = a[seen], b[seen]
    tq, tk = -(-len(q) // TILE), -(-len(k) // TILE)
    pairs = torch.zeros(tq * tk, dtype=torch.long, device=a.device).index_add_(
        0, q_start[a] // TILE * tk + k_start[b] // TILE, q_length[a] * k_length[b]).view(tq, tk)
    partial = (pairs > 0) & (pairs < TILE * TILE)
    number = torch.where(partial, partial.flatten().cumsum(0).view_as(partial) - 1, -1)

    row, column = (torch.arange(TILE, device=pairs.device) + TILE * at[:, None] for at in partial.nonzero().T)
    inside = (row < len(q))[:, :, None] & (column < len(k))[:, None, :]                        # (P, 128, 128)
    cut = masks.sees(q, row.clamp_max(len(q) - 1)[:, :, None], k, column.clamp_max(len(k) - 1)[:, None, :], rules)
    cut &= inside
    return Tiles(visits(pairs > 0, number), visits(pairs.T > 0, number.T), pack_bits(cut), pack_bits(cut.mT),
                 int(pairs.sum()))
