"""How much of a latent is left at each timestep, and the sampler's steps on it.

Shapes: B rows, T timesteps, latents C x h x w.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..model.strength_keyframes import TIMESTEPS

if TYPE_CHECKING:
    from diffusers import DDIMScheduler

# Stable Diffusion's: the square roots of beta grow in equal steps, which diffusers calls "scaled_linear"
_BETA_START, _BETA_END = 0.00085, 0.012
_SAME_SCHEDULE = 1e-4  # of alphas_cumprod: what the rounding of published schedules explains


def alphas_cumprod() -> torch.Tensor:
    """(T,) share of the variance left at each timestep, on Stable Diffusion's schedule."""
    beta_T = torch.linspace(_BETA_START**0.5, _BETA_END**0.5, TIMESTEPS, dtype=torch.float64).square()
    return torch.cumprod(1 - beta_T, dim=0).float()


def zero_terminal(alphas_cumprod_T: torch.Tensor) -> torch.Tensor:
    """The schedule with no signal left at its end."""
    # Lin et al. 2023 (arXiv:2305.08891), algorithm 1: shift the last sqrt(alpha bar) to 0, scale the first back
    root_T = alphas_cumprod_T.double().sqrt()
    return ((root_T - root_T[-1]) * root_T[0] / (root_T[0] - root_T[-1])).square().float()


def add_noise(latent_BChw: torch.Tensor, noise_BChw: torch.Tensor, kept_B: torch.Tensor) -> torch.Tensor:
    """DDPM's forward process (arXiv 2006.11239, eq. 4); ``kept_B`` is alpha-bar of each row's timestep."""
    kept_B111 = kept_B.reshape(-1, *(1,) * (latent_BChw.ndim - 1))  # a video's latents have one axis more
    return kept_B111.sqrt() * latent_BChw + (1 - kept_B111).sqrt() * noise_BChw


def scheduler_for(alphas_cumprod_T: torch.Tensor, prediction: str) -> DDIMScheduler:
    """DDIM on a base's schedule and prediction, at the timesteps of ComfyUI's `ddim_uniform`, down to no noise at all."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        num_train_timesteps=TIMESTEPS, beta_start=_BETA_START, beta_end=_BETA_END, beta_schedule="scaled_linear",
        prediction_type={"eps": "epsilon", "v": "v_prediction"}[prediction], timestep_spacing="leading", steps_offset=1,
        set_alpha_to_one=True, clip_sample=False,
    )
    kept_T = alphas_cumprod_T.detach().cpu().double()
    if torch.allclose(kept_T, scheduler.alphas_cumprod.double(), rtol=0, atol=_SAME_SCHEDULE):
        return scheduler
    before_T = torch.cat([kept_T.new_ones(1), kept_T[:-1]])
    return DDIMScheduler.from_config(scheduler.config, trained_betas=(1 - kept_T / before_T).tolist())
