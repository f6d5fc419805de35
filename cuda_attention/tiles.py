"""Tiles: which 128 x 128 tiles of the mask are empty, full or partial, and the bits of the partial ones.

The rules see sample, segment and block alone, so positions collapse into runs of equal ones, and visibility is
constant on a rectangle run x run. With V (Rq, Rk) the mask of the runs, sums of V over the areas of runs, taken
cumulatively along keys and then along queries, give at tile boundaries the exact number of visible pairs of every
tile: O(runs^2), which blocks of one latent make O(L^2). Kernels visit what is not empty and look at bits only where a tile is not full.

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
    """First position of every run (R,), and the run of every position (N,)."""
    where = torch.stack([layout.sample, layout.segment, layout.block])
    new = torch.ones(len(layout), dtype=torch.bool, device=where.device)
    new[1:] = (where[:, 1:] != where[:, :-1]).any(0)
    return new.nonzero()[:, 0], new.cumsum(0) - 1


def tile_sums(values: Tensor, start: Tensor, n: int) -> Tensor:
    """values (R, ..) held by every position of a run -> sums over tiles of positions (T, ..)."""
    length = torch.diff(start, append=start.new_tensor([n])).view(-1, *[1] * (values.ndim - 1))
    before = torch.cat([values.new_zeros(1, *values.shape[1:]), (values * length).cumsum(0)])    # (R + 1, ..)
    edge = torch.arange(0, n + TILE, TILE, device=start.device).clamp_max(n)                       # (T + 1,)
    run = torch.searchsorted(start, edge, right=True) - 1
    inside = (edge - start[run]).view(-1, *length.shape[1:])
    return torch.diff(before[run] + inside * values[run], dim=0)


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
    (q_start, q_run), (k_start, k_run) = runs(q), runs(k)
    seen = masks.dense(q.select(q_start), k.select(k_start), rules)                                # (Rq, Rk)
    by_key = tile_sums(seen.T.long(), k_start, len(k))                                             # (Tk, Rq)
    pairs = tile_sums(by_key.T, q_start, len(q))                                                   # (Tq, Tk)
    partial = (pairs > 0) & (pairs < TILE * TILE)
    number = torch.where(partial, partial.flatten().cumsum(0).view_as(partial) - 1, -1)

    row, column = (torch.arange(TILE, device=pairs.device) + TILE * at[:, None] for at in partial.nonzero().T)
    inside = (row < len(q))[:, :, None] & (column < len(k))[:, None, :]                        # (P, 128, 128)
    row, column = q_run[row.clamp_max(len(q) - 1)], k_run[column.clamp_max(len(k) - 1)]            # (P, 128)
    cut = seen[row[:, :, None], column[:, None, :]] & inside
    return Tiles(visits(pairs > 0, number), visits(pairs.T > 0, number.T), pack_bits(cut), pack_bits(cut.mT),
                 int(pairs.sum()))
