"""Small random models of every family whose own tokens modules act on, in the host's classes, and conditioning for them.

Shapes: S text tokens, D their width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import comfy.supported_models
import pytest
import torch
from tiny_models import UNET, fill_, noise

WIDTH = 48
POOLED = 1280  # SDXL's size ids are put behind a vector of this length
# the host's SDXL has heads of 64 channels, whatever is said
_XL_UNET = {**UNET, "model_channels": 64, "channel_mult": [1, 1], "context_dim": WIDTH, "adm_in_channels": POOLED + 6 * 256,
            "num_classes": "sequential"}
_ROPE_DIT = {"axes_dims": [8, 4, 4], "axes_lens": [64, 64, 64], "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2,
             "n_kv_heads": 2, "dim": 32, "cap_feat_dim": WIDTH, "patch_size": 2, "in_channels": 16, "qk_norm": True,
             "multiple_of": 32, "image_model": "lumina2"}


@dataclass(frozen=True)
class ModelFamily:
    """One kind of model: the host's class of it, the sizes of a small one, and what its conditioning holds besides.

    Args:
        name: as module files call it.
        host_class: in comfy.supported_models; hosts without it skip.
        sizes: its unet_config.
        options: of each conditioning entry.
        channels: of its latents; a video's are five-dimensional.
        time: how modules count its time.
        text: (seed) -> tokens (1, S, D).
    """

    name: str
    host_class: str
    sizes: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    channels: int = 4
    video: bool = False
    time: str = "ddpm"
    text: Callable[[int], torch.Tensor] = lambda seed: noise((1, 9, WIDTH), seed)

    def patcher(self, patcher_for, seed: int = 0):
        """MODEL with random weights."""
        if not hasattr(comfy.supported_models, self.host_class):
            pytest.skip(f"this host has no {self.host_class}")
        config = getattr(comfy.supported_models, self.host_class)(_fitting(self.host_class, self.sizes))
        config.set_inference_dtype(torch.float32, None)
        model = config.get_model({}, "", device=torch.device("cpu"))
        fill_(model.diffusion_model, seed)
        return patcher_for(model)

    def conditioning(self, seed: int = 4, **options) -> list:
        """CONDITIONING as this family's text encoder gives it."""
        return [[self.text(seed), {**self.options, **options}]]

    def latent(self, batch: int = 1, size: int = 8) -> dict:
        """LATENT of zeros."""
        frames = (1,) if self.video else ()
        return {"samples": torch.zeros(batch, self.channels, *frames, size, size)}


def _fitting(host_class: str, sizes: dict) -> dict:
    """Newer hosts want to be told more of a Flux."""
    if host_class == "Flux":
        from comfy.ldm.flux.model import FluxParams

        return sizes if "txt_ids_dims" in FluxParams.__annotations__ else {
            key: value for key, value in sizes.items() if key != "txt_ids_dims"}
    return sizes


def _with_padding(seed: int) -> torch.Tensor:
    """Rows of zeros behind the text, as Anima and Wan read them."""
    return torch.nn.functional.pad(noise((1, 9, WIDTH), seed), (0, 0, 0, 7))


_POOLED = {"pooled_output": noise((1, POOLED), 90)}
FAMILIES = {
    family.name + suffix: family for suffix, family in (
        ("", ModelFamily("sd15", "SD15", {**UNET, "context_dim": WIDTH}, {"pooled_output": noise((1, WIDTH), 90)})),
        ("", ModelFamily("sdxl", "SDXL", _XL_UNET, {**_POOLED, "width": 640, "height": 512, "crop_w": 8, "crop_h": 16,
                                                    "target_width": 600, "target_height": 500})),
        (" inpainting", ModelFamily("sdxl", "SDXL", {**_XL_UNET, "in_channels": 9}, _POOLED)),
        ("", ModelFamily("sd3", "SD3", {
            "in_channels": 16, "patch_size": 2, "depth": 1, "adm_in_channels": 20, "pos_embed_max_size": 16, "num_patches": 256,
            "input_size": None, "context_embedder_config": {"target": "torch.nn.Linear", "params": {
                "in_features": WIDTH, "out_features": 64}}},
            {"pooled_output": noise((1, 20), 91)}, 16, time="flow")),
        ("", ModelFamily("flux", "Flux", {
            "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 20, "context_in_dim": WIDTH,
            "hidden_size": 32, "mlp_ratio": 2.0, "num_heads": 2, "depth": 1, "depth_single_blocks": 1, "axes_dim": [4, 6, 6],
            "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": True, "txt_ids_dims": []},
            {"pooled_output": noise((1, 20), 92), "guidance": 2.5}, 16, time="flow")),
        # with a mask it samples one row at a time only in 0.3.64, without us too
        ("", ModelFamily("lumina2", "Lumina2", _ROPE_DIT, {"attention_mask": torch.ones(1, 9, dtype=torch.long)}, 16,
                         time="flow")),
        ("", ModelFamily("z-image", "ZImage", {
            **_ROPE_DIT, "dim": 256, "n_heads": 16, "n_kv_heads": 16, "z_image_modulation": True, "time_scale": 1000.0,
            "pad_tokens_multiple": 4}, {"attention_mask": torch.tensor([[1] * 7 + [0] * 2])}, 16, time="flow")),
        ("", ModelFamily("qwen-image", "QwenImage", {
            "image_model": "qwen_image", "in_channels": 64, "num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
            "joint_attention_dim": WIDTH, "axes_dims_rope": (4, 6, 6)},
            {"attention_mask": torch.tensor([[1] * 6 + [0] * 3])}, 16, video=True, time="flow")),
        ("", ModelFamily("anima", "Anima", {
            "image_model": "anima", "max_img_h": 16, "max_img_w": 16, "max_frames": 4, "in_channels": 16, "out_channels": 16,
            "patch_spatial": 2, "patch_temporal": 1, "model_channels": 32, "concat_padding_mask": True,
            "crossattn_emb_channels": 1024, "pos_emb_cls": "rope3d", "pos_emb_learnable": True, "pos_emb_interpolation": "crop",
            "min_fps": 1, "max_fps": 30, "use_adaln_lora": True, "adaln_lora_dim": 8, "num_blocks": 1, "num_heads": 2,
            "extra_per_block_abs_pos_emb": False, "rope_h_extrapolation_ratio": 4.0, "rope_w_extrapolation_ratio": 4.0,
            "rope_t_extrapolation_ratio": 1.0}, {"t5xxl_ids": torch.arange(5), "t5xxl_weights": torch.ones(5)}, 16, video=True,
            time="flow", text=lambda seed: noise((1, 6, 1024), seed))),
        ("", ModelFamily("wan", "WAN21_T2V", {
            "image_model": "wan2.1", "model_type": "t2v", "dim": 32, "out_dim": 16, "in_dim": 16, "num_heads": 2, "ffn_dim": 64,
            "num_layers": 1, "patch_size": (1, 2, 2), "freq_dim": 32, "text_dim": WIDTH}, {}, 16, video=True, time="flow",
            text=_with_padding)),
    )
}
