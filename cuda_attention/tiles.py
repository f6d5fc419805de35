"""Tiles: which 128 x 128 tiles of the mask are empty, full or partial, and bits of partial ones.

The rules depend on sample, segment and block only. So the positions of a tile form runs, and a
rectangle run x run is visible as a whole or not at all. The areas of the visible rectangles of a
tile add up to its number of visible pairs: 0 is empty, 128 x 128 full, else partial. Kernels visit
the tiles that are not empty, and read bits only where a tile is partial.

    bits   one bit a pair of a partial tile, in the order of a WGMMA accumulator in registers:
           thread 128 h + 32 w + 4 u + x of 256 holds rows 64 h + 16 w + 8 r + u and columns
           8 i + 2 x + c, as bit 4 (i % 8) + 2 r + c of its word i / 8

Shapes: Nq, Nk queries and keys, Tq, Tk tiles of them, n visited tiles, P partial tiles.
"""
from typing import NamedTuple

import torch
from torch import Tensor

from masks import RULES, Layout, allowed

TILE = 128


class Visits(NamedTuple):
    """The tiles of the other side that each tile of one side visits, in CSR form. All int32."""
    start: Tensor       # (T + 1,) where the visits of a tile begin
    tile_index: Tensor  # (n,) the visited tile
    bits: Tensor        # (n,) its number among the partial tiles, -1 if it is full
    schedule: Tensor    # (T,) the tiles in the order of their processing: most visits first


class Tiles(NamedTuple):
    """The mask of a pair of layouts, as the kernels read it."""
    row_tiles: Visits       # of each tile of queries, the tiles of keys
    column_tiles: Visits    # of each tile of keys, the tiles of queries
    bits: Tensor            # (P, 256, 2) int32
    bits_t: Tensor          # the same of the transposed tiles
    visible_pairs: int


def runs(layout: Layout) -> tuple[Tensor, Tensor]:
    """First position and length of every run (R,); no run crosses the edge of a tile."""
    kind = torch.stack([layout.sample, layout.segment, layout.block])
    position = torch.arange(len(layout), device=kind.device)
    new = position % TILE == 0
    new[1:] |= (kind[:, 1:] != kind[:, :-1]).any(0)
    start = position[new]
    return start, torch.diff(start, append=start.new_tensor([len(layout)]))


def within_samples(q: Tensor, k: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """All pairs (a, b) with q[a] == k[b], both (n,), of sample numbers q (Rq,) and k (Rk,)."""
    count = torch.bincount(k, minlength=samples)
    first, each = count.cumsum(0) - count, count[q]
    a = torch.repeat_interleave(each)
    nth = torch.arange(len(a), device=a.device) - (each.cumsum(0) - each)[a]
    return a, k.argsort(stable=True)[first[q[a]] + nth]


def pack_bits(tiles: Tensor) -> Tensor:
    """bool (P, 128, 128) -> (P, 256, 2) int32, in the order of the accumulator."""
    x = tiles.view(-1, 2, 4, 2, 8, 2, 8, 4, 2)                       # h, w, r, u; word, i % 8, x, c
    x = x.permute(0, 1, 2, 4, 7, 5, 6, 3, 8).reshape(-1, 256, 2, 32) # h, w, u, x; word; i % 8, r, c
    words = (x.long() << torch.arange(32, device=x.device)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def unpack_bits(bits: Tensor) -> Tensor:
    """The inverse: (P, 256, 2) int32 -> bool (P, 128, 128)."""
    x = (bits[..., None] >> torch.arange(32, device=bits.device) & 1).bool()
    x = x.view(-1, 2, 4, 8, 4, 2, 8, 2, 2)                           # h, w, u, x, word, i % 8, r, c
    return x.permute(0, 1, 2, 7, 3, 5, 6, 4, 8).reshape(-1, TILE, TILE)


def visits(visited: Tensor, number: Tensor) -> Visits:
    """visited: (T, T') bool; number: (T, T') the index of a tile's bits, or -1."""
    count = visited.sum(1)
    start = torch.cat([count.new_zeros(1), count.cumsum(0)])
    return Visits(start.int(), visited.nonzero()[:, 1].int(), number[visited].int(),
                  count.argsort(descending=True, stable=True).int())


def make_tiles(q: Layout, k: Layout, rules: Tensor = RULES) -> Tiles:
    """The tiles of queries laid out as q and keys as k. ValueError if a layout has no position."""
    if not len(q) or not len(k):
        raise ValueError(f"{len(q)} queries and {len(k)} keys: expected at least one of each")
    (q_start, q_length), (k_start, k_length) = runs(q), runs(k)
    a, b = within_samples(q.sample[q_start], k.sample[k_start], q.task.numel())
    visible = allowed(q, q_start[a], k, k_start[b], rules)
    a, b = a[visible], b[visible]                                     # pairs of runs
    tq, tk = -(-len(q) // TILE), -(-len(k) // TILE)
    tile = q_start[a] // TILE * tk + k_start[b] // TILE
    pairs = torch.zeros(tq * tk, dtype=torch.long, device=a.device)   # visible pairs of each tile
    pairs = pairs.index_add_(0, tile, q_length[a] * k_length[b]).view(tq, tk)
    partial = (pairs > 0) & (pairs < TILE * TILE)
    number = torch.where(partial, partial.flatten().cumsum(0).view_as(partial) - 1, -1)

    row, column = (torch.arange(TILE, device=pairs.device) + TILE * at[:, None]
                   for at in partial.nonzero().T)                     # (P, TILE) each
    inside = (row < len(q))[:, :, None] & (column < len(k))[:, None, :]
    row, column = row.clamp_max(len(q) - 1), column.clamp_max(len(k) - 1)
    mask = inside & allowed(q, row[:, :, None], k, column[:, None, :], rules)
    return Tiles(visits(pairs > 0, number), visits(pairs.T > 0, number.T),
                 pack_bits(mask), pack_bits(mask.mT), int(pairs.sum()))
