"""Noise schedules: Stable Diffusion's, those of zero terminal SNR, and the sampler's steps on them."""

import torch
from diffusers import DDIMScheduler, DDPMScheduler

from emma_core.base.schedule import add_noise, alphas_cumprod, scheduler_for
from emma_core.base.spec import SD15


def test_the_noise_schedule_is_sd15s():
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    torch.testing.assert_close(alphas_cumprod(), scheduler.alphas_cumprod, rtol=1e-4, atol=1e-6)
    generator = torch.Generator().manual_seed(1)
    latent, noise = (torch.randn((2, 4, 8, 8), generator=generator) for _ in range(2))
    timestep = torch.tensor([3, 700])
    found = add_noise(latent, noise, alphas_cumprod()[timestep])
    torch.testing.assert_close(found, scheduler.add_noise(latent, noise, timestep), rtol=1e-4, atol=1e-5)


def test_a_checkpoint_keeps_its_own_schedule_and_prediction():
    usual = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading",
                          steps_offset=1, set_alpha_to_one=True, clip_sample=False, prediction_type="epsilon")
    same = scheduler_for(SD15.alphas_cumprod_T, "eps")
    assert {name: value for name, value in same.config.items() if name[0] != "_"} == {
        name: value for name, value in usual.config.items() if name[0] != "_"}
    assert torch.equal(same.alphas_cumprod, usual.alphas_cumprod)
    kept_T = torch.linspace(0.999, 0.0, 1000)
    other = scheduler_for(kept_T, "v")
    torch.testing.assert_close(other.alphas_cumprod, kept_T, rtol=0, atol=1e-4)
    assert other.config.prediction_type == "v_prediction" and other.config.timestep_spacing == usual.config.timestep_spacing
