"""Masks: the attention mask is the task.

Every position of a packed sequence carries its sample, a segment type s, a block id b and its coordinates;
every sample carries its task. Query i may attend to key j only inside one sample, and only if a rule holds
that depends on the task and the two segment types alone (blog, section 3):

    M_ij = 1  <=>  sample_i = sample_j  and  RULES[task][s_i][s_j] holds for (b_j, b_i)

    task   layout of a sample     what is predicted
    T2T    [C][N]                 text blocks
    T2I    [C][I][N]              the image, and the caption as an auxiliary task
    IT2T   [P][I][C][N]           the answer; instruction P and image I are clean context

    P instruction   C clean text   I image (one block)
    N noisy text: the same blocks and coordinates as its clean copy C

The rules are data: a new task is one more 4 x 4 table, and neither this code nor the attention changes.
Nothing of size L x L is built except by `dense`, which is for tests, pictures and small runs.

Shapes: L positions of the packed sequence, S samples.    Run: python masks.py   (CPU, 2 s; draws masks.png)
"""
from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

P, C, I, N = range(4)                                  # segment types
SEGMENTS = "PCIN"
T2T, T2I, IT2T = range(3)                              # tasks
TASKS = ("t2t", "t2i", "it2t")
LT, EQ, GT = 1, 2, 4                                   # the key's block lies before, at, after the query's
NEVER, LE, ALWAYS = 0, LT | EQ, LT | EQ | GT           # sets of these
_ = NEVER

# keys:       P       C       I       N          queries
T2T_RULE = [[_,      _,      _,      _],       # P
            [_,      LE,     _,      _],       # C   block-causal
            [_,      _,      _,      _],       # I
            [_,      LT,     _,      EQ]]      # N   clean blocks before its own, and its own noisy block
T2I_RULE = [[_,      _,      _,      _],
            [_,      LE,     _,      _],
            [_,      ALWAYS, ALWAYS, _],       # I   the whole caption and itself; never the noisy text
            [_,      LT,     _,      EQ]]
IT2T_RULE = [[ALWAYS, _,      ALWAYS, _],      # P   instruction and image form one bidirectional condition,
             [ALWAYS, LE,     ALWAYS, _],      # C   which sees nothing of the answer
             [ALWAYS, _,      ALWAYS, _],      # I
             [ALWAYS, LT,     ALWAYS, EQ]]     # N
RULES = torch.tensor([T2T_RULE, T2I_RULE, IT2T_RULE], dtype=torch.uint8)               # (task, s_i, s_j)


@dataclass
class Layout:
    """What each position of a packed sequence is. All int64: (L,) except `task` (S,)."""
    sample: Tensor      # index into the samples of this sequence
    segment: Tensor     # P, C, I or N
    block: Tensor       # C and N: index of the latent in its text // block_len; P and I: 0
    row: Tensor         # coordinates for RoPE: text has row = col = its index, an image its grid
    col: Tensor
    task: Tensor        # (S,) task of each sample

    def __len__(self) -> int:
        return self.sample.numel()

    def to(self, device) -> Layout:
        return Layout(*(getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)))

    def select(self, index: Tensor) -> Layout:
        """The layout of some of the positions; index is (n,) positions or (L,) bool."""
        return Layout(self.sample[index], self.segment[index], self.block[index], self.row[index],
                      self.col[index], self.task)


def concat(a: Layout, b: Layout) -> Layout:
    """Positions of a, then those of b, over the samples of b, of which a's are the first: what a KV cache holds
    after an append."""
    return Layout(*(torch.cat([getattr(a, f.name), getattr(b, f.name)]) for f in fields(Layout)[:-1]), b.task)


def twice(a: Layout) -> Layout:
    """The positions of a, then the same again as further samples."""
    again = Layout(a.sample + a.task.numel(), a.segment, a.block, a.row, a.col, torch.cat([a.task, a.task]))
    return concat(a, again)


@dataclass
class Sample:
    """One sample to be packed, in latents. A length of 0 leaves the segment out and moves nothing else: that
    is how the unconditional layouts of guidance arise, T2I [I], IT2T [N], T2T [N]."""
    task: int
    prompt: int = 0                        # positions of P
    image: tuple[int, int] = (0, 0)        # rows and columns of I
    clean: int = 0                         # positions of C
    noisy: int = 0                         # positions of N, those left out counted
    start: int = 0                         # coordinate at which C and N begin: behind P
    first: int = 0                         # index in the text of the first latent packed, for a single block
    skip: int = 0                          # positions left out at the front of N: they would bear no loss


def pack(samples: list[Sample], block_len: int, device=None) -> Layout:
    """Lay samples one after another into a sequence, each as [P][I][C][N] or [C][I][N] (blog, section 3).
    Attention reads segments, blocks and coordinates only: the order inside a sample has no meaning to it."""
    pieces = []            # a segment each: sample, type, length, coordinate and index of its first, columns
    for number, s in enumerate(samples):
        h, w = s.image
        p, c = (number, P, s.prompt, 0, 0, 1), (number, C, s.clean, s.start + s.first, s.first, 1)
        begin = s.first + s.skip
        i, n = (number, I, h * w, 0, 0, w), (number, N, s.noisy - s.skip, s.start + begin, begin, 1)
        pieces += (p, i, c, n) if s.prompt else (c, i, n)
    sample, segment, length, start, first, w = np.array(pieces, dtype=np.int64).reshape(-1, 6).T
    sample, segment, start, first, w = (np.repeat(x, length) for x in (sample, segment, start, first, w))
    place = np.arange(len(sample)) - np.repeat(np.cumsum(length) - length, length)   # (L,), in its segment
    block = np.where((segment == C) | (segment == N), (first + place) // block_len, 0)
    row = np.where(segment == I, place // w, start + place)
    col = np.where(segment == I, place % w, start + place)
    task = np.array([s.task for s in samples], dtype=np.int64)
    return Layout(*(torch.from_numpy(x).to(device) for x in (sample, segment, block, row, col, task)))


def text_layout(lengths, block_len: int, device=None) -> Layout:
    """S clean texts of `lengths` latents, the layout of the text VAE: block-causal, at block_len 1 causal."""
    return pack([Sample(T2T, clean=int(n)) for n in lengths], block_len, device)


def holds(relation: Tensor, b_i: Tensor, b_j: Tensor) -> Tensor:
    """Whether the relation, a set of LT, EQ, GT, has the one in which b_j is to b_i. All broadcast; bool."""
    bit = (b_j >= b_i).to(relation.dtype) + (b_j > b_i)                              # LT 0, EQ 1, GT 2
    return (relation >> bit & 1).bool()


def sees(q: Layout, i: Tensor, k: Layout, j: Tensor, rules: Tensor = RULES) -> Tensor:
    """Whether the query at position i of q may attend to the key at position j of k. i, j broadcast; bool."""
    relation = rules.to(i.device)[q.task[q.sample[i]], q.segment[i], k.segment[j]]
    return (q.sample[i] == k.sample[j]) & holds(relation, q.block[i], k.block[j])


def dense(q: Layout, k: Layout, rules: Tensor = RULES) -> Tensor:
    """The whole mask, bool (Lq, Lk). Quadratic memory."""
    i, j = (torch.arange(len(x), device=x.segment.device) for x in (q, k))
    return sees(q, i[:, None], k, j[None, :], rules)


@dataclass
class Padded:
    """Some samples of a packed sequence seen as n rows, one a sample, of W slots."""
    index: Tensor       # (n, W) the position in each slot; some position or other where `valid` is False
    valid: Tensor       # (n, W) bool


def pad(layout: Layout, groups: list[Tensor]) -> list[Padded]:
    """The rows of groups of samples, as wide as the longest of a group, rounded up. A group is (n,) sample
    numbers; the positions of a sample need not be contiguous (a KV cache appends)."""
    counts = torch.bincount(layout.sample, minlength=layout.task.numel())            # (S,)
    order = torch.argsort(layout.sample, stable=True)                                # (L,), sample by sample
    starts, rows = counts.cumsum(0) - counts, []                                     # (S,)
    for group in groups:
        width = -(-int(counts[group].max()) // 8) * 8 if len(group) else 0           # W, whole vectors
        slot = torch.arange(width, device=order.device)
        slot, valid = starts[group, None] + slot, slot < counts[group, None]         # (n, W)
        rows.append(Padded(order[torch.where(valid, slot, 0)], valid))
    return rows


def padded_mask(q: Layout, k: Layout, q_rows: Padded, k_rows: Padded, rules: Tensor = RULES) -> Tensor:
    """The mask of every sample of one group by itself: bool (n, Wq, Wk), False at padding."""
    s_i, b_i = q.segment[q_rows.index], q.block[q_rows.index].int()                  # (n, Wq)
    s_j, b_j = k.segment[k_rows.index], k.block[k_rows.index].int()                  # (n, Wk)
    rule = rules.to(s_i.device)[q.task[q.sample[q_rows.index]], s_i]                 # (n, Wq, segment types)
    relation = rule.gather(2, s_j[:, None].expand(-1, s_i.shape[1], -1))             # (n, Wq, Wk)
    mask = holds(relation, b_i[:, :, None], b_j[:, None, :])
    return mask & q_rows.valid[:, :, None] & k_rows.valid[:, None, :]


def draw(layout: Layout, cell: int = 10):
    """The mask as a PIL image in the style of the blog's Figure 2: rows are queries, columns keys, red is
    allowed, gray masked; strips on top and left show the segment (green P, blue C, orange I, purple N)."""
    from PIL import Image
    colors = np.array([(80, 170, 90), (70, 120, 200), (240, 150, 50), (150, 90, 190)], np.uint8)
    strip, mask = colors[layout.segment.cpu()], dense(layout, layout).cpu().numpy()
    body = np.where(mask[..., None], (215, 60, 50), (225, 225, 225)).astype(np.uint8)
    picture = np.full((len(layout) + 2,) * 2 + (3,), 255, np.uint8)
    picture[0, 2:], picture[2:, 0], picture[2:, 2:] = strip, strip, body
    picture = picture.repeat(cell, 0).repeat(cell, 1)
    picture[cell * 2::cell, cell * 2:], picture[cell * 2:, cell * 2::cell] = 255, 255        # grid lines
    return Image.fromarray(picture)


def main() -> None:
    from PIL import Image
    examples = {"t2t": Sample(T2T, clean=6, noisy=6), "t2i": Sample(T2I, clean=4, image=(2, 3), noisy=4),
                "it2t": Sample(IT2T, prompt=3, image=(2, 2), clean=4, noisy=4, start=3)}
    pictures = []
    for name, sample in examples.items():
        layout = pack([sample], block_len=2)
        mask = dense(layout, layout)
        print(f"{name}: {len(layout)} positions in blocks of 2, {int(mask.sum())} of {mask.numel()} pairs "
              "allowed (rows are queries, columns keys, # allowed)")
        print("   " + "".join(SEGMENTS[s] for s in layout.segment))
        for i, row in enumerate(mask):
            print(f" {SEGMENTS[layout.segment[i]]} " + "".join("#" if m else "." for m in row))
        pictures.append(draw(layout))
    size = sum(p.width for p in pictures) + 40, max(p.height for p in pictures)
    canvas = Image.new("RGB", size, "white")
    for i, p in enumerate(pictures):
        canvas.paste(p, (sum(x.width for x in pictures[:i]) + 20 * i, 0))
    canvas.save("masks.png")
    both = pack(list(examples.values()), block_len=2)
    cross = dense(both, both) & (both.sample[:, None] != both.sample[None, :])
    print(f"packed together: {len(both)} positions, {int(cross.sum())} pairs cross a sample (expect 0); "
          "masks.png drawn")


if __name__ == "__main__":
    main()
