"""What a frozen diffusion model is, in numbers: training, drawing and evaluation read them here and nowhere else.

A further base is one more `BaseSpec` here and a line in `recognition`, which tells it from others by its weights; what its
denoiser reads beside the tokens goes through `Denoiser.predict_noise`'s ``extra``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..model.own_tokens import OwnTokens
from ..model.source_spec import SourceSpec, TimeSpec
from ..text.clip_layout import CLIP_L, SDXL_CLIP_G, SDXL_CLIP_L, ClipTower
from .schedule import alphas_cumprod


@dataclass(frozen=True, eq=False)
class BaseSpec:
    """Facts of one base; a file may declare others than its family's.

    Args:
        family: of models whose text comes from the same encoders, as module files name it.
        latent_channels: of the latents.
        pixels_per_latent: side of the square of pixels that one latent stands for.
        latent_scale: factor that gives the autoencoder's latents unit deviation.
        alphas_cumprod_T: (T,) share of the latents' variance left at each timestep: the noise schedule.
        prediction: what the denoiser predicts, the noise ("eps") or the velocity ("v").
        context_width: of the cross-attention tokens.
        pooled_width: of the pooled text vector that the denoiser reads beside them, with the sizes; 0: it reads neither.
        side_px: of a picture as the base knows it best.
        towers: its own text encoders, whose tokens stand side by side.
    """

    family: str
    latent_channels: int
    pixels_per_latent: int
    latent_scale: float
    alphas_cumprod_T: torch.Tensor
    prediction: str
    context_width: int
    pooled_width: int
    side_px: int
    towers: tuple[ClipTower, ...] = ()

    @property
    def own_tokens(self) -> OwnTokens:
        """The tokens of its own text encoders, as modules act on them."""
        return OwnTokens(SourceSpec(self.family, self.context_width), TimeSpec("ddpm"))


SD15 = BaseSpec(family="sd15", latent_channels=4, pixels_per_latent=8, latent_scale=0.18215, alphas_cumprod_T=alphas_cumprod(),
                prediction="eps", context_width=768, pooled_width=0, side_px=512, towers=(CLIP_L,))
SDXL = replace(SD15, family="sdxl", latent_scale=0.13025, context_width=2048, pooled_width=1280, side_px=1024,
               towers=(SDXL_CLIP_L, SDXL_CLIP_G))
PLAYGROUND_SPEC = replace(SD15, family="playground", context_width=128, side_px=128, towers=())
