"""How much of a latent is left at each timestep, and the sampler's steps on it.

Shapes: B rows, T timesteps, latents C x h x w.
"""

from __future__ import annotations

import torch

from ..model.strength_keyframes import TIMESTEPS

# Stable Diffusion's: the square roots of beta grow in equal steps, which diffusers calls "scaled_linear"
_BETA_START, _BETA_END = 0.00085, 0.012


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


class Ddim:
    """DDIM without added noise (arXiv 2010.02502, eq. 12 with sigma = 0) at the timesteps of ComfyUI's `ddim_uniform`.

    Args:
        alphas_cumprod_T: of a base, see `BaseSpec`.
        prediction: "eps" or "v".
        steps: how many, down to no noise at all.
    """

    def __init__(self, alphas_cumprod_T: torch.Tensor, prediction: str, steps: int):
        self._kept_T, self._prediction = alphas_cumprod_T.detach().cpu(), prediction
        self._stride = TIMESTEPS // steps
        self.timesteps = (torch.arange(steps) * self._stride).flip(0) + 1

    def begin(self, noise_BChw: torch.Tensor) -> torch.Tensor:
        """Nothing but noise, of the size that it has at the first timestep."""
        return (1 - self._kept_T[self.timesteps[0]]).sqrt() * noise_BChw

    def step(self, predicted_BChw: torch.Tensor, timestep: int, latent_BChw: torch.Tensor) -> torch.Tensor:
        """The latents at the next timestep."""
        kept, following = self._kept_T[timestep], timestep - self._stride
        kept_next = self._kept_T[following] if following >= 0 else kept.new_tensor(1.0)
        if self._prediction == "v":
            clean_BChw = kept.sqrt() * latent_BChw - (1 - kept).sqrt() * predicted_BChw
            noise_BChw = kept.sqrt() * predicted_BChw + (1 - kept).sqrt() * latent_BChw
        else:
            clean_BChw, noise_BChw = (latent_BChw - (1 - kept).sqrt() * predicted_BChw) / kept.sqrt(), predicted_BChw
        return kept_next.sqrt() * clean_BChw + (1 - kept_next).sqrt() * noise_BChw
