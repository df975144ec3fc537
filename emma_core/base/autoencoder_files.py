"""The autoencoders of Stable Diffusion's family on disk: diffusers folders and single files in either layout.

Shapes: B pictures H x W, latents 4 x h x w.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import FileError, short
from ..files.diffusers_models import converted, load_model
from ..files.json_file import entry_of
from .checkpoint_files import read, read_config, shapes_of, side, weights_in
from .spec import BaseSpec

VAE_PREFIX = "first_stage_model."
VAE = "a Stable Diffusion autoencoder"
_VAE_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
# names of attention layers in autoencoder folders of before 2023
_OLD_ATTENTION = re.compile(r"(.*mid_block\.attentions\.0)\.(query|key|value|proj_attn)\.(weight|bias)")
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class KlAutoencoder(nn.Module):
    """diffusers' AutoencoderKL as the playground's autoencoder is used: unscaled latents, the posterior's mean."""

    def __init__(self, model: nn.Module, latent_scale: float):
        super().__init__()
        self.model = model
        self.latent_scale = latent_scale

    def encode(self, image_B3HW: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in [-1, 1] -> latents (B, 4, h, w)."""
        return self.model.encode(image_B3HW).latent_dist.mean

    def decode(self, latent_B4hw: torch.Tensor) -> torch.Tensor:
        """(B, 4, h, w) -> picture (B, 3, H, W) in [-1, 1]."""
        return self.model.decode(latent_B4hw, return_dict=False)[0].clamp(-1, 1)


def load_autoencoder(path: Path, spec: BaseSpec) -> KlAutoencoder:
    """An autoencoder: a diffusers folder (or one with vae/ in it), a single file in either layout, or a whole checkpoint.

    Args:
        path: of it.
        spec: of the base it is for; a folder may declare another scale.
    Raises:
        FileError: no such thing, a pickle, latents of other channels, missing, unexpected or non-finite weights.
    """
    if path.is_dir():
        folder = path if (path / "config.json").exists() else path / "vae"
        config = read_config(folder / "config.json")
        tensors = read(weights_in(folder), VAE)
        return _autoencoder(config, tensors, f"{folder.parent.name}/{folder.name}", spec)
    shapes, _ = shapes_of(path, VAE)
    prefix = VAE_PREFIX if any(key.startswith(VAE_PREFIX) for key in shapes) else ""
    parts = tuple(f"{prefix}{part}" for part in _VAE_PARTS)
    tensors = {key.removeprefix(prefix): value for key, value in read(path, VAE, parts).items()}
    config = vae_config_of({key: tuple(value.shape) for key, value in tensors.items()}, path.name, spec)
    if "encoder.down.0.block.0.conv1.weight" in tensors:
        from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

        tensors = converted(convert_ldm_vae_checkpoint, tensors, config, path.name, VAE)
    return _autoencoder(config, tensors, path.name, spec)


def vae_config_of(shapes: Mapping[str, tuple[int, ...]], name: str, spec: BaseSpec) -> dict[str, Any]:
    """diffusers' configuration of an autoencoder in the LDM layout, or in diffusers' own, from its shapes.

    Raises:
        FileError: no such autoencoder, or one with other latents.
    """
    last = side(shapes, "encoder.conv_out.weight", 0)
    widths, layers = [], 0
    for layer in ("encoder.down.{}.block.{}.conv1.weight", "encoder.down_blocks.{}.resnets.{}.conv1.weight"):
        while layer.format(len(widths), 0) in shapes:
            widths.append(side(shapes, layer.format(len(widths), 0), 0))
        layers = layers or sum(layer.format(0, index) in shapes for index in range(8))
    if not last or not widths:
        raise FileError(f"{name} holds no autoencoder (encoder.*, decoder.*); wanted {VAE}. Choose another file.")
    _check_channels(last // 2, name, spec)
    return {"block_out_channels": widths, "layers_per_block": layers, "latent_channels": spec.latent_channels,
            "down_block_types": ["DownEncoderBlock2D"] * len(widths), "up_block_types": ["UpDecoderBlock2D"] * len(widths),
            "scaling_factor": spec.latent_scale}


def _autoencoder(
    config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], name: str, spec: BaseSpec
) -> KlAutoencoder:
    from diffusers import AutoencoderKL

    _check_channels(config.get("latent_channels"), name, spec)
    renamed = {}
    for key, value in tensors.items():
        old = _OLD_ATTENTION.fullmatch(key)
        renamed[f"{old[1]}.{_OLD_NAMES[old[2]]}.{old[3]}" if old else key] = value
    scale = entry_of(config, "scaling_factor", float, f"{name}: its configuration", FileError, spec.latent_scale)
    if not (math.isfinite(scale) and scale > 0):
        raise FileError(f"{name}: its configuration has scaling_factor = {scale}; wanted a number above 0. Download it again.")
    return KlAutoencoder(load_model(AutoencoderKL, config, renamed, name, VAE), float(scale))


def _check_channels(found: Any, name: str, spec: BaseSpec) -> None:
    if found != spec.latent_channels:
        raise FileError(f"{name} has latents of {short(found)} channels; wanted {spec.latent_channels}, as {VAE} has. Choose "
                        "an autoencoder made for this kind of checkpoint.")
