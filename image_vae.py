"""Image VAE: pixels <-> a small grid of continuous latents, by a convolutional KL autoencoder.

    z     = mu(x) + sigma eps,  eps ~ N(0, I)                                           the posterior q(z|x)
    d     = decode(z) - x
    L     = |d| + w_mse d^2 + w_pyr mean_k |lap_k(d)| + beta KL(q(z|x) || N(0, I))      each a mean
    lap_k = avg_k(d) - up(avg_{k+1}(d)),  avg_k = mean over 2^k x 2^k pixels            the Laplacian pyramid
    z_bar = (z - m_c) / s_c                                                             what the MMDiT sees

One position of the MMDiT is one latent pixel: `downsample` image pixels a side, `channels` numbers. Nothing but
convolutions, so one set of weights takes every height and width that `downsample` divides. The cost sits at the fine
levels; two shuffles keep the network away from them: the stem folds `patch` x `patch` pixels into channels, and
`group` x `group` cells of the coarsest level are folded into one latent pixel, so that the level that does the work
is finer than the latent grid. The pyramid stands in for a perceptual net: an edge that is blurred or shifted costs at
every scale. sigma may be fixed: noise the decoder has learned to ignore is error that the prior may make.
Left out: attention, adversarial and perceptual losses.

    default   32 px: patch 4, widths (64,), group 2                            downsample  8, 32 channels
    paper   1024 px: patch 2, widths (128, 256, 512, 512), blocks 3, group 1   downsample 16, 64 channels

Shapes: B images, H, W pixels, C latent channels, h, w = H, W / downsample.    Run: python image_vae.py   (CPU, 8 s)
"""
