"""pytest tests/test_mmdit.py"""
import functools

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


def random_model(**changes) -> MMDiT:
    torch.manual_seed(0)
    model = MMDiT(MMDiTConfig(**CONFIG | changes))
    for p in model.parameters():                           # zeros and ones could hide a mistake
        p.data.normal_(std=0.2)
    return model


@pytest.fixture(params=(0, 1, 2))
def model(request):
    """With separate weights for text and image in none, one or both of its layers."""
    return random_model(dual_layers=request.param)


def latents(layout):
    return torch.randn(len(layout), 6, generator=torch.Generator().manual_seed(1))


def run(model, layout, z, plan=None, targets=None, **options):
    """Packed velocities, of all positions or of the targets, and the output of the tapped layer.

    z (L, 6); an image position has five channels, and its last channel is not used."""
    is_image = layout.segment == masks.I
    t, t_index = torch.tensor([0.0, 0.3, 0.8]), torch.tensor([0, 0, 2, 1])[layout.segment]
    plan = make_plan(layout) if plan is None else plan
    v_text, v_image, hidden = model(z[~is_image], z[is_image, :5], t, t_index, layout, plan,
                                    targets=targets, **options)
    if v_text is None:
        return None, None
    is_image = is_image if targets is None else is_image[targets[0]]
    assert (v_image is not None) == is_image.any()
    v = torch.zeros(len(is_image), 6)
    v[~is_image] = v_text
    if v_image is not None:
        v[is_image, :5] = v_image
    return v, hidden


assert_close = functools.partial(torch.testing.assert_close, atol=1e-5, rtol=1e-5)

# ---- Parts -------------------------------------------------------------------------------------

def test_rope_turns_pairs_as_complex_numbers():
    with pytest.raises(ValueError, match="rope_dim 13"):
        MMDiTConfig(rope_dim=13)
    layout = pack([Sample(T2I, clean=4, image=(3, 4))], 2)
    x = torch.randn(len(layout), 2, 16)
    y = mmdit.apply_rope(x, mmdit.rope_rotations(layout, 12))
    for i in range(6):
        angle = (layout.row if i % 2 == 0 else layout.col)[:, None] * 10000.0 ** (-2 * i / 12)
        want = torch.complex(x[..., 2 * i], x[..., 2 * i + 1]) * torch.exp(1j * angle)   # (L, nh)
        torch.testing.assert_close(torch.complex(y[..., 2 * i], y[..., 2 * i + 1]), want)
    assert torch.equal(y[..., 12:], x[..., 12:])


def test_time_embedding():
    angle = 250.0 * 10000 ** (-torch.arange(128) / 128)
    want = torch.cat([angle.sin(), angle.cos()])
    e = mmdit.timestep_embedding(torch.tensor([0.25]))[0]
    torch.testing.assert_close(e, want, atol=2e-5, rtol=0)


def test_starts_as_zero_and_resets_by_name():
    model, layout = MMDiT(MMDiTConfig(**CONFIG)), pack(EXAMPLES, 2)
    assert not run(model, layout, latents(layout))[0].any()
    for ones in (model.blocks[0].ada_msa_out.bias, model.blocks[0].msa.norm_q.weight):
        assert (ones == 1).all()
    model = random_model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    fresh = {name for name in before if name.startswith("image")}
    model.reset_parameters(fresh)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == fresh


@torch.no_grad()
@pytest.mark.parametrize("as_released", [False, True])
def test_the_size_of_the_time_embedding_matters_to_the_release_alone(as_released):
    model, layout = random_model(as_released=as_released), pack(EXAMPLES, 4)
    before = run(model, layout, latents(layout))[0]
    for p in model.time_embedding.proj_out.parameters():
        p.mul_(3.0)
    moved = (run(model, layout, latents(layout))[0] - before).abs().max()
    assert moved > 0.1 if as_released else moved < 1e-3


@torch.no_grad()
def test_neighbors_of_an_image_are_as_far_apart_as_eight_positions_of_a_text():
    """Row 1, column 1 of an image has the sinusoids of position 8 of a text; segments differ."""
    embed = mmdit.PositionEmbedding(32)
    layout = pack([Sample(T2I, clean=9, image=(2, 2))], 1)
    place = embed(layout) - embed.segment(layout.segment)
    text, image = place[layout.segment == masks.C], place[layout.segment == masks.I]
    torch.testing.assert_close(image[[0, 3]], text[[0, 8]])
    assert (image[1] - image[2]).abs().max() > 0.1         # row and column differ


def test_places_begin_with_three_times_the_usual_weights():
    torch.manual_seed(0)
    std = MMDiT(MMDiTConfig()).position.proj.weight.std().item()
    assert std == pytest.approx(3 * 64 ** -0.5, rel=0.05)

# ---- The stack ---------------------------------------------------------------------------------

def test_dual_layers_are_at_most_all():
    assert [MMDiTConfig(layers=n, dual_layers=4).dual_layers for n in (1, 4, 6)] == [1, 4, 4]
    assert MMDiTConfig(image_channels=0, dual_layers=4).dual_layers == 0


@torch.no_grad()
def test_dual_layers_with_equal_weights_are_single_layers():
    layout = pack(EXAMPLES, 2)
    z, single, dual = latents(layout), random_model(dual_layers=0), random_model(dual_layers=2)
    missing, _ = dual.load_state_dict(single.state_dict(), strict=False)
    assert missing and all(name.startswith("image_blocks.") for name in missing)
    dual.image_blocks.load_state_dict(single.blocks.state_dict())
    want = run(single, layout, z, tap=0)
    assert_close(run(dual, layout, z, tap=0), want)
    for p in dual.image_blocks.parameters():               # the image's own weights are used
        p.mul_(1.5)
    is_image = layout.segment == masks.I
    assert not torch.allclose(run(dual, layout, z)[0][is_image], want[0][is_image])


def test_every_block_has_a_gradient_without_text_or_without_images(model):
    """FSDP needs a gradient of zeros, not None, from a worker whose samples lack a modality."""
    for sample, unused in ((EXAMPLES[0], model.image_blocks),
                           (Sample(T2I, image=(2, 2)), model.blocks[:len(model.image_blocks)])):
        model.zero_grad()
        layout = pack([sample], 2)
        run(model, layout, latents(layout))[0].square().sum().backward()
        for p in (*model.blocks.parameters(), *model.image_blocks.parameters()):
            assert p.grad is not None
        assert not any(p.grad.any() for p in unused.parameters())


def test_a_text_only_model():
    model, layout = random_model(image_channels=0), pack(EXAMPLES[:1], 2)
    assert len(model.image_blocks) == 0 and not hasattr(model, "image_in")
    assert run(model, layout, latents(layout))[0].any()


@torch.no_grad()
def test_nothing_leaks(model):
    """Outputs with no path of layers from a changed position keep their bits; others move."""
    layout = pack([EXAMPLES[0], *EXAMPLES], 2)
    reach = (masks.dense(layout, layout) | torch.eye(len(layout), dtype=torch.bool)).float()
    for _ in range(3):
        reach = ((reach @ reach) > 0).float()
    z, plan = latents(layout), make_plan(layout)
    base = run(model, layout, z, plan)[0]
    for j in range(len(layout)):
        changed = z.clone()
        changed[j] += 3.0
        moved = (run(model, layout, changed, plan)[0] != base).any(-1)
        assert torch.equal(moved, reach[:, j] > 0), f"position {j}"


@torch.no_grad()
def test_packing_and_targets_change_nothing(model):
    layout = pack(EXAMPLES, 2)
    z = latents(layout)
    v, hidden = run(model, layout, z, tap=0)
    for s, sample in enumerate(EXAMPLES):
        mine = layout.sample == s
        assert_close(run(model, pack([sample], 2), z[mine])[0], v[mine])
    index = ((layout.segment >= masks.I) & (torch.arange(len(layout)) % 5 != 0)).nonzero()[:, 0]
    targets = index, make_plan(layout.select(index), layout)
    got, tapped = run(model, layout, z, targets=targets, tap=0)
    assert_close(got, v[index])
    assert torch.equal(tapped, hidden) and hidden.shape == (len(layout), 32)


@torch.no_grad()
def test_cache_equals_the_whole_pass(model):
    """P and I, then clean blocks one at a time, then a noisy block: the velocity of one pass."""
    cache = Cache()
    answer = Sample(IT2T, prompt=3, image=(2, 2), clean=4, noisy=6, start=3)
    full = pack([answer, Sample(T2I, clean=4, image=(2, 2))], 2)
    z, is_image, clean = latents(full), full.segment == masks.I, full.segment == masks.C
    first = (full.sample == 0) & ((full.segment == masks.P) | is_image)
    last = (full.segment == masks.N) & (full.block == 2) | is_image & (full.sample == 1)
    for chosen in (first, clean & (full.block == 0), clean & (full.block == 1), last):
        part = full.select(chosen)
        plan = make_plan(part, masks.concat(cache.layout, part) if cache.layout else part)
        v, _ = run(model, part, z[chosen], plan, cache=cache, commit=chosen is not last)
        assert (v is None) == (chosen is not last)
    assert_close(v, run(model, full, z)[0][last])
    cached = int((first | clean).sum())                    # only commit adds to the cache
    assert len(cache.layout) == cached == len(cache.kv[0][0]) == len(cache.kv[1][0])
