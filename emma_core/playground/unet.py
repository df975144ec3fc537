"""The playground's UNet: Stable Diffusion 1.5's layout at a small size, under diffusers' key names.

Shapes: B pictures, N query positions, M key positions, C channels, H heads, d channels of a head.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

# What diffusers' UNet2DConditionModel is built with. Its `attention_head_dim` is the number of heads, as in SD1.5.
UNET_CONFIG = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [64, 128],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "cross_attention_dim": 128,
    "attention_head_dim": 8,
}
TIMESTEPS = 1000
_BETA_START, _BETA_END = 0.00085, 0.012


def alphas_cumprod() -> torch.Tensor:
    """(1000,) share of the picture's variance left at each timestep: SD1.5's schedule ("scaled linear")."""
    beta = torch.linspace(_BETA_START**0.5, _BETA_END**0.5, TIMESTEPS, dtype=torch.float64).square()
    return torch.cumprod(1 - beta, dim=0).float()


def add_noise(unit_B4hw: torch.Tensor, noise_B4hw: torch.Tensor, timestep_B: torch.Tensor) -> torch.Tensor:
    """The noised latent (scaled latents, deviation 1) at each row's timestep."""
    kept_B111 = alphas_cumprod().to(unit_B4hw)[timestep_B][:, None, None, None]
    return kept_B111.sqrt() * unit_B4hw + (1 - kept_B111).sqrt() * noise_B4hw


class PlainAttention:
    """diffusers attention processor: matmul, softmax, matmul. Its backward is faster on a CPU than the fused one."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        scale = 1 / math.sqrt(attn.inner_dim // attn.heads)
        q_BHNd = self._heads(attn.to_q(hidden_states) * scale, attn.heads)
        k_BHMd = self._heads(attn.to_k(context), attn.heads)
        v_BHMd = self._heads(attn.to_v(context), attn.heads)
        weight_BHNM = torch.softmax(q_BHNd @ k_BHMd.transpose(-1, -2), dim=-1)
        out_BNC = (weight_BHNM @ v_BHMd).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](out_BNC))

    @staticmethod
    def _heads(x_BNC: torch.Tensor, heads: int) -> torch.Tensor:
        return x_BNC.unflatten(-1, (heads, -1)).transpose(1, 2)


def make_unet(config: dict | None = None) -> UNet2DConditionModel:
    """A fresh UNet with plain attention."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(**(config or UNET_CONFIG))
    unet.set_attn_processor(PlainAttention())
    return unet
