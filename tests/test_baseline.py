"""pytest tests/test_baseline.py: the priors of experiments/baseline.py."""
import pytest
import torch

import experiments.baseline
import masks
from cuda_attention import make_plan
from experiments.baseline import Plain, Unpacked
from masks import T2T, Sample, pack
from mmdit import Cache, MMDiTConfig
from test_mmdit import CONFIG, EXAMPLES, assert_close, latents, random_model, run


@torch.no_grad()
def test_the_padded_prior_without_cache_gives_the_same():
    model, layout = random_model(dual_layers=1), pack(EXAMPLES, 2)
    z, padded, index = latents(layout), Unpacked(model.config), torch.arange(3, len(layout), 2)
    padded.load_state_dict(model.state_dict())
    for targets in (None, (index, make_plan(layout.select(index), layout))):
        assert_close(run(padded, layout, z, targets=targets)[0],
                     run(model, layout, z, targets=targets)[0])
    caches, layout = (Cache(), Cache()), pack([Sample(T2T, clean=n, noisy=6) for n in (2, 4)], 2)
    z, clean, last = latents(layout), layout.segment == masks.C, layout.block == 2
    for chosen in (clean & (layout.block == 0), clean & (layout.block == 1), last):
        part = layout.select(chosen)
        got = []
        for prior, cache in zip((model, padded), caches):
            past = masks.concat(cache.layout, part) if cache.layout else part
            got.append(run(prior, part, z[chosen], make_plan(part, past), cache=cache,
                           commit=chosen is not last)[0])
    assert_close(*got)


@pytest.mark.parametrize("seed", range(3))
@torch.no_grad()
def test_the_plain_prior_obeys_the_mask(seed):
    """A position that a query may not attend to changes nothing, and one that it may does."""
    torch.manual_seed(seed)
    prior, layout = Plain(MMDiTConfig(**CONFIG)).eval(), pack(EXAMPLES, 2)
    z, allowed = latents(layout), masks.dense(layout, layout)
    visible = allowed.clone()
    for _ in range(6):                                     # through the layers
        visible |= (visible.float() @ allowed.float()) > 0
    before = run(prior, layout, z)[0]
    for j in torch.randperm(len(layout))[:8].tolist():
        changed = z.clone()
        changed[j] += 1
        differs = (run(prior, layout, changed)[0] - before).abs().amax(1) > 1e-5
        assert not differs[~visible[:, j]].any() and differs[allowed[:, j]].all()


@pytest.mark.parametrize("tasks", ["ii:1", "t2i:1,vid:1", "all"])
def test_images_in_sequence_are_refused(tasks, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["baseline.py", "plain", "--tasks", tasks, "--dry_run"])
    assert experiments.baseline.main() == 2
    assert capsys.readouterr().err.count("\n") == 1
