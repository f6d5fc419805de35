"""pytest tests/test_masks.py"""
import re

import numpy as np
import pytest
import torch

import cuda_attention
import masks
from cuda_attention import attention, choose, make_plan, padded
from masks import II, IT2T, T2I, T2T, VID, C, I, J, N, P, Sample, pack


def allowed(task, s_i, s_j, b_i, b_j):
    """The blog's cases, literally, and those of images in sequence."""
    if task in (II, VID):
        if s_i == P:
            return s_j == P and b_j <= b_i or s_j == I and b_j < b_i
        if s_i == I:
            return s_j == I and b_j <= b_i
        text = s_j == P and (b_j <= b_i if task == VID else b_j == b_i)
        return s_i == J and (text or s_j == I and b_j < b_i or s_j == J and b_j == b_i)
    if task in (T2T, T2I):
        if s_i == C:
            return s_j == C and b_j <= b_i
        if s_i == I:
            return s_j in (C, I) if task == T2I else False
        return s_i == N and ((s_j == C and b_j < b_i) or (s_j == N and b_j == b_i))
    if s_i in (P, I):
        return s_j in (P, I)
    if s_i == C:
        return (s_j == C and b_j <= b_i) or s_j in (P, I)
    return (s_j == C and b_j < b_i) or (s_j == N and b_j == b_i) or s_j in (P, I)


def random_samples(g, count, most=8, side=4):
    """Samples of every task and of lengths below `most`, some segments empty."""
    draw = lambda high: int(torch.randint(0, high, (), generator=g))
    out = []
    for _ in range(count):
        task, clean, image = draw(3), draw(most), (draw(side), draw(side + 1))
        noisy, prompt = draw(2) * clean, draw(20) if task == IT2T else 0
        image = (0, 0) if task == T2T else image
        skip = draw(2) * (noisy // 2)
        out.append(Sample(task, prompt, image, clean, noisy, prompt, skip=skip))
    return out


def series(task, turns=3):
    """A series of images with a text each, all of them drawn."""
    return [Sample(task, 2, (1, 2), turn=turn, drawn=(1, 2)) for turn in range(turns)]


def generator(seed):
    return torch.Generator().manual_seed(seed)


def brute_force(q, k):
    places = [[*zip(x.sample.tolist(), x.segment.tolist(), x.block.tolist())] for x in (q, k)]
    return torch.tensor([[s == t and allowed(int(q.task[s]), s_i, s_j, b_i, b_j)
                          for t, s_j, b_j in places[1]] for s, s_i, b_i in places[0]])

# ---- The mask ----------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("block_len", [1, 2, 3])
def test_dense_against_loops(seed, block_len):
    every = [Sample(T2T, clean=5, noisy=5), Sample(T2I, image=(2, 2), clean=5, noisy=5),
             Sample(IT2T, 2, (2, 2), 5, 5, start=2), Sample(T2T, noisy=5), series(II), series(VID)]
    layout = pack(random_samples(generator(seed), 5) + every, block_len)
    assert torch.equal(masks.dense(layout, layout), brute_force(layout, layout))


def test_blog_example_and_its_picture():
    layout = pack([Sample(T2I, clean=2, image=(1, 1), noisy=2)], 1)
    want = ["#....",        # c0
            "##...",        # c1
            "###..",        # image: the caption and itself
            "...#.",        # n0: itself, as no block lies before block 0
            "#...#"]        # n1: c0 and itself
    assert ["".join(".#"[int(m)] for m in row) for row in masks.dense(layout, layout)] == want
    centers = np.asarray(masks.draw(layout, cell=10)).astype(int)[25::10, 25::10]
    is_red = centers[..., 0] > centers[..., 1] + 50
    assert ["".join(".#"[int(m)] for m in row) for row in is_red] == want


def test_a_new_task_needs_only_a_table():
    """A text N that sees an image I and a prompt P, which do not see it."""
    a, e, row = masks.ALWAYS, masks.EQ, [0] * 5
    table = torch.tensor([[a, 0, a, 0, 0], row, [a, 0, a, 0, 0], [a, 0, a, e, 0], row]).byte()
    rules = torch.cat([masks.RULES, table[None]])
    edit = Sample(len(masks.TASKS), prompt=2, image=(2, 2), noisy=4)
    layout = pack([edit, Sample(T2I, clean=2, image=(1, 2), noisy=2)], 4)
    mask = masks.dense(layout, layout, rules)
    first = layout.sample == 0
    noisy = first & (layout.segment == N)
    assert mask[noisy][:, first].all() and not mask[first & ~noisy][:, noisy].any()
    assert not mask[first][:, ~first].any()
    q, k, v = (torch.randn(len(layout), 1, 8, dtype=torch.float64) for _ in range(3))
    plan = make_plan(layout, rules=rules)
    want = attention(q, k, v, plan, "reference")
    for backend in ("padded", "flex", "cuda"):
        torch.testing.assert_close(attention(q, k, v, plan, backend), want)

# ---- Packing -----------------------------------------------------------------------------------

def test_pack_lays_out_segments_blocks_and_coordinates():
    answer = Sample(IT2T, prompt=2, image=(2, 2), clean=3, noisy=3, start=2)
    layout = pack([answer, Sample(T2I, image=(1, 3))], 2)
    assert "".join(masks.SEGMENTS[s] for s in layout.segment) == "PPIIIICCCNNNIII"
    assert layout.block.tolist() == [0] * 6 + [0, 0, 1] * 2 + [0] * 3
    assert layout.row.tolist() == [0, 1, 0, 0, 1, 1, 2, 3, 4, 2, 3, 4, 0, 0, 0]
    assert layout.col.tolist() == [0, 1, 0, 1, 0, 1, 2, 3, 4, 2, 3, 4, 0, 1, 2]
    assert layout.sample.tolist() == [0] * 12 + [1] * 3 and layout.task.tolist() == [IT2T, T2I]
    one_block = pack([Sample(T2T, noisy=2, first=4, start=1)], 2)
    assert one_block.block.tolist() == [2, 2] and one_block.row.tolist() == [5, 6]
    skipped = pack([Sample(T2T, clean=1, noisy=5, skip=3)], 2)
    assert skipped.block.tolist() == [0, 1, 2] and skipped.row.tolist() == [0, 3, 4]
    assert len(pack([], 4)) == 0


def test_turns_are_blocks_of_one_sample():
    layout = pack([Sample(T2I, image=(1, 1)), series(II, 2)], 1)
    assert "".join(masks.SEGMENTS[s] for s in layout.segment) == "I" + "PPJJII" * 2
    assert layout.sample.tolist() == [0] + [1] * 12 and layout.task.tolist() == [T2I, II]
    assert layout.block.tolist() == [0] + [0] * 6 + [1] * 6
    assert layout.row.tolist() == [0] + [0, 1, 0, 0, 0, 0] * 2
    assert layout.col.tolist() == [0] + [0, 1, 0, 1, 0, 1] * 2


@pytest.mark.parametrize("task", [II, VID])
def test_no_image_learns_of_itself_or_of_later_ones_through_any_layers(task):
    layout = pack([series(task, 4)], 1)
    sees = masks.dense(layout, layout).float()
    reaches = torch.linalg.matrix_power(sees + torch.eye(len(layout)), 8) > 0
    for turn in range(4):
        drawn = (layout.segment == J) & (layout.block == turn)
        reached, found = reaches[drawn].any(0), set()
        for s, b in zip(layout.segment[reached].tolist(), layout.block[reached].tolist()):
            found.add((masks.SEGMENTS[s], b))
        texts = {("P", b) for b in range(turn + 1)}
        assert found == {("J", turn)} | texts | {("I", b) for b in range(turn)}
    rules = masks.RULES.clone()
    rules[II, I, P] = masks.ALWAYS         # an image that saw all instructions would tell of later
    sees = masks.dense(layout, layout, rules).float()
    reaches = torch.linalg.matrix_power(sees + torch.eye(len(layout)), 8) > 0
    leaks = reaches[(layout.segment == J) & (layout.block == 1)][:, layout.block > 1].any()
    assert leaks == (task == II)


def test_concat_and_repeat():
    a, b = pack([Sample(T2T, clean=2)], 1), pack([Sample(T2T, clean=1), Sample(T2I, clean=2)], 1)
    joined, again = masks.concat(a, b), masks.repeat(b, 2)
    assert joined.sample.tolist() == [0, 0, 0, 1, 1] and joined.task.tolist() == [T2T, T2I]
    assert again.sample.tolist() == [0, 1, 1, 2, 3, 3] and again.row.tolist() == [0, 0, 1] * 2
    assert again.task.tolist() == [T2T, T2I] * 2

# ---- Attention ---------------------------------------------------------------------------------

def loop_attention(q, k, v, plan):
    """A loop over queries; 0 for one without keys."""
    rows = []
    for q_i, visible in zip(q, brute_force(plan.q, plan.k)):
        s = torch.einsum("hd,jhd->hj", q_i, k[visible]) / q.shape[-1] ** 0.5
        rows.append(torch.einsum("hj,jhd->hd", s.softmax(-1), v[visible]))
    return torch.stack(rows)


@pytest.mark.parametrize("backend", ["reference", "padded", "fused", "flex", "cuda"])
@pytest.mark.parametrize("seed", range(4))
def test_attention_against_loops(backend, seed, monkeypatch):
    """Outputs and gradients in fp64, outputs in fp32, of queries and keys in any order.

    "fused" is padded with long rows."""
    monkeypatch.setattr(padded, "GROUP_STEP", 4)                             # several groups
    if backend == "fused":
        monkeypatch.setattr(padded, "SHORT", 0)
        backend = "padded"
    g = generator(seed)
    layout = pack(random_samples(g, 5), 2)
    assert len(make_plan(layout).rows.mask) > 1
    order = torch.randperm(len(layout), generator=g)
    some, others = order[::2], order[layout.sample[order] != 1][::2]         # some without keys
    some, others = layout.select(some), layout.select(others)
    for plan in (make_plan(layout), make_plan(some, layout), make_plan(layout, others)):
        q, k, v = (torch.randn(n, 2, 8, generator=g, dtype=torch.float64, requires_grad=True)
                   for n in (len(plan.q), len(plan.k), len(plan.k)))
        want = loop_attention(q, k, v, plan)
        flex = backend == "flex"                                 # without gradients on a CPU
        got = attention(*(x.detach() if flex else x for x in (q, k, v)), plan, backend)
        torch.testing.assert_close(got, want, atol=1e-10, rtol=0)
        if flex:
            continue
        upstream = torch.randn(want.shape, generator=g, dtype=torch.float64)
        grads = (torch.autograd.grad(o, (q, k, v), upstream) for o in (got, want))
        for a, b in zip(*grads):
            torch.testing.assert_close(a, b, atol=1e-10, rtol=0)
        single = attention(*(x.detach().float() for x in (q, k, v)), plan, backend)
        torch.testing.assert_close(single.double(), want, atol=1e-5, rtol=0)


def test_a_plan_is_linear_in_the_number_of_samples():
    def numbers(count):
        rows = make_plan(pack([Sample(T2I, clean=8, image=(4, 4), noisy=8)] * count, 8)).rows
        tensors = (*rows.mask, *rows.bias, rows.q_index, rows.k_index, rows.inverse)
        return sum(x.numel() for x in tensors)
    assert numbers(64) == 4 * numbers(16)


def test_mistakes_are_named():
    layout = pack([Sample(T2T, clean=4)], 2)
    plan, x = make_plan(layout), torch.zeros(4, 2, 8)
    with pytest.raises(ValueError, match="backend 'fast'"):
        attention(x, x, x, plan, "fast")
    for q, k, v in ((x[:3], x, x), (x, x[:, :1], x), (x, x, x[..., :4]), (x[0], x, x),
                    (x, x.double(), x)):
        with pytest.raises(ValueError, match="expected one type"):
            attention(q, k, v, plan)
    for other in ([Sample(T2T, clean=4)] * 2, [Sample(T2I, clean=4)]):
        with pytest.raises(ValueError, match="same samples"):
            make_plan(layout, pack(other, 2))


def test_set_backend_falls_back_to_padded(monkeypatch):
    monkeypatch.setattr(cuda_attention, "default_backend", "auto")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert "padded" in cuda_attention.set_backend("auto", cpu)
    assert "reference" in cuda_attention.set_backend("reference", cpu)
    assert cuda_attention.default_backend == "reference"
    monkeypatch.setattr(cuda_attention.ops, "library", lambda capability: None)
    cuda_attention.set_backend("cuda", gpu)
    assert cuda_attention.default_backend == "cuda"

    def broken(capability):
        raise RuntimeError("no nvcc")
    monkeypatch.setattr(cuda_attention.ops, "library", broken)
    assert "no nvcc" in cuda_attention.set_backend("cuda", gpu)
    assert cuda_attention.default_backend == "padded"


# ---- The choice of auto ------------------------------------------------------------------------

def test_auto_takes_the_fastest_right_backend(monkeypatch):
    """On a CPU, with stand-ins: flex cannot be built, another has wrong outputs or gradients."""
    real, layout = cuda_attention.attention, pack([Sample(T2T, clean=6, noisy=6)], 2)

    def stand_in(q, k, v, plan, backend):
        if backend == "flex":
            raise RuntimeError("no compiler\nand more lines")
        o = real(q, k, v, plan, "reference" if backend == "reference" else "padded")
        extra = 0.1 * o if backend == wrong else 0 * o
        return o + (extra if what == "o" else extra - extra.detach())
    monkeypatch.setattr(cuda_attention, "attention", stand_in)
    monkeypatch.setattr(choose, "milliseconds", lambda name, *_: {"cuda": 1.0}.get(name, 2.0))
    for bf16, what in ((False, "o"), (True, "o"), (False, "dq"), (True, "dq")):
        for wrong, taken in (("cuda", "padded"), ("padded", "cuda"), ("none", "cuda")):
            best, line = choose.choose(layout, 2, 64, 4, bf16)
            assert best == taken and line.endswith(f"taken: {taken}") and "\n" not in line
            assert "flex left out (no compiler)" in line
            assert (f"{wrong} left out (its {what} is wrong by" in line) == (wrong != "none")
    monkeypatch.setattr(cuda_attention.ops, "supports", lambda q, k: False)
    assert "cuda left out (no kernels for heads of 16 in torch.float32)" in choose.choose(
        layout, 2, 16, 4, False)[1]


def test_auto_times_the_real_backends():
    """flex has no gradients on a CPU."""
    layout = pack([Sample(T2T, clean=6, noisy=6)] * 2, 2)
    best, line = choose.choose(layout, 2, 16, 2, False)
    assert re.fullmatch(r"attention: cuda [\d.]+ ms, flex left out \(.+\), padded [\d.]+ ms; "
                        f"taken: {best}", line), line


def test_samples_without_queries_have_no_rows():
    q, k = (pack([Sample(T2T, **x) for x in kind], 2)
            for kind in ([{}, {"noisy": 2}, {}], [{"clean": 4}, {"clean": 4, "noisy": 2}, {}]))
    rows = make_plan(q, k).rows
    assert [m.shape for m in rows.mask] == [(1, 1, 2, 6)]
    x = torch.randn(len(k), 2, 16)
    inputs = torch.randn(2, 2, 16), x, x
    close = torch.testing.assert_close
    close(attention(*inputs, make_plan(q, k), "padded"), attention(*inputs, make_plan(q, k),
                                                                  "reference"))
