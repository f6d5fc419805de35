"""Masks: the attention mask is the task.

Query i of a packed sequence may attend to key j of the same sample if the rule for its task and
their two segment types s allows it, given their block ids b (blog, section 3):

    M_ij = 1  <=>  sample_i = sample_j  and  b_j stands to b_i as RULES[task][s_i][s_j] says
    T2T   [C][N]          predicts N: text, block by block
    T2I   [C][I][N]       the image I, and its caption N as an auxiliary task
    IT2T  [P][I][C][N]    the answer N; instruction P and image I (one block) are clean context
    II    [P][J][I] ..    each image J of a sequence, by its text P and the clean images I before it
    VID   [P][J][I][J] .. the same, but all images are frames of one text

C is clean text; noisy text N has the same blocks and coordinates. J is to I what N is to C: a noisy
copy. A new task needs one more table.
Shapes: L positions, S samples.    Run: python masks.py   (CPU, 2 s; draws masks.png)
"""
from dataclasses import dataclass, replace
from functools import reduce

import numpy as np
import torch
from PIL import Image
from torch import Tensor

P, C, I, N, J = range(5)                               # segment types
SEGMENTS = "PCINJ"
T2T, T2I, IT2T, II, VID = range(5)                     # tasks
TASKS = ("t2t", "t2i", "it2t", "ii", "vid")
LT, EQ, GT = 1, 2, 4                                   # key's block before, at, after the query's
_, LE, ALWAYS = 0, LT | EQ, LT | EQ | GT               # sets of these

# `_` in a table is never.
# keys:       P       C       I       N       J          queries
T2T_RULE = [[_,      _,      _,      _,      _],       # P
            [_,      LE,     _,      _,      _],       # C   block-causal
            [_,      _,      _,      _,      _],       # I
            [_,      LT,     _,      EQ,     _],       # N   clean blocks before, and its own block
            [_,      _,      _,      _,      _]]       # J
T2I_RULE = [[_,      _,      _,      _,      _],
            [_,      LE,     _,      _,      _],
            [_,      ALWAYS, ALWAYS, _,      _],       # I   the whole caption and itself, without N
            [_,      LT,     _,      EQ,     _],
            [_,      _,      _,      _,      _]]
IT2T_RULE = [[ALWAYS, _,      ALWAYS, _,      _],      # P   instruction and image: one condition,
             [ALWAYS, LE,     ALWAYS, _,      _],      # C   bidirectional, which sees nothing
             [ALWAYS, _,      ALWAYS, _,      _],      # I   of the answer
             [ALWAYS, LT,     ALWAYS, EQ,     _],      # N
             [_,      _,      _,      _,      _]]
# In II and VID, the block of a position is its turn: the number of its image in the sample.
II_RULE = [[LE,     _,      LT,     _,      _],        # P   texts so far, and the images before
           [_,      _,      _,      _,      _],
           [_,      _,      LE,     _,      _],        # I   block-causal
           [_,      _,      _,      _,      _],
           [EQ,     _,      LT,     _,      EQ]]       # J   its text, all images before, itself
VID_RULE = [*II_RULE[:4],                              #     (MMCORE, 2604.19902, Fig. 6)
            [LE,     _,      LT,     _,      EQ]]      # J   the text of turn 0 is for all frames
RULES = torch.tensor([T2T_RULE, T2I_RULE, IT2T_RULE, II_RULE, VID_RULE],
                     dtype=torch.uint8)                                     # (task, s_i, s_j)


def is_image(segment: Tensor) -> Tensor:
    """Which positions hold an image latent, clean or noisy."""
    return (segment == I) | (segment == J)

# ---- Layout and packing ------------------------------------------------------------------------

@dataclass
class Layout:
    """What each position of a packed sequence is. All int64: (L,) except `task` (S,)."""
    sample: Tensor      # index into the samples of this sequence
    segment: Tensor     # P, C, I, N or J
    block: Tensor       # C and N: index of the latent in its text // block_len; else the turn
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


def repeat(a: Layout, copies: int) -> Layout:
    """The positions of a, then the same positions again as further samples, in so many copies."""
    again = (replace(a, sample=a.sample + i * len(a.task), task=a.task.repeat(copies))
             for i in range(copies))
    return reduce(concat, again)


@dataclass
class Sample:
    """One sample to be packed, or one turn of a sample. A segment of length 0 is left out."""
    task: int
    prompt: int = 0                        # positions of P
    image: tuple[int, int] = (0, 0)        # rows and columns of I
    clean: int = 0                         # positions of C
    noisy: int = 0                         # positions of N, including the skipped ones
    start: int = 0                         # row = col of the text's latent 0, behind P
    first: int = 0                         # index in the text of the first latent packed
    skip: int = 0                          # positions left out at the front of N: a given prefix
    turn: int = 0                          # block of P, J and I
    drawn: tuple[int, int] = (0, 0)        # rows and columns of J


def pack(samples: list[Sample | list[Sample]], block_len: int, device=None) -> Layout:
    """Lays samples one after another, each as [P][J][I][C][N] or, without P, as [C][J][I][N]; of a
    sample that is a list of turns, turn after turn."""
    pieces, tasks = [], []    # (sample, segment, length, start, first, columns, turn) of a segment
    for number, turns in enumerate(s if isinstance(s, list) else [s] for s in samples):
        tasks.append(turns[0].task)
        for s in turns:
            p = number, P, s.prompt, 0, 0, 1, s.turn
            j, i = ((number, segment, h * w, 0, 0, w, s.turn)
                    for segment, (h, w) in ((J, s.drawn), (I, s.image)))
            c = number, C, s.clean, s.start, s.first, 1, 0
            n = number, N, s.noisy - s.skip, s.start, s.first + s.skip, 1, 0
            pieces += (p, j, i, c, n) if s.prompt else (c, j, i, n)
    pieces = np.array(pieces, dtype=np.int64).reshape(-1, 7)
    length = pieces[:, 2]
    begin = np.cumsum(length) - length                                      # (pieces,)
    sample, segment, _, start, first, columns, turn = pieces.repeat(length, 0).T    # (L,) each
    index = first + np.arange(len(sample)) - begin.repeat(length)           # in its text or image
    block = np.where((segment == C) | (segment == N), index // block_len, turn)
    in_image = (segment == I) | (segment == J)
    row = np.where(in_image, index // columns, start + index)
    col = np.where(in_image, index % columns, start + index)
    arrays = sample, segment, block, row, col, np.array(tasks, dtype=np.int64)
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
    Strips on top and left show the segment: green P, blue C, orange I, purple N, yellow J."""
    colors = np.array([(80, 170, 90), (70, 120, 200), (240, 150, 50), (150, 90, 190),
                       (235, 205, 60)], np.uint8)
    picture = np.full((len(layout) + 2, len(layout) + 2, 3), 255, np.uint8)
    picture[0, 2:] = picture[2:, 0] = colors[layout.segment]
    picture[2:, 2:] = np.where(dense(layout, layout)[..., None], (215, 60, 50), (225, 225, 225))
    picture = picture.repeat(cell, 0).repeat(cell, 1)
    picture[cell * 2::cell, cell * 2:] = picture[cell * 2:, cell * 2::cell] = 255    # grid lines
    return Image.fromarray(picture)


if __name__ == "__main__":
    examples = [Sample(T2T, clean=6, noisy=6), Sample(T2I, clean=4, image=(2, 3), noisy=4),
                Sample(IT2T, prompt=3, image=(2, 2), clean=4, noisy=4, start=3),
                [Sample(II, image=(1, 2)), Sample(II, 2, image=(1, 2), turn=1, drawn=(1, 2)),
                 Sample(II, 2, turn=2, drawn=(1, 2))],
                [Sample(VID, 2, image=(1, 2), drawn=(1, 2)), Sample(VID, turn=1, drawn=(1, 2))]]
    print("blocks of 2; expect queries in rows, keys in columns, # where a query may attend")
    for example in examples:
        layout = pack([example], block_len=2)
        print(f"{TASKS[layout.task[0]]:4}  " + "".join(SEGMENTS[s] for s in layout.segment))
        for segment, row in zip(layout.segment, dense(layout, layout)):
            print(f"  {SEGMENTS[segment]}   " + "".join("#" if m else "." for m in row))
    draw(pack(examples, block_len=2)).save("masks.png")
