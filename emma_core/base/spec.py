"""What a frozen diffusion model is, in numbers: training, drawing and evaluation read them here and nowhere else.

A further base (SDXL) is one more `BaseSpec` here, a file beside `sd15_files` that reads it, and a case in
`backbones.load_backbone`; what its denoiser reads beside the tokens goes through `Denoiser.predict_noise`'s ``extra``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .schedule import alphas_cumprod


@dataclass(frozen=True, eq=False)
class BaseSpec:
    """Facts of one base; a file may declare others than its family's.

    Args:
        latent_channels: of the latents.
        pixels_per_latent: side of the square of pixels that one latent stands for.
        latent_scale: factor that gives the autoencoder's latents unit deviation.
        alphas_cumprod_T: (T,) share of the latents' variance left at each timestep: the noise schedule.
        prediction: what the denoiser predicts, the noise ("eps") or the velocity ("v").
        context_width: of the cross-attention tokens.
        pooled_width: of the pooled text vector that the denoiser reads beside them; 0: it reads none.
        side_px: of a picture as the base knows it best.
    """

    latent_channels: int
    pixels_per_latent: int
    latent_scale: float
    alphas_cumprod_T: torch.Tensor
    prediction: str
    context_width: int
    pooled_width: int
    side_px: int


SD15 = BaseSpec(latent_channels=4, pixels_per_latent=8, latent_scale=0.18215, alphas_cumprod_T=alphas_cumprod(),
                prediction="eps", context_width=768, pooled_width=0, side_px=512)
PLAYGROUND_SPEC = replace(SD15, context_width=128, side_px=128)
