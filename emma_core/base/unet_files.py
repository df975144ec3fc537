"""Stable Diffusion 1.5, SDXL and their kin on disk: diffusers folders and single files in the original (LDM) layout, read
strictly.

Widths are read from the weights, so smaller models of the same build load too. Nothing is ever downloaded.
Shapes: T timesteps.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..errors import FileError
from ..files.diffusers_models import converted, load_model
from ..files.tensor_file import sha256_of_file
from .autoencoder_files import VAE_PREFIX, load_autoencoder
from .checkpoint_files import LoadedBase, declared_prediction, read, read_config, read_schedule, shapes_of, side, weights_in
from .recognition import CHECKPOINT, SIZE_CHANNELS, UNET_PREFIX, spec_of_config, spec_of_shapes, unet_shapes
from .schedule import zero_terminal
from .spec import BaseSpec

_UNET = "a UNet of Stable Diffusion 1.5 or SDXL"
# What shapes do not tell; the rest of the configuration is diffusers' default. diffusers' `attention_head_dim` is here the
# number of heads.
_SD15_HEADS, _SDXL_HEAD_WIDTH = 8, 64


def load_folder(folder: Path, with_autoencoder: bool = True, dtype: torch.dtype = torch.float32) -> LoadedBase:
    """A diffusers folder with unet/, scheduler/ and vae/.

    Args:
        dtype: of the UNet's weights.
    Raises:
        FileError: parts that are missing, pickled, of another model, damaged; a schedule of another count of timesteps.
    """
    from diffusers import UNet2DConditionModel

    config, name = read_config(folder / "unet" / "config.json"), f"{folder.name}/unet"
    spec = spec_of_config(config, name)
    weights = weights_in(folder / "unet")
    unet = load_model(UNet2DConditionModel, config, read(weights, _UNET), name, _UNET, dtype)
    alphas_cumprod_T, prediction = read_schedule(folder)
    spec = replace(spec, alphas_cumprod_T=alphas_cumprod_T, prediction=prediction)
    autoencoder = load_autoencoder(folder / "vae", spec) if with_autoencoder else None
    return LoadedBase(unet, autoencoder, spec, sha256_of_file(weights))


def load_single_file(path: Path, with_autoencoder: bool = True, dtype: torch.dtype = torch.float32) -> LoadedBase:
    """A whole checkpoint in one file: `model.diffusion_model.*` and `first_stage_model.*`; text encoders are not read here.

    What the UNet predicts is declared by the metadata `modelspec.prediction_type` or by a marker key `v_pred`; a key
    `ztsnr` declares a schedule that ends without signal.

    Args:
        dtype: of the UNet's weights.
    Raises:
        FileError: no such file, a pickle, another model, missing, unexpected, misshapen or non-finite weights.
    """
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    shapes, metadata = shapes_of(path, CHECKPOINT)
    spec = spec_of_shapes(unet_shapes(shapes), path.name)
    if with_autoencoder and not any(key.startswith(VAE_PREFIX) for key in shapes):
        raise FileError(f"{path.name} holds no autoencoder; wanted first_stage_model.* beside the UNet. Name one as base.vae.")
    config = unet_config_of(unet_shapes(shapes), spec)
    found = read(path, CHECKPOINT, (UNET_PREFIX,))
    renamed = converted(convert_ldm_unet_checkpoint, found, config, path.name, CHECKPOINT)
    unet = load_model(UNet2DConditionModel, config, renamed, path.name, _UNET, dtype)
    alphas_cumprod_T = zero_terminal(spec.alphas_cumprod_T) if "ztsnr" in shapes else spec.alphas_cumprod_T
    spec = replace(spec, alphas_cumprod_T=alphas_cumprod_T, prediction=declared_prediction(shapes, metadata, path.name))
    autoencoder = load_autoencoder(path, spec) if with_autoencoder else None
    return LoadedBase(unet, autoencoder, spec, sha256_of_file(path))


def unet_config_of(shapes: Mapping[str, tuple[int, ...]], spec: BaseSpec) -> dict[str, Any]:
    """diffusers' configuration of a UNet in the LDM layout (names without prefix), from its shapes.

    Args:
        spec: what it was recognised as.
    """
    widths, depths, layers = _levels(shapes)
    down = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths]
    up = ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(depths)]
    config = {"in_channels": spec.latent_channels, "out_channels": spec.latent_channels, "block_out_channels": widths,
              "layers_per_block": layers, "down_block_types": down, "up_block_types": up,
              "cross_attention_dim": spec.context_width, "attention_head_dim": _SD15_HEADS}
    if not spec.pooled_width:
        return config
    return {**config, "attention_head_dim": [max(1, width // _SDXL_HEAD_WIDTH) for width in widths],
            "use_linear_projection": True, "transformer_layers_per_block": [max(1, depth) for depth in depths],
            "addition_embed_type": "text_time", "addition_time_embed_dim": SIZE_CHANNELS,
            "projection_class_embeddings_input_dim": side(shapes, "label_emb.0.0.weight", 1)}


def _levels(shapes: Mapping[str, tuple[int, ...]]) -> tuple[list[int], list[int], int]:
    """Width of each resolution, transformer blocks of one attention there (0: none), and residual blocks in one."""
    widths, depths, layers, block = [0], [0], 0, 1
    while any(f"input_blocks.{block}.0.{kind}.weight" in shapes for kind in ("op", "out_layers.3")):
        if f"input_blocks.{block}.0.op.weight" in shapes:
            widths.append(0)
            depths.append(0)
        else:
            widths[-1] = side(shapes, f"input_blocks.{block}.0.out_layers.3.weight", 0)
            depths[-1] = max(depths[-1], _depth(shapes, block))
            layers += len(widths) == 1
        block += 1
    return widths, depths, layers


def _depth(shapes: Mapping[str, tuple[int, ...]], block: int) -> int:
    pattern = re.compile(rf"input_blocks[.]{block}[.]1[.]transformer_blocks[.]([0-9]{{1,3}})[.]")
    return max((int(match[1]) + 1 for name in shapes if (match := pattern.match(name))), default=0)
