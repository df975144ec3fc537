"""Training the playground's autoencoder: what is measured on it."""

import torch

from emma_core.base.spec import PLAYGROUND_SPEC
from emma_core.playground.autoencoder import Autoencoder
from lab.playground.train_autoencoder import measure_statistics, psnr_db


def test_scaled_latents_have_deviation_one_after_measuring():
    torch.manual_seed(1)
    autoencoder, images = Autoencoder(PLAYGROUND_SPEC.latent_scale), torch.rand((40, 3, 32, 32)) * 2 - 1
    measure_statistics(autoencoder, images)
    unit = autoencoder.encode(images) * autoencoder.latent_scale
    deviation, mean = torch.std_mean(unit, dim=(0, 2, 3))
    torch.testing.assert_close(deviation, torch.ones(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(mean, torch.zeros(4), atol=1e-3, rtol=0)


def test_psnr_of_a_known_difference():
    # a difference of 0.2 in [-1, 1] is 0.1 in [0, 1]: 20 dB
    torch.testing.assert_close(psnr_db(torch.full((1, 3, 8, 8), 0.2), torch.zeros(1, 3, 8, 8)), torch.tensor([20.0]))
