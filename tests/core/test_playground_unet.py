"""The playground's UNet: our attention and noise schedule against diffusers' own."""

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

from emma_core.base.schedule import add_noise, alphas_cumprod
from lab.playground.unet import UNET_CONFIG, make_unet


def inputs(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([3, 700]),
            torch.randn(2, 16, 128, generator=generator))


def test_plain_attention_computes_what_diffusers_does():
    torch.manual_seed(0)
    unet = make_unet()
    theirs = UNet2DConditionModel(**UNET_CONFIG)
    theirs.load_state_dict(unet.state_dict())
    latent, timestep, context = inputs()
    with torch.no_grad():
        found, wanted = (model(latent, timestep, context, return_dict=False)[0] for model in (unet, theirs))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_the_context_reaches_the_prediction():
    torch.manual_seed(0)
    unet = make_unet()
    latent, timestep, context = inputs()
    with torch.no_grad():
        found, other = (unet(latent, timestep, c, return_dict=False)[0] for c in (context, context.flip(0)))
    assert (found - other).abs().max() > 1e-3


def test_the_noise_schedule_is_sd15s():
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    torch.testing.assert_close(alphas_cumprod(), scheduler.alphas_cumprod, rtol=1e-4, atol=1e-6)
    latent, timestep, _ = inputs()
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(1))
    found = add_noise(latent, noise, alphas_cumprod()[timestep])
    torch.testing.assert_close(found, scheduler.add_noise(latent, noise, timestep), rtol=1e-4, atol=1e-5)
