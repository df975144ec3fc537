"""The playground's UNet to be trained: Stable Diffusion 1.5's layout at a small size, under diffusers' key names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from emma_core.base.spec import PLAYGROUND_SPEC
from emma_core.playground.unet import PlainAttention

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

# What diffusers' UNet2DConditionModel is built with. Its `attention_head_dim` is the number of heads, as in SD1.5.
UNET_CONFIG = {
    "sample_size": PLAYGROUND_SPEC.side_px // PLAYGROUND_SPEC.pixels_per_latent,
    "in_channels": PLAYGROUND_SPEC.latent_channels,
    "out_channels": PLAYGROUND_SPEC.latent_channels,
    "block_out_channels": [64, 128],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "cross_attention_dim": PLAYGROUND_SPEC.context_width,
    "attention_head_dim": 8,
}


def make_unet(config: dict | None = None) -> UNet2DConditionModel:
    """A fresh UNet with plain attention."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(**(config or UNET_CONFIG))
    unet.set_attn_processor(PlainAttention())
    return unet
