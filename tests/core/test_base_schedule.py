"""Noise schedules: Stable Diffusion's, those of zero terminal SNR, and the sampler's steps on them."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from emma_core.base.schedule import Ddim, add_noise, alphas_cumprod


def test_the_noise_schedule_is_sd15s():
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    torch.testing.assert_close(alphas_cumprod(), scheduler.alphas_cumprod, rtol=1e-4, atol=1e-6)
    generator = torch.Generator().manual_seed(1)
    latent, noise = (torch.randn((2, 4, 8, 8), generator=generator) for _ in range(2))
    timestep = torch.tensor([3, 700])
    found = add_noise(latent, noise, alphas_cumprod()[timestep])
    torch.testing.assert_close(found, scheduler.add_noise(latent, noise, timestep), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 7, 20, 999])
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_the_steps_are_those_of_diffusers(prediction, steps):
    wanted = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading",
                           steps_offset=1, set_alpha_to_one=True, clip_sample=False,
                           prediction_type={"eps": "epsilon", "v": "v_prediction"}[prediction])
    wanted.set_timesteps(steps)
    found = Ddim(alphas_cumprod(), prediction, steps)
    assert torch.equal(found.timesteps, wanted.timesteps)
    generator = torch.Generator().manual_seed(2)
    latent, predicted = (torch.randn((2, 4, 8, 8), generator=generator) for _ in range(2))
    torch.testing.assert_close(found.begin(latent), wanted.add_noise(torch.zeros_like(latent), latent, wanted.timesteps[:1]),
                               rtol=1e-4, atol=1e-5)
    for timestep in wanted.timesteps[::max(1, steps // 20)]:
        torch.testing.assert_close(found.step(predicted, int(timestep), latent),
                                   wanted.step(predicted, timestep, latent).prev_sample, rtol=1e-4, atol=1e-4)


def test_a_schedule_that_ends_in_noise_alone_is_stepped_along_by_velocities():
    kept_T = torch.linspace(0.999, 0.0, 1000)
    steps = Ddim(kept_T, "v", 10)
    clean, noise = (torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(seed)) for seed in (3, 4))
    latent = add_noise(clean, noise, kept_T[steps.timesteps[:1]])
    for timestep in steps.timesteps.tolist():
        kept = kept_T[timestep]
        latent = steps.step(kept.sqrt() * noise - (1 - kept).sqrt() * clean, timestep, latent)
    torch.testing.assert_close(latent, clean, rtol=1e-4, atol=1e-5)
