"""Pictures from words alone, by the base as it is in a checkpoint: DDIM with guidance.

Shapes: B pictures of H x W, N tokens of width D, latents 4 x h x w.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from emma_core.base.schedule import Ddim
from emma_core.base.spec import PLAYGROUND_SPEC
from emma_core.playground.autoencoder import Autoencoder
from lab.playground.unet import UNET_CONFIG

from .clip import TinyCLIP, token_ids
from .train_autoencoder import load_trained
from .train_base import load_base_unet
from .train_clip import load_clip

LATENT_SIZE = UNET_CONFIG["sample_size"]
STEPS, GUIDANCE = 20, 4.0
_CHUNK = 32


@dataclass(frozen=True)
class Base:
    """CLIP's text tower with its tokenizer, UNet and autoencoder, frozen, on one device."""

    clip: TinyCLIP
    tokenizer: object
    unet: torch.nn.Module
    autoencoder: Autoencoder
    device: str

    @torch.no_grad()
    def tokens(self, texts: Sequence[str]) -> torch.Tensor:
        """(B, N, D) as the UNet reads them."""
        return self.clip.hidden_states(token_ids(self.tokenizer, texts).to(self.device)).float()

    @torch.no_grad()
    def predict_noise(self, noised_B4hw: torch.Tensor, timestep_B: torch.Tensor, tokens_BND: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device, torch.bfloat16):
            return self.unet(noised_B4hw, timestep_B, encoder_hidden_states=tokens_BND, return_dict=False)[0].float()


def load_base(clip: Path, unet: Path, autoencoder: Path | None, device: str) -> Base:
    """From the states of `train_clip` and `train_base`, and that of an autoencoder (None: the shipped one)."""
    towers, tokenizer = load_clip(clip, device)
    parts = load_base_unet(unet).to(device), load_trained(autoencoder, device)
    return Base(towers, tokenizer, *parts, device)


Predict = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (noised_B4hw, timestep_B) -> noise_B4hw


@torch.no_grad()
def sample(predict: Predict, seeds: Sequence[int], device: str, steps: int = STEPS) -> torch.Tensor:
    """Latents of deviation 1, denoised with DDIM; a seed's noise is the same in every batch."""
    scheduler = Ddim(PLAYGROUND_SPEC.alphas_cumprod_T, "eps", steps)
    noises = [torch.randn(4, LATENT_SIZE, LATENT_SIZE, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    latent_B4hw = torch.stack(noises).to(device)
    for timestep in scheduler.timesteps:
        timestep_B = timestep.expand(len(seeds)).to(device)
        latent_B4hw = scheduler.step(predict(latent_B4hw, timestep_B), int(timestep), latent_B4hw)
    return latent_B4hw


def guided(base: Base, tokens_BND: torch.Tensor, guidance: float) -> Predict:
    """Classifier-free guidance against the empty prompt."""
    empty_BND = base.tokens([""]).expand_as(tokens_BND)

    def predict(noised_B4hw: torch.Tensor, timestep_B: torch.Tensor) -> torch.Tensor:
        both = base.predict_noise(noised_B4hw.repeat(2, 1, 1, 1), timestep_B.repeat(2), torch.cat([empty_BND, tokens_BND]))
        without_B4hw, with_B4hw = both.chunk(2)
        return torch.lerp(without_B4hw, with_B4hw, guidance)

    return predict


@torch.no_grad()
def draw(
    base: Base, texts: Sequence[str], seeds: Sequence[int], guidance: float = GUIDANCE, steps: int = STEPS
) -> torch.Tensor:
    """(B, 3, H, W) in [-1, 1]."""
    parts = []
    for start in range(0, len(texts), _CHUNK):
        tokens_BND = base.tokens(texts[start:start + _CHUNK])
        latent_B4hw = sample(guided(base, tokens_BND, guidance), seeds[start:start + _CHUNK], base.device, steps)
        parts.append(base.autoencoder.decode(latent_B4hw).cpu())
    return torch.cat(parts)
