"""pytest tests/test_mmdit.py"""
import pytest
import torch

import masks
import mmdit
from cuda_attention import make_plan
from masks import IT2T, T2I, T2T, Sample, pack
from mmdit import Cache, MMDiT, MMDiTConfig

CONFIG = dict(text_channels=6, image_channels=5, width=32, layers=2, heads=2, head_dim=16,
              rope_dim=12, emb_dim=24)
EXAMPLES = [Sample(T2T, clean=7, noisy=7), Sample(T2I, clean=5, image=(2, 3), noisy=5),
            Sample(IT2T, prompt=3, image=(3, 2), clean=6, noisy=6, start=3)]
DUAL = pytest.mark.parametrize("dual_layers", [0, 1, 2])


def random_model(**changes) -> MMDiT:
    torch.manual_seed(0)
    model = MMDiT(MMDiTConfig(**CONFIG | changes))
    for p in model.parameters():                           # zeros and ones could hide a mistake
        p.data.normal_(std=0.2)
    return model


def inputs(layout, seed=1):
    g = torch.Generator().manual_seed(seed)
    images = int((layout.segment == masks.I).sum())
    text = torch.randn(len(layout) - images, 6, generator=g)
    image = torch.randn(images, 5, generator=g)
    return text, image, torch.tensor([0.0, 0.3, 0.8]), torch.tensor([0, 0, 2, 1])[layout.segment]


# ---- Parts -------------------------------------------------------------------------------------

def test_rope_turns_pairs_as_complex_numbers():
    layout = pack([Sample(T2I, clean=4, image=(3, 4))], 2)
    x = torch.randn(len(layout), 2, 16)
    y = mmdit.apply_rope(x, mmdit.rope_angles(layout, 12))
    for n in range(len(layout)):
        for i in range(6):
            angle = int(layout.row[n] if i % 2 == 0 else layout.col[n]) * 10000.0 ** (-2 * i / 12)
            turn = torch.polar(torch.tensor(1.0), torch.tensor(angle))
            want = torch.complex(x[n, :, 2 * i], x[n, :, 2 * i + 1]) * turn
            torch.testing.assert_close(torch.complex(y[n, :, 2 * i], y[n, :, 2 * i + 1]), want)
    assert torch.equal(y[..., 12:], x[..., 12:])


def test_time_embedding():
    e = mmdit.timestep_embedding(torch.tensor([0.25]))[0]
    for i in (0, 5, 127):
        angle = torch.tensor(250.0 * 10000 ** (-i / 128))
        torch.testing.assert_close(e[i], angle.sin(), atol=2e-5, rtol=0)
        torch.testing.assert_close(e[128 + i], angle.cos(), atol=2e-5, rtol=0)


def test_starts_as_zero_and_resets_by_name():
    model, layout = MMDiT(MMDiTConfig(**CONFIG)), pack(EXAMPLES, 2)
    v_text, v_image, _ = model(*inputs(layout), layout, make_plan(layout))
    assert not v_text.any() and not v_image.any()
    for ones in (model.blocks[0].ada_msa_out.bias, model.blocks[0].msa.norm_q.weight):
        assert (ones == 1).all()
    model = random_model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    fresh = {name for name in before if name.startswith("image")}
    model.reset_parameters(fresh)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == fresh


def test_refuses_bad_configs():
    with pytest.raises(ValueError, match="rope_dim 13"):
        MMDiTConfig(rope_dim=13)
    with pytest.raises(ValueError, match="dual_layers 5"):
        MMDiTConfig(dual_layers=5)


@pytest.mark.parametrize("as_released", [False, True])
def test_the_size_of_the_time_embedding_matters_to_the_release_alone(as_released):
    model, layout = random_model(as_released=as_released), pack(EXAMPLES, 4)
    with torch.no_grad():
        before = model(*inputs(layout), layout, make_plan(layout))[0]
        for p in model.time_embedding.proj_out.parameters():
            p.mul_(3.0)
        moved = (model(*inputs(layout), layout, make_plan(layout))[0] - before).abs().max()
    assert moved > 0.1 if as_released else moved < 1e-3


# ---- The stack ---------------------------------------------------------------------------------

def test_dual_layers_with_equal_weights_are_single_layers():
    layout = pack(EXAMPLES, 2)
    single, dual = random_model(dual_layers=0), random_model(dual_layers=2)
    missing, _ = dual.load_state_dict(single.state_dict(), strict=False)
    assert missing and all(name.startswith("image_blocks.") for name in missing)
    dual.image_blocks.load_state_dict(single.blocks.state_dict())
    with torch.no_grad():
        want, got = (m(*inputs(layout), layout, make_plan(layout), tap=0) for m in (single, dual))
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        for p in dual.image_blocks.parameters():           # the image's own weights are used
            p.mul_(1.5)
        assert not torch.allclose(dual(*inputs(layout), layout, make_plan(layout))[1], want[1])


@DUAL
def test_every_block_has_a_gradient_without_text_or_without_images(dual_layers):
    """FSDP needs a gradient of zeros, not None, from a worker whose samples lack a modality."""
    model = random_model(dual_layers=dual_layers)
    for samples, unused in ((EXAMPLES[:1], model.image_blocks),
                            ([Sample(T2I, image=(2, 2))], model.blocks[:dual_layers])):
        model.zero_grad()
        layout = pack(samples, 2)
        v_text, v_image, _ = model(*inputs(layout), layout, make_plan(layout))
        assert (v_image is None) == (samples == EXAMPLES[:1])
        (v_text if v_image is None else v_image).square().sum().backward()
        for p in (*model.blocks.parameters(), *model.image_blocks.parameters()):
            assert p.grad is not None
        assert not any(p.grad.any() for p in unused.parameters())


def test_a_text_only_model():
    model, layout = random_model(image_channels=0), pack(EXAMPLES[:1], 2)
    assert len(model.image_blocks) == 0 and not hasattr(model, "image_in")
    text, _, t, t_index = inputs(layout)
    v_text, v_image, _ = model(text, None, t, t_index, layout, make_plan(layout))
    assert v_text.shape == text.shape and v_image is None


@DUAL
@pytest.mark.parametrize("sample", EXAMPLES, ids=masks.TASKS)
def test_nothing_leaks(sample, dual_layers):
    """Outputs with no path of layers from a changed position keep their bits; others move."""
    model, layout = random_model(dual_layers=dual_layers), pack([EXAMPLES[0], sample], block_len=2)
    text, image, t, t_index = inputs(layout)
    is_image, plan = layout.segment == masks.I, make_plan(layout)
    reach = (masks.dense(layout, layout) | torch.eye(len(layout), dtype=torch.bool)).float()
    for _ in range(3):
        reach = ((reach @ reach) > 0).float()
    with torch.no_grad():
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


@DUAL
def test_packing_changes_nothing(dual_layers):
    model, together = random_model(dual_layers=dual_layers), pack(EXAMPLES, block_len=2)
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


@DUAL
def test_cache_equals_the_whole_pass(dual_layers):
    """P and I, then clean blocks one at a time, then a noisy block: the velocity of one pass."""
    model = random_model(dual_layers=dual_layers)
    answer = Sample(IT2T, prompt=3, image=(2, 2), clean=4, noisy=6, start=3)
    full = pack([answer, Sample(T2I, clean=4, image=(2, 2))], 2)
    text, image, t, t_index = inputs(full)
    is_image, clean, cache = full.segment == masks.I, full.segment == masks.C, Cache()
    with torch.no_grad():
        v_text, v_image, _ = model(text, image, t, t_index, full, make_plan(full))
        first = (full.sample == 0) & ((full.segment == masks.P) | is_image)
        for chosen in (first, clean & (full.block == 0), clean & (full.block == 1)):
            part, latents = full.select(chosen), (text[chosen[~is_image]], image[chosen[is_image]])
            keys = part if cache.layout is None else masks.concat(cache.layout, part)
            plan = make_plan(part, keys)
            out = model(*latents, t, t_index[chosen], part, plan, cache, commit=True)
            assert out == (None, None, None)
        queries = (full.segment == masks.N) & (full.block == 2) | is_image & (full.sample == 1)
        part, size = full.select(queries), len(cache.kv[0][0])
        got = model(text[queries[~is_image]], image[queries[is_image]], t, t_index[queries], part,
                    make_plan(part, masks.concat(cache.layout, part)), cache)
    assert len(cache.layout) == size == len(cache.kv[1][0])          # only commit adds to the cache
    torch.testing.assert_close(got[0], v_text[queries[~is_image]], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got[1], v_image[queries[is_image]], atol=1e-5, rtol=1e-5)


@DUAL
def test_targets_are_what_the_whole_pass_gives_there(dual_layers):
    model, layout = random_model(dual_layers=dual_layers), pack(EXAMPLES, 2)
    text, image, t, t_index = inputs(layout)
    chosen = (t_index > 0) & (torch.arange(len(layout)) % 5 != 0)
    is_image, plan, index = layout.segment == masks.I, make_plan(layout), chosen.nonzero()[:, 0]
    targets = index, make_plan(layout.select(index), layout)
    with torch.no_grad():
        whole = model(text, image, t, t_index, layout, plan, tap=0)
        some = model(text, image, t, t_index, layout, plan, targets=targets, tap=0)
    torch.testing.assert_close(some[0], whole[0][chosen[~is_image]], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(some[1], whole[1][chosen[is_image]], atol=1e-5, rtol=1e-5)
    assert torch.equal(some[2], whole[2]) and whole[2].shape == (len(layout), 32)
