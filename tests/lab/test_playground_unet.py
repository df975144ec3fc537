"""The playground's UNet with our attention against diffusers' own."""

import torch
from diffusers import UNet2DConditionModel

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
