"""EMMA modules on the tokens that a checkpoint reads anyway: no connector, so each brings its time embedding.

Shapes: B rows, S tokens of the model's text, D their width, C reference tokens, W inner width of the module, E channels of
the time embedding.
"""

from collections.abc import Mapping
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import nn

from .blocks import LAYER_NORM_EPS, TimeEmbedding
from .gated_resampler import GatedBlock, GatedResampler
from .module_config import ModuleConfig

TIME_CHANNELS = 320


class TokenBlock(GatedBlock):
    """Eqs. (3) to (6) with L0 the model's tokens, at an inner width.

    Attention, feed-forward and gate read In(L) = Linear(LayerNorm(L)); what is added to L goes through Out (W -> D).
    """

    def __init__(
        self, token_width: int, width: int, heads: int, time_width: int, operations: ModuleType | type = nn, dtype=None,
        device=None,
    ):
        super().__init__(width, heads, time_width, operations, dtype=dtype, device=device)
        self.proj_in = operations.Linear(token_width, width, dtype=dtype, device=device)
        self.proj_out = operations.Linear(width, token_width, dtype=dtype, device=device)

    def read(self, tokens_BSD: torch.Tensor) -> torch.Tensor:
        """In(L), (B, S, W), in the weights' dtype; a norm first, as text encoders differ in size by orders of magnitude."""
        normal_BSD = F.layer_norm(tokens_BSD.float(), tokens_BSD.shape[-1:], eps=LAYER_NORM_EPS)
        return self.proj_in(normal_BSD.to(self.attn_gate.dtype))

    def separable_gate(self, entry_BKW: torch.Tensor) -> torch.Tensor:
        """g = Linear(In(L0)), (B, S, 1)."""
        return self.gate(self.read(entry_BKW))

    def attention(
        self, latents_BKW: torch.Tensor, context_BCW: torch.Tensor, activated_temb_BE: torch.Tensor,
        kept_BK: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Out(Attn(In(L), C, temb)), (B, S, D)."""
        return self.proj_out(super().attention(self.read(latents_BKW), context_BCW, activated_temb_BE, kept_BK))

    def feed_forward(self, latents_BKW: torch.Tensor, activated_temb_BE: torch.Tensor) -> torch.Tensor:
        """Out(FFN(In(L), temb)), (B, S, D)."""
        return self.proj_out(super().feed_forward(self.read(latents_BKW), activated_temb_BE))


class TokenResampler(GatedResampler):
    """A module for one condition on a checkpoint's own tokens; ``config.source`` and ``config.time`` say on which."""

    def __init__(self, config: ModuleConfig, operations: ModuleType | type = nn, dtype=None, device=None):
        super().__init__(config, operations, dtype=dtype, device=device)
        self.time_embedding = TimeEmbedding(TIME_CHANNELS, config.time_width, operations, dtype=dtype, device=device)

    @staticmethod
    def _new_block(config, placement) -> GatedBlock:
        return TokenBlock(config.source.width, config.width, config.heads, config.time_width, **placement)

    @property
    def compute_dtype(self) -> torch.dtype:
        """dtype of the activations inside the blocks."""
        return self.blocks[0].attn_gate.dtype

    def activated_time(self, timestep_B: torch.Tensor, of_source_BE: torch.Tensor | None) -> torch.Tensor:
        """SiLU(temb) (B, E) of the module's own time embedding."""
        return F.silu(self.time_embedding(timestep_B, self.compute_dtype))

    def context(self, features: Mapping[str, torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        """Features -> reference tokens C (R, C, W), in the module's dtype, on the device of ``like``."""
        return super().context(features, like.new_empty(0, dtype=self.compute_dtype))


def resampler_for(
    config: ModuleConfig, operations: ModuleType | type = nn, dtype=None, device=None
) -> GatedResampler:
    """A new module of the kind that its metadata declare."""
    kind = GatedResampler if config.source is None else TokenResampler
    return kind(config, operations, dtype=dtype, device=device)
