"""What an IP-Adapter (arXiv 2308.06721) makes of a picture: tokens, which the base's cross-attentions read beside the text's.

Shapes: B pictures, V vectors of width D of a CLIP, P tokens of width W, L queries of the inner width I.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from ..errors import FileError, short
from ..files.tensor_file import count_blocks
from .ip_adapter_file import IpAdapterFile, layer_key

_HEAD_WIDTH = 64  # of the plus ones' attention


class PlainProjection(nn.Module):
    """One linear layer to P tokens, and LayerNorm; names as in the published files."""

    def __init__(self, dim: int, width: int, tokens: int):
        super().__init__()
        self.proj = nn.Linear(dim, tokens * width)
        self.norm = nn.LayerNorm(width)

    def forward(self, vectors_B1D: torch.Tensor) -> torch.Tensor:
        return self.norm(rearrange(self.proj(vectors_B1D), "b 1 (p w) -> b p w", w=self.norm.normalized_shape[0]))


class _Resampling(nn.Module):
    """Queries that attend to the picture and to themselves."""

    def __init__(self, inner: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(inner), nn.LayerNorm(inner)
        self.to_q = nn.Linear(inner, heads * _HEAD_WIDTH, bias=False)
        self.to_kv = nn.Linear(inner, 2 * heads * _HEAD_WIDTH, bias=False)
        self.to_out = nn.Linear(heads * _HEAD_WIDTH, inner, bias=False)

    def forward(self, picture_BVI: torch.Tensor, query_BLI: torch.Tensor) -> torch.Tensor:
        query_BLI = self.norm2(query_BLI)
        read = torch.cat([self.norm1(picture_BVI), query_BLI], dim=1)
        parts = (self.to_q(query_BLI), *self.to_kv(read).chunk(2, dim=-1))
        q, k, v = (rearrange(part, "b n (h d) -> b h n d", h=self.heads) for part in parts)
        return self.to_out(rearrange(scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)"))


class PlusProjection(nn.Module):
    """A perceiver resampler of L = P queries; names as in the published files."""

    def __init__(self, dim: int, inner: int, width: int, tokens: int, layers: int, heads: int, hidden: int):
        super().__init__()
        self.latents = nn.Parameter(torch.zeros(1, tokens, inner))
        self.proj_in, self.proj_out = nn.Linear(dim, inner), nn.Linear(inner, width)
        self.norm_out = nn.LayerNorm(width)
        self.layers = nn.ModuleList(nn.ModuleList([_Resampling(inner, heads), _feed_forward(inner, hidden)])
                                    for _ in range(layers))

    def forward(self, vectors_BVD: torch.Tensor) -> torch.Tensor:
        picture_BVI, query_BLI = self.proj_in(vectors_BVD), self.latents.expand(len(vectors_BVD), -1, -1)
        for attention, feed_forward in self.layers:
            query_BLI = query_BLI + attention(picture_BVI, query_BLI)
            query_BLI = query_BLI + feed_forward(query_BLI)
        return self.norm_out(self.proj_out(query_BLI))


def _feed_forward(inner: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(inner), nn.Linear(inner, hidden, bias=False), nn.GELU(),
                         nn.Linear(hidden, inner, bias=False))


def projection_of(adapter: IpAdapterFile) -> nn.Module:
    """What makes tokens (B, P, W) of a picture's vectors (B, V, D), in float32.

    Raises:
        FileError: weights that are missing, further, or do not go together.
    """
    layout, weights = adapter.layout, adapter.projection
    try:
        if layout.plus:
            query, hidden = weights["layers.0.0.to_q.weight"], weights["layers.0.1.1.weight"]
            _, tokens, inner = weights["latents"].shape
            layers = count_blocks(weights, "layers.", layout.name)
            made: nn.Module = PlusProjection(layout.dim, inner, layout.width, tokens, layers, len(query) // _HEAD_WIDTH,
                                             len(hidden))
        else:
            made = PlainProjection(layout.dim, layout.width, len(weights["proj.weight"]) // layout.width)
        made.load_state_dict({key: value.float() for key, value in weights.items()})
    except (KeyError, RuntimeError, ValueError) as found:
        reason = short(" ".join(str(found).split()), 200)
        raise FileError(f"{layout.name} has an image projection that is not whole ({reason}). Download it again.") from None
    return made.eval().requires_grad_(False)


def attention_weights(
    adapter: IpAdapterFile, chosen: tuple[bool, ...], device: torch.device, dtype: torch.dtype
) -> list[tuple[torch.Tensor, torch.Tensor] | None]:
    """The weights of keys and values of each cross-attention; None for those that are not chosen."""
    return [tuple(adapter.attention[layer_key(index, part)].to(device, dtype) for part in "kv") if wanted else None
            for index, wanted in enumerate(chosen)]
