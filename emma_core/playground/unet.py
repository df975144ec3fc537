"""The attention that the playground's UNet computes with.

Shapes: B pictures, N query positions, M key positions, C channels, H heads, d channels of a head.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange


class PlainAttention:
    """diffusers attention processor: matmul, softmax, matmul. Its backward is faster on a CPU than the fused one."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        scale = 1 / math.sqrt(attn.inner_dim // attn.heads)
        q_BHNd = self._heads(attn.to_q(hidden_states) * scale, attn.heads)
        k_BHMd = self._heads(attn.to_k(context), attn.heads)
        v_BHMd = self._heads(attn.to_v(context), attn.heads)
        weight_BHNM = torch.softmax(q_BHNd @ k_BHMd.transpose(-1, -2), dim=-1)
        out_BNC = rearrange(weight_BHNM @ v_BHMd, "b h n d -> b n (h d)")
        return attn.to_out[1](attn.to_out[0](out_BNC))

    @staticmethod
    def _heads(x_BNC: torch.Tensor, heads: int) -> torch.Tensor:
        return rearrange(x_BNC, "b n (h d) -> b h n d", h=heads)
