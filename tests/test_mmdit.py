"""pytest tests/test_mmdit.py"""
import json
from pathlib import Path

import pytest
import torch

import masks
import mmdit
from cuda_attention import make_plan
from masks import IT2T, T2I, T2T, Sample, pack
from mmdit import Cache, MMDiT, MMDiTConfig
from text_vae import read_safetensors

TINY = Path(__file__).parent / "official_tiny"
CONFIG = dict(text_channels=6, image_channels=5, width=32, layers=2,
              heads=2, head_dim=16, rope_dim=12, emb_dim=24)


def random_model(**changes) -> MMDiT:
    torch.manual_seed(0)
    model = MMDiT(MMDiTConfig(**(CONFIG | changes)))
    for p in model.parameters():
        p.data.normal_(std=0.2)
    return model.eval()


def inputs(layout, seed=1):
    g = torch.Generator().manual_seed(seed)
    is_image = layout.segment == masks.I
    text = torch.randn(int((~is_image).sum()), 6, generator=g)
    image = torch.randn(int(is_image.sum()), 5, generator=g)
    t = torch.tensor([0.0, 0.3, 0.8])
    t_index = torch.tensor([0, 0, 2, 1])[layout.segment]
    return text, image, t, t_index


EXAMPLES = [Sample(T2T, clean=7, noisy=7), Sample(T2I, clean=5, image=(2, 3), noisy=5),
            Sample(IT2T, prompt=3, image=(3, 2), clean=6, noisy=6, start=3)]


@pytest.mark.parametrize("folder", ["p1", "p2"])
def test_official_tensors(folder):
    config = json.loads((TINY / folder / "cola_dit" / "config.json").read_text())
    model, bl = mmdit.load_official(config, read_safetensors(TINY / folder / "cola_dit"))
    want = read_safetensors(TINY / folder / "expected.safetensors")
    samples = [Sample(T2T, clean=int(n), noisy=int(n)) for n in want["train_len"]]
    layout = pack(samples, bl)
    assert layout.col.tolist() == want["train_pos"].tolist()
    t, index = torch.unique(want["train_timestep"] / 1000, return_inverse=True)
    with torch.no_grad():
        v, none, _ = model(want["train_x"], None, t, index, layout, make_plan(layout))
        assert none is None
        torch.testing.assert_close(v, want["train_v"], atol=1e-4, rtol=0)

        n, m = len(want["gen_prefix"]), len(want["gen_z"])
        prefix, block = pack([Sample(T2T, clean=n)], bl), pack([Sample(T2T, noisy=m, first=n)], bl)
        cache, zeros = Cache(), torch.zeros(n + m, dtype=torch.long)
        plan, keys = make_plan(prefix), masks.concat(prefix, block)
        model(want["gen_prefix"], None, torch.zeros(1), zeros[:n], prefix, plan, cache, commit=True)
        t = torch.tensor([0.7])
        cond = model(want["gen_z"], None, t, zeros[n:], block, make_plan(block, keys), cache)[0]
        torch.testing.assert_close(cond, want["gen_v_cond"], atol=1e-4, rtol=0)
        uncond = model(want["gen_z"], None, t, zeros[n:], block, make_plan(block))[0]
        torch.testing.assert_close(uncond, want["gen_v_uncond"], atol=1e-4, rtol=0)


def test_official_loading_holds_no_copy_and_refuses_misfits():
    config = json.loads((TINY / "p1" / "cola_dit" / "config.json").read_text())
    tensors = read_safetensors(TINY / "p1" / "cola_dit")
    model, _ = mmdit.load_official(config, tensors)
    for name, p in model.state_dict().items():
        assert p.data_ptr() == tensors[name].data_ptr(), name
    with pytest.raises(ValueError, match="txt_in.proj.weight is missing"):
        mmdit.load_official(config, {k: v for k, v in tensors.items() if k != "txt_in.proj.weight"})
    with pytest.raises(ValueError, match="heads"):
        mmdit.load_official({k: v for k, v in config.items() if k != "heads"}, tensors)


@pytest.mark.parametrize("as_released", [False, True])
def test_the_size_of_the_time_embedding_matters_to_the_release_alone(as_released):
    model, layout = random_model(as_released=as_released), pack(EXAMPLES, 4)
    assert (model.place is None) == as_released
    plan, args = make_plan(layout), (*inputs(layout), layout)
    with torch.no_grad():
        before = model(*args, plan)[0]
        for p in model.emb_in.proj_out.parameters():
            p.mul_(3.0)
        moved = (model(*args, plan)[0] - before).abs().max()
    assert moved > 0.1 if as_released else moved < 1e-3


def test_rope_turns_pairs_as_complex_numbers():
    layout = pack([Sample(T2I, clean=4, image=(3, 4))], 2)
    freqs = 10000.0 ** (-torch.arange(0, 12, 2) / 12)
    x = torch.randn(len(layout), 2, 16, dtype=torch.float32)
    y = mmdit.apply_rope(x, mmdit.rope_angles(layout, freqs))
    for n in range(len(layout)):
        for i in range(6):
            place = int(layout.row[n] if i % 2 == 0 else layout.col[n])
            turn = torch.polar(torch.tensor(1.0), place * freqs[i])
            want = torch.complex(x[n, :, 2 * i], x[n, :, 2 * i + 1]) * turn
            torch.testing.assert_close(torch.complex(y[n, :, 2 * i], y[n, :, 2 * i + 1]), want)
    assert torch.equal(y[..., 12:], x[..., 12:])


def test_time_embedding():
    e = mmdit.timestep_embedding(torch.tensor([0.25]))[0]
    for i in (0, 5, 127):
        angle = torch.tensor(250.0 * 10000 ** (-i / 128))
        torch.testing.assert_close(e[i], angle.sin(), atol=2e-5, rtol=0)
        torch.testing.assert_close(e[128 + i], angle.cos(), atol=2e-5, rtol=0)


@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("sample", EXAMPLES, ids=masks.TASKS)
def test_nothing_leaks(sample, streams):
    """Change one position: outputs that no path of layers joins to it stay bit-identical, the others move."""
    model = random_model(streams=streams)
    layout = pack([EXAMPLES[0], sample], block_len=2)
    text, image, t, t_index = inputs(layout)
    is_image = layout.segment == masks.I
    sees = masks.dense(layout, layout) | torch.eye(len(layout), dtype=torch.bool)
    reach = sees.float()
    for _ in range(3):
        reach = ((reach @ reach) > 0).float()
    with torch.no_grad():
        plan = make_plan(layout)
        base = model(text, image, t, t_index, layout, plan)
        for j in range(len(layout)):
            text_j, image_j = text.clone(), image.clone()
            if is_image[j]:
                image_j[int(is_image[:j].sum())] += 3.0
            else:
                text_j[int((~is_image[:j]).sum())] += 3.0
            new = model(text_j, image_j, t, t_index, layout, plan)
            moved = torch.zeros(len(layout), dtype=torch.bool)
            moved[~is_image] = (new[0] != base[0]).any(-1)
            if is_image.any():
                moved[is_image] = (new[1] != base[1]).any(-1)
            assert torch.equal(moved, reach[:, j] > 0), f"position {j}"


@pytest.mark.parametrize("streams", [1, 2])
def test_packing_changes_nothing(streams):
    model = random_model(streams=streams)
    together = pack(EXAMPLES, block_len=2)
    text, image, t, t_index = inputs(together)
    is_image = together.segment == masks.I
    with torch.no_grad():
        v_text, v_image, _ = model(text, image, t, t_index, together, make_plan(together))
        for s, sample in enumerate(EXAMPLES):
            alone, mine = pack([sample], block_len=2), together.sample == s
            text_s, image_s = mine[~is_image], mine[is_image]
            got = model(text[text_s], image[image_s], t, t_index[mine], alone, make_plan(alone))
            torch.testing.assert_close(got[0], v_text[text_s], atol=1e-5, rtol=1e-5)
            if got[1] is not None:
                torch.testing.assert_close(got[1], v_image[image_s], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("streams", [1, 2])
def test_cache_equals_the_whole_pass(streams):
    """P and I, then clean blocks one at a time, then a noisy block: the same velocity as in one pass."""
    model = random_model(streams=streams)
    answer = Sample(IT2T, prompt=3, image=(2, 2), clean=4, noisy=6, start=3)
    full = pack([answer, Sample(T2I, clean=4, image=(2, 2))], 2)
    text, image, t, t_index = inputs(full)
    is_image = full.segment == masks.I
    with torch.no_grad():
        v_text, v_image, _ = model(text, image, t, t_index, full, make_plan(full))
        first = (full.sample == 0) & ((full.segment == masks.P) | is_image)
        queries = (full.segment == masks.N) & (full.block == 2) | is_image & (full.sample == 1)
        clean, cache = full.segment == masks.C, Cache()
        for chosen in (first, clean & (full.block == 0), clean & (full.block == 1)):
            part, latents = full.select(chosen), (text[chosen[~is_image]], image[chosen[is_image]])
            plan = make_plan(part, part if cache.layout is None else masks.concat(cache.layout, part))
            model(*latents, t, t_index[chosen], part, plan, cache, commit=True)
        part = full.select(queries)
        got = model(text[queries[~is_image]], image[queries[is_image]], t, t_index[queries], part,
                    make_plan(part, masks.concat(cache.layout, part)), cache)
    torch.testing.assert_close(got[0], v_text[queries[~is_image]], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got[1], v_image[queries[is_image]], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("streams", [1, 2])
def test_targets_are_what_the_whole_pass_gives_there(streams):
    model, layout = random_model(streams=streams), pack(EXAMPLES, 2)
    text, image, t, t_index = inputs(layout)
    index = ((t_index > 0) & (torch.arange(len(layout)) % 5 != 0)).nonzero()[:, 0]
    chosen = torch.zeros(len(layout), dtype=torch.bool)
    chosen[index] = True
    is_image, plan = layout.segment == masks.I, make_plan(layout)
    with torch.no_grad():
        whole = model(text, image, t, t_index, layout, plan)
        targets = index, make_plan(layout.select(index), layout)
        some = model(text, image, t, t_index, layout, plan, targets=targets)
    torch.testing.assert_close(some[0], whole[0][chosen[~is_image]], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(some[1], whole[1][chosen[is_image]], atol=1e-5, rtol=1e-5)


def test_starts_as_zero_and_refuses_bad_configs():
    model = MMDiT(MMDiTConfig(**CONFIG))
    layout = pack(EXAMPLES, 2)
    v_text, v_image, _ = model(*inputs(layout), layout, make_plan(layout))
    assert not v_text.any() and not v_image.any()
    with pytest.raises(ValueError, match="rope_dim 13"):
        MMDiTConfig(rope_dim=13)
    with pytest.raises(ValueError, match="streams 3"):
        MMDiTConfig(streams=3)
