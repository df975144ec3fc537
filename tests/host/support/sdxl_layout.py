"""The block layout of SDXL at a fifth of its width; its tokens have their real width, by which other packs know SDXL."""

from __future__ import annotations

from model_families import FAMILIES, ModelFamily
from tiny_models import noise

TOKENS = 2048
# of the 70 cross-attentions, in the order of IPAdapter's files: input, output and middle blocks
ATTENTION_WIDTHS = (128,) * 4 + (256,) * 20 + (256,) * 30 + (128,) * 6 + (256,) * 10
SDXL = ModelFamily("sdxl", "SDXL", {
    **FAMILIES["sdxl"].sizes, "channel_mult": [1, 2, 4], "num_res_blocks": [2, 2, 2],
    "transformer_depth": [0, 0, 2, 2, 10, 10], "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "transformer_depth_middle": 10, "context_dim": TOKENS, "use_linear_in_transformer": True,
}, FAMILIES["sdxl"].options, text=lambda seed: noise((1, 9, TOKENS), seed))
