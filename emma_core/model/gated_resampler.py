"""One EMMA module: a gated resampler block for each block of the connector (AGPR, arXiv 2406.09162, section 3).

Shapes: B rows, R references, K latent tokens, V vectors of a feature, C reference tokens, W token width,
E channels of the time embedding.
"""

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from einops import rearrange
from torch import nn

from .blocks import ResamplerLayers, cast_like
from .module_config import ModuleConfig


class GatedBlock(ResamplerLayers):
    """Attention and feed-forward of eqs. (3) to (6) with their gates.

    A new block has A = F = 0, so the connector is exactly ELLA, and g = 1, so the gates decide from there.
    """

    def __init__(
        self, width: int, heads: int, time_width: int, operations: ModuleType | type = nn, dtype=None, device=None
    ):
        super().__init__(width, heads, time_width, operations, dtype=dtype, device=device)
        self.gate = operations.Linear(width, 1, dtype=dtype, device=device)
        self.attn_gate = nn.Parameter(torch.zeros(1, dtype=dtype, device=device))
        self.ffn_gate = nn.Parameter(torch.zeros(1, dtype=dtype, device=device))
        if self.attn_gate.device.type != "meta":
            nn.init.zeros_(self.gate.weight)
            nn.init.ones_(self.gate.bias)

    def separable_gate(self, entry_BKW: torch.Tensor) -> torch.Tensor:
        """g = Linear(L0), (B, K, 1)."""
        return self.gate(entry_BKW)


class GatedResampler(nn.Module):
    """A module for one condition (style, object, portrait, face, ...).

    Args:
        config: its metadata; ``separable_gates=False`` is the paper's ablation, g = 1. Modules on a checkpoint's own tokens
            are `TokenResampler`s: see `resampler_for`.
        operations: namespace that the linear layers come from.
        dtype, device: of the weights.
    """

    def __init__(self, config: ModuleConfig, operations: ModuleType | type = nn, dtype=None, device=None):
        super().__init__()
        self.config = config
        self.name = f"the {config.condition} module"
        placement = {"operations": operations, "dtype": dtype, "device": device}
        self.blocks = nn.ModuleList(self._new_block(config, placement) for _ in range(config.layers))
        self.proj = nn.ModuleDict({
            name: operations.Linear(spec.dim, spec.tokens_per_vector * config.width, dtype=dtype, device=device)
            for name, spec in config.features.items()
        })

    @staticmethod
    def _new_block(config: ModuleConfig, placement: Mapping[str, Any]) -> GatedBlock:
        return GatedBlock(config.width, config.heads, config.time_width, **placement)

    def activated_time(self, timestep_B: torch.Tensor, of_source_BE: torch.Tensor | None) -> torch.Tensor:
        """SiLU(temb) (B, E) that the blocks listen to: that of the connector."""
        return of_source_BE

    def context(self, features: Mapping[str, torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        """Features -> reference tokens C (R, C, W), in the dtype and on the device of ``like``.

        Each vector becomes ``tokens_per_vector`` tokens; features follow in the order of the metadata.
        """
        self.config.check_features(features)
        rows = max(tensor.shape[0] for tensor in features.values())
        parts = []
        for name, spec in self.config.features.items():
            vectors_RVD = cast_like(features[name], like)
            tokens_RCW = rearrange(self.proj[name](vectors_RVD), "r v (t w) -> r (v t) w", t=spec.tokens_per_vector)
            parts.append(tokens_RCW.expand(rows, -1, -1))
        return torch.cat(parts, dim=1)

    def separable_gate(self, index: int, entry_BKW: torch.Tensor) -> torch.Tensor:
        """g of block ``index``, one value per token, (B, K, 1); 1 without separable gates."""
        if not self.config.separable_gates:
            return entry_BKW.new_ones(entry_BKW.shape[0], entry_BKW.shape[1], 1)
        return self.blocks[index].separable_gate(entry_BKW)

    def gate(self, index: int, entry_BKW: torch.Tensor) -> torch.Tensor:
        """lambda * g(L0) of block ``index``, (B, K, 1), times the strength that the file's calibration says."""
        scale = self.config.gate_scale * self.config.calibrated_strength
        return scale * self.separable_gate(index, entry_BKW)

    def attention(
        self, index: int, entry_BKW: torch.Tensor, context_BCW: torch.Tensor, activated_temb_BE: torch.Tensor,
        kept_BK: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """A * Attn(L0, C, temb) of block ``index``; no token attends to one that is not kept."""
        block = self.blocks[index]
        return cast_like(block.attn_gate, entry_BKW) * block.attention(entry_BKW, context_BCW, activated_temb_BE, kept_BK)

    def feed_forward(self, index: int, latents_BKW: torch.Tensor, activated_temb_BE: torch.Tensor) -> torch.Tensor:
        """F * FFN(L1, temb) of block ``index``."""
        block = self.blocks[index]
        return cast_like(block.ffn_gate, latents_BKW) * block.feed_forward(latents_BKW, activated_temb_BE)
