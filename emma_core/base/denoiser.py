"""The frozen diffusion model as training and drawing see it.

Shapes: B rows, K cross-attention tokens of width W, T timesteps, latents C x h x w.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Protocol

import torch

NO_EXTRA: Mapping[str, Any] = MappingProxyType({})


class Denoiser(Protocol):
    """A UNet of any host, whose own prediction is asked for; gradients flow through to the context."""

    prediction: str
    alphas_cumprod_T: torch.Tensor

    def predict_noise(
        self, noised_BChw: torch.Tensor, timestep_B: torch.Tensor, context_BKW: torch.Tensor,
        extra: Mapping[str, Any] = NO_EXTRA,
    ) -> torch.Tensor:
        """What the model predicts, noise or velocity (see ``prediction``), in float32.

        Args:
            noised_BChw: noised latents of variance 1.
            timestep_B: their timesteps.
            context_BKW: the tokens that its cross-attention reads.
            extra: what it reads beside them, under diffusers' names: ``text_embeds`` (B, P), the pooled text vector;
                ``time_ids`` (B, 6), the sizes; an IP-Adapter's ``image_embeds``. Empty for SD1.5.
        """
        ...

    def without_numbers(self, dtype: torch.dtype) -> Denoiser:
        """A copy whose weights have sizes alone, of this type: what it takes is told without having it."""
        ...
