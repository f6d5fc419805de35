"""Masks: the attention mask is the task.

Query i of a packed sequence may attend to key j of the same sample if the rule for its task and
their two segment types s allows it, given their block ids b (blog, section 3):

    M_ij = 1  <=>  sample_i = sample_j  and  b_j stands to b_i as RULES[task][s_i][s_j] says
    T2T   [C][N]          predicts N: text, block by block
    T2I   [C][I][N]       the image I, and its caption N as an auxiliary task
    IT2T  [P][I][C][N]    the answer N; instruction P and image I (one block) are clean context

C is clean text; noisy text N has the same blocks and coordinates. A new task needs one more table.
Shapes: L positions, S samples.    Run: python masks.py   (CPU, 2 s; draws masks.png)
"""
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

P, C, I, N = range(4)                                  # segment types
SEGMENTS = "PCIN"
T2T, T2I, IT2T = range(3)                              # tasks
TASKS = ("t2t", "t2i", "it2t")
LT, EQ, GT = 1, 2, 4                                   # key's block before, at, after the query's
_, LE, ALWAYS = 0, LT | EQ, LT | EQ | GT               # sets of these

# `_` in a table is never.
# keys:       P       C       I       N          queries
T2T_RULE = [[_,      _,      _,      _],       # P
            [_,      LE,     _,      _],       # C   block-causal
            [_,      _,      _,      _],       # I
            [_,      LT,     _,      EQ]]      # N   clean blocks before its own, and its own block
T2I_RULE = [[_,      _,      _,      _],
            [_,      LE,     _,      _],
            [_,      ALWAYS, ALWAYS, _],       # I   the whole caption and itself; no noisy text
            [_,      LT,     _,      EQ]]
IT2T_RULE = [[ALWAYS, _,      ALWAYS, _],      # P   instruction and image are one bidirectional
             [ALWAYS, LE,     ALWAYS, _],      # C   condition, which sees nothing of the answer
             [ALWAYS, _,      ALWAYS, _],      # I
             [ALWAYS, LT,     ALWAYS, EQ]]     # N
RULES = torch.tensor([T2T_RULE, T2I_RULE, IT2T_RULE], dtype=torch.uint8)    # (task, s_i, s_j)

# ---- Layout and packing ------------------------------------------------------------------------

@dataclass
class Layout:
    """What each position of a packed sequence is. All int64: (L,) except `task` (S,)."""
    sample: Tensor      # index into the samples of this sequence
    segment: Tensor     # P, C, I or N
    block: Tensor       # C and N: index of the latent in its text // block_len; P and I: 0
    row: Tensor         # coordinates of RoPE: text has row = col = start + index, an image its grid
    col: Tensor
    task: Tensor        # (S,) task of each sample

    def __len__(self) -> int:
        return self.sample.numel()

    def per_position(self) -> list[Tensor]:    # the fields of shape (L,)
        return [self.sample, self.segment, self.block, self.row, self.col]

    def to(self, device) -> "Layout":
        return Layout(*(x.to(device, non_blocking=True) for x in vars(self).values()))

    def select(self, index: Tensor) -> "Layout":
        """The layout of some of the positions; index is (n,) positions or (L,) bool."""
        return Layout(*(x[index] for x in self.per_position()), self.task)


def concat(a: Layout, b: Layout) -> Layout:
    """Positions of a, then of b; b has all samples of a. Appends to a KV cache."""
    return Layout(*(torch.cat(pair) for pair in zip(a.per_position(), b.per_position())), b.task)


def duplicate(a: Layout) -> Layout:
    """The positions of a, then the same positions again as further samples."""
    return concat(a, replace(a, sample=a.sample + len(a.task), task=a.task.repeat(2)))


@dataclass
class Sample:
    """One sample to be packed. A segment of length 0 is left out."""
    task: int
    prompt: int = 0                        # positions of P
    image: tuple[int, int] = (0, 0)        # rows and columns of I
    clean: int = 0                         # positions of C
    noisy: int = 0                         # positions of N, including the skipped ones
    start: int = 0                         # row = col of the text's latent 0, behind P
    first: int = 0                         # index in the text of the first latent packed
    skip: int = 0                          # positions left out at the front of N: a given prefix


def pack(samples: list[Sample], block_len: int, device=None) -> Layout:
    """Lays samples one after another, each as [P][I][C][N] or, without P, as [C][I][N]."""
    pieces = []    # (sample, segment, length, start, first, columns) of each segment
    for number, s in enumerate(samples):
        h, w = s.image
        p = number, P, s.prompt, 0, 0, 1
        i = number, I, h * w, 0, 0, w
        c = number, C, s.clean, s.start, s.first, 1
        n = number, N, s.noisy - s.skip, s.start, s.first + s.skip, 1
        pieces += (p, i, c, n) if s.prompt else (c, i, n)
    pieces = np.array(pieces, dtype=np.int64).reshape(-1, 6)
    length = pieces[:, 2]
    begin = np.cumsum(length) - length                                      # (pieces,)
    sample, segment, _, start, first, columns = pieces.repeat(length, 0).T  # (L,) each
    index = first + np.arange(len(sample)) - begin.repeat(length)           # in its text or image
    block = np.where((segment == C) | (segment == N), index // block_len, 0)
    row = np.where(segment == I, index // columns, start + index)
    col = np.where(segment == I, index % columns, start + index)
    arrays = sample, segment, block, row, col, np.array([s.task for s in samples], dtype=np.int64)
    return Layout(*(torch.tensor(x, device=device) for x in arrays))


def relation_allows(relation: Tensor, b_i: Tensor, b_j: Tensor) -> Tensor:
    """Whether the relation of b_j to b_i (LT, EQ or GT) is in the set `relation`. All broadcast."""
    bit = (b_j >= b_i).to(relation.dtype) + (b_j > b_i)                     # LT 0, EQ 1, GT 2
    return (relation >> bit & 1).bool()


def allowed(q: Layout, i: Tensor, k: Layout, j: Tensor, rules: Tensor = RULES) -> Tensor:
    """Whether query i of q may attend to key j of k. i, j: positions, which broadcast; bool."""
    relation = rules.to(i.device)[q.task[q.sample[i]], q.segment[i], k.segment[j]]
    return (q.sample[i] == k.sample[j]) & relation_allows(relation, q.block[i], k.block[j])


def dense(q: Layout, k: Layout, rules: Tensor = RULES) -> Tensor:
    """The whole mask, bool (Lq, Lk). Quadratic memory."""
    i, j = (torch.arange(len(x), device=x.segment.device) for x in (q, k))
    return allowed(q, i[:, None], k, j[None, :], rules)


def draw(layout: Layout, cell: int = 10) -> Image.Image:
    """The mask as in the blog's Figure 2: rows are queries, columns keys, red pairs are allowed.
    Strips on top and left show the segment: green P, blue C, orange I, purple N."""
    colors = np.array([(80, 170, 90), (70, 120, 200), (240, 150, 50), (150, 90, 190)], np.uint8)
    picture = np.full((len(layout) + 2, len(layout) + 2, 3), 255, np.uint8)
    picture[0, 2:] = picture[2:, 0] = colors[layout.segment]
    picture[2:, 2:] = np.where(dense(layout, layout)[..., None], (215, 60, 50), (225, 225, 225))
    picture = picture.repeat(cell, 0).repeat(cell, 1)
    picture[cell * 2::cell, cell * 2:] = picture[cell * 2:, cell * 2::cell] = 255    # grid lines
    return Image.fromarray(picture)


if __name__ == "__main__":
    examples = [Sample(T2T, clean=6, noisy=6), Sample(T2I, clean=4, image=(2, 3), noisy=4),
                Sample(IT2T, prompt=3, image=(2, 2), clean=4, noisy=4, start=3)]
    print("blocks of 2; expect queries in rows, keys in columns, # where a query may attend")
    for example in examples:
        layout = pack([example], block_len=2)
        print(f"{TASKS[example.task]:4}  " + "".join(SEGMENTS[s] for s in layout.segment))
        for segment, row in zip(layout.segment, dense(layout, layout)):
            print(f"  {SEGMENTS[segment]}   " + "".join("#" if m else "." for m in row))
    draw(pack(examples, block_len=2)).save("masks.png")
