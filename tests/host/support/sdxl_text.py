"""The host's SDXL text encoders with few and narrow layers, and a loader of an SDXL checkpoint of that kind."""

from __future__ import annotations

from dataclasses import replace

import comfy.sd
import comfy.sdxl_clip
import comfy.supported_models_base
import torch
from model_families import FAMILIES, POOLED
from tiny_models import TinyWorld, fill_

WIDTHS = (64, 128)
CHECKPOINT = "sd_xl_base_1.0.safetensors"
_SIZES = [{"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 3, "num_attention_heads": width // 64}
          for width in WIDTHS]
FAMILY = replace(FAMILIES["sdxl"], sizes={**FAMILIES["sdxl"].sizes, "context_dim": sum(WIDTHS)},
                 text=lambda seed: torch.zeros(1, 77, sum(WIDTHS)))


def small_sdxl_clip() -> comfy.sdxl_clip.SDXLClipModel:
    """The host's own class of both encoders; sizes alone differ."""
    return comfy.sdxl_clip.SDXLClipModel(dtype=torch.float32, model_options={
        "clip_l_model_config": _SIZES[0], "clip_g_model_config": _SIZES[1]})


class _WidePooled(comfy.sdxl_clip.SDXLClipModel):
    """The same with a pooled vector as long as SDXL's, behind which the host puts the sizes."""

    def __init__(self, device="cpu", dtype=None, model_options=None):
        torch.nn.Module.__init__(self)
        made = fill_(small_sdxl_clip(), 64)
        self.clip_l, self.clip_g, self.dtypes = made.clip_l, made.clip_g, made.dtypes

    def encode_token_weights(self, token_weight_pairs):
        tokens_1SD, pooled_1P = super().encode_token_weights(token_weight_pairs)
        return tokens_1SD, pooled_1P.repeat(1, POOLED // pooled_1P.shape[1])


def small_sdxl_loader(tiny: TinyWorld, host_nodes) -> type:
    """A test double of CheckpointLoaderSimple: an SDXL MODEL and CLIP of few layers, the VAE of the SD1.5 file."""

    class SmallSdxl(host_nodes.CheckpointLoaderSimple):
        def load_checkpoint(self, ckpt_name):
            from workflow_files import CHECKPOINT as OTHER

            assert ckpt_name == CHECKPOINT
            vae = super().load_checkpoint(OTHER)[2]
            target = comfy.supported_models_base.ClipTarget(comfy.sdxl_clip.SDXLTokenizer, _WidePooled)
            return FAMILY.patcher(tiny.patcher_for), comfy.sd.CLIP(target), vae

    return SmallSdxl
