"""pytest tests/test_masks.py: the rules against the blog's cases, written out as a triple loop."""
import numpy as np
import pytest
import torch

import cuda_attention
import masks
from cuda_attention import attention, make_plan
from masks import C, I, IT2T, N, P, T2I, T2T, Sample, pack


def allowed(task, s_i, s_j, b_i, b_j):
    """The blog's cases, literally."""
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


def random_samples(seed, count=5, tasks=(T2T, T2I, IT2T)):
    g, samples = np.random.default_rng(seed), []
    for _ in range(count):
        task, n = int(g.choice(tasks)), int(g.integers(0, 8))
        samples.append(Sample(task, int(g.integers(0, 4)) if task == IT2T else 0,
                              tuple(int(x) for x in g.integers(1, 4, 2)) if task != T2T else (0, 0),
                              n * int(g.random() < 0.8), n, start=int(g.integers(0, 3))))
    return samples


def brute_force(q, k):
    want = torch.zeros(len(q), len(k), dtype=torch.bool)
    for i in range(len(q)):
        for j in range(len(k)):
            if q.sample[i] == k.sample[j]:
                case = q.task[q.sample[i]], q.segment[i], k.segment[j], q.block[i], k.block[j]
                want[i, j] = allowed(*(int(x) for x in case))
    return want


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("block_len", [1, 2, 3])
def test_dense_against_loops(seed, block_len):
    layout = pack(random_samples(seed), block_len)
    assert torch.equal(masks.dense(layout, layout), brute_force(layout, layout))


@pytest.mark.parametrize("task", [T2T, T2I, IT2T], ids=masks.TASKS)
def test_each_task_alone_against_loops(task):
    every = Sample(task, 2 * (task == IT2T), (2, 2) if task != T2T else (0, 0), 5, 5)
    layout = pack(random_samples(3, 4, (task,)) + [every], 2)
    assert torch.equal(masks.dense(layout, layout), brute_force(layout, layout))


def test_blog_example_by_hand():
    layout = pack([Sample(T2I, clean=2, image=(1, 1), noisy=2)], 1)
    want = ["#....",        # c0
            "##...",        # c1
            "###..",        # image: the caption and itself
            "...#.",        # n0: itself, as nothing lies before block 0
            "#...#"]        # n1: c0 and itself
    assert ["".join(".#"[int(m)] for m in row) for row in masks.dense(layout, layout)] == want


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
    assert len(pack([], 4)) == 0


def test_text_layout_is_strictly_causal_at_block_len_1():
    layout = masks.text_layout([3, 2], 1)
    want = torch.block_diag(torch.ones(3, 3).tril(), torch.ones(2, 2).tril()).bool()
    assert torch.equal(masks.dense(layout, layout), want)


@pytest.mark.parametrize("seed", range(4))
def test_padded_view_is_the_dense_mask(seed):
    layout = pack(random_samples(seed), 2)
    shuffled = layout.select(torch.from_numpy(np.random.default_rng(seed).permutation(len(layout))))
    for q, k in ((layout, layout), (layout, shuffled), (shuffled, layout)):
        groups = [torch.tensor(g) for g in ([1, 4], [0], [3, 2])]
        dense = torch.zeros(len(q), len(k), dtype=torch.bool)
        for q_rows, k_rows, group in zip(masks.pad(q, groups), masks.pad(k, groups), groups):
            lengths = torch.bincount(q.sample, minlength=5)[group]
            assert torch.equal(q_rows.valid.sum(1), lengths) and 0 <= q_rows.valid.shape[1] - lengths.max() < 8
            for s, i, j in masks.padded_mask(q, k, q_rows, k_rows).nonzero().tolist():
                dense[q_rows.index[s, i], k_rows.index[s, j]] = True
        assert torch.equal(dense, masks.dense(q, k))


@pytest.mark.parametrize("backend", ["reference", "padded", "flex", "cuda"])
@pytest.mark.parametrize("seed", range(4))
def test_attention_against_fp64(backend, seed, monkeypatch):
    monkeypatch.setattr(cuda_attention, "ROW", 4)                # several groups of rows
    layout = pack(random_samples(seed), 2)
    assert len(make_plan(layout).rows.mask) > 1
    chosen = torch.arange(len(layout)) % 3 != 0
    for q_layout, k_layout in ((layout, None), (layout.select(chosen), layout), (layout, layout.select(layout.sample != 1))):
        plan = make_plan(q_layout, k_layout)
        g = torch.Generator().manual_seed(seed)
        q, k, v = (torch.randn(n, 2, 8, generator=g, dtype=torch.float64, requires_grad=True)
                   for n in (len(plan.q), len(plan.k), len(plan.k)))
        rows = []
        for q_i, sees in zip(q, brute_force(plan.q, plan.k)):
            s = torch.einsum("hd,jhd->hj", q_i, k[sees]) / 8 ** 0.5
            rows.append(torch.einsum("hj,jhd->hd", s.softmax(-1), v[sees]))          # 0 where it sees nothing
        want = torch.stack(rows)
        flex = backend == "flex"                                 # on a CPU it has no backward pass
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


def test_long_rows_take_the_fused_kernel_and_agree(monkeypatch):
    layout = pack(random_samples(1), 2)
    plan = make_plan(layout)
    q, k, v = (torch.randn(len(layout), 2, 8) for _ in range(3))
    short = attention(q, k, v, plan, "padded")
    monkeypatch.setattr(cuda_attention, "SHORT", 0)
    monkeypatch.setattr(cuda_attention, "ROW", 4)
    plan = make_plan(layout)
    torch.testing.assert_close(attention(q, k, v, plan, "padded"), short, atol=1e-5, rtol=0)


def test_a_made_up_task_needs_only_a_table():
    """Image editing, say: the new image N sees the old image I and the instruction P, and nothing sees N."""
    a, e = masks.ALWAYS, masks.EQ
    table = torch.tensor([[a, 0, a, 0], [0, 0, 0, 0], [a, 0, a, 0], [a, 0, a, e]], dtype=torch.uint8)
    rules = torch.cat([masks.RULES, table[None]])
    edit = Sample(3, prompt=2, image=(2, 2), noisy=4)
    layout = pack([edit, Sample(T2I, clean=2, image=(1, 2), noisy=2)], 4)
    mask = masks.dense(layout, layout, rules)
    mine = layout.sample == 0
    noisy = mine & (layout.segment == N)
    assert mask[noisy][:, mine].all() and not mask[mine & ~noisy][:, noisy].any()
    assert not mask[mine][:, ~mine].any()
    q, k, v = (torch.randn(len(layout), 1, 8, dtype=torch.float64) for _ in range(3))
    plan = make_plan(layout, rules=rules)
    for backend in ("padded", "flex", "cuda"):
        torch.testing.assert_close(attention(q, k, v, plan, backend), attention(q, k, v, plan, "reference"))


def test_no_square_array_on_the_fast_path():
    """Memory of a plan is linear in the number of samples."""
    def numbers(count):
        plan = make_plan(pack([Sample(T2I, clean=8, image=(4, 4), noisy=8)] * count, 8))
        rows = plan.rows
        return sum(x.numel() for x in (*rows.mask, *rows.bias, rows.q_index, rows.k_index, rows.inverse))
    assert numbers(64) == 4 * numbers(16)


def test_bad_input_is_named():
    layout = pack([Sample(T2T, clean=4)], 2)
    plan, x = make_plan(layout), torch.zeros(4, 2, 8)
    with pytest.raises(ValueError, match="backend 'fast'"):
        attention(x, x, x, plan, "fast")
    with pytest.raises(ValueError, match="3 and k 4 positions"):
        attention(x[:3], x, x, plan)
    with pytest.raises(ValueError, match="expected"):
        attention(x, x[:, :1], x, plan)
    for other in ([Sample(T2T, clean=4)] * 2, [Sample(T2I, clean=4)]):
        with pytest.raises(ValueError, match="share their samples"):
            make_plan(layout, pack(other, 2))
    with pytest.raises(ValueError, match=r"rules \(3, 4, 4\) of torch.float32"):
        make_plan(layout, rules=masks.RULES.float())
    with pytest.raises(ValueError, match="samples of task 3; rules are of 3 tasks"):
        make_plan(pack([Sample(3, clean=4)], 2))
    for backend in cuda_attention.BACKENDS:
        for word, args in {"k is torch.float64": (x, x.double(), x), "q is torch.int64": [x.long()] * 3, "v is on meta": (x, x, x.to("meta")),
                           "head width": [x[..., :0]] * 3, "2, 8": (x[0], x, x)}.items():
            with pytest.raises(ValueError, match=word):
                attention(*args, plan, backend)


def test_picture():
    layout = pack([Sample(T2I, clean=2, image=(1, 1), noisy=2)], 1)
    picture = np.asarray(masks.draw(layout, cell=10))
    mask = masks.dense(layout, layout)
    for i in range(5):
        for j in range(5):
            r, g, _ = picture[(i + 2) * 10 + 5, (j + 2) * 10 + 5].astype(int)
            assert (r > g + 50) == bool(mask[i, j])


def test_the_choice_of_a_backend_says_why(monkeypatch):
    monkeypatch.setattr(cuda_attention, "chosen", "auto")
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert "fastest on a CPU" in cuda_attention.choose("auto", cpu) and cuda_attention.chosen == "auto"
    assert "as asked for" in cuda_attention.choose("reference", cpu) and cuda_attention.chosen == "reference"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    def broken(capability):
        raise RuntimeError("no nvcc on the path")
    monkeypatch.setattr(cuda_attention.ops, "library", broken)
    line = cuda_attention.choose("cuda", gpu)
    assert "padded" in line and "no nvcc" in line and cuda_attention.chosen == "padded"
    monkeypatch.setattr(cuda_attention.ops, "library", lambda capability: None)
    assert "64 or 128" in cuda_attention.choose("cuda", gpu) and cuda_attention.chosen == "cuda"
