"""Which base a checkpoint is, told by a file's header or a folder's configuration, before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import FileError, short
from .checkpoint_files import read_config, shapes_of, side
from .spec import SD15, SDXL, BaseSpec

UNET_PREFIX = "model.diffusion_model."
CHECKPOINT = "a checkpoint of Stable Diffusion 1.5 or SDXL"
SIZES, SIZE_CHANNELS = 6, 256  # that SDXL is told, and the channels that each of them becomes
_OTHER_WIDTHS = {1024: "Stable Diffusion 2", 1280: "the SDXL refiner"}
_OTHER_INPUTS = {5: "a depth-to-image model", 8: "InstructPix2Pix or another editing model", 9: "an inpainting model"}


def recognised(path: Path) -> BaseSpec:
    """The family of a checkpoint, with the widths that it declares; its schedule and prediction are the family's yet.

    Raises:
        FileError: no such file or folder, or another model.
    """
    if path.is_dir():
        return spec_of_config(read_config(path / "unet" / "config.json"), f"{path.name}/unet")
    shapes, _ = shapes_of(path, CHECKPOINT)
    return spec_of_shapes(unet_shapes(shapes), path.name)


def unet_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Those of a single file's UNet, names without prefix."""
    return {key.removeprefix(UNET_PREFIX): shape for key, shape in shapes.items() if key.startswith(UNET_PREFIX)}


def spec_of_config(config: Mapping[str, Any], name: str) -> BaseSpec:
    """Of a UNet's config.json in a diffusers folder.

    Raises:
        FileError: another model.
    """
    inputs, width, told = (config.get(key) for key in ("in_channels", "cross_attention_dim", "addition_embed_type"))
    pooled_width = 0
    if told == "text_time":
        taken, channels = (config.get(key) for key in ("projection_class_embeddings_input_dim", "addition_time_embed_dim"))
        pooled_width = taken - SIZES * channels if isinstance(taken, int) and isinstance(channels, int) else -1
    elif told is not None:
        pooled_width = -1
    return _spec(inputs, width, pooled_width, name)


def spec_of_shapes(shapes: Mapping[str, tuple[int, ...]], name: str) -> BaseSpec:
    """Of a UNet in the LDM layout (names without prefix).

    Raises:
        FileError: no such UNet, or that of another model.
    """
    inputs = side(shapes, "input_blocks.0.0.weight", 1)
    widths = {side(shapes, layer, 1) for layer in shapes if layer.endswith("attn2.to_k.weight")}
    if not inputs or not widths:
        raise FileError(f"{name} holds no {UNET_PREFIX}* weights of a UNet with cross-attention; wanted {CHECKPOINT}, UNet "
                        "and autoencoder in one file. Choose another file, or the diffusers folder as a whole.")
    taken = side(shapes, "label_emb.0.0.weight", 1)
    return _spec(inputs, max(widths), taken - SIZES * SIZE_CHANNELS if taken else 0, name)


def _spec(inputs: Any, width: Any, pooled_width: int, name: str) -> BaseSpec:
    numbers = isinstance(inputs, int) and isinstance(width, int)
    known = _OTHER_INPUTS.get(inputs) or _OTHER_WIDTHS.get(width) if numbers else None
    plain = numbers and known is None and inputs == SD15.latent_channels
    if plain and pooled_width > 0:
        return replace(SDXL, context_width=width, pooled_width=pooled_width)
    if plain and pooled_width == 0 and width != SDXL.context_width:
        return replace(SD15, context_width=width)
    raise FileError(f"{name} is {known or 'another model'}: {short(inputs)} input channels, cross-attention of width "
                    f"{short(width)}; wanted Stable Diffusion 1.5 or SDXL, or a model tuned from one: {SD15.latent_channels} "
                    f"input channels, width {SD15.context_width} or {SDXL.context_width}. Choose such a checkpoint.")
