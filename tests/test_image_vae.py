"""pytest tests/test_image_vae.py"""
import dataclasses

import pytest
import torch
import torch.nn.functional as F

from image_vae import ImageVAE, ImageVAEConfig, image_vae_loss, laplacian_pyramid

CONFIGS = {
    "scenes": dict(width=16),
    "levels": dict(width=8, multipliers=(1, 2, 2), patch=2, latent_channels=4, blocks=1),
    "paper": dict(width=8, multipliers=(1, 2, 4, 4), patch=2, downsample=16, latent_channels=64,
                  blocks=1),
}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(**config) -> ImageVAE:
    torch.manual_seed(0)
    vae = ImageVAE(ImageVAEConfig(**config))
    for name, p in vae.named_parameters():                 # blocks start as the identity
        if name.endswith("conv2.weight"):
            torch.nn.init.normal_(p, std=0.05)
    return vae


@pytest.mark.parametrize("name", CONFIGS)
def test_sizes_and_an_image_moved_by_a_latent(name):
    """Every multiple of downsample is a size; a moved image has moved latents."""
    vae, n = make(**CONFIGS[name]).double(), 15
    d = vae.downsample
    mean, logvar = vae.encode(draw(2, 3, d, 3 * d).double())
    assert mean.shape == logvar.shape == (2, vae.channels, 1, 3) and mean.dtype == torch.float32
    assert vae.decode(mean.double()).shape == (2, 3, d, 3 * d)
    for size in ((1.5 * d, d), (d, 1.5 * d), (0, d)):
        with pytest.raises(ValueError, match=f"multiples of {d}"):
            vae.check_size(*size)
    x = torch.zeros(1, 3, n * d, n * d, dtype=torch.float64)
    x[..., 6 * d:7 * d, 6 * d:7 * d] = draw(1, 3, d, d).double()
    moved = vae.encode(x.roll((d, 2 * d), (2, 3)))[0]
    latents = vae.encode(x)[0].roll((1, 2), (2, 3))
    middle = slice(7, 9) if name == "paper" else slice(5, 11)        # away from the padding
    assert latents[..., middle, middle].std() > 0
    assert torch.allclose(moved[..., middle, middle], latents[..., middle, middle], atol=1e-9)


def test_pyramid_is_its_definition():
    x = draw(2, 3, 16, 24)
    bands = laplacian_pyramid(x, 3)
    assert len(bands) == 3
    for k, band in enumerate(bands):
        coarse = F.interpolate(F.avg_pool2d(x, 2 ** (k + 1)), scale_factor=2.0)
        assert torch.allclose(band, F.avg_pool2d(x, 2 ** k) - coarse, atol=1e-6)


def test_loss_is_its_equation_and_reaches_every_parameter():
    vae = make(**CONFIGS["levels"], posterior_std=0.5).double()
    x, noise = draw(2, 3, 32, 32).double(), draw(2, 4, 4, 4, seed=1).double()
    loss, terms = image_vae_loss(vae, x, noise)
    loss.backward()
    assert all(p.grad.any() for p in vae.parameters())
    mean, logvar = vae.encode(x)
    d = vae.decode(mean + 0.5 * noise) - x
    q, p = torch.distributions.Normal(mean, 0.5), torch.distributions.Normal(0.0, 1.0)
    kl = torch.distributions.kl_divergence(q, p).mean()
    pyramid = sum(band.abs().mean() for band in laplacian_pyramid(d)) / 3
    assert torch.allclose(loss, d.abs().mean() + (d ** 2).mean() + 0.5 * pyramid + 0.001 * kl)
    assert torch.allclose(terms["kl"], kl) and set(terms) == {"l1", "mse", "pyramid", "kl"}
    assert not any(term.requires_grad for term in terms.values())


def test_statistics_normalise_every_channel_over_images_of_several_sizes():
    """And config and state rebuild the same VAE."""
    vae, batches = make(width=16), [draw(8, 3, 32, 32), 0.2 * draw(4, 3, 16, 48, seed=1) + 0.5]
    vae.set_statistics(batches)
    raw = vae.encode(batches[0])[0]
    assert torch.allclose(vae.denormalize(vae.normalize(raw)), raw, atol=1e-5)
    again = ImageVAE(ImageVAEConfig(**dataclasses.asdict(vae.config)))
    again.load_state_dict(vae.state_dict())
    z = [again.normalize(again.encode(x)[0]).transpose(0, 1).flatten(1) for x in batches]
    z = torch.cat(z, 1)                                                                # (C, n)
    assert z.mean(1).abs().max() < 1e-4 and (z.std(1, correction=0) - 1).abs().max() < 1e-4
    assert torch.equal(again.normalize(again.encode(batches[0])[0]), vae.normalize(raw))


def test_refuses_bad_configs():
    for name, value in (("downsample", 6), ("downsample", 0), ("latent_channels", 30)):
        with pytest.raises(ValueError, match=f"{name} {value}: expected a multiple of"):
            ImageVAEConfig(**{name: value})


def test_learns_one_batch():
    torch.manual_seed(0)
    vae = ImageVAE(ImageVAEConfig(width=32, blocks=1))
    x = draw(4, 3, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3).tanh()
    optimizer, losses = torch.optim.AdamW(vae.parameters(), lr=4e-3), []
    for step in range(60):
        loss, terms = image_vae_loss(vae, x, draw(4, 32, 4, 4, seed=step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0] and terms["mse"] < 0.01
