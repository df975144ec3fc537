"""CLIP text towers in checkpoints: where they stand, under which names, and what of them a diffusion model reads.

Shapes: D hidden width, P width of the projection.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import TextEncoderFileError
from ..files.tensor_file import count_blocks

WHAT = "CLIP text encoder"
LENGTH = 77  # of a row of the published ones
_HEAD_WIDTH = 64
_MODEL = "text_model."
_IGNORED = re.compile(r"(text_model\.embeddings\.position_ids|logit_scale)")
_BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)")
_OPEN_CLIP_NAMES = {
    "token_embedding.weight": f"{_MODEL}embeddings.token_embedding.weight",
    "positional_embedding": f"{_MODEL}embeddings.position_embedding.weight",
    "ln_final.weight": f"{_MODEL}final_layer_norm.weight", "ln_final.bias": f"{_MODEL}final_layer_norm.bias",
    "text_projection.weight": "text_projection.weight", "logit_scale": "logit_scale",
}
_OPEN_CLIP_LAYERS = {
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


@dataclass(frozen=True)
class ClipTower:
    """One text encoder of a diffusion model.

    Args:
        folder, tokenizer: of a diffusers folder.
        prefix: of its weights in a single file.
        penultimate: the model reads the hidden states before the last layer, without the final norm; else the last, normed.
        projected: the projected embedding is the model's pooled vector.
        pads_with_end: short texts are filled with the end mark, else with token 0.
        hidden_act: what shapes do not tell.
    """

    folder: str
    tokenizer: str
    prefix: str
    penultimate: bool
    projected: bool
    pads_with_end: bool
    hidden_act: str


CLIP_L = ClipTower("text_encoder", "tokenizer", "cond_stage_model.transformer.", False, False, True, "quick_gelu")
SDXL_CLIP_L = ClipTower("text_encoder", "tokenizer", "conditioner.embedders.0.transformer.", True, False, True, "quick_gelu")
SDXL_CLIP_G = ClipTower("text_encoder_2", "tokenizer_2", "conditioner.embedders.1.model.", True, True, False, "gelu")


def canonical_names(tensors: Mapping[str, torch.Tensor], projected: bool) -> dict[str, torch.Tensor]:
    """A tower's weights in transformers' or open_clip's layout, under transformers' names.

    Args:
        tensors: by their names behind the prefix.
        projected: whether the projection is of use.
    """
    found: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        found |= _from_open_clip(key, tensor) if _is_open_clip(key) else {_of_transformers(key): tensor}
    return {key: tensor for key, tensor in found.items()
            if not _IGNORED.fullmatch(key) and (projected or not key.startswith("text_projection"))}


def config_of(tensors: Mapping[str, torch.Tensor], tower: ClipTower, name: str) -> dict[str, Any]:
    """transformers' configuration of a tower, from its shapes.

    Raises:
        TextEncoderFileError: no such tower.
    """
    def side(key: str, axis: int) -> int:
        shape = tensors[key].shape if key in tensors else ()
        return shape[axis] if len(shape) > axis else 0

    vocabulary, width = (side(f"{_MODEL}embeddings.token_embedding.weight", axis) for axis in (0, 1))
    positions = side(f"{_MODEL}embeddings.position_embedding.weight", 0)
    mlp = side(f"{_MODEL}encoder.layers.0.mlp.fc1.weight", 0)
    if not (width and mlp and positions):
        raise TextEncoderFileError(f"{name} holds no {WHAT} of the kind that is wanted: {tower.folder}/ of a diffusers folder, "
                                   f"{tower.prefix}* of a single file. Choose a whole checkpoint, with its text encoders.")
    layers = count_blocks(tensors, f"{_MODEL}encoder.layers.", name, TextEncoderFileError)
    return {"vocab_size": vocabulary, "hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers,
            "num_attention_heads": max(1, width // _HEAD_WIDTH), "max_position_embeddings": positions,
            "hidden_act": tower.hidden_act, "projection_dim": side("text_projection.weight", 0) or width}


def _is_open_clip(key: str) -> bool:
    return key in _OPEN_CLIP_NAMES or key == "text_projection" or bool(_BLOCK.fullmatch(key))


def _of_transformers(key: str) -> str:
    # files of 2022 have a tower without its outer name
    return f"{_MODEL}{key}" if key.startswith(("embeddings.", "encoder.", "final_layer_norm.")) else key


def _from_open_clip(key: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    if key == "text_projection":
        return {"text_projection.weight": tensor.t().contiguous() if tensor.ndim == 2 else tensor}
    block = _BLOCK.fullmatch(key)
    if block is None:
        return {_OPEN_CLIP_NAMES[key]: tensor}
    prefix, rest = f"{_MODEL}encoder.layers.{block[1]}", block[2]
    if rest in ("attn.in_proj_weight", "attn.in_proj_bias") and tensor.ndim and tensor.shape[0] % 3 == 0:
        kind = rest.rpartition("_")[2]
        return {f"{prefix}.self_attn.{part}_proj.{kind}": piece for part, piece in zip("qkv", tensor.chunk(3), strict=True)}
    layer, _, kind = rest.rpartition(".")
    return {f"{prefix}.{_OPEN_CLIP_LAYERS.get(layer, layer)}.{kind}": tensor}
