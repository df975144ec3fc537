"""Stable Diffusion 1.5 and its kin on disk: diffusers folders and single files in the original (LDM) layout, read strictly.

Widths are read from the weights, so smaller models of the same build load too. Nothing is ever downloaded.
Shapes: T timesteps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import FileError, short
from ..files.diffusers_models import converted, load_model
from ..files.tensor_file import sha256_of_file
from .autoencoder_files import VAE_PREFIX, load_autoencoder
from .checkpoint_files import LoadedBase, declared_prediction, read, read_config, read_schedule, shapes_of, side, weights_in
from .schedule import zero_terminal
from .spec import SD15

_UNET, _CHECKPOINT = "an SD1.5-family UNet", "an SD1.5-family checkpoint"
# What shapes do not tell; the rest of SD1.5's configuration is diffusers' default. diffusers' `attention_head_dim` is here
# the number of heads.
_HEADS = 8
UNET_PREFIX = "model.diffusion_model."
_OTHER_WIDTHS = {1024: "Stable Diffusion 2", 1280: "the SDXL refiner", 2048: "SDXL"}
_OTHER_INPUTS = {5: "a depth-to-image model", 8: "InstructPix2Pix or another editing model", 9: "an inpainting model"}


def load_folder(folder: Path, with_autoencoder: bool = True) -> LoadedBase:
    """A diffusers folder with unet/, scheduler/ and vae/.

    Raises:
        FileError: parts that are missing, pickled, of another model, damaged; a schedule of another count of timesteps.
    """
    config = read_config(folder / "unet" / "config.json")
    name = f"{folder.name}/unet"
    refuse_other_models(config.get("in_channels"), config.get("cross_attention_dim"), name)
    weights = weights_in(folder / "unet")
    from diffusers import UNet2DConditionModel

    unet = load_model(UNet2DConditionModel, config, read(weights, _UNET), name, _UNET)
    alphas_cumprod_T, prediction = read_schedule(folder)
    spec = replace(SD15, context_width=config["cross_attention_dim"], alphas_cumprod_T=alphas_cumprod_T, prediction=prediction)
    autoencoder = load_autoencoder(folder / "vae", spec) if with_autoencoder else None
    return LoadedBase(unet, autoencoder, spec, sha256_of_file(weights))


def load_single_file(path: Path, with_autoencoder: bool = True) -> LoadedBase:
    """A whole checkpoint in one file: `model.diffusion_model.*` and `first_stage_model.*`; the text encoder is not read.

    What the UNet predicts is declared by the metadata `modelspec.prediction_type` or by a marker key `v_pred`; a key
    `ztsnr` declares a schedule that ends without signal.

    Raises:
        FileError: no such file, a pickle, another model, missing, unexpected, misshapen or non-finite weights.
    """
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    shapes, metadata = shapes_of(path, _CHECKPOINT)
    config = unet_config_of({key.removeprefix(UNET_PREFIX): shape for key, shape in shapes.items()
                             if key.startswith(UNET_PREFIX)}, path.name)
    if with_autoencoder and not any(key.startswith(VAE_PREFIX) for key in shapes):
        raise FileError(f"{path.name} holds no autoencoder; wanted first_stage_model.* beside the UNet. Name one as base.vae.")
    found = read(path, _CHECKPOINT, (UNET_PREFIX,))
    renamed = converted(convert_ldm_unet_checkpoint, found, config, path.name, _CHECKPOINT)
    unet = load_model(UNet2DConditionModel, config, renamed, path.name, _UNET)
    alphas_cumprod_T = zero_terminal(SD15.alphas_cumprod_T) if "ztsnr" in shapes else SD15.alphas_cumprod_T
    spec = replace(SD15, context_width=config["cross_attention_dim"], alphas_cumprod_T=alphas_cumprod_T,
                   prediction=declared_prediction(shapes, metadata, path.name))
    autoencoder = load_autoencoder(path, spec) if with_autoencoder else None
    return LoadedBase(unet, autoencoder, spec, sha256_of_file(path))


def unet_config_of(shapes: Mapping[str, tuple[int, ...]], name: str) -> dict[str, Any]:
    """diffusers' configuration of a UNet in the LDM layout (names without prefix), from its shapes.

    Raises:
        FileError: no such UNet, or that of another model.
    """
    in_channels, key = side(shapes, "input_blocks.0.0.weight", 1), "attn2.to_k.weight"
    contexts = {side(shapes, layer, 1) for layer in shapes if layer.endswith(key)}
    if not in_channels or not contexts:
        raise FileError(f"{name} holds no {UNET_PREFIX}* weights of a UNet with cross-attention; wanted {_CHECKPOINT}, UNet "
                        "and autoencoder in one file. Choose another file, or the diffusers folder as a whole.")
    context_width = max(contexts)
    refuse_other_models(in_channels, context_width, name, more="label_emb.0.0.weight" in shapes)
    widths, attends, layers = _levels(shapes)
    down = ["CrossAttnDownBlock2D" if attention else "DownBlock2D" for attention in attends]
    up = ["CrossAttnUpBlock2D" if attention else "UpBlock2D" for attention in reversed(attends)]
    return {"in_channels": in_channels, "out_channels": SD15.latent_channels, "block_out_channels": widths,
            "layers_per_block": layers, "down_block_types": down, "up_block_types": up, "cross_attention_dim": context_width,
            "attention_head_dim": _HEADS}


def _levels(shapes: Mapping[str, tuple[int, ...]]) -> tuple[list[int], list[bool], int]:
    """Width of each resolution, whether it attends, and residual blocks in one."""
    widths, attends, layers, block = [0], [False], 0, 1
    while any(f"input_blocks.{block}.0.{kind}.weight" in shapes for kind in ("op", "out_layers.3")):
        if f"input_blocks.{block}.0.op.weight" in shapes:
            widths.append(0)
            attends.append(False)
        else:
            widths[-1] = side(shapes, f"input_blocks.{block}.0.out_layers.3.weight", 0)
            attends[-1] |= f"input_blocks.{block}.1.proj_in.weight" in shapes
            layers += len(widths) == 1
        block += 1
    return widths, attends, layers


def refuse_other_models(in_channels: Any, context_width: Any, name: str, more: bool = False) -> None:
    """Refuse a UNet that is not SD1.5's.

    Raises:
        FileError: what it is instead.
    """
    numbers = isinstance(in_channels, int) and isinstance(context_width, int)
    known = _OTHER_INPUTS.get(in_channels) or _OTHER_WIDTHS.get(context_width) if numbers else None
    kind = "SDXL" if more else known
    if kind is None and in_channels == SD15.latent_channels and numbers:
        return
    raise FileError(f"{name} is {kind or 'another model'}: {short(in_channels)} input channels, cross-attention of width "
                    f"{short(context_width)}; wanted Stable Diffusion 1.5 or a model tuned from it: {SD15.latent_channels} "
                    f"input channels, width {SD15.context_width}. Choose such a checkpoint.")
