"""Tests of image_vae.py.    Run: python -m pytest tests/test_image_vae.py"""
import math
import pathlib
import sys

import pytest
import torch
import torch.nn.functional as F

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from image_vae import Conv, ImageVAE, image_vae_loss, laplacian_pyramid

CONFIGS = {
    "scenes": dict(width=16),
    "levels": dict(width=8, multipliers=(1, 2, 2), patch=2, latent_channels=4, blocks=1),
    "paper": dict(width=8, multipliers=(1, 2, 4, 4), patch=2, downsample=16, latent_channels=64, blocks=1),
    "learned": dict(width=16, posterior_std=None),
}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(seed=0, **config):
    torch.manual_seed(seed)
    vae = ImageVAE(**config)
    for name, p in vae.named_parameters():             # blocks start as the identity, which would hide faults
        if name.endswith("conv2.weight"):
            torch.nn.init.normal_(p, std=0.05)
    return vae.eval()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("H, W", [(32, 32), (16, 48), (64, 32)])
def test_any_multiple_of_downsample_goes_through(name, H, W):
    vae = make(**CONFIGS[name])
    d = vae.downsample
    mean, logvar = vae.encode(draw(2, 3, H, W))
    assert mean.shape == logvar.shape == (2, vae.channels, H // d, W // d)
    assert vae.decode(mean).shape == (2, 3, H, W)
    assert mean.dtype == logvar.dtype == torch.float32


@pytest.mark.parametrize("name", CONFIGS)
def test_shifting_the_picture_by_one_latent_shifts_the_latents(name):
    vae = make(**CONFIGS[name]).double()
    d, n = vae.downsample, 15
    x = torch.zeros(1, 3, n * d, n * d, dtype=torch.float64)
    x[..., 6 * d:7 * d, 6 * d:7 * d] = draw(1, 3, d, d).double()
    there, here = vae.encode(x.roll((d, 2 * d), (2, 3)))[0], vae.encode(x)[0].roll((1, 2), (2, 3))
    middle = slice(5, 11) if name != "paper" else slice(7, 9)  # wide receptive field, near padding
    assert here[..., middle, middle].std() > 0
    assert torch.allclose(there[..., middle, middle], here[..., middle, middle], atol=1e-9)


def test_conv_is_the_convolution_with_its_matrix_unfolded():
    conv = Conv(5, 7).double()
    torch.nn.init.normal_(conv.bias)
    x = draw(2, 5, 6, 4).double()
    columns = F.unfold(x, 3, padding=1).unflatten(1, (5, 9)).transpose(1, 2).flatten(1, 2)    # (2, 9 * 5, 24)
    expected = (conv.weight @ columns).unflatten(2, (6, 4)) + conv.bias[:, None, None]
    assert torch.allclose(conv(x), expected)


def test_pyramid_adds_up_and_ignores_what_is_constant():
    x = draw(2, 3, 16, 24)
    bands = laplacian_pyramid(x, 3)
    total = F.avg_pool2d(x, 8)
    for band in reversed(bands):
        total = band + F.interpolate(total, scale_factor=2.0)
    assert torch.allclose(total, x, atol=1e-6)
    assert all(band.abs().max() < 1e-6 for band in laplacian_pyramid(torch.full((1, 3, 16, 16), 0.7)))


def test_loss_is_the_printed_equation():
    vae = make(width=16, posterior_std=None).double()
    x, noise = draw(2, 3, 32, 32).double(), draw(2, 32, 4, 4, seed=1).double()
    loss, terms = image_vae_loss(vae, x, noise, kl_weight=0.01, mse_weight=2.0, pyramid_weight=0.3)
    mean, logvar = vae.encode(x)
    d = vae.decode(mean + (logvar / 2).exp() * noise) - x
    q, p = torch.distributions.Normal(mean, (logvar / 2).exp()), torch.distributions.Normal(0.0, 1.0)
    kl = torch.distributions.kl_divergence(q, p).mean()
    pyramid = sum(band.abs().mean() for band in laplacian_pyramid(d)) / 3
    assert torch.allclose(loss, d.abs().mean() + 2 * (d ** 2).mean() + 0.3 * pyramid + 0.01 * kl)
    assert torch.allclose(terms["kl"], kl) and set(terms) == {"l1", "mse", "pyramid", "kl"}
    assert not any(term.requires_grad for term in terms.values())


def test_every_parameter_has_a_gradient():
    vae = make(**CONFIGS["paper"])
    image_vae_loss(vae, draw(1, 3, 32, 32), draw(1, 64, 2, 2))[0].backward()
    assert [n for n, p in vae.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_the_mean_gradient_of_two_halves_is_that_of_the_batch():
    vae, x, noise = make(width=16).double(), draw(4, 3, 32, 32).double(), draw(4, 32, 4, 4, seed=1).double()
    def gradient(part):
        return torch.autograd.grad(image_vae_loss(vae, x[part], noise[part])[0], vae.parameters())

    for a, b, whole in zip(gradient(slice(0, 2)), gradient(slice(2, 4)), gradient(slice(0, 4))):
        assert torch.allclose((a + b) / 2, whole, atol=1e-10)


def test_posterior_noise_fixed_and_learned():
    x = draw(2, 3, 32, 32)
    logvar = make(width=16, posterior_std=0.25).encode(x)[1]
    assert torch.allclose(logvar, torch.tensor(2 * math.log(0.25)))
    assert make(width=16, posterior_std=None).encode(x)[1].std() > 0


def test_statistics_normalise_every_channel_over_pictures_of_several_sizes():
    vae = make(width=16)
    batches = [draw(8, 3, 32, 32), 0.2 * draw(4, 3, 16, 64, seed=1) + 0.5]
    vae.set_statistics(batches)
    z = torch.cat([vae.normalize(vae.encode(x)[0]).transpose(0, 1).flatten(1) for x in batches], 1)  # (C, n)
    assert z.mean(1).abs().max() < 1e-4 and (z.std(1, correction=0) - 1).abs().max() < 1e-4
    raw = vae.encode(batches[0])[0]
    assert torch.allclose(vae.denormalize(vae.normalize(raw)), raw, atol=1e-5)
    with pytest.raises(ValueError, match="no images"):
        vae.set_statistics([])


def test_config_and_state_rebuild_the_same_vae(tmp_path):
    vae = make(**CONFIGS["levels"])
    vae.set_statistics([draw(4, 3, 32, 32)])
    torch.save({"config": vae.config, "weights": vae.state_dict()}, tmp_path / "vae.pt")
    loaded = torch.load(tmp_path / "vae.pt", weights_only=True)
    other = ImageVAE(**loaded["config"])
    other.load_state_dict(loaded["weights"])
    x = draw(1, 3, 32, 32)
    assert torch.equal(vae.normalize(vae.encode(x)[0]), other.normalize(other.encode(x)[0]))
    assert other.config == vae.config


@pytest.mark.parametrize("size, names", [((30, 44), "24 x 40 or 32 x 48"), ((32, 33), "32 x 32 or 32 x 40"),
                                         ((3, 32), "8 x 32"), ((0, 0), "8 x 8")])
def test_a_size_that_does_not_fit_is_refused_with_the_nearest_that_do(size, names):
    vae = make(width=16)
    with pytest.raises(ValueError) as error:
        vae.check_size(*size)
    assert str(error.value).endswith("use " + names)
    if min(size):
        with pytest.raises(ValueError, match="must be multiples of 8"):
            vae.encode(torch.zeros(1, 3, *size))


@pytest.mark.parametrize("config, message", [
    (dict(downsample=6), "downsample 6"), (dict(downsample=2), "downsample 2"),
    (dict(downsample=0), "downsample 0"), (dict(latent_channels=30), "multiple of 4")])
def test_a_config_that_does_not_fit_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        ImageVAE(**config)


def test_it_learns_one_batch():
    vae = ImageVAE(width=32, blocks=1)
    x = torch.repeat_interleave(torch.repeat_interleave(draw(4, 3, 4, 4), 8, 2), 8, 3).tanh()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=4e-3)
    losses = []
    for step in range(60):
        loss, terms = image_vae_loss(vae, x, draw(4, 32, 4, 4, seed=step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0] and terms["mse"] < 0.01
