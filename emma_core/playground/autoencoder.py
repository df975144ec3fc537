"""The playground's autoencoder: 8x, four latent channels, so it fits everything made for Stable Diffusion's latents.

Shapes: B pictures, H x W their size, h x w = H/8 x W/8. Pictures are RGB in [-1, 1].
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import nn

LATENT_CHANNELS = 4
DOWNSCALE = 8
_FOLD = 2  # pixel unshuffle at the entrance, shuffle at the exit: the layers work at half resolution
_WIDTHS = (32, 64, 128)  # at 1/2, 1/4 and 1/8 of the picture


class ResidualBlock(nn.Module):
    def __init__(self, width: int, operations: ModuleType | type = nn, dtype=None, device=None):
        super().__init__()
        self.conv_1 = operations.Conv2d(width, width, 3, padding=1, dtype=dtype, device=device)
        self.conv_2 = operations.Conv2d(width, width, 3, padding=1, dtype=dtype, device=device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv_2(torch.relu(self.conv_1(torch.relu(x))))


class Autoencoder(nn.Module):
    """About 1.3 M parameters. `encode` and `decode` speak the latents of a VAE such as Stable Diffusion's.

    Args:
        latent_scale: factor that gives such latents unit deviation.
        operations: namespace that the convolutions come from.
    """

    def __init__(self, latent_scale: float, operations: ModuleType | type = nn, dtype=None, device=None):
        super().__init__()
        self.latent_scale = latent_scale
        placement = {"dtype": dtype, "device": device}
        half, quarter, eighth = _WIDTHS
        pixels = 3 * _FOLD**2

        def conv(inputs: int, outputs: int, size: int = 3, stride: int = 1):
            return operations.Conv2d(inputs, outputs, size, stride, padding=size // 2, **placement)

        def block(width: int) -> ResidualBlock:
            return ResidualBlock(width, operations, **placement)

        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(_FOLD),
            conv(pixels, half),
            nn.ReLU(),
            conv(half, quarter, stride=2),
            block(quarter),
            nn.ReLU(),
            conv(quarter, eighth, stride=2),
            block(eighth),
            nn.ReLU(),
            conv(eighth, LATENT_CHANNELS),
        )
        self.decoder = nn.Sequential(
            conv(LATENT_CHANNELS, eighth),
            block(eighth),
            block(eighth),
            conv(eighth, quarter * 4),
            nn.PixelShuffle(2),
            block(quarter),
            block(quarter),
            conv(quarter, half * 4),
            nn.PixelShuffle(2),
            block(half),
            nn.ReLU(),
            conv(half, pixels),
            nn.PixelShuffle(_FOLD),
        )
        self.register_buffer("latent_mean", torch.zeros(LATENT_CHANNELS, **placement))
        self.register_buffer("latent_deviation", torch.ones(LATENT_CHANNELS, **placement))

    def encode(self, image_B3HW: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in [-1, 1], sides divisible by 8 -> latents (B, 4, h, w); times ``latent_scale`` of deviation 1."""
        raw_B4hw = self.encoder(image_B3HW)
        mean = self.latent_mean.to(raw_B4hw)[:, None, None]
        deviation = self.latent_deviation.to(raw_B4hw)[:, None, None]
        return (raw_B4hw - mean) / deviation / self.latent_scale

    def decode(self, latent_B4hw: torch.Tensor) -> torch.Tensor:
        """(B, 4, h, w) -> picture (B, 3, H, W) in [-1, 1]."""
        return self.decoder(latent_B4hw * self.latent_scale).clamp(-1, 1)
