"""Tiny random checkpoints with text encoders of their own, in SDXL's true layout and SD1.5's: a diffusers folder, one file."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from test_training_backbones import SCHEDULE, SMALL_VAE, ldm_unet_name, ldm_vae
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from emma_core.text.clip_tokenizer import END, START, load_clip_tokenizer

WORDS = 49408  # of CLIP's vocabulary
WIDTHS, POOLED = (64, 128), 32  # of the two text encoders, and of the projection
_LEVELS = {"block_out_channels": [64, 128], "layers_per_block": 2, "sample_size": 8}
SDXL_UNET = {
    **_LEVELS, "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "cross_attention_dim": sum(WIDTHS), "attention_head_dim": [1, 2], "transformer_layers_per_block": [1, 2],
    "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 6 * 256 + POOLED,
}
SD15_UNET = {
    **_LEVELS, "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "cross_attention_dim": WIDTHS[0], "attention_head_dim": 8,
}
_OPEN_CLIP = (("text_model.embeddings.token_embedding", "token_embedding"), ("text_model.final_layer_norm", "ln_final"),
              ("text_model.encoder.layers", "transformer.resblocks"), ("layer_norm", "ln_"), ("self_attn", "attn"),
              ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"))


def save_checkpoint(folder: Path, sdxl: bool = True) -> Path:
    """A diffusers folder, the same every time."""
    torch.manual_seed(5)
    UNet2DConditionModel(**(SDXL_UNET if sdxl else SD15_UNET)).save_pretrained(folder / "unet")
    AutoencoderKL(**(SMALL_VAE | {"scaling_factor": 0.13025 if sdxl else 0.18215})).save_pretrained(folder / "vae")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULE))
    for number in range(2 if sdxl else 1):
        name = "text_encoder_2" if number else "text_encoder"
        (CLIPTextModelWithProjection if number else CLIPTextModel)(_text_config(number)).save_pretrained(folder / name)
        write_tokenizer(folder / ("tokenizer_2" if number else "tokenizer"))
    return folder


def _text_config(number: int) -> CLIPTextConfig:
    width = WIDTHS[number]
    return CLIPTextConfig(
        vocab_size=WORDS, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3, projection_dim=POOLED,
        num_attention_heads=width // 64, hidden_act="gelu" if number else "quick_gelu", bos_token_id=WORDS - 2,
        eos_token_id=WORDS - 1)


def write_tokenizer(folder: Path) -> None:
    """CLIP's published one, as folders have it: a vocabulary and merges."""
    folder.mkdir()
    parts = json.loads(load_clip_tokenizer(None)._tokenizer.to_str())["model"]
    assert {START, END} <= parts["vocab"].keys()
    (folder / "vocab.json").write_text(json.dumps(parts["vocab"]), encoding="utf-8")
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in parts["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")


def as_single_file(folder: Path, path: Path) -> Path:
    """The folder in the layout of published single files: SDXL's by sgm, SD1.5's by ldm."""
    sdxl = (folder / "text_encoder_2").is_dir()
    unet = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    tensors = {f"model.diffusion_model.{ldm_unet_name(key, first_attends=sdxl)}": value for key, value in unet.items()}
    vae = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    tensors |= {f"first_stage_model.{key}": value for key, value in ldm_vae(vae).items()}
    first = load_file(folder / "text_encoder" / "model.safetensors")
    prefix = "conditioner.embedders.0.transformer." if sdxl else "cond_stage_model.transformer."
    tensors |= {f"{prefix}{_outer(key)}": value for key, value in first.items()}
    tensors[f"{prefix}text_model.embeddings.position_ids"] = torch.arange(77)[None]
    if sdxl:
        second = load_file(folder / "text_encoder_2" / "model.safetensors")
        tensors |= {f"conditioner.embedders.1.model.{key}": value for key, value in open_clip_text(second).items()}
    save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    return path


def open_clip_text(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A text tower under open_clip's names: query, key and value in one, the projection the other way round."""
    found = {"positional_embedding": state["text_model.embeddings.position_embedding.weight"],
             "text_projection": state["text_projection.weight"].t(), "logit_scale": torch.tensor(4.6)}
    for key, value in state.items():
        if "position_embedding" in key or key.startswith("text_projection"):
            continue
        if ".q_proj." in key:
            stem, _, kind = key.rpartition(".q_proj.")
            parts = torch.cat([state[f"{stem}.{part}_proj.{kind}"] for part in "qkv"])
            found[_open_clip_name(f"{stem}.in_proj_{kind}")] = parts
        elif ".k_proj." not in key and ".v_proj." not in key:
            found[_open_clip_name(key)] = value
    return found


def _open_clip_name(key: str) -> str:
    for ours, theirs in _OPEN_CLIP:
        key = key.replace(ours, theirs)
    return key


def _outer(key: str) -> str:
    """transformers 5 leaves the outer name of a tower out, published files have it."""
    return key if key.startswith("text_") else f"text_model.{key}"
